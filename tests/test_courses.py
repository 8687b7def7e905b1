"""Tasks that are not features to one target: what is learnt, that a package says the same, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Column
from modelworks.ml.nets import loop as loops
from modelworks.ml.package import Manifest
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from tests import learning

QUICK: dict[str, Any] = {"bottleneck": 8, "hidden": [32], "activation": "tanh", "noise": 0.3, "epochs": 20}
ANOMALY: dict[str, Any] = {"algorithm": "autoencoder", "hyperparameters": {"positive": "malignant", **QUICK}}


def unlabelled(rows: int = 200) -> learning.Table:
    table, columns = learning.bundled("breast_cancer")
    return table.select(table.column_names[:-1]).slice(0, rows), columns[:-1]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(loops, "_CHECKPOINT_SHARE", 0)


def crashed_and_resumed(data: learning.Table, folder: Path, **spec: Any) -> tuple[str, str]:
    """The digests of a package from one go, and from a run that was killed twice on its way."""
    whole = learning.run(data, folder, **spec)
    kept: dict[str, bytes] = {}
    for after in (3, 9):
        with pytest.raises(learning.Crash):
            learning.run(data, folder, learning.Dying(folder, kept, after), **spec)
    ctx = learning.Context(folder, kept)
    again = learning.run(data, folder, ctx, **spec)
    assert any("goes on" in message for _, message, _ in ctx.events)
    assert again.report == whole.report
    return whole.manifest.digest, again.manifest.digest


# anomalies


def test_what_is_unlike_the_usual_scores_high_and_is_flagged(tmp_path: Path) -> None:
    data = learning.bundled("breast_cancer")
    trained = learning.run(data, tmp_path, target="target", **ANOMALY)
    metrics = {name: found["mean"] for name, found in trained.report["metrics"].items()}
    assert metrics["roc_auc"] > 0.9
    assert metrics["average_precision"] > 0.85
    assert trained.report["details"]["labelled"] == {"rows": 114, "anomalies": 47}
    package = learning.packaged(trained, tmp_path)
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 32
    benign = [name == "benign" for name in data[0]["target"].to_pylist()]
    said = runtime.predict({one.name: data[0][one.name].to_numpy().astype(np.float32) for one in data[1][:-1]})
    assert 0 < said["anomaly"][benign].mean() < 0.02  # the 0.99 quantile of what was learnt
    assert said["anomaly"][~np.array(benign)].mean() > 0.5
    assert ((said["score"] > trained.manifest.lineage["anomaly_above"]) == said["anomaly"]).all()


def test_labels_are_not_needed_and_their_metrics_are_undefined_then(tmp_path: Path) -> None:
    trained = learning.run(unlabelled(), tmp_path, target=None, algorithm="autoencoder", hyperparameters=QUICK)
    metrics = {name: found["mean"] for name, found in trained.report["metrics"].items()}
    assert metrics["reconstruction_error"] < 1
    assert metrics["roc_auc"] is metrics["f1"] is None
    assert [one.name for one in trained.manifest.signature.outputs] == ["score", "anomaly"]


@pytest.mark.usefixtures("often")
def test_an_autoencoder_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    spec = {"target": "", "algorithm": "autoencoder", "hyperparameters": {**QUICK, "epochs": 4}}
    whole, again = crashed_and_resumed(unlabelled(120), tmp_path, **spec)
    assert whole == again


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"hyperparameters": {}}, "bad_hyperparameter"),  # which of the two diagnoses is the anomaly?
        ({"hyperparameters": {"positive": "benin"}}, "bad_hyperparameter"),
        ({"target": "mean radius"}, "bad_target"),
        ({"hyperparameters": {"positive": "benign", "bottleneck": 30}}, "bad_hyperparameter"),
        ({"metrics": ["accuracy"]}, "unknown_metric"),
        ({"algorithm": "ridge", "target": None, "hyperparameters": {}}, "no_target"),
        ({"task": "tabular-regression"}, "invalid_input"),
    ],
)
def test_what_an_anomaly_is_must_be_told(spec: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        learning.run(learning.bundled("breast_cancer"), tmp_path, **({"target": "target"} | ANOMALY | spec))
    assert refused.value.code == code


def test_labels_of_every_kind_tell_anomalies(tmp_path: Path) -> None:
    from modelworks.ml.train.anomaly import Anomaly

    table, columns = unlabelled(6)
    kinds: dict[str, tuple[Any, list[int]]] = {
        "boolean": ([True, False, None, False, False, False], [1, 0, -1, 0, 0, 0]),
        "integer": ([0, 1, None, 0, 0, 1], [0, 1, -1, 0, 0, 1]),
        "category": (["usual", "fraud", None, "usual", "usual", "usual"], [0, 1, -1, 0, 0, 0]),
    }
    for kind, (values, expected) in kinds.items():
        whole = table.append_column("label", pa.array(values))
        posed = [*columns, Column(name="label", type=kind, nullable=True)]
        spec = {"model": "m", "dataset": "d", "target": "label", "algorithm": "autoencoder"}
        from modelworks.core.specs import TrainingSpec

        checked = Anomaly.check(TrainingSpec.model_validate(spec), posed)
        assert Anomaly.pose(whole, posed, checked).target.tolist() == expected


# recommendations

QUICK_TASTE: dict[str, Any] = {"factors": 4, "epochs": 25, "batch_size": 256, "learning_rate": 0.02, "top_k": 5}


def ratings(users: int = 120, items: int = 40, share: float = 0.5, seed: int = 0) -> learning.Table:
    """Ratings of known rank: the product of two numbers of each side, biases, and noise of deviation 0.3."""
    random = np.random.default_rng(seed)
    mine, theirs = random.normal(size=(users, 2)), random.normal(size=(items, 2))
    whole = 3 + mine @ theirs.T + random.normal(size=(users, 1)) * 0.3 + random.normal(size=items) * 0.5
    who, what = np.nonzero(random.random((users, items)) < share)
    value = whole[who, what] + random.normal(size=len(who)) * 0.3
    order = random.permutation(len(who))
    table = pa.table(
        {"user": who[order], "item": [f"i{one}" for one in what[order]], "rating": value[order], "day": np.arange(len(who))}
    )
    kinds = ["integer", "category", "number", "integer"]
    return table, [Column(name=name, type=kind) for name, kind in zip(table.column_names, kinds, strict=True)]  # type: ignore[arg-type]


def clicks() -> learning.Table:
    """What a user rates above 4 is clicked."""
    table, columns = ratings(share=0.8)
    return table.filter(pa.array(table["rating"].to_numpy() > 4)).drop_columns(["rating"]), [columns[0], columns[1], columns[3]]


def served(trained: Any, folder: Path) -> OnnxRuntime:
    kept = Manifest.parse(trained.manifest.canonical())  # as a replica reads it
    package = learning.stored(kept, trained.files, folder)
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) > 10
    return runtime


def test_ratings_of_low_rank_are_found_and_strangers_get_what_is_known(tmp_path: Path) -> None:
    data = ratings()
    spec = {"algorithm": "recommender", "target": "rating", "hyperparameters": QUICK_TASTE}
    trained = learning.run(data, tmp_path, validation={"holdout": 0.2}, **spec)
    values = data[0]["rating"].to_numpy()
    assert trained.report["metrics"]["rmse"]["mean"] < 0.5 < values.std() / 2  # the noise alone is 0.3
    runtime = served(trained, tmp_path)
    ask = {"user": np.array([0, 0, 10**6, 10**6, 10**6]), "item": np.array(["i1", "none such", "i1", "none such", ""], object)}
    said = runtime.predict(ask)
    assert said["basis"].tolist() == ["factors", "user bias", "item bias", "mean", "popularity"]
    assert said["value"][3] == pytest.approx(values.mean(), abs=0.05)
    assert np.isnan(said["value"][4])
    had = set(data[0].filter(pa.array(data[0]["user"].to_numpy() == 0))["item"].to_pylist())
    assert not had & set(said["items"][0].tolist())
    assert (np.diff(said["scores"][0]) <= 0).all()
    first = runtime.predict({"user": np.array([0]), "item": said["items"][0][:1]})
    assert first["value"][0] == pytest.approx(min(said["scores"][0][0], values.max()), abs=1e-4)


def test_clicks_are_told_from_chance_and_each_users_last_is_held_out(tmp_path: Path) -> None:
    data = clicks()
    spec = {"algorithm": "recommender", "target": None, "time": "day", "hyperparameters": {**QUICK_TASTE, "epochs": 12}}
    trained = learning.run(data, tmp_path, **spec)
    metrics = {name: found["mean"] for name, found in trained.report["metrics"].items()}
    assert trained.report["method"] == {"last": 1}
    assert metrics["rmse"] is None
    assert metrics["hit_rate"] == metrics["recall_at_k"] > 0.35  # 5 of some 30 items that are left by chance: 0.17
    assert metrics["ndcg"] < metrics["hit_rate"]
    served(trained, tmp_path)


def test_a_recommender_is_evaluated_by_the_order_that_it_was_trained_with(tmp_path: Path) -> None:
    from modelworks.core.specs import EvaluationSpec
    from modelworks.ml.evaluate.evaluate import evaluate

    table, columns = clicks()
    given = {"algorithm": "recommender", "target": None, "time": "day", "hyperparameters": {**QUICK_TASTE, "epochs": 3}}
    trained = learning.run((table, columns), tmp_path, **given)
    spec = EvaluationSpec.model_validate({"model": "m", "dataset": "d", "method": {"last": 1}})
    found = evaluate(spec, learning.packaged(trained, tmp_path), table, columns, learning.Context(tmp_path))
    assert found.metrics == trained.report["metrics"]
    assert found.details["users"] == trained.report["details"]["users"] == len(set(table["user"].to_pylist()))


@pytest.mark.usefixtures("often")
def test_a_recommender_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    spec = {"algorithm": "recommender", "target": "", "hyperparameters": {**QUICK_TASTE, "epochs": 3}}
    whole, again = crashed_and_resumed(clicks(), tmp_path, **spec)
    assert whole == again


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"user": "who"}, "unknown_column"),
        ({"item": "rating"}, "wrong_column_type"),
        ({"target": "item"}, "target_among_features"),
        ({"user": "rating", "target": ""}, "wrong_column_type"),
        ({"transforms": ["standardise"]}, "invalid_input"),
        ({"metrics": ["accuracy"]}, "unknown_metric"),
        ({"validation": {"last": 900}}, "too_few_rows"),
        ({"algorithm": "ridge", "hyperparameters": {}, "features": ["day"], "validation": {"last": 1}}, "invalid_input"),
    ],
)
def test_what_a_recommender_cannot_learn_is_said(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    spec: dict[str, Any] = {"algorithm": "recommender", "target": "rating", "hyperparameters": {"epochs": 1}}
    with pytest.raises(InvalidInput) as refused:
        learning.run(ratings(20, 8), tmp_path, **(spec | change))
    assert refused.value.code == code
