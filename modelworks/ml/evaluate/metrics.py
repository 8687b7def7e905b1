"""The metrics of one set of predictions: exact values by scikit-learn, and a fast weighted form for the bootstrap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from modelworks.core.tasks import CLASSIFICATION
from modelworks.ml.evaluate.catalogue import TOP
from modelworks.ml.evaluate.measures import MEASURES
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.ranking import Ranking


def places(p: Predictions) -> np.ndarray:
    """[n]: how many classes come before the true one, the most probable first; of equal ones the first, as for labels."""
    narrow = p.output.astype(np.float32)
    own = np.take_along_axis(narrow, p.true[:, None], axis=1)
    earlier = np.arange(narrow.shape[1]) < p.true[:, None]
    return ((narrow > own) | ((narrow == own) & earlier)).sum(axis=1)


def score(task: str, predictions: Predictions, wanted: Sequence[str]) -> dict[str, float | None]:
    """Each wanted metric by scikit-learn; None where it is undefined (a class that is absent, a constant target)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ill-defined metrics, which are handled here
        if task in MEASURES:
            once = np.ones(len(predictions.rows))
            found = {name: MEASURES[task][name](predictions)(once) for name in wanted}
        else:
            values = _CLASSIFICATION if task == CLASSIFICATION else _NUMBERS
            found = {name: values[name](predictions) for name in wanted}
    return {name: float(value) if value is not None and math.isfinite(value) else None for name, value in found.items()}


def _averaged(name: str, average: str) -> Any:
    def compute(p: Predictions) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(p.true, p.labels, average=average, zero_division=0))

    return compute


def _of_labels(name: str) -> Any:
    def compute(p: Predictions) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(p.true, p.labels))

    return compute


def _of_values(name: str) -> Any:
    def compute(p: Predictions) -> float | None:
        from sklearn import metrics

        if name == "r2_score" and (len(p.true) < 2 or np.ptp(p.true) == 0):
            return None
        return float(getattr(metrics, name)(p.true, p.output))

    return compute


def _mase(p: Predictions) -> float | None:
    return float(np.mean(np.abs(p.true - p.output) / p.beside["scale"])) if "scale" in p.beside else None


def _smape(p: Predictions) -> float:
    return float(np.mean(_shares(p)))


def _coverage(p: Predictions) -> float | None:
    return float(np.mean(inside(p))) if "low" in p.beside else None


def inside(p: Predictions) -> np.ndarray:
    """[n] bool: whether the truth lay within the interval, its ends included."""
    found: np.ndarray = (p.true >= p.beside["low"]) & (p.true <= p.beside["high"])
    return found


def _shares(p: Predictions) -> np.ndarray:
    """The error of each row as a share of the mean of truth and forecast; 0 where both are 0."""
    return 2 * _ratio(np.abs(p.true - p.output), np.abs(p.true) + np.abs(p.output))


def _roc_auc(p: Predictions) -> float | None:
    from sklearn.metrics import roc_auc_score

    classes = p.output.shape[1]
    if len(np.unique(p.true)) < classes:
        return None
    if classes == 2:
        return float(roc_auc_score(p.true, p.output[:, 1]))
    return float(roc_auc_score(p.true, p.output, multi_class="ovr", average="macro", labels=np.arange(classes)))


def _log_loss(p: Predictions) -> float:
    from sklearn.metrics import log_loss

    return float(log_loss(p.true, p.output, labels=np.arange(p.output.shape[1])))


def _brier(p: Predictions) -> float:
    from sklearn.metrics import brier_score_loss

    classes = p.output.shape[1]
    if classes == 2:
        return float(brier_score_loss(p.true, p.output[:, 1], pos_label=1))
    return float(brier_score_loss(p.true, p.output, labels=np.arange(classes)))


def _top(k: int) -> Any:
    return lambda p: float(np.mean(places(p) < k))


_CLASSIFICATION = {
    "accuracy": _of_labels("accuracy_score"),
    "balanced_accuracy": _of_labels("balanced_accuracy_score"),
    "precision": _averaged("precision_score", "macro"),
    "recall": _averaged("recall_score", "macro"),
    "f1": _averaged("f1_score", "macro"),
    "precision_weighted": _averaged("precision_score", "weighted"),
    "recall_weighted": _averaged("recall_score", "weighted"),
    "f1_weighted": _averaged("f1_score", "weighted"),
    "roc_auc": _roc_auc,
    "log_loss": _log_loss,
    "brier": _brier,
    **{f"top_{k}_accuracy": _top(k) for k in TOP},
}
_NUMBERS = {
    "mase": _mase,
    "smape": _smape,
    "coverage": _coverage,
    "mse": _of_values("mean_squared_error"),
    "rmse": _of_values("root_mean_squared_error"),
    "mae": _of_values("mean_absolute_error"),
    "mape": _of_values("mean_absolute_percentage_error"),
    "r2": _of_values("r2_score"),
}


