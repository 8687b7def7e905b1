"""Late fusion: each kind of feature is read by an encoder of its own, and a common head answers from all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from modelworks.ml.base import Block, Examples
from modelworks.ml.nets.cnn import convolutions
from modelworks.ml.nets.mlp import perceptron
from modelworks.ml.nets.params import MultimodalParams
from modelworks.ml.nets.sequences import front_of
from modelworks.ml.nets.trainer import NetTrainer

if TYPE_CHECKING:
    import torch


class Multimodal(NetTrainer):
    """Late fusion of table, text, image and audio columns: an encoder for each, and a head that answers from all."""

    tokens: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("multimodal", "tabular", "image", "text", "audio")
    auto: ClassVar[bool] = False
    Params: ClassVar[type[MultimodalParams]] = MultimodalParams

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        from torch import nn

        from modelworks.ml.nets.layers import Fusion, Part

        lone = len(examples.blocks) == 1
        branches = [nn.Sequential(Part(block, lone), *_encoder(block, params)) for block in examples.blocks]
        head = perceptron(params.width * len(branches), params.hidden, outputs, params)
        return nn.Sequential(Fusion(branches), nn.Dropout(params.dropout), head)


def _encoder(block: Block, params: Any) -> list[torch.nn.Module]:
    """Modules from a block in its shape to rows of `params.width`."""
    from torch import nn

    from modelworks.ml.nets.layers import ACTIVATIONS, Encoder, Reader

    finish = [nn.LayerNorm(params.width), ACTIVATIONS[params.activation]()]
    if block.kind == "tokens":
        front, width, length = front_of(block, None, params.width, raw=False)
        body = Encoder(length, width, params.heads, 2 * width, params.layers, params.dropout)
        return [Reader(front, body, last=False), *finish]
    if len(block.shape) > 1:
        body, wide = convolutions(block.shape, params)
        return [body, nn.Dropout(params.dropout), nn.Linear(wide, params.width), *finish]
    if block.kind == "audio":  # a waveform
        body, wide = convolutions((1, block.shape[0]), params)
        return [nn.Unflatten(1, (1, block.shape[0])), body, nn.Linear(wide, params.width), *finish]
    return [nn.Linear(block.shape[0], params.width), *finish]
