"""Edits along time: what a row gets from its past, regular steps, wide tables made long."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit, TableSchema
from modelworks.ml.data.edit import edit
from modelworks.ml.data.ingest import ingest
from tests.learning import run

MONTHS = "month,y\n" + "".join(f"{2000 + i // 12}-{i % 12 + 1:02}-01,{i * i}\n" for i in range(36))
TWO = "when,y,k\n2024-01-01,1,a\n2024-01-02,2,a\n2024-01-05,5,a\n2024-01-01,10,b\n2024-01-03,30,b\n"


@pytest.fixture
def change(tmp_path):
    def apply(text: str, *edits: dict):
        (tmp_path / "upload").write_text(text)
        base = ingest(tmp_path / "upload", filename="a.csv", schema=TableSchema(), out=tmp_path / "a.parquet")
        found = edit(tmp_path / "a.parquet", base.columns, [DatasetEdit(**one) for one in edits], tmp_path / "out.parquet")
        return found, pq.read_table(tmp_path / "out.parquet")

    return apply


def test_lags_differences_and_windows_are_columns(change):
    found, table = change(
        MONTHS,
        {"op": "window", "column": "y", "time": "month", "size": 3, "how": "sum", "keep": True},
        {"op": "difference", "column": "y", "time": "month", "keep": True},
        {"op": "lag", "column": "y", "time": "month", "lags": [1, 12]},
    )
    assert [column.name for column in found.columns] == ["month", "y", "y_sum3", "y_diff1", "y_lag1", "y_lag12"]
    assert found.rows == 24
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["y"], first["y_lag1"], first["y_lag12"], first["y_diff1"]) == (144, 121, 0, 23)
    assert first["y_sum3"] == 81 + 100 + 121, "the row itself is not in its window"
    assert not any(column.nullable for column in found.columns)


def test_irregular_steps_are_refused_until_they_are_resampled(change):
    lag = {"op": "lag", "column": "y", "time": "when", "group": "k"}
    with pytest.raises(InvalidInput, match="irregular") as caught:
        change(TWO, lag)
    assert caught.value.code == "irregular_steps"
    with pytest.raises(InvalidInput, match="name the column that tells series apart"):
        change(TWO, {"op": "lag", "column": "y", "time": "when"})
    _, table = change(TWO, {"op": "resample", "time": "when", "every": "1 day", "group": "k"}, lag)
    assert table["y"].to_pylist() == [2.0, 2.0, 2.0, 5.0, 10.0, 30.0]
    assert table["y_lag1"].to_pylist() == [1.0, 2.0, 2.0, 2.0, 10.0, 10.0]
    _, table = change(TWO, {"op": "resample", "time": "when", "every": "2 days", "group": "k", "how": "sum", "fill": "missing"})
    assert table["y"].to_pylist() == [3.0, None, 5.0, 10.0, 30.0]


def test_a_wide_table_becomes_a_long_one(change):
    wide = "when,oslo,rome\n2024-01-01,1,5\n2024-01-02,2,6\n"
    found, table = change(wide, {"op": "unpivot", "columns": ["oslo", "rome"]}, {"op": "rename", "column": "series", "name": "city"})
    assert [column.name for column in found.columns] == ["when", "city", "value"]
    assert table["city"].to_pylist() == ["oslo", "oslo", "rome", "rome"]
    assert table["value"].to_pylist() == [1.0, 2.0, 5.0, 6.0]
    assert table["when"][0].as_py() == datetime(2024, 1, 1)


@pytest.mark.parametrize(
    ("one", "word"),
    [
        ({"op": "lag", "column": "nope", "time": "month"}, "no|must be a column"),
        ({"op": "difference", "column": "month", "time": "month"}, "number or integer"),
        ({"op": "resample", "time": "month", "every": "1 fortnight"}, "every must be a step"),
        ({"op": "resample", "time": "month", "every": "1 second"}, "too short"),
        ({"op": "lag", "column": "y", "time": "month", "lags": [500]}, "no row is left"),
        ({"op": "unpivot", "columns": ["month"]}, "number or integer"),
    ],
)
def test_what_cannot_be_is_named(change, one, word):
    with pytest.raises(InvalidInput, match=word) as caught:
        change(MONTHS, one)
    assert caught.value.param == "edits[0]"


def test_any_regression_forecasts_from_lags_and_beats_the_season_before(change, tmp_path):
    """A trend, a season and noise; tested on the tail, against the value a season ago."""
    random = np.random.default_rng(0)
    t = np.arange(144)
    values = 100 + 2 * t + 30 * np.sin(2 * np.pi * t / 12) + random.normal(0, 3, len(t))
    text = "month,y\n" + "".join(f"{1949 + i // 12}-{i % 12 + 1:02}-01,{v:.3f}\n" for i, v in enumerate(values))
    found, table = change(text, {"op": "lag", "column": "y", "time": "month", "lags": list(range(1, 14))})
    features = [f"y_lag{step}" for step in range(1, 14)]
    made = run(
        (table, found.columns), tmp_path, target="y", algorithm="ridge", features=features,
        validation={"holdout": 0.2, "time": "month"}, metrics=["mae"],
    )  # fmt: skip
    tail = table.slice(len(table) - int(np.ceil(0.2 * len(table))))
    naive = np.abs(tail["y"].to_numpy() - tail["y_lag12"].to_numpy()).mean()
    assert made.report["metrics"]["mae"]["mean"] < 0.5 * naive
