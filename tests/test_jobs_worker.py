"""Real workers and real job processes: from a CSV to a model version, also when something is killed on the way."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from modelworks.core.errors import InvalidInput, LeaseLost
from modelworks.core.specs import TrainingSpec
from modelworks.core.types import Artifact, AuditRecord, Checkpoint, Job, JobEvent, ModelVersion, Report
from modelworks.jobs import steps
from modelworks.jobs.context import Context
from modelworks.jobs.queue import Queue, still_running
from modelworks.jobs.steps import Step
from tests.jobhome import IRIS, LONG, Home, caller, gone, iris_csv, kill, until

WHO = caller()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home whose worker runs throughout, with the iris data in it."""
    home = Home(tmp_path_factory.mktemp("busy") / "home")
    home.start()
    home.ingest(WHO, iris_csv())
    yield home
    home.close()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    home.close()


def training(model: str = "iris", **more: Any) -> TrainingSpec:
    return TrainingSpec(model=model, dataset="iris", **{**IRIS, **more})


def folds(home: Home, job: Job, *, resumed: bool) -> int:
    with home.catalog.read() as tx:
        events = tx.list(JobEvent, job_id=job.id, kind="fold")
    return sum(event.data["resumed"] is resumed for event in events)


def statuses(home: Home, job: Job) -> list[str]:
    with home.catalog.read() as tx:
        events = tx.list(JobEvent, job_id=job.id, kind="status", order_by=tx.table(JobEvent).c.seq)
    return [event.message.partition(":")[0] for event in events]


def count(home: Home, noun: Any, **equals: Any) -> int:
    with home.catalog.read() as tx:
        return tx.count(noun, **equals)


@pytest.mark.slow
def test_the_same_file_and_the_same_training_again_make_no_new_version(busy: Home) -> None:
    again = busy.succeeded(busy.upload(WHO, iris_csv()))
    assert again.result["version"] == 1
    assert busy.ingest(WHO, iris_csv(slice(0, 149))).version == 2  # a changed row is another version

    first = busy.succeeded(busy.library.train(WHO, TrainingSpec(model="same", dataset="iris:1", **IRIS)))
    second = busy.succeeded(busy.library.train(WHO, TrainingSpec(model="same", dataset="iris:1", **IRIS)))
    assert first.metrics == second.metrics
    assert (first.model_version, second.model_version) == ("same:1", "same:1")
    assert first.result["digest"] == second.result["digest"]
    other = busy.succeeded(busy.library.train(WHO, TrainingSpec(model="same", dataset="iris:2", **IRIS)))
    assert other.model_version == "same:2"
    old, new = busy.library.model_versions(WHO, "same")
    assert old.lineage["dataset_digest"] != new.lineage["dataset_digest"]


def test_a_bundled_source_is_read(busy: Home) -> None:
    job = busy.succeeded(busy.library.upload_dataset(WHO, name="wine", source="sklearn:wine"))
    assert busy.library.dataset(WHO, "wine").source == "sklearn:wine"
    assert job.result == {
        "dataset": "wine:1", "dataset_id": busy.library.dataset(WHO, "wine").id, "name": "wine", "version": 1,
    }  # fmt: skip


def test_what_was_kept_for_a_job_goes_with_it(busy: Home) -> None:
    assert count(busy, Artifact, kind="upload") == 0
    assert count(busy, Checkpoint) == 0
    until(lambda: not list((busy.root / "tmp").glob("job_*")))


def test_a_version_comes_with_report_artifacts_alias_and_audit(busy: Home) -> None:
    job = busy.succeeded(busy.library.train(WHO, training("whole", alias="champion", validation={"kfold": 3})))
    model = busy.library.model_version(WHO, "whole@champion")
    assert model.ref == job.model_version
    assert model.metrics["accuracy"]["mean"] == job.metrics["accuracy"]["mean"] > 0.9
    report = busy.library.report(WHO, job.result["report_id"])
    assert (report.model_version, report.dataset_digest) == (model.ref, model.lineage["dataset_digest"])
    assert report.method == {"kfold": 3}
    with busy.catalog.read() as tx:
        kept = {artifact.kind for artifact in tx.list(Artifact, owner_id=model.id)}
        done = {(row.action, row.object) for row in tx.list(AuditRecord, principal=WHO.principal.key_id)}
    assert kept == {"manifest", "model.onnx"}
    assert {("models.create_version", model.ref), ("models.set_alias", "whole@champion")} <= done
    assert busy.blobs.get(model.digest)


