"""What runs before the graph: parts of times, and terms of texts in any script."""

import json

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.core.types import Column
from modelworks.ml import graph as onnx_graph
from modelworks.ml.data.transforms.host import apply_host, tokens
from modelworks.ml.data.transforms.preparation import Preparation

TEXTS = ["Café au lait", "the cat sat on the mat", "", "The CAT, the dog & café!", "naïve über-straße 42", "x"]


def prepare(kind, values, *specs, accepts_missing=False):
    batch = {"body": np.array(values, dtype=object)}
    steps = [TransformSpec.model_validate(step) for step in specs]
    prep = Preparation.fit(batch, [Column(name="body", type=kind)], steps, accepts_missing=accepts_missing)
    return prep, prep.features(batch)


@pytest.mark.parametrize(
    ("params", "theirs"),
    [
        ({}, {}),
        ({"ngram": [1, 2], "min_df": 2}, {"ngram_range": (1, 2), "min_df": 2}),
        ({"sublinear": True, "lowercase": False}, {"sublinear_tf": True, "lowercase": False}),
        ({"analyzer": "char", "ngram": [2, 3]}, {"analyzer": "char", "ngram_range": (2, 3)}),
    ],
)
def test_tf_idf_is_scikit_learns(params, theirs):
    prep, got = prepare("text", TEXTS, {"op": "tf-idf", **params})
    vectoriser = TfidfVectorizer(**theirs)
    wanted = vectoriser.fit_transform(TEXTS).toarray()
    assert prep.feature_names == [f"body:{term}" for term in vectoriser.get_feature_names_out()]
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not got[2].any()


def test_tf_idf_keeps_the_most_frequent_terms_and_ignores_unseen_words():
    prep, _ = prepare("text", TEXTS, {"op": "tf-idf", "max_features": 3})
    assert prep.feature_names == ["body:café", "body:cat", "body:the"]
    assert prep.features({"body": np.array(["zebra", "", "CAFÉ"], object)}).tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
    ]


def test_scripts_without_spaces_have_words_too():
    analysis = {"analyzer": "word", "ngram": [1, 2], "lowercase": True}
    assert list(tokens("我爱 Python3", analysis)) == ["我", "爱", "python3", "我 爱", "爱 python3"]
    assert list(tokens("한국어 문장", analysis)) == ["한국어", "문장", "한국어 문장"]
    prep, got = prepare("text", ["好电影", "坏电影", "hello"], {"op": "tf-idf"})
    assert prep.feature_names == ["body:hello", "body:坏", "body:好", "body:影", "body:电"]
    assert (got[0] > 0).tolist() == [False, False, True, True, True]


def test_a_text_column_without_terms_is_named():
    with pytest.raises(InvalidInput) as caught:
        prepare("text", ["", "!"], {"op": "tf-idf"})
    assert caught.value.param == "body"


def test_hashing_is_stable_and_needs_no_vocabulary():
    prep, got = prepare("text", ["alpha beta", "beta alpha", "", "gamma"], {"op": "hashing", "n_features": 16})
    assert got.shape == (4, 16)
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [1, 1, 0, 1], rtol=1e-6)
    assert np.flatnonzero(got[3]).tolist() == [GAMMA]  # pinned: a package made today must hash the same tomorrow
    assert prep.nullable == {"body": True}


GAMMA = 8


def test_date_parts_in_utc():
    values = ["2024-02-29T23:30:00Z", "2024-03-01T01:15:00+08:00", "1969-12-31", "2023-12-31 06:07:08.5", ""]
    parts = ["year", "month", "day", "weekday", "hour", "minute", "dayofyear", "is_weekend"]
    prep, got = prepare("time", values, {"op": "date-parts", "parts": parts}, accepts_missing=True)
    assert prep.feature_names == [f"body:{part}" for part in parts]
    assert got[:4].tolist() == [
        [2024, 2, 29, 3, 23, 30, 60, 0],
        [2024, 2, 29, 3, 17, 15, 60, 0],
        [1969, 12, 31, 2, 0, 0, 365, 0],
        [2023, 12, 31, 6, 6, 7, 365, 1],
    ]
    assert np.isnan(got[4]).all()
    assert list(prep.graph().graph.input[0].type.tensor_type.shape.dim)[1].dim_value == 8


def test_cyclic_parts_bring_december_next_to_january():
    prep, got = prepare(
        "time", ["2024-12-01", "2024-01-01", "2024-06-01"], {"op": "date-parts", "parts": ["month"], "cyclic": True}
    )
    assert prep.feature_names == ["body:month_sin", "body:month_cos"]
    assert np.linalg.norm(got[0] - got[1]) < np.linalg.norm(got[0] - got[2])


@pytest.mark.parametrize("bad", ["yesterday", "2024-13-01", "9" * 5000])
def test_what_is_no_time_names_the_column(bad):
    prep, _ = prepare("time", ["2024-12-01"], {"op": "date-parts"})
    with pytest.raises(InvalidInput) as caught:
        prep.features({"body": np.array([bad], object)})
    assert caught.value.param == "body"
    assert len(caught.value.message) < 300


def test_a_fill_may_stand_before_a_host_op():
    prep, got = prepare(
        "time",
        ["2020-05-01", "", "2020-05-01"],
        {"op": "fill-missing", "columns": ["body"], "value": "2021-01-01"},
        {"op": "date-parts", "parts": ["year"]},
    )
    assert got.ravel().tolist() == [2020, 2021, 2020]
    assert [state["kind"] for state in prep.host] == ["fill", "date-parts"]
    assert prep.nullable == {"body": True}
    with pytest.raises(InvalidInput, match="ISO 8601"):
        prepare(
            "time", ["2020-05-01"], {"op": "fill-missing", "columns": ["body"], "value": "soon"}, {"op": "date-parts"}
        )


def test_another_op_may_not():
    with pytest.raises(InvalidInput, match="must be the first op") as caught:
        prepare("category", ["a b", "a b"], {"op": "group-rare"}, {"op": "tf-idf", "columns": ["body"]})
    assert caught.value.param == "body"


def test_missing_times_need_filling_and_parts_can_be_filled():
    with pytest.raises(InvalidInput, match="add fill-missing") as caught:
        prepare("time", ["2020-05-01", ""], {"op": "date-parts", "parts": ["year"]})
    assert caught.value.param.startswith("body")
    prep, got = prepare("time", ["2020-05-01", ""], {"op": "date-parts", "parts": ["year"]}, {"op": "fill-missing"})
    assert got.ravel().tolist() == [2020, 2020]
    assert prep.nullable == {"body": True}


def test_state_through_json_and_graph_alone_give_the_same_features():
    prep, got = prepare("text", TEXTS, {"op": "tf-idf"})
    states = json.loads(json.dumps(prep.host))
    session = onnx_graph.session(onnx_graph.to_bytes(prep.graph()))
    batch = apply_host(states, {"body": np.array(TEXTS, object)})
    np.testing.assert_array_equal(session.run(None, onnx_graph.feed(session.get_inputs(), batch))[0], got)
    assert prep.inputs == ["body"]
    assert [value.name for value in prep.graph().graph.input] == ["body:tf-idf"]
