"""A small decoder that goes on with texts: a Llama of the size that is asked for, learnt from scratch by the one loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Stopping
from modelworks.core.tasks import GENERATION
from modelworks.ml.base import Examples, JobContext
from modelworks.ml.nets.trainer import NetTrainer, set_aside, set_up

if TYPE_CHECKING:
    import torch

NONE = -1  # stands behind the end of the last block
_AT_ONCE = 4096  # tokens that are judged together


class Decoder(NetTrainer):
    """Rows are blocks of `context` + 1 tokens, of which each is told from those before it."""

    tasks: ClassVar[tuple[str, ...]] = (GENERATION,)

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        from modelworks.ml.nets.layers import Likelihood

        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=params.width, intermediate_size=params.feed_forward,
            num_hidden_layers=params.layers, num_attention_heads=params.heads, num_key_value_heads=params.heads,
            max_position_embeddings=params.context, attention_dropout=params.dropout, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=None, use_cache=True,
        )  # fmt: skip
        return Likelihood(LlamaForCausalLM(config), params.label_smoothing)

    def objective(self, examples: Examples, params: Any) -> Any:
        if params.loss not in ("auto", "cross-entropy"):
            raise InvalidInput(
                f"the next token is learnt by cross-entropy, not by {params.loss}; leave loss out",
                code="bad_hyperparameter", param="hyperparameters.loss",
            )  # fmt: skip
        if params.width // params.heads % 2:
            raise InvalidInput(
                f"each of {params.heads} heads has {params.width // params.heads} numbers, and turning them by their place takes an "
                "even count; change width or heads",
                code="bad_hyperparameter", param="hyperparameters.width",
            )  # fmt: skip
        return Surprise(examples.shape[0] - 1)

    def read(self, examples: Examples, params: Any, ctx: JobContext, stopping: Stopping | None) -> Any:
        """The trained language model, as transformers has it."""
        torch = set_up(ctx)
        from modelworks.ml.nets import advice
        from modelworks.ml.nets.loop import Loop

        examples, held = set_aside(examples, stopping, ctx.seed)
        objective = self.objective(examples, params)
        torch.manual_seed(ctx.seed)
        net: Any = self.net(examples, 1, params)
        loop = Loop(net, examples, objective, params, ctx, stopping, held)
        advice.give(loop)
        loop.run()
        return net.model


class Surprise:
    """In place of an `Objective`: the net itself tells (the negative log probability of a row's tokens, their count)."""

    link, mean, scale, classes = "scale", 0.0, 1.0, None

    def __init__(self, length: int) -> None:
        self.length = length

    def prepare(self, target: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(target)

    def losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return scores[:, 0].float() / self.length

    def measure(self, metric: str, scores: np.ndarray, target: np.ndarray) -> float | None:
        nll, count = scores.astype(np.float64).sum(axis=0)
        return math.exp(min(700.0, nll / count)) if metric == "perplexity" and count else None


def blocks(documents: list[list[int]], context: int) -> np.ndarray:
    """Float32 [k, context + 1]: all tokens on end, each block beginning with the last token of the one before."""
    stream = np.array([id for ids in documents for id in (0, *ids)] + [0], dtype=np.float32)
    count = max(1, math.ceil((len(stream) - 1) / context))
    out = np.full((count, context + 1), NONE, dtype=np.float32)
    for row in range(count):
        piece = stream[row * context : row * context + context + 1]
        out[row, : len(piece)] = piece
    return out


def surprise(model: Any, documents: list[list[int]], context: int) -> np.ndarray:
    """[n, 2]: of each document the negative log probability of its tokens and its end, and their count. Longer ones are
    read in windows that overlap by half.
    """
    import torch

    windows: list[tuple[int, list[int], int]] = []  # (document, tokens, how many of them are context alone)
    for number, ids in enumerate(documents):
        whole = [0, *ids, 0]
        end = 1
        while end < len(whole):
            stop = min(len(whole), end + (context if end == 1 else max(1, context // 2)))
            start = max(0, stop - context - 1)
            windows.append((number, whole[start:stop], end - start))
            end = stop
    windows.sort(key=lambda one: len(one[1]))
    out = np.zeros((len(documents), 2))
    size = max(1, _AT_ONCE // (context + 1))
    with torch.inference_mode():
        for at in range(0, len(windows), size):
            part = windows[at : at + size]
            ids = torch.zeros(len(part), max(len(tokens) for _, tokens, _ in part), dtype=torch.long)
            for row, (_, tokens, _) in enumerate(part):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            logits = model(input_ids=ids[:, :-1]).logits.float()
            wanted = ids[:, 1:]
            chances = torch.log_softmax(logits, dim=2).gather(2, wanted[:, :, None])[:, :, 0].double().numpy()
            for row, (number, tokens, known) in enumerate(part):
                there = slice(known - 1, len(tokens) - 1)
                out[number] += -chances[row, there].sum(), len(tokens) - known
    return out
