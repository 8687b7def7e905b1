"""What a gateway counts and logs: plain counters in the loop's thread, rendered, summed and written elsewhere.

    watch = observer.watch(route, deliver)      one call of a deployment; counts when its last part or its error comes
    observer.request(...)                       one request of any lane; counts by operation and writes a log line

Both are for the hot path: neither formats, locks nor does I/O.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from modelworks.core.errors import ModelworksError
from modelworks.core.telemetry import resident
from modelworks.core.types import Call
from modelworks.serve.columns import Answers
from modelworks.serve.figures import (
    CANCELLED,
    FORMAT,
    MAX_SERIES,
    MICROSECONDS,
    OTHER,
    SECONDS,
    SIZES,
    Key,
    Load,
    ReplicaNow,
    Snapshot,
    Spender,
    Tally,
    seconds,
)
from modelworks.serve.gather import Shelf
from modelworks.serve.requestlog import Line, RequestLog
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

if TYPE_CHECKING:
    from modelworks.serve.router import Router
    from modelworks.serve.tracing import CallSpan, Tracing

_TICK = 0.1  # seconds between looks at how late the loop is
_PUBLISH = 10  # ticks between two snapshots
_RATE_SAMPLES = 11  # one a second: rates are over the last ten

Deliver = Callable[["Part | ModelworksError"], None]


class Observer:
    """One a gateway. Counts from its construction; `start` begins to measure the loop, to publish and to write."""

    def __init__(self, *, log: RequestLog | None = None, tracing: Tracing | None = None) -> None:
        self.token = f"{os.getpid()}-{os.urandom(6).hex()}"
        self.tallies: dict[Key, Tally] = {}
        self.requests: dict[tuple[str, int], int] = {}
        self.spent: dict[Spender, list[int]] = {}
        self.called: dict[Spender, int] = {}
        self.log = log
        self.tracing = tracing
        self.lag = seconds()
        self.shelf: Shelf | None = None
        self._router: Router | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._ticks = 0
        self._history: deque[tuple[float, dict[tuple[str, str], tuple[int, int]]]] = deque(maxlen=_RATE_SAMPLES)

    # the hot path

    def watch(self, route: Route, deliver: Deliver) -> Watch:
        """`deliver` for the router that counts the call's end before it passes it on."""
        return Watch(self, route, deliver)

    def tally(self, key: Key) -> Tally:
        """The counters of `key`, those of OTHER when there are too many."""
        found = self.tallies.get(key)
        if found is None:
            if len(self.tallies) >= MAX_SERIES:
                key = OTHER
            found = self.tallies.setdefault(key, Tally())
        return found

    def call(self, place: tuple[str, str], key_id: str) -> None:
        """Count one call that a deployment (project id, name) took from a key."""
        spender = (*place, key_id)
        if spender not in self.called and len(self.called) >= MAX_SERIES:
            spender = OTHER
        self.called[spender] = self.called.get(spender, 0) + 1

    def tokens(
        self, place: tuple[str, str], key_id: str, prompt: int, completion: int, cached: int = 0, repeated: int = 0
    ) -> None:
        """Count the tokens of one request at a deployment (project id, name): `cached` are those of the prompt that were
        not read, `repeated` those of the completion that came out of the cache of answers."""
        spender = (*place, key_id)
        if spender not in self.spent and len(self.spent) >= MAX_SERIES:
            spender = OTHER
        known = self.spent.setdefault(spender, [0, 0, 0, 0])
        for at, count in enumerate((prompt, completion, cached, repeated)):
            known[at] += count

    def request(
        self,
        operation: str,
        status: int,
        *,
        request_id: str = "",
        key_id: str = "",
        project_id: str = "",
        deployment: str = "",
        model_version: str = "",
        seconds: float = 0.0,
        bytes_in: int = 0,
        bytes_out: int = 0,
        rows: int = 0,
    ) -> None:
        """Count one request that was answered (or CANCELLED), and log it. Both lanes call it, once a request.

        `operation` is one of security/policy.py or "" (bounded: it is a label). For a fast lane: call it where the
        answer is written, with what is at hand; it does no I/O and costs about a microsecond.
        """
        key = (operation, status)
        self.requests[key] = self.requests.get(key, 0) + 1
        log = self.log
        if log is not None:
            line = (request_id, key_id, project_id, operation, deployment, model_version, status, seconds)
            log.add(status, (*line, bytes_in, bytes_out, rows))

    def answered(self, route: Route, answers: Answers, begun: Sequence[float]) -> None:
        """Count calls of a deployment that were answered together; `begun`: when each was submitted."""
        tally = self.tally((route.project_id, route.name, answers.version))
        now = monotonic()
        count = len(begun)
        tally.answered += count
        if count == 1:
            tally.duration[bisect_left(SECONDS, now - begun[0])] += 1
            tally.queue[bisect_left(MICROSECONDS, answers.times[0])] += 1
        else:
            _add(tally.duration, SECONDS, [now - one for one in begun])
            _add(tally.queue, MICROSECONDS, answers.times)
        tally.model[bisect_left(MICROSECONDS, answers.run_us)] += count
        tally.batch[bisect_left(SIZES, answers.batch)] += count
        sums = tally.sums
        sums[0] += now * count - sum(begun)
        sums[1] += sum(answers.times)
        sums[2] += answers.run_us * count
        sums[3] += answers.batch * count

    def requests_answered(self, operation: str, lines: Iterable[Line], count: int) -> None:
        """`request` of `count` requests that were answered by 200; of `lines` as many are read as the log has room for."""
        key = (operation, 200)
        self.requests[key] = self.requests.get(key, 0) + count
        if self.log is not None:
            self.log.add_many(lines, count)

    # the loop's side

    def start(self, router: Router, folder: Path) -> None:
        """Measure the running loop and publish to `folder` (the home's run folder), which all gateways share."""
        self._router = router
        self.shelf = Shelf(folder, self.token)
        if self.log is not None:
            self.log.start()
        self._due = monotonic() + _TICK
        self._timer = asyncio.get_running_loop().call_later(_TICK, self._tick)
        self.publish()

    def stop(self) -> None:
        """The last figures are written; another gateway counts them among the past ones."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.shelf is not None:
            self.shelf.put(self.snapshot())
            self.shelf.close()
        if self.log is not None:
            self.log.close()
        if self.tracing is not None:
            self.tracing.close()

    def _tick(self) -> None:
        now = monotonic()
        late = max(0.0, now - self._due)
        self.lag.counts[bisect_left(SECONDS, late)] += 1
        self.lag.total += late
        self._due = now + _TICK
        self._timer = asyncio.get_running_loop().call_later(_TICK, self._tick)
        self._ticks += 1
        if self._ticks % _PUBLISH == 0:
            self._sample(now)
            self.publish()

    def publish(self) -> None:
        """Hand the present figures to the thread that writes them."""
        if self.shelf is not None:
            self.shelf.offer(self.snapshot())

    def snapshot(self) -> bytes:
        """The present figures, encoded. In the loop's thread."""
        routes = self._router.routes() if self._router is not None else []
        return msgspec.msgpack.encode(
            Snapshot(
                FORMAT,
                self.token,
                list(self.tallies.items()),
                [(operation, status, count) for (operation, status), count in self.requests.items()],
                [(*key, count) for key, count in self._router.retries.items()] if self._router is not None else [],
                self.lag,
                self.log.dropped if self.log is not None else 0,
                resident(),
                [self._load(route) for route in routes],
                self._replicas(routes),
                list(self.spent.items()),
                list(self.called.items()),
            )
        )

    def _load(self, route: Route) -> Load:
        assert self._router is not None
        waiting = self._router.waiting(route.key)
        load = Load(*route.key, self._router.outstanding(route.key) - waiting, waiting)
        if len(self._history) > 1:
            (begun, first), (ended, last) = self._history[0], self._history[-1]
            old, new = first.get(route.key, (0, 0)), last.get(route.key, (0, 0))
            load.per_second = (new[0] - old[0]) / (ended - begun)
            load.errors_per_second = (new[1] - old[1]) / (ended - begun)
        return load

    def _replicas(self, routes: list[Route]) -> list[ReplicaNow]:
        assert self._router is not None or not routes
        states = {state.replica_id: state for state in self._router.states()} if self._router is not None else {}
        found = []
        for route in routes:
            for target in route.replicas:
                state = states.get(target.replica_id)
                if state is not None:
                    found.append(ReplicaNow(*route.key, target.replica_id, state.connected, state.memory))
        return found

    def _sample(self, now: float) -> None:
        totals: dict[tuple[str, str], tuple[int, int]] = {}
        for (project, name, _), tally in self.tallies.items():
            calls, errors = totals.get((project, name), (0, 0))
            calls += tally.answered + sum(tally.failed.values())
            errors += sum(count for status, count in tally.failed.items() if status >= 500)
            totals[project, name] = (calls, errors)
        self._history.append((now, totals))


