"""The wire form: batches from canonical tables and from JSON rows, and what is said of rows that do not fit."""

import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.tensors import BOOL_MISSING, INT64_MISSING
from modelworks.core.types import Column, TensorSpec
from modelworks.ml.data.types import batch_to_rows, rows_to_batch, signature_inputs, to_batch

COLUMNS = [
    Column(name="width", type="number", nullable=True),
    Column(name="count", type="integer"),
    Column(name="gaps", type="integer", nullable=True),
    Column(name="new", type="boolean", nullable=True),
    Column(name="kind", type="category", nullable=True),
    Column(name="note", type="text"),
    Column(name="when", type="time", nullable=True),
]
INPUTS = signature_inputs(COLUMNS)
ROW = {
    "width": 5.1,
    "count": 2**60 + 1,
    "gaps": 3,
    "new": True,
    "kind": "a",
    "note": "some text",
    "when": "2024-01-31T12:00:00Z",
}
GAPS = ROW | {"width": None, "gaps": None, "new": None, "kind": None, "when": None}


def test_signature():
    kinds = {spec.name: (spec.datatype, spec.column, spec.nullable) for spec in INPUTS}
    assert kinds == {
        "width": ("FP32", "number", True),
        "count": ("INT64", "integer", False),
        "gaps": ("FP32", "integer", True),
        "new": ("BOOL", "boolean", True),
        "kind": ("BYTES", "category", True),
        "note": ("BYTES", "text", False),
        "when": ("BYTES", "time", True),
    }
    assert all(spec.shape == [-1, 1] for spec in INPUTS)


def test_table_and_rows_give_the_same_batch():
    table = pa.table(
        {
            "width": pa.array([5.1, None]),
            "count": [2**60 + 1] * 2,
            "gaps": pa.array([3, None], pa.int64()),
            "new": [True, None],
            "kind": ["a", None],
            "note": ["some text"] * 2,
            "when": pa.array([datetime(2024, 1, 31, 12, tzinfo=UTC), None], pa.timestamp("us", "UTC")),
        }
    )
    of_table, of_rows = to_batch(table, COLUMNS), rows_to_batch([ROW, GAPS], INPUTS)
    for name in ROW:
        assert of_table[name].dtype == of_rows[name].dtype, name
        np.testing.assert_array_equal(of_table[name], of_rows[name], err_msg=name)
    assert of_rows["width"].dtype == np.float32
    assert np.isnan(of_rows["width"][1])
    assert of_rows["new"].tolist() == [1, BOOL_MISSING]
    assert of_rows["kind"].tolist() == ["a", ""]
    assert of_rows["when"].tolist() == ["2024-01-31T12:00:00Z", ""]


def test_rows_come_back_and_read_nicely():
    assert batch_to_rows(rows_to_batch([ROW, GAPS], INPUTS), INPUTS) == [ROW, GAPS]


def test_integers_without_gaps_declared_are_marked():
    batch = to_batch(pa.table({"n": pa.array([1, None], pa.int64())}), [Column(name="n", type="integer")])
    assert batch["n"].tolist() == [1, INT64_MISSING]


def test_times_have_one_form():
    naive = pa.table({"t": pa.array([datetime(2024, 1, 2), datetime(2024, 1, 2, 3, 4, 5, 60)], pa.timestamp("us"))})
    column = Column(name="t", type="time")
    assert to_batch(naive, [column])["t"].tolist() == ["2024-01-02T00:00:00", "2024-01-02T03:04:05.000060"]
    rows = [{"t": "2024-01-02"}, {"t": "2024-01-02T03:04:05+02:00"}, {"t": "2024-01-02T03:04:05.000060"}]
    assert rows_to_batch(rows, signature_inputs([column]))["t"].tolist() == [
        "2024-01-02T00:00:00",
        "2024-01-02T01:04:05Z",
        "2024-01-02T03:04:05.000060",
    ]


