"""What a gateway does at a time for one key while another calls too: the rule by itself, and on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelworks.api.shares import FEW, PACE, SHARE, Shares
from tests.api_house import House, house
from tests.grpc_house import OIP, grpc_house
from tests.openai_house import furnish
from tests.server import until
from tests.test_grpc_door import infer_request

PATH = "/api/v1/deployments/iris/predict"
BODY = json.dumps({"inputs": [{"length": 1.5, "colour": "red", "count": 3, "ripe": True}]}).encode()


def test_a_key_alone_is_never_held_up() -> None:
    shares = Shares()
    assert not any(shares.crowded("one", now / 1000) for now in range(10_000))
    assert shares.crowded("two", 10.0)
    assert shares.crowded("one", 10.5)
    assert not shares.crowded("one", 11.6)  # the other has not called for a second


def test_calls_beyond_the_share_wait_their_turn_and_those_that_left_are_skipped() -> None:
    shares, begun = Shares(), []

    def waits(number: int, there: bool = True) -> Any:
        return lambda: begun.append(number) or True if there else False

    assert all(shares.enter("a", waits(-1)) for _ in range(SHARE))
    assert not shares.enter("a", waits(1, there=False))
    assert not shares.enter("a", waits(2))
    assert not shares.enter("a", waits(3))
    assert shares.enter("b", waits(-1))
    shares.leave("b")
    assert begun == []
    shares.leave("a")
    assert begun == [2]
    for _ in range(SHARE + 1):
        shares.leave("a")
    assert begun == [2, 3]
    assert not shares._at_work
    assert not shares._waiting


def test_tasks_wait_until_no_more_come_and_one_that_is_cancelled_takes_no_place() -> None:
    async def story() -> None:
        shares = Shares()
        turns = [asyncio.ensure_future(shares.turn("a")) for _ in range(SHARE + 8)]
        await asyncio.sleep(0)
        assert sum(turn.done() for turn in turns) == FEW
        turns[FEW].cancel()
        for _ in range(400):
            await asyncio.sleep(0.005)
            if sum(turn.done() for turn in turns) == SHARE + 1:
                break
        assert not turns[-1].done()
        for _ in range(8 - 1):
            shares.leave("a")
        await asyncio.wait_for(asyncio.gather(*turns, return_exceptions=True), 5)
        for _ in range(SHARE):
            shares.leave("a")
        assert not shares._at_work
        assert not shares._patient

    asyncio.run(story())


def test_a_flood_holds_no_more_than_its_share_and_all_are_answered(tmp_path: Path) -> None:
    """Over HTTP and gRPC, while another key calls; a client that leaves while it waits is not called."""
    with house(tmp_path) as api, grpc_house(api) as rpc:
        calm = api.client("viewer")
        assert calm.post(PATH, content=BODY).status_code in (200, 403)
        calm = api.client("developer")
        api.client("admin").post(PATH, content=BODY)  # both keys are known from now on
        assert calm.post(PATH, content=BODY).status_code == 200
        _keep_crowded(api)
        api.router.hold = True
        head = api.head("POST", PATH, f"content-length: {len(BODY)}", "content-type: application/json")
        flood = [socket.create_connection(("127.0.0.1", api.port), timeout=10) for _ in range(SHARE + 10)]
        before = len(api.router.calls)
        for connection in flood:
            connection.sendall(head + BODY)
        until(lambda: len(api.router.calls) == before + SHARE, 5)
        method = rpc.channel.unary_unary(OIP + "ModelInfer")
        late = method.future(infer_request().SerializeToString(), metadata=rpc.metadata("admin"), timeout=10)
        api.router.hold = False
        assert calm.post(PATH, content=BODY).status_code == 200  # the other key is not concerned
        assert len(api.router.calls) == before + SHARE + 1
        flood.pop().close()
        for connection in flood[:SHARE]:
            connection.close()  # those at work
        for connection in flood[SHARE:]:
            connection.settimeout(5)
            assert b" 200 " in connection.recv(65536)[:20]
            connection.close()
        assert late.result(10)
        until(lambda: api.services.shares._at_work == {}, 5)  # it has seen all that left
        assert api.services.shares._waiting == {}


class Turns:
    """Counts a loop's turns from the moment a router is first asked, and in which of them it is asked."""

    def __init__(self, router: Any) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.number = 0
        self.asked: list[int] = []
        self._submit = router.submit
        router.submit = self.submit

    def submit(self, *given: Any, **named: Any) -> Any:
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
            self._tick()
        self.asked.append(self.number)
        return self._submit(*given, **named)

    def _tick(self) -> None:
        assert self.loop is not None
        self.number += 1
        self.loop.call_soon(self._tick)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What comes meanwhile, the loop finds all at once."""
        assert self.loop is not None
        gate = threading.Event()
        self.loop.call_soon_threadsafe(gate.wait, 10)
        self.asked.clear()
        yield
        gate.set()

    def most(self) -> int:
        """Calls that reached the router in one turn."""
        return max(Counter(self.asked).values())


CALLS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (PATH, json.loads(BODY), ("x-priority: low",)),
    ("/v2/models/iris/infer", {"inputs": [
        {"name": "length", "datatype": "FP32", "shape": [1, 1], "data": [1.5]},
        {"name": "colour", "datatype": "BYTES", "shape": [1, 1], "data": ["red"]},
        {"name": "count", "datatype": "INT64", "shape": [1, 1], "data": [3]},
        {"name": "ripe", "datatype": "BOOL", "shape": [1, 1], "data": [True]},
    ]}, ("x-sticky-key: one",)),
    ("/v1/embeddings", {"model": "embed", "input": "abba"}, ()),
    ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": "Hi"}]}, ()),
]  # fmt: skip


def test_a_flood_of_slow_calls_has_few_of_each_turn(tmp_path: Path) -> None:
    """Of those that go through the framework, as many begin in one turn of the loop as PACE allows, while another key calls."""
    with house(tmp_path) as api:
        furnish(api)
        client, turns = api.client("admin"), Turns(api.router)
        for path, body, more in CALLS:
            assert client.post(path, json=body, headers=dict(line.split(": ") for line in more)).status_code == 200
            data = json.dumps(body).encode()
            head = api.head("POST", path, f"content-length: {len(data)}", "content-type: application/json", *more)
            for crowded in (False, True):
                api.services.shares._until = float("inf") if crowded else 0.0
                flood = [socket.create_connection(("127.0.0.1", api.port), timeout=10) for _ in range(40)]
                until(lambda: len(api.extra["server"].server_state.connections) >= 40, 5)
                with turns.held():
                    for connection in flood:
                        connection.sendall(head + data)
                for connection in flood:
                    assert connection.recv(65536).startswith(b"HTTP/1.1 200 "), path
                    connection.close()
                assert len(turns.asked) == 40
                assert (turns.most() <= PACE) == crowded, (path, crowded, turns.asked)
        until(lambda: not api.services.shares._paced, 5)


def test_a_flooded_stream_of_inferences_has_few_of_each_turn(tmp_path: Path) -> None:
    with house(tmp_path) as api, grpc_house(api) as rpc:
        _keep_crowded(api)
        turns = Turns(api.router)
        request = infer_request().SerializeToString()
        rpc.call(OIP + "ModelInfer", request)
        stream = rpc.channel.stream_stream(OIP + "ModelStreamInfer")
        with turns.held():
            calls = [stream(iter([request] * 20), metadata=rpc.metadata(), timeout=20) for _ in range(20)]
            time.sleep(0.2)  # for grpc to read them meanwhile
        assert sum(len(list(call)) for call in calls) == 400
        assert len(turns.asked) == 400
        assert turns.most() <= 2 * PACE  # a turn may have the end of one count and the beginning of the next
        until(lambda: not api.services.shares._paced, 5)


def test_a_flood_of_questions_to_the_catalog_leaves_threads_to_others(tmp_path: Path) -> None:
    with house(tmp_path) as api:
        _keep_crowded(api)
        library, gate, inside = api.services.library, threading.Event(), []
        list_datasets = library.datasets

        def slow(caller: Any, **bounds: Any) -> Any:
            if caller.principal.key_id == api.admin.key_id:
                inside.append(1)
                gate.wait(10)
            return list_datasets(caller, **bounds)

        library.datasets = slow  # type: ignore[method-assign]
        head = api.head("GET", "/api/v1/datasets")
        flood = [socket.create_connection(("127.0.0.1", api.port), timeout=10) for _ in range(SHARE + 40)]
        for connection in flood:
            connection.sendall(head)
        until(lambda: len(inside) == SHARE, 5)
        assert api.client("developer").get("/api/v1/datasets").status_code == 200
        assert len(inside) == SHARE
        gate.set()
        for connection in flood:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            connection.close()
        until(lambda: api.services.shares._at_work == {}, 5)


def _keep_crowded(api: House) -> None:
    api.services.shares._until = float("inf")
