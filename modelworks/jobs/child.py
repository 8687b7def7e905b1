"""One job in one process: `python -m modelworks.jobs.child`, started by the worker with the job's id and token.

How the job ended is written here, guarded by the token; a process that dies without a word is the worker's to judge.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import IO, Any

from modelworks.core.errors import (
    CatalogUnavailable,
    InvalidInput,
    LeaseLost,
    ModelworksError,
    PayloadTooLarge,
    Unavailable,
)
from modelworks.core.types import Job
from modelworks.engines.memory import limited_to, starved
from modelworks.engines.process import attach
from modelworks.jobs.context import Context
from modelworks.jobs.queue import Queue, held, patiently
from modelworks.ml.base import Cancelled
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog

CPU_SECONDS = {"import": 900}  # a graph from outside may loop for ever; SIGXCPU ends it
FILE_BYTES = ("ingest", "import")  # kinds whose files grow with what comes from outside


def main() -> int:
    config = attach()
    home = Path(config["home"])
    queue = Queue(catalog := Catalog(home / "catalog.sqlite"))
    blobs = Blobs(home / "blobs")
    workdir = Path(config["workdir"])
    os.chdir(workdir)

    def read() -> Job:
        with catalog.read() as tx:
            return held(tx, config["job"], config["token"])

    try:
        job = patiently(read)
    except LeaseLost:
        return 0
    _limit(job, config)
    threads = min(int(job.spec.get("resources", {}).get("threads", 1)), os.cpu_count() or 1)
    slots = int(config.get("slots", 1))
    context = Context(queue, blobs, job, workdir=workdir, threads=threads, slots=slots)
    return run(job, queue, catalog, blobs, context, config)


def run(job: Job, queue: Queue, catalog: Catalog, blobs: Blobs, context: Context, config: dict[str, Any]) -> int:
    """Do the work, and write how it ended: the one place where any exception of a job is met."""
    from modelworks.jobs.steps import STEPS, Step

    step = Step(
        job,
        queue,
        catalog,
        blobs,
        context,
        offline=bool(config.get("offline")),
        memory_mb=limited_to(),
        stores=config.get("stores", ()),
    )
    try:
        context.event("log", f"{job.kind} started (attempt {job.attempt})")
        STEPS[job.kind](step)
    except (LeaseLost, Cancelled) as error:
        with contextlib.suppress(LeaseLost):
            if isinstance(error, Cancelled):
                patiently(lambda: queue.cancelled(job.id, job.token))
    except Exception as error:
        with _trace(Path(config["home"]), job.id) as file:
            traceback.print_exc(file=file)
        with contextlib.suppress(LeaseLost):
            context.flush()
        settle = partial(_settle, queue, job, error)
        with contextlib.suppress(LeaseLost):
            patiently(settle)
    return 0


def _settle(queue: Queue, job: Job, error: Exception) -> None:
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        error = PayloadTooLarge("the data grows past what this server takes as one upload; split it")
    memory_mb = limited_to()
    if memory_mb is not None and starved(error):
        queue.fail(job.id, job.token, starvation(job, memory_mb))
    elif isinstance(error, (CatalogUnavailable, Unavailable)):
        queue.retry(job.id, job.token, error.as_dict())
    elif isinstance(error, ModelworksError):
        queue.fail(job.id, job.token, error.as_dict())
    elif isinstance(error, MemoryError):
        advice = "the job ran out of memory; give it more (resources.memory_mb), or fewer rows or features"
        queue.retry(job.id, job.token, {"message": advice, "code": "out_of_memory", "status": 500})
    elif isinstance(error, OSError):
        reason = f"a file could not be read or written ({error.strerror or type(error).__name__})"
        queue.retry(job.id, job.token, {"message": reason, "code": "io_error", "status": 500})
    else:
        where = f"logs/jobs/{job.id}.trace in the server's home has the details"
        message = f"the job broke on an unexpected error ({type(error).__name__}); {where}"
        queue.fail(job.id, job.token, {"message": message, "code": "internal", "status": 500})


def starvation(job: Job, memory_mb: int) -> dict[str, Any]:
    """The error of a job that ran into its memory limit, as it would each time."""
    if job.spec.get("resources", {}).get("memory_mb"):
        message = f"the job needs more than memory_mb={memory_mb} MiB; raise resources.memory_mb"
        return InvalidInput(message, code="out_of_memory", param="resources.memory_mb").as_dict()
    message = f"the job needs more than the {memory_mb} MiB that one of its kind may take; give it less at a time"
    return InvalidInput(message, code="out_of_memory", param="file").as_dict()


def _trace(home: Path, job_id: str) -> IO[str]:
    """For the operator alone: a trace holds paths, which a job's own log must not show."""
    return (home / "logs" / "jobs" / f"{job_id}.trace").open("a")


def _limit(job: Job, config: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if job.kind in FILE_BYTES:
        _bound(resource.RLIMIT_FSIZE, int(config["max_file"]))
    if job.kind in CPU_SECONDS:
        _bound(resource.RLIMIT_CPU, CPU_SECONDS[job.kind])


def _bound(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a fit that was left behind on a daemon thread must not hold the process
