"""The rows that are about doors, over gRPC: keys, scopes, tenants, traversal, nonsense and floods, for every method there is."""

from __future__ import annotations

import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from modelworks.api.grpc import inference, lifecycle, open
from modelworks.api.grpc.door import Door, Method
from modelworks.api.grpc.messages import message
from modelworks.security import policy
from tests.server import until
from tests.test_grpc_door import HEALTH
from tests.threats.conftest import Estate
from tests.threats.test_traversal import Watch, payloads

Code = grpc.StatusCode
GONE = ("revoked", "expired", "disabled")
REFUSALS = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.FAILED_PRECONDITION, Code.PERMISSION_DENIED,
            Code.RESOURCE_EXHAUSTED}  # fmt: skip
BROKEN = {Code.INTERNAL, Code.UNKNOWN, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.ABORTED}


def methods() -> dict[str, Method]:
    """All that the server has, from its own registration."""
    door = Door(None)  # type: ignore[arg-type]
    for module in (inference, lifecycle, open):
        module.mount(door)
    return door.methods


METHODS = methods()


class Caller:
    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def __call__(
        self, path: str, data: bytes, key: str | None, *, seconds: float = 20
    ) -> tuple[grpc.StatusCode, bytes]:
        """The status, and all that came back: messages or the error's text and metadata."""
        metadata = (("authorization", f"Bearer {key}"),) if key is not None else ()
        call = self.channel.stream_stream(path)(iter([data]), metadata=metadata, timeout=seconds)
        got = b""
        try:
            for part in call:
                got += part
                if path.endswith("/Watch"):
                    call.cancel()
                    break
        except grpc.RpcError as error:
            trailing = b"".join(
                item if isinstance(item, bytes) else item.encode() for _, item in error.trailing_metadata() or ()
            )
            return error.code(), got + str(error.details()).encode() + trailing
        return Code.OK, got


@pytest.fixture(scope="module")
def call(estate: Estate) -> Iterator[Caller]:
    caller = Caller(estate.server.grpc_port)
    yield caller
    caller.channel.close()


def fields(kind: Any, value: str, depth: int = 0) -> dict[str, Any]:
    """A request in which every text is `value`."""
    found: dict[str, Any] = {}
    for field in kind.fields:
        if field.containing_oneof is not None and field.name == "chunk":
            continue
        if field.message_type is not None and field.message_type.full_name.startswith("google.protobuf."):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.type == field.TYPE_STRING:
            item: Any = value
        elif field.type == field.TYPE_MESSAGE and depth < 3:
            item = fields(field.message_type, value, depth + 1)
        else:
            continue
        found[field.name] = [item] if field.is_repeated else item
    return found


def request(method: Method, value: str) -> bytes:
    kind = method.request or message("inference.ModelInferRequest")  # reflection reads any text it is asked for
    try:
        data: bytes = kind(**fields(kind.DESCRIPTOR, value)).SerializeToString()
    except UnicodeEncodeError:
        return b""
    return data


def test_every_method_refuses_who_has_no_key_or_one_that_is_gone(estate: Estate, call: Caller) -> None:
    assert len(METHODS) > 40
    keys = [None, "", "mw_" + "a" * 43, *(estate.keys[who] for who in GONE)]
    for path, method in METHODS.items():
        for key in keys:
            expected = Code.OK if path in HEALTH else Code.UNAUTHENTICATED
            assert call(path, b"", key)[0] == expected, (path, key and key[:6])
        assert method.operation is not None or path in HEALTH
    assert call("/no.Such/Method", b"", None)[0] == Code.UNAUTHENTICATED


def test_every_method_refuses_whose_scope_is_another(estate: Estate, call: Caller) -> None:
    scopes = {role: policy.ROLES[role] for role in ("developer", "viewer", "invoke-only")}  # type: ignore[index]
    scopes["narrow"] = frozenset({"data:read", "invoke"})  # type: ignore[assignment]
    seen = set()
    for path, method in METHODS.items():
        if method.operation is None:
            continue
        scope = policy.OPERATIONS[method.operation]
        for who, has in scopes.items():
            refused = scope != policy.ANY_KEY and scope not in has
            code = call(path, request(method, "nothing"), estate.keys[who])[0]
            assert (code == Code.PERMISSION_DENIED) == refused, (path, who, code)
            seen.add(refused)
    assert seen == {True, False}


def test_another_tenants_objects_are_not_there(estate: Estate, call: Caller) -> None:
    """What an id of ours is answered with is what an id that was never given is answered with."""
    ids = [value for name, value in estate.values.items() if name.endswith(".id")]
    for path, method in METHODS.items():
        if method.operation is None or method.request is None or path.endswith("Datasets/Upload"):
            continue
        for value, none in [("iris", "nothing"), *((one, "job_00000000000000000000ffff") for one in ids)]:
            key = estate.keys["other-admin"]
            code, body = call(path, request(method, value), key)
            absent = call(path, request(method, none), key)[0]
            assert code == absent, (path, value, code, body[:200])
            if code == Code.OK and not path.endswith(
                "ModelStreamInfer"
            ):  # lists and figures; that one echoes the id it was sent
                assert b"iris:1" not in body, path
                assert not any(one.encode() in body for one in ids), path


