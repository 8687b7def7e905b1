"""Metrics equal scikit-learn's, weighted too; intervals cover; splits respect classes, groups and time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as skm

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Gate, Method
from modelworks.ml.evaluate.catalogue import METRICS, check_metrics, describe, failed_gate, metrics_of
from modelworks.ml.evaluate.compare import compare, mcnemar
from modelworks.ml.evaluate.intervals import bootstrap, over_folds, over_rows
from modelworks.ml.evaluate.metrics import WeightedScorer, score
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.splits import plan

CLASSIFICATION, REGRESSION, ANOMALY = "tabular-classification", "tabular-regression", "anomaly-detection"


def guesses(classes: int, rows: int = 300, skill: float = 1.0, seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    true = random.integers(0, classes, rows)
    scores = random.normal(size=(rows, classes)).round(1)  # rounded, so that there are ties
    scores[np.arange(rows), true] += skill
    shares = np.exp(scores)
    return Predictions(np.arange(rows), true, shares / shares.sum(axis=1, keepdims=True))


def values(rows: int = 300, noise: float = 1.0, seed: int = 0) -> Predictions:
    random = np.random.default_rng(0)
    true = random.normal(size=rows)
    return Predictions(np.arange(rows), true, true + noise * np.random.default_rng(seed).normal(size=rows))


@pytest.mark.parametrize("predictions", [guesses(2), guesses(3), guesses(5, rows=40)])
def test_weighted_classification_metrics_equal_scikit_learns_with_sample_weight(predictions: Predictions) -> None:
    _agree(CLASSIFICATION, predictions)


def test_weighted_regression_metrics_equal_scikit_learns_with_sample_weight() -> None:
    _agree(REGRESSION, values())


def _agree(task: str, predictions: Predictions) -> None:
    """Drawing rows again is the same as weighing them; scikit-learn is asked about the rows drawn."""
    wanted = metrics_of(task)
    scorer = WeightedScorer(task, predictions, wanted)
    random = np.random.default_rng(1)
    for drawn in (np.arange(len(predictions.rows)), random.integers(0, len(predictions.rows), len(predictions.rows))):
        weights = np.bincount(drawn, minlength=len(predictions.rows)).astype(float)
        again = Predictions(predictions.rows[drawn], predictions.true[drawn], predictions.output[drawn])
        assert dict(zip(wanted, scorer(weights), strict=True)) == pytest.approx(score(task, again, wanted), abs=1e-12)


def test_weighted_metrics_of_anomalies_are_scikit_learns_of_the_rows_with_a_label() -> None:
    random = np.random.default_rng(2)
    true = random.choice([-1, 0, 1], 300, p=[0.2, 0.6, 0.2])
    said = np.round(np.abs(true) * true + random.normal(size=300), 1)  # with ties
    found = Predictions(np.arange(300), true, np.column_stack([said, said > 1]))
    weights = random.integers(0, 3, 300).astype(float)
    names = ["roc_auc", "average_precision", "precision", "recall", "f1"]
    known = true >= 0
    given: dict[str, Any] = {"sample_weight": weights[known]}
    areas = [f(true[known], said[known], **given) for f in (skm.roc_auc_score, skm.average_precision_score)]
    flags = skm.precision_recall_fscore_support(true[known], said[known] > 1, average="binary", **given)[:3]
    assert WeightedScorer(ANOMALY, found, names)(weights) == pytest.approx([*areas, *flags])
    assert list(score(ANOMALY, found.take(true < 0), names).values()) == [None] * 5


def test_every_metric_is_described_and_within_its_bounds() -> None:
    assert {entry["id"] for entry in describe()} == set(METRICS)
    for task, predictions in ((CLASSIFICATION, guesses(3)), (REGRESSION, values())):
        for name, value in score(task, predictions, metrics_of(task)).items():
            assert value is not None
            assert METRICS[name].low <= value <= METRICS[name].high


def test_an_undefined_metric_is_null_and_never_raises() -> None:
    one = guesses(3)
    one = one.take(one.true == 1)
    found = score(CLASSIFICATION, one, metrics_of(CLASSIFICATION))
    assert found["roc_auc"] is None
    assert found["accuracy"] is not None
    assert score(REGRESSION, values().take(np.arange(300) == 5), ["r2", "mse"])["r2"] is None
    folded = over_folds("roc_auc", [None, 0.8, 0.9])
    assert folded["mean"] == pytest.approx(0.85)
    assert folded["folds"] == [None, 0.8, 0.9]
    assert over_folds("roc_auc", [None])["mean"] is None


def test_the_interval_over_folds_is_students_and_clipped() -> None:
    folds = [0.9, 0.95, 0.85, 0.9, 0.92]
    found = over_folds("accuracy", folds)
    half = 2.7764451051977987 * np.std(folds, ddof=1) / np.sqrt(5)
    assert (found["low"], found["high"]) == pytest.approx((np.mean(folds) - half, np.mean(folds) + half))
    assert over_folds("accuracy", [1.0, 0.9])["high"] == 1.0
    assert over_folds("r2", [-3.0, 0.9])["low"] < -3


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Accuracy of a coin that is right in 80 % of the rows: the 95 % interval of 30 samples holds 0.8 most times."""
    hits = 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        right = random.random(120) < 0.8
        true = random.integers(0, 2, 120)
        chosen = np.where(right, true, 1 - true)
        coin = Predictions(np.arange(120), true, np.eye(2)[chosen] * 0.8 + 0.1)
        found, resamples = over_rows(CLASSIFICATION, coin, {"accuracy": float(right.mean())}, seed)
        hits += found["accuracy"]["low"] <= 0.8 <= found["accuracy"]["high"]
        assert resamples == 1000
    assert 26 <= hits <= 30


