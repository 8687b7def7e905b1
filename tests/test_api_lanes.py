"""The same requests through the fast lane and through the application: equal status, headers and body."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from modelworks.api.fastlane import Exchange, FastLane, target
from modelworks.core.errors import Unavailable
from modelworks.core.tensors import pack
from modelworks.serve.wire import Part
from tests.api_house import ROW, House, house, read_all
from tests.test_api_oip import inputs

PREDICT = "/api/v1/deployments/iris/predict"
INFER = "/v2/models/iris/infer"
SLOW = {"idempotency-key": "any"}  # what the fast lane leaves to the application, which makes nothing of it here


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home"), max_body=300_000, body_timeout=0.8, header_timeout=0.6) as found:
        for role in found.keys:
            found.client(role).get("/v2")  # keys are known from now on
        yield found


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """The exchanges whose bodies the fast lane took."""
    seen: list[Exchange] = []
    go = FastLane._go

    def watched(lane: FastLane, exchange: Exchange) -> None:
        seen.append(exchange)
        go(lane, exchange)

    monkeypatch.setattr(FastLane, "_go", watched)
    return seen


def both(
    api: House, taken: list[Exchange], path: str, content: bytes, role: str = "admin", **headers: str
) -> tuple[httpx2.Response, httpx2.Response]:
    sent = {"x-request-id": "same", "content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    with api.client(role) as client:
        before = len(taken)
        fast = client.post(path, content=content, headers=sent)
        assert len(taken) == before + 1, "the fast lane did not take it"
        slow = client.post(path, content=content, headers=sent | SLOW)
        assert len(taken) == before + 1, "the fast lane took both"
    return fast, slow


def same(fast: httpx2.Response, slow: httpx2.Response) -> None:
    assert fast.status_code == slow.status_code
    assert fast.content == slow.content
    fast_headers, slow_headers = dict(fast.headers), dict(slow.headers)
    for headers in (fast_headers, slow_headers):
        assert headers.pop("date")
        headers.pop("x-ratelimit-remaining-requests", None)
        headers.pop("x-ratelimit-reset-requests", None)
    assert fast_headers == slow_headers


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def rows(**changes: Any) -> bytes:
    return body({"inputs": [ROW | changes]})


CASES: list[tuple[str, bytes, int]] = [
    (PREDICT, rows(), 200),
    (PREDICT, body({"inputs": [ROW] * 40}), 200),
    (PREDICT, rows(length=None), 200),
    (PREDICT, rows(length=7), 200),
    (PREDICT, rows(colour="grün \u0000 \U0001f34c"), 200),
    (PREDICT, rows(colour=None), 400),
    (PREDICT, rows(colour=""), 400),
    (PREDICT, rows(colour=3), 400),
    (PREDICT, rows(length="long"), 400),
    (PREDICT, rows(length=True), 400),
    (PREDICT, rows(length=1e300), 400),
    (PREDICT, rows(count=1.5), 400),
    (PREDICT, rows(count=2.0), 200),
    (PREDICT, rows(count=2**63), 400),
    (PREDICT, rows(count=-(2**63)), 400),
    (PREDICT, rows(ripe=1), 400),
    (PREDICT, rows(extra=1), 400),
    (PREDICT, body({"inputs": [{"length": 1}]}), 400),
    (PREDICT, body({"inputs": []}), 400),
    (PREDICT, body({"inputs": [3]}), 400),
    (PREDICT, body({"inputs": [ROW], "more": 1}), 400),
    (PREDICT, body([]), 400),
    (PREDICT, b"", 400),
    (PREDICT, b"{", 400),
    (PREDICT, b"\xff\xfe", 400),
    (PREDICT, b'{"inputs":[' + b"[" * 5000 + b"]" * 5000 + b"]}", 400),
    (PREDICT, b'{"inputs":[{"length":NaN}]}', 400),
    (PREDICT, b'{"inputs":[{"length":1e999,"colour":"a","count":1,"ripe":true}]}', 400),
    (PREDICT, b'{"inputs":[{"length":1,"length":2,"colour":"a","count":1,"ripe":true}]}', 200),
    ("/api/v1/deployments/none/predict", rows(), 404),
    (INFER, body({"inputs": inputs()}), 200),
    (INFER, body({"id": "7", "inputs": inputs(), "outputs": [{"name": "label"}]}), 200),
    (INFER, body({"inputs": inputs(), "parameters": {"binary_data_output": True}}), 200),
    (INFER, body({"inputs": inputs(length={"shape": [3, 1]})}), 400),
    (INFER, body({"inputs": inputs(), "outputs": [{"name": "none"}]}), 400),
    (INFER, body({}), 400),
    (INFER, b"no", 400),
    ("/v2/models/iris/versions/1/infer", body({"inputs": inputs()}), 200),
    ("/v2/models/iris/versions/9/infer", body({"inputs": inputs()}), 404),
    ("/v2/models/none/infer", body({"inputs": inputs()}), 404),
]


@pytest.mark.parametrize(("path", "content", "status"), CASES)
def test_both_lanes_answer_the_same(api: House, taken: list[Exchange], path: str, content: bytes, status: int) -> None:
    fast, slow = both(api, taken, path, content)
    assert fast.status_code == status, fast.text
    same(fast, slow)


def binary(*, outputs: bool = False, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """A request in the binary extension, and its header."""
    blobs = {
        "length": struct.pack("<2f", 1.5, 2),
        "colour": struct.pack("<I", 3) + b"red" + struct.pack("<I", 1) + b"x",
        "count": struct.pack("<2q", 3, -4),
        "ripe": b"\x01\x00",
    } | {name: blob for name, blob in changes.items() if isinstance(blob, bytes)}
    tensors = [
        {"name": item["name"], "shape": item["shape"], "datatype": item["datatype"],
         "parameters": {"binary_data_size": len(blobs[item["name"]])}}
        for item in inputs()
    ]  # fmt: skip
    for tensor in tensors:
        tensor.update({} if isinstance(changes.get(tensor["name"]), bytes) else changes.get(tensor["name"], {}))
    head = body({"inputs": tensors, "parameters": {"binary_data_output": outputs}})
    length = str(len(head))
    return head + b"".join(blobs.values()), {
        "inference_header_content_length": length,
        "content_type": "application/octet-stream",
    }


@pytest.mark.parametrize("outputs", [False, True])
def test_binary_tensors_in_and_out(api: House, taken: list[Exchange], outputs: bool) -> None:
    content, headers = binary(outputs=outputs)
    fast, slow = both(api, taken, INFER, content, **headers)
    assert fast.status_code == 200, fast.text
    same(fast, slow)
    call = api.router.calls[-1]
    assert {tensor.name: tensor.data for tensor in call.inputs}["length"] == struct.pack("<2f", 1.5, 2)
    if not outputs:
        assert fast.json()["outputs"][0]["data"] == ["b", "b"]
        return
    size = int(fast.headers["inference-header-content-length"])
    assert fast.headers["content-type"] == "application/octet-stream"
    described = json.loads(fast.content[:size])["outputs"]
    assert [item["parameters"]["binary_data_size"] for item in described] == [10, 16]
    assert all("data" not in item for item in described)
    assert fast.content[size:] == b"\x01\x00\x00\x00b" * 2 + struct.pack("<4f", 0.25, 0.75, 0.25, 0.75)


@pytest.mark.parametrize(
    ("changes", "length", "named"),
    [
        ({"length": b"\x00" * 4}, None, "'length'"),
        ({"length": {"parameters": {"binary_data_size": -1}}}, None, "'length'"),
        ({"length": {"parameters": {"binary_data_size": True}}}, None, "'length'"),
        ({"length": {"parameters": {"binary_data_size": 10**9}}}, None, "'length'"),
        ({"length": {"data": [1, 2]}}, None, "'length'"),
        ({"length": {"shape": [1] * 40}}, None, "axes"),
        ({"ripe": {"parameters": {"binary_data_size": 1}}}, None, "1 bytes follow"),
        ({"ripe": b"\x01\x02"}, None, "missing value"),
        ({"count": struct.pack("<2q", -(2**63), 1)}, None, "missing value"),
        ({"colour": struct.pack("<I", 1) + b"a" + struct.pack("<I", 0)}, None, "missing value"),
        ({"colour": struct.pack("<I", 1000) + b"abc"}, None, "'colour'"),
        ({"colour": struct.pack("<I", 1) + b"\xff" + struct.pack("<I", 1) + b"a"}, None, "UTF-8"),
        ({}, "999999", "Inference-Header-Content-Length"),
        ({}, "-1", "Inference-Header-Content-Length"),
        ({}, "x", "Inference-Header-Content-Length"),
        ({}, "3", "JSON"),
        ({"length": {"parameters": {"shared_memory_region": "r"}}}, None, "shared memory"),
    ],
)
def test_binary_data_that_does_not_fit_is_refused_in_both_lanes(
    api: House, taken: list[Exchange], changes: dict[str, Any], length: str | None, named: str
) -> None:
    content, headers = binary(**changes)
    if length is not None:
        headers["inference_header_content_length"] = length
    before = len(api.router.calls)
    fast, slow = both(api, taken, INFER, content, **headers)
    assert fast.status_code in (400, 501), fast.text
    assert named in fast.json()["error"]
    same(fast, slow)
    assert len(api.router.calls) == before


def test_a_limited_key_counts_once_in_either_lane(api: House, taken: list[Exchange]) -> None:
    key = api.make_key("invoke-only", requests_per_minute=6)
    headers = {"authorization": f"Bearer {key}"}
    left = []
    with api.client(None) as client:
        assert client.get("/v2", headers=headers).headers["x-ratelimit-remaining-requests"] == "5"
        for more in ({}, SLOW, {}, SLOW, {}):
            answer = client.post(PREDICT, content=rows(), headers=headers | more)
            left.append(answer.headers["x-ratelimit-remaining-requests"])
        assert left == ["4", "3", "2", "1", "0"]
        refused = [client.post(PREDICT, content=rows(), headers=headers | more | {"x-request-id": "same"})
                   for more in ({}, SLOW)]  # fmt: skip
    assert [answer.status_code for answer in refused] == [429, 429]
    assert len(taken) == 4
    same(*refused)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (PREDICT + "?x=1", {}),
        ("/api/v1/deployments/ir%69s/predict", {}),
        (PREDICT, {"x-project": "default"}),
        (PREDICT, {"content-encoding": "gzip"}),
        (PREDICT, {"content-type": "text/plain"}),
        (PREDICT, {"content-type": "application/octet-stream", "inference-header-content-length": "1"}),
        (PREDICT, {"authorization": "Bearer mw_" + "a" * 43}),
        (PREDICT, {"connection": "close"}),
        (INFER, {"content-type": "application/octet-stream"}),
        ("/v2/models/iris/versions/0/infer", {}),
    ],
)
def test_what_is_not_plainly_hot_goes_to_the_application(
    api: House, taken: list[Exchange], path: str, headers: dict[str, str]
) -> None:
    with api.client() as client:
        client.post(path, content=rows(), headers=headers)
        client.post(path, content=iter([rows()]), headers=headers)  # chunked
    assert not taken


def test_a_key_without_the_scope_or_the_deployment_is_refused_alike(api: House, taken: list[Exchange]) -> None:
    with api.client("viewer") as client:
        assert client.post(PREDICT, content=rows()).status_code == 403
    assert not taken
    key = api.make_key("invoke-only", models=["other"])
    api.keys["narrow"] = key
    with api.client("narrow") as client:
        client.get("/v2")
    fast, slow = both(api, taken, PREDICT, rows(), "narrow")
    assert fast.status_code == 403
    same(fast, slow)


def test_the_router_refusing_and_failing_is_told_alike(
    api: House, taken: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise Unavailable("no replica is ready and 9 calls wait already", code="queue_full", retry_after=2.0)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    for submit, status in ((full, 503), (broken, 500)):
        monkeypatch.setattr(api.router, "submit", submit)
        for path, content in ((PREDICT, rows()), (INFER, body({"inputs": inputs()}))):
            fast, slow = both(api, taken, path, content)
            assert fast.status_code == status
            same(fast, slow)


def test_an_answer_that_is_not_what_the_model_promised_is_told_alike(
    api: House, taken: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    def uneven(key: Any, call: Any, deliver: Any, **_: Any) -> Any:
        deliver(Part([pack("label", "BYTES", [1], ["b"]), pack("probabilities", "FP32", [2, 2], [0.5] * 4)], "iris:1"))
        return type("Done", (), {"done": True})()

    monkeypatch.setattr(api.router, "submit", uneven)
    fast, slow = both(api, taken, PREDICT, rows())
    assert fast.status_code == 500
    same(fast, slow)


# -- on the wire -------------------------------------------------------------------------------------------------------


def request(api: House, content: bytes, *more: str, path: str = PREDICT) -> bytes:
    return api.head("POST", path, f"content-length: {len(content)}", *more) + content


def test_pipelined_requests_of_both_lanes_are_answered_in_order(api: House, taken: list[Exchange]) -> None:
    mixed = b"".join(
        request(api, rows(), f"x-request-id: id-{number}", *([] if number % 2 else ["idempotency-key: a"]))
        for number in range(8)
    )
    answers = api.raw(mixed + request(api, rows(), "x-request-id: id-8", "connection: close"))
    found = [answers.index(b"x-request-id: id-%d" % number) for number in range(9)]
    assert found == sorted(found)
    assert answers.count(b"HTTP/1.1 200") == 9


def test_what_comes_behind_a_call_that_takes_its_time_waits(
    api: House, taken: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []

    def submit(key: Any, call: Any, deliver: Any, **_: Any) -> Any:
        held.append(deliver)
        return type("Held", (), {"done": False})()

    server = api.extra["server"]
    monkeypatch.setattr(api.router, "submit", submit)
    with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
        connection.sendall(request(api, rows(), "x-request-id: first") + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        wait(lambda: held)
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(10)
        connection.settimeout(5)
        loop = next(iter(server.server_state.connections)).loop
        outputs = [pack("label", "BYTES", [1], ["b"]), pack("probabilities", "FP32", [1, 2], [0.5, 0.5])]
        loop.call_soon_threadsafe(held[0], Part(outputs, "iris:1"))
        received = b""
        while received.count(b"HTTP/1.1 200") < 2:
            received += connection.recv(65536)
    assert received.index(b"first") < received.rindex(b"HTTP/1.1 200")


@pytest.mark.parametrize("size", [1, 7, 60])
def test_a_body_in_pieces_is_put_together(api: House, taken: list[Exchange], size: int) -> None:
    whole = request(api, rows(), "x-request-id: pieces")
    with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(whole), size):
            connection.sendall(whole[start : start + size])
            time.sleep(0.0005)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert len(taken) == 1


def test_a_stalled_and_a_dripping_body_are_408_and_the_connection_ends(api: House, taken: list[Exchange]) -> None:
    for drip in (False, True):
        with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
            connection.sendall(api.head("POST", PREDICT, "content-length: 5000") + b"{")
            for _ in range(40 if drip else 0):
                try:
                    connection.sendall(b" ")
                except OSError:
                    break
                time.sleep(0.05)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert b"connection: close" in answer
    assert not taken


def test_too_large_a_body_is_413_before_it_comes(api: House, taken: list[Exchange]) -> None:
    answer = api.raw(api.head("POST", PREDICT, "content-length: 300001"))
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_client_that_goes_away_aborts_its_call(api: House, taken: list[Exchange]) -> None:
    api.router.hold = True
    before = len(api.router.aborted)
    try:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
                connection.sendall(request(api, rows()))
                calls = len(taken)
                wait(lambda calls=calls: len(taken) >= calls)
                time.sleep(0.005)
        wait(lambda: len(api.router.aborted) == before + 20)
    finally:
        api.router.hold = False
    with api.client() as client:
        assert client.post(PREDICT, content=rows()).status_code == 200


def test_an_idle_connection_ends_after_the_keep_alive_time(api: House, taken: list[Exchange]) -> None:
    config = api.extra["server"].config
    usual, config.timeout_keep_alive = config.timeout_keep_alive, 1
    try:
        with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
            for _ in range(3):
                connection.sendall(request(api, rows()))
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            before = time.monotonic()
            assert connection.recv(10) == b""
            assert 0.7 < time.monotonic() - before < 3
    finally:
        config.timeout_keep_alive = usual


def test_stopping_finishes_the_call_that_is_on_its_way(
    tmp_path: Any, taken: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []

    def submit(key: Any, call: Any, deliver: Any, **_: Any) -> Any:
        held.append(deliver)
        return type("Held", (), {"done": False})()

    with house(tmp_path / "home") as own:
        own.client().get("/v2")
        monkeypatch.setattr(own.router, "submit", submit)
        server = own.extra["server"]
        with socket.create_connection(("127.0.0.1", own.port), timeout=5) as connection:
            connection.sendall(request(own, rows()))
            wait(lambda: held)
            loop = next(iter(server.server_state.connections)).loop
            server.should_exit = True
            wait(lambda: not taken[0].keep_alive)
            outputs = [pack("label", "BYTES", [1], ["b"]), pack("probabilities", "FP32", [1, 2], [0.5, 0.5])]
            loop.call_soon_threadsafe(held[0], Part(outputs, "iris:1"))
            answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer


def test_only_plain_paths_are_hot() -> None:
    assert target(b"/api/v1/deployments/a.b-c_1/predict")
    assert target(b"/v2/models/m/versions/12/infer")
    for url in (b"/v2/models/m/infer/", b"/v2/models//infer", b"/v2/models/m/infer\n", b"/v2/models/-m/infer",
                b"/v2/models/" + b"m" * 101 + b"/infer", b"/api/v1/deployments/m/predict?", b"//v2/models/m/infer",
                b"/v2/models/m/versions/01/infer"):  # fmt: skip
        assert target(url) is None, url


def wait(condition: Any, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
