"""Is one model better than another? Both answer for the same rows: of a single split these are drawn again a thousand
times; of several parts the differences are tested by a t-test that knows that their training rows overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import CLASSIFICATION, primary
from modelworks.ml.evaluate.catalogue import METRICS
from modelworks.ml.evaluate.intervals import LEVEL, bootstrap, percentiles
from modelworks.ml.evaluate.metrics import WeightedScorer, score
from modelworks.ml.evaluate.predictions import Predictions

BETTER, WORSE, EVEN = "better", "worse", "no significant difference"


def compare(
    task: str,
    model: Sequence[Predictions],
    other: Sequence[Predictions],
    wanted: Sequence[str],
    seed: int,
    trained_on: Sequence[int] = (),
) -> dict[str, Any]:
    """`model` against `other`, part by part on the rows that both answered for; differences are model - other.

    Each metric: both values, difference, its 95 % interval, a two-sided p-value and the verdict (`better`: model is).
    With several parts (`trained_on`: how many rows trained each) the values are means over them and the test is the
    corrected resampled t-test; of one part a paired bootstrap. `method` says which. For classification also McNemar's exact
    test of the labels. `verdict` is that of the task's primary metric when it is among `wanted`, else of the first.
    """
    pairs = [_common(a, b) for a, b in zip(model, other, strict=True)]
    a, b = Predictions.join([pair[0] for pair in pairs]), Predictions.join([pair[1] for pair in pairs])
    if not len(a.rows):
        raise InvalidInput("the two models have no row in common to be compared on", param="compare")
    if len(pairs) > 1 and len(trained_on) == len(pairs):
        method, metrics = _over_parts(task, pairs, wanted, trained_on)
    else:
        method, metrics = _over_rows(task, a, b, wanted, seed)
    deciding = primary(task, wanted) or wanted[0]
    found: dict[str, Any] = {
        "rows": len(np.unique(a.rows)),
        "method": method,
        "metrics": metrics,
        "decided_by": deciding,
        "verdict": metrics[deciding]["verdict"],
    }
    if task == CLASSIFICATION:
        found["mcnemar"] = {"test": "McNemar's exact test", **mcnemar(a, b)}
    return found


def _over_rows(
    task: str, a: Predictions, b: Predictions, wanted: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = WeightedScorer(task, a, wanted), WeightedScorer(task, b, wanted)
    samples = bootstrap([a.rows, b.rows], lambda mine, theirs: [first(mine), second(theirs)], seed)
    values, others = score(task, a, wanted), score(task, b, wanted)
    metrics = {
        name: _judge(name, values[name], others[name], samples[:, 0, index] - samples[:, 1, index])
        for index, name in enumerate(wanted)
    }
    return {"name": "paired bootstrap over rows", "level": LEVEL, "resamples": len(samples), "seed": seed}, metrics


def _over_parts(
    task: str, pairs: Sequence[tuple[Predictions, Predictions]], wanted: Sequence[str], trained_on: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nadeau and Bengio 2003: the variance of the parts' differences, times 1/k + tested rows / training rows."""
    tested = float(np.mean([len(a.rows) for a, _ in pairs]))
    share = tested / float(np.mean(trained_on))
    values = [score(task, a, wanted) for a, _ in pairs]
    others = [score(task, b, wanted) for _, b in pairs]
    metrics = {name: _tested(name, [one[name] for one in values], [one[name] for one in others], share) for name in wanted}
    method = {
        "name": "corrected resampled t-test over folds (Nadeau and Bengio 2003)", "level": LEVEL, "folds": len(pairs),
        "test_share": share,
    }  # fmt: skip
    return method, metrics


def _tested(name: str, values: Sequence[float | None], others: Sequence[float | None], share: float) -> dict[str, Any]:
    from scipy.stats import t

    both = [(one, two) for one, two in zip(values, others, strict=True) if one is not None and two is not None]
    if len(both) < 2:
        one, two = both[0] if both else (None, None)
        return _line(one, two, None, None, None, EVEN)
    mine, theirs = np.array(both).T
    away = mine - theirs
    middle, count = float(away.mean()), len(away)
    error = float(np.sqrt((1 / count + share) * away.var(ddof=1)))
    if error == 0:  # all parts differ alike, or not at all
        low = high = middle
        p_value = 1.0 if middle == 0 else 0.0
    else:
        half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * error
        low, high = middle - half, middle + half
        p_value = float(2 * t.sf(abs(middle) / error, count - 1))
    verdict = _verdict(name, low, high, p_value)
    return _line(float(mine.mean()), float(theirs.mean()), low, high, p_value, verdict)


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
    """Of the rows that both have, in the rows' order; a row may have several entries."""
    sides = [one.take(np.isin(one.rows, other.rows)) for one, other in ((a, b), (b, a))]
    first, second = (one.take(np.argsort(one.rows, kind="stable")) for one in sides)
    return first, second


def _judge(name: str, value: float | None, other: float | None, drawn: np.ndarray) -> dict[str, Any]:
    drawn = drawn[np.isfinite(drawn)]
    if value is None or other is None or not len(drawn):
        return _line(value, other, None, None, None, EVEN)
    low, high = percentiles(drawn)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p_value = min(1.0, 2 * (int(tail) + 1) / (len(drawn) + 1))
    return _line(value, other, low, high, p_value, _verdict(name, low, high, p_value))


def _verdict(name: str, low: float, high: float, p_value: float) -> str:
    if (low > 0 or high < 0) and p_value <= 1 - LEVEL:
        return BETTER if (low > 0) == METRICS[name].greater_is_better else WORSE
    return EVEN


def _line(
    value: float | None, other: float | None, low: float | None, high: float | None, p_value: float | None, verdict: str
) -> dict[str, Any]:
    difference = None if low is None or value is None or other is None else value - other
    return {
        "model": value, "other": other, "difference": difference, "low": low, "high": high, "p_value": p_value,
        "verdict": verdict,
    }  # fmt: skip
