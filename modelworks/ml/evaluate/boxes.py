"""Object detection: which predicted box is which true one, and COCO's average precision of it.

The rules are COCOeval's (github.com/cocodataset/cocoapi): ten IoU thresholds, at most 100 boxes an image and class, each
true box matched once, best score first, and the mean precision at 101 recalls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from modelworks.ml.evaluate.predictions import Predictions

THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST = 100  # predicted boxes of an image and class that count
_TRUE, _SAID, _EMPTY = 1.0, 0.0, -1.0
_KIND, _CLASS, _SCORE, _IOU, _HITS = 0, 1, 2, 3, 4  # the columns of an entry; from _HITS on one a threshold


@dataclass(frozen=True)
class Box:
    """`corners`: left, top, right, bottom."""

    corners: tuple[float, float, float, float]
    place: int  # of its class
    score: float = 1.0


def overlaps(said: np.ndarray, true: np.ndarray) -> np.ndarray:
    """IoU [m, n] of boxes [m, 4] and [n, 4] as corners."""
    low, high = np.maximum(said[:, None, :2], true[None, :, :2]), np.minimum(said[:, None, 2:], true[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (said, true)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def entries(row: int, true: Sequence[Box], said: Sequence[Box]) -> list[list[float]]:
    """An image's part of `Predictions.output`, one entry a box, true or predicted: row number, then the columns above.

    An image without boxes has one entry that counts for nothing, so that it is drawn as the others are.
    """
    found: list[list[float]] = []
    for place in sorted({box.place for box in (*true, *said)}):
        mine = sorted((box for box in said if box.place == place), key=lambda box: -box.score)[:_MOST]
        theirs = [box for box in true if box.place == place]
        iou = overlaps(*(np.array([box.corners for box in boxes], dtype=float).reshape(-1, 4) for boxes in (mine, theirs)))
        hits = np.stack([_matched(iou, threshold) for threshold in THRESHOLDS], axis=1)
        found += [
            [row, _SAID, place, box.score, 0.0, *line] for box, line in zip(mine, hits.astype(float).tolist(), strict=True)
        ]
        best = iou.max(axis=0) if mine else np.zeros(len(theirs))
        found += [[row, _TRUE, place, 0.0, value, *([0.0] * len(THRESHOLDS))] for value in best.tolist()]
    return found or [[row, _EMPTY, 0.0, 0.0, 0.0, *([0.0] * len(THRESHOLDS))]]


def _matched(iou: np.ndarray, threshold: float) -> np.ndarray:
    """bool [m]: which of the predicted boxes, best first, got a true one; each takes the best that is left."""
    free = np.ones(iou.shape[1], dtype=bool)
    hit = np.zeros(iou.shape[0], dtype=bool)
    for index, row in enumerate(iou if iou.size else ()):
        left = np.where(free & (row >= min(threshold, 1 - 1e-10)), row, -1.0)
        # of equals the last one, as COCOeval takes it
        best = len(left) - 1 - int(left[::-1].argmax())
        if left[best] >= 0:
            free[best], hit[index] = False, True
    return hit


@dataclass(frozen=True)
class _Class:
    """One class's boxes, the best score first: `hits` [m, thresholds], and which entries they and the true ones are."""

    said: np.ndarray
    hits: np.ndarray
    true: np.ndarray

    def precision(self, w: np.ndarray, which: slice) -> np.ndarray:
        """[101, thresholds of `which`]: the precision at each recall; NaN where no true box is."""
        there = float(w[self.true].sum())
        hits = self.hits[:, which]
        out = np.full((len(_RECALLS), hits.shape[1]), math.nan)
        if not there:
            return out
        weights = w[self.said]
        right = np.cumsum(weights[:, None] * hits, axis=0)
        share = right / np.maximum(np.cumsum(weights)[:, None], np.finfo(float).eps)
        best = np.maximum.accumulate(share[::-1], axis=0)[::-1]
        for column in range(hits.shape[1]):
            places = np.searchsorted(right[:, column] / there, _RECALLS, side="left")
            held = places < len(best)
            out[:, column] = 0.0
            out[held, column] = best[places[held], column]
        return out

    def recall(self, w: np.ndarray) -> float:
        there = float(w[self.true].sum())
        return float((w[self.said] @ self.hits / there).mean()) if there else math.nan


def _classes(p: Predictions) -> dict[int, _Class]:
    kind, place, score = (p.output[:, column] for column in (_KIND, _CLASS, _SCORE))
    found = {}
    for number in np.unique(place[kind == _TRUE]).astype(int).tolist():
        said = np.flatnonzero((kind == _SAID) & (place == number))
        said = said[np.argsort(-score[said], kind="stable")]
        found[number] = _Class(said, p.output[said, _HITS:], np.flatnonzero((kind == _TRUE) & (place == number)))
    return found


def _mean(values: Sequence[float]) -> float:
    """Of those that are defined; a class without a true box has no say."""
    sound = [value for value in values if not math.isnan(value)]
    return float(np.mean(sound)) if sound else math.nan


def precision_measure(which: slice) -> Callable[[Predictions], Callable[[np.ndarray], float]]:
    def measure(p: Predictions) -> Callable[[np.ndarray], float]:
        classes = list(_classes(p).values())
        return lambda w: _mean([float(one.precision(w, which).mean()) for one in classes])

    return measure


def recall_measure(p: Predictions) -> Callable[[np.ndarray], float]:
    classes = list(_classes(p).values())
    return lambda w: _mean([one.recall(w) for one in classes])


def iou_measure(p: Predictions) -> Callable[[np.ndarray], float]:
    true, iou = p.output[:, _KIND] == _TRUE, p.output[:, _IOU]

    def weighed(w: np.ndarray) -> float:
        total = w[true].sum()
        return float(w[true] @ iou[true] / total) if total else math.nan

    return weighed


def per_class(p: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """By class: average precision over all thresholds and at 0.5, recall, and how many boxes."""
    once = np.ones(len(p.rows))
    found: dict[str, Any] = {}
    for number, one in _classes(p).items():
        precision = one.precision(once, slice(None)).mean(axis=0)
        found[names[number]] = {
            "average_precision": float(precision.mean()), "average_precision_50": float(precision[0]),
            "recall": one.recall(once), "boxes": len(one.true), "predicted": len(one.said),
        }  # fmt: skip
    return found


def curves(p: Predictions, names: Sequence[str], most: int) -> Mapping[str, list[float]]:
    """By class, the precision at IoU 0.5 at each of 101 recalls."""
    once = np.ones(len(p.rows))
    return {names[number]: one.precision(once, slice(0, 1))[:, 0].tolist() for number, one in list(_classes(p).items())[:most]}
