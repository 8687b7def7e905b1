"""Broken and hostile files: refused by content, each with an error that names row and column."""

import contextlib
import json
import pickle
import random
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput, PayloadTooLarge, UnsupportedMedia
from modelworks.core.specs import TableSchema
from modelworks.ml.data.ingest import ingest


@pytest.fixture
def load(tmp_path):
    def run(content, name="data.csv", **schema):
        path = tmp_path / "upload"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        out = tmp_path / "out.parquet"
        out.unlink(missing_ok=True)
        try:
            result = ingest(path, filename=name, schema=TableSchema(**schema), out=out)
        except Exception:
            assert not out.exists()
            raise
        finally:
            assert {item.name for item in tmp_path.iterdir()} <= {"upload", "out.parquet"}, "something was left behind"
        return result, pq.read_table(out).to_pydict()

    return run


TABLE = {"a": [1, 2], "b": ["x", "y"]}


@pytest.mark.parametrize(
    ("content", "name", "schema"),
    [
        ("a,b\n1,x\n2,y\n", "data.csv", {}),
        ("a,b\r\n1,x\r\n2,y", "data.csv", {}),
        ("a,b\r1,x\r2,y\r", "data.csv", {}),
        ("\n\na,b\n\n1,x\n\n2,y\n\n", "data.csv", {}),
        ('a,b\n1,"x"\n"2",y\n', "data.csv", {}),
        (" a , b \n 1 , x \n2,y\n", "data.csv", {}),
        ("a;b\n1;x\n2;y\n", "data.csv", {}),
        ("a|b\n1|x\n2|y\n", "whatever", {}),
        ("a\tb\n1\tx\n2\ty\n", "data.csv", {}),
        ("a\tb\n1\tx\n2\ty\n", "data.tsv", {}),
        ("a!b\n1!x\n2!y\n", "data.csv", {"delimiter": "!"}),
        ("1,x\n2,y\n", "data.csv", {"header": ["a", "b"]}),
        (b"\xef\xbb\xbfa,b\n1,x\n2,y\n", "data.csv", {}),
        ("a,b\n1,x\n2,y\n".encode("utf-16"), "data.csv", {"encoding": "utf-16"}),
        ('{"a": 1, "b": "x"}\n\n{"b": "y", "a": 2}', "data.jsonl", {}),
        ('{"a": 1, "b": "x"}\n{"b": "y", "a": 2}', "data", {}),
    ],
)
def test_one_table_in_many_dresses(load, content, name, schema):
    plain, _ = load("a,b\n1,x\n2,y\n")
    result, values = load(content, name, **schema)
    assert values == TABLE
    assert result == plain


