"""When a call that takes long may be sent to a second replica: after a fixed time, for at most 5 % of the calls. Pure."""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

SHARE = 0.05
_BURST = 10.0  # hedges that may be saved up


class Hedgeable(Protocol):
    done: bool


H = TypeVar("H", bound=Hedgeable)


class Hedges(Generic[H]):
    """`after`: seconds without an answer. Each noted call earns `SHARE` of a hedge."""

    def __init__(self, after: float) -> None:
        self.after = after
        self.allowance = 0.0
        self._due: deque[tuple[float, H]] = deque()

    def note(self, item: H, now: float) -> bool:
        """A call was sent; True when it is the only one noted, so that somebody must look at `next_due`."""
        if self.allowance < _BURST:
            self.allowance += SHARE
        self._due.append((now + self.after, item))
        return len(self._due) == 1

    def next_due(self) -> float | None:
        """When to look again."""
        while self._due and self._due[0][1].done:
            self._due.popleft()
        return self._due[0][0] if self._due else None

    def take(self, now: float) -> list[H]:
        """The calls that are due and not done. Each that is hedged is to be paid for with `pay`."""
        found = []
        while self._due and self._due[0][0] <= now:
            _, item = self._due.popleft()
            if not item.done:
                found.append(item)
        return found

    def pay(self) -> bool:
        """Whether one more hedge may be sent."""
        if self.allowance < 1.0:
            return False
        self.allowance -= 1.0
        return True
