"""The profile's figures against numpy's, and each warning with a case for and one against it."""

from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Column
from modelworks.ml.data.parquet import open_parquet
from modelworks.ml.data.profile import profile


@pytest.fixture
def look(tmp_path):
    def run(table, target=None, **types):
        path = tmp_path / "data.parquet"
        pq.write_table(table, path)
        kinds = {pa.float64(): "number", pa.int64(): "integer", pa.bool_(): "boolean", pa.string(): "category"}
        columns = [
            Column(name=field.name, type=types.get(field.name) or kinds.get(field.type, "time"))
            for field in table.schema
        ]
        result, warnings = profile(path, columns, target)
        assert [item.name for item in tmp_path.iterdir()] == ["data.parquet"]
        return {column["name"]: column for column in result["columns"]} | {"": result}, warnings

    return run


RANDOM = np.random.default_rng(0)


def test_numbers(look):
    values = RANDOM.standard_normal(500)
    found, _ = look(pa.table({"x": pa.array([*values, None])}))
    x = found["x"]
    assert (x["missing"], x["distinct"], found[""]["rows"]) == (1, 500, 501)
    assert x["min"] == values.min()
    assert x["max"] == values.max()
    assert x["mean"] == pytest.approx(values.mean())
    assert x["std"] == pytest.approx(values.std(ddof=1))
    assert list(x["quantiles"].values()) == pytest.approx(np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]))
    counts, edges = np.histogram(values, bins=20)
    assert x["histogram"]["counts"] == counts.tolist()
    assert x["histogram"]["edges"] == pytest.approx(edges)


def test_other_types(look):
    table = pa.table(
        {
            "i": [1, 1, 3, 3, 3],
            "b": [True, None, True, False, True],
            "c": ["x", "y", "x", None, "x" * 300],
            "t": ["one two", "three", None, "four", ""],
            "w": pa.array([datetime(2024, 1, d) for d in (1, 2, 3, 4, 5)], pa.timestamp("us", "UTC")),
            "one": [7.5] * 5,
            "huge": [1e308, -1e308, 0.0, 1.0, 2.0],
        }
    )
    found, _ = look(table, t="text")
    assert found["i"]["top"] == [{"value": 3, "count": 3}, {"value": 1, "count": 2}]
    assert found["i"]["histogram"] == {"edges": [1.0, 2.0, 3.0, 4.0], "counts": [2, 0, 3]}
    assert found["b"]["top"] == [{"value": True, "count": 3}, {"value": False, "count": 1}]
    assert found["c"]["top"][0] == {"value": "x", "count": 2}
    assert max(len(item["value"]) for item in found["c"]["top"]) == 200
    assert found["t"]["length"] == {"min": 0, "mean": 4.0, "max": 7}
    assert (found["w"]["min"], found["w"]["max"]) == ("2024-01-01T00:00:00Z", "2024-01-05T00:00:00Z")
    assert sum(found["w"]["histogram"]["counts"]) == 5
    assert found["w"]["steps"] == {"regular": True, "usual": "1 day", "usual_count": 4, "count": 4}
    assert found["one"]["histogram"] == {"edges": [7.5, 7.5], "counts": [5]}
    assert sum(found["huge"]["histogram"]["counts"]) == 5
    assert found["huge"]["max"] == 1e308


def test_hostile_names(look):
    names = ['a"b', "'; DROP TABLE data; --", "c.d", "%s", "?", "日本", "data", "x"]
    table = pa.table({name: [1.0, 2.0, 3.0] for name in names} | {"rowid": ["a", "b", "b"]})
    found, _ = look(table, 'a"b')
    assert all(found[name]["mean"] == 2.0 for name in names)
    assert found["rowid"]["top"][0] == {"value": "b", "count": 2}


def test_queries_reach_nothing_else(tmp_path):
    import duckdb

    path = tmp_path / "it's.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    other = tmp_path / "other.csv"
    other.write_text("a\n1\n")
    with open_parquet(path) as data:
        assert data.one("SELECT a FROM data") == (1,)
        for sql in (f"SELECT * FROM read_csv('{other}')", f"COPY data TO '{tmp_path}/x.csv'", "INSTALL httpfs"):
            with pytest.raises(duckdb.Error):
                data.all(sql)
        with pytest.raises(duckdb.Error):
            data.all("SET enable_external_access = true")


N = 100
NOISE = RANDOM.standard_normal(N)
TARGET = [("a", "b")[i % 2] for i in range(N)]


def only(warnings, words):
    """The one warning there is says `words`."""
    assert len(warnings) == 1, warnings
    assert words in warnings[0]


def test_nothing_to_warn_of(look):
    table = pa.table({"x": NOISE, "i": RANDOM.integers(0, 1000, N), "c": TARGET})
    assert look(table)[1] == []
    assert look(table, "c")[1] == []


