"""Turns a plain `predict(batch)` into admit / step / abort: runs whatever waits the moment the model is free.

Pure: no loop, no threads, no sockets; the clock is given. `take` and `settle` belong to one thread, `run` may be called
in another while calls are admitted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from modelworks.core.errors import DeadlineExceeded, ModelworksError
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.serve.checks import Kind, NotSplittable, Reading, Shape, cut, kind_of
from modelworks.serve.wire import Part

_KNOWN_SHAPES = 1024

log = logger("batcher")
Predict = Callable[[dict[str, Any]], dict[str, Any]]
Step = tuple[Hashable, Part | ModelworksError, bool]  # call id, what there is for it, whether that was the last


class Item:
    """One admitted call."""

    __slots__ = ("deadline", "gone", "id", "reading", "since", "tensors")

    def __init__(self, id: Hashable, tensors: list[Tensor], reading: Reading, deadline: float, since: float) -> None:
        self.id = id
        self.tensors = tensors
        self.reading = reading
        self.deadline = deadline
        self.since = since
        self.gone = False


class Batch:
    """Calls that run together."""

    __slots__ = ("items", "shape", "taken")

    def __init__(self, shape: Shape, items: list[Item], taken: float) -> None:
        self.shape = shape
        self.items = items
        self.taken = taken


class Batcher:
    """At most `max_batch` calls and `max_rows` rows run together; with `wait_ms` an idle model waits so long."""

    def __init__(
        self,
        predict: Predict,
        signature: Signature,
        *,
        model_version: str = "",
        max_batch: int = 64,
        max_rows: int = 4096,
        wait_ms: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._predict = predict
        self._inputs = signature.inputs
        self._version = model_version
        self._max_batch = max_batch
        self._max_rows = max_rows
        self._wait = wait_ms / 1000
        self._clock = clock
        self._shapes: dict[Kind, Shape] = {}
        self._queues: dict[Shape, deque[Item]] = {}
        self._items: dict[Hashable, Item] = {}  # admitted and not settled
        self.waiting = 0

    def __len__(self) -> int:
        """Calls that are waiting or running."""
        return len(self._items)

    def admit(self, id: Hashable, tensors: list[Tensor], deadline: float) -> None:
        """Queue a call. InvalidInput when it does not fit the signature; then it was not admitted."""
        kind = kind_of(tensors)
        shape = self._shapes.get(kind)
        if shape is None:
            shape = Shape(self._inputs, kind)
            if len(self._shapes) < _KNOWN_SHAPES:
                self._shapes[kind] = shape
        item = Item(id, tensors, shape.read(tensors), deadline, self._clock())
        queue = self._queues.get(shape)
        if queue is None:
            queue = self._queues[shape] = deque()
        queue.append(item)
        self._items[id] = item
        self.waiting += 1

    def abort(self, id: Hashable) -> None:
        """Forget a call: it will not run, or if it is running, its answer is dropped. Unknown ids are ignored."""
        item = self._items.pop(id, None)
        if item is not None:
            item.gone = True

    def delay(self) -> float:
        """Seconds until `take` should be called: 0 unless the oldest call may still wait for company."""
        if not self._wait or self.waiting >= self._max_batch:
            return 0.0
        oldest = min((queue[0] for queue in self._queues.values() if queue), key=lambda item: item.since, default=None)
        if oldest is None:
            return 0.0
        return max(0.0, min(oldest.since + self._wait, oldest.deadline - self._wait) - self._clock())

    def take(self) -> tuple[Batch | None, list[Step]]:
        """The batch to run next, oldest calls first, and the calls whose deadline has passed, which will not run."""
        now = self._clock()
        expired: list[Step] = []
        while self.waiting:
            shape, queue = min(
                ((shape, queue) for shape, queue in self._queues.items() if queue), key=lambda pair: pair[1][0].since
            )
            items = self._fill(queue, now, expired)
            if not queue:
                del self._queues[shape]
            if items:
                return Batch(shape, items, now), expired
        return None, expired

    def _fill(self, queue: deque[Item], now: float, expired: list[Step]) -> list[Item]:
        items: list[Item] = []
        rows = 0
        while queue and len(items) < self._max_batch:
            item = queue[0]
            reading = item.reading
            if items and (reading.alone or rows + reading.rows > self._max_rows):
                break
            queue.popleft()
            self.waiting -= 1
            if item.gone:
                continue
            if item.deadline <= now:
                self._items.pop(item.id, None)
                expired.append((item.id, DeadlineExceeded("the deadline passed before the model was free"), True))
                continue
            items.append(item)
            rows += reading.rows
            if reading.alone:
                break
        return items

    def run(self, batch: Batch) -> list[tuple[Item, Part | ModelworksError]]:
        """Run the model on a batch. If that fails, each call by itself, so that a bad one fails alone."""
        items = batch.items
        begun = self._clock()
        try:
            answers: list[Any] = self._answer(batch.shape, items)
        except Exception as error:  # a plug's edge: whatever the model throws belongs to the calls, not to the replica
            if isinstance(error, NotSplittable):
                batch.shape.batchable = False  # its next calls run by themselves at once
            alone = len(items) == 1
            answers = [_model_error(error)] if alone else [self._alone(batch.shape, item) for item in items]
        run_us = int((self._clock() - begun) * 1e6)
        results: list[tuple[Item, Part | ModelworksError]] = []
        for item, answer in zip(items, answers, strict=True):
            if not isinstance(answer, ModelworksError):
                answer = Part(answer, self._version, True, int((begun - item.since) * 1e6), run_us)
            results.append((item, answer))
        return results

    def settle(self, results: list[tuple[Item, Part | ModelworksError]]) -> list[Step]:
        """The answers of the calls that were not aborted meanwhile; these are then forgotten."""
        steps: list[Step] = []
        for item, answer in results:
            if not item.gone:
                del self._items[item.id]
                steps.append((item.id, answer, True))
        return steps

    def step(self) -> list[Step]:
        """take, run and settle in one: the answers of the next batch; [] when nothing waits."""
        batch, steps = self.take()
        return steps + (self.settle(self.run(batch)) if batch else [])

    def _answer(self, shape: Shape, items: list[Item]) -> list[list[Tensor]]:
        outputs = self._predict(shape.join([item.reading for item in items], items[0].tensors))
        return cut(outputs, [item.reading.rows for item in items])

    def _alone(self, shape: Shape, item: Item) -> list[Tensor] | ModelworksError:
        try:
            return self._answer(shape, [item])[0]
        except Exception as error:  # as in run
            return _model_error(error)


def _model_error(error: Exception) -> ModelworksError:
    if isinstance(error, ModelworksError):
        return error
    log.error("model_failed", exc_info=error)
    return ModelworksError("the model failed on this input; the deployment's log has the cause", code="model_error")
