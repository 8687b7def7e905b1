"""Searches and parallel folds as jobs of real workers: durable, deterministic, within the slots, and honest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from modelworks.core.specs import EvaluationSpec, TrainingSpec
from modelworks.core.types import FINAL_JOB_STATES, Job, JobEvent
from tests.jobhome import Home, caller, iris_csv, kill, until

WHO = caller()
SPACE = {"C": {"low": 0.001, "high": 100, "log": True}, "penalty": {"choices": ["l2", "l1"]}}
SEARCH = {"trials": 4, "metric": "log_loss", "space": SPACE, "parallel": 2, "pruner": "none"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("search") / "home")
    home.start(workers=2)
    home.ingest(WHO, iris_csv())
    yield home
    home.close()


def training(model: str, **more: Any) -> TrainingSpec:
    given = {"dataset": "iris", "target": "species", "algorithm": "logistic-regression", **more}
    return TrainingSpec.model_validate({"model": model, **given})


def parts(home: Home, job: Job, kind: str) -> list[Job]:
    with home.catalog.read() as tx:
        return tx.list(Job, parent_id=job.id, kind=kind)


def tries(job: Job) -> list[tuple[Any, ...]]:
    """What a search tried and found, without what a clock told."""
    lines = sorted(job.result["leaderboard"], key=lambda line: line["trial"])
    return [(line["hyperparameters"], line["value"], line["status"]) for line in lines]


@pytest.fixture(scope="module")
def searched(home: Home) -> Job:
    return home.succeeded(home.library.train(WHO, training("searched", search=SEARCH)))


def test_a_search_trains_its_best_trial(home: Home, searched: Job) -> None:
    board = searched.result["leaderboard"]
    values = [line["value"] for line in board]
    assert len(board) == 4
    assert values == sorted(values)  # log loss: smaller is better
    assert len(parts(home, searched, "trial")) == 4
    model = home.library.model_version(WHO, str(searched.model_version))
    best = board[0]["hyperparameters"]
    assert {**model.lineage["spec"]["hyperparameters"], **best} == model.lineage["spec"]["hyperparameters"]
    assert model.lineage["search"]["best"]["value"] == values[0]
    report = home.library.report(WHO, searched.result["report_id"])
    assert report.details["search"]["reported"] == "rows that chose nothing"
    assert report.details["search"]["leaderboard"] == board
    assert report.metrics["log_loss"]["mean"] != values[0]


def test_the_first_trial_is_what_was_given(searched: Job) -> None:
    first = tries(searched)[0]
    assert first[0]["C"] == 1.0
    assert first[0]["penalty"] == "l2"


def test_a_killed_search_goes_on_and_ends_alike(home: Home, searched: Job) -> None:
    job = home.library.train(WHO, training("killed", search=SEARCH))
    until(lambda: any(part.status == "succeeded" for part in parts(home, job, "trial")))
    kill(until(lambda: home.child_of(job)))
    done = home.succeeded(job)
    assert done.attempt == 2
    assert len(parts(home, job, "trial")) == 4  # none was repeated
    assert tries(done) == tries(searched)
    assert done.metrics == searched.metrics


def test_a_search_pauses_and_ends_with_its_trials(home: Home) -> None:
    job = home.library.train(WHO, training("paused", search={**SEARCH, "trials": 12}))
    until(lambda: any(part.status == "running" for part in parts(home, job, "trial")))
    home.library.pause(WHO, job.id)
    assert {part.status for part in parts(home, job, "trial")} <= {"paused", "succeeded"}
    home.library.resume(WHO, job.id)
    until(lambda: any(part.status == "succeeded" for part in parts(home, job, "trial")))
    home.library.cancel(WHO, job.id)
    assert home.ended(job).status == "cancelled"
    until(lambda: all(part.status in FINAL_JOB_STATES for part in parts(home, job, "trial")))


def test_trials_stay_within_the_slots(home: Home) -> None:
    job = home.library.train(WHO, training("slots", search={**SEARCH, "trials": 3, "parallel": 8}))
    most = 0
    while home.get(job).status not in FINAL_JOB_STATES:
        most = max(most, sum(part.status == "running" for part in parts(home, job, "trial")))
    assert home.succeeded(job)
    assert most == 2


def test_auto_ranks_the_families_within_its_time(home: Home) -> None:
    search = {
        "space": {"algorithm": {"choices": ["logistic-regression", "sgd-classifier"]}},
        "trials": 3,
        "parallel": 2,
    }
    job = home.succeeded(home.library.train(WHO, training("auto", algorithm="auto", search=search)))
    lines = sorted(job.result["leaderboard"], key=lambda line: line["trial"])
    assert [line["algorithm"] for line in lines[:2]] == ["logistic-regression", "sgd-classifier"]
    assert (
        home.library.model_version(WHO, str(job.model_version)).algorithm == job.result["leaderboard"][0]["algorithm"]
    )


def test_no_trial_begins_after_the_timeout(home: Home) -> None:
    search = {**SEARCH, "trials": 500, "timeout_s": 0.5}
    job = home.succeeded(home.library.train(WHO, training("late", search=search)))
    assert 1 <= len(job.result["leaderboard"]) < 10
    assert job.result["search"]["not_run"] > 490


def test_a_kfold_report_of_a_search_says_that_it_chose(home: Home) -> None:
    search = {**SEARCH, "trials": 2, "metric": "accuracy"}
    job = home.succeeded(home.library.train(WHO, training("chosen", validation={"kfold": 3}, search=search)))
    assert job.result["search"]["reported"] == "selection score"
    report = home.library.report(WHO, job.result["report_id"])
    assert report.metrics["accuracy"]["mean"] == pytest.approx(job.result["search"]["best"]["value"])
    assert any("chose the hyperparameters" in note for note in report.details["notes"])


def test_a_nested_search_tests_each_winner_on_its_fold(home: Home) -> None:
    search = {**SEARCH, "trials": 2, "nested": True}
    job = home.succeeded(home.library.train(WHO, training("nested", validation={"kfold": 2}, search=search)))
    assert job.result["search"]["reported"] == "rows that chose nothing"
    assert len(job.result["search"]["folds"]) == 2
    assert len(parts(home, job, "trial")) == 6
    assert len(job.metrics["accuracy"]["folds"]) == 2


def test_a_search_whose_trials_all_fail_says_why(home: Home) -> None:
    search = {"trials": 4, "parallel": 2, "space": {"eta0": {"low": 1e5, "high": 1e6}}, "pruner": "none"}
    given = {"learning_rate": "constant", "eta0": 1e5, "loss": "squared_error"}
    spec = training("hopeless", target="sepal length (cm)", features=["petal length (cm)"], algorithm="sgd-regressor",
                    hyperparameters=given, search=search)  # fmt: skip
    job = home.ended(home.library.train(WHO, spec))
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "diverged"


def test_folds_as_jobs_give_what_serial_ones_give(home: Home) -> None:
    serial = home.succeeded(home.library.train(WHO, training("serial", validation={"kfold": 4})))
    spread = home.succeeded(home.library.train(WHO, training("spread", validation={"kfold": 4, "parallel": 2})))
    assert len(parts(home, spread, "fold")) == 4
    assert spread.metrics == serial.metrics
    serial_model, spread_model = (home.library.model_version(WHO, f"{name}:1") for name in ("serial", "spread"))
    assert spread_model.lineage["spec"] == {**serial_model.lineage["spec"], "model": "spread"}
    assert home.library.report(WHO, spread.result["report_id"]).method == {"kfold": 4}
    method = {"kfold": 3, "parallel": 2}
    spec = EvaluationSpec.model_validate({"model": "serial:1", "method": method, "compare": "searched:1"})
    job = home.succeeded(home.library.evaluate(WHO, spec))
    assert len(parts(home, job, "fold")) == 6


def test_only_whole_jobs_are_listed_unless_asked(home: Home, searched: Job) -> None:
    assert all(job.parent_id is None for job in home.library.jobs(WHO, limit=100))
    found = home.library.jobs(WHO, parent=searched.id)
    assert {job.kind for job in found} == {"trial"}


def test_a_trial_tells_its_folds_as_metrics(home: Home, searched: Job) -> None:
    one = parts(home, searched, "trial")[0]
    with home.catalog.read() as tx:
        points = [event.data for event in tx.list(JobEvent, job_id=one.id, kind="metric")]
    assert [(point["unit"], point["step"]) for point in points] == [("fold", 1), ("fold", 2), ("fold", 3)]
    assert all(set(point["values"]) == {"log_loss"} for point in points)
