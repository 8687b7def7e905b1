"""The durable queue: jobs as rows, held by lease and fenced by token. Knows nothing of what a job does.

A job is held by whoever claimed it last: each claim raises its token, and every write of the holder names the token it
was given. A write with an older token, or on a job that is no longer held, raises LeaseLost and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import sqlalchemy as sa

from modelworks.core.errors import Conflict, LeaseLost
from modelworks.core.types import FINAL_JOB_STATES, Artifact, Checkpoint, Job, JobEvent, JobStatus
from modelworks.ml.base import Cancelled
from modelworks.store.catalog import Catalog, Tx

STRIKES = 5  # fruitless attempts in a row until a job is given up
MAX_ATTEMPTS = 1000  # guard against a job that takes its worker down each time
MAX_EVENTS = 10_000
MAX_TEXT = 2_000
HELD = ("running", "cancelling")
UPLOAD = "upload"  # kind of the artifact that keeps an uploaded file while its job is not done
_PROGRESSED = -1  # in `idle_deaths`: something was finished, so that the next death is not counted

Stop = Literal["cancelling", "paused", "lost"]
Held = Mapping[str, int]  # job id -> token


def backoff(strikes: int) -> float:
    """Seconds until a job is tried again after `strikes` fruitless attempts in a row."""
    return float(min(0.5 * 2 ** max(strikes - 1, 0), 60.0)) if strikes > 0 else 0.1


class Queue:
    """All times are the catalog's. Thread-safe, as the catalog is."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    # those who ask for work

    def enqueue(self, tx: Tx, job: Job) -> Job:
        """Add a queued job; it can be claimed as soon as the transaction is done."""
        job = tx.add(job.model_copy(update={"status": "queued", "available_at": tx.now()}))
        add_event(tx, job.id, "status", "queued")
        return job

    def cancel(self, tx: Tx, job: Job) -> Job:
        """A waiting job ends now; a running one is `cancelling` until its worker has stopped it."""
        if job.status in FINAL_JOB_STATES or job.status == "cancelling":
            return job
        if job.status in ("queued", "paused"):
            return _close(tx, job, "cancelled")
        return _move(tx, job, "cancelling")

    def pause(self, tx: Tx, job: Job) -> Job:
        """No longer held: its process stops, and what it has checkpointed stays. Conflict when the job has ended."""
        return job if job.status == "paused" else _move(tx, job, "paused", **_UNHELD)

    def resume(self, tx: Tx, job: Job) -> Job:
        if job.status in ("queued", "running"):
            return job
        if job.status != "paused":
            raise Conflict(f"a job that is {job.status} cannot be resumed", code="illegal_state")
        return _move(tx, job, "queued", available_at=tx.now(), idle_deaths=0)

    # the worker

    def claim(self, owner: str, lease_seconds: float) -> Job | None:
        """Hold the oldest job that may run, of the project with the fewest running; None when there is none."""
        with self._catalog.write() as tx:
            now = tx.now()
            job_id = _next(tx, now)
            if job_id is None:
                return None
            job = tx.get(Job, job_id)
            try:
                return _move(
                    tx,
                    job,
                    "running",
                    f"attempt {job.attempt + 1}",
                    token=job.token + 1,
                    attempt=job.attempt + 1,
                    lease_owner=owner,
                    lease_expires_at=now + lease_seconds,
                    started_at=job.started_at or now,
                    stage="starting",
                )
            except Conflict:  # another worker was faster
                return None

    def waiting(self) -> bool:
        """Whether there is something to claim or to reclaim. Only reads."""
        with self._catalog.read() as tx:
            now = tx.now()
            jobs = tx.table(Job)
            expired = sa.and_(jobs.c.status.in_(HELD), jobs.c.lease_expires_at < now)
            return tx.find(Job, sa.or_(_claimable(jobs, now), expired)) is not None

    def stops(self, held: Held) -> dict[str, Stop]:
        """Which of the jobs that the worker holds it must stop, and why. Only reads."""
        if not held:
            return {}
        with self._catalog.read() as tx:
            jobs = tx.table(Job)
            query = sa.select(jobs.c.id, jobs.c.token, jobs.c.status).where(jobs.c.id.in_(list(held)))
            rows = {row.id: row for row in tx.execute(query)}
        found: dict[str, Stop] = {}
        for job_id, token in held.items():
            row = rows.get(job_id)
            if row is None or row.token != token or row.status not in (*HELD, "paused"):
                found[job_id] = "lost"
            elif row.status != "running":
                found[job_id] = row.status
        return found

    def heartbeat(self, held: Held, lease_seconds: float) -> dict[str, Stop]:
        """Extend the leases, also those that ran out while nobody took the job. Returns what `stops` does."""
        if not held:
            return {}
        with self._catalog.write(durable=False) as tx:
            jobs = tx.table(Job)
            mine = sa.or_(*(sa.and_(jobs.c.id == job_id, jobs.c.token == token) for job_id, token in held.items()))
            tx.execute(
                sa.update(jobs)
                .where(mine, jobs.c.status.in_(HELD))
                .values(lease_expires_at=tx.now() + lease_seconds, revision=jobs.c.revision + 1)
            )
        return self.stops(held)

    def reclaim(self) -> int:
        """Take back the jobs whose lease has run out: to be tried again, or ended. Returns how many."""
        with self._catalog.write() as tx:
            jobs = tx.table(Job)
            expired = tx.list(Job, jobs.c.lease_expires_at < tx.now(), status=HELD)
            for job in expired:
                _give_up_hold(tx, job, "its worker was lost", strike=True)
        return len(expired)

    def release_owner(self, prefix: str) -> int:
        """Take back at once what an earlier worker of this place held; its children died too. No death is counted."""
        with self._catalog.write() as tx:
            jobs = tx.table(Job)
            orphans = tx.list(Job, jobs.c.lease_owner.startswith(prefix, autoescape=True), status=HELD)
            for job in orphans:
                _give_up_hold(tx, job, "its worker was lost", strike=False)
        return len(orphans)

    def release(self, job_id: str, token: int) -> None:
        """Put a held job back, because its worker stops. No death is counted."""
        with self._catalog.write() as tx:
            _give_up_hold(tx, held(tx, job_id, token), "its worker stopped", strike=False)

    def ended(self, job_id: str, token: int, reason: str, *, tries: int = STRIKES) -> Job | None:
        """The job's process is gone. Had it not said how the job ended, it died of `reason`: try again or give up.

        It is given up after `tries` fruitless attempts in a row. None when the job is someone else's by now, or was ended or paused.
        """
        with self._catalog.write() as tx:
            try:
                job = held(tx, job_id, token)
            except LeaseLost:
                return None
            return _give_up_hold(tx, job, reason, strike=True, tries=tries)

    # the job's process

    def progress(
        self, job_id: str, token: int, fraction: float, stage: str, metrics: dict[str, Any] | None = None
    ) -> None:
        """Write how far the job is; raises Cancelled or LeaseLost when it must stop. May be lost in a power cut."""
        with self._catalog.write(durable=False) as tx:
            job = still_running(tx, job_id, token)
            stage = stage[:200]
            tx.update(job, progress=fraction, stage=stage)
            if metrics or stage != job.stage or int(fraction * 20) > int(job.progress * 20):
                add_event(tx, job_id, "progress", stage, {"progress": round(fraction, 4), **(metrics or {})})

    def event(self, job_id: str, token: int, kind: str, message: str, data: dict[str, Any]) -> None:
        with self._catalog.write(durable=False) as tx:
            held(tx, job_id, token)
            add_event(tx, job_id, kind, message, data)

    def checkpoint(self, job_id: str, token: int, name: str, blob: str) -> None:
        """Keep `blob` as the finished part `name` of the job; a part that is there already is replaced."""
        with self._catalog.write() as tx:
            job = still_running(tx, job_id, token)
            known = tx.find(Checkpoint, job_id=job_id, name=name)
            if known:
                tx.update(known, blob=blob)
            else:
                tx.add(Checkpoint(job_id=job_id, name=name, blob=blob))
            tx.update(job, idle_deaths=_PROGRESSED)

    def restore(self, job_id: str, name: str) -> str | None:
        """The digest of the blob kept under `name`."""
        with self._catalog.read() as tx:
            found = tx.find(Checkpoint, job_id=job_id, name=name)
        return found.blob if found else None

    def finish(self, tx: Tx, job: Job, status: JobStatus = "succeeded", **changes: Any) -> Job:
        """End a job in the transaction that writes what it made. `job` is what `still_running` gave in the same one."""
        progress = {"progress": 1.0} if status == "succeeded" else {}
        return _close(tx, job, status, **progress, **changes)

    def fail(self, job_id: str, token: int, error: dict[str, Any], **changes: Any) -> Job:
        """End the job with `error` (`ModelworksError.as_dict()`); as cancelled when that was asked meanwhile."""
        with self._catalog.write() as tx:
            job = held(tx, job_id, token)
            if job.status == "cancelling":
                return _close(tx, job, "cancelled")
            return _close(tx, job, "failed", error=error, **changes)

    def retry(self, job_id: str, token: int, error: dict[str, Any]) -> Job:
        """An attempt came to nothing through no fault of the job's: try again after a while, or give up."""
        with self._catalog.write() as tx:
            return _strike(tx, held(tx, job_id, token), error)

    def cancelled(self, job_id: str, token: int) -> Job:
        with self._catalog.write() as tx:
            return _close(tx, held(tx, job_id, token), "cancelled")


