"""Areas under curves of a score, for weighted rows: sorted once, as a bootstrap asks a thousand times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """`order` [n]: the rows from the lowest score up. `starts`: the first places of equal scores. `positive` [n]: 1.0 or 0.0,
    by place."""

    order: np.ndarray
    starts: np.ndarray
    positive: np.ndarray

    @classmethod
    def of(cls, score: np.ndarray, positive: np.ndarray) -> Ranking:
        order = np.argsort(score, kind="stable")
        ordered = score[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(order)])
        return cls(order, starts, positive[order].astype(np.float64))

    def auc(self, w: np.ndarray) -> float:
        """Of the ROC curve; `w` [n]: the weight of each row. NaN with one kind of rows alone."""
        up, down = self._weights(w)
        if not up.any() or not down.any():
            return math.nan
        below = np.cumsum(down) - down
        return float(up @ (below + down / 2) / (up.sum() * down.sum()))

    def average_precision(self, w: np.ndarray) -> float:
        up, down = (weights[::-1] for weights in self._weights(w))
        if not up.any() or not down.any():
            return math.nan
        hits = np.cumsum(up)
        return float(up @ (hits / np.maximum(hits + np.cumsum(down), 1e-12)) / up.sum())

    def _weights(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(of the positive rows, of the others) at each different score."""
        ordered = w[self.order]
        up = ordered * self.positive
        down = ordered - up
        if len(self.starts) == len(ordered):  # no two rows have the same score
            return up, down
        return np.add.reduceat(up, self.starts), np.add.reduceat(down, self.starts)