def test_the_bootstrap_is_seeded_and_draws_repeated_rows_together() -> None:
    rows = np.array([0, 1, 2, 0, 1, 2])
    drawn = bootstrap([rows], lambda weights: [weights.tolist()], 3)
    assert (drawn[:, 0, :3] == drawn[:, 0, 3:]).all()
    assert (drawn == bootstrap([rows], lambda weights: [weights.tolist()], 3)).all()


def test_metrics_and_gates_are_checked() -> None:
    assert check_metrics(CLASSIFICATION, ["f1"], [Gate(metric="accuracy", at_least=0.9)]) == ["f1", "accuracy"]
    with pytest.raises(InvalidInput, match="choose from: mse, rmse"):
        check_metrics(REGRESSION, ["accuracy"])
    with pytest.raises(InvalidInput, match="at least one metric"):
        check_metrics(REGRESSION, [])
    gates = [Gate(metric="rmse", at_most=1.0), Gate(metric="r2", at_least=0.5)]
    metrics: dict[str, Any] = {"rmse": {"mean": 1.0}, "r2": {"mean": None}}
    failed = failed_gate(gates, metrics)
    assert failed == (gates[1], None)


# compare


def test_a_better_model_is_called_better_and_the_other_way_round_worse() -> None:
    good, bad = guesses(3, skill=3.0), guesses(3, skill=0.5)
    found = compare(CLASSIFICATION, [good], [bad], ["log_loss", "accuracy"], 0)
    assert (found["verdict"], found["decided_by"]) == ("better", "accuracy")
    assert found["metrics"]["log_loss"]["difference"] < 0
    assert found["metrics"]["log_loss"]["verdict"] == "better"
    assert found["metrics"]["accuracy"]["p_value"] < 0.01
    assert found["mcnemar"]["p_value"] < 0.01
    assert compare(CLASSIFICATION, [bad], [good], ["accuracy"], 0)["verdict"] == "worse"


def test_a_model_is_not_better_than_itself_nor_than_its_equal() -> None:
    same = compare(REGRESSION, [values()], [values()], ["r2", "rmse"], 0)
    assert same["verdict"] == "no significant difference"
    assert same["metrics"]["r2"]["p_value"] == 1.0
    equal = compare(REGRESSION, [values(seed=1)], [values(seed=2)], ["rmse"], 0)
    assert equal["verdict"] == "no significant difference"
    assert equal["metrics"]["rmse"]["low"] < 0 < equal["metrics"]["rmse"]["high"]


def test_only_common_rows_are_compared() -> None:
    a, b = values(), values(noise=2.0, seed=1)
    found = compare(REGRESSION, [a.take(a.rows < 200)], [b.take(b.rows >= 100)], ["mse"], 0)
    assert found["rows"] == 100
    with pytest.raises(InvalidInput, match="no row in common"):
        compare(REGRESSION, [a.take(a.rows < 100)], [b.take(b.rows >= 100)], ["mse"], 0)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    true = np.zeros(20, dtype=np.int64)
    right, wrong = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    a = Predictions(np.arange(20), true, np.array([right] * 18 + [wrong] * 2))
    b = Predictions(np.arange(20), true, np.array([right] * 10 + [wrong] * 8 + [right] * 2))
    found = mcnemar(a, b)
    assert (found["only_model_right"], found["only_other_right"]) == (8, 2)
    assert found["p_value"] == pytest.approx(0.109375)


