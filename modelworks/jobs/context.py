"""What a running job sees of the queue: `Context` is the JobContext (ml/base.py) of a job's process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from modelworks.core.errors import CatalogUnavailable
from modelworks.core.types import Job
from modelworks.jobs.queue import Queue
from modelworks.store.blobs import Blobs

T = TypeVar("T")
_APART = 0.2  # seconds between two progress writes
_PATIENCE = 60.0  # seconds that a write which matters waits for a catalog that is away


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


class Context:
    """Thread-safe: a fit may report from another thread. Everything it writes is void once the lease is lost."""

    def __init__(self, queue: Queue, blobs: Blobs, job: Job, *, workdir: Path, threads: int = 1) -> None:
        self.seed = int(job.spec.get("seed", 0))
        self.threads = threads
        self.workdir = workdir
        self._queue = queue
        self._blobs = blobs
        self._id = job.id
        self._token = job.token
        self._lock = threading.Lock()
        self._fraction = 0.0
        self._written = 0.0
        self._metrics: dict[str, Any] = {}

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        """Never goes back; written five times a second at most, but for the end. Raises Cancelled or LeaseLost."""
        with self._lock:
            self._metrics.update(metrics)
            self._fraction = max(self._fraction, min(float(fraction), 1.0))
            now = time.monotonic()
            if now - self._written < _APART and fraction < 1.0:
                return
            self._written = now
            try:
                self._queue.progress(self._id, self._token, self._fraction, stage, self._metrics)
            except CatalogUnavailable:
                return  # the next one will tell; work goes on meanwhile
            self._metrics = {}

    def event(self, kind: str, message: str, **data: Any) -> None:
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {kind}: {message}", file=sys.stderr, flush=True)
        patiently(lambda: self._queue.event(self._id, self._token, kind, message, data))

    def checkpoint(self, name: str, data: bytes) -> None:
        blob = self._blobs.put_bytes(data)
        patiently(lambda: self._queue.checkpoint(self._id, self._token, name, blob))

    def restore(self, name: str) -> bytes | None:
        blob = patiently(lambda: self._queue.restore(self._id, name))
        return self._blobs.get(blob) if blob else None
