"""What a running job sees of the queue: `Context` is the JobContext (ml/base.py) of a job's process."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelworks.core.errors import CatalogUnavailable, NotFound
from modelworks.core.types import Job
from modelworks.jobs.parts import Delivered, spread_folds
from modelworks.jobs.queue import Queue, patiently
from modelworks.jobs.usage import Usage
from modelworks.ml.package import Manifest, Package
from modelworks.store.blobs import Blobs

_APART = 0.2  # seconds between two progress writes
_DENSE = 500  # points of a curve that are all kept; of twice as many each second, and so on

Point = tuple[str, str, dict[str, Any]]


class Context:
    """Thread-safe: a fit may report from another thread. Everything it writes is void once the lease is lost.

    `slots`: how many jobs its worker runs at a time.
    """

    def __init__(
        self, queue: Queue, blobs: Blobs, job: Job, *, workdir: Path, threads: int = 1, slots: int = 1
    ) -> None:
        self.seed = int(job.spec.get("seed", 0))
        self.threads = threads
        self.processes = int(job.spec.get("resources", {}).get("processes", 1))
        self.workdir = workdir
        self.slots = slots
        self.only: str | None = job.spec.get("part")
        self.job = job
        self._queue = queue
        self._blobs = blobs
        self._id = job.id
        self._token = job.token
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._begun: tuple[float, float] | None = None  # when this attempt first told of progress, and how much
        self._fraction = 0.0
        self._written = 0.0
        self._metrics: dict[str, Any] = {}
        self._seen: dict[tuple[str, str], int] = {}
        self._points: list[Point] = []
        self._flushed = 0.0
        self._usage = Usage()
        self._advised = False

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        """Never goes back; written five times a second at most, but for the end. Raises Cancelled or LeaseLost."""
        with self._lock:
            self._metrics.update(metrics)
            self._fraction = max(self._fraction, min(float(fraction), 1.0))
            now = time.monotonic()
            self._begun = self._begun or (now, self._fraction)
            if now - self._written < _APART and fraction < 1.0:
                return
            self._written = now
            shown = {**self._metrics, **self._remaining(now)}
            try:
                self._queue.progress(self._id, self._token, self._fraction, stage, shown)
                self._flush(now)
            except CatalogUnavailable:
                return  # the next one will tell; work goes on meanwhile
            self._metrics = {}

    def event(self, kind: str, message: str, **data: Any) -> None:
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {kind}: {message}", file=sys.stderr, flush=True)
        self.flush()
        patiently(lambda: self._queue.event(self._id, self._token, kind, message, data))

    def metric(self, step: int, values: Mapping[str, float], *, unit: str = "epoch", part: str = "") -> None:
        with self._lock:
            now = time.monotonic()
            seen = self._seen[part, unit] = self._seen.get((part, unit), 0) + 1
            if seen % (1 << max(0, (seen // _DENSE).bit_length() - 1)):
                return
            kept = {name: _number(value) for name, value in values.items()}
            data = {"step": step, "unit": unit, "part": part, "values": kept, "seconds": round(now - self._started, 3)}
            self._points.append(("metric", _sentence(step, unit, part, kept), data))
            if now - self._flushed >= _APART:
                try:
                    self._flush(now)
                except CatalogUnavailable:
                    return

    def advise(self, found: dict[str, Any]) -> None:
        """The first of several stands for all: in `result.advice` of the job while it runs, and beside its end."""
        with self._lock:
            if self._advised:
                return
            self._advised = True
        patiently(lambda: self._queue.advise(self._id, self._token, found))

    def flush(self) -> None:
        """Write the points that wait; they are lost when the catalog stays away."""
        with self._lock:
            try:
                patiently(lambda: self._flush(time.monotonic()), 2.0)
            except CatalogUnavailable:
                self._points = self._points[-_DENSE:]

    def spread(self, names: Sequence[str], parallel: int | None, seconds: float) -> None:
        if self.only is None and len(names) > 1:
            spread_folds(self, self._queue, names, parallel, seconds)

    @property
    def fraction(self) -> float:
        """How much of the job is done."""
        return self._fraction

    def checkpoint(self, name: str, data: bytes) -> None:
        self.flush()
        blob = self._blobs.put_bytes(data)
        if name == self.only:
            raise Delivered(blob)
        patiently(lambda: self._queue.checkpoint(self._id, self._token, name, blob))

    def restore(self, name: str) -> bytes | None:
        blob = patiently(lambda: self._queue.restore(self._id, name))
        return self._blobs.get(blob) if blob else None

    def model(self, ref: str) -> Package:
        name, _, version = ref.rpartition(":")
        digest = patiently(lambda: self._queue.package_of(self.job.project_id, name, int(version or 0)))
        if digest is None:
            raise NotFound(f"the model {ref!r} is not there any more; name another", code="model_not_found")
        return Package(Manifest.parse(self._blobs.get(digest)), self._blobs.path)

    def _flush(self, now: float) -> None:
        points = self._points
        if used := self._usage.sample(now):
            points = [*points, ("resource", "", used)]
        if points:
            self._queue.events(self._id, self._token, points)
        self._points, self._flushed = [], now

    def _remaining(self, now: float) -> dict[str, float]:
        """The estimate of what is left, from how this attempt has gone so far."""
        begun, first = self._begun or (now, self._fraction)
        done = self._fraction - first
        if done < 0.02 or now - begun < 1.0 or self._fraction >= 1.0:
            return {}
        return {"eta_s": round((now - begun) * (1.0 - self._fraction) / done, 1)}


def _number(value: Any) -> float | None:
    """JSON has no NaN and no infinity."""
    found = float(value)
    return found if math.isfinite(found) else None


def _sentence(step: int, unit: str, part: str, values: Mapping[str, float | None]) -> str:
    said = ", ".join(f"{name} {'undefined' if value is None else f'{value:.4g}'}" for name, value in values.items())
    return f"{part + ': ' if part else ''}{unit} {step}: {said}"
