"""Is one model better than another? Both answer for the same rows; the rows are drawn again a thousand times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import CLASSIFICATION
from modelworks.ml.evaluate.catalogue import METRICS, PRIMARY
from modelworks.ml.evaluate.intervals import LEVEL, bootstrap, percentiles
from modelworks.ml.evaluate.metrics import Predictions, WeightedScorer, score

BETTER, WORSE, EVEN = "better", "worse", "no significant difference"


def compare(
    task: str, model: Sequence[Predictions], other: Sequence[Predictions], wanted: Sequence[str], seed: int
) -> dict[str, Any]:
    """`model` against `other`, part by part on the rows that both answered for; differences are model - other.

    Each metric over all those rows: both values, difference, its 95 % paired-bootstrap interval, a two-sided
    p-value and the verdict (`better`: model is). For classification also McNemar's exact test of the labels. `verdict`
    is that of the task's primary metric when it is among `wanted`, else of the first.
    """
    pairs = [_common(a, b) for a, b in zip(model, other, strict=True)]
    a, b = Predictions.join([pair[0] for pair in pairs]), Predictions.join([pair[1] for pair in pairs])
    if not len(a.rows):
        raise InvalidInput("the two models have no row in common to be compared on", param="compare")
    first, second = WeightedScorer(task, a, wanted), WeightedScorer(task, b, wanted)
    samples = bootstrap(a.rows, lambda weights: [first(weights), second(weights)], seed)
    values, others = score(task, a, wanted), score(task, b, wanted)
    metrics = {
        name: _judge(name, values[name], others[name], samples[:, 0, index] - samples[:, 1, index])
        for index, name in enumerate(wanted)
    }
    deciding = PRIMARY[task] if PRIMARY[task] in metrics else wanted[0]
    found: dict[str, Any] = {
        "rows": len(np.unique(a.rows)),
        "note": "these figures are of all rows together; those under metrics are means over the parts, and may differ",
        "method": {"name": "paired bootstrap over rows", "level": LEVEL, "resamples": len(samples), "seed": seed},
        "metrics": metrics,
        "decided_by": deciding,
        "verdict": metrics[deciding]["verdict"],
    }
    if task == CLASSIFICATION:
        found["mcnemar"] = mcnemar(a, b)
    return found


def mcnemar(model: Predictions, other: Predictions) -> dict[str, Any]:
    """McNemar's exact test: of the rows that only one of the two got right, is half each credible? Each row counts
    once.
    """
    from scipy.stats import binomtest

    once = np.unique(model.rows, return_index=True)[1]
    right, right_too = (model.labels == model.true)[once], (other.labels == other.true)[once]
    only, only_other = int((right & ~right_too).sum()), int((~right & right_too).sum())
    p_value = float(binomtest(only, only + only_other, 0.5).pvalue) if only + only_other else 1.0
    return {"only_model_right": only, "only_other_right": only_other, "p_value": p_value}


def _common(a: Predictions, b: Predictions) -> tuple[Predictions, Predictions]:
    _, left, right = np.intersect1d(a.rows, b.rows, assume_unique=True, return_indices=True)
    return a.take(left), b.take(right)


def _judge(name: str, value: float | None, other: float | None, drawn: np.ndarray) -> dict[str, Any]:
    drawn = drawn[np.isfinite(drawn)]
    if value is None or other is None or not len(drawn):
        return {
            "model": value,
            "other": other,
            "difference": None,
            "low": None,
            "high": None,
            "p_value": None,
            "verdict": EVEN,
        }
    low, high = percentiles(drawn)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p_value = min(1.0, 2 * (int(tail) + 1) / (len(drawn) + 1))
    verdict = EVEN
    if (low > 0 or high < 0) and p_value <= 1 - LEVEL:
        verdict = BETTER if (low > 0) == METRICS[name].greater_is_better else WORSE
    return {
        "model": value, "other": other, "difference": value - other,
        "low": low, "high": high, "p_value": p_value, "verdict": verdict,
    }  # fmt: skip