@pytest.mark.parametrize(
    ("change", "code", "feature", "says"),
    [
        ({"width": "5.1"}, "bad_value", "width", "expects a number, not the text '5.1'"),
        ({"width": True}, "bad_value", "width", "expects a number, not true"),
        ({"width": [1]}, "bad_value", "width", "expects a number, not a list"),
        ({"width": float("inf")}, "bad_value", "width", "a finite number"),
        ({"width": 1e39}, "bad_value", "width", "within the range of FP32"),
        ({"width": 10**400}, "bad_value", "width", "an integer of 1329 bits"),
        ({"count": 1.5}, "bad_value", "count", "expects an integer, not the number 1.5"),
        ({"count": 2**63}, "bad_value", "count", "within the range of INT64"),
        ({"count": -(2**63)}, "bad_value", "count", "within the range of INT64"),
        ({"count": None}, "missing_value", "count", "expects an integer but its value is missing"),
        ({"count": float("nan")}, "missing_value", "count", "is missing"),
        ({"new": 1}, "bad_value", "new", "expects true or false, not the number 1"),
        ({"kind": 3}, "bad_value", "kind", "expects a text, not the number 3"),
        ({"kind": "\ud800"}, "bad_value", "kind", "lone surrogates"),
        ({"note": ""}, "missing_value", "note", "is missing"),
        ({"when": "yesterday"}, "bad_value", "when", "ISO 8601"),
        ({"when": 5}, "bad_value", "when", "ISO 8601"),
    ],
)
def test_values_that_do_not_fit(change, code, feature, says):
    with pytest.raises(InvalidInput) as caught:
        rows_to_batch([ROW, GAPS, ROW | change], INPUTS)
    assert caught.value.code == code
    assert caught.value.param == feature
    assert caught.value.detail["row"] == 2
    assert "inputs[2]" in caught.value.message
    assert repr(feature) in caught.value.message
    assert says in caught.value.message


def test_names_that_do_not_fit():
    with pytest.raises(InvalidInput, match=r"inputs\[1\] lacks the feature 'kind'") as caught:
        rows_to_batch([ROW, {name: value for name, value in ROW.items() if name != "kind"}], INPUTS)
    assert (caught.value.code, caught.value.param) == ("missing_feature", "kind")
    with pytest.raises(InvalidInput, match=r"inputs\[0\] has the feature 'colour'") as caught:
        rows_to_batch([ROW | {"colour": 1}], INPUTS)
    assert (caught.value.code, caught.value.param) == ("unknown_feature", "colour")
    with pytest.raises(InvalidInput, match=r"inputs\[1\] must be an object"):
        rows_to_batch([ROW, [1, 2]], INPUTS)  # type: ignore[list-item]


def test_whole_floats_are_integers():
    assert rows_to_batch([ROW | {"count": 7.0}], INPUTS)["count"].tolist() == [7]


def test_nested_tensors_of_a_users_own_net():
    spec = TensorSpec(name="x", datatype="FP32", shape=[-1, 2, -1])
    batch = rows_to_batch([{"x": [[1, 2, 3], [4, 5, 6]]}, {"x": [[0, 0, 0], [0, 0, 1]]}], [spec])
    assert batch["x"].shape == (2, 2, 3)
    assert batch_to_rows(batch, [spec])[0] == {"x": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]}
    for bad in ([[1, 2], [3]], [1, 2], [[1, 2]], 5, [[1, "a"], [2, 3]]):
        with pytest.raises(InvalidInput):
            rows_to_batch([{"x": bad}], [spec])


def test_numbers_beyond_float32_are_refused_in_training_too():
    with pytest.raises(InvalidInput, match="column 'x', row 2: 1e\\+39"):
        to_batch(pa.table({"x": [1.0, 1e39]}), [Column(name="x", type="number")])


def test_import_is_light():
    code = (
        "import sys, modelworks.ml.data.types; "
        "sys.exit(any(m in sys.modules for m in ('pyarrow', 'pandas', 'duckdb', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
