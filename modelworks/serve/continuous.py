"""Drives a runtime that batches continuously (admit / step / abort): one thread steps it, the socket loop never waits.

Calls beyond the runtime's slots wait here, fairly between keys; an aborted or late one leaves its slot within a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from modelworks.core.errors import DeadlineExceeded, ModelworksError, Unavailable
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.serve.batcher import Step
from modelworks.serve.fairness import FairQueue
from modelworks.serve.wire import Part

_BUSY, _IDLE = 0.05, 1.0  # seconds that one step may wait: how late a deadline is noticed

log = logger("continuous")


class Steps(Protocol):
    """What a runtime must have to be driven here. `slots`: calls that run at a time. Only `step` may wait.

    One inside of which calls wait says `fair = True`: its `admit` takes (key, priority) as well; and it has `waiting`, a number.
    """

    slots: int

    def admit(self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool) -> None: ...

    def step(self, timeout: float) -> list[tuple[Hashable, list[Tensor] | ModelworksError | None, bool]]: ...

    def abort(self, call_id: Hashable) -> None: ...


class _Call:
    __slots__ = ("begun", "deadline", "done", "id", "inputs", "key_id", "params", "priority", "since", "stream")

    def __init__(
        self,
        id: Hashable,
        inputs: list[Tensor],
        params: dict[str, Any],
        stream: bool,
        deadline: float,
        since: float,
        key: str,
        priority: int,
    ) -> None:
        self.id = id
        self.inputs = inputs
        self.params = params
        self.stream = stream
        self.deadline = deadline
        self.since = since
        self.begun = since
        self.key_id = key
        self.priority = priority
        self.done = False  # waits no more

    @property
    def call(self) -> _Call:
        return self


class Continuous:
    """`start` gives the function that takes the steps; it is called in the engine's thread."""

    def __init__(self, runtime: Steps, *, model_version: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._runtime = runtime
        self._version = model_version
        self._clock = clock
        self._lock = threading.Lock()  # held for moments only, never while the runtime steps
        self._line: FairQueue[_Call] = FairQueue()
        self._waiting: dict[Hashable, _Call] = {}  # those in the line
        self._fair = getattr(runtime, "fair", False)
        self._running: dict[int, _Call] = {}  # by the id that the runtime knows: each admission has a new one
        self._names: dict[Hashable, int] = {}
        self._number = 0
        self._leaving: set[int] = set()  # aborted, and still in their slot
        self._emit: Callable[[list[Step]], None] = lambda steps: None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.failed = False  # the runtime raised: nothing will run here any more

    @property
    def waiting(self) -> int:
        """Calls that no slot is free for, or that the runtime has not begun."""
        return len(self._waiting) + (self._runtime.waiting if self._fair else 0)  # type: ignore[attr-defined]

    @property
    def in_slots(self) -> int:
        """Slots in use, those of aborted calls that are just leaving included."""
        return len(self._running) + len(self._leaving)

    def __len__(self) -> int:
        """Calls that wait or run."""
        return len(self._waiting) + len(self._running)

    def start(self, emit: Callable[[list[Step]], None]) -> None:
        self._emit = emit
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; calls aboard get an error."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join(2 * _IDLE)

    def admit(
        self,
        id: Hashable,
        inputs: list[Tensor],
        deadline: float,
        params: dict[str, Any],
        stream: bool,
        key: str = "",
        priority: int = 1,
    ) -> None:
        """Start a call or queue it. InvalidInput when the runtime refuses it at once; then it was not admitted."""
        call = _Call(id, inputs, params, stream, deadline, self._clock(), key, priority)
        with self._lock:
            if self._stopped:
                raise Unavailable("the model's engine has stopped; try again", retry_after=1.0)
            if self._waiting or self.in_slots >= self._runtime.slots:
                self._waiting[id] = call
                self._line.push(call, call.since)
            else:
                self._begin(call)

    def abort(self, id: Hashable) -> None:
        """Forget a call; if it runs, its slot is free within a step. Unknown ids are ignored."""
        with self._lock:
            if id in self._waiting:
                self._give_up(self._waiting[id])
            else:
                self._leave(id)

    # with the lock held

    def _give_up(self, call: _Call) -> None:
        del self._waiting[call.id]
        call.done = True
        self._line.forget(call)

    def _begin(self, call: _Call) -> None:
        self._number += 1
        whose = [(call.key_id, call.priority)] if self._fair else []
        self._runtime.admit(self._number, call.inputs, call.params, call.stream, *whose)
        call.begun = self._clock()
        self._running[self._number] = call
        self._names[call.id] = self._number

    def _leave(self, id: Hashable) -> None:
        number = self._names.pop(id, None)
        if number is not None:
            del self._running[number]
            self._leaving.add(number)
            self._runtime.abort(number)

    # the engine's thread

    def _work(self) -> None:
        try:
            while not self._stopped:
                found = self._runtime.step(_BUSY if self._running or self._leaving or self._waiting else _IDLE)
                steps = self._settle(found)
                if steps:
                    self._emit(steps)
        except Exception as error:  # the thread's edge: without it every call would hang
            log.error("engine_failed", exc_info=error)
            self.failed = True
        with self._lock:
            self._stopped = True
            ended = [*self._waiting, *self._names]
            self._waiting.clear()
        self._emit(
            [(id, Unavailable("the model's engine has stopped; try again", retry_after=1.0), True) for id in ended]
        )

    def _settle(self, found: list[tuple[Any, list[Tensor] | ModelworksError | None, bool]]) -> list[Step]:
        """The runtime's steps as the host's; slots that came free are given to those who wait."""
        now = self._clock()
        steps: list[Step] = []
        with self._lock:
            for number, item, done in found:
                call = self._running.get(number)
                if call is not None and item is not None:
                    steps.append((call.id, self._part(call, item, done, now), done))
                if done:
                    self._leaving.discard(number)
                    if call is not None:
                        del self._running[number]
                        del self._names[call.id]
            self._expire(now, steps)
            while self._waiting and self.in_slots < self._runtime.slots:
                following = self._line.pop(now)
                assert following is not None
                del self._waiting[following.id]
                try:
                    self._begin(following)
                except ModelworksError as error:
                    steps.append((following.id, error, True))
        return steps

    def _part(
        self, call: _Call, item: list[Tensor] | ModelworksError, done: bool, now: float
    ) -> Part | ModelworksError:
        if isinstance(item, ModelworksError):
            return item
        return Part(item, self._version, done, int((call.begun - call.since) * 1e6), int((now - call.begun) * 1e6))

    def _expire(self, now: float, steps: list[Step]) -> None:
        for call in [call for call in self._waiting.values() if call.deadline <= now]:
            self._give_up(call)
            steps.append((call.id, DeadlineExceeded("the deadline passed before a slot was free"), True))
        for call in [call for call in self._running.values() if call.deadline <= now]:
            self._leave(call.id)
            steps.append((call.id, DeadlineExceeded("the deadline passed before the answer was complete"), True))
