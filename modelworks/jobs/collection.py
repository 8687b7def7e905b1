"""Blob collection: what no row refers to goes, once it is a day old."""

from __future__ import annotations

import sqlalchemy as sa

from modelworks.core.types import Artifact, Checkpoint, Dataset, ModelVersion
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
