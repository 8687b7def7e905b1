"""Routing over in-process hosts: queues, deadlines, retries, draining, poison. Real processes: test_serve_faults.py."""

import asyncio
import contextlib
import threading
import time

import pytest
import uvloop

from modelworks.core.errors import DeadlineExceeded, Forbidden, ModelworksError, NotFound, RateLimited, Unavailable
from modelworks.core.tensors import unpack
from modelworks.core.types import Principal
from modelworks.serve.batcher import Batcher
from modelworks.serve.gateway import Gateway
from modelworks.serve.host import Host
from modelworks.serve.router import Router
from modelworks.serve.routes import Snapshot
from tests.serve_toys import PRINCIPAL, SECRET, SIGNATURE, toy_call, toy_predict, toy_route


class Gate:
    """A model that runs when it is let, and tells what it ran."""

    def __init__(self):
        self.open = threading.Event()
        self.ran = []

    def __call__(self, inputs):
        self.open.wait(10)
        self.ran += inputs["x"][:, 0].tolist()
        return {"value": inputs["x"][:, 0] * 2}


class Room:
    """Hosts by name, and a gateway whose snapshot names some of them."""

    def __init__(self, folder):
        self.folder = folder
        self.hosts = {}
        self.router = Router(SECRET)
        self.gateway = Gateway(self.router, timeout=5.0)
        self.number = 0

    def endpoint(self, name):
        return str(self.folder / name)

    async def host(self, name, predict=toy_predict, **limits):
        host = Host(
            Batcher(predict, SIGNATURE, model_version="toy:1"),
            secret=SECRET,
            replica_id=name,
            model_version="toy:1",
            **limits,
        )
        await host.listen(self.endpoint(name))
        self.hosts[name] = host
        return host

    def apply(self, *names, **limits):
        self.number += 1
        route = toy_route(*[(name, self.endpoint(name)) for name in names], **limits)
        self.router.apply(Snapshot(self.number, {route.key: route}))
        return route

    async def ready(self, count):
        for _ in range(400):
            if sum(state.connected for state in self.router.states()) == count:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"not {count} replicas became ready")

    async def predict(self, x=2.0, **options):
        answer = await self.gateway.infer(PRINCIPAL, toy_call(x, **options))
        return unpack(answer.outputs[0])[0]

    def task(self, x=2.0, **options):
        return asyncio.create_task(self.predict(x, **options))

    def crash(self, name):
        """What the kernel does to a dying process's connections."""
        host = self.hosts.pop(name)
        host._server.close()
        for session in list(host.sessions):
            session.transport.abort()


@contextlib.asynccontextmanager
async def room(folder):
    it = Room(folder)
    try:
        yield it
    finally:
        it.router.close()
        for host in it.hosts.values():
            await host.drain(0.2)


def run(story, tmp_path):
    async def inside():
        async with room(tmp_path) as it:
            await story(it)

    uvloop.run(inside())


def test_calls_go_to_the_least_outstanding_replica(tmp_path):
    gates = Gate(), Gate()

    async def story(it):
        await it.host("a", gates[0])
        await it.host("b", gates[1])
        it.apply("a", "b")
        await it.ready(2)
        tasks = [it.task(x) for x in range(10)]
        await asyncio.sleep(0.02)
        assert [state.outstanding for state in it.router.states()] == [5, 5]
        assert it.router.outstanding(("p", "toy")) == 10
        for gate in gates:
            gate.open.set()
        assert await asyncio.gather(*tasks) == [2.0 * x for x in range(10)]
        assert it.router.outstanding(("p", "toy")) == 0

    run(story, tmp_path)


def test_calls_wait_for_a_replica_to_come(tmp_path):
    async def story(it):
        it.apply("a")
        tasks = [it.task(x) for x in range(5)]
        await asyncio.sleep(0.1)
        assert not it.router.ready(("p", "toy"))
        assert not any(task.done() for task in tasks)
        await it.host("a")
        assert await asyncio.gather(*tasks) == [2.0 * x for x in range(5)]
        assert it.router.ready(("p", "toy"))

    run(story, tmp_path)


def test_with_no_replica_the_deadline_ends_the_wait(tmp_path):
    async def story(it):
        it.apply("a")
        begun = time.monotonic()
        with pytest.raises(Unavailable) as info:
            await it.predict(seconds=0.1)
        assert (info.value.status, info.value.code) == (503, "no_ready_replica")
        assert info.value.retry_after
        assert time.monotonic() - begun < 0.4

    run(story, tmp_path)


