"""How a job's process says how it ended, and what it tells on the way."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import CatalogUnavailable, InvalidInput, LeaseLost, MissingExtra, Unavailable
from modelworks.core.types import Job, JobEvent
from modelworks.jobs import child, context, steps
from modelworks.jobs.context import Context
from modelworks.jobs.queue import Queue, patiently
from modelworks.ml.base import Cancelled
from tests.jobhome import Home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    (home.root / "logs" / "jobs").mkdir()
    yield home
    home.close()


@pytest.fixture
def job(home: Home) -> Job:
    queue = Queue(home.catalog)
    with home.catalog.write() as tx:
        queue.enqueue(tx, Job(project_id="p", kind="train", spec={"seed": 7}))
    claimed = queue.claim("w", 10)
    assert claimed is not None
    return claimed


def made(home: Home, job: Job) -> Context:
    return Context(Queue(home.catalog), home.blobs, job, workdir=home.root / "tmp")


def run(home: Home, job: Job, monkeypatch: pytest.MonkeyPatch, work: Any) -> Job:
    """The job after its process did `work(step)`."""
    monkeypatch.setitem(steps.STEPS, "train", work)
    queue = Queue(home.catalog)
    assert child.run(job, queue, home.catalog, home.blobs, made(home, job), {"home": str(home.root)}) == 0
    return home.get(job)


def raising(error: BaseException) -> Any:
    def work(step: steps.Step) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidInput("no column x", param="target"), "failed", "invalid_input"),
        (MissingExtra("pip install 'modelworks[train]'"), "failed", "missing_extra"),
        (OSError(errno.EFBIG, "File too large"), "failed", "payload_too_large"),
        (ZeroDivisionError("secret: /home/x"), "failed", "internal"),
        (CatalogUnavailable("away"), "queued", None),
        (Unavailable("the site is down"), "queued", None),
        (OSError(errno.ENOSPC, "No space left on device", "/secret/path"), "queued", None),
        (MemoryError(), "queued", None),
        (LeaseLost("gone"), "running", None),
        (Cancelled(), "cancelled", None),
    ],
)
def test_how_a_job_ends_by_what_its_step_raises(
    home: Home, job: Job, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, code: str | None
) -> None:
    after = run(home, job, monkeypatch, raising(error))
    assert after.status == status
    assert (after.error or {}).get("code") == code
    assert after.idle_deaths == (1 if status == "queued" else 0)
    with home.catalog.read() as tx:
        shown = str(after.error) + str([event.message for event in tx.list(JobEvent)])
    assert "/secret" not in shown
    assert "/home" not in shown


def test_an_unexpected_error_points_at_a_trace_that_only_the_operator_sees(
    home: Home, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = run(home, job, monkeypatch, raising(ZeroDivisionError("secret")))
    assert after.error is not None
    where = f"logs/jobs/{job.id}.trace"
    assert where in after.error["message"]
    assert "secret" not in after.error["message"]
    assert "ZeroDivisionError: secret" in (home.root / where).read_text()


def test_progress_is_written_rarely_never_goes_back_and_always_at_the_end(
    home: Home, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(context.time, "monotonic", lambda: now[0])
    told = made(home, job)
    told.progress(0.5, "half", loss=1.0)
    told.progress(0.6, "too soon", accuracy=0.9)
    assert home.get(job).progress == 0.5
    now[0] += 0.3
    told.progress(0.1, "a part of it begins")
    assert (home.get(job).progress, home.get(job).stage) == (0.6, "a part of it begins")
    told.progress(1.0, "done")
    assert home.get(job).progress == 1.0
    with home.catalog.read() as tx:
        data = [event.data for event in tx.list(JobEvent, kind="progress", order_by=tx.table(JobEvent).c.seq)]
    assert data[1] == {"progress": 0.6, "accuracy": 0.9}  # what came too soon is told later


def test_checkpoints_come_back(home: Home, job: Job) -> None:
    kept = made(home, job)
    assert kept.seed == 7
    assert kept.restore("fold-1") is None
    kept.checkpoint("fold-1", b"first")
    kept.checkpoint("fold-1", b"second")
    assert made(home, job).restore("fold-1") == b"second"


def test_progress_of_a_catalog_that_is_away_is_left_out(home: Home, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: Any) -> None:
        raise CatalogUnavailable("away")

    told = made(home, job)
    monkeypatch.setattr(Queue, "progress", away)
    told.progress(0.5, "half", loss=1.0)
    monkeypatch.undo()
    told.progress(1.0, "done")
    with home.catalog.read() as tx:
        assert tx.find(JobEvent, kind="progress").data == {"progress": 1.0, "loss": 1.0}  # type: ignore[union-attr]


def test_a_write_that_matters_waits_for_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tries = [0.0], []
    monkeypatch.setattr(context.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(context.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def write() -> str:
        tries.append(now[0])
        if len(tries) < 4:
            raise CatalogUnavailable("away")
        return "written"

    assert patiently(write) == "written"
    tries.clear()
    with pytest.raises(CatalogUnavailable):
        patiently(lambda: (_ for _ in ()).throw(CatalogUnavailable("away")), 5.0)
    assert 5.0 < now[0] < 10.0