def held(tx: Tx, job_id: str, token: int) -> Job:
    """The job as it is now, if `token` still holds it; else LeaseLost."""
    job = tx.find(Job, id=job_id)
    if job is None or job.token != token or job.status not in HELD:
        raise LeaseLost(f"job {job_id} is no longer held with token {token}; what it wrote is void")
    return job


def still_running(tx: Tx, job_id: str, token: int) -> Job:
    """As `held`, and Cancelled when someone asked for that."""
    job = held(tx, job_id, token)
    if job.status == "cancelling":
        raise Cancelled(job_id)
    return job


def add_event(tx: Tx, job_id: str, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
    """The next event of the job. Past MAX_EVENTS only what changes its state is kept."""
    events = tx.table(JobEvent)
    last = tx.execute(sa.select(sa.func.max(events.c.seq)).where(events.c.job_id == job_id)).scalar() or 0
    if last < MAX_EVENTS or kind in ("status", "error"):
        tx.add(JobEvent(job_id=job_id, seq=last + 1, kind=kind, message=message[:MAX_TEXT], data=data or {}))


_UNHELD: dict[str, Any] = {"lease_owner": None, "lease_expires_at": None}


def _claimable(jobs: Any, now: float) -> Any:
    return sa.and_(jobs.c.status == "queued", jobs.c.available_at <= now)


def _next(tx: Tx, now: float) -> str | None:
    jobs = tx.table(Job)
    project = jobs.c.project_id
    oldest = sa.select(project, sa.func.min(jobs.c.id)).where(_claimable(jobs, now)).group_by(project)
    active = sa.select(project, sa.func.count()).where(jobs.c.status.in_(HELD)).group_by(project)
    running = dict(tuple(row) for row in tx.execute(active))
    first = min(tx.execute(oldest), key=lambda row: (running.get(row[0], 0), row[1]), default=None)
    return first[1] if first else None


def _move(tx: Tx, job: Job, status: JobStatus, message: str = "", **changes: Any) -> Job:
    job = tx.update(job, status=status, **changes)
    add_event(tx, job.id, "status", f"{status}: {message}" if message else status, {"status": status})
    return job


def _close(tx: Tx, job: Job, status: JobStatus, **changes: Any) -> Job:
    """The job's last change; what was kept only for it goes."""
    if error := changes.get("error"):
        add_event(tx, job.id, "error", str(error["message"]), {"code": error["code"]})
    job = _move(tx, job, status, finished_at=tx.now(), **_UNHELD, **changes)
    tx.delete_where(Checkpoint, tx.table(Checkpoint).c.job_id == job.id)
    artifacts = tx.table(Artifact)
    tx.delete_where(Artifact, artifacts.c.owner_id == job.id, artifacts.c.kind == UPLOAD)
    return job


def _give_up_hold(tx: Tx, job: Job, reason: str, *, strike: bool, tries: int = STRIKES) -> Job:
    if job.status == "cancelling":
        return _close(tx, job, "cancelled")
    if not strike and job.attempt < MAX_ATTEMPTS:
        return _requeue(tx, job, reason, 0.0)
    return _strike(tx, job, {"message": reason, "code": "died", "status": 500}, tries)


def _strike(tx: Tx, job: Job, error: dict[str, Any], tries: int = STRIKES) -> Job:
    if job.status == "cancelling":
        return _close(tx, job, "cancelled")
    strikes = job.idle_deaths + 1
    if strikes < tries and job.attempt < MAX_ATTEMPTS:
        return _requeue(tx, job, str(error["message"]), backoff(strikes), idle_deaths=strikes)
    verb = "died" if error["code"] == "died" else "failed"
    often = "once" if strikes <= 1 else f"{strikes} times"
    message = f"the job {verb} {often} without finishing a part of it; at last: {error['message']}"
    return _close(tx, job, "failed", error={**error, "message": message}, idle_deaths=strikes)


def _requeue(tx: Tx, job: Job, reason: str, delay: float, **changes: Any) -> Job:
    when = tx.now() + delay
    return _move(tx, job, "queued", reason, available_at=when, stage="waiting to be tried again", **_UNHELD, **changes)
