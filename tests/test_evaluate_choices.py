"""Choices that evaluation makes: a threshold that is served, a given split, slices in training, and which test compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import ttest_rel
from sklearn.metrics import f1_score, recall_score

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec
from modelworks.core.types import Column
from modelworks.ml.evaluate.catalogue import CLASSIFICATION, REGRESSION
from modelworks.ml.evaluate.compare import compare
from modelworks.ml.evaluate.evaluate import evaluate
from modelworks.ml.evaluate.folds import read_kept
from modelworks.ml.evaluate.predictions import Predictions, labels
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from tests.learning import Context, Table, bundled, mixed, packaged, run

ILL: dict[str, Any] = {"algorithm": "logistic-regression", "target": "ill", "features": ["age", "visits", "member"]}


def with_split(data: Table) -> Table:
    said = ["test" if row % 4 == 0 else "train" if row % 10 else "spare" for row in range(data[0].num_rows)]
    return data[0].append_column("part", pa.array(said)), [*data[1], Column(name="part", type="category")]


def best_of_all(held: Predictions, by: str) -> float:
    """The threshold with the highest F1 or Youden's J of all that differ, by scikit-learn."""
    ill, said = held.true == 1, held.output[:, 1]

    def figure(limit: float) -> float:
        flagged = said >= limit
        return float(f1_score(ill, flagged) if by == "f1" else recall_score(ill, flagged) - flagged[~ill].mean())

    return max(sorted(set(said), reverse=True), key=figure)


@pytest.mark.parametrize("threshold", [0.2, "f1", "youden"])
def test_the_served_label_is_by_the_threshold_that_was_chosen(tmp_path: Path, threshold: Any) -> None:
    data = mixed(240)
    trained = run(data, tmp_path, threshold=threshold, validation={"kfold": 3}, **ILL)
    chosen = trained.report["details"]["threshold"]
    assert trained.manifest.lineage["threshold"] == chosen
    held = read_kept(trained.report["predictions"])
    assert chosen["value"] == pytest.approx(threshold if threshold == 0.2 else best_of_all(held, threshold))
    package, runtime = packaged(trained, tmp_path), OnnxRuntime()
    runtime.load(package)
    assert replay_parity(package, runtime)
    from modelworks.ml.data.types import to_batch

    batch = to_batch(data[0], [column for column in data[1] if column.name in ILL["features"]])
    said = runtime.predict({spec.name: batch[spec.name] for spec in package.manifest.signature.inputs})
    positive = said["probabilities"][:, 1] >= np.float32(chosen["value"])
    assert (np.asarray(said["label"]) == np.where(positive, "True", "False")).all()
    assert (positive != (said["probabilities"].argmax(axis=1) == 1)).any()
    spec = EvaluationSpec.model_validate({"model": "m", "method": {"test": "d"}, "metrics": ["recall"]})
    found = evaluate(spec, package, data[0], data[1], Context(tmp_path))
    truth = np.array(data[0].column("ill").to_pylist())
    recalls = [(positive[truth] == 1).mean(), (positive[~truth] == 0).mean()]
    assert found.metrics["recall"]["mean"] == pytest.approx(np.mean(recalls))


def test_the_threshold_that_is_best_by_f1_raises_it_above_that_of_one_half(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=600)
    rare = random.random(600) < 1 / (1 + np.exp(3 - 1.5 * x))
    table = pa.table({"x": x, "target": rare})
    data = table, [Column(name="x", type="number"), Column(name="target", type="boolean")]
    spec: dict[str, Any] = {"algorithm": "logistic-regression", "validation": {"kfold": 4}, "metrics": ["f1", "roc_auc"]}
    plain, chosen = (run(data, tmp_path, **spec, **more) for more in ({}, {"threshold": "f1"}))
    assert chosen.report["metrics"]["f1"]["mean"] > plain.report["metrics"]["f1"]["mean"]
    assert chosen.report["metrics"]["roc_auc"] == plain.report["metrics"]["roc_auc"]


