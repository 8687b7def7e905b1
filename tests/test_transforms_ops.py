"""Each op that runs in the graph, and the row ops, against scikit-learn or a figure worked out by hand."""

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.core.tensors import INT64_MISSING
from modelworks.core.types import Column
from modelworks.ml.data.transforms.preparation import Preparation

NAN = float("nan")
DTYPES = {"number": np.float32, "integer": np.int64, "boolean": np.uint8}


def table(**columns):
    """`name=(type, values)` -> batch, columns."""
    batch = {name: np.array(values, dtype=DTYPES.get(kind, object)) for name, (kind, values) in columns.items()}
    return batch, [Column(name=name, type=kind) for name, (kind, _) in columns.items()]


def spec(op, columns=None, **params):
    return TransformSpec.model_validate({"op": op, "columns": columns, **params})


def fit(data, *specs, accepts_missing=False, target=None):
    batch, columns = data
    return Preparation.fit(batch, columns, list(specs), accepts_missing=accepts_missing, target=target)


def features(data, *specs, **options):
    return fit(data, *specs, **options).features(data[0])


@pytest.fixture(scope="module")
def wine():
    raw = load_wine()
    batch = {name: raw.data[:, i].astype(np.float32) for i, name in enumerate(raw.feature_names)}
    return (batch, [Column(name=name, type="number") for name in raw.feature_names]), raw.data


def test_standardise_is_scikit_learns(wine):
    data, raw = wine
    np.testing.assert_allclose(features(data, spec("standardise")), StandardScaler().fit_transform(raw), atol=2e-5)


def test_min_max_is_scikit_learns(wine):
    data, raw = wine
    wanted = MinMaxScaler((-1, 1)).fit_transform(raw)
    np.testing.assert_allclose(features(data, spec("min-max", range=[-1, 1])), wanted, atol=1e-5)


def test_a_constant_column_becomes_zero_not_nan():
    data = table(x=("number", [0.1] * 7))
    assert features(data, spec("standardise")).tolist() == [[0.0]] * 7
    assert features(data, spec("min-max")).tolist() == [[0.0]] * 7


@pytest.mark.parametrize(
    ("params", "filled"),
    [({}, 4.0), ({"strategy": "median"}, 2.0), ({"strategy": "most-frequent"}, 2.0), ({"value": -1}, -1.0)],
)
def test_fill_missing_numbers(params, filled):
    data = table(x=("number", [1, NAN, 2, 2, 11]))
    assert features(data, spec("fill-missing", **params)).ravel().tolist() == [1, filled, 2, 2, 11]


def test_fill_missing_of_each_type():
    data = table(
        i=("integer", [1, INT64_MISSING, 3]),
        b=("boolean", [1, 2, 1]),
        c=("category", ["", "é", "é"]),
        empty=("number", [NAN, NAN, NAN]),
    )
    prep = fit(data, spec("fill-missing"), spec("one-hot"))
    values = dict(zip(prep.feature_names, prep.features(data[0]).T.tolist(), strict=True))
    assert values == {"i": [1, 2, 3], "b": [1, 1, 1], "c=é": [1, 1, 1], "empty": [0, 0, 0]}
    assert prep.nullable == dict.fromkeys(["i", "b", "c", "empty"], True)


def test_a_value_fills_only_the_columns_it_fits():
    data = table(n=("number", [NAN, 1]), c=("category", ["", "a"]))
    prep = fit(data, spec("fill-missing", value="none"), spec("fill-missing", value=7), spec("one-hot"))
    values = dict(zip(prep.feature_names, prep.features(data[0]).T.tolist(), strict=True))
    assert values == {"n": [7, 1], "c=a": [0, 1], "c=none": [1, 0]}


