"""Types, canonical content and its digest, and ingest of files larger than a batch."""

import json
import subprocess
import sys
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.ml.data import canonical, readers
from modelworks.ml.data.ingest import ingest


@pytest.fixture
def load(tmp_path):
    def run(content, name="data.csv", **schema):
        path, out = tmp_path / "upload", tmp_path / "out.parquet"
        if isinstance(content, pa.Table):
            pq.write_table(content, path, row_group_size=7)
        else:
            path.write_text(content)
        result = ingest(path, filename=name, schema=TableSchema(**schema), out=out)
        return result, pq.read_table(out)

    return run


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "2", "-3", "+4"], "integer"),
        (["1", "NA", "2"], "integer"),
        (["1", "2.0"], "number"),
        (["1e3", "-.5", "5.", "+1.5"], "number"),
        (["99999999999999999999", "1"], "number"),
        (["-9223372036854775808", "1"], "number"),  # the wire's mark for a missing integer
        (["9223372036854775807", "1"], "integer"),
        (["007", "42"], "category"),
        (["0x1F", "0x2A"], "category"),
        (["1_000", "2_000"], "category"),
        (["0", "1"], "integer"),
        (["true", "False", "TRUE"], "boolean"),
        (["yes", "No", "?"], "boolean"),
        (["Y", "N"], "category"),
        (["2024-01-31", "2024-02-01"], "time"),
        (["2024-01-31T10:00", "2024-02-01 10:00:00.5"], "time"),
        (["2024-01-31T10:00:00Z", "2024-02-01T10:00:00+02:00"], "time"),
        (["2024-01-31 10:00:00,5", "2024-01-31 10:00:00.123456789"], "time"),
        (["31/01/2024", "01/02/2024"], "category"),
        (["small", "large", "small"], "category"),
        (["A/5 21171", "113803", "PC 17599"], "category"),
        ([f"the quick brown fox {i}" for i in range(10)], "text"),
        (["the quick brown fox"] * 10, "category"),
        (["NA", "null", "?"], "category"),
    ],
)
def test_told_types(load, values, kind):
    result, table = load("x,other\n" + "".join(f'"{value}",1\n' for value in values))
    column = result.columns[0]
    assert column.type == kind
    missing = sum(value in ("NA", "null", "?") for value in values)
    assert column.nullable == (missing > 0)
    assert table["x"].null_count == missing


@pytest.mark.parametrize(
    ("values", "kind", "want"),
    [
        (["1", "2"], "category", ["1", "2"]),
        (["1", "2"], "number", [1.0, 2.0]),
        (["1.0", "2"], "integer", [1, 2]),
        (["007", "8"], "integer", [7, 8]),
        (["0", "1", ""], "boolean", [False, True, None]),
        (["Y", "f"], "boolean", [True, False]),
        (["20240131", "2024-02-01"], "time", [datetime(2024, 1, 31), datetime(2024, 2, 1)]),
        ([" a ", "b"], "text", [" a ", "b"]),
        ([" a ", "b"], "category", ["a", "b"]),
    ],
)
def test_declared_types(load, values, kind, want):
    result, table = load("x,y\n" + "".join(f"{value},0\n" for value in values), columns={"x": kind})
    assert result.columns[0].type == kind
    assert table["x"].to_pylist() == want


def test_missing_texts_can_be_chosen(load):
    content = "x,y\n-999,NA\n5,b\n,?\n"
    _, table = load(content, missing=["-999"])
    assert table.to_pydict() == {"x": [None, 5, None], "y": ["NA", "b", "?"]}
    _, table = load(content)
    assert table.to_pydict() == {"x": [-999, 5, None], "y": [None, "b", None]}


def test_times_are_utc_or_naive(load):
    _, table = load("a,b\n2024-01-01T00:00:00+02:00,2024-01-01\n")
    assert table.schema.types == [pa.timestamp("us", "UTC"), pa.timestamp("us")]
    assert table["a"].cast(pa.string()).to_pylist() == ["2023-12-31 22:00:00.000000Z"]


BASE = "n,i,b,c,t\n" + "".join(
    f"{v / 3!r},{v},{'true' if v % 2 else 'false'},{'' if v == 5 else f'k{v % 3}'},2024-01-{v % 28 + 1:02d}\n"
    for v in range(50)
)


def typed():
    return pa.table(
        {
            "n": [v / 3 for v in range(50)],
            "i": pa.array(range(50), pa.int32()),
            "b": [bool(v % 2) for v in range(50)],
            "c": pa.array([None if v == 5 else f"k{v % 3}" for v in range(50)]).dictionary_encode(),
            "t": pa.array([datetime(2024, 1, v % 28 + 1) for v in range(50)], pa.timestamp("ms")),
        }
    )


