"""Multi-layer perceptrons."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from modelworks.ml.base import Examples
from modelworks.ml.nets.params import MlpParams
from modelworks.ml.nets.trainer import NetTrainer

if TYPE_CHECKING:
    import torch


class Mlp(NetTrainer):
    """A multi-layer perceptron: fully connected layers of any number and width, for classes and numbers."""

    shaped: ClassVar[bool] = False
    Params: ClassVar[type[MlpParams]] = MlpParams

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        return perceptron(math.prod(examples.shape), params.hidden, outputs, params)


def perceptron(inside: int, hidden: list[int], outputs: int, params: Any) -> torch.nn.Sequential:
    from torch import nn

    from modelworks.ml.nets.layers import ACTIVATIONS

    parts: list[nn.Module] = []
    for width in hidden:
        parts.append(nn.Linear(inside, width))
        if params.batch_norm:
            parts.append(nn.BatchNorm1d(width))
        parts.append(ACTIVATIONS[params.activation]())
        if params.dropout:
            parts.append(nn.Dropout(params.dropout))
        inside = width
    return nn.Sequential(*parts, nn.Linear(inside, outputs))
