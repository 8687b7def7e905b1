"""How often a key may call and how many tokens it may use: buckets in the memory of this gateway, bounded in number.

Calls are counted one by one (`take`). Tokens of language models are reserved before a call by what it may use at most
(`reserve`), and what it did not use is given back at its end (`give`), or what it used beyond is taken.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

TOKENS = "tokens/"  # before a key's id: its bucket of tokens, beside that of its calls


class _Bucket:
    __slots__ = ("at", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at


class RateLimiter:
    """`clock`: seconds, monotonic. The least recently used of more than `capacity` buckets is forgotten."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, capacity: int = 10_000) -> None:
        self._clock = clock
        self._capacity = capacity
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key_id: str, per_minute: int) -> tuple[bool, int, float]:
        """Count one call: (allowed, calls left at once, seconds).

        The seconds are, for an allowed call, until all of `per_minute` are there again; for a refused one, until the
        next call is allowed. A full bucket holds `per_minute` calls.
        """
        rate = per_minute / 60.0
        with self._lock:
            bucket = self._filled(key_id, per_minute)
            if bucket.tokens < 1.0:
                return False, 0, (1.0 - bucket.tokens) / rate
            bucket.tokens -= 1.0
            return True, int(bucket.tokens), (per_minute - bucket.tokens) / rate

    def reserve(self, key_id: str, per_minute: int, tokens: int) -> tuple[bool, int, float]:
        """Take `tokens` or none: (allowed, tokens left, seconds), as `take`."""
        with self._lock:
            bucket = self._filled(TOKENS + key_id, per_minute)
            allowed, bucket.tokens, seconds = reserved(bucket.tokens, per_minute, tokens)
            return allowed, max(0, int(bucket.tokens)), seconds

    def give(self, key_id: str, per_minute: int, tokens: int) -> None:
        """Give tokens back, or take more if negative: the bucket may owe some."""
        with self._lock:
            bucket = self._filled(TOKENS + key_id, per_minute)
            bucket.tokens = min(float(per_minute), bucket.tokens + tokens)

    def _filled(self, name: str, per_minute: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(per_minute, now)
            if len(self._buckets) > self._capacity:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(name)
            bucket.tokens = min(float(per_minute), bucket.tokens + max(0.0, now - bucket.at) * per_minute / 60.0)
            bucket.at = max(bucket.at, now)
        return bucket


def reserved(there: float, per_minute: int, want: int) -> tuple[bool, float, float]:
    """(allowed, tokens then, seconds until all, or until enough, are there) when `want` of `there` tokens are asked for."""
    if there < want:
        return False, there, (want - there) * 60.0 / per_minute
    return True, there - want, (per_minute - there + want) * 60.0 / per_minute
