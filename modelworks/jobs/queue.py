"""The durable queue: jobs as rows, held by lease and fenced by token. Knows nothing of what a job does.

A job is held by whoever claimed it last: each claim raises its token, and every write of the holder names the token it
was given. A write with an older token, or on a job that is no longer held, raises LeaseLost and changes nothing.

Two lanes: jobs of data (DATA_JOBS) have one slot of their own beside a worker's slots, so that an upload does not wait
for trainings. More of them run in slots that nobody else waits for, up to as many as there are slots in all, so that
one slot is always for the others. A worker of n slots thus has at most n + 1 jobs at work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import sqlalchemy as sa

from modelworks.core.errors import CatalogUnavailable, Conflict, LeaseLost
from modelworks.core.types import (
    DATA_JOBS,
    FINAL_JOB_STATES,
    Artifact,
    Checkpoint,
    Job,
    JobEvent,
    JobKind,
    JobStatus,
    ModelVersion,
    Slot,
)
from modelworks.ml.base import Cancelled
from modelworks.store.catalog import Catalog, Tx

STRIKES = 5  # fruitless attempts in a row until a job is given up
MAX_ATTEMPTS = 1000  # guard against a job that takes its worker down each time
MAX_EVENTS = 10_000
MIN_WAITING = 2  # jobs that may wait for their parts at the same time, however few slots a worker has
MAX_TEXT = 2_000
HELD = ("running", "cancelling")
UPLOAD = "upload"  # kind of the artifact that keeps an uploaded file while its job is not done
_PROGRESSED = -1  # in `idle_deaths`: something was finished, so that the next death is not counted

_PATIENCE = 60.0  # seconds that a write which matters waits for a catalog that is away

T = TypeVar("T")
Stop = Literal["cancelling", "paused", "lost"]
Held = Mapping[str, int]  # job id -> token


def backoff(strikes: int) -> float:
    """Seconds until a job is tried again after `strikes` fruitless attempts in a row."""
    return float(min(0.5 * 2 ** max(strikes - 1, 0), 60.0)) if strikes > 0 else 0.1


def patiently(write: Callable[[], T], patience: float = _PATIENCE) -> T:
    """`write()`, again and again while the catalog is away; after `patience` seconds its CatalogUnavailable goes up."""
    until = time.monotonic() + patience
    while True:
        try:
            return write()
        except CatalogUnavailable as error:
            if time.monotonic() > until:
                raise
            time.sleep(min(error.retry_after or 0.5, 0.5))


class Queue:
    """All times are the catalog's. Thread-safe, as the catalog is."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._turn = 0
        self._served: dict[tuple[bool, str], int] = {}  # (of data, project) -> its last turn: equal projects alternate

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
        for part in _open_parts(tx, job):
            self.cancel(tx, part)
        return _move(tx, job, "cancelling")

    def pause(self, tx: Tx, job: Job) -> Job:
        """No longer held: its process stops, and what it has checkpointed stays. Conflict when the job has ended.

        The parts that it is waiting for pause and resume with it.
        """
        if job.status == "paused":
            return job
        for part in _open_parts(tx, job):
            if part.status in ("queued", "running"):
                self.pause(tx, part)
        return _move(tx, job, "paused", **_UNHELD)

    def resume(self, tx: Tx, job: Job) -> Job:
        if job.status in ("queued", "running"):
            return job
        if job.status != "paused":
            raise Conflict(f"a job that is {job.status} cannot be resumed", code="illegal_state")
        for part in _open_parts(tx, job):
            if part.status == "paused":
                self.resume(tx, part)
        return _move(tx, job, "queued", available_at=tx.now(), idle_deaths=0)

    # the worker

    def claim(
        self, owner: str, lease_seconds: float, *, slots: int | None = None, lingering: Mapping[str, JobKind] | None = None
    ) -> Job | None:
        """Hold the next job that may run: in each lane, of the project with the fewest running the oldest. None: there is none.

        Also None when the jobs that `owner` holds, and those whose processes are `lingering`, fill its `slots`.
        """
        with self._catalog.write() as tx:
            now = tx.now()
            mine = _holds(tx, owner)
            there = {job_id: _Hold(kind, "taken") for job_id, kind in (lingering or {}).items()} | mine
            with_parts = _waiting(mine) < max(slots or MIN_WAITING, MIN_WAITING)
            job_id = None
            for of_data in _lanes(there, slots):
                if job_id := self._next(tx, now, of_data, with_parts):
                    break
            if job_id is None:
                return None
            job = tx.get(Job, job_id)
            try:
                self._turn += 1
                self._served[job.kind in DATA_JOBS, job.project_id] = self._turn
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
                    slot="taken" if job.slot == "taken" else "later",
                )
            except Conflict:  # another worker was faster
                return None

    def _next(self, tx: Tx, now: float, of_data: bool, with_parts: bool) -> str | None:
        """`with_parts`: whether it may be one that will wait for parts."""
        jobs = tx.table(Job)
        project = jobs.c.project_id
        lane = jobs.c.kind.in_(DATA_JOBS) if of_data else jobs.c.kind.not_in(DATA_JOBS)
        may = sa.and_(_claimable(jobs, now), lane, sa.true() if with_parts else jobs.c.slot == "taken")
        oldest = sa.select(project, sa.func.min(jobs.c.id)).where(may).group_by(project)
        busy = sa.and_(jobs.c.status.in_(HELD), jobs.c.slot != "free", lane)
        active = sa.select(project, sa.func.count()).where(busy).group_by(project)
        running = dict(tuple(row) for row in tx.execute(active))
        waiting = [(running.get(name, 0), self._served.get((of_data, name), 0), first) for name, first in tx.execute(oldest)]
        return min(waiting)[2] if waiting else None

    def idle_for(self) -> float:
        """Seconds until there is something to claim or to reclaim, if nobody writes before; 0 when there is. Only reads."""
        with self._catalog.read() as tx:
            now = tx.now()
            jobs = tx.table(Job)
            when = sa.case((jobs.c.status == "queued", jobs.c.available_at), else_=jobs.c.lease_expires_at)
            first = tx.execute(sa.select(sa.func.min(when)).where(jobs.c.status.in_(["queued", *HELD]))).scalar()
        return math.inf if first is None else max(0.0, float(first) - now)

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

    def advise(self, job_id: str, token: int, found: dict[str, Any]) -> None:
        """Keep what the run is expected to take as `advice` in its result, also while it runs."""
        with self._catalog.write(durable=False) as tx:
            job = held(tx, job_id, token)
            tx.update(job, result={**job.result, "advice": found})

    def event(self, job_id: str, token: int, kind: str, message: str, data: dict[str, Any]) -> None:
        self.events(job_id, token, [(kind, message, data)])

    def events(self, job_id: str, token: int, events: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Several at once, each (kind, message, data)."""
        with self._catalog.write(durable=False) as tx:
            held(tx, job_id, token)
            for kind, message, data in events:
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

    def parts(self, job_id: str, kind: JobKind | None = None) -> list[Job]:
        """The jobs that are parts of this one, oldest first."""
        with self._catalog.read() as tx:
            chosen = sa.true() if kind is None else tx.table(Job).c.kind == kind
            return tx.list(Job, chosen, parent_id=job_id)

    def add_parts(self, job_id: str, token: int, parts: Sequence[Job]) -> list[Job]:
        """Queue `parts` of the job, which the same user asked for; raises Cancelled or LeaseLost as `progress` does."""
        with self._catalog.write() as tx:
            job = still_running(tx, job_id, token)
            whose = {"project_id": job.project_id, "created_by": job.created_by, "parent_id": job.id}
            return [self.enqueue(tx, part.model_copy(update=whose)) for part in parts]

    def stop_part(self, job_id: str, token: int, part_id: str) -> None:
        with self._catalog.write() as tx:
            still_running(tx, job_id, token)
            self.cancel(tx, tx.get(Job, part_id))

    def let_go(self, job_id: str, token: int, slots: int) -> bool:
        """Leave the slot to the job's parts while it waits for them. False when too many wait already."""
        with self._catalog.write() as tx:
            job = still_running(tx, job_id, token)
            if job.slot == "taken" and _waiting(_holds(tx, job.lease_owner)) >= max(slots, MIN_WAITING):
                return False
            tx.update(job, slot="free")
        return True

    def take(self, job_id: str, token: int, slots: int) -> bool:
        """Have a slot again, before anything is computed; False while others fill them: ask again."""
        with self._catalog.write() as tx:
            job = still_running(tx, job_id, token)
            others = {other: hold for other, hold in _holds(tx, job.lease_owner).items() if other != job.id}
            taken = _filled(others, ("taken", "later")) < slots
            tx.update(job, slot="taken" if taken else "wanted")
        return taken

    def idle(self, owner: str | None, slots: int) -> int:
        """How many of the owner's slots are neither taken nor waited for."""
        with self._catalog.read() as tx:
            jobs = tx.table(Job)
            waits = tx.find(Job, _claimable(jobs, tx.now())) is not None
            return 0 if waits else max(0, slots - _filled(_holds(tx, owner)))

    def deliver(self, tx: Tx, job: Job, name: str, blob: str) -> None:
        """A part's result becomes the checkpoint `name` of the job that it is a part of, which has got on by it."""
        parent = tx.find(Job, id=job.parent_id)
        if parent is None or parent.status in FINAL_JOB_STATES:
            return
        known = tx.find(Checkpoint, job_id=parent.id, name=name)
        if known:
            tx.update(known, blob=blob)
        else:
            tx.add(Checkpoint(job_id=parent.id, name=name, blob=blob))
        tx.update(parent, idle_deaths=_PROGRESSED)

    def package_of(self, project_id: str, name: str, version: int) -> str | None:
        """The digest of a model version's package."""
        with self._catalog.read() as tx:
            found = tx.find(ModelVersion, project_id=project_id, name=name, version=version)
        return found.digest if found else None

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


class _Hold(NamedTuple):
    kind: JobKind
    slot: Slot


def _holds(tx: Tx, owner: str | None) -> dict[str, _Hold]:
    """The jobs that `owner` holds, by their ids."""
    jobs = tx.table(Job)
    query = sa.select(jobs.c.id, jobs.c.kind, jobs.c.slot).where(jobs.c.lease_owner == owner, jobs.c.status.in_(HELD))
    return {row.id: _Hold(row.kind, row.slot) for row in tx.execute(query)}


def _of_data(holds: Mapping[str, _Hold]) -> int:
    return sum(hold.kind in DATA_JOBS for hold in holds.values())


def _filled(holds: Mapping[str, _Hold], having: Collection[Slot] = ("taken", "later", "wanted")) -> int:
    """How many slots are filled; one job of data has a place beside them."""
    others = sum(hold.slot in having and hold.kind not in DATA_JOBS for hold in holds.values())
    return others + max(0, _of_data(holds) - 1)


def _lanes(holds: Mapping[str, _Hold], slots: int | None) -> list[bool]:
    """From which lanes a job may be claimed, the one whose turn it is first. True: the lane of data."""
    if not _of_data(holds):
        return [True] if slots is not None and _filled(holds) >= slots else [True, False]
    if slots is None:
        return [False, True]
    if _filled(holds) >= slots:
        return []
    return [False, True] if _of_data(holds) < slots else [False]


def _waiting(holds: Mapping[str, _Hold]) -> int:
    """How many have parts: they hold a process each, also while they hold no slot."""
    return sum(hold.slot != "taken" for hold in holds.values())


def _move(tx: Tx, job: Job, status: JobStatus, message: str = "", **changes: Any) -> Job:
    job = tx.update(job, status=status, **changes)
    add_event(tx, job.id, "status", f"{status}: {message}" if message else status, {"status": status})
    return job


def _close(tx: Tx, job: Job, status: JobStatus, **changes: Any) -> Job:
    """The job's last change; what was kept only for it goes."""
    if error := changes.get("error"):
        add_event(tx, job.id, "error", str(error["message"]), {"code": error["code"]})
    for part in _open_parts(tx, job):
        if part.status in ("queued", "paused"):
            _close(tx, part, "cancelled")
        elif part.status != "cancelling":
            _move(tx, part, "cancelling")
    job = _move(tx, job, status, finished_at=tx.now(), **_UNHELD, **changes)
    tx.delete_where(Checkpoint, tx.table(Checkpoint).c.job_id == job.id)
    artifacts = tx.table(Artifact)
    tx.delete_where(Artifact, artifacts.c.owner_id == job.id, artifacts.c.kind == UPLOAD)
    return job


def _open_parts(tx: Tx, job: Job) -> list[Job]:
    return tx.list(Job, tx.table(Job).c.status.not_in(FINAL_JOB_STATES), parent_id=job.id)


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
