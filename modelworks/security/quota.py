"""How often a key may call: a token bucket a key, in the memory of this gateway, bounded in number."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable


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
            now = self._clock()
            bucket = self._buckets.get(key_id)
            if bucket is None:
                bucket = self._buckets[key_id] = _Bucket(per_minute, now)
                if len(self._buckets) > self._capacity:
                    self._buckets.popitem(last=False)
            else:
                self._buckets.move_to_end(key_id)
                bucket.tokens = min(float(per_minute), bucket.tokens + max(0.0, now - bucket.at) * rate)
                bucket.at = max(bucket.at, now)
            if bucket.tokens < 1.0:
                return False, 0, (1.0 - bucket.tokens) / rate
            bucket.tokens -= 1.0
            return True, int(bucket.tokens), (per_minute - bucket.tokens) / rate
