"""The order in which calls that wait for one deployment are sent: by class, and within a class fairly between keys.

Within a class: start-time fair queueing (Goyal, Vin and Cheng, 1996), where a call costs its rows, so that a key's share
does not depend on how many calls it has waiting. Pure: no loop, the clock is given.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from modelworks.core.tensors import Tensor

AGED = 1.0  # seconds of waiting after which a call of a lower class gets a turn among those of a higher
AGED_EVERY = 4  # one turn in so many
_DEAREST = 4096  # rows that a call costs at most
_SLACK = 64  # done calls that may lie in the queue
_DEBTORS = 1024  # keys without a waiting call whose last one is remembered


class Asked(Protocol):
    """What of a call counts here."""

    key_id: str
    priority: int

    @property
    def inputs(self) -> list[Tensor]: ...


class Waiter(Protocol):
    """`done`: nobody waits for it any more; `since`: when it was queued."""

    done: bool
    since: float

    @property
    def call(self) -> Asked: ...


W = TypeVar("W", bound=Waiter)


class _Flow(Generic[W]):
    """One key's calls in one class. `live`: those that are not done."""

    __slots__ = ("calls", "live")

    def __init__(self) -> None:
        self.calls: deque[W] = deque()
        self.live = 0


class _Class(Generic[W]):
    """The keys that have calls waiting, each in the heap once with the virtual time at which its next call may start."""

    __slots__ = ("_count", "_debts", "_heap", "_virtual", "flows", "live")

    def __init__(self) -> None:
        self.flows: dict[str, _Flow[W]] = {}
        self.live = 0
        self._heap: list[tuple[float, int, str]] = []
        self._debts: dict[str, float] = {}  # key without a waiting call -> when its next one may start
        self._virtual = 0.0
        self._count = 0  # equal starts go by age

    def push(self, item: W) -> None:
        key = item.call.key_id
        flow = self.flows.get(key)
        if flow is None:
            flow = self.flows[key] = _Flow()
            self._enter(max(self._virtual, self._debts.pop(key, 0.0)), key)
        flow.calls.append(item)
        flow.live += 1
        self.live += 1

    def head(self) -> W | None:
        """The next call; None when there is none. Done ones in front of it are dropped."""
        while self._heap:
            key = self._heap[0][2]
            flow = self.flows[key]
            while flow.calls and flow.calls[0].done:
                flow.calls.popleft()
            if flow.calls:
                return flow.calls[0]
            heapq.heappop(self._heap)
            del self.flows[key]
        if self._debts:  # nobody waits, so nobody is owed anything
            self._debts.clear()
        self._virtual = 0.0
        return None

    def pop(self) -> W:
        """Take what `head` has just shown."""
        start, _, key = heapq.heappop(self._heap)
        flow = self.flows[key]
        item = flow.calls.popleft()
        flow.live -= 1
        self.live -= 1
        self._virtual = max(self._virtual, start)
        after = start + cost(item.call)
        if flow.calls:
            self._enter(after, key)
        else:
            del self.flows[key]
            if len(self._debts) >= _DEBTORS:
                self._debts = {key: debt for key, debt in self._debts.items() if debt > self._virtual}
            if len(self._debts) < _DEBTORS:
                self._debts[key] = after
        return item

    def forget(self, key: str) -> None:
        """One of the key's calls is done."""
        self.live -= 1
        flow = self.flows[key]
        flow.live -= 1
        if len(flow.calls) > 2 * flow.live + _SLACK:
            flow.calls = deque(item for item in flow.calls if not item.done)

    def size(self) -> int:
        """Calls held, those that are done included."""
        return sum([len(flow.calls) for flow in self.flows.values()])

    def _enter(self, start: float, key: str) -> None:
        self._count += 1
        heapq.heappush(self._heap, (start, self._count, key))


class FairQueue(Generic[W]):
    """Classes are strict (0 before 1 before 2), but aged calls of a lower class get one turn in `AGED_EVERY`."""

    def __init__(self) -> None:
        self._classes: tuple[_Class[W], ...] = (_Class(), _Class(), _Class())
        self._since_aged = 0

    def __len__(self) -> int:
        """Calls that are not done."""
        return sum([one.live for one in self._classes])

    def __iter__(self) -> Iterator[W]:
        for one in self._classes:
            for flow in one.flows.values():
                yield from (item for item in flow.calls if not item.done)

    def push(self, item: W, now: float) -> None:
        item.since = now
        self._classes[item.call.priority].push(item)

    def pop(self, now: float) -> W | None:
        """The call to send next; None when none waits."""
        chosen: _Class[W] | None = None
        aged: _Class[W] | None = None
        for one in self._classes:
            head = one.head()
            if head is None:
                continue
            if chosen is None:
                chosen = one
            elif aged is None and now - head.since >= AGED:
                aged = one
        if chosen is None:
            return None
        if aged is not None:
            self._since_aged += 1
            if self._since_aged >= AGED_EVERY:
                self._since_aged = 0
                chosen = aged
        return chosen.pop()

    def size(self) -> int:
        """Calls held, those that are done included."""
        return sum([one.size() for one in self._classes])

    def forget(self, item: W) -> None:
        """A queued call is done (it is marked so before): it is skipped when its turn comes."""
        self._classes[item.call.priority].forget(item.call.key_id)

    def displaced_by(self, call: Asked) -> W | None:
        """Which call would have to leave a full queue for this one; None: this one is the one to be refused.

        It is the newest call of the key with the most waiting, in the lowest class; within the caller's own class only
        a key with more than one call more than the caller's gives way.
        """
        for number in range(len(self._classes) - 1, call.priority - 1, -1):
            one = self._classes[number]
            if not one.live:
                continue
            flow = max(one.flows.values(), key=lambda flow: flow.live)
            if number == call.priority:
                mine = one.flows.get(call.key_id)
                if flow.live <= (mine.live if mine else 0) + 1:
                    return None
            return next(item for item in reversed(flow.calls) if not item.done)
        return None


def cost(call: Asked) -> int:
    """What a call takes of its key's share: its rows."""
    shape = call.inputs[0].shape if call.inputs else None
    return min(max(shape[0], 1), _DEAREST) if shape else 1