def test_duplicates(look):
    found, warnings = look(pa.table({"x": [*NOISE, NOISE[0], NOISE[0]], "c": [*TARGET, "a", "a"]}))
    assert found[""]["duplicate_rows"] == 2
    only(warnings, "2 rows repeat earlier ones")
    names = [f"A{i}" for i in range(N)]
    warnings = look(pa.table({"k": [*names, "A0"], "x": [*NOISE, NOISE[0]]}))[1]
    assert [warning.split(";")[0] for warning in warnings] == [
        "1 row repeats an earlier one", "column 'k' looks like an id, as each row has its own value",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.5] * N, "column 'k' has the same value in every row"),
        ([None] * (N - 1) + [1.5], "column 'k' is mostly missing (99.0% of rows)"),
        (list(range(N)), "column 'k' looks like an id"),
        ([f"A{i}" for i in range(N)], "column 'k' looks like an id"),
    ],
)
def test_columns_that_do_not_help(look, values, words):
    warnings = look(pa.table({"k": values, "x": NOISE}))[1]
    assert any(words in warning for warning in warnings), warnings


def test_columns_without_values(look):
    only(look(pa.table({"k": pa.array([None] * N, pa.string()), "x": NOISE}))[1], "column 'k' has no values")


def test_integers_named_like_an_id(look):
    values = RANDOM.permutation(10_000)[:N]
    only(look(pa.table({"customer_id": values, "x": NOISE}))[1], "column 'customer_id' looks like an id")
    assert look(pa.table({"humidity": values, "x": NOISE}))[1] == []


def test_class_imbalance(look):
    rare = ["b" if i < 3 else "a" for i in range(N)]
    only(look(pa.table({"x": NOISE, "y": rare}))[1], "the classes of 'y' are imbalanced: 'a' has 97 rows and 'b' 3")
    only(look(pa.table({"y": rare, "x": NOISE}), "y")[1], "the classes of 'y' are imbalanced")
    assert look(pa.table({"y": rare, "x": NOISE}))[1] == []


def days(steps):
    start, out = datetime(2024, 1, 1), []
    for step in [0, *steps]:
        start += timedelta(days=step)
        out.append(start)
    return pa.table({"t": pa.array(out, pa.timestamp("us"))})


def test_time_steps(look):
    assert look(days([1] * 9))[1] == []
    assert look(days([31, 29, 31, 30, 31]))[0]["t"]["steps"]["usual"] == "1 month"
    assert look(days([31, 29, 31, 30, 31]))[1] == []
    only(look(days([1, 1, 1, 2, 1]))[1], "the steps of time column 't' are irregular: 4 of 5 are 1 day")
    twice = pa.concat_tables([days([1] * 9)] * 2).append_column("x", pa.array(NOISE[:20]))
    assert look(twice)[1] == []


@pytest.mark.parametrize(
    ("column", "target", "words"),
    [
        ([{"a": "A", "b": "B"}[y] for y in TARGET], TARGET, "each of its values goes with one class in 100.0%"),
        ([i % 2 for i in range(N)], TARGET, "each of its values goes with one class"),
        ([i + 1000 * (i % 2) for i in range(N)], TARGET, "a range of its values to itself"),
        ((NOISE * 2 + 1).tolist(), NOISE.tolist(), "its correlation with the target is 1.0000"),
        ([f"g{i % 5}" for i in range(N)], [float(i % 5 * 1.5) for i in range(N)], "its values explain 100.00%"),
    ],
)
def test_leakage(look, column, target, words):
    table = pa.table(
        {"leak": column, "fine": RANDOM.permutation(NOISE), "group": RANDOM.choice(["u", "v"], N), "y": target}
    )
    found = [warning for warning in look(table, "y")[1] if "leak the target 'y'" in warning]
    only(found, words)
    assert found[0].startswith("column 'leak'")


def test_unknown_target(look):
    with pytest.raises(InvalidInput, match="there is no target 'z'; the columns are x") as caught:
        look(pa.table({"x": NOISE}), "z")
    assert caught.value.param == "target"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["1,5", "2,25", "3", "n/k"], "column 'k' looks like numbers with decimal commas, such as '1,5'"),
        (["1,000", "12,500", "1,250,000"], "looks like numbers with commas between thousands"),
        (["1", "foo", "3"], "column 'k' was taken as a category, though 2 of 3 values are numbers: 'foo' is none"),
        (["1", "b", "c"], None),
        (["01", "02", "12"], None),
        (["a,b", "c,d"], None),
    ],
)
def test_texts_that_should_be_numbers(look, values, words):
    warnings = look(pa.table({"k": values, "x": NOISE[: len(values)]}))[1]
    assert warnings == [] if words is None else words in warnings[0]


def test_dates_of_a_table_are_no_series(look):
    table = days(RANDOM.integers(1, 30, 50).tolist())
    found, warnings = look(table.append_column("x", pa.array(NOISE[:51])))
    assert found["t"]["steps"]["regular"] is False
    assert warnings == []