def test_a_failed_gate_keeps_the_report_and_registers_nothing(busy: Home) -> None:
    spec = training("gated", gates=[{"metric": "accuracy", "at_least": 0.999}], alias="champion")
    job = busy.ended(busy.library.train(WHO, spec))
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "gate_failed"
    assert job.error["detail"]["gate"] == {"metric": "accuracy", "at_least": 0.999}
    assert job.error["detail"]["value"] == job.metrics["accuracy"]["mean"] < 0.999
    report = busy.library.report(WHO, job.error["detail"]["report_id"])
    assert report.details["gate"]["passed"] is False
    assert report.model_version is None
    assert count(busy, ModelVersion, name="gated") == 0
    assert busy.library.aliases(WHO, "gated") == []


@pytest.mark.slow
def test_evaluation_makes_a_report_and_compares(busy: Home) -> None:
    from modelworks.core.specs import EvaluationSpec

    busy.succeeded(busy.library.train(WHO, training("pair")))
    busy.succeeded(busy.library.train(WHO, training("pair", hyperparameters={"C": 0.001})))
    spec = EvaluationSpec(model="pair:1", compare="pair:2", method={"kfold": 3})
    job = busy.succeeded(busy.library.evaluate(WHO, spec))
    report = busy.library.report(WHO, job.result["report_id"])
    assert report.model_version == "pair:1"
    assert len(report.metrics["accuracy"]["folds"]) == 3
    assert report.details["comparison"]["with"] == "pair:2"
    assert job.metrics == report.metrics


def test_a_report_says_that_its_rows_were_trained_on(busy: Home) -> None:
    from modelworks.core.specs import EvaluationSpec

    busy.succeeded(busy.library.train(WHO, training("seen")))
    trained_on = busy.library.model_version(WHO, "seen:1").lineage["dataset"]  # other tests here add versions of iris
    spec = EvaluationSpec(model="seen:1", method={"test": trained_on})
    job = busy.succeeded(busy.library.evaluate(WHO, spec))
    notes = busy.library.report(WHO, job.result["report_id"]).details["notes"]
    assert any(f"these rows were trained on ({trained_on})" in note for note in notes), notes


def test_a_package_exported_here_is_imported_elsewhere_with_the_same_digest(busy: Home) -> None:
    busy.succeeded(busy.library.train(WHO, training("out")))
    model = busy.library.model_version(WHO, "out")
    file = busy.library.export_version(WHO, "out:1", busy.root / "tmp" / "out.mwp")
    there = caller("proj_b", "key_b")
    job = busy.succeeded(busy.library.import_version(there, name="in", path=file, filename="out.mwp"))
    found = busy.library.model_version(there, job.model_version or "")
    assert (found.ref, found.digest, found.project_id) == ("in:1", model.digest, "proj_b")


def test_what_is_no_model_is_refused_by_its_content(busy: Home) -> None:
    import pickle

    path = busy.root / "tmp" / "evil.onnx"
    path.write_bytes(pickle.dumps({"a": 1}))
    job = busy.ended(busy.library.import_version(WHO, name="evil", path=path, filename="evil.onnx"))
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["status"] == 415
    assert count(busy, ModelVersion, name="evil") == 0


def test_a_bad_file_fails_at_once_and_says_where(busy: Home) -> None:
    job = busy.ended(busy.upload(WHO, "a,b\n1,2\n3,4,5\n", "bad"))
    assert (job.status, job.attempt) == ("failed", 1)
    assert job.error is not None
    assert job.error["status"] == 400
    assert str(busy.root) not in str(job.error)


