"""The catalogue of algorithms: JSON Schema, the check of hyperparameters, and that it is light."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput
from modelworks.ml.train.algorithms import TRAINERS, check_hyperparameters, describe

ALL = {
    "linear-regression", "ridge", "lasso", "elastic-net", "logistic-regression", "sgd-classifier", "sgd-regressor",
    "gradient-boosted-trees", "mlp", "cnn", "rnn", "transformer", "forecaster", "autoencoder", "recommender",
    "multimodal", "text-classifier", "image-classifier",
}  # fmt: skip


def test_every_algorithm_is_described_with_types_ranges_and_defaults() -> None:
    listed = {entry["name"]: entry for entry in describe()}
    assert set(listed) == ALL
    assert listed["logistic-regression"]["task"] == "tabular-classification"
    assert listed["gradient-boosted-trees"]["tasks"] == ["tabular-classification", "tabular-regression"]
    assert listed["cnn"]["task"] == "image-classification"
    assert {"audio-regression", "tabular-classification"} < set(listed["cnn"]["tasks"])
    assert listed["text-classifier"]["tasks"] == ["text-classification"]
    for entry in listed.values():
        assert entry["description"].endswith(".")
        for name, schema in entry["hyperparameters"]["properties"].items():
            assert "default" in schema, name
            assert schema.get("description"), f"{entry['name']}.{name} is not described"
    rate = listed["gradient-boosted-trees"]["hyperparameters"]["properties"]["learning_rate"]
    assert (rate["exclusiveMinimum"], rate["maximum"], rate["default"]) == (0, 10, 0.1)


@pytest.mark.parametrize("name", sorted(ALL))
def test_defaults_are_filled_in(name: str) -> None:
    assert check_hyperparameters(name, {}) == TRAINERS.get(name).Params().model_dump()


def test_an_integer_is_taken_for_a_float() -> None:
    assert check_hyperparameters("ridge", {"alpha": 2})["alpha"] == 2.0


@pytest.mark.parametrize(
    ("algorithm", "given", "param", "said"),
    [
        ("ridge", {"alhpa": 1}, "hyperparameters.alhpa", "it has: alpha, fit_intercept, positive"),
        ("ridge", {"alpha": -1}, "hyperparameters.alpha", "cannot be '-1'; give a number from 0 to 1e+12"),
        ("ridge", {"alpha": "1"}, "hyperparameters.alpha", "give a number"),
        ("ridge", {"alpha": float("nan")}, "hyperparameters.alpha", "give a number"),
        ("ridge", {"positive": 1}, "hyperparameters.positive", "give true or false"),
        ("logistic-regression", {"C": 0}, "hyperparameters.C", "give a number above 0 to 1e+12"),
        (
            "logistic-regression",
            {"penalty": "l3"},
            "hyperparameters.penalty",
            "give one of 'l2', 'l1', 'elasticnet', 'none'",
        ),
        ("logistic-regression", {"class_weight": "even"}, "hyperparameters.class_weight", "one of 'balanced' or null"),
        ("gradient-boosted-trees", {"n_estimators": 0}, "hyperparameters.n_estimators", "an integer from 1 to 100000"),
        ("sgd-classifier", {"tol": -1}, "hyperparameters.tol", "a number from 0 to 1 or null"),
    ],
)
def test_a_wrong_hyperparameter_is_named_with_what_is_allowed(
    algorithm: str, given: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_hyperparameters(algorithm, given)
    assert refused.value.param == param
    assert said in refused.value.message


def test_an_unknown_algorithm_lists_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="gradient-boosted-trees"):
        check_hyperparameters("xgboost", {})


def test_the_catalogues_and_the_runtime_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from modelworks.ml.train import algorithms, checks\n"
        "from modelworks.ml.evaluate import catalogue\n"
        "algorithms.describe(); catalogue.describe()\n"
        "from modelworks.ml.runtimes import registry, parity\n"
        "registry.RUNTIMES.get('onnx')\n"
        "from modelworks.ml import build\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'lightgbm', 'onnx', 'onnxruntime', 'scipy', 'skl2onnx', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_task_is_named_by_what_is_read() -> None:
    from modelworks.core.specs import TrainingSpec
    from modelworks.core.tasks import base_of, kind_of, named
    from modelworks.core.types import Column
    from modelworks.ml.train.checks import check_training

    assert [kind_of(types) for types in (["image"], ["text"], ["number", "text"], ["audio", "text"], ["category"])] == [
        "image", "text", "tabular", "multimodal", "tabular",
    ]  # fmt: skip
    assert named("tabular-regression", "audio") == "audio-regression"
    assert (base_of("image-classification"), base_of("text-generation")) == ("tabular-classification", "text-generation")
    columns = [Column(name="picture", type="image"), Column(name="label", type="category")]
    spec = TrainingSpec(model="m", dataset="d", target="label", algorithm="cnn", task="image-classification")
    assert check_training(spec, columns).task == "image-classification"
    with pytest.raises(InvalidInput, match=r"the task is image-classification, not text-classification"):
        check_training(spec.model_copy(update={"task": "text-classification"}), columns)