@pytest.mark.parametrize(
    ("content", "schema", "says"),
    [
        ("a,b\n1,2\n3\n", {}, "row 2 (line 3), column 'b': 1 field where there should be 2"),
        ("a,b\n1,2\n\n3,4,5\n", {}, "row 2 (line 4), column 3: 3 fields where there should be 2"),
        ('a,b\n"1\n0",2\n3,"4\n', {}, "row 2 (line 4), column 'b': the quote that opens this value is never closed"),
        ('a,b\n1,2\n3,"4"5\n', {}, "row 2 (line 3), column 'b': text follows the closing quote"),
        ('"a,b\n1,2\n', {}, "the header row (line 1), column 1: the quote that opens"),
        (b"a,b\n1,x\n2,caf\xe9\n", {}, "row 2 (line 3), column 'b': bytes that are not UTF-8"),
        (b"a,caf\xe9\n1,2\n", {}, "the header row (line 1), column 2: bytes that are not UTF-8"),
        (b"a,b\n1,\xe9\x01\x81\n", {"encoding": "gbk"}, "row 1 (line 2), column 'b': bytes that are not GBK"),
        (b"a,b\n1,x\n2,y\x00z\n", {}, "row 2 (line 3), column 'b': a NUL byte"),
        (b"a,b\n1,x\n\xef\xbb\xbf2,y\n", {}, "row 2 (line 3), column 'a': a byte order mark inside the file"),
        (
            "a,b\n1,2\n".encode("utf-16"),
            {},
            "row 1 (line 1), column 1: the file starts with a byte order mark of UTF-16",
        ),
        (
            "a,b\n1,2\n".encode("utf-32"),
            {},
            "row 1 (line 1), column 1: the file starts with a byte order mark of UTF-32",
        ),
        ("a,,c\n1,2,3\n", {}, "the header row (line 1), column 2: the column has no name"),
        ("a,b,a\n1,2,3\n", {}, "the header row (line 1), column 3: the name 'a' was already given to column 1"),
        ("5.1,3.5,x\n4.9,3.0,x\n5.0,1.0,y\n", {}, "the header row (line 1), column 1: '5.1' is of the same kind"),
        ("x,y\nx,z\ny,y\n", {}, "the header row (line 1), column 1: 'x' is of the same kind"),
        ("2024-01-01,up\n2024-01-02,down\n", {}, "schema.header"),
        ("1,2\n3,4\n", {"header": ["a"]}, "schema.header gives 1 name, but row 1 (line 1) has 2 fields"),
        ("a,b\n1,2\n3,inf\n", {}, "row 2 (line 3), column 'b': 'inf' is infinite"),
        ("a,b\n1,2\n3,1e999\n", {}, "row 2 (line 3), column 'b': '1e999' is not a number"),
        ("a\n" + "1\n" * 19 + "abc\n", {}, "row 20 (line 21), column 'a': 'abc' is not a number, while most values"),
        ("a\n" + "true\n" * 19 + "maybe\n", {}, "row 20 (line 21), column 'a': 'maybe' is not true or false"),
        ("a\n" + "2024-01-01\n" * 19 + "soon\n", {}, "row 20 (line 21), column 'a': 'soon' is not an ISO 8601 time"),
        ("a\n2024-01-01\n2024-01-02T00:00:00Z\n2024-01-03\n", {}, "row 2 (line 3), column 'a': '2024-01-02T00:00:00Z'"),
        ("a\n2024-02-30\n2024-01-02\n", {}, "row 1 (line 2), column 'a': '2024-02-30' is not an ISO 8601 time"),
        ("a\n1\n2.5\n", {"columns": {"a": "integer"}}, "row 2 (line 3), column 'a': '2.5' is not an integer"),
        (
            "a,b\n1,2\n",
            {"columns": {"c": "text"}},
            "schema.columns names 'c', which the file lacks; its columns are a, b",
        ),
        ("a,b\n1,2\n", {"encoding": "zip"}, "schema.encoding 'zip' is not an encoding"),
        ("a,b\n1,2\n", {"encoding": "punycode"}, "schema.encoding 'punycode' is not an encoding"),
        ("a,b\n1,2\n", {"encoding": "no\x00such"}, "is not an encoding"),
        ("a,b\n1,2\n", {"delimiter": '"'}, "schema.delimiter cannot be"),
        ("", {}, "the file is empty"),
        ("\n\n", {}, "the file is empty"),
        ("a,b\n", {}, "no rows"),
        ("a,b\n1," + "x" * (1 << 20) + "x\n", {}, "row 1 (line 2), column 'b': a value of more than 1048576"),
        ('a,b\n1,"' + "x\n" * (1 << 20), {}, "row 1 (line 2), column 'b': a value of more than 1048576"),
        (",".join(f"c{i}" for i in range(10_001)) + "\n", {}, "10001 columns, more than 10000"),
    ],
)
def test_broken_text(load, content, schema, says):
    with pytest.raises(InvalidInput) as caught:
        load(content, **schema)
    assert says in caught.value.message


def test_error_far_into_the_file_is_located(load):
    rows = [f'{i},"text, {i}"' for i in range(60_000)]
    rows[51_234] = "51234,one,two"
    with pytest.raises(InvalidInput, match=r"row 51235 \(line 51236\), column 3"):
        load("a,b\n" + "\n".join(rows))
    rows[51_234] = "NaN?,x"
    with pytest.raises(InvalidInput, match=r"row 51235 \(line 51236\), column 'a': 'NaN\?'"):
        load("a,b\n" + "\n".join(rows))


def test_row_of_many_bytes_is_bounded(load):
    wide = ",".join(f"c{i}" for i in range(5))
    with pytest.raises(InvalidInput, match=r"row 1 \(line 2\), column 'c2': the row has more than"):
        load(wide + "\n" + ",".join(["x" * 900_000] * 5) + "\n")


def test_header_of_years_is_a_header(load):
    _, values = load("country,2019,2020\nat,1,2\nde,3,4\n")
    assert list(values) == ["country", "2019", "2020"]
    _, values = load("2019,2020\n1,2\n3,4\n")
    assert list(values) == ["2019", "2020"]
    _, values = load("0,1,2\n0.5,0.1,2\n0.7,0.2,3\n")
    assert list(values) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "content",
    ["1,2,3\n4,5,6\n", "0,1\n1,0\n0,1\n", "-1,2\n3,4\n", "1e3,2\n3,4\n", "1990,2001\n1985,2003\n", "7\n8\n",
     "a,1,2\nb,3,4\na,5,6\n", "product,1,2,3\nnut,4,5,6\n"],
)  # fmt: skip
def test_a_first_row_of_numbers_is_no_header_unless_it_is_said(load, content):
    with pytest.raises(InvalidInput, match=r"no header row; give the names .* as schema\.header, or false") as caught:
        load(content)
    assert caught.value.code == "no_header"
    rows = content.strip().split("\n")
    result, values = load(content, header=False)
    assert list(values) == [f"column_{number}" for number in range(1, rows[0].count(",") + 2)]
    assert result.rows == len(rows)
    result, values = load(content, header=True)
    assert list(values) == rows[0].split(",")
    assert result.rows == len(rows) - 1