# splits

ROWS = np.arange(60)
Y = np.repeat([0, 1, 2], 20)


def _parts(method: Method, along: np.ndarray | None = None, task: str = CLASSIFICATION, y: np.ndarray = Y) -> Any:
    return plan(method, task, ROWS, y, along, 5)


def test_kfolds_are_scikit_learns() -> None:
    from sklearn import model_selection as ms

    for method, splitter, task in [
        (Method(kfold=4), ms.StratifiedKFold(4, shuffle=True, random_state=5), CLASSIFICATION),
        (Method(kfold=4), ms.KFold(4, shuffle=True, random_state=5), REGRESSION),
        (Method(kfold=4, stratify=False), ms.KFold(4, shuffle=True, random_state=5), CLASSIFICATION),
        (Method(kfold=4, shuffle=False), ms.StratifiedKFold(4), CLASSIFICATION),
        (
            Method(kfold=4, repeats=2),
            ms.RepeatedStratifiedKFold(n_splits=4, n_repeats=2, random_state=5),
            CLASSIFICATION,
        ),
        (Method(kfold=4, repeats=2), ms.RepeatedKFold(n_splits=4, n_repeats=2, random_state=5), REGRESSION),
    ]:
        expected = list(splitter.split(ROWS[:, None], Y))
        found = _parts(method, task=task).parts
        assert len(found) == len(expected)
        for (train, test), (their_train, their_test) in zip(found, expected, strict=True):
            assert train.tolist() == their_train.tolist()
            assert test.tolist() == their_test.tolist()


def test_a_hold_out_is_stratified_where_it_can_be_and_says_where_it_cannot() -> None:
    made = _parts(Method(holdout=0.2))
    assert np.bincount(Y[made.parts[0][1]]).tolist() == [4, 4, 4]
    assert made.splitter["stratified"] is True
    assert made.notes == []
    rare = Y.copy()
    rare[0] = 3
    lone = _parts(Method(holdout=0.2), y=rare)
    assert lone.splitter["stratified"] is False
    assert "only one row" in lone.notes[0]
    with pytest.raises(InvalidInput, match="leave stratify out"):
        _parts(Method(holdout=0.2, stratify=True), y=rare)
    assert "fewer than 4 folds" in _parts(Method(kfold=4), y=rare).notes[0]


@pytest.mark.parametrize(
    ("method", "task"),
    [
        (Method(kfold=3, group="g"), CLASSIFICATION),
        (Method(kfold=3, group="g", repeats=2), CLASSIFICATION),
        (Method(kfold=3, group="g"), REGRESSION),
        (Method(kfold=3, group="g", repeats=2), REGRESSION),
        (Method(holdout=0.3, group="g"), CLASSIFICATION),
    ],
)
def test_groups_stay_together(method: Method, task: str) -> None:
    groups = ROWS % 12
    made = _parts(method, groups, task)
    assert len(made.parts) == (method.kfold or 1) * method.repeats
    for train, test in made.parts:
        assert not set(groups[train]) & set(groups[test])
        assert len(train) + len(test) == 60
    if method.repeats > 1:
        assert made.parts[0][1].tolist() != made.parts[3][1].tolist()


@pytest.mark.parametrize("method", [Method(kfold=4, time="t"), Method(holdout=0.25, time="t")])
def test_time_splits_train_on_the_past(method: Method) -> None:
    time = ROWS[::-1].copy()
    for train, test in _parts(method, time, y=ROWS % 3).parts:
        assert time[train].max() < time[test].min()


def test_too_few_rows_groups_or_classes_are_refused() -> None:
    for method, along, said in [
        (Method(kfold=61), None, "at least 61 rows, but there are 60"),
        (Method(kfold=5, group="g"), ROWS % 4, "at least 5 groups"),
        (Method(kfold=2, time="t"), ROWS, "one class only"),
    ]:
        with pytest.raises(InvalidInput, match=said):
            _parts(method, along)
    with pytest.raises(InvalidInput, match="leaves nothing on one side"):
        plan(Method(holdout=0.9), REGRESSION, ROWS[:2], Y, None, 0)
