"""Whose prompt an engine reads next: fair between keys, short before long, nobody for ever last. Pure.

Between keys: start-time fair queueing (Goyal, Vin and Cheng, 1996), by tokens. Of one key's calls, and of those that have
begun, the one goes first that has least to read, where each turn of waiting counts as tokens read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

AGED = 128  # tokens that a turn of waiting is worth: a prompt of 4,096 stands behind short ones for 32 turns


class Waiter(Protocol):
    """`unread`: tokens of its prompt that are still to be read; `cost`: of its prompt and its answer, as far as known."""

    key: str
    priority: int  # 0 before 1 before 2
    unread: int
    since: int  # the turn in which it came

    @property
    def cost(self) -> int: ...


W = TypeVar("W", bound=Waiter)


class Line(Generic[W]):
    def __init__(self) -> None:
        self.waiting: list[W] = []
        self.begun: list[W] = []  # room is kept for them, and their prompts are not read to the end
        self._turn = 0
        self._virtual = 0.0
        self._paid: dict[str, float] = {}  # key -> the virtual time at which its next call may start

    def __len__(self) -> int:
        return len(self.waiting) + len(self.begun)

    def turn(self) -> None:
        self._turn += 1

    def push(self, call: W) -> None:
        call.since = self._turn
        self.waiting.append(call)

    def remove(self, call: W) -> bool:
        """It is read, or nobody waits for it any more: whether it had begun."""
        begun = call in self.begun
        (self.begun if begun else self.waiting).remove(call)
        return begun

    def next(self, fits: Callable[[W], bool]) -> W | None:
        """Whose prompt is read next; None when there is none, or none that fits. Its caller looks whether it has just begun."""
        found = min(self.begun, key=self._left, default=None)
        head = min(self.waiting, key=self._order, default=None)
        if head is not None and (found is None or self._left(head) < self._left(found)) and fits(head):
            self._begin(head)
            return head
        return found

    def _begin(self, call: W) -> None:
        self.waiting.remove(call)
        self.begun.append(call)
        self._virtual = max(self._virtual, self._start(call))
        self._paid[call.key] = self._start(call) + call.cost
        if not self.waiting:
            self._paid = {key: paid for key, paid in self._paid.items() if paid > self._virtual}

    def _start(self, call: W) -> float:
        return max(self._virtual, self._paid.get(call.key, 0.0))

    def _left(self, call: W) -> tuple[int, int]:
        return call.priority, call.unread - AGED * (self._turn - call.since)

    def _order(self, call: W) -> tuple[int, float, int]:
        return call.priority, self._start(call), self._left(call)[1]
