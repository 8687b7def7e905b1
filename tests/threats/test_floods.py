"""Row 13: sizes, shapes and slowness. Memory stays bounded, each is told 4xx, and another client notices nothing."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import psutil
import pytest

from modelworks.api.protocol import MAX_HEADER_COUNT
from tests.server import RunningServer, until
from tests.threats.conftest import Estate
from tests.threats.probe import Probe, Raw, Wire, ask, bystander, head
from tests.threats.walk import JSON, with_json

MIB = 1024 * 1024
TIMEOUT = 1.0  # of heads and bodies, in the server of these tests
PATIENCE = 4.0  # seconds that another client may have to wait on a machine that is busy with the attack itself
MEMORY = 400 * MIB
PREDICT, INFER, TRAIN = "/api/v1/deployments/iris/predict", "/v2/models/iris/infer", "/api/v1/training-jobs"
JSON_LINE = "content-type: application/json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that is impatient, of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HEADER_TIMEOUT", "BODY_TIMEOUT"):
            patch.setenv(f"MODELWORKS_{name}", str(TIMEOUT))
        own = RunningServer(tmp_path_factory.mktemp("flooded") / "home")
    yield own
    own.stop()


@pytest.fixture(autouse=True)
def unharmed(server: RunningServer) -> Iterator[None]:
    """Around each attack: another client is served, the memory stays small, nothing is left lying about."""
    gateway = server.processes("gateway")[0]
    with bystander(server, patience=PATIENCE) as other:
        yield
    assert server.processes("gateway")[0].pid == gateway.pid, "the gateway died"
    assert other.peak < MEMORY, f"{other.peak / MIB:.0f} MiB"
    until(lambda: len(_connections(gateway)) < 20, 15)
    until(lambda: not list((server.home / "tmp").iterdir()), 30)  # a job that runs at that moment has a folder there


def _connections(gateway: psutil.Process) -> list[Any]:
    return [one for one in gateway.net_connections() if one.status == psutil.CONN_ESTABLISHED]


def refused(answer: Raw, *statuses: int) -> None:
    assert answer.status in statuses, (answer.status, answer.body[:300])


# -- heads -------------------------------------------------------------------------------------------------------------


HEADS: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "100 000 headers": (b"a: b\r\n" * 100_000, (431, 0)),
    "one more than allowed": (b"a: b\r\n" * MAX_HEADER_COUNT, (431,)),
    "one of a megabyte": (b"a: " + b"b" * MIB + b"\r\n", (431, 0)),
    "a name of a megabyte": (b"b" * MIB + b": a\r\n", (431, 400, 0)),
    "many of a kilobyte": (b"".join(b"x-%d: %s\r\n" % (at, b"b" * 1000) for at in range(200)), (431,)),
    "cookies": (b"cookie: " + b"a=b; " * 50_000 + b"\r\n", (431, 0)),
    "folded": (b"a: b\r\n" + b" c\r\n" * 1000, (400, 431)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_large_head_is_refused(server: RunningServer, kind: str) -> None:
    lines, statuses = HEADS[kind]
    for method, path in (("GET", "/health"), ("POST", PREDICT)):
        start = head(method, path, server.key)[:-2]
        with Wire(server) as wire:
            wire.send(start + lines + b"\r\n")
            refused(wire.answer(method), *statuses)


@pytest.mark.parametrize("size", [9_000, 100_000, 5_000_000])
def test_a_long_url_is_refused(server: RunningServer, size: int) -> None:
    for target in ("/" + "a" * size, "/health?" + "a=b&" * (size // 4), "/api/v1/models/" + "%41" * (size // 3)):
        refused(ask(server, head("GET", target, server.key)), 414, 431, 0)


def test_many_parameters_cost_nothing(server: RunningServer) -> None:
    for query in ("limit=1&" * 900, "&" * 7000, "a" * 7000, "limit=" + "9" * 7000, "after=" + "a" * 7000):
        answer = ask(server, head("GET", f"/api/v1/models?{query}", server.key))
        refused(answer, 200, 400)


# -- bodies ------------------------------------------------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED = (JSON_LINE, "transfer-encoding: chunked")


def test_one_byte_at_a_time(server: RunningServer) -> None:
    for path in (TRAIN, PREDICT, INFER):
        body = chunk(b" ") * 50_000 + chunk(b"{") + chunk(b"}") + b"0\r\n\r\n"
        refused(ask(server, head("POST", path, server.key, *CHUNKED) + body), 400, 404)


def endless(server: RunningServer, path: str, piece: bytes, *, first: bytes = b"", limit: int = 200) -> tuple[int, Raw]:
    """MiB that the server took of a body without an end, and what it said."""
    with Wire(server) as wire:
        wire.send(head("POST", path, server.key, *CHUNKED) + first)
        sent = 0
        while sent < limit and wire.send(piece):
            sent += len(piece) // MIB or 1
        return sent, wire.answer("POST")


def test_a_body_without_an_end_is_cut_off(server: RunningServer) -> None:
    for path, most in ((TRAIN, 16), (PREDICT, 110), (INFER, 110), ("/api/v1/keys", 16)):
        sent, answer = endless(server, path, chunk(b" " * MIB))
        refused(answer, 413, 0)
        assert sent <= most, (path, sent)


@pytest.mark.parametrize(
    "first", [b"0\r\nx: ", b"0\r\n", b"5;", b"5;a=", b'5;a="', b"0" * 15, b"0\r\n" + b"a: b\r\n" * 200]
)
def test_what_is_around_chunks_has_an_end_too(server: RunningServer, first: bytes) -> None:
    """Trailers and extensions of chunks: nobody reads them, so they must not pile up."""
    for path in (TRAIN, PREDICT):
        sent, answer = endless(server, path, b"0" * MIB, first=first, limit=50)
        refused(answer, 400, 408, 413, 431, 0)
        assert sent < 20, (path, first)


def test_lies_about_the_length(server: RunningServer) -> None:
    key = server.key
    for length in ("-1", "1e3", "0x10", " ", "18446744073709551616", "9" * 100, "1, 2", "1;", "١"):
        answer = ask(
            server, head("POST", TRAIN, key, JSON_LINE, f"content-length: {length}".encode().decode("latin-1"))
        )
        refused(answer, 400, 413, 0)
    # a gigabyte, announced only: told before it comes
    for path in (TRAIN, PREDICT, INFER, "/api/v1/keys"):
        for length in (2**30, 2**40, 2**62):
            began = time.monotonic()
            refused(ask(server, head("POST", path, key, JSON_LINE, f"content-length: {length}")), 413)
            assert time.monotonic() - began < TIMEOUT
    with Wire(server) as wire:  # less than announced, then nothing
        wire.send(head("POST", TRAIN, key, JSON_LINE, "content-length: 100") + b"{}")
        refused(wire.answer("POST"), 408)
        assert wire.is_closed(5)
    with Wire(server) as wire:  # less than announced, then an end
        wire.send(head("POST", TRAIN, key, JSON_LINE, "content-length: 100") + b"{}")
        wire.socket.shutdown(socket.SHUT_WR)
        refused(wire.answer("POST"), 0, 408, 400)
    with Wire(server) as wire:  # more than announced: the rest is another request, and none
        wire.send(head("POST", TRAIN, key, JSON_LINE, "content-length: 2") + b"{}GARBAGE / x\r\n\r\n")
        refused(wire.answer("POST"), 400, 0)
        assert wire.is_closed(5)


DEEP: dict[str, bytes] = {
    "arrays": b"[" * 100_000,
    "arrays that end": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "in a field": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "in a row": b'{"inputs":[{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_002,
    "in an unknown field": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"inputs":[]}',
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_json(server: RunningServer, estate: Estate, kind: str) -> None:
    for target in (Probe(server, server.key), estate.probe()):
        with target as probe:
            for way in with_json():
                path = way.to(estate.values | {"deployments.name": "iris"})
                answer = probe.send(way.method, path, content=DEEP[kind], headers=JSON)
                assert answer.status_code in (400, 404, 413), (str(way), answer.text[:300])


def wide(one: bytes, size: int, before: bytes = b"[", after: bytes = b"]") -> bytes:
    """`one` again and again in an array, `size` bytes in all."""
    return before + (one + b",") * (size // (len(one) + 1)) + one + after


ROWS = (b'{"inputs":[', b"]}")
NAMED = b'{"inputs":[{"name":"sepal length (cm)","datatype":"FP32","shape":[1],"data":['
WIDE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "rows of nothing": (PREDICT, lambda: wide(b"{}", 60 * MIB, *ROWS)),
    "lists": (PREDICT, lambda: wide(b"[]", 24 * MIB, *ROWS)),
    "numbers for rows": (PREDICT, lambda: wide(b"1.5", 24 * MIB, *ROWS)),
    "features": (PREDICT, lambda: b'{"inputs":[{' + b",".join(b'"%d":1' % at for at in range(2_000_000)) + b"}]}"),
    "numbers": (INFER, lambda: wide(b"0.5", 60 * MIB, NAMED, b"]}]}")),
    "small numbers": (INFER, lambda: wide(b"1", 24 * MIB, NAMED, b"]}]}")),
    "texts": (INFER, lambda: wide(b'""', 60 * MIB, NAMED, b"]}]}")),
    "parameters": (INFER, lambda: wide(b"{}", 24 * MIB, b'{"inputs":[],"parameters":{"a":[', b"]}}")),
    "outputs": (INFER, lambda: wide(b'{"name":"label"}', 30 * MIB, b'{"inputs":[],"outputs":[', b"]}")),
    "a text": (INFER, lambda: b'{"inputs":"' + b"[" * (60 * MIB) + b'"}'),
    "gates": (TRAIN, lambda: wide(b"1", 4_000_000, b'{"model":"a","dataset":"b","gates":[', b"]}")),
    "gates of nothing": (TRAIN, lambda: wide(b"{}", 4_000_000, b'{"model":"a","dataset":"b","gates":[', b"]}")),
    "unknown fields": (TRAIN, lambda: b"{" + b",".join(b'"%d":1' % at for at in range(400_000)) + b"}"),
    "scopes": ("/api/v1/keys", lambda: wide(b'"x"', 4_000_000, b'{"name":"k","scopes":[', b"]}")),
}


@pytest.mark.parametrize("kind", WIDE)
def test_wide_json(server: RunningServer, estate: Estate, kind: str) -> None:
    """Few bytes a value: what it would take in memory and in errors is bounded, and nobody waits for it."""
    path, make = WIDE[kind]
    body = make()
    gateway = estate.server.processes("gateway")[0]
    began = time.monotonic()
    msgspec.json.decode(body)
    patience = max(PATIENCE, 4 * (time.monotonic() - began))  # the decoder holds the loop: what it takes on this machine
    with bystander(estate.server, patience=patience) as other, estate.probe() as probe:
        answer = probe.post(path, content=body, headers=JSON)
        assert answer.status_code in (400, 413), answer.text[:300]
        assert len(answer.content) < 10_000
    assert other.peak < MEMORY, f"{other.peak / MIB:.0f} MiB"
    assert gateway.is_running()


SHAPES: tuple[list[int], ...] = (
    [2**31, 2**31], [2**62, 4], [2**63], [10**30], [-1, -1], [-(2**63)], [2**31 - 1, 1], [0, 2**62], [1] * 17, [1] * 100_000, [],
    [2**32 + 1, 1], [65_536, 65_536], [3, -1],
)  # fmt: skip


def test_shapes_whose_product_is_huge(estate: Estate) -> None:
    with bystander(estate.server, patience=PATIENCE, path="/v2/models/iris/ready") as other, estate.probe() as probe:
        signature = probe.get("/v2/models/iris").json()["inputs"]
        fine = [{"name": one["name"], "datatype": one["datatype"], "shape": [1, 1], "data": [1.0]} for one in signature]
        for shape in SHAPES:
            for data in ([], [1.0], [[1.0]], [1.0] * 1000):
                inputs = [{**fine[0], "shape": shape, "data": data}, *fine[1:]]
                answer = probe.post(INFER, json={"inputs": inputs})
                assert answer.status_code == 400, (shape, answer.text[:300])
                assert len(answer.content) < 2000, shape
                answer = probe.post(INFER, json={"inputs": [{**one, "shape": shape, "data": data} for one in fine]})
                assert answer.status_code in (400, 200 if 0 in shape else 400), (shape, answer.text[:300])
    assert other.peak < MEMORY


NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1e-999",
    "-0",
    "0x1",
    "01",
    "1.",
    ".5",
    "+1",
    "1_0",
    "١",
    "1e400",
)


def test_numbers_that_json_does_not_have(estate: Estate) -> None:
    with estate.probe() as probe:
        row = probe.get("/v2/models/iris").json()["inputs"]
        others = ",".join(f'"{one["name"]}":1.0' for one in row[1:])
        for number in (*NUMBERS, "1" + "0" * 400, "1" + "0" * 100_000, "0." + "0" * 100_000 + "1"):
            fits = number in ("-0", "1e-999") or number.startswith("0.0")
            known = (200, 400) if fits else (400,)
            text = f'{{"inputs":[{{"{row[0]["name"]}":{number},{others}}}]}}'
            answer = probe.post(PREDICT, content=text.encode(), headers=JSON)
            assert answer.status_code in known, (number[:20], answer.text[:300])
            tensors = [f'{{"name":"{one["name"]}","datatype":"FP32","shape":[1,1],"data":[{number}]}}' for one in row]
            answer = probe.post(INFER, content=f'{{"inputs":[{",".join(tensors)}]}}'.encode(), headers=JSON)
            assert answer.status_code in known, (number[:20], answer.text[:300])
            assert "nan" not in answer.text.lower() or answer.status_code == 400
            spec = f'{{"model":"a","dataset":"b","target":"c","algorithm":"ridge","seed":{number}}}'
            answer = probe.post(TRAIN, content=spec.encode(), headers=JSON)
            assert answer.status_code in (400, 404), (number[:20], answer.text[:300])


def bombs() -> dict[str, tuple[str, bytes]]:
    zeros = b" " * (96 * MIB)
    once = gzip.compress(zeros, 6)
    return {
        "gzip": ("gzip", once),
        "twice": ("gzip", gzip.compress(once)),
        "zlib": ("deflate", zlib.compress(zeros, 6)),
        "many members": ("gzip", gzip.compress(b" " * MIB) * 200),
        "cut off": ("gzip", once[: len(once) // 2]),
        "noise behind": ("gzip", gzip.compress(b"{}") + b"x" * 1000),
        "no gzip": ("gzip", b"x" * 1000),
        "a stack": ("gzip, gzip, gzip", once),
        "brotli": ("br", once),
        "zstd": ("zstd", once),
    }


def test_compressed_bombs(server: RunningServer, estate: Estate) -> None:
    packed = bombs()
    gateway = estate.server.processes("gateway")[0]
    for kind, (encoding, body) in packed.items():
        with bystander(estate.server, patience=PATIENCE) as other, estate.probe() as probe:
            for path in (PREDICT, INFER, TRAIN):
                answer = probe.post(path, content=body, headers={**JSON, "content-encoding": encoding})
                assert answer.status_code in (400, 413, 415), (kind, path, answer.text[:300])
        assert other.peak < MEMORY, kind
    assert gateway.is_running()


# -- forms -------------------------------------------------------------------------------------------------------------


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


FORMS: dict[str, bytes] = {
    "100 000 parts": b"".join(part(f"f{at}", b"") for at in range(100_000)) + b"--b--\r\n",
    "100 000 files": part("file", b"x", '; filename="a"') * 100_000 + b"--b--\r\n",
    "a field of 4 MB": part("name", b"x" * 4 * MIB) + b"--b--\r\n",
    "a name of 4 MB": part("x" * 4 * MIB, b"") + b"--b--\r\n",
    "a header of 4 MB": b"--b\r\nx: " + b"y" * 4 * MIB + b"\r\n\r\n--b--\r\n",
    "100 000 headers of a part": b"--b\r\n" + b"x: y\r\n" * 100_000 + b"\r\n--b--\r\n",
    "a line without an end": b"--b\r\n" + b"y" * 4 * MIB,
    "no end": part("name", b"x"),
    "nothing": b"",
    "boundaries": b"--b\r\n" * 200_000,
    "almost a boundary": part("file", b"\r\n--" * 1_000_000, '; filename="a"') + b"--b--\r\n",
    "a deep schema": part("name", b"x") + part("schema", b"[" * 900_000) + part("file", b"x", '; filename="a"') + b"--b--\r\n",
    "a wide schema": (
        part("name", b"x") + part("schema", b'{"header":[' + b"1," * 400_000 + b"1]}") + part("file", b"x", '; filename="a"')
    ) + b"--b--\r\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_forms(server: RunningServer, kind: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    with Probe(server, server.key) as probe:
        for path in ("/api/v1/datasets", "/api/v1/models/x/versions"):
            began = time.monotonic()
            answer = probe.post(path, content=FORMS[kind], headers=headers)
            assert answer.status_code in (400, 413, 415), (path, answer.text[:300])
            assert time.monotonic() - began < 8
        answer = probe.post(
            "/api/v1/datasets", content=b"a=b&" * 500_000, headers={"content-type": "application/x-www-form-urlencoded"}
        )
        assert answer.status_code == 400
        for boundary in ("", "b" * 200_000, '"', "é", "b; boundary=c"):
            media = {"content-type": f"multipart/form-data; boundary={boundary}".encode()}
            answer = probe.post("/api/v1/datasets", content=b"--b--\r\n", headers=media)
            assert answer.status_code in (400, 431)


# -- slowness ----------------------------------------------------------------------------------------------------------


def crowd(server: RunningServer, stack: ExitStack, count: int, start: bytes, buffer: int | None = None) -> list[Wire]:
    wires = [stack.enter_context(Wire(server, buffer=buffer)) for _ in range(count)]
    for wire in wires:
        wire.send(start)
    return wires


def drip(wires: list[Wire], piece: bytes, seconds: float) -> None:
    until_then = time.monotonic() + seconds
    while time.monotonic() < until_then:
        for wire in wires:
            wire.send(piece)
        time.sleep(0.1)


@pytest.mark.parametrize(
    "start", [b"", b"G", b"GET /health HTTP/1.1\r\nhost: x\r\nx: "], ids=["silent", "a letter", "a head"]
)
def test_a_crowd_of_slow_heads(server: RunningServer, start: bytes) -> None:
    with ExitStack() as stack:
        wires = crowd(server, stack, 200, start)
        drip(wires[:100] if start else [], b"a", TIMEOUT + 0.5)
        assert all(wire.is_closed(5) for wire in wires)


def test_a_crowd_of_slow_bodies(server: RunningServer) -> None:
    form = "content-type: multipart/form-data; boundary=b"
    with ExitStack() as stack:
        wires = []
        for path, media in ((TRAIN, JSON_LINE), (PREDICT, JSON_LINE), (INFER, JSON_LINE), ("/api/v1/datasets", form)):
            wires += crowd(
                server, stack, 40, head("POST", path, server.key, media, "content-length: 1000") + b"--b\r\n"
            )
        drip(wires[::2], b"a", 2 * TIMEOUT)
        for wire in wires:
            refused(wire.answer("POST"), 408)
            assert wire.is_closed(5)


def test_bodies_that_came_fast_and_then_drip(server: RunningServer) -> None:
    """A start at full speed buys no time for a rest that comes byte by byte and keeps the whole in memory."""
    with ExitStack() as stack:
        start = head("POST", PREDICT, server.key, JSON_LINE, f"content-length: {8 * MIB}") + b" " * (4 * MIB)
        wires = crowd(server, stack, 4, start)
        drip(wires, b" ", 4.5 * TIMEOUT)
        for wire in wires:
            assert wire.is_closed(0.5 * TIMEOUT), "it would have gone on for hours"


def test_large_bodies_at_the_same_time(server: RunningServer) -> None:
    """What one call may send, a dozen calls may not all keep in memory."""
    with ExitStack() as stack:
        start = head("POST", PREDICT, server.key, JSON_LINE, f"content-length: {64 * MIB}")
        wires = crowd(server, stack, 12, start)
        piece = b" " * MIB
        for _ in range(60):
            wires = [wire for wire in wires if wire.send(piece)]
    # what `unharmed` looks at: the memory


@pytest.mark.parametrize("path", ["/openapi.json", "/docs/swagger-ui-bundle.js"])
def test_a_crowd_that_does_not_read(server: RunningServer, path: str) -> None:
    with ExitStack() as stack:
        wires = crowd(server, stack, 20, head("GET", path, server.key) * 30, buffer=4096)
        time.sleep(2 * TIMEOUT)
        # the server has given up on them: what it sent is what the kernel holds
        for wire in wires:
            assert wire.is_closed(10)


def test_pipelines_and_floods_of_connections(server: RunningServer) -> None:
    with Wire(server) as wire:
        wire.send(head("GET", "/api/v1/whoami", server.key) * 20_000)
        wire.is_closed(10)
    for _ in range(500):
        with Wire(server) as wire:
            wire.send(b"GET /health HTTP/1.1\r\n")
    with Probe(server, None) as probe:
        assert probe.get("/health").status_code == 200


def test_streams_are_not_forgotten(estate: Estate) -> None:
    """A hundred readers of events who leave without a word."""
    job = estate.values["training-jobs.id"]
    with estate.probe() as probe:
        training = {
            "model": "threats-flood",
            "dataset": "iris",
            "target": "species",
            "algorithm": "logistic-regression",
        }
        waiting = probe.post(TRAIN, json=training).json()["id"]
        probe.post(f"/api/v1/jobs/{waiting}/pause")
        gateway = estate.server.processes("gateway")[0]
        before = len(_connections(gateway))
        with bystander(estate.server, patience=PATIENCE), ExitStack() as stack:
            for path in (f"/api/v1/jobs/{waiting}/events/stream", f"/api/v1/jobs/{job}/events/stream"):
                crowd(estate.server, stack, 50, head("GET", path, estate.server.key))
            time.sleep(1)
        until(lambda: len(_connections(gateway)) <= before + 2, 15)
        probe.post(f"/api/v1/jobs/{waiting}/cancel")


def test_a_json_body_is_what_it_was(estate: Estate) -> None:
    """A test of the tests: bodies as large as honest clients send are taken."""
    with estate.probe() as probe:
        names = [one["name"] for one in probe.get("/v2/models/iris").json()["inputs"]]
        rows = [dict.fromkeys(names, 1.5)] * 20_000
        answer = probe.post(PREDICT, content=json.dumps({"inputs": rows}).encode(), headers=JSON)
        assert answer.status_code == 200, answer.text[:300]
        assert len(answer.json()["outputs"]) == 20_000
        tensors = [{"name": one, "datatype": "FP32", "shape": [100_000, 1], "data": [1.5] * 100_000} for one in names]
        packed = gzip.compress(json.dumps({"inputs": tensors}).encode(), 1)
        answer = probe.post(INFER, content=packed, headers={**JSON, "content-encoding": "gzip"})
        assert answer.status_code == 200, answer.text[:300]
