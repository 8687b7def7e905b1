"""The worker: `python -m modelworks.jobs.worker` claims jobs and runs each in a child process, one in each slot
and one of data beside them.

Everything happens on the main thread, which starts the children (PDEATHSIG follows the thread that forked). A worker
that is killed takes its children with it; the next one of the same home puts their jobs back at once.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelworks.core import stores, telemetry
from modelworks.core.errors import CatalogUnavailable, InvalidInput, LeaseLost
from modelworks.core.settings import Settings
from modelworks.core.types import Job, new_id
from modelworks.engines.memory import Gauge, last_words, tells_of_starving
from modelworks.engines.process import Child, attach, spawn, tail_log, trim_log
from modelworks.jobs.child import starvation
from modelworks.jobs.collection import collect, prune_logs
from modelworks.jobs.queue import STRIKES, Queue
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog, Watch

log = telemetry.logger("worker")

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
COLLECT_EVERY = 3600.0
CRASHES = 2  # attempts after which a job is given up whose own code ends its process: it would end each one
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGBUS, signal.SIGSYS})
_MEMORY_MB = {"ingest": 8192, "import": 8192, "edit": 8192, "diff": 8192}  # kinds that decode what comes from outside


@dataclass
class Running:
    """A job of this worker, from its claim until its process is gone."""

    job: Job
    child: Child
    workdir: Path
    logged: int = 0  # bytes of its log that earlier attempts wrote
    gauge: Gauge | None = None  # of its memory, where that is limited
    stopping: bool = False


class Worker:
    """`workers` jobs at a time of the catalog in `home`, beside one of data and those that only wait for their parts.

    `turn` is one pass of the loop.
    """

    def __init__(self, home: Path, settings: Settings, catalog: Catalog) -> None:
        self._home = home
        self._settings = settings
        self._catalog = catalog
        self._queue = Queue(catalog)
        self._watch = Watch(catalog)
        self._due = 0.0  # when there will be something to do, if nobody writes before
        self._place = f"{socket.gethostname()}:{home}#"
        self._owner = self._place + new_id("worker")
        self._running: list[Running] = []
        self._beat = 0.0
        self._collected = time.monotonic()
        self.stop = False

    def run(self) -> None:
        """Until `stop` is set; then what runs goes back to the queue."""
        self._take_over()
        while not self.stop:
            try:
                self.turn()
            except CatalogUnavailable as error:  # nothing healthy is stopped for it: leases are renewed when it is back
                log.warning("the catalog is away; jobs go on", reason=error.message)
            time.sleep(random.uniform(0.05, 0.15))
        self._put_back()

    def turn(self) -> None:
        """Reap what has ended, renew the leases, stop what must stop, start what can start."""
        self._reap()
        self._obey()
        if time.monotonic() >= self._due or self._watch.stirred():
            self._look()
        if time.monotonic() - self._collected > COLLECT_EVERY:
            self._collected = time.monotonic()
            threading.Thread(target=self._collect, name="collect", daemon=True).start()

    def _look(self) -> None:
        """Start what can start."""
        self._due = 0.0  # what is not done in this turn is looked at in the next
        self._watch.stirred()
        idle = self._queue.idle_for()
        if idle > 0:
            self._watch.seen()
            self._due = time.monotonic() + idle
        else:
            self._queue.reclaim()
            while job := self._queue.claim(
                self._owner,
                self._settings.lease_seconds,
                slots=self._settings.workers,
                lingering={running.job.id: running.job.kind for running in self._running},
            ):
                self._start(job)

    def _take_over(self) -> None:
        """What an earlier worker of this home left: its jobs, and its scratch folders."""
        while not self.stop:
            try:
                count = self._queue.release_owner(self._place)
                break
            except CatalogUnavailable as error:
                log.warning("the catalog is away", reason=error.message)
                time.sleep(0.2)
        else:
            return
        if count:
            log.info("jobs of an earlier worker are queued again", count=count)
        for folder in (self._home / "tmp").glob("job_*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, job: Job) -> None:
        # by token: an attempt that is being stopped keeps its own
        workdir = self._home / "tmp" / f"{job.id}.{job.token}"
        workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
        wanted = job.spec.get("resources", {})
        log_file = self._log(job)
        logged = log_file.stat().st_size if log_file.exists() else 0
        try:
            child = spawn(
                "modelworks.jobs.child",
                {
                    "home": str(self._home),
                    "job": job.id,
                    "token": job.token,
                    "workdir": str(workdir),
                    "offline": self._settings.offline,
                    "max_file": self._settings.max_upload,
                    "slots": self._settings.workers,
                    # their keys are told to those alone who read what tables point at
                    "stores": [one.model_dump() for one in stores.load(self._settings.stores)] if job.kind == "ingest" else [],
                },
                title=f"modelworks job {job.id} --home {self._home}",
                log=log_file,
                threads=int(wanted.get("threads", 1)),
                memory_mb=_memory_mb(job),
            )
        except (OSError, InvalidInput) as error:
            log.error("a job's process could not be started", job=job.id, reason=str(error))
            reason = error.strerror if isinstance(error, OSError) else "the file of --stores cannot be read"
            self._queue.ended(job.id, job.token, f"it could not be started ({reason})")
            return
        log.info("a job started", job=job.id, kind=job.kind, attempt=job.attempt, pid=child.pid)
        memory_mb = _memory_mb(job)
        gauge = Gauge(child.pid, memory_mb) if memory_mb else None
        self._running.append(Running(job, child, workdir, logged, gauge))

    def _log(self, job: Job) -> Path:
        return self._home / "logs" / "jobs" / f"{job.id}.log"

    def _reap(self) -> None:
        now = time.monotonic()
        for running in list(self._running):
            if running.gauge:
                running.gauge.look(now)
                if running.gauge.stuck and not running.stopping:
                    log.warning("a job hangs at its memory limit and is ended", job=running.job.id)
                    running.child.signal(signal.SIGABRT)
            code = running.child.poll()
            if code is None:
                continue
            job = running.job
            after = self._end(running, code)
            if after:
                log.warning("a job's process died", job=job.id, exit_code=code, status=after.status)
            shutil.rmtree(running.workdir, ignore_errors=True)
            self._running.remove(running)

    def _end(self, running: Running, code: int) -> Job | None:
        """Settle what the process left open: what would only happen again is not tried again."""
        job, wrote = running.job, tail_log(self._log(running.job), since=running.logged)
        memory_mb = _memory_mb(job)
        if code and memory_mb and (tells_of_starving(wrote) or _broke_near_its_limit(running, code)):
            with contextlib.suppress(LeaseLost):
                return self._queue.fail(job.id, job.token, starvation(job, memory_mb))
            return None
        if code == -signal.SIGXCPU:
            return self._queue.ended(job.id, job.token, "it used up the CPU time that one job may take", tries=1)
        tries = CRASHES if code > 0 or -code in _FAULTS else STRIKES
        return self._queue.ended(job.id, job.token, _reason(code, last_words(wrote)), tries=tries)

    def _obey(self) -> None:
        """Renew the leases when it is time, and end the processes of jobs that were cancelled, paused or lost."""
        held = {running.job.id: running.job.token for running in self._running if not running.stopping}
        now = time.monotonic()
        if now - self._beat >= self._settings.lease_seconds / 4:
            mine = {running.job.id: running.job.token for running in self._running if running.job.id not in held} | held
            self._queue.heartbeat(mine, self._settings.lease_seconds)
            self._beat = now
        for job_id, why in self._queue.stops(held).items():
            running = next(one for one in self._running if one.job.id == job_id and one.job.token == held[job_id])
            log.info("a job is stopped", job=job_id, why=why)
            running.stopping = True
            running.child.terminate(GRACE)

    def _put_back(self) -> None:
        for running in self._running:
            running.child.terminate(GRACE)
        until = time.monotonic() + GRACE + 1
        for running in self._running:
            running.child.wait(max(until - time.monotonic(), 0.0))
            with contextlib.suppress(LeaseLost, CatalogUnavailable):  # else its lease runs out
                self._queue.release(running.job.id, running.job.token)
            shutil.rmtree(running.workdir, ignore_errors=True)

    def _collect(self) -> None:
        try:
            removed = collect(self._catalog, Blobs(self._home / "blobs"))
            logs = prune_logs(
                self._catalog, self._home / "logs" / "jobs", older_than=self._settings.job_log_days * 86_400.0
            )
        except (CatalogUnavailable, OSError) as error:
            log.warning("unused blobs and old logs were not collected", reason=str(error))
            return
        log.info("unused blobs and old logs were collected", removed=removed, logs=logs)


def _broke_near_its_limit(running: Running, code: int) -> bool:
    """It ended by itself, without a word of memory: libraries that get none also crash in silence."""
    return bool(running.gauge and running.gauge.near) and (code > 0 or -code in _FAULTS)


def _memory_mb(job: Job) -> int | None:
    return job.spec.get("resources", {}).get("memory_mb") or _MEMORY_MB.get(job.kind)


def _reason(code: int, words: str) -> str:
    said = f"; the last line of its log: {words}" if words else ""
    if code >= 0:
        return f"its process ended with exit code {code} and no result{said}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its process was killed by {name}{said}"


def main() -> int:
    config: dict[str, Any] = attach()
    settings = Settings.model_validate(config["settings"])
    telemetry.configure(settings.log_level, "worker")
    home = Path(config["home"])
    catalog = Catalog(home / "catalog.sqlite", busy_timeout=2.0)
    worker = Worker(home, settings, catalog)

    def on_signal(number: int, frame: object) -> None:
        worker.stop = True

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    trim_log(home / "logs" / "worker.log")
    worker.run()
    catalog.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
