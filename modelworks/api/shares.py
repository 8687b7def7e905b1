"""What a gateway itself does is shared between keys too: while more than one key calls, a key has so many calls at work.

A turn of the loop serves all connections that have something to say, and a gRPC call takes several turns: without this,
hundreds of connections of one key would make every turn long for everybody. Calls beyond the share wait here, where they
cost nothing; for the model they are queued in serve/fairness.py. While one key calls alone, none of this is touched.

What goes through the framework takes some tens of times longer than a call of the fast lane, and may wait long for a model,
a job or its client. It is not counted while it lasts: its steps on the loop are paced, so many of a key a turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial

SHARE = 32  # calls of one key at work
FEW = 2  # gRPC calls of one key that begin at once
QUIET, PATIENCE = 0.001, 0.01  # seconds without a new gRPC call until others may begin, and how long that is waited for
PACE = 2  # steps of slow work of one key in a turn of the loop: those that begin, and as many that go on
RECENT = 1.0  # seconds between calls of two keys within which both count as calling

Resume = Callable[[], bool]  # begins a call that waited; False: nobody waits for it any more


class Shares:
    """One a gateway, in its loop's thread."""

    def __init__(self) -> None:
        self._key = ""  # of the last call
        self._seen = float("-inf")
        self._until = 0.0
        self._at_work: dict[str, int] = {}
        self._waiting: dict[str, deque[Resume]] = {}
        self._patient: dict[str, deque[Resume]] = {}  # gRPC calls
        self._paced: dict[tuple[str, bool], _Line] = {}
        self._came = 0
        self._tick: asyncio.TimerHandle | None = None

    def crowded(self, key: str, now: float) -> bool:
        """A call of `key` comes: whether other keys call too. Then it needs `enter`, and `leave` at its end."""
        if key != self._key:
            if now - self._seen < RECENT:
                self._until = now + RECENT
            self._key = key
        self._seen = now
        return now < self._until

    def enter(self, key: str, resume: Resume) -> bool:
        """True: it may begin. False: `resume` is called when it may."""
        count = self._at_work.get(key, 0)
        if count < SHARE:
            self._at_work[key] = count + 1
            return True
        self._waiting.setdefault(key, deque()).append(resume)
        return False

    def leave(self, key: str) -> None:
        """A call that had entered has ended."""
        count = self._at_work[key] - 1
        for queues, most in ((self._waiting, SHARE), (self._patient, FEW)):
            waiting = queues.get(key)
            while waiting and count < most:
                count += waiting.popleft()()
            if waiting is not None and not waiting:
                del queues[key]
        if count:
            self._at_work[key] = count
        else:
            del self._at_work[key]

    async def admit(self, key: str) -> None:
        """As `enter`, for a task: returns when it may begin."""
        begun = asyncio.get_running_loop().create_future()
        if self.enter(key, partial(_wake, begun)):
            return
        await self._begun(key, begun)

    async def pace(self, key: str, *, fresh: bool = False) -> None:
        """Slow work of `key` goes on, or with `fresh` begins: returns when the loop has a turn for it.

        At once while no other key calls. What goes on does not wait behind what begins.
        """
        if time.monotonic() >= self._until:
            return
        line = self._paced.get((key, fresh))
        if line is None:
            if not self._paced:
                asyncio.get_running_loop().call_soon(self._next_turn)
            line = self._paced[key, fresh] = _Line()
        if line.spent < PACE and not line.waiting:
            line.spent += 1
            return
        begun = asyncio.get_running_loop().create_future()
        line.waiting.append(begun)
        await begun

    def _next_turn(self) -> None:
        for name, line in list(self._paced.items()):
            if not line.spent:
                del self._paced[name]
            line.spent = 0
            while line.waiting and line.spent < PACE:
                line.spent += _wake(line.waiting.popleft())
        if self._paced:
            asyncio.get_running_loop().call_soon(self._next_turn)

    async def turn(self, key: str) -> None:
        """As `enter`, for a gRPC call: returns when it may begin.

        grpc hands over one call in a turn of the loop, oldest first, whose ever it is. What begins must not outrun that:
        beyond a few at work, calls wait for one of those to end, or until no more come.
        """
        self._came += 1
        count = self._at_work.get(key, 0)
        if count < FEW and key not in self._patient:
            self._at_work[key] = count + 1
            return
        loop = asyncio.get_running_loop()
        begun = loop.create_future()
        self._patient.setdefault(key, deque()).append(partial(_wake, begun))
        if self._tick is None:
            self._tick = loop.call_later(QUIET, self._look, loop.time() + PATIENCE, self._came)
        await self._begun(key, begun)

    async def _begun(self, key: str, begun: asyncio.Future[None]) -> None:
        try:
            await begun
        except asyncio.CancelledError:
            if begun.done() and not begun.cancelled():
                self.leave(key)
            raise

    def _look(self, until: float, came: int) -> None:
        """Let those begin that wait for a pause of what comes."""
        loop = asyncio.get_running_loop()
        quiet = came == self._came
        if quiet or loop.time() >= until:
            most = SHARE if quiet else FEW
            for key, waiting in list(self._patient.items()):
                count = self._at_work.get(key, 0)
                while waiting and count < most:
                    count += waiting.popleft()()
                if count:
                    self._at_work[key] = count
                if not waiting:
                    del self._patient[key]
            until = loop.time() + PATIENCE
        self._tick = loop.call_later(QUIET, self._look, until, self._came) if self._patient else None


class _Line:
    """Steps of one key. `spent`: in this turn; while any wait, it is never 0 at a turn's end."""

    __slots__ = ("spent", "waiting")

    def __init__(self) -> None:
        self.spent = 0
        self.waiting: deque[asyncio.Future[None]] = deque()


def _wake(begun: asyncio.Future[None]) -> bool:
    if begun.done():
        return False
    begun.set_result(None)
    return True
