"""The catalogue of metrics: ids, tasks, direction and bounds, and the check of a request's metrics and gates. Light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Gate, GivenPredictions
from modelworks.core.tasks import (
    ANOMALY,
    CLASSIFICATION,
    CLUSTERING,
    DETECTION,
    FORECAST,
    GENERATION,
    KINDS,
    RECOMMENDATION,
    REGRESSION,
    SPEECH,
    TAGGING,
    TEXTS,
    base_of,
    named,
)

TOP = (3, 5, 10)  # the k of top-k accuracy
_CLASSES = (CLASSIFICATION,)
_TAGS = (TAGGING,)
_NAMED = (CLASSIFICATION, TAGGING)
_FOUND = (CLASSIFICATION, ANOMALY, TAGGING)
_ANOMALIES = (ANOMALY,)
_NUMBERS = (REGRESSION, FORECAST)
_SERIES = (FORECAST,)
_TASTES = (RECOMMENDATION,)
_SPOKEN = (SPEECH,)
_BOXES = (DETECTION,)
_GROUPS = (CLUSTERING,)
_LANGUAGE = (GENERATION,)


@dataclass(frozen=True)
class Metric:
    """`low` and `high` are the values a metric can take; intervals are clipped to them."""

    id: str
    tasks: tuple[str, ...]
    greater_is_better: bool
    low: float
    high: float
    description: str


METRICS: dict[str, Metric] = {
    metric.id: metric
    for metric in (
        Metric("accuracy", _NAMED, True, 0, 1, "share of rows whose label is right; of tags: of elements"),
        Metric("balanced_accuracy", _CLASSES, True, 0, 1, "mean of the recalls of the classes that occur"),
        Metric(
            "precision",
            _FOUND,
            True,
            0,
            1,
            "precision, macro: mean over classes, 0 where a class is never predicted; of anomalies: of what is flagged",
        ),
        Metric("recall", _FOUND, True, 0, 1, "recall, macro: mean over classes; of anomalies: of the known ones"),
        Metric("f1", _FOUND, True, 0, 1, "F1, macro: mean over classes; of anomalies: of what is flagged"),
        Metric("precision_weighted", _CLASSES, True, 0, 1, "precision, mean over classes weighted by their rows"),
        Metric("recall_weighted", _CLASSES, True, 0, 1, "recall, mean over classes weighted by their rows"),
        Metric("f1_weighted", _CLASSES, True, 0, 1, "F1, mean over classes weighted by their rows"),
        Metric(
            "roc_auc",
            (CLASSIFICATION, ANOMALY),
            True,
            0,
            1,
            "area under the ROC curve; with more than two classes one-vs-rest, macro; of anomalies: of the score",
        ),
        Metric("log_loss", _CLASSES, False, 0, math.inf, "mean negative log probability of the true class"),
        Metric(
            "brier",
            _CLASSES,
            False,
            0,
            2,
            "Brier score: mean squared error of the probabilities (summed over classes if more than two)",
        ),
        *(
            Metric(f"top_{k}_accuracy", _CLASSES, True, 0, 1, f"share of rows whose class is among the {k} most probable")
            for k in TOP
        ),
        Metric(
            "mase",
            _SERIES,
            False,
            0,
            math.inf,
            "mean absolute error in units of the naive forecast's error in training: of the value a season before when a "
            "season is given, else of the step before",
        ),
        Metric("smape", _SERIES, False, 0, 2, "mean of the absolute error's share of the mean of truth and forecast"),
        Metric("coverage", _SERIES, True, 0, 1, "share of what came that lay between low and high: the level, where they are right"),
        Metric("average_precision", _ANOMALIES, True, 0, 1, "area under the precision-recall curve of the score"),
        Metric("reconstruction_error", _ANOMALIES, False, 0, math.inf, "mean anomaly score: how far rows are from what is usual"),
        Metric("flagged", _ANOMALIES, False, 0, 1, "share of rows that are flagged as anomalies"),
        Metric("hit_rate", _TASTES, True, 0, 1, "share of users with a held-out item among the top_k recommended"),
        Metric("recall_at_k", _TASTES, True, 0, 1, "share of a user's held-out items among the top_k, mean over users"),
        Metric("ndcg", _TASTES, True, 0, 1, "discounted gain of the held-out items among the top_k, mean over users"),
        Metric("span_f1", _TAGS, True, 0, 1, "F1 of whole spans: their bounds and their name must be right, as in CoNLL 2003"),
        Metric("span_precision", _TAGS, True, 0, 1, "share of the spans said that are right"),
        Metric("span_recall", _TAGS, True, 0, 1, "share of the true spans that are said"),
        Metric("mse", _NUMBERS, False, 0, math.inf, "mean squared error"),
        Metric("rmse", (*_NUMBERS, *_TASTES), False, 0, math.inf, "root of the mean squared error"),
        Metric("mae", (*_NUMBERS, *_TASTES), False, 0, math.inf, "mean absolute error"),
        Metric("mape", _NUMBERS, False, 0, math.inf, "mean absolute error as a share of the true value"),
        Metric("r2", _NUMBERS, True, -math.inf, 1, "share of the variance that is explained"),
        Metric("wer", _SPOKEN, False, 0, math.inf, "word error rate: words to change, leave out and put in, per word of truth"),
        Metric("cer", _SPOKEN, False, 0, math.inf, "character error rate, as wer"),
        Metric("bleu", TEXTS, True, 0, 100, "BLEU of all texts together, 0 to 100, as sacrebleu has it"),
        Metric("chrf", TEXTS, True, 0, 100, "chrF2 of all texts together, 0 to 100, as sacrebleu has it"),
        Metric("rouge1", TEXTS, True, 0, 1, "ROUGE-1: F1 of the words, mean over rows"),
        Metric("rouge2", TEXTS, True, 0, 1, "ROUGE-2: F1 of the pairs of words, mean over rows"),
        Metric("rougeL", TEXTS, True, 0, 1, "ROUGE-L: F1 of the longest common subsequence of words, mean over rows"),
        Metric("exact_match", (*TEXTS, SPEECH), True, 0, 1, "share of rows whose text is the reference"),
        Metric("perplexity", _LANGUAGE, False, 1, math.inf, "exp of the mean negative log probability of a token"),
        Metric("bits_per_byte", _LANGUAGE, False, 0, math.inf, "negative log2 probability per byte of text: of any tokens"),
        Metric("map", _BOXES, True, 0, 1, "COCO's mean average precision, over IoU 0.5 to 0.95 and the classes"),
        Metric("map_50", _BOXES, True, 0, 1, "mean average precision at IoU 0.5"),
        Metric("map_75", _BOXES, True, 0, 1, "mean average precision at IoU 0.75"),
        Metric("mar_100", _BOXES, True, 0, 1, "mean recall with at most 100 boxes an image and class, over IoU 0.5 to 0.95"),
        Metric("iou", _BOXES, True, 0, 1, "IoU of each true box with the best predicted one of its class, mean"),
        Metric("silhouette", _GROUPS, True, -1, 1, "how much nearer a row is to its own cluster than to the next, mean"),
        Metric("adjusted_rand", _GROUPS, True, -0.5, 1, "agreement of clusters and labels over pairs of rows, 0 by chance"),
        Metric("normalized_mutual_info", _GROUPS, True, 0, 1, "mutual information of clusters and labels (V-measure)"),
        Metric("homogeneity", _GROUPS, True, 0, 1, "how far each cluster holds one label alone"),
        Metric("completeness", _GROUPS, True, 0, 1, "how far the rows of a label are in one cluster"),
    )
}
OF_LANGUAGE = ("perplexity", "bits_per_byte")
_OF_SCORES = ("roc_auc", "log_loss", "brier", *(f"top_{k}_accuracy" for k in TOP))


def describe() -> list[dict[str, Any]]:
    """Every metric as data, for `GET /api/v1/metrics`; an infinite bound is null."""
    return [
        {
            "id": metric.id,
            "task": metric.tasks[0],
            "tasks": list(dict.fromkeys(named(task, kind) for task in metric.tasks for kind in KINDS)),
            "greater_is_better": metric.greater_is_better,
            "low": None if math.isinf(metric.low) else metric.low,
            "high": None if math.isinf(metric.high) else metric.high,
            "description": metric.description,
        }
        for metric in METRICS.values()
    ]


def metrics_of(task: str) -> list[str]:
    """Of a task by any of its names."""
    return [metric.id for metric in METRICS.values() if base_of(task) in metric.tasks]


def offered(given: GivenPredictions) -> list[str]:
    """The metrics that given predictions of this form can have."""
    out: tuple[str, ...] = OF_LANGUAGE
    if given.scores is None:
        out += _OF_SCORES
    if base_of(given.task) == CLUSTERING:
        out += () if given.features else ("silhouette",)
        out += () if given.reference else ("adjusted_rand", "normalized_mutual_info", "homogeneity", "completeness")
    if given.low is None:
        out += ("coverage",)
    return [name for name in metrics_of(given.task) if name not in out]


def check_metrics(
    task: str,
    names: Sequence[str] | None,
    gates: Sequence[Gate] = (),
    *,
    classes: int | None = None,
    among: Sequence[str] | None = None,
) -> list[str]:
    """The metrics to compute: `names` and those the gates need, in order, each once.

    Without names all of the task, or those `among` them; of so many `classes`, no top-k that is always 1.
    InvalidInput for an unknown metric or one of another task, naming those there are.
    """
    allowed = metrics_of(task) if among is None else list(among)
    if names is not None and not names:
        raise InvalidInput(
            f"give at least one metric, or leave metrics out for all of: {', '.join(allowed)}", param="metrics"
        )
    usual = [name for name in allowed if classes is None or not name.startswith("top_") or int(name.split("_")[1]) < classes]
    wanted = [*(names if names is not None else usual), *(gate.metric for gate in gates)]
    for name in wanted:
        if name not in allowed:
            raise InvalidInput(
                f"there is no metric {str(name)[:80]!r} for {task}{_why(name, task)}; choose from: {', '.join(allowed)}",
                code="unknown_metric",
                param="metrics" if names and name in names else "gates",
            )
    return list(dict.fromkeys(wanted))


def _why(name: str, task: str) -> str:
    return " without what it is computed of (scores, features or a reference)" if name in metrics_of(task) else ""


def passes(gate: Gate, value: float | None) -> bool:
    """An undefined (null) metric passes no gate."""
    if value is None:
        return False
    return (gate.at_least is None or value >= gate.at_least) and (gate.at_most is None or value <= gate.at_most)


def failed_gate(gates: Sequence[Gate], metrics: dict[str, Any]) -> tuple[Gate, float | None] | None:
    """The first gate that the means in `metrics` do not pass, and the value it saw."""
    values = [(gate, metrics[gate.metric]["mean"]) for gate in gates]
    return next(((gate, value) for gate, value in values if not passes(gate, value)), None)


def gate_results(gates: Sequence[Gate], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Each gate as given, with the value it saw and whether it passed, for a report's details."""
    return [
        gate.model_dump(mode="json", exclude_none=True)
        | {"value": metrics[gate.metric]["mean"], "passed": passes(gate, metrics[gate.metric]["mean"])}
        for gate in gates
    ]
