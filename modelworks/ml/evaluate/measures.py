"""Metrics of tasks that are neither classes nor numbers: functions of predictions and of how often each row counts.

`w` [n]: the weight of each row, as a bootstrap draws them; None counts each once. NaN where a metric is undefined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from modelworks.core.tasks import ANOMALY, RECOMMENDATION

if TYPE_CHECKING:
    from modelworks.ml.evaluate.metrics import Predictions

Measure = Callable[..., float]


def _mean(values: np.ndarray, w: np.ndarray | None) -> float:
    if w is None:
        return float(values.mean()) if len(values) else math.nan
    total = w.sum()
    return float(w @ values / total) if total > 0 else math.nan


# anomaly-detection: `true` 1 an anomaly, 0 none, -1 not known; `output` [n, 2]: the score, and 1 where it is flagged


def _known(p: Predictions, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(whether it is an anomaly, score, flag, weight) of the rows with a label."""
    known = p.true >= 0
    weights = np.ones(len(p.true)) if w is None else w
    return p.true[known] == 1, p.output[known, 0], p.output[known, 1] > 0, weights[known]


def _ranked(p: Predictions, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(weight of anomalies, of all others) at each different score, the highest first; None with one kind alone."""
    true, score, _, weights = _known(p, w)
    up, down = weights * true, weights * ~true
    if not up.sum() or not down.sum():
        return None
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return np.add.reduceat(up[order], starts), np.add.reduceat(down[order], starts)


def _roc_auc(p: Predictions, w: np.ndarray | None = None) -> float:
    if (ranked := _ranked(p, w)) is None:
        return math.nan
    up, down = ranked
    below = down.sum() - np.cumsum(down)
    return float(up @ (below + down / 2) / (up.sum() * down.sum()))


def _average_precision(p: Predictions, w: np.ndarray | None = None) -> float:
    if (ranked := _ranked(p, w)) is None:
        return math.nan
    up, down = ranked
    hits = np.cumsum(up)
    return float(up @ (hits / np.maximum(hits + np.cumsum(down), 1e-12)) / up.sum())


def _flagging(which: str) -> Measure:
    def measure(p: Predictions, w: np.ndarray | None = None) -> float:
        true, _, flag, weights = _known(p, w)
        hits, said, there = (weights[mask].sum() for mask in (true & flag, flag, true))
        if not there:
            return math.nan
        precision, recall = hits / said if said else 0.0, hits / there
        both = precision + recall
        return float({"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}[which])

    return measure


# recommendation: `true` the rating (NaN: a click); `output` [n, 4]: the rating said, the item's place among those
# recommended (0 the first, -1 not to be counted), the user's number, and how many are recommended


def _away(power: int) -> Measure:
    def measure(p: Predictions, w: np.ndarray | None = None) -> float:
        if np.isnan(p.true).any():
            return math.nan
        return float(_mean(np.abs(p.true - p.output[:, 0]) ** power, w) ** (1 / power))

    return measure


def _by_user(which: str) -> Measure:
    def measure(p: Predictions, w: np.ndarray | None = None) -> float:
        counted = p.output[:, 1] >= 0
        place, k = p.output[counted, 1], p.output[counted, 3]
        weights = np.ones(len(place)) if w is None else w[counted]
        user = np.unique(p.output[counted, 2], return_inverse=True)[1].ravel()
        if not len(user):
            return math.nan
        held = np.bincount(user, weights)
        hit = place < k
        there = held > 0
        if which != "ndcg":
            hits = np.bincount(user, weights * hit)[there]
            return float((hits / held[there] if which == "recall_at_k" else (hits > 0)).mean())
        gain = np.bincount(user, weights * hit / np.log2(place + 2))[there]
        most = np.minimum(held[there], k.max()).round().astype(np.int64).clip(1)
        best = np.cumsum(1 / np.log2(np.arange(int(most.max())) + 2))
        return float(np.minimum(1.0, gain / best[most - 1]).mean())

    return measure


MEASURES: dict[str, dict[str, Measure]] = {
    RECOMMENDATION: {
        "rmse": _away(2),
        "mae": _away(1),
        "hit_rate": _by_user("hit_rate"),
        "recall_at_k": _by_user("recall_at_k"),
        "ndcg": _by_user("ndcg"),
    },
    ANOMALY: {
        "reconstruction_error": lambda p, w=None: _mean(p.output[:, 0], w),
        "flagged": lambda p, w=None: _mean(p.output[:, 1], w),
        "roc_auc": _roc_auc,
        "average_precision": _average_precision,
        "precision": _flagging("precision"),
        "recall": _flagging("recall"),
        "f1": _flagging("f1"),
    }
}
