"""Requests that are read, sent and answered together: a real gateway, link and replica behind a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelworks.api import oip_codec
from modelworks.api.native import predict as predict_routes
from modelworks.core.types import Signature, TensorSpec
from modelworks.serve.batcher import Batcher
from modelworks.serve.host import Host
from modelworks.serve.router import Router
from modelworks.serve.routes import Limits, Route, Snapshot, Target
from tests.api_house import House, house
from tests.serve_toys import SECRET, wait_for

INFER, PREDICT = "/v2/models/sums/infer", "/api/v1/deployments/sums/predict"
SLOW = "idempotency-key: any"  # what the fast lane leaves to the application
FAULTY, DEADLY = 777.0, 666.0
SIGNATURE = Signature(
    inputs=[TensorSpec(name=name, datatype="FP32", shape=[-1, 1], column="number") for name in ("a", "b")],
    outputs=[
        TensorSpec(name="100%", datatype="BYTES", shape=[-1]),
        TensorSpec(name="both", datatype="FP32", shape=[-1, 2]),
        TensorSpec(name="nothing", datatype="FP64", shape=[-1, 0]),
    ],
)
MIXED = Signature(
    inputs=[
        TensorSpec(name="a", datatype="INT64", shape=[-1, 1], column="integer", nullable=True),
        TensorSpec(name="b", datatype="BOOL", shape=[-1, 1], column="boolean"),
    ],
    outputs=SIGNATURE.outputs,
)


class Replica:
    """In a thread and loop of its own. `kill` cuts its connections, as a death would."""

    def __init__(self, endpoint: str, name: str, signature: Signature = SIGNATURE) -> None:
        self.loop = asyncio.new_event_loop()
        self.batches: list[int] = []
        self.held = threading.Event()
        self.held.set()
        self.dies = False
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

        async def listen() -> Host:
            batcher = Batcher(self._predict, signature, model_version="sums:1")
            host = Host(batcher, secret=SECRET, replica_id=name, model_version="sums:1")
            await host.listen(endpoint)
            return host

        self.host = asyncio.run_coroutine_threadsafe(listen(), self.loop).result(5)

    def _predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.held.wait(10)
        a, b = inputs["a"][:, 0].astype(np.float32), inputs["b"][:, 0].astype(np.float32)
        self.batches.append(len(a))
        if self.dies and (a == DEADLY).any():
            self.dies = False
            self._cut()
        if (a == FAULTY).any():
            raise ValueError("a faulty row")
        texts = np.array([f'{x + y:g}],["%' for x, y in zip(a, b, strict=True)], dtype=object)
        return {"100%": texts, "both": np.stack([a + b, a - b], 1), "nothing": np.zeros((len(a), 0))}

    def _cut(self) -> None:
        for session in list(self.host.sessions):
            assert session.transport is not None
            session.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.held.set()
        asyncio.run_coroutine_threadsafe(self.host.drain(1.0), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


class Place:
    """A house whose router is a real one, in the server's loop, before `replicas`."""

    def __init__(self, found: House, folder: Path) -> None:
        self.house = found
        self.loop: asyncio.AbstractEventLoop
        self.endpoints = [str(folder / f"r{i}") for i in range(3)]
        signatures = (SIGNATURE, SIGNATURE, MIXED)
        self.replicas = [Replica(self.endpoints[i], f"r{i}", one) for i, one in enumerate(signatures)]
        self._number = 0

    def call(self, function: Any) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(5)

    def use(self, *replicas: int, signature: Signature = SIGNATURE, **limits: Any) -> None:
        """Serve by these."""
        self._number += 1
        targets = tuple(Target(f"r{i}", self.endpoints[i]) for i in replicas)
        project = self.house.admin.project_id
        route = Route(project, "sums", "sums:1", signature, "custom", None, targets, Limits(**limits))
        snapshot = Snapshot(self._number, {route.key: route})
        router = self.house.services.gateway.router
        self.call(lambda: router.apply(snapshot))
        assert wait_for(lambda: len([one for one in self.call(router.states) if one.connected]) >= len(replicas))

    def ask(self, requests: list[bytes], rounds: int = 1) -> list[list[tuple[int, bytes]]]:
        """Each on a connection of its own, all at once, `rounds` times; status and body of each answer."""

        async def one(request: bytes) -> list[tuple[int, bytes]]:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.house.port)
            found = []
            for _ in range(rounds):
                writer.write(request)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                found.append((int(head.split()[1]), await reader.readexactly(size)))
            writer.close()
            return found

        async def all_of() -> list[list[tuple[int, bytes]]]:
            return await asyncio.gather(*[one(request) for request in requests])

        return asyncio.run(all_of())

    def post(self, path: str, body: Any, *more: str) -> bytes:
        content = json.dumps(body).encode()
        return self.house.head("POST", path, f"content-length: {len(content)}", *more) + content

    @property
    def outstanding(self) -> int:
        return self.call(lambda: self.house.services.gateway.router.outstanding((self.house.admin.project_id, "sums")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("express")
    with house(folder / "home") as found:
        found.services.gateway.router = Router(SECRET)
        made = Place(found, folder)
        made.loop = found.extra["server"].servers[0].get_loop()
        made.house.client().get("/v2")  # the key is known from now on
        yield made
        made.call(found.services.gateway.router.close)
        for replica in made.replicas:
            replica.stop()


def infer(a: float, rows: int = 1) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": name, "datatype": "FP32", "shape": [rows, 1], "data": [a + i for i in range(rows)]}
            for name in "ab"
        ]
    }