def test_hostile_names_stay_names(load):
    names = ['we"ird', "'; DROP TABLE data; --", "$(id)", "../../etc/passwd", "a.b", "日本", "{x}", "%s", "a"]
    header = ",".join('"' + name.replace('"', '""') + '"' for name in names)
    result, values = load(f"{header}\n1,2,3,4,5,6,7,8,9\n")
    assert list(values) == names
    assert [column.name for column in result.columns] == names


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1}\n{"a": 2}\n{"a": [1]}\n', "row 3 (line 3), column 'a': a list where most values of the column"),
        ('{"a": 1}\n\n{"a": {"b": 1}}\n', "row 2 (line 3), column 'a': an object inside the row"),
        ('{"a": 1}\n{"a": "x"}\n{"a": 2}\n', "row 2 (line 2), column 'a': a text where most values of the column"),
        ('{"a": true}\n{"a": true}\n{"a": 2}\n', "row 3 (line 3), column 'a': a number where most"),
        ('{"a": 1}\n{"a": \n', "row 2 (line 2), column 1: not a line of JSON"),
        ('{"a": 1}\n[1]\n', "row 2 (line 2), column 1: '[1]' is not an object"),
        ('{"a": 1}\n{"a": NaN}\n', "row 2 (line 2), column 1: not a line of JSON"),
        ('{"a": 1}\n{"a": 1e999}\n', "row 2 (line 2), column"),
        ('{"a": ' + "[" * 100_000 + "\n", "row 1 (line 1), column 1: not a line of JSON"),
        ("{}\n{}\n", "no columns"),
        ('{"": 1}\n', "column 1: the column has no name"),
        ("{\"a\": 1}\n" + '{"a": "' + "x" * (2 << 20) + '"}', "row 2 (line 2), column 1: the line has more than"),
        (b'{"a": "x", "b": 1}\n{"a": "\xff", "b": 1}\n', "row 2 (line 2), column 'a': bytes that are not UTF-8"),
        ("{" + ",".join(f'"c{i}": 1' for i in range(10_001)) + "}", "more than 10000 columns"),
    ],
)  # fmt: skip
def test_broken_json_lines(load, content, says):
    with pytest.raises(InvalidInput) as caught:
        load(content, "data.jsonl")
    assert says in caught.value.message


def test_mixed_json_declared_as_category(load):
    _, values = load('{"a": 1}\n{"a": "x"}\n{"a": true}\n{}\n', "data.jsonl", columns={"a": "category"})
    assert values == {"a": ["1", "x", "true", None]}


def test_json_array_is_told_apart(load):
    with pytest.raises(UnsupportedMedia, match="one object a line"):
        load(json.dumps([{"a": 1}]), "data.json")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], Path("x"), datetime(2024, 1, 1)])
def test_pickles_are_refused_by_content(load, protocol, value):
    for name in ("data.csv", "data.jsonl", "data.parquet", "data"):
        with pytest.raises(UnsupportedMedia):
            load(pickle.dumps(value, protocol), name)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cos\nsystem\n(S'touch canary'\ntR.", "data.csv"),
        (b"a,b\n1,2\n", "model.pkl"),
        (b"\x1f\x8b\x08" + bytes(100), "data.csv"),
        (b"\x93NUMPY\x01\x00", "data.csv"),
        (b"\x7fELF" + bytes(200), "data.csv"),
        (random.Random(0).randbytes(4096), "data.csv"),
        (b"a,b\n1,2\n", "data.parquet"),
        (b"a,b\n1,2\n", "data.feather"),
    ],
)
def test_other_bytes_are_refused(load, content, name):
    with pytest.raises(UnsupportedMedia):
        load(content, name)


def arrow_bytes(table, kind):
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind == "feather":
        pa.feather.write_feather(table, sink, compression="zstd")
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


KINDS = ["parquet", "feather", "arrow", "arrows"]