class WeightedScorer:
    """The same metrics for weighted rows, without scikit-learn's checks: a bootstrap calls this a thousand times."""

    def __init__(self, task: str, predictions: Predictions, wanted: Sequence[str]) -> None:
        self._wanted = list(wanted)
        self._task = task
        if task in MEASURES:
            self._measures = [MEASURES[task][name](predictions) for name in wanted]
        elif task == CLASSIFICATION:
            self._prepare_classes(predictions)
        else:
            self._prepare_values(predictions)

    def __call__(self, weights: np.ndarray) -> list[float]:
        """One value for each wanted metric; NaN where undefined. `weights` [n]: how often each row was drawn."""
        if self._task in MEASURES:
            return [measure(weights) for measure in self._measures]
        values = self._classes(weights) if self._task == CLASSIFICATION else self._values(weights)
        return [values[name] for name in self._wanted]

    def _prepare_classes(self, p: Predictions) -> None:
        self._count = p.output.shape[1]
        self._cells = p.true * self._count + p.labels
        own = np.take_along_axis(p.output, p.true[:, None], axis=1)[:, 0]
        self._losses = -np.log(np.clip(own, np.finfo(p.output.dtype).eps, None))
        truth = np.eye(self._count)[p.true]
        squares = ((p.output - truth) ** 2).sum(axis=1)
        self._squares = squares / 2 if self._count == 2 else squares
        ranked = [] if "roc_auc" not in self._wanted else [1] if self._count == 2 else range(self._count)
        ranks = places(p)
        # as numbers: an array of booleans would be converted at each call
        self._top = {name: (ranks < k).astype(np.float64) for k in TOP if (name := f"top_{k}_accuracy") in self._wanted}
        self._ranks = [Ranking.of(p.output[:, k], p.true == k) for k in ranked]

    def _classes(self, w: np.ndarray) -> dict[str, float]:
        total = w.sum()
        matrix = np.bincount(self._cells, w, self._count**2).reshape(self._count, self._count)
        hits, support, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
        precision, recall = _ratio(hits, predicted), _ratio(hits, support)
        f1 = _ratio(2 * hits, support + predicted)
        seen = (support + predicted) > 0
        return {
            "accuracy": hits.sum() / total,
            "balanced_accuracy": recall[support > 0].mean(),
            "precision": precision[seen].mean(),
            "recall": recall[seen].mean(),
            "f1": f1[seen].mean(),
            "precision_weighted": precision @ support / total,
            "recall_weighted": recall @ support / total,
            "f1_weighted": f1 @ support / total,
            "roc_auc": float(np.mean([rank.auc(w) for rank in self._ranks])) if self._ranks else math.nan,
            "log_loss": w @ self._losses / total,
            "brier": w @ self._squares / total,
            **{name: w @ hit / total for name, hit in self._top.items()},
        }

    def _prepare_values(self, p: Predictions) -> None:
        self._true = p.true
        error = p.true - p.output
        unknown = np.full(len(error), math.nan)
        scale = p.beside.get("scale", unknown)
        self._errors = np.column_stack(
            [
                error**2, np.abs(error), np.abs(error) / np.maximum(np.abs(p.true), np.finfo(np.float64).eps),
                np.abs(error) / scale, _shares(p), inside(p) if "low" in p.beside else unknown,
            ]
        )  # fmt: skip

    def _values(self, w: np.ndarray) -> dict[str, float]:
        total = w.sum()
        mse, mae, mape, mase, smape, coverage = w @ self._errors / total
        spread = w @ (self._true - w @ self._true / total) ** 2 / total
        return {
            "mase": mase,
            "smape": smape,
            "coverage": coverage,
            "mse": mse,
            "rmse": math.sqrt(mse),
            "mae": mae,
            "mape": mape,
            "r2": 1 - mse / spread if spread > 0 else math.nan,
        }


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, 0 where bottom is 0."""
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom > 0)
