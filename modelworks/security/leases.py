"""Rate limits that hold across the gateways of one machine: token buckets in memory that all of them map.

A gateway draws tokens for a twentieth of a second at a time and hands them out from its own memory, so that most calls
touch nothing shared; a limit of fewer than 1,200 a minute is drawn one by one. Tokens that a killed gateway had drawn are
lost, never spent twice, and the kernel frees its locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modelworks.security.quota import TOKENS, reserved

_SLOT = struct.Struct("<16sdd")  # hash of the key's id, tokens, seconds on the machine's monotonic clock
_SLOTS = 8  # that a key may be in; the least recently used of more is forgotten
_GROUP = _SLOT.size * _SLOTS
_GROUPS = 4096
SIZE = _GROUP * _GROUPS
_TRIES = 100  # a holder needs microseconds
_PATIENCE_S = 0.02  # for one that the scheduler put aside; one that was stopped must not stop the others
_DRAWS_A_MINUTE = 1200
_MOST_OWED = -1e12


def create(folder: Path) -> int:
    """A descriptor of an empty table, to be inherited by the gateways; it has no name and ends with them."""
    path = folder / f"limits-{os.getpid()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    os.ftruncate(descriptor, SIZE)
    return descriptor


class _Slot:
    __slots__ = ("at", "place", "tokens")

    def __init__(self, place: int, tokens: float, at: float) -> None:
        self.place = place
        self.tokens = tokens
        self.at = at  # the seconds up to which `tokens` holds what was refilled


class Buckets:
    """The table behind `descriptor`: one token bucket a key, of `per_minute` tokens at most."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, SIZE)

    def draw(self, tag: bytes, per_minute: int, want: int, now: float) -> tuple[int, float]:
        """Take up to `want` whole tokens of the key with the hash `tag`: (how many there were, what is left)."""
        with self._slot(tag, per_minute, now) as slot:
            granted = max(0, min(want, int(slot.tokens)))
            slot.tokens -= granted
            return granted, slot.tokens

    def reserve(self, tag: bytes, per_minute: int, want: int, now: float) -> tuple[bool, float, float]:
        """Take `want` tokens or none, as `quota.reserved`."""
        with self._slot(tag, per_minute, now) as slot:
            allowed, slot.tokens, seconds = reserved(slot.tokens, per_minute, want)
            return allowed, slot.tokens, seconds

    def give(self, tag: bytes, per_minute: int, tokens: int, now: float) -> None:
        """Give tokens back, or take more if negative: the key may owe some."""
        with self._slot(tag, per_minute, now) as slot:
            slot.tokens = min(float(per_minute), slot.tokens + tokens)

    @contextmanager
    def _slot(self, tag: bytes, per_minute: int, now: float) -> Iterator[_Slot]:
        """The key's slot, locked, and written at the end."""
        start = int.from_bytes(tag[:4], "little") % _GROUPS * _GROUP
        locked = self._lock(start)
        try:
            slot = self._find(start, tag, per_minute, now)
            yield slot
            _SLOT.pack_into(self._memory, slot.place, tag, slot.tokens, slot.at)
        finally:
            if locked:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, _GROUP, start)

    def _lock(self, start: int) -> bool:
        tries, until = 0, 0.0
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, _GROUP, start)
                return True
            except OSError:
                tries += 1
            if tries == _TRIES:
                until = time.monotonic() + _PATIENCE_S
            elif tries > _TRIES:
                if time.monotonic() > until:
                    return False
                time.sleep(1e-4)

    def _find(self, start: int, tag: bytes, per_minute: int, now: float) -> _Slot:
        """The key's slot, or the one to give it, with the tokens in it now.

        `now` was read before the lock was had: another may have refilled the slot to a later moment since.
        """
        oldest, place = math.inf, start
        for offset in range(start, start + _GROUP, _SLOT.size):
            owner, tokens, at = _SLOT.unpack_from(self._memory, offset)
            if owner == tag:
                if not (_MOST_OWED <= tokens <= per_minute) or not (0.0 <= at <= now + 1.0):
                    return _Slot(offset, float(per_minute), now)  # the limit was lowered, or a write was cut off
                refilled = tokens + max(0.0, now - at) * per_minute / 60.0
                return _Slot(offset, min(float(per_minute), refilled), max(now, at))
            if at < oldest:
                oldest, place = at, offset
        return _Slot(place, float(per_minute), now)


class _Lease:
    __slots__ = ("left", "limit", "refused_until", "reset", "tag", "tokens")

    def __init__(self, key_id: str, limit: int) -> None:
        self.tag = _tag(key_id)
        self.limit = limit
        self.tokens = 0  # drawn and not handed out
        self.left = 0.0  # in the table, when it was last looked at
        self.reset = 0.0
        self.refused_until = 0.0


def _tag(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


class LeasingLimiter:
    """As `quota.RateLimiter`, over a table that gateways share. The headers' figures are those of the last draw."""

    def __init__(
        self, buckets: Buckets, *, clock: Callable[[], float] = time.monotonic, capacity: int = 10_000
    ) -> None:
        self._buckets = buckets
        self._clock = clock
        self._capacity = capacity
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key_id: str, per_minute: int) -> tuple[bool, int, float]:
        """Count one call: (allowed, calls left at once, seconds), as RateLimiter.take."""
        with self._lock:
            lease = self._leases.get(key_id)
            if lease is None or lease.limit != per_minute:
                lease = self._lease(key_id, per_minute)
            if lease.tokens:
                lease.tokens -= 1
                return True, int(lease.left) + lease.tokens, lease.reset
            return self._draw(lease)

    def reserve(self, key_id: str, per_minute: int, tokens: int) -> tuple[bool, int, float]:
        """As RateLimiter.reserve."""
        with self._lock:
            allowed, left, seconds = self._buckets.reserve(_tag(TOKENS + key_id), per_minute, tokens, self._clock())
        return allowed, max(0, int(left)), seconds

    def give(self, key_id: str, per_minute: int, tokens: int) -> None:
        """As RateLimiter.give."""
        with self._lock:
            self._buckets.give(_tag(TOKENS + key_id), per_minute, tokens, self._clock())

    def _lease(self, key_id: str, per_minute: int) -> _Lease:
        lease = self._leases[key_id] = _Lease(key_id, per_minute)
        if len(self._leases) > self._capacity:
            self._leases.popitem(last=False)
        return lease

    def _draw(self, lease: _Lease) -> tuple[bool, int, float]:
        now = self._clock()
        if now < lease.refused_until:
            return False, 0, lease.refused_until - now
        limit = lease.limit
        granted, lease.left = self._buckets.draw(lease.tag, limit, max(1, limit // _DRAWS_A_MINUTE), now)
        if not granted:
            seconds = (1.0 - lease.left) * 60.0 / limit
            lease.refused_until = now + seconds
            return False, 0, seconds
        lease.tokens = granted - 1
        lease.reset = (limit - lease.left) * 60.0 / limit
        return True, int(lease.left) + lease.tokens, lease.reset