def test_a_cancelled_job_ends_and_leaves_nothing(busy: Home) -> None:
    job = busy.library.train(WHO, training("cancelled", **LONG))
    until(lambda: folds(busy, job, resumed=False) >= 1)
    pid = until(lambda: busy.child_of(job))
    for _ in range(2):
        assert busy.library.cancel(WHO, job.id).status in ("cancelling", "cancelled")
    assert busy.ended(job, 5).status == "cancelled"
    until(lambda: gone(pid), 5)
    assert busy.library.cancel(WHO, job.id).status == "cancelled"
    assert count(busy, ModelVersion, name="cancelled") == 0
    assert count(busy, Report, model="cancelled") == 0


def test_advice_is_a_job_that_registers_nothing(busy: Home) -> None:
    job = busy.succeeded(busy.library.train(WHO, training("advised", advise=True, validation={"kfold": 5})))
    advice = job.result["advice"]
    assert advice["fits"] == 6
    assert 0 < advice["seconds"] < 60
    assert advice["will_fit"]
    assert job.model_version is None
    assert count(busy, ModelVersion, name="advised") == 0
    with pytest.raises(InvalidInput, match="name one algorithm"):
        busy.library.train(WHO, training("advised", advise=True, algorithm="auto"))


@pytest.mark.slow
def test_a_job_without_enough_memory_fails_once_and_says_so(busy: Home) -> None:
    busy.succeeded(busy.library.train(WHO, training("fed", resources={"memory_mb": 512})))
    with pytest.raises(ValidationError, match="greater than or equal to 512"):
        training("starved", resources={"memory_mb": 511})
    read = busy.succeeded(busy.upload(WHO, iris_csv(), "fed"))
    for memory_mb in (64, 96):  # less than the libraries take, which end in several ways
        spec = read.spec | {"resources": {"memory_mb": memory_mb}}
        with busy.catalog.write() as tx:
            queued = Queue(busy.catalog).enqueue(tx, Job(project_id=read.project_id, kind="ingest", spec=spec))
        job = busy.ended(queued)
        assert job.status == "failed", job.error
        assert job.attempt == 1, job.error
        assert job.error is not None
        assert job.error["code"] == "out_of_memory", job.error
        assert job.error["message"] == (f"the job needs more than memory_mb={memory_mb} MiB; raise resources.memory_mb")


def test_a_paused_job_goes_on_after_its_last_fold(busy: Home) -> None:
    job = busy.library.train(WHO, training("paused", **LONG))
    until(lambda: folds(busy, job, resumed=False) >= 2)
    pid = until(lambda: busy.child_of(job))
    assert busy.library.pause(WHO, job.id).status == "paused"
    until(lambda: gone(pid), 5)
    assert busy.get(job).status == "paused"
    busy.library.resume(WHO, job.id)
    assert busy.succeeded(job).attempt == 2
    assert folds(busy, job, resumed=True) >= 2


@pytest.mark.slow
def test_a_job_whose_process_is_killed_ends_once_with_the_figures_of_an_unbroken_one(busy: Home) -> None:
    job = busy.library.train(WHO, training("broken", **LONG))
    for part in (1, 8):
        until(lambda part=part: folds(busy, job, resumed=False) >= part)
        kill(until(lambda: busy.child_of(job)))
        until(lambda: statuses(busy, job)[-1] == "queued")
    ended = busy.succeeded(job)
    assert ended.attempt == 3
    assert folds(busy, job, resumed=True) >= 8
    assert statuses(busy, job).count("succeeded") == 1
    unbroken = busy.succeeded(busy.library.train(WHO, training("broken", **LONG)))
    assert unbroken.attempt == 1
    assert ended.metrics == unbroken.metrics
    assert ended.result["digest"] == unbroken.result["digest"]
    assert count(busy, ModelVersion, name="broken") == 1


@pytest.mark.slow
def test_a_killed_worker_takes_its_jobs_with_it_and_the_next_one_goes_on(home: Home) -> None:
    worker = home.start(lease_seconds=30)  # far longer than this test waits: leases need not run out
    home.ingest(WHO, iris_csv())
    job = home.library.train(WHO, training(**LONG))
    until(lambda: folds(home, job, resumed=False) >= 3)
    pid = until(lambda: home.child_of(job))
    kill(worker.pid)
    until(lambda: gone(pid), 1)
    worker.wait(5)
    assert home.get(job).status == "running"  # nobody is there to say otherwise

    started = time.monotonic()
    home.start()
    until(lambda: home.get(job).attempt == 2)
    assert time.monotonic() - started < 10
    ended = home.succeeded(job)
    assert (ended.attempt, ended.idle_deaths) == (2, -1)
    assert folds(home, job, resumed=True) >= 3
    assert count(home, ModelVersion) == 1