def _add(counts: list[int], bounds: Sequence[float], values: Sequence[float]) -> None:
    """Count values in a histogram; those of one batch are mostly of one bucket."""
    low = bisect_left(bounds, min(values))
    if low == bisect_left(bounds, max(values)):
        counts[low] += len(values)
        return
    for value in values:
        counts[bisect_left(bounds, value)] += 1


def rows_of(call: Call) -> int:
    """How many rows a call has: the first axis of its inputs."""
    inputs = call.inputs
    return inputs[0].shape[0] if inputs and inputs[0].shape else 0


class Watch:
    """One call of a deployment on its way, in the place of its `deliver`."""

    __slots__ = ("_begun", "_observer", "_route", "_span", "deliver")

    def __init__(self, observer: Observer, route: Route, deliver: Deliver, begun: float | None = None) -> None:
        self._observer = observer
        self._route = route
        self.deliver = deliver
        self._begun = monotonic() if begun is None else begun
        self._span: CallSpan | None = None if observer.tracing is None else observer.tracing.call(route)

    def __call__(self, item: Part | ModelworksError) -> None:
        if not isinstance(item, Part):
            self._ended(item.status)
        elif item.done:  # written out: every answered call comes by here
            observer, route = self._observer, self._route
            key = (route.project_id, route.name, item.model_version)
            tally = observer.tallies.get(key) or observer.tally(key)
            tally.answered += 1
            sums = tally.sums
            elapsed = monotonic() - self._begun
            tally.duration[bisect_left(SECONDS, elapsed)] += 1
            sums[0] += elapsed
            value = item.queue_us
            tally.queue[bisect_left(MICROSECONDS, value)] += 1
            sums[1] += value
            value = item.run_us
            tally.model[bisect_left(MICROSECONDS, value)] += 1
            sums[2] += value
            value = item.batch
            tally.batch[bisect_left(SIZES, value)] += 1
            sums[3] += value
            if self._span is not None:
                self._span.answered(item)
        self.deliver(item)

    def refused(self, error: ModelworksError) -> None:
        """The router or a check took it not at all."""
        self._ended(error.status)

    def cancelled(self) -> None:
        """Its caller went away; nothing will be delivered."""
        self._ended(CANCELLED)

    def _ended(self, status: int) -> None:
        route = self._route
        tally = self._observer.tally((route.project_id, route.name, route.model_version))
        tally.failed[status] = tally.failed.get(status, 0) + 1
        elapsed = monotonic() - self._begun
        tally.duration[bisect_left(SECONDS, elapsed)] += 1
        tally.sums[0] += elapsed
        if self._span is not None:
            self._span.ended(status)
