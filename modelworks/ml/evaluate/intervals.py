"""Means, deviations and 95 % intervals: Student's t over folds, a bootstrap over the rows of a single split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modelworks.ml.evaluate.catalogue import METRICS
from modelworks.ml.evaluate.metrics import WeightedScorer
from modelworks.ml.evaluate.predictions import Predictions

LEVEL = 0.95
RESAMPLES = 1000
_BUDGET = 200_000_000  # draws of rows at most, so that a large test set costs seconds and not hours

Draw = Callable[..., list[list[float]]]


def over_folds(metric: str, folds: Sequence[float | None]) -> dict[str, Any]:
    """mean, std (sample deviation), the t-interval of the mean clipped to the metric's bounds, and the folds
    themselves.
    """
    from scipy.stats import t

    values = [value for value in folds if value is not None]
    if not values:
        return {"mean": None, "std": None, "low": None, "high": None, "folds": list(folds)}
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "std": None, "low": None, "high": None, "folds": list(folds)}
    std = float(np.std(values, ddof=1))
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    low, high = _clip(metric, mean - half, mean + half)
    return {"mean": mean, "std": std, "low": low, "high": high, "folds": list(folds)}


def over_rows(
    task: str, predictions: Predictions, point: dict[str, float | None], seed: int, resamples: int = RESAMPLES
) -> tuple[dict[str, Any], int]:
    """For a single split: each metric's value with its bootstrap percentile interval, and the number of resamples."""
    scorer = WeightedScorer(task, predictions, list(point))
    samples = bootstrap([predictions.rows], lambda weights: [scorer(weights)], seed, resamples)[:, 0, :]
    found = {}
    for index, (name, value) in enumerate(point.items()):
        drawn = samples[:, index]
        drawn = drawn[np.isfinite(drawn)]
        if value is None or len(drawn) < len(samples) / 2:
            found[name] = {"mean": value, "std": None, "low": None, "high": None, "folds": [value]}
            continue
        low, high = _clip(name, *percentiles(drawn))
        found[name] = {"mean": value, "std": float(drawn.std(ddof=1)), "low": low, "high": high, "folds": [value]}
    return found, len(samples)


def bootstrap(sides: Sequence[np.ndarray], draw: Draw, seed: int, most: int = RESAMPLES) -> np.ndarray:
    """`draw(weights, ...)` for each resample (`most` of them), as one array; `sides`: the rows of each side's entries, one `weights` each.

    A row is drawn with all its entries (predicted more than once, or several boxes), on all sides alike.
    """
    unique = np.unique(np.concatenate(sides))
    places = [np.searchsorted(unique, rows) for rows in sides]
    count = len(unique)
    resamples = min(most, resamples_of(max(map(len, sides))))
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(resamples):
        weights = np.bincount(random.integers(0, count, count), minlength=count).astype(np.float64)
        samples.append(draw(*(weights[mine] for mine in places)))
    return np.array(samples, dtype=np.float64)


def resamples_of(entries: int) -> int:
    """How many are drawn of so many entries."""
    return int(min(RESAMPLES, max(100, _BUDGET // max(1, entries))))


def percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _clip(metric: str, low: float, high: float) -> tuple[float, float]:
    bounds = METRICS[metric]
    return max(low, bounds.low), min(high, bounds.high)