def test_a_busy_replica_ends_in_504_and_the_call_is_dropped_there(tmp_path):
    gate = Gate()

    async def story(it):
        host = await it.host("a", gate)
        it.apply("a", in_flight=2)
        await it.ready(1)
        tasks = [it.task(seconds=0.1) for _ in range(4)]
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, DeadlineExceeded)
        assert it.router.outstanding(("p", "toy")) == 0
        gate.open.set()
        assert await it.predict(3.0) == 6.0
        assert len(host._batcher) == 0

    run(story, tmp_path)


def test_a_full_queue_refuses_at_once(tmp_path):
    gate = Gate()

    async def story(it):
        it.apply("a", queue=3)
        waiting = [it.task(x) for x in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as info:
            await it.predict()
        assert (info.value.code, info.value.status) == ("queue_full", 503)
        await it.host("a", gate)
        it.apply("a", queue=3, in_flight=3)
        await it.ready(1)
        more = [it.task(x) for x in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(RateLimited) as limited:
            await it.predict()
        assert limited.value.retry_after
        assert limited.value.status == 429
        more[0].cancel()
        await asyncio.sleep(0)
        late = it.task(9.0)
        gate.open.set()
        assert await asyncio.gather(*waiting, *more[1:], late) == [0.0, 2.0, 4.0, 2.0, 4.0, 18.0]

    run(story, tmp_path)


def test_cancelled_waiters_leave_nothing_behind(tmp_path):
    async def story(it):
        it.apply("a", queue=10)
        for _ in range(300):
            tasks = [it.task() for _ in range(5)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        lane = it.router._lanes["p", "toy"]
        assert lane.queued == 0
        assert lane.waiting.size() < 200

    run(story, tmp_path)


def test_a_lost_replicas_calls_are_repeated_elsewhere(tmp_path):
    gates = Gate(), Gate()

    async def story(it):
        await it.host("a", gates[0])
        await it.host("b", gates[1])
        it.apply("a", "b")
        await it.ready(2)
        tasks = [it.task(x) for x in range(10)]
        await asyncio.sleep(0.02)
        once = it.task(99.0, idempotent=False)
        await asyncio.sleep(0.02)
        states = {state.replica_id: state.outstanding for state in it.router.states()}
        victim = max(states, key=states.get)
        it.crash(victim)
        for gate in gates:
            gate.open.set()
        assert await asyncio.gather(*tasks) == [2.0 * x for x in range(10)]
        with pytest.raises(Unavailable) as info:
            await once
        assert info.value.code == "replica_lost", "a call that may have run is not run twice"

    run(story, tmp_path)


def test_a_call_that_two_replicas_died_with_is_not_tried_again(tmp_path):
    gates = [Gate() for _ in range(3)]

    async def story(it):
        for name, gate in zip("abc", gates, strict=True):
            await it.host(name, gate)
        it.apply("a", "b", "c")
        await it.ready(3)
        task = it.task(666.0)
        for _ in range(2):
            await asyncio.sleep(0.05)
            (victim,) = [state.replica_id for state in it.router.states() if state.outstanding]
            it.crash(victim)
        with pytest.raises(ModelworksError) as info:
            await task
        assert (info.value.status, info.value.code) == (500, "poison_call")
        for gate in gates:
            gate.open.set()
        assert await it.predict(1.0) == 2.0, "the third replica was spared"

    run(story, tmp_path)


def test_those_aboard_with_a_poison_call_do_not_share_its_fate(tmp_path):
    async def story(it):
        gates = {}
        for name in "abc":
            gates[name] = Gate()
            await it.host(name, gates[name])
        it.apply("a")
        await it.ready(1)
        poison = it.task(666.0)
        bystanders = [it.task(x) for x in range(5)]
        await asyncio.sleep(0.02)
        it.apply("a", "b", "c")
        await it.ready(3)
        it.crash("a")
        await asyncio.sleep(0.05)
        loads = {state.replica_id: state.outstanding for state in it.router.states()}
        assert sorted([loads["b"], loads["c"]]) == [1, 1], "suspects go one by one"
        guilty = next(name for name in "bc" if it.hosts[name]._batcher._items and _holds(it.hosts[name], 666.0))
        it.crash(guilty)
        with pytest.raises(ModelworksError, match="2 replicas died"):
            await poison
        for gate in gates.values():
            gate.open.set()
        assert await asyncio.gather(*bystanders) == [2.0 * x for x in range(5)]

    def _holds(host, x):
        return any(item.reading.data == toy_call(x).inputs[0].data for item in host._batcher._items.values())

    run(story, tmp_path)


def test_a_new_snapshot_lets_old_replicas_finish(tmp_path):
    gate = Gate()

    async def story(it):
        old = await it.host("old", gate)
        await it.host("new")
        it.apply("old")
        await it.ready(1)
        aboard = it.task(5.0)
        await asyncio.sleep(0.02)
        it.apply("new")
        assert await it.predict(1.0) == 2.0
        assert not aboard.done()
        assert len(old.sessions) == 1
        gate.open.set()
        assert await aboard == 10.0
        for _ in range(100):
            if not old.sessions:
                break
            await asyncio.sleep(0.01)
        assert not old.sessions, "a drained replica's link is closed"
        assert [state.replica_id for state in it.router.states()] == ["new"]
        assert gate.ran == [5.0]

    run(story, tmp_path)


def test_an_older_snapshot_changes_nothing(tmp_path):
    async def story(it):
        await it.host("a")
        it.apply("a")
        it.router.apply(Snapshot(0, {}))
        assert await it.predict(1.0) == 2.0

    run(story, tmp_path)


def test_a_deleted_deployment_fails_its_waiters(tmp_path):
    async def story(it):
        it.apply("nowhere")
        task = it.task()
        await asyncio.sleep(0.01)
        it.router.apply(Snapshot(100, {}))
        with pytest.raises(NotFound, match="was deleted"):
            await task
        with pytest.raises(NotFound, match="'toy'"):
            await it.predict()

    run(story, tmp_path)


def test_a_draining_replica_loses_no_call(tmp_path):
    async def story(it):
        await it.host("a")
        await it.host("b")
        it.apply("a", "b")
        await it.ready(2)
        results = []

        async def steady():
            for x in range(100):
                results.append(await it.predict(x) == 2 * x)

        clients = [asyncio.create_task(steady()) for _ in range(8)]
        await asyncio.sleep(0.01)
        await it.hosts.pop("a").drain(5)
        await asyncio.gather(*clients)
        assert results == [True] * 800

    run(story, tmp_path)


def test_a_full_replica_is_tried_again_later(tmp_path):
    gate = Gate()

    async def story(it):
        await it.host("a", gate, queue_limit=0)
        it.apply("a")
        with pytest.raises(Unavailable) as info:
            await it.predict()
        assert info.value.code == "replica_lost"

    run(story, tmp_path)


def test_closing_fails_what_is_left(tmp_path):
    async def story(it):
        it.apply("nowhere")
        task = it.task()
        await asyncio.sleep(0.01)
        assert await it.router.drain(0.05) is False
        with pytest.raises(Unavailable) as refused:
            await it.predict()
        it.router.close()
        with pytest.raises(Unavailable) as info:
            await task
        assert info.value.code == refused.value.code == "stopping"

    run(story, tmp_path)


def test_the_gateway_asks_the_policy_first(tmp_path):
    async def story(it):
        await it.host("a")
        route = it.apply("a")
        narrow = Principal("k", "k", "p", "invoke-only", frozenset(), models=frozenset({"other"}))
        stranger = Principal("k", "k", "other-project", "developer", frozenset())
        with pytest.raises(Forbidden, match="'toy'"):
            await it.gateway.infer(narrow, toy_call())
        with pytest.raises(NotFound, match="'toy'"):
            await it.gateway.infer(stranger, toy_call())
        with pytest.raises(NotFound, match="serves toy:1"):
            it.gateway.route(PRINCIPAL, "toy", "2")
        assert it.gateway.route(PRINCIPAL, "toy", "1") is route
        assert it.gateway.routes(PRINCIPAL) == [route]
        assert it.gateway.routes(narrow) == it.gateway.routes(stranger) == []
        await it.ready(1)
        assert it.gateway.ready(PRINCIPAL, "toy")

        def over_quota(principal, call):
            raise RateLimited("enough", retry_after=1)

        with pytest.raises(RateLimited):
            await Gateway(it.router, checks=[over_quota]).infer(PRINCIPAL, toy_call())

    run(story, tmp_path)


def test_parts_stream(tmp_path):
    async def story(it):
        await it.host("a")
        it.apply("a")
        parts = [part async for part in it.gateway.stream(PRINCIPAL, toy_call(4.0))]
        assert [unpack(part.outputs[0]) for part in parts] == [[8.0]]
        assert parts[0].done

    run(story, tmp_path)
