"""How many rows should run together: the fewest that are about as fast as any, within a latency objective.

What is known is kept for sizes by powers of two: seconds of a full batch of that size, first measured when the model is
loaded, then adapted by every batch that runs. Pure: seconds in, a size out.
"""

from __future__ import annotations

GOOD_ENOUGH = 0.92  # of the best throughput that was seen
_WEIGHT = 0.25  # of a new measurement
_FIRST = 8  # rows to begin with when nothing was measured
_SHORT, _SAMPLE = 0.001, 8  # of batches of fewer seconds one in so many is looked at: looking takes some microseconds
_CHOOSE_EVERY = 16  # batches, where no objective asks for more
_AGAIN = 256  # full batches after which the next larger size is tried again


class Sizer:
    """`size`: rows to run together at most, up to `ceiling`. `objective`: seconds that a call may take in the replica.

    A call that arrives while a batch runs waits for it and then runs in the next: a batch may take half the objective.
    """

    def __init__(self, ceiling: int, objective: float | None = None, *, adaptive: bool = True) -> None:
        self.ceiling = ceiling
        self.adaptive = adaptive
        self.size = min(_FIRST, ceiling) if adaptive else ceiling
        self.target = objective / 2 if objective else None
        self._seconds: dict[int, float] = {}  # exponent -> seconds of a batch of 2 ** exponent rows
        self._batches = self._skipped = 0
        self._full = 0

    def measured(self, rows: int, seconds: float) -> None:
        """A measurement at load time; `rows` is a power of two."""
        self._seconds[rows.bit_length() - 1] = max(seconds, 1e-7)
        if self.adaptive:
            self._choose()

    def ran(self, rows: int, seconds: float, *, more: bool) -> None:
        """A batch has run. `more`: calls were left waiting because it was full."""
        if rows < 1 or seconds <= 0:
            return
        exponent = rows.bit_length() - 1
        new = exponent not in self._seconds
        if seconds < _SHORT and not new and not more:
            self._skipped += 1
            if self._skipped % _SAMPLE:
                return
        ratio = 1.0
        if new:
            self._seconds[exponent] = seconds * (1 << exponent) / rows
        else:
            ratio = min(max(seconds / self.estimate(rows), 0.5), 2.0)  # one long pause of the machine is no trend
            self._seconds[exponent] *= 1 + (ratio - 1) * _WEIGHT
        if not self.adaptive:
            return
        if new or not 0.95 < ratio < 1.05:
            self._bound(exponent)
        self._batches += 1
        if new or self.target is not None or self._batches % _CHOOSE_EVERY == 0:
            self._choose()
        if more:
            self._explore(rows)

    def estimate(self, rows: int) -> float:
        """Seconds that a batch of so many rows should take; 0 while nothing is known. Between known sizes: by a line."""
        known = self._seconds
        if not known:
            return 0.0
        exponent = rows.bit_length() - 1 if rows > 0 else 0
        low = exponent if exponent in known else max([e for e in known if e < exponent], default=None)
        high = exponent + 1 if exponent + 1 in known else min([e for e in known if e > exponent], default=None)
        if low is None:
            assert high is not None
            return known[high] * (0.5 + 0.5 * rows / (1 << high))
        if high is None:
            return known[low] * rows / (1 << low)
        part = (rows - (1 << low)) / ((1 << high) - (1 << low))
        return known[low] + max(known[high] - known[low], 0.0) * part

    def _bound(self, exponent: int) -> None:
        """What is known of one size bounds the others: twice the rows take no less time, and at most twice the time."""
        seconds = self._seconds[exponent]
        for other, known in self._seconds.items():
            scaled = seconds * 2.0 ** (other - exponent)
            self._seconds[other] = min(max(known, min(seconds, scaled)), max(seconds, scaled))

    def _choose(self) -> None:
        """The smallest known size that is good enough, among those that keep the objective."""
        known = {exponent: seconds for exponent, seconds in self._seconds.items() if 1 << exponent <= self.ceiling}
        target = self.target
        allowed = {e: seconds for e, seconds in known.items() if target is None or seconds <= target}
        if not allowed:
            self.size = 1 if known else min(_FIRST, self.ceiling)
            return
        best = max((1 << e) / seconds for e, seconds in allowed.items())
        chosen = min(e for e, seconds in allowed.items() if (1 << e) / seconds >= GOOD_ENOUGH * best)
        self.size = 1 << chosen
        double = known.get(chosen + 1)
        if target is not None and double is not None and double > target:  # as many rows in between as keep it
            room = (target - known[chosen]) / (double - known[chosen])
            self.size = int(self.size * (1 + room))

    def _explore(self, rows: int) -> None:
        """Let the next batch be twice as large, where that was not tried lately and the objective can bear it."""
        exponent = rows.bit_length()
        double = 1 << exponent
        self._full += 1
        if self._full % _AGAIN == 0 and self.size == rows:
            self._seconds.pop(exponent, None)
        if rows < self.size or double > self.ceiling or exponent in self._seconds:
            return
        if self.target is None or self.estimate(double) <= self.target:
            self.size = double