@pytest.mark.parametrize(
    ("params", "low", "high"),
    [
        ({"low": 2}, 2, 100),
        ({"low": 2, "high": 4}, 2, 4),
        ({"low_quantile": 0.25, "high_quantile": 0.75}, 2, 4),
        ({}, -1, 7),
        ({"iqr": 0.5}, 1, 5),
        ({"zscore": 1}, 22 - np.std([1, 2, 3, 4, 100]), 22 + np.std([1, 2, 3, 4, 100])),
    ],
)
def test_clip(params, low, high):
    values = np.array([1, 2, 3, 4, 100])
    got = features(table(x=("number", values)), spec("clip", **params)).ravel()
    np.testing.assert_allclose(got, np.clip(values, low, high), rtol=1e-6)


def test_clip_log_and_scale_let_missing_values_through():
    data = table(x=("number", [1, NAN, 3]))
    for op in ("clip", "log", "standardise", "min-max"):
        assert np.isnan(features(data, spec(op), accepts_missing=True)[1, 0]), op


def test_log():
    values = [0.0, 1.0, 99.0]
    np.testing.assert_allclose(features(table(x=("number", values)), spec("log")).ravel(), np.log1p(values), rtol=1e-6)
    got = features(table(x=("number", [1, 10, 100])), spec("log", base=10, offset=0)).ravel()
    np.testing.assert_allclose(got, [0, 1, 2], atol=1e-6)


def test_log_of_what_has_none_names_the_column_and_serving_stays_finite():
    with pytest.raises(InvalidInput) as caught:
        fit(table(debt=("number", [1.0, -5.0])), spec("log"))
    assert caught.value.param == "debt"
    prep = fit(table(x=("number", [0.5, 1.0])), spec("log", offset=0))
    np.testing.assert_allclose(prep.features({"x": np.array([-3, 0.5], np.float32)}).ravel(), np.log([0.5, 0.5]))


def test_one_hot_is_scikit_learns_with_unknown_and_missing_as_zeros():
    values = ["bé", "中文", "a b", "a'\"b", "a b", ""]
    prep = fit(table(c=("category", values)), spec("one-hot"))
    known = np.array(values[:5], dtype=object).reshape(-1, 1)
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(known)
    assert prep.feature_names == [f"c={label}" for label in encoder.categories_[0]]
    probe = np.array(["中文", "never seen", "", "a'\"b"], dtype=object)
    assert prep.features({"c": probe}).tolist() == [
        *encoder.transform(probe[:2].reshape(-1, 1)).tolist(),
        [0, 0, 0, 0],
        *encoder.transform(probe[3:].reshape(-1, 1)).tolist(),
    ]
    assert prep.nullable == {"c": True}


def test_one_hot_keeps_the_most_frequent():
    prep = fit(table(c=("category", list("bbbccad"))), spec("one-hot", max_categories=3))
    assert prep.feature_names == ["c=a", "c=b", "c=c"]


def test_one_hot_of_integers_and_booleans_sorts_numbers_as_numbers():
    data = table(i=("integer", [10, 9, -1, INT64_MISSING]), b=("boolean", [1, 0, 2, 1]))
    prep = fit(data, spec("one-hot", ["i", "b"]))
    assert prep.feature_names == ["i=-1", "i=9", "i=10", "b=false", "b=true"]
    assert prep.features(data[0]).tolist() == [
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
    ]


def test_ordinal():
    data = table(size=("category", ["M", "S", "", "L"]))
    assert features(data, spec("ordinal")).ravel().tolist() == [1, 2, -1, 0]
    got = fit(data, spec("ordinal", order=["S", "M", "L"], unknown=9)).features(
        {"size": np.array(["L", "XL", ""], object)}
    )
    assert got.ravel().tolist() == [2, 9, 9]


def test_group_rare_takes_unknown_values_too():
    data = table(c=("category", ["a", "a", "b", "b", "z", ""]))
    prep = fit(data, spec("group-rare", min_count=2), spec("one-hot"))
    assert prep.feature_names == ["c=a", "c=b", "c=other"]
    probe = {"c": np.array(["z", "new", "a", ""], object)}
    assert prep.features(probe).tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert fit(data, spec("group-rare", min_share=0.3), spec("one-hot")).feature_names == ["c=a", "c=b", "c=other"]


