"""What a model said about held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Predictions:
    """What a model said about held-out rows, in the order predicted.

    `rows` [n]: the rows' numbers in the table, from 0. `true` [n]: class indices int64, or values float64.
    `output`: probabilities [n, classes] or values [n], float64.
    `beside`: by name [n] float64: of forecasts `scale` (the naive error in training), `low`, `high` and, of many, `series` (its
    number); `threshold`: from which probability of the second class on the label says it; `label`: the class index, where it
    was given.
    What `output` holds for other tasks, and how many entries a row has there, is said where its measures are.
    """

    rows: np.ndarray
    true: np.ndarray
    output: np.ndarray
    beside: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        if "label" in self.beside:
            return self.beside["label"].astype(np.int64)
        return labels(self.output, self.beside.get("threshold"))

    @property
    def counted(self) -> int:
        """How many different rows there are."""
        return len(np.unique(self.rows))

    def judged(self, threshold: float) -> Predictions:
        """The same, where the label is the second class from `threshold` on."""
        limits = np.full(len(self.rows), threshold, dtype=np.float64)
        return Predictions(self.rows, self.true, self.output, {**self.beside, "threshold": limits})

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        rows, true, output = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "true", "output")
        )
        beside = {name: np.concatenate([part.beside[name] for part in parts]) for name in parts[0].beside}
        return cls(rows, true, output, beside)

    def take(self, mask: np.ndarray) -> Predictions:
        beside = {name: values[mask] for name, values in self.beside.items()}
        return Predictions(self.rows[mask], self.true[mask], self.output[mask], beside)


def labels(probabilities: np.ndarray, threshold: np.ndarray | float | None = None) -> np.ndarray:
    """The class index of each row of [n, classes]: the first of the largest in float32, as the served graph picks it; or,
    with a threshold, the second of two from there on.
    """
    narrow = probabilities.astype(np.float32)
    if threshold is not None:
        return (narrow[:, 1] >= np.float32(threshold)).astype(np.int64)
    return narrow.argmax(axis=1)
