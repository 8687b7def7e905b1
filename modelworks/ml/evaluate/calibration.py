"""Are probabilities what they say, and from which one on to say yes: reliability, expected calibration error, thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.ml.evaluate.predictions import Predictions

BINS = 10


def calibration(predictions: Predictions) -> dict[str, Any]:
    """Of two classes: the second one's probability against its share. Of more: the chosen class's against being right.

    `bins`: rows, mean probability and share in each tenth. `ece`: their gaps, weighted by rows (Guo et al. 2017).
    """
    binary = predictions.output.shape[1] == 2
    said = predictions.output[:, 1] if binary else predictions.output.max(axis=1)
    happened = predictions.true == 1 if binary else predictions.labels == predictions.true
    places = np.clip((said * BINS).astype(np.int64), 0, BINS - 1)
    bins, ece = [], 0.0
    for place in range(BINS):
        inside = places == place
        rows = int(inside.sum())
        mean, share = (float(said[inside].mean()), float(happened[inside].mean())) if rows else (None, None)
        if mean is not None and share is not None:
            ece += rows / len(said) * abs(mean - share)
        bins.append({"from": place / BINS, "to": (place + 1) / BINS, "rows": rows, "probability": mean, "share": share})
    return {"of": "the second class" if binary else "the chosen class", "ece": ece, "bins": bins}


def thresholds(predictions: Predictions, classes: list[Any]) -> dict[str, Any] | None:
    """Of two classes: the probability from which on to say the second, best by F1 and by Youden's J; None of more.

    Chosen on the tested rows, so the figures beside each are somewhat too good.
    """
    if predictions.output.shape[1] != 2 or len(np.unique(predictions.true)) < 2:
        return None
    order = np.argsort(-predictions.output[:, 1], kind="stable")
    scores, positive = predictions.output[order, 1], predictions.true[order] == 1
    last = np.r_[scores[1:] != scores[:-1], True]  # equal scores are on one side together
    hits, said = np.cumsum(positive)[last], np.flatnonzero(last) + 1
    precision, recall = hits / said, hits / positive.sum()
    f1 = 2 * hits / (said + positive.sum())
    youden = recall - (said - hits) / (~positive).sum()
    places = {"f1": int(f1.argmax()), "youden": int(youden.argmax())}
    found = {
        name: {
            "threshold": float(scores[last][place]),
            "precision": float(precision[place]),
            "recall": float(recall[place]),
            "f1": float(f1[place]),
            "youden": float(youden[place]),
        }
        for name, place in places.items()
    }
    return {"positive": classes[1], "note": "chosen on the rows of this report", **found}


def choose_threshold(
    wanted: float | str | None, parts: list[Predictions], classes: list[Any] | None
) -> tuple[list[Predictions], dict[str, Any] | None]:
    """(the parts, their labels by a threshold, that threshold): `wanted` itself, or the best by f1 or youden.

    The model gets the best of all held-out rows. Where there are several parts, each is judged by the best of the others.
    """
    if wanted is None:
        return parts, None
    if classes is None or len(classes) != 2:
        count = "a number" if classes is None else f"{len(classes)} classes"
        raise InvalidInput(f"threshold is for two classes, and the target has {count}; leave it out", param="threshold")
    if not isinstance(wanted, str):
        value = float(np.float32(wanted))
        said = {"value": value, "by": "given", "positive": classes[1], "note": "labels are by the given threshold"}
        return [part.judged(value) for part in parts], said
    value = _best(parts, wanted)
    if len(parts) > 1:
        judged = [part.judged(_best([*parts[:at], *parts[at + 1 :]], wanted)) for at, part in enumerate(parts)]
        note = "each part's labels are by the threshold that was best in the other parts; the model's is the best of all"
    else:
        judged = [parts[0].judged(value)]
        note = "the threshold was chosen on the tested rows, so metrics of labels are somewhat too good"
    return judged, {"value": value, "by": wanted, "positive": classes[1], "note": note}


def _best(parts: list[Predictions], by: str) -> float:
    found = thresholds(Predictions.join(parts), [0, 1])
    if found is None:
        raise InvalidInput(
            "the tested rows are of one class, so no threshold can be chosen; give a number", param="threshold"
        )
    return float(np.float32(found[by]["threshold"]))
