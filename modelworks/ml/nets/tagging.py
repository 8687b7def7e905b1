"""Nets that name each element of a sequence: what a family (`rnn`, `transformer`) reads, element by element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import TAGGING
from modelworks.ml.base import Examples
from modelworks.ml.nets.trainer import NetTrainer

if TYPE_CHECKING:
    import torch

NONE = -1  # the tag of padding


class Tagger(NetTrainer):
    """`family` over the channels of an element, whose `sizes` are as `elements.sizes` tells them."""

    tasks: ClassVar[tuple[str, ...]] = (TAGGING,)

    def __init__(self, family: Any, sizes: list[int | None], tags: int) -> None:
        self.family, self.sizes, self.tags = family, sizes, tags

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        from torch import nn

        from modelworks.ml.nets.layers import Elements, Elementwise

        width, body, wide = self.family.over(examples.shape[0], params)
        return Elementwise(Elements(self.sizes, width), body, nn.Sequential(nn.Dropout(params.dropout), nn.Linear(wide, outputs)))

    def objective(self, examples: Examples, params: Any) -> Any:
        return TagLoss(examples, params, self.tags)


class TagLoss:
    """As `Objective`, of scores [m, length, tags] against tags [m, length]; padding counts for nothing.

    A row's loss is the sum over its elements, in units of the mean number of elements: each element weighs the same.
    """

    link, mean, scale, classes = "tags", 0.0, 1.0, None

    def __init__(self, examples: Examples, params: Any, tags: int) -> None:
        from modelworks.ml.nets.objective import Objective

        if params.loss == "binary-cross-entropy":
            raise InvalidInput(
                "tags are learnt by cross-entropy or focal, not by binary-cross-entropy",
                code="bad_hyperparameter", param="hyperparameters.loss",
            )  # fmt: skip
        self.inner = Objective(_Flat(examples, tags), params)  # type: ignore[arg-type]
        self.outputs = tags
        counted = [(np.asarray(part) != NONE).sum() for part in examples.targets()]
        self.length = max(1.0, float(sum(counted)) / max(1, len(examples)))

    def prepare(self, target: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(target)

    def losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        flat = self.inner.losses(scores.reshape(-1, self.outputs), target.clamp(min=0).reshape(-1))
        found: torch.Tensor = (flat.reshape(target.shape) * (target != NONE)).sum(dim=1) / self.length
        return found

    def measure(self, metric: str, scores: np.ndarray, target: np.ndarray) -> float | None:
        from modelworks.ml.evaluate.metrics import score
        from modelworks.ml.evaluate.predictions import Predictions
        from modelworks.ml.evaluate.tagging import laid_out

        said = np.where(target == NONE, NONE, scores.argmax(axis=2))
        output = laid_out(target, said, None)
        return score(TAGGING, Predictions(np.arange(len(target)), target[:, 0], output), [metric])[metric]


class _Flat:
    """The elements of examples, as an objective of classes asks for them."""

    def __init__(self, examples: Examples, tags: int) -> None:
        self.examples, self.classes = examples, tags

    def targets(self) -> Iterator[np.ndarray]:
        for part in self.examples.targets():
            yield part[part != NONE]
