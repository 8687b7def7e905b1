"""One line of JSON a request, without its content: appended to a list by the loop, written by a thread, rotated by size.

At most LINES a second and gateway are written, and as many of errors beside them; what is above that is counted and
said in a line of its own, so that neither a flood nor a full disk slows a request down.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import msgspec

from modelworks.core.telemetry import logger

LINES = 1000  # a second, of each kind
MAX_BYTES = 64 * 1024 * 1024  # then requests.log becomes requests.log.1, which replaces the one before
_FLUSH = 0.5

log = logger("requestlog")
Line = tuple[str, str, str, str, str, str, int, float, int, int, int]


class Entry(msgspec.Struct, omit_defaults=True):
    """What a line holds. `duration_ms` from the request's head to its answer; `rows`: of a prediction."""

    time: str
    request_id: str
    key_id: str
    project_id: str
    operation: str
    deployment: str = ""
    model_version: str = ""
    status: int = 0
    duration_ms: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    rows: int = 0


class RequestLog:
    """Writes `path`. `add` is the loop's; everything else happens in the thread of `start`."""

    def __init__(self, path: Path, *, lines: int = LINES, max_bytes: int = MAX_BYTES) -> None:
        self.dropped = 0  # lines that were not written, ever
        self._path = path
        self._max_bytes = max_bytes
        self._room = max(1, int(lines * _FLUSH))
        self._good: list[tuple[float, Line]] = []
        self._bad: list[tuple[float, Line]] = []
        self._said = 0
        self._file: int | None = None
        self._broken = False
        self._stopped = threading.Event()
        self._encoder = msgspec.json.Encoder()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)

    def add(self, status: int, line: Line) -> None:
        """Keep one line for the next flush, or count it as dropped."""
        lines = self._good if status < 400 else self._bad
        if len(lines) < self._room:
            lines.append((time.time(), line))
        else:
            self.dropped += 1

    def add_many(self, lines: Iterable[Line], count: int) -> None:
        """`add` for `count` lines of answered requests; no more of them are made than there is room for."""
        kept = self._good
        room = min(count, self._room - len(kept))
        if room > 0:
            now = time.time()
            kept += [(now, line) for line in islice(lines, room)]
        self.dropped += count - max(0, room)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Write what is left."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _run(self) -> None:
        while not self._stopped.wait(_FLUSH):
            self.flush()

    def flush(self) -> None:
        """Write what was kept. A disk that is full or gone is said once; the lines are dropped."""
        good, self._good = self._good, []
        bad, self._bad = self._bad, []
        lines = sorted(good + bad) if bad else good
        if not lines and self.dropped == self._said:
            return
        entries: list[Entry | dict[str, object]] = [_entry(when, line) for when, line in lines]
        if self.dropped > self._said:
            missing, self._said = self.dropped - self._said, self.dropped
            entries.append({"time": _iso(time.time()), "event": "lines_dropped", "count": missing})
        try:
            self._write(self._encoder.encode_lines(entries))
            self._broken = False
        except OSError as error:
            self.dropped += len(lines)
            if not self._broken:
                log.error("the request log cannot be written", reason=error.strerror)
            self._broken = True

    def _write(self, data: bytes) -> None:
        """Append whole lines. Several gateways share the file: whoever finds it full renames it, the others follow."""
        if self._file is not None and self._moved():
            os.close(self._file)
            self._file = None
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while data:
            data = data[os.write(self._file, data) :]
        if os.fstat(self._file).st_size >= self._max_bytes:
            fcntl.flock(self._file, fcntl.LOCK_EX)  # of two that see it full, the second finds it moved
            try:
                if not self._moved():
                    self._path.replace(self._path.with_name(self._path.name + ".1"))
            finally:
                os.close(self._file)
                self._file = None

    def _moved(self) -> bool:
        assert self._file is not None
        with contextlib.suppress(OSError):
            return os.stat(self._path).st_ino != os.fstat(self._file).st_ino
        return True


def _entry(when: float, line: Line) -> Entry:
    request_id, key_id, project_id, operation, deployment, version, status, seconds, received, sent, rows = line
    return Entry(
        _iso(when), request_id, key_id, project_id, operation, deployment, version,
        status, round(seconds * 1000, 3), received, sent, rows,
    )  # fmt: skip


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
