"""Jobs that are parts of another one: the folds of a validation and the trials of a search, run beside each other.

A job that waits for its parts leaves its slot to them. When it is killed, they go on; when it starts again, it finds
them; when it ends, is cancelled or paused, so are they.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from modelworks.core.errors import InvalidInput, ModelworksError, from_dict
from modelworks.core.types import FINAL_JOB_STATES, Job
from modelworks.jobs.queue import Queue, patiently

if TYPE_CHECKING:
    from modelworks.jobs.context import Context

POLL = 0.1  # seconds between two looks at the parts
WORTH = 6.0  # seconds that one part takes, from which on a process of its own pays without being asked for


class Delivered(Exception):
    """Raised in the process of a part once its result is a blob."""

    def __init__(self, blob: str) -> None:
        super().__init__(blob)
        self.blob = blob


def at_once(context: Context, parallel: int | None) -> int:
    """How many parts may run at a time: as asked, but never more than slots, nor than cores for their threads."""
    cores = max(1, (os.cpu_count() or 1) // max(1, context.threads * context.processes))
    return max(1, min(parallel or context.slots, context.slots, cores))


@contextlib.contextmanager
def waiting(context: Context, queue: Queue) -> Iterator[bool]:
    """Without a slot inside; has one again afterwards. Yields False where it had to keep it: nothing is to be awaited."""
    job = context.job
    let = patiently(lambda: queue.let_go(job.id, job.token, context.slots))
    yield let
    while let and not patiently(lambda: queue.take(job.id, job.token, context.slots)):
        time.sleep(POLL)


def spread_folds(context: Context, queue: Queue, names: Sequence[str], parallel: int | None, seconds: float) -> None:
    """Have the parts `names` computed as jobs, unless that is no faster than to do it here."""
    job, count = context.job, at_once(context, parallel)
    if count < 2 or (parallel is None and (seconds < WORTH or not queue.idle(job.lease_owner, context.slots))):
        return
    with waiting(context, queue) as let:
        if not let:
            return
        context.event("log", f"{len(names)} parts as jobs of their own, {count} at a time")
        _fold_jobs(context, queue, names, count)


def _fold_jobs(context: Context, queue: Queue, names: Sequence[str], count: int) -> None:
    job, before = context.job, context.fraction
    while True:
        parts = {part.spec["part"]: part for part in patiently(lambda: queue.parts(job.id, "fold"))}
        for name in names:
            _check(name, parts.get(name))
        done = sum(name in parts and parts[name].status == "succeeded" for name in names)
        if done == len(names):
            return
        context.progress(before + (0.78 - before) * max(0, done) / len(names), f"{done} of {len(names)} parts are done")
        active = sum(part.status not in FINAL_JOB_STATES for part in parts.values())
        fresh = [name for name in names if name not in parts][: max(0, count - active)]
        if fresh:
            made = [_fold(job, name) for name in fresh]
            patiently(lambda made=made: queue.add_parts(job.id, job.token, made))  # type: ignore[misc]
        time.sleep(POLL)


def _fold(job: Job, name: str) -> Job:
    return Job(project_id=job.project_id, kind="fold", spec={**job.spec, "part": name, "of": job.kind})


def _check(name: str, part: Job | None) -> None:
    if part is None or part.status not in FINAL_JOB_STATES or part.status == "succeeded":
        return
    raise error_of(part, name)


def error_of(part: Job, name: str) -> ModelworksError:
    """Why a part that did not succeed did not."""
    if part.error:
        return from_dict(part.error)
    return InvalidInput(
        f"{name} (job {part.id}) was {part.status}, so the whole cannot be finished", code="part_missing"
    )
