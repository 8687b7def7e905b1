"""What a net is trained to make small: the losses, a number for each row, and the penalties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.ml.base import Examples
from modelworks.ml.nets.params import NetParams

if TYPE_CHECKING:
    import numpy as np
    import torch

CLASS_LOSSES = ("cross-entropy", "binary-cross-entropy", "focal")
NUMBER_LOSSES = ("mse", "mae", "huber")


class Objective:
    """The loss of `outputs` (scores [m, outputs]) against targets [m]: class indices, or values.

    Values are learned in units of their mean and deviation in training. A row's loss is weighted so that the weights of
    all rows together are their number: halves of a batch add up to the whole.
    """

    def __init__(self, examples: Examples, params: NetParams) -> None:
        self.classes = examples.classes
        self.kind = _kind(params.loss, self.classes)
        self.binary = self.kind == "binary-cross-entropy"
        self.gamma, self.smoothing = params.focal_gamma, params.label_smoothing
        self.mean, self.scale = (0.0, 1.0) if self.classes else spread_of(examples)
        self.weights = _weights(examples, params)

    @property
    def outputs(self) -> int:
        """How many scores the net gives for a row."""
        return 1 if self.classes is None or self.binary else self.classes

    @property
    def link(self) -> str:
        """How scores become answers: softmax, sigmoid or scale."""
        return "scale" if self.classes is None else "sigmoid" if self.binary else "softmax"

    def prepare(self, target: np.ndarray) -> torch.Tensor:
        import torch

        if self.classes is None:
            return torch.from_numpy(((target - self.mean) / self.scale).astype("float32"))
        return torch.from_numpy(target)

    def measure(self, metric: str, scores: np.ndarray, target: np.ndarray) -> float | None:
        """A metric of the catalogue, of scores [n, outputs]; None when it is undefined."""
        import numpy as np

        from modelworks.core.tasks import CLASSIFICATION, REGRESSION
        from modelworks.ml.evaluate.metrics import score
        from modelworks.ml.evaluate.predictions import Predictions
        from modelworks.ml.train.fitted import activate

        wide = scores.astype(np.float64)
        if self.classes is None:
            found = Predictions(np.arange(len(wide)), target.astype(np.float64), wide[:, 0] * self.scale + self.mean)
            return score(REGRESSION, found, [metric])[metric]
        answer = activate(wide, "sigmoid" if self.binary else "softmax")["probabilities"]
        return score(CLASSIFICATION, Predictions(np.arange(len(wide)), target, answer), [metric])[metric]

    def losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """[m]"""
        import torch
        from torch.nn import functional as f

        scores = scores.float()
        if self.classes is None:
            value = scores.reshape(-1)
            if self.kind == "mse":
                return (value - target) ** 2
            return f.l1_loss(value, target, reduction="none") if self.kind == "mae" else _huber(value, target)
        if self.binary:
            wanted = target.to(scores.dtype) * (1 - self.smoothing) + self.smoothing / 2
            found = f.binary_cross_entropy_with_logits(scores.reshape(-1), wanted, reduction="none")
        else:
            found = f.cross_entropy(scores, target, reduction="none", label_smoothing=self.smoothing)
            if self.kind == "focal":
                right = torch.softmax(scores, dim=1).gather(1, target[:, None])[:, 0]
                found = found * (1 - right) ** self.gamma
        return found if self.weights is None else found * self.weights.to(found.device)[target]


def _huber(value: Any, target: Any) -> Any:
    from torch.nn import functional as f

    return f.huber_loss(value, target, reduction="none", delta=1.0)


def _kind(loss: str, classes: int | None) -> str:
    if loss == "auto":
        return "cross-entropy" if classes else "mse"
    fitting = CLASS_LOSSES if classes else NUMBER_LOSSES
    if loss not in fitting:
        raise InvalidInput(
            f"the loss {loss} does not go with {'classes' if classes else 'numbers'}; choose one of {', '.join(fitting)}",
            code="bad_hyperparameter",
            param="hyperparameters.loss",
        )
    if loss == "binary-cross-entropy" and classes != 2:
        raise InvalidInput(
            f"binary-cross-entropy is for two classes, and there are {classes}; choose cross-entropy",
            code="bad_hyperparameter",
            param="hyperparameters.loss",
        )
    return loss


def spread_of(examples: Examples) -> tuple[float, float]:
    """Mean and deviation of the targets, in one pass."""
    import numpy as np

    count, mean, squares = 0, 0.0, 0.0
    for part in examples.targets():
        fresh = np.asarray(part, dtype=np.float64)
        total = count + len(fresh)
        away = fresh.mean() - mean
        squares += ((fresh - fresh.mean()) ** 2).sum() + away**2 * count * len(fresh) / total
        mean += away * len(fresh) / total
        count = total
    deviation = float(np.sqrt(squares / max(count, 1)))
    return float(mean), deviation if np.isfinite(deviation) and deviation > 0 else 1.0


def _weights(examples: Examples, params: NetParams) -> torch.Tensor | None:
    if params.class_weight is None or examples.classes is None:
        return None
    import numpy as np
    import torch

    counts = np.zeros(examples.classes, dtype=np.int64)
    for part in examples.targets():
        counts += np.bincount(part, minlength=examples.classes)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(weights.astype(np.float32))
