"""Metrics of tasks that are neither classes nor numbers. A measure takes predictions and gives what weighs them.

`w` [n]: how often each row counts, as a bootstrap draws them. NaN where a metric is undefined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from modelworks.core.tasks import (
    ANOMALY,
    CLUSTERING,
    DETECTION,
    GENERATION,
    RECOMMENDATION,
    SPEECH,
    SUMMARY,
    TAGGING,
    TRANSLATION,
)
from modelworks.ml.evaluate import boxes, clusters, tagging, texts
from modelworks.ml.evaluate.ranking import Ranking

if TYPE_CHECKING:
    from modelworks.ml.evaluate.predictions import Predictions

Weighed = Callable[[np.ndarray], float]
Measure = Callable[["Predictions"], Weighed]


def _mean(values: np.ndarray, w: np.ndarray) -> float:
    total = w.sum()
    return float(w @ values / total) if total > 0 else math.nan


# anomaly-detection: `true` 1 an anomaly, 0 none, -1 not known; `output` [n, 2]: the score, and 1 where it is flagged


def _of_all(column: int) -> Measure:
    return lambda p: lambda w: _mean(p.output[:, column], w)


def _ranked(area: Callable[[Ranking, np.ndarray], float]) -> Measure:
    """Of the score, by the rows with a label."""

    def measure(p: Predictions) -> Weighed:
        known = p.true >= 0
        ranking = Ranking.of(p.output[known, 0], p.true[known] == 1)
        return lambda w: area(ranking, w[known])

    return measure


def _flagging(which: str) -> Measure:
    """Of the flags, by the rows with a label."""

    def measure(p: Predictions) -> Weighed:
        true, flag = p.true == 1, (p.true >= 0) & (p.output[:, 1] > 0)

        def weighed(w: np.ndarray) -> float:
            hits, said, there = (w[mask].sum() for mask in (true & flag, flag, true))
            if not there:
                return math.nan
            precision, recall = hits / said if said else 0.0, hits / there
            both = precision + recall
            return float({"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}[which])

        return weighed

    return measure


# recommendation: `true` the rating (NaN: a click); `output` [n, 4]: the rating said, the item's place among those
# recommended (0 the first, -1 not to be counted), the user's number, and how many are recommended


def _away(power: int) -> Measure:
    def measure(p: Predictions) -> Weighed:
        if np.isnan(p.true).any():
            return lambda w: math.nan
        errors = np.abs(p.true - p.output[:, 0]) ** power
        return lambda w: float(_mean(errors, w) ** (1 / power))

    return measure


def _by_user(which: str) -> Measure:
    def measure(p: Predictions) -> Weighed:
        counted = p.output[:, 1] >= 0
        place, k = p.output[counted, 1], p.output[counted, 3]
        user = np.unique(p.output[counted, 2], return_inverse=True)[1].ravel()
        hit = place < k
        if not len(user):
            return lambda w: math.nan

        def weighed(w: np.ndarray) -> float:
            weights = w[counted]
            held = np.bincount(user, weights)
            there = held > 0
            if which != "ndcg":
                hits = np.bincount(user, weights * hit)[there]
                return float((hits / held[there] if which == "recall_at_k" else (hits > 0)).mean())
            gain = np.bincount(user, weights * hit / np.log2(place + 2))[there]
            most = np.minimum(held[there], k.max()).round().astype(np.int64).clip(1)
            best = np.cumsum(1 / np.log2(np.arange(int(most.max())) + 2))
            return float(np.minimum(1.0, gain / best[most - 1]).mean())

        return weighed

    return measure


_WRITTEN: dict[str, Measure] = {
    "bleu": texts.bleu_measure,
    "chrf": texts.chrf_measure,
    "rouge1": texts.rouge_measure(0),
    "rouge2": texts.rouge_measure(1),
    "rougeL": texts.rouge_measure(2),
    "exact_match": texts.exact_measure,
}

MEASURES: dict[str, dict[str, Measure]] = {
    TAGGING: {
        "accuracy": tagging.right,
        **{name: tagging.by_tag(name) for name in ("precision", "recall", "f1")},
        **{f"span_{name}": tagging.of_spans(name) for name in ("precision", "recall", "f1")},
    },
    SPEECH: {"wer": texts.WER, "cer": texts.CER, "exact_match": texts.same_spoken},
    TRANSLATION: _WRITTEN,
    SUMMARY: _WRITTEN,
    GENERATION: {**_WRITTEN, "perplexity": texts.perplexity, "bits_per_byte": texts.bits_per_byte},
    DETECTION: {
        "map": boxes.precision_measure(slice(None)),
        "map_50": boxes.precision_measure(slice(0, 1)),
        "map_75": boxes.precision_measure(slice(5, 6)),
        "mar_100": boxes.recall_measure,
        "iou": boxes.iou_measure,
    },
    CLUSTERING: {
        "silhouette": clusters.silhouette,
        "adjusted_rand": clusters.agreement("rand"),
        "normalized_mutual_info": clusters.agreement("mutual"),
        "homogeneity": clusters.agreement("homogeneity"),
        "completeness": clusters.agreement("completeness"),
    },
    RECOMMENDATION: {
        "rmse": _away(2),
        "mae": _away(1),
        "hit_rate": _by_user("hit_rate"),
        "recall_at_k": _by_user("recall_at_k"),
        "ndcg": _by_user("ndcg"),
    },
    ANOMALY: {
        "reconstruction_error": _of_all(0),
        "flagged": _of_all(1),
        "roc_auc": _ranked(Ranking.auc),
        "average_precision": _ranked(Ranking.average_precision),
        "precision": _flagging("precision"),
        "recall": _flagging("recall"),
        "f1": _flagging("f1"),
    },
}
