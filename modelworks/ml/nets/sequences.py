"""Nets that read sequences: of tokens, of frames of sound, of steps of a series. Recurrent ones, and transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import GENERATION, TAGGING
from modelworks.ml.base import Block, Examples
from modelworks.ml.nets.params import RnnParams, TransformerParams
from modelworks.ml.nets.trainer import NetTrainer

if TYPE_CHECKING:
    import torch


class Rnn(NetTrainer):
    """A recurrent net (LSTM or GRU) over token sequences, sounds, or the steps that a table's columns form; it also names
    each element of a sequence."""

    tasks: ClassVar[tuple[str, ...]] = (*NetTrainer.tasks, TAGGING)
    tokens: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("text", "audio", "tabular")
    Params: ClassVar[type[RnnParams]] = RnnParams

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        from torch import nn

        from modelworks.ml.nets.layers import Reader, Recurrent

        front, width, _ = front_of(alone(examples, "rnn"), params.steps, params.embedding, raw=True)
        both = bool(params.bidirectional)
        body = Recurrent(params.cell, width, params.hidden, params.layers, both, params.dropout)
        reader = Reader(front, body, last=not both)
        return nn.Sequential(reader, nn.Dropout(params.dropout), nn.Linear(params.hidden * (1 + both), outputs))

    def over(self, length: int, params: Any) -> tuple[int, torch.nn.Module, int]:
        """(width of what it takes, what reads a sequence of vectors, width of what that gives), each [n, length, width]."""
        from modelworks.ml.nets.layers import Recurrent

        both = params.bidirectional is not False
        body = Recurrent(params.cell, params.embedding, params.hidden, params.layers, both, params.dropout, packed=True)
        return params.embedding, body, params.hidden * (1 + both)


class Transformer(NetTrainer):
    """A transformer encoder over token sequences, sounds, or the steps that a table's columns form; it also names each
    element of a sequence, and learns to go on with texts as a small decoder (text-generation)."""

    tasks: ClassVar[tuple[str, ...]] = (*NetTrainer.tasks, TAGGING, GENERATION)
    tokens: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("text", "audio", "tabular")
    Params: ClassVar[type[TransformerParams]] = TransformerParams

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        from torch import nn

        from modelworks.ml.nets.layers import Encoder, Reader

        front, width, length = front_of(alone(examples, "transformer"), params.steps, params.width, raw=False)
        body = Encoder(length, width, params.heads, params.feed_forward, params.layers, params.dropout)
        return nn.Sequential(Reader(front, body, last=False), nn.Dropout(params.dropout), nn.Linear(width, outputs))

    def over(self, length: int, params: Any) -> tuple[int, torch.nn.Module, int]:
        """As of `Rnn`."""
        from modelworks.ml.nets.layers import Encoder

        body = Encoder(length, params.width, params.heads, params.feed_forward, params.layers, params.dropout)
        return params.width, body, params.width


def alone(examples: Examples, name: str) -> Block:
    """The one block of features."""
    if len(examples.blocks) > 1:
        there = ", ".join(f"{block.name} ({block.kind})" for block in examples.blocks[:10])
        raise InvalidInput(
            f"{name} reads one sequence, and there are several features: {there}; keep one, or choose multimodal",
            code="wrong_features",
            param="features",
        )
    return examples.blocks[0]


def front_of(block: Block, steps: int | None, width: int, *, raw: bool) -> tuple[torch.nn.Module, int, int]:
    """(what makes vectors of the features, their width, how many). `raw`: numbers need not become vectors of `width`."""
    from modelworks.ml.nets.layers import Steps, Tokens

    if block.kind == "tokens":
        length = block.shape[0]
        return Tokens(int(block.about["vocabulary"]), int(block.about["pad"]), width), width, length
    wanted = None if raw else width
    if block.kind == "audio" and len(block.shape) == 3:
        _, bands, frames = block.shape
        return Steps(frames, bands, wanted, transposed=True), wanted or bands, frames
    if block.kind == "image":
        channels, height, across = block.shape
        return Steps(height, across * channels, wanted, transposed=False), wanted or across * channels, height
    count = math.prod(block.shape)
    length = steps or count
    if count % length:
        raise InvalidInput(
            f"{count} features do not make {length} steps of one size; choose a number that divides {count}",
            code="bad_hyperparameter",
            param="hyperparameters.steps",
        )
    return Steps(length, count // length, wanted, transposed=False), wanted or count // length, length