def test_the_digest_does_not_depend_on_the_format(load, tmp_path):
    of_csv, _ = load(BASE)
    bytes_of_csv = (tmp_path / "out.parquet").read_bytes()
    of_parquet, _ = load(typed(), "data.parquet")
    assert of_parquet == of_csv
    assert (tmp_path / "out.parquet").read_bytes() == bytes_of_csv
    lines = [{**row, "t": row["t"].isoformat()} for row in typed().to_pylist()]
    of_json, _ = load("\n".join(json.dumps(line) for line in lines), "data.jsonl")
    assert of_json == of_csv
    again, _ = load(
        (tmp_path / "out.parquet").read_bytes().decode("latin-1") and pq.read_table(tmp_path / "out.parquet")
    )
    assert again.digest == of_csv.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.set_column(0, "n", pa.array([v / 3 + (1e-15 if v == 30 else 0) for v in range(50)])),
        lambda table: table.set_column(1, "i", pa.array([v + (v == 49) for v in range(50)])),
        lambda table: table.set_column(2, "b", pa.array([bool(v % 2) or v == 0 for v in range(50)])),
        lambda table: table.set_column(3, "c", pa.array([f"k{v % 3}" for v in range(50)])),
        lambda table: table.set_column(3, "c", pa.array([None if v in (5, 6) else f"k{v % 3}" for v in range(50)])),
        lambda table: table.set_column(4, "t", table["t"].cast(pa.timestamp("ms", "UTC"))),
        lambda table: table.rename_columns(["n", "i", "b", "C", "t"]),
        lambda table: table.select(["i", "n", "b", "c", "t"]),
        lambda table: table.take(pa.array([1, 0, *range(2, 50)])),
        lambda table: table.slice(0, 49),
        lambda table: pa.concat_tables([table, table.slice(49)]),
        lambda table: table.set_column(1, "i", table["i"].cast(pa.float64())),
    ],
)
def test_any_change_gives_another_digest(load, change):
    base, _ = load(typed(), "data.parquet")
    changed, _ = load(change(typed()), "data.parquet")
    assert changed.digest != base.digest


def test_texts_do_not_run_into_each_other(load):
    digests = {load(pa.table({"a": a, "b": b}), "x.parquet")[0].digest for a, b in [
        (["ab", "c"], ["x", "y"]), (["a", "bc"], ["x", "y"]), (["ab", None], ["cx", "y"]), ([None, "ab"], ["cx", "y"]),
    ]}  # fmt: skip
    assert len(digests) == 4


def test_equal_numbers_are_equal(load):
    tables = [pa.table({"x": pa.array([zero, nan, 1.0], from_pandas=False)}) for zero, nan in
              [(0.0, float("nan")), (-0.0, None), (0.0, -float("nan"))]]  # fmt: skip
    assert len({load(table, "x.parquet")[0].digest for table in tables}) == 1


def test_digest_and_bytes_do_not_depend_on_batches(load, tmp_path, monkeypatch):
    """The same content in batches of other sizes, over several row groups."""
    monkeypatch.setattr(canonical, "GROUP_ROWS", (1, 64))
    monkeypatch.setattr(canonical, "GROUP_BYTES", 2000)
    generator = np.random.default_rng(0)
    words = ["w" * int(n) if n else None for n in generator.integers(0, 300, 1000)]
    table = pa.table({"x": generator.standard_normal(1000), "w": words, "b": generator.random(1000) < 0.5})
    seen = set()
    for size in (1000, 64, 7):
        monkeypatch.setattr(readers, "_BATCH_ROWS", max(64, size))
        monkeypatch.setattr(readers, "_BATCH_BYTES", size * 100)
        result, back = load(table, "x.parquet")
        assert back["w"].to_pylist() == words
        seen.add((result.digest, (tmp_path / "out.parquet").read_bytes()))
    assert len(seen) == 1
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 10


def test_progress_grows_and_cancels(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "1.5,abc\n" * 100_000)
    steps = []
    ingest(path, filename="x.csv", schema=TableSchema(), out=tmp_path / "o", progress=lambda f, s: steps.append((f, s)))
    assert [f for f, _ in steps] == sorted(f for f, _ in steps)
    assert steps[-1][0] == 1.0
    assert {s for _, s in steps} == {"reading", "telling types", "writing", "written"}
    (tmp_path / "o").unlink()

    def cancel(fraction, stage):
        if stage == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(path, filename="x.csv", schema=TableSchema(), out=tmp_path / "o", progress=cancel)
    assert [item.name for item in tmp_path.iterdir()] == ["x.csv"]


def test_wide_table(load):
    names = [f"c{i}" for i in range(1000)]
    result, table = load(",".join(names) + "\n" + (",".join(["1.5"] * 1000) + "\n") * 5)
    assert len(result.columns) == 1000
    assert table.num_rows == 5


def test_header_given_for_typed_source(load):
    with pytest.raises(InvalidInput, match=r"schema\.header"):
        load(pa.table({"a": [1]}), "x.parquet", header=["b"])


_MEASURE = """
import resource, sys, pathlib
import pyarrow.csv, pyarrow.parquet, pyarrow.compute, pyarrow.json
from modelworks.core.specs import TableSchema
from modelworks.ml.data.ingest import ingest
small, large = map(pathlib.Path, sys.argv[1:])
peak = []
for path in (small, large):
    ingest(path, filename=path.name, schema=TableSchema(), out=path.with_suffix(".out"))
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peak[1] - peak[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("quoted", [False, True])
def test_memory_does_not_grow_with_the_file(tmp_path, quoted):
    """A file of 120 MB takes hardly more memory than one of 40 MB."""
    values = np.random.default_rng(0).standard_normal((20_000, 5))
    block = "".join(",".join(f"{v:.6f}" for v in row) + (',"x, y"\n' if quoted else ",abc\n") for row in values)
    paths = []
    for name, size in (("small", 40e6), ("large", 120e6)):
        path = tmp_path / f"{name}.csv"
        with path.open("w") as file:
            file.write("a,b,c,d,e,f\n")
            for _ in range(round(size / len(block))):
                file.write(block)
        paths.append(str(path))
    done = subprocess.run([sys.executable, "-c", _MEASURE, *paths], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60
