"""Routing without processes or real time: a loop whose clock jumps to the next timer, and replicas that are simulated."""

from __future__ import annotations

import asyncio
import selectors
from collections import deque

from modelworks.core.errors import ModelworksError
from modelworks.core.tensors import Tensor
from modelworks.core.types import Call
from modelworks.serve.channel import LinkLost
from modelworks.serve.router import Router
from modelworks.serve.routes import Snapshot
from modelworks.serve.wire import Part, Stats
from tests.serve_toys import SECRET, toy_route

KEY = ("p", "toy")


class _Jump(selectors.DefaultSelector):
    """Where nothing is ready, time passes at once."""

    now = 1000.0

    def select(self, timeout=None):
        found = super().select(0)
        if not found:
            assert timeout is not None, "everybody waits, and nothing will ever happen"
            self.now += max(timeout, 0.0)
        return found


class TurnedLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.jump = _Jump()
        super().__init__(self.jump)

    def time(self):
        return self.jump.now


def turned(story):
    """Run `story(bench)` in a loop of its own, in simulated time."""

    async def inside():
        bench = Bench()
        try:
            await story(bench)
        finally:
            bench.router.close()

    loop = TurnedLoop()
    try:
        loop.run_until_complete(inside())
    finally:
        loop.close()


class Replica:
    """Runs up to `most` calls at once, in `each` seconds a call on top of `base`."""

    def __init__(self, name, base=0.01, each=0.0, most=64):
        self.name, self.base, self.each, self.most = name, base, each, most
        self.link = None
        self.mood = None  # "silent": never answers; an error: answers with it
        self.served = []  # calls, in order
        self.aborted = 0
        self._queue = deque()
        self._busy = False

    async def connect(self, on_change):
        self.link = FakeLink(self, on_change)
        return self.link

    def die(self, expected=False):
        link, self.link = self.link, None
        self._queue.clear()
        link.lose(expected)

    def admit(self, link, number, call):
        self._queue.append((link, number, call, asyncio.get_running_loop().time()))
        asyncio.get_running_loop().call_soon(self._run)

    def _run(self):
        if self._busy or not self._queue or self.mood == "silent":
            return
        batch = [self._queue.popleft() for _ in range(min(self.most, len(self._queue)))]
        batch = [one for one in batch if one[1] in one[0].calls]
        loop = asyncio.get_running_loop()
        seconds = self.base + self.each * len(batch)
        self._busy = True
        loop.call_later(seconds, self._ran, batch, loop.time(), seconds)

    def _ran(self, batch, begun, seconds):
        self._busy = False
        for link, number, call, since in batch:
            deliver = link.calls.pop(number, None)
            if deliver is None:
                continue
            self.served.append(call)
            if isinstance(self.mood, ModelworksError):
                deliver(self.mood)
            else:
                deliver(Part([], self.name, True, int((begun - since) * 1e6), int(seconds * 1e6), len(batch)))
        self._run()


class FakeLink:
    def __init__(self, replica, on_change):
        self.replica, self.on_change = replica, on_change
        self.calls = {}
        self.ready = True
        self.lost = self.draining = False
        self.ping_sent = None
        self.last_ping = 0.0
        self.stats = Stats()
        self._next = 0

    @property
    def usable(self):
        return not self.lost

    def start(self, call, deliver, *, manual=False):
        if self.lost:
            raise LinkLost("gone")
        self._next += 1
        self.calls[self._next] = deliver
        self.replica.admit(self, self._next, call)
        return self._next

    def took(self, number, parts=1):
        pass

    def abort(self, number):
        self.replica.aborted += self.calls.pop(number, None) is not None

    def ping(self, now):
        self.last_ping = now
        if self.replica.mood == "silent":
            self.ping_sent = now

    def lose(self, expected):
        self.lost = True
        calls, self.calls = self.calls, {}
        for deliver in calls.values():
            loss = LinkLost("gone")
            loss.expected = expected
            deliver(loss)
        self.on_change(self)

    def close(self):
        pass


class Bench:
    """A router over simulated replicas; `call` submits, and notes when and by whom each was answered."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.router = Router(SECRET, connect=self._connect, clock=self.loop.time)
        self.replicas = {}
        self._number = 0

    async def _connect(self, endpoint, secret, *, on_change):
        replica = self.replicas.get(endpoint)
        if replica is None:
            raise OSError("nobody there")
        return await replica.connect(on_change)

    async def start(self, *replicas, **limits):
        for replica in replicas:
            self.replicas[replica.name] = replica
        self.apply(*self.replicas, **limits)
        await asyncio.sleep(0.001)

    def apply(self, *names, **limits):
        self._number += 1
        route = toy_route(*[(name, name) for name in names], **limits)
        self.router.apply(Snapshot(self._number, {route.key: route}))

    @property
    def lane(self):
        return self.router._lanes[KEY]

    @property
    def broken(self):
        return [state.replica_id for state in self.router.states() if state.broken]

    def peer(self, name):
        return next(peer for target, peer in self.router._peers.items() if target.replica_id == name)

    def call(self, key="k", *, rows=1, seconds=60.0, **options):
        """A future of (answer or error, seconds it took)."""
        begun = self.loop.time()
        future = self.loop.create_future()

        def deliver(item):
            assert not future.done(), "one answer a call"
            future.set_result((item, self.loop.time() - begun))

        tensors = [Tensor("x", "FP32", [rows, 1], b"")]
        call = Call("toy", tensors, begun + seconds, key_id=key, **options)
        self.last = self.router.submit(KEY, call, deliver)
        return future
