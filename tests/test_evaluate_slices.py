"""Slices, calibration and thresholds, against values worked out by hand and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import SliceSpec
from modelworks.core.types import Column
from modelworks.ml.evaluate.calibration import calibration, thresholds
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.slices import mask, measure, parse_slice

TABLE = pa.table({"age": [20, 70, None, 65], "sex": ["F", "M", "F", "F"], "paid": [1.5, 2.5, 3.5, 4.5]})
COLUMNS = [
    Column(name="age", type="integer", nullable=True),
    Column(name="sex", type="category"),
    Column(name="paid", type="number"),
]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("age > 60", [1, 3]),
        ("age <= 65", [0, 3]),
        ('age > 60 and sex == "F"', [3]),
        ("`sex` != 'F'", [1]),
        ("paid >= 2.5", [1, 2, 3]),
        (SliceSpec(column="sex", equals="F"), [0, 2, 3]),
    ],
)
def test_a_slice_keeps_the_rows_where_it_holds(given, kept):
    assert np.flatnonzero(mask(parse_slice(given, COLUMNS), TABLE)).tolist() == kept


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("height > 3", "unknown_column"),
        ("age", "bad_slice"),
        ("age > old", "bad_slice"),
        ("sex > F", "bad_slice"),
        ("__import__('os')", "bad_slice"),
        ("age > 60 or age < 3", "bad_slice"),
    ],
)
def test_what_is_no_slice_is_refused(given, code):
    with pytest.raises(InvalidInput) as refused:
        parse_slice(given, COLUMNS)
    assert (refused.value.code, refused.value.param) == (code, "slices")


def test_a_slice_is_measured_apart():
    found = Predictions(np.array([3, 1, 0]), np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 3.0]))
    old, none = measure("tabular-regression", ["age > 60", "age > 99"], found, TABLE, COLUMNS, ["mae"], 0)
    assert (old["rows"], old["metrics"]["mae"]["mean"]) == (2, 1.0)
    assert old["metrics"]["mae"]["low"] <= 1.0 <= old["metrics"]["mae"]["high"]
    assert (none["rows"], none["metrics"], none["note"]) == (0, {}, "no row")


def two(probabilities, true):
    said = np.asarray(probabilities)
    return Predictions(np.arange(len(said)), np.asarray(true), np.column_stack([1 - said, said]))


def test_calibration_by_hand():
    found = calibration(two([0.05, 0.05, 0.95, 0.95], [0, 1, 1, 1]))
    # |0.05 - 0.5| for half of the rows, |0.95 - 1| for the others
    assert found["ece"] == pytest.approx(0.25)
    assert [one["rows"] for one in found["bins"]] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_thresholds_are_the_best_of_all():
    from sklearn.metrics import f1_score

    random = np.random.default_rng(0)
    true = random.integers(0, 2, 200)
    said = np.round(np.clip(true * 0.3 + random.random(200) * 0.7, 0, 1), 2)
    found = thresholds(two(said, true), ["no", "yes"])
    assert found is not None
    by_hand = {t: f1_score(true, said >= t) for t in np.unique(said)}
    assert found["f1"]["f1"] == pytest.approx(max(by_hand.values()))
    assert by_hand[found["f1"]["threshold"]] == pytest.approx(found["f1"]["f1"])
    j = {t: (said[true == 1] >= t).mean() - (said[true == 0] >= t).mean() for t in np.unique(said)}
    assert found["youden"]["youden"] == pytest.approx(max(j.values()))
    assert thresholds(two([0.2, 0.4], [1, 1]), ["no", "yes"]) is None
