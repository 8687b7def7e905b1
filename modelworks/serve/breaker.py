"""A circuit breaker for one replica: after failures in a row it gets no calls for a while, then one to try. Pure."""

from __future__ import annotations

THRESHOLD = 5  # failures in a row
_FIRST, _LONGEST = 0.5, 30.0  # seconds that it stays open: doubled at each failed trial


class Breaker:
    """Closed: calls flow. Open until `until`: none. Then half-open (`trial`): one at a time, whose outcome decides."""

    __slots__ = ("_pause", "failures", "open", "trial", "until")

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self.open = False
        self.trial = False
        self.until = 0.0
        self._pause = _FIRST

    def failed(self, now: float, *, may_open: bool = True) -> bool:
        """Note a failure; True when this opened it. `may_open` is false for a replica that has no stand-in."""
        self.failures += 1
        if self.open or not (self.trial or self.failures >= THRESHOLD):
            return False
        if not may_open:
            self.trial = False
            return False
        self._pause = min(self._pause * 2, _LONGEST) if self.trial else _FIRST
        self.open, self.trial = True, False
        self.until = now + self._pause
        return True

    def succeeded(self) -> None:
        """Closed again, with a clean record."""
        self.failures = 0
        self.open = self.trial = False

    def look(self, now: float) -> bool:
        """True when an open breaker has just become half-open."""
        if not self.open or now < self.until:
            return False
        self.open, self.trial = False, True
        return True