def predict(a: float, rows: int = 1) -> dict[str, Any]:
    return {"inputs": [{"a": a + i, "b": a + i} for i in range(rows)]}


def mixed(a: Any, b: Any = True, **more: Any) -> dict[str, Any]:
    tensors = [
        {"name": "a", "datatype": "INT64", "shape": [1, 1], "data": [a]},
        {"name": "b", "datatype": "BOOL", "shape": [1, 1], "data": [b]},
    ]
    return {"inputs": tensors, **more}


def without_ids(body: bytes) -> Any:
    found = json.loads(body)
    found.pop("request_id", None)
    return found


@pytest.mark.parametrize(("path", "body"), [(INFER, infer), (PREDICT, predict)])
def test_many_at_once_are_answered_as_one_alone(place: Place, path: str, body: Any) -> None:
    place.use(0)
    place.replicas[0].batches.clear()
    bodies = [body(float(i), 1 if i % 3 else 1 + i % 4) for i in range(24)]
    together = place.ask([place.post(path, one) for one in bodies], rounds=5)
    assert max(place.replicas[0].batches) > 1, "nothing ran together"
    alone = [place.ask([place.post(path, one, SLOW)])[0][0] for one in bodies]
    for answers, (status, expected) in zip(together, alone, strict=True):
        assert status == 200
        for found in answers:
            assert found[0] == 200
            assert without_ids(found[1]) == without_ids(expected)
            if path == INFER:
                assert found[1] == expected
    assert place.outstanding == 0