@pytest.mark.parametrize("kind", KINDS)
def test_typed_sources(load, kind):
    table = pa.table(
        {
            "i8": pa.array([1, None], pa.int8()),
            "u64": pa.array([1, 2**64 - 1], pa.uint64()),
            "half": pa.array([np.float16(0.5), np.float16(np.nan)], pa.float16()),
            "money": pa.array(["1.10", "2.20"]).cast(pa.decimal128(10, 2)),
            "flag": [True, False],
            "day": pa.array([datetime(2024, 1, 1), None], pa.timestamp("ns")).cast(pa.date32()),
            "at": pa.array([datetime(2024, 1, 1), None], pa.timestamp("ns", "Europe/Vienna")),
            "cat": pa.array(["x", "y"]).dictionary_encode(),
            "large": pa.array(["", "NA"], pa.large_string()),
            "iso": ["2024-01-01T00:00:00Z", "2024-01-02T00:00:00+01:00"],
            "digits": ["1", "2"],
            "nothing": pa.nulls(2),
            "a.b": [1, 2],
            "a": [3, 4],
        }
    )
    result, values = load(arrow_bytes(table, kind), f"data.{kind}")
    assert {column.name: column.type for column in result.columns} == {
        "i8": "integer",
        "u64": "number",
        "half": "number",
        "money": "number",
        "flag": "boolean",
        "day": "time",
        "at": "time",
        "cat": "category",
        "large": "category",
        "iso": "time",
        "digits": "category",
        "nothing": "category",
        "a.b": "integer",
        "a": "integer",
    }
    assert values["half"] == [0.5, None]
    assert values["money"] == [1.1, 2.2]
    assert values["large"] == [None, "NA"]  # the text NA is a value where missing values have a form of their own
    assert values["a.b"] == [1, 2]
    assert {column.name for column in result.columns if column.nullable} == {
        "i8",
        "half",
        "day",
        "at",
        "large",
        "nothing",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [[[[1]]], [{"x": 1}], [b"raw"]])
def test_nested_and_binary_columns_are_named(load, kind, values):
    with pytest.raises(InvalidInput, match=r"column 'bad' (has the type|holds bytes that)"):
        load(arrow_bytes(pa.table({"fine": [1], "bad": values}), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_typed_sources_name_row_and_column(load, kind):
    with pytest.raises(InvalidInput, match="row 2, column 'x': 'inf' is infinite"):
        load(arrow_bytes(pa.table({"x": [1.0, float("inf")]}), kind))
    with pytest.raises(InvalidInput, match="row 2, column 'x': 'abc' is not a number"):
        load(arrow_bytes(pa.table({"x": ["1", "abc"]}), kind), columns={"x": "number"})
    with pytest.raises(InvalidInput, match="row 2, column 'x': a value of more than"):
        load(arrow_bytes(pa.table({"x": ["1", "y" * (1 << 20) + "y"]}), kind))
    with pytest.raises(InvalidInput, match="column 2: the name 'x' was already given"):
        load(arrow_bytes(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"]), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_a_clean_error(load, kind):
    whole = bytearray(arrow_bytes(pa.table({"x": list(range(1000)), "y": ["abc"] * 1000}), kind))
    generator = random.Random(kind)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 20)):
            damaged[generator.randrange(8, len(damaged))] = generator.randrange(256)
        for content in (damaged, damaged[: generator.randrange(8, len(damaged))]):
            # any other exception, or a crash, fails the test
            with contextlib.suppress(InvalidInput, UnsupportedMedia):
                load(bytes(content), f"data.{kind}")


def test_a_text_repeated_a_million_times_is_read_in_portions(load):
    text = "x" * 100_000
    table = pa.table({"t": pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([text]))})
    result, values = load(arrow_bytes(table, "parquet"), "data.parquet")
    assert result.rows == 2000
    assert values["t"][1999] == text


def test_a_compressed_table_is_read_within_bounds(load, monkeypatch):
    import gzip
    import lzma

    from modelworks.ml.data import archives

    table = "a,b\n" + "1,x\n2,y\n" * 50
    for packed, name in ((gzip.compress(table.encode()), "t.csv.gz"), (lzma.compress(table.encode()), "T.CSV.XZ")):
        assert load(packed, name)[1]["b"][:2] == ["x", "y"]
    assert load(table, "plain.csv.gz")[0].rows == 100
    with pytest.raises(InvalidInput, match="damaged"):
        load(gzip.compress(table.encode())[:-20], "t.csv.gz")
    monkeypatch.setattr(archives, "LEAST", 1000)
    with pytest.raises(PayloadTooLarge) as caught:
        load(gzip.compress(b"a\n" + b"1\n" * 500_000), "t.csv.gz")
    assert caught.value.code == "archive_bomb"
