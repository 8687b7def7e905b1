"""The figures of all gateways of a home, summed: each keeps its own in a small file, anyone may read them all.

    run/metrics-TOKEN.live   locked as long as that gateway lives (the kernel lets go, also after a kill -9)
    run/metrics-TOKEN.data   its last Snapshot, renamed into place
    run/metrics-past.data    the counters of gateways that are gone, so that no total goes backwards

A reader sums the files alone, its own gateway's too: what one scrape has shown, the next shows at least.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from modelworks.core.telemetry import logger
from modelworks.serve.figures import (
    FORMAT,
    MAX_SERIES,
    OTHER,
    Histogram,
    Key,
    Load,
    ReplicaNow,
    Snapshot,
    Spender,
    Tally,
    seconds,
)

_SUFFIXES = (".live", ".data")
_REMEMBERED = 256  # tokens of gateways merged last, in case their files outlive that

log = logger("metrics")
T = TypeVar("T")


class Past(msgspec.Struct, array_like=True):
    """The counters of gateways that are gone, and which these were."""

    totals: Snapshot
    merged: list[str] = []


_snapshot = msgspec.msgpack.Decoder(Snapshot).decode
_past = msgspec.msgpack.Decoder(Past).decode


@dataclass
class Totals:
    """The sum over gateways."""

    tallies: dict[Key, Tally] = field(default_factory=dict)
    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    retries: dict[tuple[str, str], int] = field(default_factory=dict)
    lag: Histogram = field(default_factory=seconds)
    log_dropped: int = 0
    gateways: int = 0
    memory: int = 0
    loads: dict[tuple[str, str], Load] = field(default_factory=dict)
    replicas: dict[str, ReplicaNow] = field(default_factory=dict)
    tokens: dict[Spender, list[int]] = field(default_factory=dict)
    calls: dict[Spender, int] = field(default_factory=dict)

    def add_counters(self, one: Snapshot) -> None:
        for key, tally in one.tallies:
            if key not in self.tallies and len(self.tallies) >= MAX_SERIES:
                key = OTHER
            self.tallies.setdefault(key, Tally()).merge(tally)
        for operation, status, count in one.requests:
            self.requests[operation, status] = self.requests.get((operation, status), 0) + count
        for project, name, count in one.retries:
            self.retries[project, name] = self.retries.get((project, name), 0) + count
        for spender, counts in one.tokens:
            if spender not in self.tokens and len(self.tokens) >= MAX_SERIES:
                spender = OTHER
            known = self.tokens.setdefault(spender, [0, 0, 0, 0])
            self.tokens[spender] = [mine + theirs for mine, theirs in zip(known, counts, strict=True)]
        for spender, count in one.calls:
            if spender not in self.calls and len(self.calls) >= MAX_SERIES:
                spender = OTHER
            self.calls[spender] = self.calls.get(spender, 0) + count
        self.lag.merge(one.lag)
        self.log_dropped += one.log_dropped

    def add_gauges(self, one: Snapshot) -> None:
        self.gateways += 1
        self.memory += one.memory
        for load in one.loads:
            sum_ = self.loads.setdefault((load.project_id, load.deployment), Load(load.project_id, load.deployment))
            sum_.aboard += load.aboard
            sum_.waiting += load.waiting
            sum_.per_second += load.per_second
            sum_.errors_per_second += load.errors_per_second
        for replica in one.replicas:  # all gateways see the same ones
            known = self.replicas.setdefault(replica.replica_id, replica)
            known.connected = known.connected or replica.connected
            known.memory = max(known.memory, replica.memory)

    def counters(self) -> Snapshot:
        """The counters alone, as they are kept."""
        return Snapshot(
            FORMAT,
            "past",
            list(self.tallies.items()),
            [(*key, count) for key, count in self.requests.items()],
            [(*key, count) for key, count in self.retries.items()],
            self.lag,
            self.log_dropped,
            tokens=list(self.tokens.items()),
            calls=list(self.calls.items()),
        )


def alone(encoded: bytes) -> Totals:
    """The figures of one gateway that shares with none."""
    totals = Totals()
    one = _snapshot(encoded)
    totals.add_counters(one)
    totals.add_gauges(one)
    return totals


def loads(folder: Path) -> dict[tuple[str, str], Load]:
    """What the living gateways of `folder` have under way, by project id and deployment: for whoever scales by it."""
    totals = Totals()
    for live in folder.glob("metrics-*.live"):
        one = _read(live.with_suffix(".data"), _snapshot)
        if one is not None and one.format == FORMAT and _is_locked(live):
            totals.add_gauges(one)
    return totals.loads


class Shelf:
    """One gateway's place in `folder`. Its thread writes what was offered last; `total` may be called in any thread."""

    def __init__(self, folder: Path, token: str) -> None:
        self._folder = folder
        self._data = folder / f"metrics-{token}.data"
        self._live = folder / f"metrics-{token}.live"
        self._offered: bytes | None = None
        self._wanted = threading.Event()
        self._closed = False
        self._writing = threading.Lock()
        with self._exclusive():  # nobody looks between the file's making and its lock
            self._lock = os.open(self._live, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def offer(self, encoded: bytes) -> None:
        """Have it written soon, in place of what was offered before."""
        self._offered = encoded
        self._wanted.set()

    def put(self, encoded: bytes) -> None:
        """Write it now; what was offered before is older and is not written any more."""
        with self._writing:
            self._offered = None
            with contextlib.suppress(OSError):  # a full disk: the figures stay as they were
                _replace(self._data, encoded)

    def close(self) -> None:
        self._closed = True
        self._wanted.set()
        self._thread.join(5.0)
        os.close(self._lock)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closed:
                return
            with self._writing:
                encoded, self._offered = self._offered, None
                if encoded is not None:
                    with contextlib.suppress(OSError):
                        _replace(self._data, encoded)

    def total(self) -> Totals:
        """The sum over all gateways of the folder; those that are gone are moved to the past ones."""
        with self._exclusive():
            return self._total()

    def _total(self) -> Totals:
        past_path = self._folder / "metrics-past.data"
        past = _read(past_path, _past) or Past(Snapshot(FORMAT, "past"))
        totals = Totals()
        if past.totals.format == FORMAT:
            totals.add_counters(past.totals)
        living, gone = [], []
        for live in sorted(self._folder.glob("metrics-*.live")):
            one = _read(live.with_suffix(".data"), _snapshot)
            if one is not None and one.format != FORMAT:
                one = None
            if _is_locked(live):
                living.append(one)
            else:
                # its last write may have come between our read and its end
                gone.append((live, _read(live.with_suffix(".data"), _snapshot) if one is not None else None))
        if gone:
            for live, one in gone:
                token = live.stem.removeprefix("metrics-")
                if one is not None and token not in past.merged:
                    totals.add_counters(one)
                    past.merged.append(token)
            kept = Past(totals.counters(), past.merged[-_REMEMBERED:])
            _replace(past_path, msgspec.msgpack.encode(kept))
            for live, _ in gone:
                for suffix in reversed(_SUFFIXES):  # the .live last: without it, nobody would find the rest
                    live.with_suffix(suffix).unlink(missing_ok=True)
        for one in living:
            if one is not None:
                totals.add_counters(one)
                totals.add_gauges(one)
        return totals

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        lock = os.open(self._folder / "metrics.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _read(path: Path, decode: Callable[[bytes], T]) -> T | None:
    """What a file holds; None when it is not there or not readable as that."""
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("metrics_file_ignored", file=path.name, reason=type(error).__name__)
        return None


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_bytes(data)
    aside.chmod(0o600)
    aside.replace(path)