@pytest.mark.parametrize(
    ("kind", "values", "to", "wanted"),
    [
        ("number", [1.9, -1.9, NAN], "integer", [1, -1, NAN]),
        ("number", [0, -0.5, NAN], "boolean", [0, 1, NAN]),
        ("boolean", [0, 1, 2], "number", [0, 1, NAN]),
        ("category", ["1.5", " 2", ""], "number", [1.5, 2, NAN]),
        ("text", ["7", "-3.9", ""], "integer", [7, -3, NAN]),
        ("category", ["Yes", "false", ""], "boolean", [1, 0, NAN]),
    ],
)
def test_cast(kind, values, to, wanted):
    got = features(table(x=(kind, values)), spec("cast", ["x"], to=to), accepts_missing=True).ravel()
    np.testing.assert_array_equal(got, np.array(wanted, np.float32))


def test_cast_numbers_to_categories():
    data = table(zip=("integer", [123456789012, 5, INT64_MISSING]), x=("number", [-0.0, 1.5, NAN]))
    prep = fit(data, spec("cast", ["zip", "x"], to="category"), spec("one-hot"))
    assert prep.feature_names == ["zip=123456789012", "zip=5", "x=0", "x=1.5"]
    assert prep.features(data[0])[2].tolist() == [0, 0, 0, 0]


def test_cast_of_a_text_that_is_no_number_names_the_column():
    data = table(x=("category", ["1", "two"]))
    prep = fit(data, spec("cast", ["x"], to="number"))
    with pytest.raises(InvalidInput, match="two") as caught:
        prep.features(data[0])
    assert caught.value.param == "x"


def test_drop_missing_and_what_follows_is_fitted_on_the_rows_left():
    data = table(x=("number", [1, NAN, 3, 100]), c=("category", ["a", "b", "c", ""]))
    prep = fit(data, spec("drop-missing"), spec("standardise"), spec("one-hot"))
    assert prep.keep.tolist() == [True, False, True, False]
    assert prep.feature_names == ["x", "c=a", "c=c"]
    assert prep.fit_features(data[0]).tolist() == [[-1, 1, 0], [1, 0, 1]]
    assert prep.nullable == {"x": False, "c": True}
    assert prep.rows({"x": np.array([NAN, 5], np.float32), "c": np.array(["q", "q"], object)}).tolist() == [False, True]


def test_drop_duplicates_keeps_the_first_and_counts_missing_as_alike():
    data = table(x=("number", [1, NAN, 1, NAN, 1]), c=("category", ["a", "b", "a", "b", "z"]))
    steps = spec("drop-duplicates"), spec("fill-missing"), spec("one-hot")
    assert fit(data, *steps).keep.tolist() == [True, True, False, False, True]
    assert fit(data, *steps, target=np.array([0, 0, 1, 0, 0])).keep.tolist() == [True, True, True, False, True]
    only = spec("drop-duplicates", ["x"]), *steps[1:]
    assert fit(data, *only, target=np.array([0, 0, 1, 0, 0])).keep.tolist() == [True, True, False, False, False]


def test_rows_are_judged_on_the_values_of_their_step():
    data = table(x=("number", [5, 6, 1]))
    prep = fit(data, spec("clip", high=2), spec("drop-duplicates"))
    assert prep.keep.tolist() == [True, False, True]
    assert prep.rows({"x": np.array([9, 1, 8, 1], np.float32)}).tolist() == [True, True, False, False]


def test_order_matters():
    data = table(x=("number", [0, 1, 2, 97]))
    clipped_first = features(data, spec("clip", high=3), spec("min-max")).ravel()
    scaled_first = features(data, spec("min-max"), spec("clip", high=3)).ravel()
    np.testing.assert_allclose(clipped_first, [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(scaled_first, np.array([0, 1, 2, 97]) / 97, rtol=1e-6)


def test_dropping_every_row_is_an_error():
    with pytest.raises(InvalidInput, match="no row is left"):
        fit(table(x=("number", [NAN, NAN])), spec("drop-missing"))
