"""The field's names of what a model does. Learning classes or numbers has a name for each kind of thing it reads."""

from __future__ import annotations

from collections.abc import Iterable

CLASSIFICATION, REGRESSION = "tabular-classification", "tabular-regression"
ANOMALY, FORECAST, RECOMMENDATION = "anomaly-detection", "forecast", "recommendation"
GENERATION = "text-generation"
TAGGING = "token-classification"
ADAPTER = "lora-adapter"  # serves no calls by itself: a deployment of its base model carries it
SPEECH, TRANSLATION, SUMMARY = "speech-to-text", "translation", "summarization"
DETECTION, CLUSTERING = "object-detection", "clustering"
TEXTS = (TRANSLATION, SUMMARY, GENERATION)  # what answers in texts that are held against others
KINDS = ("tabular", "image", "text", "audio", "multimodal")
# the metric that stands for all of a task
PRIMARY = {
    CLASSIFICATION: "accuracy", REGRESSION: "r2", FORECAST: "mase", ANOMALY: "reconstruction_error",
    RECOMMENDATION: "ndcg", SPEECH: "wer", TRANSLATION: "bleu", SUMMARY: "rougeL", GENERATION: "perplexity",
    DETECTION: "map", CLUSTERING: "silhouette", TAGGING: "f1",
}  # fmt: skip
_GOALS = ("classification", "regression")


def base_of(task: str) -> str:
    """What decides how it is learnt and judged: of `image-classification`, `tabular-classification`."""
    kind, _, goal = task.partition("-")
    return f"tabular-{goal}" if kind in KINDS and goal in _GOALS else task


def kind_of(types: Iterable[str]) -> str:
    """What features of these column types are together: one of `KINDS`."""
    found = set(types)
    if len(found) == 1 and (only := next(iter(found))) in KINDS:
        return only
    return "multimodal" if found & {"image", "audio"} else "tabular"


def named(base: str, kind: str) -> str:
    """The task `base` of features of `kind`: `tabular-classification` of images is `image-classification`."""
    return f"{kind}-{base.partition('-')[2]}" if base in (CLASSIFICATION, REGRESSION) else base


def primary(task: str | None, metrics: Iterable[str]) -> str | None:
    """The metric that stands for all: the task's own where it is there, else the first there is."""
    there = list(metrics)
    first = PRIMARY.get(base_of(task)) if task else None
    return first if first in there else next(iter(there), None)
