"""Turns a plain `predict(batch)` into admit / step / abort: runs whatever waits the moment the model is free.

How many at once is a fixed bound, or found by measuring (sizing.py). Pure: no loop, no threads, no sockets; the clock is
given. `take` and `settle` belong to one thread, `run` may be called in another while calls are admitted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from modelworks.core.errors import DeadlineExceeded, ModelworksError
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.serve.checks import Block, NotSplittable, Reading, Shape, block, cut
from modelworks.serve.columns import Kind, Layout, kind_of
from modelworks.serve.sizing import Sizer
from modelworks.serve.wire import Part

_KNOWN_SHAPES = 1024
_MARGIN = 1.2  # by which an expected time is stretched when it is held against a deadline
_POISONS = 4  # bad calls that are looked for by halving a batch; with more of them the rest runs one by one
_REPEATS = 3  # runs of each size when measuring, of which the fastest counts

log = logger("batcher")
Predict = Callable[[dict[str, Any]], dict[str, Any]]
Step = tuple[Hashable, Part | ModelworksError, bool]  # call id, what there is for it, whether that was the last
Results = list["tuple[Item, Part | ModelworksError]"]


class Item:
    """One admitted call."""

    __slots__ = ("deadline", "gone", "id", "reading", "since", "tensors")

    def __init__(
        self, id: Hashable, tensors: list[Tensor] | None, reading: Reading, deadline: float, since: float
    ) -> None:
        self.id = id
        self.tensors = tensors
        self.reading = reading
        self.deadline = deadline
        self.since = since
        self.gone = False


class Batch:
    """Calls that run together."""

    __slots__ = ("items", "more", "queue", "shape", "taken")

    def __init__(self, queue: Queue, items: list[Item], taken: float) -> None:
        self.shape = queue.shape
        self.queue = queue
        self.items = items
        self.taken = taken
        self.more = bool(queue.items)  # others are left waiting


class Ran:
    """What a batch came to: its outputs uncut, or a result for each call."""

    __slots__ = ("batch", "begun", "block", "results", "run_us")

    def __init__(self, batch: Batch, begun: float, run_us: int, block: Block | None, results: Results) -> None:
        self.batch = batch
        self.begun = begun
        self.run_us = run_us
        self.block = block
        self.results = results

    def queue_us(self) -> list[int]:
        """Microseconds that each call waited."""
        begun = self.begun
        return [int((begun - item.since) * 1e6) for item in self.batch.items]

    def cut(self, version: str) -> Results:
        """A result for each call."""
        if self.block is None:
            return self.results
        items = self.batch.items
        layout = Layout(self.block.kind)
        starts = [0] * len(layout.kind)
        results: Results = []
        for index, (item, queue_us) in enumerate(zip(items, self.queue_us(), strict=True)):
            outputs = []
            text = 0
            for number, ((name, datatype, trailing), width) in enumerate(zip(layout.kind, layout.widths, strict=True)):
                if width < 0:
                    size = self.block.sizes[text][index]
                    text += 1
                else:
                    size = width * item.reading.rows
                start = starts[number]
                starts[number] = stop = start + size
                data = self.block.data[number][start:stop]
                outputs.append(Tensor(name, datatype, [item.reading.rows, *(trailing or ())], data))
            results.append((item, Part(outputs, version, True, queue_us, self.run_us, len(items))))
        return results


class Queue:
    """The waiting calls of one shape. `soonest`: no deadline among them is before this."""

    __slots__ = ("items", "shape", "sizer", "soonest")

    def __init__(self, shape: Shape, sizer: Sizer) -> None:
        self.shape = shape
        self.sizer = sizer
        self.items: deque[Item] = deque()
        self.soonest = float("inf")

    def put(self, item: Item) -> None:
        self.items.append(item)
        if item.deadline < self.soonest:
            self.soonest = item.deadline

    def urgent_first(self, until: float) -> None:
        """Calls due before `until` go to the front, the soonest first; the others keep their order."""
        live = [item for item in self.items if not item.gone]
        urgent = sorted([item for item in live if item.deadline <= until], key=lambda item: item.deadline)
        if urgent:
            live = urgent + [item for item in live if item.deadline > until]
        self.items = deque(live)
        self.soonest = min([item.deadline for item in live], default=float("inf"))


class Batcher:
    """At most `max_batch` calls and `max_rows` rows run together; with `wait_ms` an idle model waits so long.

    With `auto` or `p99_ms`, within these bounds, as many rows as pay (see sizing.py).
    """

    def __init__(
        self,
        predict: Predict,
        signature: Signature,
        *,
        model_version: str = "",
        max_batch: int = 64,
        max_rows: int = 4096,
        wait_ms: float = 0.0,
        auto: bool = False,
        p99_ms: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._predict = predict
        self._inputs = signature.inputs
        self._version = model_version
        self._max_batch = max_batch
        self._max_rows = max_rows
        self._wait = wait_ms / 1000
        self._objective = p99_ms / 1000 if p99_ms else None
        self.adaptive = auto or p99_ms is not None
        self._clock = clock
        self._shapes: dict[Kind, Shape] = {}
        self._sizers: dict[Shape, Sizer] = {}
        self._queues: dict[Shape, Queue] = {}
        self._items: dict[Hashable, Item] = {}  # admitted and not settled
        self._texts: dict[str, bytes] = {}  # of outputs, packed
        self._ran: tuple[Batch, float] | None = None  # the batch that `settle` will end, and its seconds
        self.waiting = 0

    def __len__(self) -> int:
        """Calls that are waiting or running."""
        return len(self._items)

    def admit(self, id: Hashable, tensors: list[Tensor], deadline: float) -> None:
        """Queue a call. InvalidInput when it does not fit the signature; then it was not admitted."""
        shape = self.shape(kind_of(tensors))
        item = Item(id, tensors, shape.read(tensors), deadline, self._clock())
        self._queue(shape).put(item)
        self._items[id] = item
        self.waiting += 1

    def shape(self, kind: Kind) -> Shape:
        """What is known of calls of a kind. InvalidInput when it does not fit the signature."""
        shape = self._shapes.get(kind)
        if shape is None:
            shape = Shape(self._inputs, kind)
            if len(self._shapes) < _KNOWN_SHAPES:
                self._shapes[kind] = shape
        return shape

    def admit_whole(self, shape: Shape, calls: Iterable[tuple[Hashable, int, bytes, float]]) -> None:
        """Queue calls of a `fixed` shape, given as id, rows, the bytes of all inputs, and seconds that remain.

        The bytes have been counted already; `shape.fits` has been asked for the rows.
        """
        now = self._clock()
        queue = self._queue(shape)
        waiting, items, soonest = queue.items, self._items, queue.soonest
        alone = not shape.batchable
        before = len(waiting)
        for id, rows, data, remaining in calls:
            deadline = now + remaining
            item = Item(id, None, Reading(rows, data, alone), deadline, now)
            waiting.append(item)
            items[id] = item
            if deadline < soonest:
                soonest = deadline
        queue.soonest = soonest
        self.waiting += len(waiting) - before

    @property
    def idle(self) -> bool:
        """Whether a call that comes now need not wait, for others or for company."""
        return not self.waiting and not self._wait

    def at_once(self, shape: Shape, rows: int, data: bytes) -> tuple[Block | Part | ModelworksError, int]:
        """Run one call, given as for `admit_whole`, as nothing waits: its answer, and microseconds of the model."""
        begun = self._clock()
        answer: Block | Part | ModelworksError | None
        try:
            outputs = self._predict(shape.arrays(rows, data))
            answer = block(outputs, (rows,), self._texts)
            if answer is None:
                answer = Part(cut(outputs, (rows,))[0], self._version)
        except Exception as error:  # as in run
            answer = _model_error(error)
        seconds = self._clock() - begun
        run_us = int(seconds * 1e6)
        if isinstance(answer, Part):
            answer.run_us = run_us
        self._sizer(shape).ran(rows, seconds, more=False)
        return answer, run_us

    def _queue(self, shape: Shape) -> Queue:
        queue = self._queues.get(shape)
        if queue is None:
            queue = self._queues[shape] = Queue(shape, self._sizer(shape))
        return queue

    def _sizer(self, shape: Shape) -> Sizer:
        sizer = self._sizers.get(shape)
        if sizer is None:
            sizer = Sizer(self._max_rows, self._objective, adaptive=self.adaptive)
            if len(self._sizers) < _KNOWN_SHAPES:
                self._sizers[shape] = sizer
        return sizer

    def abort(self, id: Hashable) -> None:
        """Forget a call: it will not run, or if it is running, its answer is dropped. Unknown ids are ignored."""
        item = self._items.pop(id, None)
        if item is not None:
            item.gone = True

    def delay(self) -> float:
        """Seconds until `take` should be called: 0 unless the oldest call may still wait for company."""
        if not self._wait or self.waiting >= self._max_batch:
            return 0.0
        oldest = min(
            (queue for queue in self._queues.values() if queue.items),
            key=lambda queue: queue.items[0].since,
            default=None,
        )
        if oldest is None or len(oldest.items) >= oldest.sizer.size:
            return 0.0
        soonest = min([queue.soonest for queue in self._queues.values()])
        return max(0.0, min(oldest.items[0].since + self._wait, soonest - self._wait) - self._clock())

    def take(self) -> tuple[Batch | None, list[Step]]:
        """The batch to run next, oldest calls first, and the calls whose deadline has passed, which will not run.

        A call that could not wait for a large batch goes before it, with no more company than its deadline bears.
        """
        now = self._clock()
        expired: list[Step] = []
        while self.waiting:
            queue = self._next(now)
            items = self._fill(queue, now, expired)
            if not queue.items:
                del self._queues[queue.shape]
            if items:
                return Batch(queue, items, now), expired
        return None, expired

    def _next(self, now: float) -> Queue:
        """The queue with the oldest call, or one with a call that could not wait until that queue's batch has run."""
        if len(self._queues) == 1:
            (queue,) = self._queues.values()
            return queue
        queue = min(self._queues.values(), key=lambda queue: queue.items[0].since)
        soonest = min(self._queues.values(), key=lambda queue: queue.soonest)
        return soonest if soonest.soonest <= now + self._expected(queue) + soonest.sizer.estimate(1) else queue

    def _expected(self, queue: Queue) -> float:
        return _MARGIN * queue.sizer.estimate(min(queue.sizer.size, self._max_rows, self._max_batch, len(queue.items)))

    def _fill(self, queue: Queue, now: float, expired: list[Step]) -> list[Item]:
        items: list[Item] = []
        rows = 0
        most = queue.sizer.size
        until = now + self._expected(queue) + queue.sizer.estimate(1)
        urgent = queue.soonest <= until
        if urgent:
            before = len(queue.items)
            queue.urgent_first(until)
            self.waiting -= before - len(queue.items)
        bound = float("inf")  # the soonest deadline that this batch can keep
        waiting = queue.items
        while waiting and len(items) < self._max_batch:
            item = waiting[0]
            reading = item.reading
            if items and (reading.alone or rows + reading.rows > most):
                break
            if urgent and items and now + _MARGIN * queue.sizer.estimate(rows + reading.rows) > bound:
                break
            waiting.popleft()
            self.waiting -= 1
            if item.gone:
                continue
            if item.deadline <= now:
                self._items.pop(item.id, None)
                expired.append((item.id, DeadlineExceeded("the deadline passed before the model was free"), True))
                continue
            items.append(item)
            rows += reading.rows
            if urgent and now + queue.sizer.estimate(reading.rows) <= item.deadline:
                bound = min(bound, item.deadline)
            if reading.alone:
                break
        return items

    def run(self, batch: Batch) -> Ran:
        """Run the model on a batch. If that fails, in smaller and smaller parts, so that a bad call fails alone."""
        items = batch.items
        begun = self._clock()
        whole: Block | None = None
        answers: list[Any] = []
        try:
            outputs = self._predict(batch.shape.join([item.reading for item in items], items[0].tensors))
            rows = [item.reading.rows for item in items]
            whole = block(outputs, rows, self._texts)
            if whole is None:
                answers = cut(outputs, rows)
            self._ran = batch, self._clock() - begun
        except NotSplittable:
            batch.shape.batchable = False  # its next calls run by themselves at once
            answers = [self._alone(batch.shape, item) for item in items]
        except Exception as error:  # a plug's edge: whatever the model throws belongs to the calls, not to the replica
            answers = [_model_error(error)] if len(items) == 1 else self._isolate(batch.shape, items, [])
        run_us = int((self._clock() - begun) * 1e6)
        results: Results = []
        for item, answer in zip(items, answers, strict=False):
            if not isinstance(answer, ModelworksError):
                answer = Part(answer, self._version, True, int((begun - item.since) * 1e6), run_us, len(items))
            results.append((item, answer))
        return Ran(batch, begun, run_us, whole, results)

    def _isolate(self, shape: Shape, items: list[Item], found: list[ModelworksError]) -> list[Any]:
        """The answers of a part that failed as a whole, by halves. `found` collects the bad calls' errors.

        One bad call among n costs about 2 log2(n) runs, and n calls at most n + 8 log2(n).
        """
        if len(items) == 1 or len(found) >= _POISONS:
            answers: list[Any] = [self._alone(shape, item) for item in items]
            found += [answer for answer in answers if isinstance(answer, ModelworksError)]
            return answers
        middle = len(items) // 2
        left, good = self._try(shape, items[:middle], found)
        if good:  # then it is the right half that fails
            return left + self._isolate(shape, items[middle:], found)
        return left + self._try(shape, items[middle:], found)[0]

    def _try(self, shape: Shape, items: list[Item], found: list[ModelworksError]) -> tuple[list[Any], bool]:
        if len(items) > 1 and len(found) < _POISONS:
            try:
                return self._answer(shape, items), True
            except Exception:  # as in run; the cause is told of the call that it is found in
                pass
        before = len(found)
        answers = self._isolate(shape, items, found)
        return answers, len(found) == before

    def settle(self, ran: Ran) -> list[Step]:
        """The answers of the calls that were not aborted meanwhile; these are then forgotten."""
        self._learn()
        steps: list[Step] = []
        for item, answer in ran.cut(self._version):
            if not item.gone:
                del self._items[item.id]
                steps.append((item.id, answer, True))
        return steps

    def settle_whole(self, ran: Ran) -> bool:
        """As `settle` for a batch that has a `block` and of which no call was aborted, without cutting it; else False."""
        items = ran.batch.items
        if ran.block is None:
            return False
        for item in items:
            if item.gone:
                return False
        self._learn()
        held = self._items
        for item in items:
            del held[item.id]
        return True

    def _learn(self) -> None:
        """Note how long the last batch took."""
        if self._ran is not None:
            (batch, seconds), self._ran = self._ran, None
            rows = sum([item.reading.rows for item in batch.items])
            batch.queue.sizer.ran(rows, seconds, more=batch.more)

    def step(self) -> list[Step]:
        """take, run and settle in one: the answers of the next batch; [] when nothing waits."""
        batch, steps = self.take()
        return steps + (self.settle(self.run(batch)) if batch else [])

    def measure(self, calls: list[list[Tensor]], seconds: float) -> dict[int, float]:
        """Run sample calls of one row, all of one shape, in batches of 1, 2, 4, ...: rows -> seconds of the fastest run.

        It ends after about `seconds`, and where larger batches are no faster a row, or too slow for the objective.
        """
        shape = Shape(self._inputs, kind_of(calls[0]))
        shape = self._shapes.setdefault(kind_of(calls[0]), shape)
        items = [Item(number, tensors, shape.read(tensors), 0.0, 0.0) for number, tensors in enumerate(calls)]
        sizer = self._sizer(shape)
        found: dict[int, float] = {}
        until = self._clock() + seconds
        rows, best, flat = 1, 0.0, 0
        while rows <= min(self._max_batch, self._max_rows) and flat < 2:
            batch = [items[index % len(items)] for index in range(rows)]
            took = self._fastest(shape, batch, until)
            found[rows] = took
            sizer.measured(rows, took)
            flat = 0 if rows / took > best * 1.05 else flat + 1
            best = max(best, rows / took)
            if self._clock() + 2 * took > until or (sizer.target is not None and took > sizer.target):
                break
            rows *= 2
        return found

    def _fastest(self, shape: Shape, items: list[Item], until: float) -> float:
        best = float("inf")
        for _ in range(_REPEATS):
            begun = self._clock()
            self._answer(shape, items)
            best = min(best, max(self._clock() - begun, 1e-7))
            if self._clock() + best > until:
                break
        return best

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