@pytest.fixture
def watch(estate: Estate) -> Iterator[Watch]:
    found = Watch(estate.server.home)
    yield found
    assert found.around() == found.before, "something was written outside of the home"
    (found.home.parent / "outside.txt").unlink()


def test_no_text_of_any_message_leads_out(estate: Estate, call: Caller, watch: Watch) -> None:
    hostile = payloads(estate.server.home)
    asked = [path for path, method in METHODS.items() if method.request is not None and path not in HEALTH]
    each = 24  # of some two hundred payloads, other ones for every method
    turns = itertools.cycle(hostile)
    used = set()
    for path in asked:
        for value in itertools.islice(turns, each):
            used.add(value)
            code, body = call(path, request(METHODS[path], value), estate.keys["admin"])
            assert code not in BROKEN, (path, value, code, body[:300])
            watch.look(body, (path, value))
            assert b"Traceback" not in body, (path, value)
    assert len(used) > 180


def test_nonsense_is_refused_and_nothing_breaks(estate: Estate, call: Caller) -> None:
    chance = random.Random(7)
    for path, method in METHODS.items():
        whole = request(method, "iris") or b"\x0a\x04iris"
        for number in range(8):
            data = bytearray(whole)
            if number < 5:
                for _ in range(1 + number):
                    data[chance.randrange(len(data))] = chance.randrange(256)
            else:
                data = bytearray(chance.randbytes(chance.randrange(1, 200)))
            code, body = call(path, bytes(data), estate.keys["viewer"])
            assert code not in BROKEN, (path, bytes(data), code, body[:300])
    assert call("/grpc.health.v1.Health/Check", b"", None)[0] == Code.OK


def test_metadata_has_bounds(estate: Estate, call: Caller) -> None:
    for metadata in ([("x-large", "a" * 100_000)], [(f"x-{number}", "a" * 50) for number in range(5000)]):
        for key in (None, estate.keys["admin"]):
            head = [("authorization", f"Bearer {key}")] if key else []
            method = call.channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            with pytest.raises(grpc.RpcError) as caught:
                method(b"", metadata=[*head, *metadata], timeout=10)
            assert caught.value.code() in (Code.RESOURCE_EXHAUSTED, Code.UNAUTHENTICATED)
    assert call("/grpc.health.v1.Health/Check", b"", None)[0] == Code.OK


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def attacks() -> Iterator[tuple[str, bytes]]:
    """What others' HTTP/2 was brought down with."""
    path = b"/inference.GRPCInferenceService/ServerLive"
    block = b"\x83\x86\x00\x05:path" + bytes([len(path)]) + path + b"\x00\x0a:authority\x01x"
    yield "not HTTP/2", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    yield "random bytes", random.Random(1).randbytes(100_000)
    yield (
        "rapid reset",
        PREFACE
        + SETTINGS
        + b"".join(frame(1, 4, number, block) + frame(3, 0, number, b"\0\0\0\x08") for number in range(1, 40_001, 2)),
    )
    yield (
        "endless CONTINUATION",
        PREFACE + SETTINGS + frame(1, 0, 1, block) + frame(9, 0, 1, b"\x00\x01a\x01b" * 3000) * 400,
    )
    yield "SETTINGS flood", PREFACE + SETTINGS * 50_000
    yield "PING flood", PREFACE + SETTINGS + frame(6, 0, 0, bytes(8)) * 50_000
    yield "window overflow", PREFACE + SETTINGS + frame(8, 0, 0, b"\x7f\xff\xff\xff") * 3
    yield "a frame that is too large", PREFACE + SETTINGS + b"\xff\xff\xff\0\0\0\0\0\x01" + bytes(100_000)
    yield "table bomb", PREFACE + SETTINGS + frame(1, 4, 1, b"\x3f" + b"\xff" * 20 + block)


def test_hostile_connections_do_not_harm_the_others(estate: Estate, call: Caller) -> None:
    """After each of them, and during, others are answered; the gateway's memory stays where it was."""
    (gateway, *_) = estate.server.processes("gateway")
    key, ready = estate.keys["admin"], "/inference.GRPCInferenceService/ServerReady"
    before = gateway.memory_info().rss
    for name, data in attacks():
        with socket.create_connection(("127.0.0.1", estate.server.grpc_port), timeout=5) as connection:
            connection.settimeout(5)
            sender = threading.Thread(target=_send, args=(connection, data), daemon=True)
            sender.start()
            assert call(ready, b"", key, seconds=15)[0] == Code.OK, name
            sender.join(10)
    until(lambda: call(ready, b"", key)[0] == Code.OK, 10)
    assert gateway.is_running()
    assert gateway.memory_info().rss - before < 150 * 2**20


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
        while connection.recv(65536):
            pass
    except OSError:
        pass


def test_a_connection_that_says_nothing_is_closed(estate: Estate) -> None:
    """Within header_timeout (10 s), as over HTTP; here with a preface that never ends."""
    with socket.create_connection(("127.0.0.1", estate.server.grpc_port), timeout=20) as connection:
        connection.sendall(PREFACE[:10])
        begun = time.monotonic()
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass
        assert time.monotonic() - begun < 19
