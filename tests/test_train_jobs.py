"""Training from table to package: equal to scikit-learn, deterministic, resumable, and clear in its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.ml.base import Cancelled
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from modelworks.ml.train.algorithms import TRAINERS
from modelworks.ml.train.problem import pose
from tests.learning import Context, Crash, Table, bundled, mixed, packaged, run

QUICK: dict[str, dict[str, Any]] = {
    "gradient-boosted-trees": {"n_estimators": 10},
    "cnn": {"shape": [1, 1, 11], "channels": [8], "head": [16], "epochs": 20},  # 11: the features of mixed()
}
CASES = [  # those built on a registered model are held in test_nets_pretrained
    (name, task)
    for name in TRAINERS
    for task in TRAINERS.get(name).tasks
    if task.startswith("tabular-") and "backbone" not in TRAINERS.get(name).Params.model_fields
]


def test_folds_on_iris_equal_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_validate
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_iris()
    theirs = cross_validate(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        data.data,
        data.target,
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
        scoring=["accuracy", "f1_macro", "neg_log_loss", "roc_auc_ovr"],
    )
    trained = run(bundled("iris"), tmp_path, algorithm="logistic-regression", validation={"kfold": 5})
    metrics = trained.report["metrics"]
    assert metrics["accuracy"]["folds"] == theirs["test_accuracy"].tolist()
    assert metrics["f1"]["folds"] == pytest.approx(theirs["test_f1_macro"].tolist(), abs=1e-12)
    assert metrics["log_loss"]["folds"] == pytest.approx((-theirs["test_neg_log_loss"]).tolist(), abs=1e-4)
    assert metrics["roc_auc"]["folds"] == pytest.approx(theirs["test_roc_auc_ovr"].tolist(), abs=1e-6)
    assert metrics["accuracy"]["mean"] == pytest.approx(0.96)
    assert trained.report["details"]["splitter"]["name"] == "StratifiedKFold"
    assert trained.manifest.metrics == metrics
    assert np.sum(trained.report["details"]["confusion_matrix"]["counts"]) == 150


def test_regression_folds_equal_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_diabetes()
    pipeline = make_pipeline(StandardScaler(), Ridge())
    theirs = cross_val_score(pipeline, data.data, data.target, cv=KFold(4, shuffle=True, random_state=7), scoring="r2")
    trained = run(bundled("diabetes"), tmp_path, algorithm="ridge", validation={"kfold": 4}, seed=7)
    assert trained.report["metrics"]["r2"]["folds"] == pytest.approx(theirs.tolist(), abs=1e-6)
    quantiles = trained.report["details"]["residual_quantiles"]
    assert quantiles["0"] < quantiles["0.5"] < quantiles["1"]


@pytest.mark.parametrize(("algorithm", "task"), CASES)
def test_every_algorithm_packages_the_same_answers(algorithm: str, task: str, tmp_path: Path) -> None:
    table, columns = mixed()
    target = "score" if task == "tabular-regression" else "ill"
    spec: dict[str, Any] = {
        "algorithm": algorithm,
        "target": target,
        "features": ["age", "visits", "member", "city", "day"],
    }
    trained = run((table, columns), tmp_path, hyperparameters=QUICK.get(algorithm, {}), **spec)
    again = run((table, columns), tmp_path, hyperparameters=QUICK.get(algorithm, {}), **spec)
    assert trained.manifest.digest == again.manifest.digest
    assert trained.files == again.files
    assert trained.manifest.task == task
    assert any(None in row.values() for row in trained.manifest.parity.inputs)
    runtime = OnnxRuntime()
    package = packaged(trained, tmp_path)
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 32
    best = trained.report["metrics"]["r2" if task == "tabular-regression" else "accuracy"]
    assert best["mean"] > 0.4
    assert best["low"] <= best["mean"] <= best["high"]


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
@pytest.mark.parametrize("algorithm", ["logistic-regression", "sgd-classifier", "gradient-boosted-trees"])
def test_the_graph_equals_the_library_on_every_row(name: str, algorithm: str, tmp_path: Path) -> None:
    """Training refuses a package that differs from its own side; this holds the library against it."""
    data = bundled(name)
    trained = run(
        data, tmp_path, algorithm=algorithm, transforms=["standardise"], hyperparameters=QUICK.get(algorithm, {})
    )
    runtime = OnnxRuntime()
    runtime.load(packaged(trained, tmp_path), 1)
    names = data[0].column_names[:-1]
    raw = np.column_stack([data[0].column(column).to_numpy() for column in names]).astype(np.float32)
    got = runtime.predict({column: raw[:, i] for i, column in enumerate(names)})
    target = np.asarray(data[0].column("target").to_pylist())
    expected = _library(algorithm, raw, target)
    classes = np.unique(target)
    assert got["probabilities"].shape == (len(raw), len(classes))
    if algorithm == "sgd-classifier":  # epochs are run one by one here, so only the kind of answer is the same
        assert np.mean(got["label"] == target) > 0.9
        return
    assert (got["label"] == classes[expected.argmax(axis=1)]).all()
    np.testing.assert_allclose(
        got["probabilities"], expected, atol=2e-4 if algorithm == "logistic-regression" else 1e-5
    )


def _library(algorithm: str, raw: np.ndarray, target: np.ndarray) -> np.ndarray:
    from lightgbm import LGBMClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    wide = raw.astype(np.float64)
    scaled = ((raw - wide.mean(axis=0).astype(np.float32)) / wide.std(axis=0).astype(np.float32)).astype(np.float64)
    if algorithm == "gradient-boosted-trees":
        options: dict[str, Any] = {"deterministic": True, "force_col_wise": True, "verbosity": -1}
        model = LGBMClassifier(n_estimators=10, random_state=0, n_jobs=1, **options)
        exact = StandardScaler().fit_transform(wide)
        return np.asarray(model.fit(exact, target).predict_proba(exact))
    return np.asarray(LogisticRegression(max_iter=1000).fit(scaled, target).predict_proba(scaled))


@pytest.mark.parametrize(
    "chosen",
    [
        {"penalty": "l1", "solver": "liblinear"},
        {"penalty": "l1", "C": 0.5},
        {"penalty": "elasticnet", "l1_ratio": 0.3},
        {"penalty": "none", "solver": "newton-cg", "tol": 0.1},
        {"class_weight": "balanced", "fit_intercept": False},
    ],
)
def test_logistic_regression_with_each_penalty(chosen: dict[str, Any], tmp_path: Path) -> None:
    trained = run(bundled("breast_cancer"), tmp_path, algorithm="logistic-regression", hyperparameters=chosen)
    assert trained.report["metrics"]["accuracy"]["mean"] > 0.9
    assert (
        trained.manifest.lineage["spec"]["hyperparameters"] | chosen
        == trained.manifest.lineage["spec"]["hyperparameters"]
    )


def test_a_solver_that_does_not_do_the_penalty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="use auto or one of: saga"):
        run(
            bundled("iris"),
            tmp_path,
            algorithm="logistic-regression",
            hyperparameters={"penalty": "l1", "solver": "liblinear"},
        )


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "modified_huber", "perceptron"])
def test_sgd_losses_keep_labels_and_probabilities_in_step(loss: str, tmp_path: Path) -> None:
    trained = run(
        bundled("iris"), tmp_path, algorithm="sgd-classifier", hyperparameters={"loss": loss, "penalty": "l1"}
    )
    outputs = trained.manifest.parity.outputs
    classes = trained.manifest.classes or []
    assert [classes[int(np.argmax(row))] for row in outputs["probabilities"]] == outputs["label"]
    assert np.sum(outputs["probabilities"], axis=1) == pytest.approx(np.ones(32), abs=1e-6)


@pytest.mark.parametrize("rate", ["constant", "invscaling", "adaptive"])
def test_sgd_learning_rates_reach_the_least_squares_fit(rate: str, tmp_path: Path) -> None:
    given = {"learning_rate": rate, "eta0": 0.001 if rate in ("constant", "adaptive") else 0.01}
    ctx = Context(tmp_path)
    trained = run(bundled("diabetes"), tmp_path, ctx, algorithm="sgd-regressor", hyperparameters=given)
    best = run(bundled("diabetes"), tmp_path, algorithm="linear-regression")
    assert trained.report["metrics"]["rmse"]["mean"] < 1.1 * best.report["metrics"]["rmse"]["mean"]
    curve = next(data["curve"] for kind, _, data in ctx.events if kind == "log")
    assert len(curve) > 2
    assert curve[-1] < curve[0]


def test_diverging_descent_says_what_to_do(tmp_path: Path) -> None:
    for given in ({"learning_rate": "constant", "eta0": 1000.0}, {"learning_rate": "optimal"}):
        with pytest.raises(InvalidInput, match="lower eta0"):
            run(bundled("diabetes"), tmp_path, algorithm="sgd-regressor", hyperparameters=given)


def test_no_convergence_is_a_warning(tmp_path: Path) -> None:
    ctx = Context(tmp_path)
    trained = run(bundled("wine"), tmp_path, ctx, algorithm="logistic-regression", hyperparameters={"max_iter": 2})
    assert any("did not converge" in message for kind, message, _ in ctx.events if kind == "warning")
    assert any("raise max_iter" in message for message in trained.warnings)


def test_classes_keep_their_json_type(tmp_path: Path) -> None:
    assert run(mixed(), tmp_path, algorithm="logistic-regression", target="ill").manifest.classes == [False, True]
    trained = run(mixed(), tmp_path, algorithm="logistic-regression", target="grade")
    assert trained.manifest.classes == [0, 1, 2, 3]
    assert set(trained.manifest.parity.outputs["label"]) <= {"0", "1", "2", "3"}
    assert trained.manifest.signature.outputs[1].shape == [-1, 4]


def test_trees_tell_the_task_from_an_integer_target(tmp_path: Path) -> None:
    quick = {"n_estimators": 5}
    few = run(mixed(), tmp_path, algorithm="gradient-boosted-trees", target="grade", hyperparameters=quick)
    assert few.manifest.task == "tabular-classification"
    numbers = run(
        mixed(),
        tmp_path,
        algorithm="gradient-boosted-trees",
        target="grade",
        task="tabular-regression",
        hyperparameters=quick,
    )
    assert numbers.manifest.task == "tabular-regression"


def test_trees_on_too_few_rows_warn_and_still_answer(tmp_path: Path) -> None:
    table, columns = bundled("iris")
    trained = run((table.take(list(range(40, 60))), columns), tmp_path, algorithm="gradient-boosted-trees")
    assert any("lower it" in message for message in trained.warnings)


def test_a_killed_job_goes_on_after_the_folds_it_finished(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"algorithm": "sgd-classifier", "validation": {"kfold": 5}}
    whole = run(bundled("wine"), tmp_path, **spec)
    first = Context(tmp_path, fail_after=3)
    with pytest.raises(Crash):
        run(bundled("wine"), tmp_path, first, **spec)
    second = Context(tmp_path, kept=first.kept)
    resumed = run(bundled("wine"), tmp_path, second, **spec)
    assert [data["resumed"] for kind, _, data in second.events if kind == "fold"] == [True] * 3 + [False] * 2
    assert resumed.report == whole.report
    assert resumed.manifest.digest == whole.manifest.digest


def test_progress_only_grows_and_ends_at_one(tmp_path: Path) -> None:
    ctx = Context(tmp_path)
    run(bundled("iris"), tmp_path, ctx, algorithm="logistic-regression", validation={"kfold": 3})
    fractions = [fraction for fraction, _, _ in ctx.reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("algorithm", ["logistic-regression", "sgd-classifier", "gradient-boosted-trees"])
def test_cancel_stops_a_fit_that_would_take_minutes(algorithm: str, tmp_path: Path) -> None:
    import time

    random = np.random.default_rng(0)
    table = pa.table(
        {f"x{i}": random.normal(size=40_000) for i in range(30)} | {"target": random.choice(["a", "b"], 40_000)}
    )
    columns = [c.model_copy(update={"name": n}) for n, c in zip(table.column_names, mixed()[1][6:7] * 30, strict=False)]
    columns.append(bundled("iris")[1][-1])
    endless: dict[str, Any] = {
        "logistic-regression": {"penalty": "l1", "tol": 0.0, "max_iter": 1_000_000},
        "sgd-classifier": {"tol": None, "max_iter": 100_000},
        "gradient-boosted-trees": {"n_estimators": 100_000},
    }

    class Impatient(Context):
        def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
            if time.monotonic() > start + 1 and "fitting" in stage + "fitting" * ("boosting" in stage):
                raise Cancelled

    start = time.monotonic()
    with pytest.raises(Cancelled):
        run((table, columns), tmp_path, Impatient(tmp_path), algorithm=algorithm, hyperparameters=endless[algorithm])
    assert time.monotonic() - start < 6


def test_a_failed_gate_carries_the_report(tmp_path: Path) -> None:
    gates = [{"metric": "accuracy", "at_least": 0.5}, {"metric": "log_loss", "at_most": 0.001}]
    with pytest.raises(InvalidInput, match=r"log_loss is .* must be at most 0\.001; nothing was registered") as refused:
        run(bundled("iris"), tmp_path, algorithm="logistic-regression", metrics=["accuracy"], gates=gates)
    assert refused.value.code == "gate_failed"
    assert refused.value.detail["gate"] == gates[1]
    assert refused.value.detail["report"]["metrics"]["log_loss"]["mean"] == refused.value.detail["value"]
    assert [gate["passed"] for gate in refused.value.detail["report"]["details"]["gates"]] == [True, False]
    passed = run(bundled("iris"), tmp_path, algorithm="logistic-regression", metrics=["accuracy"], gates=gates[:1])
    assert list(passed.report["metrics"]) == ["accuracy"]


def test_duplicates_are_dropped_before_the_split(tmp_path: Path) -> None:
    table, columns = bundled("iris")
    twice = pa.concat_tables([table, table])
    once = run(
        (table, columns), tmp_path, algorithm="logistic-regression", transforms=["drop-duplicates", "standardise"]
    )
    both = run(
        (twice, columns), tmp_path, algorithm="logistic-regression", transforms=["drop-duplicates", "standardise"]
    )
    assert both.report == once.report
    assert both.files == once.files


def test_rows_without_target_can_be_dropped(tmp_path: Path) -> None:
    table, columns = bundled("iris")
    gaps = ["" if i in (3, 77) else value for i, value in enumerate(table.column("target").to_pylist())]
    holes = table.set_column(4, "target", pa.array([value or None for value in gaps]))
    with pytest.raises(
        InvalidInput, match="missing in 2 of 150 rows, first in row 4; put the transform drop-missing first"
    ):
        run((holes, columns), tmp_path, algorithm="logistic-regression")
    trained = run(
        (holes, columns),
        tmp_path,
        algorithm="logistic-regression",
        transforms=["drop-missing"],
        validation={"kfold": 2},
    )
    assert sum(trained.report["details"]["test_rows"]) == 148
    assert len(trained.manifest.classes or []) == 3


def test_a_separate_test_set(tmp_path: Path) -> None:
    table, columns = bundled("iris")
    rows = np.arange(150)
    train, test = table.take(rows[rows % 3 != 0]), table.take(rows[rows % 3 == 0])
    spec: dict[str, Any] = {"algorithm": "logistic-regression", "validation": {"test": "held:1"}}
    trained = run((train, columns), tmp_path, test=test, **spec)
    assert trained.report["details"]["test_rows"] == [50]
    assert trained.report["metrics"]["accuracy"]["mean"] > 0.9
    assert trained.report["details"]["splitter"] == {"name": "test", "dataset": "held:1"}
    with pytest.raises(InvalidInput, match="was not given"):
        run((train, columns), tmp_path, **spec)
    lacking = test.drop_columns(["petal width (cm)"])
    with pytest.raises(InvalidInput, match="petal width"):
        run((train, columns), tmp_path, test=lacking, **spec)


def _iris(**changes: Any) -> Table:
    table, columns = bundled("iris")
    for name, values in changes.items():
        table = table.append_column(name, pa.array(values, pa.float64() if values[0] is None else None))
        kind = "number" if values[0] is None else "category"
        columns = [*columns, columns[0].model_copy(update={"name": name, "type": kind, "nullable": values[0] is None})]
    return table, columns


@pytest.mark.parametrize(
    ("data", "spec", "code", "said"),
    [
        (_iris(), {"target": "colour"}, "unknown_column", "it has: sepal length"),
        (_iris(), {"features": ["target", "sepal width (cm)"]}, "target_among_features", "take it out of features"),
        (_iris(), {"features": ["petal"]}, "unknown_column", "for features"),
        (_iris(same=["a"] * 150), {"target": "same"}, "one_class", "only one class, 'a'"),
        (_iris(empty=[None] * 150), {}, "empty_feature", "'empty' has no value in any row"),
        (_iris(), {"target": "petal width (cm)"}, "continuous_target", "choose a regression algorithm"),
        (_iris(), {"algorithm": "ridge"}, "bad_target", "choose a classification algorithm"),
        (
            _iris(),
            {"algorithm": "ridge", "task": "tabular-classification"},
            "invalid_input",
            "not tabular-classification",
        ),
        (_iris(), {"validation": {"kfold": 100}}, None, None),
        (_iris(), {"metrics": ["r2"]}, "unknown_metric", "choose from: accuracy"),
        (_iris(), {"gates": [{"metric": "rmse", "at_most": 1}]}, "unknown_metric", "choose from: accuracy"),
        (_iris(), {"validation": {"kfold": 5, "group": "shop"}}, "unknown_column", "for group"),
        (
            _iris(),
            {"validation": {"holdout": 0.2, "time": "target"}},
            "invalid_input",
            "another column than the target",
        ),
        ((_iris()[0].slice(0, 3), _iris()[1]), {"validation": {"kfold": 5}}, "one_class", "only one class"),
        ((_iris()[0].take([0, 1, 60]), _iris()[1]), {"validation": {"kfold": 5}}, "too_few_rows", "at least 5 rows"),
        ((_iris()[0].slice(0, 0), _iris()[1]), {}, "invalid_input", "no rows"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_fit(
    data: Table, spec: dict[str, Any], code: str | None, said: str | None, tmp_path: Path
) -> None:
    whole = {"algorithm": "logistic-regression"} | spec
    if code is None:  # more folds than rows of a class: not stratified, and says so
        trained = run(data, tmp_path, metrics=["accuracy"], **whole)
        assert "not stratified" in trained.report["details"]["notes"][0]
        return
    with pytest.raises(InvalidInput) as refused:
        run(data, tmp_path, **whole)
    assert refused.value.code == code
    assert said
    assert said in refused.value.message


def test_group_and_time_columns_are_no_features(tmp_path: Path) -> None:
    from modelworks.core.specs import TrainingSpec

    table, columns = mixed()
    spec = TrainingSpec.model_validate(
        {
            "model": "m",
            "dataset": "d",
            "target": "ill",
            "algorithm": "logistic-regression",
            "validation": {"kfold": 3, "group": "clinic"},
        }
    )
    problem = pose(table, columns, spec)
    assert "clinic" not in {column.name for column in problem.columns}
    assert "day" in {column.name for column in problem.columns}
