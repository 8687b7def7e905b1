"""Named raw features to tensors and answers to JSON; held together with the training side's reader of rows."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.tensors import INT64_MISSING, Tensor, pack, to_numpy, unpack
from modelworks.core.types import Answer, Signature, TensorSpec
from modelworks.ml.data.types import rows_to_batch
from modelworks.serve.features import MAX_TEXT, decode_outputs, encode_features, encode_rows
from modelworks.serve.routes import Route


def spec(name, datatype, column, nullable=False, shape=(-1, 1)):
    return TensorSpec(name=name, datatype=datatype, shape=list(shape), column=column, nullable=nullable)


COLUMNS = [
    spec("length", "FP32", "number"),
    spec("width", "FP32", "number", True),
    spec("count", "INT64", "integer"),
    spec("gaps", "FP32", "integer", True),
    spec("open", "BOOL", "boolean", True),
    spec("colour", "BYTES", "category"),
    spec("note", "BYTES", "text", True),
    spec("day", "BYTES", "time", True),
]
ROW = {
    "length": 5.1, "width": None, "count": 3, "gaps": 4, "open": True, "colour": "red", "note": None,
    "day": "2024-01-31",
}  # fmt: skip
NET = [TensorSpec(name="image", datatype="FP32", shape=[-1, 2, 2])]


def route(task="tabular-classification", classes=None, inputs=COLUMNS):
    return Route("p", "d", "m:1", Signature(inputs=list(inputs), outputs=[]), task, classes)


def encode(rows, inputs=COLUMNS):
    return encode_rows(route(inputs=inputs), rows)


def refused(rows, inputs=COLUMNS):
    with pytest.raises(InvalidInput) as info:
        encode(rows, inputs)
    return info.value


@pytest.mark.parametrize("count", [1, 3])
def test_every_column_type_in_wire_form(count):
    found = {tensor.name: tensor for tensor in encode([ROW] * count)}
    assert {tensor.name: tensor.datatype for tensor in found.values()} == {c.name: c.datatype for c in COLUMNS}
    assert all(tensor.shape == [count, 1] for tensor in found.values())
    assert unpack(found["length"]) == pytest.approx([5.1] * count)
    assert all(map(math.isnan, unpack(found["width"])))
    assert unpack(found["count"]) == [3] * count
    assert unpack(found["gaps"]) == [4.0] * count
    assert found["open"].data == b"\x01" * count
    assert unpack(found["colour"]) == [b"red"] * count
    assert unpack(found["note"]) == [b""] * count
    assert unpack(found["day"]) == [b"2024-01-31T00:00:00"] * count


@pytest.mark.parametrize(
    ("name", "value", "expected", "got"),
    [
        ("length", "5.1", "a number", "the text '5.1'"),
        ("length", True, "a number", "true"),
        ("length", math.nan, "a finite number", "the number nan"),
        ("length", math.inf, "a finite number", "the number inf"),
        ("length", 1e39, "a number within the range of FP32", "the number 1e+39"),
        ("length", 10**400, "a number within the range of FP32", "an integer of 1329 bits"),
        ("length", [1], "a number", "a list"),
        ("count", 1.5, "an integer", "the number 1.5"),
        ("count", False, "an integer", "false"),
        ("count", 2**63, "an integer within the range of INT64", "the number 9223372036854775808"),
        ("count", INT64_MISSING, "an integer within the range of INT64", "the number -9223372036854775808"),
        ("gaps", 0.5, "an integer", "the number 0.5"),
        ("open", 1, "true or false", "the number 1"),
        ("open", "yes", "true or false", "the text 'yes'"),
        ("colour", 7, "a text", "the number 7"),
        ("colour", {}, "a text", "an object"),
        ("colour", "\ud800", "a text without lone surrogates", "the text '\\ud800'"),
        ("colour", "x" * (MAX_TEXT + 1), f"a text of at most {MAX_TEXT} bytes", "the text '" + "x" * 80 + "'..."),
        ("colour", "ü" * MAX_TEXT, f"a text of at most {MAX_TEXT} bytes", "the text '" + "ü" * 80 + "'..."),
        ("day", "yesterday", "an ISO 8601 time as a text", "the text 'yesterday'"),
        ("day", 20240131, "an ISO 8601 time as a text", "the number 20240131"),
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_mistyped_feature_is_named_with_its_row_and_what_came(name, value, expected, got, place):
    rows = [ROW] * place + [{**ROW, name: value}]
    error = refused(rows)
    assert (error.status, error.code, error.param) == (400, "bad_value", name)
    assert error.detail == {"row": place, "feature": name, "expected": expected, "got": got}
    assert f"inputs[{place}]" in error.message
    assert repr(name) in error.message
    assert expected in error.message
    assert got in error.message


def test_a_float_that_is_whole_is_an_integer():
    assert unpack(encode([{**ROW, "count": 3.0}])[2]) == [3]


@pytest.mark.parametrize("name", ["length", "count", "colour"])
def test_null_only_where_missing_values_are_accepted(name):
    error = refused([ROW, {**ROW, name: None}])
    assert (error.code, error.param, error.detail["row"]) == ("missing_value", name, 1)
    assert refused([{**ROW, "colour": ""}]).code == "missing_value"


def test_unknown_and_missing_features():
    error = refused([ROW, {**ROW, "lenght": 5.1}])
    assert (error.code, error.param, error.detail["row"]) == ("unknown_feature", "lenght", 1)
    assert "did you mean 'length'?" in error.message
    error = refused([{name: value for name, value in ROW.items() if name != "width"}])
    assert (error.code, error.param) == ("missing_feature", "width")
    misspelt = {name: value for name, value in ROW.items() if name != "length"} | {"lenght": 5.1}
    error = refused([misspelt])
    assert (error.code, error.param) == ("missing_feature", "length")
    assert "'lenght' is not known: did you mean 'length'?" in error.message
    assert len(refused([{**ROW, "x" * 100_000: 1}]).message) < 500


@pytest.mark.parametrize("rows", [None, {}, [], "abc", 5])
def test_inputs_must_be_a_list_of_rows(rows):
    assert refused(rows).param == "inputs"


def test_rows_must_be_objects_and_not_too_many():
    assert refused([ROW, [1, 2]]).param == "inputs[1]"
    assert refused([{"x": 1.0}] * 65_537, [spec("x", "FP32", "number")]).code == "too_many_rows"


def test_nets_take_nested_lists():
    (tensor,) = encode([{"image": [[1, 2], [3, 4.5]]}] * 2, NET)
    assert tensor.shape == [2, 2, 2]
    assert to_numpy(tensor)[1].tolist() == [[1, 2], [3, 4.5]]
    for bad in ([[1, 2], [3]], [1, 2, 3, 4], 5, [[1, 2], [3, [4]]]):
        error = refused([{"image": bad}], NET)
        assert "nested lists of shape [2, 2]" in error.detail["expected"]
    error = refused([{"image": [[1, 2], [3, 4]]}, {"image": [[1, 2], [3, "x"]]}], NET)
    assert (error.param, error.detail["row"]) == ("image", 1)
    free = [TensorSpec(name="s", datatype="INT32", shape=[-1, -1])]
    assert encode([{"s": [1, 2, 3]}] * 2, free)[0].shape == [2, 3]
    assert refused([{"s": [1, 2, 3]}, {"s": [1]}], free).detail["row"] == 1
    fixed = [TensorSpec(name="x", datatype="FP32", shape=[1, 1])]
    assert encode([{"x": 1}], fixed)[0].shape == [1, 1]
    assert refused([{"x": 1}] * 2, fixed).code == "bad_shape"


@pytest.mark.parametrize("side", [encode_features, lambda inputs, task, rows: rows_to_batch(rows, inputs, task)])
def test_only_a_forecasts_history_is_cut_to_its_end(side):
    inputs = [TensorSpec(name="x", datatype="FP32", shape=[-1, 2], nullable=True)]
    for row in ({"x": [1.0, 2.0, 3.0]}, {"x": None}, {}):
        assert side(inputs, "forecast", [row])
        with pytest.raises(InvalidInput):
            side(inputs, "tabular-regression", [row])
    assert side(inputs, "tabular-regression", [{"x": [1.0, None]}])


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-5, 5), st.floats(), st.text(max_size=4),
    st.sampled_from(["2024-01-31", "2024-01-31T10:00:00+02:00", "2024-01-31T10:00:00.5Z", "20240131", "red", 3.0]),
    st.lists(st.integers(), max_size=2),
)  # fmt: skip


@given(st.lists(st.fixed_dictionaries({column.name: VALUES for column in COLUMNS}), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_it_agrees_with_the_training_side(rows):
    """The same rows give the same arrays, or both refuse for the same reason. NaN is refused here, as it is no JSON."""
    for column in COLUMNS:
        inputs, mine = [column], [{column.name: row[column.name]} for row in rows]
        if any(isinstance(row[column.name], float) and math.isnan(row[column.name]) for row in mine):
            assert refused(mine, inputs).status == 400
            continue
        theirs = _theirs(mine, inputs)
        if isinstance(theirs, InvalidInput):
            found = refused(mine, inputs)
            assert (found.code, found.param, found.detail) == (theirs.code, theirs.param, theirs.detail)
            continue
        (tensor,) = encode_features(inputs, "tabular-regression", mine)
        if column.datatype == "BYTES":
            assert [raw.decode() for raw in unpack(tensor)] == theirs.tolist()
        else:
            assert tensor.data == theirs.tobytes() or (tensor.datatype == "FP32" and _same_floats(tensor, theirs))


def _theirs(rows, inputs):
    try:
        return rows_to_batch(rows, inputs)[inputs[0].name]
    except InvalidInput as error:
        return error


def _same_floats(tensor, theirs):
    return str(to_numpy(tensor)[:, 0].tolist()) == str(theirs.tolist())


def test_labels_and_probabilities():
    answer = Answer(
        [pack("label", "BYTES", [2], ["b", "a"]), pack("probabilities", "FP64", [2, 2], [0.25, 0.75, 1.0, math.nan])],
        "m:1",
    )
    rows = decode_outputs(route(classes=["a", "b"]), answer)
    assert rows == [
        {"label": "b", "probabilities": {"a": 0.25, "b": 0.75}},
        {"label": "a", "probabilities": {"a": 1.0, "b": None}},
    ]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("classes", "label", "value", "names"),
    [
        ([0, 1], "1", 1, ["0", "1"]),
        ([False, True], "True", True, ["false", "true"]),
        ([False, True], "true", True, ["false", "true"]),
        ([0.5, 1.5], "1.5", 1.5, ["0.5", "1.5"]),
    ],
)
def test_classes_keep_their_json_type(classes, label, value, names):
    answer = Answer([pack("label", "BYTES", [1], [label]), pack("probabilities", "FP32", [1, 2], [0, 1])], "m:1")
    ((row),) = decode_outputs(route(classes=classes), answer)
    assert row["label"] == value
    assert type(row["label"]) is type(value)
    assert list(row["probabilities"]) == names


def test_values_and_other_outputs():
    assert decode_outputs(route(), Answer([pack("value", "FP32", [2], [1.5, math.inf])], "m")) == [
        {"value": 1.5},
        {"value": None},
    ]
    assert decode_outputs(route(), Answer([pack("value", "FP32", [2, 1], [1.5, 2])], "m"))[1] == {"value": 2.0}
    answer = Answer([pack("v", "INT32", [2, 1, 2], [1, 2, 3, 4]), pack("t", "BYTES", [2], ["x", "y"])], "m")
    assert decode_outputs(route("embedding"), answer) == [{"v": [[1, 2]], "t": "x"}, {"v": [[3, 4]], "t": "y"}]


def test_an_output_without_rows_is_the_models_fault():
    answer = Answer([pack("a", "FP32", [2], [1, 2]), Tensor("b", "FP32", [1], b"\0" * 4)], "m")
    with pytest.raises(ModelworksError, match="different numbers of rows"):
        decode_outputs(route(), answer)