def test_ids_integers_and_booleans_go_together_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer as the other lane gives it; what is wrong with one is told to it alone."""
    place.use(2, signature=MIXED)
    written: list[int] = []
    for bulk in (oip_codec.Usual, predict_routes.Numbers):
        write = bulk.write
        monkeypatch.setattr(bulk, "write", lambda *given, write=write: written.append(len(given[2])) or write(*given))
    ids = ["", "7", '"%b"\\', "\u00e4", None]
    good = [mixed(i, i % 2 == 0, **({} if ids[i % 5] is None else {"id": ids[i % 5]})) for i in range(15)]
    odd = [mixed(1.0), mixed(1.5), mixed(2**63), mixed(True), mixed(1, 1), mixed(1, None), mixed(None), mixed("1"),
           mixed(-(2**63)), mixed(1, id=7)]  # fmt: skip
    rows: list[dict[str, Any]] = [{"inputs": [{"a": i, "b": i % 3 == 0}]} for i in range(8)]
    rows += [{"inputs": [{"a": a, "b": b}]} for a, b in ((None, True), (1.0, True), (1.5, True), (1, 1), (2**70, False))]
    usual = rows[:8]
    for path, bodies in ((INFER, good), (INFER, good + odd), (PREDICT, usual), (PREDICT, rows)):
        written.clear()
        together = place.ask([place.post(path, one) for one in bodies], rounds=3)
        if bodies is good or bodies is usual:  # one that goes by itself and shares their batch parts the others
            assert max(written) > 1, "nothing was written together"
        for one, answers in zip(bodies, together, strict=True):
            status, expected = place.ask([place.post(path, one, SLOW)])[0][0]
            for found in answers:
                assert (found[0], without_ids(found[1])) == (status, without_ids(expected)), one
                if status == 200 and path == INFER:
                    assert found[1] == expected


def test_what_is_wrong_with_one_is_told_to_that_one_only(place: Place) -> None:
    place.use(0)
    bad = [infer(1.0) | {"inputs": []}, infer(FAULTY), infer(1e39), infer(2.0) | {"id": "7"}, infer(3.0, 2)]
    bad[4]["inputs"][0]["shape"] = [3, 1]
    requests = [place.post(INFER, one) for one in bad] + [place.post(INFER, infer(float(i))) for i in range(8)]
    answers = place.ask(requests, rounds=3)
    for wrong, found in zip((400, 500, 400, 200, 400), answers, strict=False):
        assert [status for status, _ in found] == [wrong] * 3
    assert all(status == 200 for found in answers[5:] for status, _ in found)
    assert json.loads(answers[3][0][1])["id"] == "7"


def test_an_answer_that_cannot_be_written_does_not_take_the_others_with_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.use(0)
    failed: list[int] = []

    def write(self: Any, answers: Any, request_ids: Any, ids: Any) -> list[bytes]:
        failed.append(len(request_ids))
        raise RuntimeError("one of them")

    monkeypatch.setattr(oip_codec.Usual, "write", write)
    answers = place.ask([place.post(INFER, infer(float(i))) for i in range(12)], rounds=2)
    assert failed
    for at, found in enumerate(answers):
        assert [status for status, _ in found] == [200, 200]
        assert json.loads(found[0][1])["outputs"][1]["data"] == [2.0 * at, 0.0]


def test_calls_of_a_replica_that_dies_are_sent_again(place: Place) -> None:
    place.use(0)
    router = place.house.services.gateway.router
    before = place.call(lambda: sum(router.retries.values()))
    place.ask([place.post(INFER, infer(1.0))])
    place.replicas[0].dies = True
    answers = place.ask([place.post(INFER, infer(DEADLY if i == 0 else float(i))) for i in range(8)], rounds=2)
    assert all(status == 200 for found in answers for status, _ in found)
    assert place.call(lambda: sum(router.retries.values())) > before
    assert place.outstanding == 0


def test_a_turn_is_spread_over_replicas_that_are_as_free(place: Place) -> None:
    """Neither answers until all calls are there: how fast the machine runs either of them does not count."""
    place.use(0, 1)
    pair = place.replicas[:2]
    for replica in pair:
        replica.batches.clear()
        replica.held.clear()
    clients = []
    try:
        for i in range(16):
            clients.append(socket.create_connection(("127.0.0.1", place.house.port)))
            clients[-1].sendall(place.post(INFER, infer(float(i))))
        assert wait_for(lambda: place.outstanding == 16)
    finally:
        for replica in pair:
            replica.held.set()
    for client in clients:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    first, second = (sum(replica.batches) for replica in pair)
    assert first + second == 16
    assert min(first, second) > 0.3 * (first + second)


def test_clients_that_go_away_leave_nothing_behind(place: Place) -> None:
    place.use(0)
    replica = place.replicas[0]
    place.ask([place.post(INFER, infer(1.0))])
    replica.held.clear()
    clients = []
    try:
        for i in range(12):
            clients.append(socket.create_connection(("127.0.0.1", place.house.port)))
            clients[-1].sendall(place.post(INFER, infer(float(i))))
        assert wait_for(lambda: place.outstanding == 12)
        for client in clients[:6]:
            client.close()
        assert wait_for(lambda: place.outstanding == 6)
    finally:
        replica.held.set()
    for client in clients[6:]:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    assert place.outstanding == 0


def test_those_above_the_bound_wait_or_are_refused(place: Place) -> None:
    place.use(0, queue=2, in_flight=4, concurrency=4)
    answers = place.ask([place.post(INFER, infer(float(i))) for i in range(16)], rounds=4)
    seen = {status for found in answers for status, _ in found}
    assert 200 in seen
    assert seen <= {200, 429}
    assert place.outstanding == 0


def test_all_are_counted(place: Place) -> None:
    place.use(0)
    observer = place.house.services.gateway.observer

    def counted() -> tuple[int, ...]:
        project = place.house.admin.project_id
        tally = observer.tally((project, "sums", "sums:1"))
        return (
            observer.requests.get(("oip.infer", 200), 0),
            tally.answered, sum(tally.duration), sum(tally.queue), sum(tally.batch),
            sum(count for spender, count in observer.called.items() if spender[:2] == (project, "sums")),
        )  # fmt: skip

    before = place.call(counted)
    place.ask([place.post(INFER, infer(float(i))) for i in range(8)], rounds=4)
    assert [after - first for after, first in zip(place.call(counted), before, strict=True)] == [32] * 6