def test_an_upload_is_read_while_a_training_fills_the_worker(home: Home) -> None:
    """Also after a kill of both: the training goes on from its last fold, and the upload is read once."""
    worker = home.start(workers=1)
    home.ingest(WHO, iris_csv())
    long = home.library.train(WHO, training("long", validation={"kfold": 50, "repeats": 20}))
    until(lambda: folds(home, long, resumed=False) > 1)
    upload = home.upload(WHO, iris_csv(slice(0, 120)))
    until(lambda: home.get(upload).status == "running")
    kill(worker.pid)
    assert worker.wait(5) is not None
    home.start(workers=1)
    assert home.succeeded(upload).result["version"] == 2
    until(lambda: folds(home, long, resumed=True) > 1)
    assert (home.get(long).status, home.get(long).attempt) == ("running", 2)
    home.library.cancel(WHO, long.id)
    assert home.ended(long).status == "cancelled"


def test_a_worker_that_is_told_to_stop_puts_its_jobs_back(home: Home) -> None:
    worker = home.start()
    home.ingest(WHO, iris_csv())
    job = home.library.train(WHO, training(**LONG))
    until(lambda: folds(home, job, resumed=False) >= 1)
    pid = until(lambda: home.child_of(job))
    worker.signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert gone(pid)
    after = home.get(job)
    assert (after.status, after.attempt, after.lease_owner) == ("queued", 1, None)
    assert after.idle_deaths <= 0
    assert not list((home.root / "tmp").glob("job_*"))


@pytest.mark.slow
def test_a_catalog_that_is_locked_for_longer_than_the_lease_stops_nothing(home: Home) -> None:
    home.start(lease_seconds=1.0)
    home.ingest(WHO, iris_csv())
    job = home.library.train(WHO, training(**LONG))
    until(lambda: folds(home, job, resumed=False) >= 1)
    lock = sqlite3.connect(home.root / "catalog.sqlite", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    time.sleep(4)  # the one thing here that is about real time: a lease that runs out
    lock.execute("ROLLBACK")
    lock.close()
    assert home.succeeded(job).attempt == 1


def test_the_commit_of_a_stale_lease_registers_nothing(home: Home) -> None:
    """A worker that was thought dead finishes its computation after another one took the job."""
    home.start()
    home.ingest(WHO, iris_csv())
    assert home.worker is not None
    home.worker.signal(signal.SIGTERM)
    home.worker.wait(10)
    job = home.library.train(WHO, training())
    queue = Queue(home.catalog)
    stale = queue.claim("w1", 10)
    assert stale is not None
    queue.release(stale.id, stale.token)
    fresh = queue.claim("w2", 10)
    assert fresh is not None

    with pytest.raises(LeaseLost):
        steps.train(_step(home, queue, stale))
    assert count(home, ModelVersion) == count(home, Report) == 0
    assert home.get(job) == fresh

    steps.train(_step(home, queue, fresh))
    with pytest.raises(LeaseLost), home.catalog.write() as tx:
        still_running(tx, fresh.id, fresh.token)  # it has ended: nothing more is written in its name
    assert home.get(job).model_version == "iris:1"
    assert count(home, ModelVersion) == count(home, Report) == 1


class _Deaf(Context):
    """A context that does not notice the loss: only the commit does."""

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None: ...

    def event(self, kind: str, message: str, **data: Any) -> None: ...

    def checkpoint(self, name: str, data: bytes) -> None: ...


def _step(home: Home, queue: Queue, job: Job) -> Step:
    folder = home.root / "tmp" / str(job.token)
    folder.mkdir()
    return Step(job, queue, home.catalog, home.blobs, _Deaf(queue, home.blobs, job, workdir=folder))
