"""What a gateway does at a time for one key while another calls too: the rule by itself, and on real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

from modelworks.api.shares import FEW, SHARE, Shares
from tests.api_house import House, house
from tests.grpc_house import OIP, grpc_house
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
        assert api.services.shares._at_work == {}
        assert api.services.shares._waiting == {}


def _keep_crowded(api: House) -> None:
    api.services.shares._until = float("inf")
