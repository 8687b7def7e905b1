"""The field's names of what a model does. Learning classes or numbers has a name for each kind of thing it reads."""

from __future__ import annotations

from collections.abc import Iterable

CLASSIFICATION, REGRESSION = "tabular-classification", "tabular-regression"
ANOMALY, FORECAST, RECOMMENDATION = "anomaly-detection", "forecast", "recommendation"
GENERATION = "text-generation"
TAGGING = "token-classification"
ADAPTER = "lora-adapter"  # serves no calls by itself: a deployment of its base model carries it
KINDS = ("tabular", "image", "text", "audio", "multimodal")
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
