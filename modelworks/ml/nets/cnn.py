"""Convolutional nets: over images, spectrograms, and the rows of a table that are images or series."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from modelworks.core.errors import InvalidInput
from modelworks.ml.base import Examples
from modelworks.ml.nets.params import CnnParams
from modelworks.ml.nets.trainer import NetTrainer

if TYPE_CHECKING:
    import torch


class Cnn(NetTrainer):
    """A convolutional net: from two plain convolutions to a small residual net; on images, or a table's rows in `shape`."""

    reads: ClassVar[tuple[str, ...]] = ("image", "audio", "tabular")
    Params: ClassVar[type[CnnParams]] = CnnParams

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        shape = _shape(examples, params)
        from torch import nn

        body, width = convolutions(shape, params)
        parts: list[nn.Module] = []
        for wide in params.head:
            parts += [nn.Dropout(params.dropout), nn.Linear(width, wide), nn.ReLU()]
            width = wide
        return nn.Sequential(
            nn.Unflatten(1, shape) if examples.shape != shape else nn.Identity(),
            body,
            *parts,
            nn.Dropout(params.dropout),
            nn.Linear(width, outputs),
        )


def convolutions(shape: tuple[int, ...], params: Any) -> tuple[torch.nn.Module, int]:
    """(a module from [n, *shape] to rows, their width). Each stage halves the maps while they are large enough."""
    from torch import nn

    from modelworks.ml.nets.layers import Residual, Shift

    flat = len(shape) == 2
    conv: Any = nn.Conv1d if flat else nn.Conv2d
    norm: Any = nn.BatchNorm1d if flat else nn.BatchNorm2d
    pool: Any = nn.MaxPool1d if flat else nn.MaxPool2d
    wide, bias = params.kernel // 2, not params.batch_norm

    def plain(inside: int, outside: int) -> list[nn.Module]:
        made = [conv(inside, outside, params.kernel, padding=wide, bias=bias)]
        return [*made, norm(outside)] if params.batch_norm else made

    parts: list[nn.Module] = [] if flat or not params.shift else [Shift(params.shift)]
    inside, sides = shape[0], list(shape[1:])
    for outside in params.channels:
        parts += [*plain(inside, outside), nn.ReLU()]
        for _ in range(params.residual):
            parts.append(Residual(nn.Sequential(*plain(outside, outside), nn.ReLU(), *plain(outside, outside))))
        if min(sides) >= 2:
            parts.append(pool(2))
            sides = [side // 2 for side in sides]
        inside = outside
    if params.pooling == "average":
        parts.append(nn.AdaptiveAvgPool1d(1) if flat else nn.AdaptiveAvgPool2d(1))
        sides = [1]
    return nn.Sequential(*parts, nn.Flatten()), inside * math.prod(sides)


def _shape(examples: Examples, params: Any) -> tuple[int, ...]:
    """[channels, ...] of one row."""
    own = examples.shape
    if len(own) in (2, 3):
        return own
    kinds = {block.kind for block in examples.blocks}
    if len(examples.blocks) > 1 and kinds != {"table"}:
        raise InvalidInput(
            "cnn takes images alone, or a table alone; leave out the other features, or choose multimodal",
            code="wrong_features",
            param="features",
        )
    if kinds == {"audio"}:
        return (1, own[0])
    if kinds == {"tokens"}:
        raise InvalidInput(
            "cnn does not read texts; choose transformer or rnn", code="wrong_features", param="algorithm"
        )
    if params.shape is None:
        raise InvalidInput(
            f"the {own[0]} features of a table have no shape of their own; give the hyperparameter shape, e.g. "
            "[1, 8, 8] for 64 pixels, with the columns in the order of the pixels",
            code="bad_hyperparameter",
            param="hyperparameters.shape",
        )
    if math.prod(params.shape) != math.prod(own):
        raise InvalidInput(
            f"the shape {params.shape} has {math.prod(params.shape)} places but there are {own[0]} features; "
            "give one that they fill, and a transform that keeps one feature a column",
            code="bad_hyperparameter",
            param="hyperparameters.shape",
        )
    return tuple(params.shape)