@pytest.mark.parametrize(
    ("data", "spec"), [(bundled("iris"), {"algorithm": "logistic-regression"}), (bundled("diabetes"), {"algorithm": "ridge"})]
)
def test_a_threshold_for_anything_but_two_classes_is_refused(tmp_path: Path, data: Table, spec: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as refused:
        run(data, tmp_path, threshold=0.3, **spec)
    assert refused.value.param == "threshold"


def test_a_column_may_say_which_rows_train_and_which_test(tmp_path: Path) -> None:
    data = with_split(mixed(200))
    spec = {"algorithm": "ridge", "target": "score", "features": ["age", "visits"]}
    trained = run(data, tmp_path, validation={"split": "part"}, **spec)
    details = trained.report["details"]
    assert details["test_rows"] == [50]
    assert details["splitter"] == {"name": "column", "column": "part"}
    assert any(note.startswith("10 rows are neither") for note in details["notes"])
    found = evaluate(
        EvaluationSpec.model_validate({"model": "m", "method": {"split": "part"}}), packaged(trained, tmp_path), *data, Context(tmp_path)
    )  # fmt: skip
    assert found.metrics == trained.report["metrics"]
    part = run(data, tmp_path, validation={"split": "part"}, algorithm="ridge", target="score")
    assert "part" not in {one.name for one in part.manifest.signature.inputs}
    with pytest.raises(InvalidInput) as refused:
        run(data, tmp_path, validation={"split": "city"}, **spec)
    assert (refused.value.code, refused.value.param) == ("empty_split", "validation.split")


def test_slices_are_measured_in_training_too(tmp_path: Path) -> None:
    data = mixed(200)
    trained = run(data, tmp_path, algorithm="ridge", target="score", slices=["age > 40"], validation={"kfold": 3})
    one = trained.report["details"]["slices"][0]
    assert one["rows"] == sum(age is not None and age > 40 for age in data[0].column("age").to_pylist())
    assert one["metrics"]["mae"]["low"] < one["metrics"]["mae"]["mean"] < one["metrics"]["mae"]["high"]


def folds(noise: float, seed: int) -> list[Predictions]:
    random = np.random.default_rng(seed)
    true = np.random.default_rng(9).normal(size=300)
    said = true + noise * random.normal(size=300)
    return [Predictions(np.arange(at, at + 60), true[at : at + 60], said[at : at + 60]) for at in range(0, 300, 60)]


def test_folds_are_compared_by_the_corrected_resampled_t_test() -> None:
    good, bad = folds(0.50, 1), folds(0.56, 2)
    found = compare(REGRESSION, good, bad, ["mae"], 0, [240] * 5)
    assert found["method"]["name"].startswith("corrected resampled t-test")
    one = found["metrics"]["mae"]
    mine, theirs = (np.array([np.abs(part.true - part.output).mean() for part in side]) for side in (good, bad))
    plain = ttest_rel(mine, theirs)
    # the t statistic of the plain test, made smaller by sqrt((1/k) / (1/k + tested/trained))
    from scipy.stats import t

    shrunk = abs(plain.statistic) * np.sqrt((1 / 5) / (1 / 5 + 60 / 240))
    assert one["p_value"] == pytest.approx(2 * t.sf(shrunk, 4))
    assert one["p_value"] > plain.pvalue
    assert one["low"] < one["difference"] < one["high"]
    assert compare(REGRESSION, good, folds(2.0, 2), ["mae"], 0, [240] * 5)["verdict"] == "better"
    same = compare(REGRESSION, good, good, ["mae"], 0, [240] * 5)["metrics"]["mae"]
    assert (same["difference"], same["p_value"], same["verdict"]) == (0, 1, "no significant difference")


def test_a_single_split_is_compared_by_a_paired_bootstrap_and_labels_by_mcnemar() -> None:
    random = np.random.default_rng(0)
    true = random.integers(0, 2, 200)
    right = np.where(random.random(200) < 0.9, true, 1 - true)
    sides = [Predictions(np.arange(200), true, np.eye(2)[said] * 0.8 + 0.1) for said in (right, random.integers(0, 2, 200))]
    found = compare(CLASSIFICATION, [sides[0]], [sides[1]], ["accuracy"], 0, [800])
    assert found["method"]["name"] == "paired bootstrap over rows"
    assert found["mcnemar"]["test"] == "McNemar's exact test"
    assert found["mcnemar"]["p_value"] < 0.001
    assert (labels(sides[0].output) == right).all()
