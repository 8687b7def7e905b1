"""The preparation as a whole: its default, its errors, and that training's features are serving's, bit by bit."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.core.tensors import INT64_MISSING
from modelworks.core.types import Column
from modelworks.ml import graph as onnx_graph
from modelworks.ml.data.transforms.host import apply_host
from modelworks.ml.data.transforms.plan import CHUNK
from modelworks.ml.data.transforms.preparation import MAX_ONE_HOT_FOR_TREES, Preparation

NAN = float("nan")
TYPES = {"n": "number", "g": "integer", "i": "integer", "b": "boolean", "c": "category", "t": "text", "w": "time"}
EVERYTHING = [
    {"op": "drop-duplicates"},
    {"op": "date-parts", "cyclic": True},
    {"op": "fill-missing", "columns": "numeric", "strategy": "median"},
    {"op": "clip", "columns": ["n", "g"], "low_quantile": 0.01, "high_quantile": 0.99},
    {"op": "log", "columns": ["n"], "offset": 10},
    {"op": "standardise"},
    {"op": "min-max", "columns": ["i"]},
    {"op": "cast", "columns": ["b"], "to": "category"},
    {"op": "group-rare", "columns": ["c"], "min_count": 2},
    {"op": "ordinal", "columns": ["b"]},
    {"op": "one-hot"},
    {"op": "hashing", "n_features": 8},
]


def mixed(rows=40, seed=0):
    """Every type, with gaps in each; `g` holds integers whose data has gaps (so float32), `i` has a sentinel."""
    rng = np.random.default_rng(seed)
    gap = rng.random((7, rows)) < 0.15

    def texts(choices, missing):
        values = np.array(choices, dtype=object)[rng.integers(len(choices), size=rows)]
        values[missing] = ""
        return values

    batch = {
        "n": np.where(gap[0], NAN, rng.normal(size=rows)).astype(np.float32),
        "g": np.where(gap[1], NAN, rng.integers(0, 9, rows)).astype(np.float32),
        "i": np.where(gap[2], INT64_MISSING, rng.integers(-5, 5, rows)),
        "b": np.where(gap[3], 2, rng.integers(0, 2, rows)).astype(np.uint8),
        "c": texts(["red", "grün", "蓝", "rare"], gap[4]),
        "t": texts(["Good film", "坏电影", "très bon", "bad, bad film"], gap[5]),
        "w": texts(["2024-01-31T10:00:00Z", "2023-07-01", "2024-12-24T23:59:59+01:00"], gap[6]),
    }
    return batch, [Column(name=name, type=type_, nullable=name == "g") for name, type_ in TYPES.items()]


def specs(*steps):
    return [TransformSpec.model_validate(step if isinstance(step, dict) else {"op": step}) for step in steps]


def fit(data, steps=None, accepts_missing=False):
    return Preparation.fit(*data, steps if steps is None else specs(*steps), accepts_missing=accepts_missing)


PREPARATIONS = pytest.mark.parametrize(
    ("steps", "accepts_missing"),
    [(None, False), (None, True), (EVERYTHING, False)],
    ids=["default", "trees", "everything"],
)


def test_default_on_iris_is_a_standard_scaler():
    iris = load_iris()
    batch = {name: iris.data[:, i].astype(np.float32) for i, name in enumerate(iris.feature_names)}
    prep = Preparation.fit(batch, [Column(name=name, type="number") for name in batch], None, accepts_missing=False)
    np.testing.assert_allclose(prep.features(batch), StandardScaler().fit_transform(iris.data), atol=1e-5)
    assert prep.feature_names == iris.feature_names == prep.inputs
    assert prep.keep.all()
    assert prep.host == []
    assert set(prep.nullable.values()) == {True}


def test_default_gives_a_finite_matrix_and_accepts_missing_everywhere():
    data = mixed()
    prep = fit(data)
    features = prep.features(data[0])
    assert features.dtype == np.float32
    assert features.shape == (40, len(prep.feature_names))
    assert np.isfinite(features).all()
    assert set(prep.nullable.values()) == {True}
    scaled = [i for i, name in enumerate(prep.feature_names) if name in "ngi" or name.startswith("w:")]
    np.testing.assert_allclose(features[:, scaled].mean(axis=0), 0, atol=1e-5)
    assert {"b", "c=grün", "t:坏", "w:month"} <= set(prep.feature_names)


def test_trees_see_missing_values_and_many_categories_as_ordinals():
    data = mixed()
    many = np.array([f"k{index % (MAX_ONE_HOT_FOR_TREES + 1):02}" for index in range(60)], dtype=object)
    data = (
        {name: np.resize(column, 60) for name, column in data[0].items()} | {"m": many},
        [*data[1], Column(name="m", type="category")],
    )
    prep = fit(data, accepts_missing=True)
    columns = dict(zip(prep.feature_names, prep.features(data[0]).T, strict=True))
    for name in ("n", "g"):
        np.testing.assert_array_equal(columns[name], data[0][name])
    assert np.isnan(columns["i"]).tolist() == (data[0]["i"] == INT64_MISSING).tolist()
    assert np.isnan(columns["b"]).tolist() == (data[0]["b"] == 2).tolist()
    assert columns["m"][:3].tolist() == [0, 1, 2]
    assert "c=red" in columns


@PREPARATIONS
def test_one_row_alone_is_the_row_in_the_batch(steps, accepts_missing):
    data = mixed()
    prep = fit(data, steps, accepts_missing)
    together = prep.features(data[0])
    for row in range(len(together)):
        alone = prep.features({name: column[row : row + 1] for name, column in data[0].items()})
        np.testing.assert_array_equal(alone[0], together[row])


@PREPARATIONS
def test_host_states_as_json_and_the_graph_give_the_features(steps, accepts_missing):
    data = mixed()
    prep = fit(data, steps, accepts_missing)
    session = onnx_graph.session(onnx_graph.to_bytes(prep.graph()))
    other = mixed(seed=1)[0]
    batch = apply_host(json.loads(json.dumps(prep.host)), {name: other[name] for name in prep.inputs})
    np.testing.assert_array_equal(
        session.run(None, onnx_graph.feed(session.get_inputs(), batch))[0], prep.features(other)
    )


@PREPARATIONS
def test_the_same_fit_twice_gives_the_same_bytes(steps, accepts_missing):
    first, second = (fit(mixed(), steps, accepts_missing) for _ in range(2))
    assert onnx_graph.to_bytes(first.graph()) == onnx_graph.to_bytes(second.graph())
    assert json.dumps(first.host) == json.dumps(second.host)
    assert {entry.domain: entry.version for entry in first.graph().opset_import} == onnx_graph.OPSET


def test_chunks_and_no_rows():
    data = mixed()
    prep = fit(data)
    long = {name: np.resize(column, CHUNK + 7) for name, column in data[0].items()}
    features = prep.features(long)
    np.testing.assert_array_equal(
        features[CHUNK:], prep.features({name: column[CHUNK:] for name, column in long.items()})
    )
    assert prep.features({name: column[:0] for name, column in data[0].items()}).shape == (0, len(prep.feature_names))


def test_wide_tables_run_as_blocks():
    rng = np.random.default_rng(0)
    batch = {f"x{i}": rng.normal(size=50).astype(np.float32) for i in range(400)}
    prep = Preparation.fit(batch, [Column(name=name, type="number") for name in batch], None, accepts_missing=False)
    assert len(prep.graph().graph.node) < 10


def test_dropped_columns_are_not_asked_for():
    data = mixed()
    prep = fit(data, [{"op": "fill-missing"}, {"op": "drop", "columns": ["c", "b", "t", "w", "g"]}])
    assert prep.inputs == ["n", "i"]
    assert [value.name for value in prep.graph().graph.input] == ["n", "i"]
    assert prep.features({name: data[0][name] for name in prep.inputs}).shape == (40, 2)


def test_a_raw_name_still_means_what_the_column_became():
    data = mixed()
    prep = fit(data, ["fill-missing", "one-hot", {"op": "drop", "columns": ["c", "t", "w"]}])
    assert sorted(prep.feature_names) == ["b", "g", "i", "n"]


@pytest.mark.parametrize(
    ("steps", "param", "words"),
    [
        ([{"op": "standardise", "columns": ["n", "height", "weight"]}], "height", "'height', 'weight'"),
        ([{"op": "standardise", "columns": ["c"]}], "c", "type category"),
        ([{"op": "one-hot", "columns": ["n"]}], "n", "one-hot works on category"),
        ([{"op": "one-hot", "columns": "number"}], "n", "type number"),
        ([{"op": "fill-missing", "columns": ["c"], "strategy": "mean"}], "c", "most-frequent"),
        ([{"op": "fill-missing", "columns": ["b"], "strategy": "mean"}], "b", "most-frequent"),
        ([{"op": "fill-missing", "columns": ["n"], "value": "none"}], "n", "must be a number"),
        ([{"op": "cast", "columns": ["w"], "to": "number"}], "w", "type time"),
        (["fill-missing"], "c", "one-hot, ordinal"),
        (["fill-missing", "one-hot", "tf-idf"], "w", "date-parts"),
        (["one-hot", "tf-idf", "date-parts"], "n", "add fill-missing or drop-missing"),
        ([{"op": "drop", "columns": "all"}], "transforms", "no feature"),
    ],
)
def test_errors_name_the_column(steps, param, words):
    with pytest.raises(InvalidInput) as caught:
        fit(mixed(), steps)
    assert caught.value.param == param
    assert words in caught.value.message


def test_infinite_values_name_the_column_and_clipping_helps():
    data = {"x": np.array([1, np.inf], np.float32)}, [Column(name="x", type="number")]
    with pytest.raises(InvalidInput) as caught:
        fit(data)
    assert caught.value.param == "x"
    assert np.isfinite(fit(data, [{"op": "clip", "high": 9}, "standardise"]).features(data[0])).all()


def test_a_column_without_gaps_in_training_takes_none_at_serving():
    data = {"x": np.array([1, 2], np.float32)}, [Column(name="x", type="number")]
    assert fit(data, ["standardise"]).nullable == {"x": False}
    assert fit(data, ["standardise"], accepts_missing=True).nullable == {"x": True}
    assert fit(data, ["fill-missing"]).nullable == {"x": True}


HOSTILE = [
    "label",
    "features",
    "probabilities",
    "value",
    "label (column)",
    "model/x",
    "t1",
    "c2",
    "a/b 'c' \"d\"",
    "价格 €",
    "k",
    "k=v",
    "../..",
    "{}",
    "%s\n",
]


def test_hostile_names_survive_into_a_composed_model():
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType

    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=30).astype(np.float32) for name in HOSTILE if name != "k"}
    batch["k"] = np.array(["v", "w", "v\n'"] * 10, dtype=object)
    columns = [Column(name=name, type="category" if name == "k" else "number") for name in HOSTILE]
    prep = Preparation.fit(batch, columns, None, accepts_missing=False)
    assert len(set(prep.feature_names)) == len(prep.feature_names) == len(HOSTILE) + 2
    features = prep.features(batch)
    model = LogisticRegression().fit(features, np.arange(30) % 2)
    estimator = skl2onnx.to_onnx(
        model,
        initial_types=[("features", FloatTensorType([None, features.shape[1]]))],
        options={"zipmap": False},
        target_opset=onnx_graph.OPSET,
    )
    composed = onnx_graph.compose(prep.graph(), estimator)
    assert composed.graph.name == "modelworks"
    session = onnx_graph.session(onnx_graph.to_bytes(composed))
    assert {onnx_graph.column_of(value.name) for value in session.get_inputs()} == set(HOSTILE)
    assert [value.name for value in session.get_outputs()] == ["label", "probabilities"]
    got = session.run(["probabilities"], onnx_graph.feed(session.get_inputs(), batch))[0]
    np.testing.assert_allclose(got, model.predict_proba(features), atol=1e-6)


def test_input_names_are_told_back():
    for name in HOSTILE:
        assert onnx_graph.column_of(onnx_graph.input_name(name)) == name
    assert len({onnx_graph.input_name(name) for name in HOSTILE}) == len(HOSTILE)


def test_a_missing_column_is_named():
    data = mixed()
    with pytest.raises(InvalidInput) as caught:
        fit(data).features({name: column for name, column in data[0].items() if name != "c"})
    assert caught.value.param == "c"
