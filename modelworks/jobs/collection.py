"""What goes by itself: blobs that no row refers to, once they are a day old, and the logs of jobs that ended long ago."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import sqlalchemy as sa

from modelworks.core.types import FINAL_JOB_STATES, Artifact, Checkpoint, Dataset, Job, ModelVersion
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog


def collect(catalog: Catalog, blobs: Blobs, *, older_than: float = 86_400.0) -> int:
    """Remove the blobs that no dataset, artifact, model version or checkpoint names; returns how many.

    Blobs younger than `older_than` seconds stay: a job that is about to name them may be under way.
    """
    kept = ((Dataset, "blob"), (Artifact, "digest"), (ModelVersion, "digest"), (Checkpoint, "blob"))
    with catalog.read() as tx:
        marked = {
            digest for noun, column in kept for (digest,) in tx.execute(sa.select(tx.table(noun).c[column]).distinct())
        }
    return blobs.collect(marked, older_than=older_than)


def prune_logs(catalog: Catalog, folder: Path, *, older_than: float) -> int:
    """Remove the logs and traces in `folder` that nobody wrote to for `older_than` seconds, unless their job may go on."""
    with catalog.read() as tx:
        jobs = tx.table(Job)
        going_on = jobs.c.status.not_in(sorted(FINAL_JOB_STATES))
        kept = {row.id for row in tx.execute(sa.select(jobs.c.id).where(going_on))}
    removed = 0
    for path in folder.glob("job_*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stem not in kept and time.time() - path.stat().st_mtime > older_than:
                path.unlink()
                removed += 1
    return removed
