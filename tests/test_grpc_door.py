"""gRPC in front of its methods: credentials, the policy table, rates, sizes, deadlines, errors."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from modelworks.api.grpc import entries, server
from modelworks.api.grpc.door import Method
from modelworks.api.grpc.messages import message
from modelworks.core.specs import KeySpec
from modelworks.security import policy
from tests.api_house import house
from tests.grpc_house import OIP, GrpcHouse, grpc_house
from tests.server import until

HEALTH = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def rpc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcHouse]:
    with (
        house(tmp_path_factory.mktemp("home"), max_body=2_000_000, body_timeout=1.0) as found,
        grpc_house(found) as served,
    ):
        yield served


def infer_request(model: str = "iris", **fields: Any) -> Any:
    request = message("inference.ModelInferRequest")(model_name=model, **fields)
    data = (struct.pack("<f", 1.5), b"\x03\0\0\0red", struct.pack("<q", 3), b"\x01")
    for name, datatype, raw in zip(
        ("length", "colour", "count", "ripe"), ("FP32", "BYTES", "INT64", "BOOL"), data, strict=True
    ):
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        request.raw_input_contents.append(raw)
    return request


def test_without_a_key_every_method_but_health_is_unauthenticated(rpc: GrpcHouse) -> None:
    assert set(rpc.door.methods) > HEALTH
    for path in [*rpc.door.methods, "/inference.GRPCInferenceService/Nothing", "/no.Service/Method"]:
        expected = Code.OK if path in HEALTH else Code.UNAUTHENTICATED
        assert rpc.code(path, metadata=()) == expected, path


def test_every_registered_method_has_an_operation_and_reflection_lists_them_all(rpc: GrpcHouse) -> None:
    open_to_all = {path for path, method in rpc.door.methods.items() if method.operation is None}
    assert open_to_all == HEALTH
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    for version in ("v1", "v1alpha"):
        stream = rpc.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
        data = next(stream(iter([ask.SerializeToString()]), metadata=rpc.metadata(), timeout=10))
        listed = {
            item.name
            for item in reflection_pb2.ServerReflectionResponse.FromString(data).list_services_response.service
        }
        assert listed == {path.split("/")[1] for path in rpc.door.methods}
        assert {"inference.GRPCInferenceService", "modelworks.v1.Training"} < listed


def test_a_method_without_an_operation_cannot_be_registered(rpc: GrpcHouse) -> None:
    with pytest.raises(ValueError, match=r"rogue\.list"):
        rpc.door.register(Method("/rogue.Service/List", "rogue.list", lambda rpc, request: None, None, False, False))
    with pytest.raises(ValueError, match="ServerLive"):
        rpc.door.add("inference.GRPCInferenceService", {})


def test_the_verdicts_are_those_of_http_for_every_role(rpc: GrpcHouse) -> None:
    by_operation: dict[str, tuple[str, str]] = {}
    for path, method, rule in rpc.house.app.table:
        if rule.operation and not rule.stream:
            by_operation.setdefault(rule.operation, (method, re.sub(r"\{[^}]*\}", "nothing", path)))
    for role in rpc.house.keys:
        with rpc.house.client(role) as client:
            for path, method in rpc.door.methods.items():
                if method.operation is None:
                    continue
                verb, url = by_operation[method.operation]
                refused = client.request(verb, url).status_code == 403
                assert (rpc.code(path, metadata=rpc.metadata(role)) == Code.PERMISSION_DENIED) == refused, (role, path)
                scope = policy.OPERATIONS[method.operation]
                assert refused == (scope != policy.ANY_KEY and scope not in policy.ROLES[role]), (role, path)  # type: ignore[index]


def test_a_wrong_key_is_unauthenticated_however_it_is_wrong(rpc: GrpcHouse) -> None:
    key = rpc.house.keys["admin"]
    wrong = ["", "Bearer", f"Basic {key}", key, f"Bearer {key}x", f"Bearer {key[:-1]}", "Bearer mw_" + "a" * 43]
    for value in wrong:
        assert rpc.code(OIP + "ServerLive", metadata=(("authorization", value),)) == Code.UNAUTHENTICATED, value
    twice = (*rpc.metadata(), *rpc.metadata())
    assert rpc.code(OIP + "ServerLive", metadata=twice) == Code.UNAUTHENTICATED
    assert rpc.code(OIP + "ServerLive") == Code.OK


def test_another_project_is_for_system_administrators(rpc: GrpcHouse) -> None:
    with rpc.house.client() as client:
        client.post("/api/v1/projects", json={"name": "elsewhere"})
    there = ("x-project", "elsewhere")
    assert rpc.code(OIP + "RepositoryIndex", metadata=rpc.metadata("admin", there)) == Code.OK
    assert rpc.code(OIP + "RepositoryIndex", metadata=rpc.metadata("invoke-only", there)) == Code.PERMISSION_DENIED
    nowhere = rpc.metadata("admin", ("x-project", "nowhere"))
    assert rpc.code(OIP + "RepositoryIndex", metadata=nowhere) == Code.NOT_FOUND
    assert rpc.code(OIP + "ModelInfer", infer_request(), metadata=rpc.metadata("admin", there)) == Code.NOT_FOUND


def test_a_revoked_key_is_refused(rpc: GrpcHouse) -> None:
    access, caller = rpc.house.services.access, rpc.house.caller()
    key, text = access.create_key(caller, KeySpec(name="short", role="developer"))
    metadata = (("authorization", f"Bearer {text}"),)
    assert rpc.code(OIP + "ServerLive", metadata=metadata) == Code.OK
    access.revoke_key(caller, key.id)
    rpc.house.services.authenticator.refresh()
    assert rpc.code(OIP + "ServerLive", metadata=metadata) == Code.UNAUTHENTICATED


def test_the_rate_limit_is_told_with_when_to_come_back(rpc: GrpcHouse) -> None:
    spec = KeySpec(name="slow", role="invoke-only", requests_per_minute=2)
    key = rpc.house.services.access.create_key(rpc.house.caller(), spec)[1]
    metadata = (("authorization", f"Bearer {key}"),)
    _, call = rpc.with_call(OIP + "ServerLive", metadata=metadata)
    assert dict(call.trailing_metadata())["x-ratelimit-remaining-requests"] == "1"
    rpc.call(OIP + "ServerLive", metadata=metadata)
    with pytest.raises(grpc.RpcError) as caught:
        rpc.call(OIP + "ServerLive", metadata=metadata)
    assert caught.value.code() == Code.RESOURCE_EXHAUSTED
    trailing = dict(caught.value.trailing_metadata())
    assert 0 < int(trailing["retry-after"]) <= 30
    assert trailing["x-error-code"] == "rate_limited"
    status = message("google.rpc.Status").FromString(trailing["grpc-status-details-bin"])
    retry = message("google.rpc.RetryInfo")()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert 0 < retry.retry_delay.seconds <= 30


def test_the_request_id_is_the_clients_or_a_new_one(rpc: GrpcHouse) -> None:
    _, call = rpc.with_call(OIP + "ServerLive", metadata=rpc.metadata("admin", ("x-request-id", "mine-1")))
    assert dict(call.trailing_metadata())["x-request-id"] == "mine-1"
    _, call = rpc.with_call(OIP + "ServerLive", metadata=rpc.metadata("admin", ("x-request-id", "no spaces")))
    assert dict(call.trailing_metadata())["x-request-id"].startswith("req_")


def test_errors_have_their_status_and_name_the_field(rpc: GrpcHouse) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rpc.call(OIP + "ModelMetadata", message("inference.ModelMetadataRequest")(name="nope"))
    assert caught.value.code() == Code.NOT_FOUND
    assert "nope" in caught.value.details()
    assert dict(caught.value.trailing_metadata())["x-error-code"] == "deployment_not_found"
    assert rpc.code(OIP + "ModelInfer", b"\xff\xff\xff") == Code.INVALID_ARGUMENT
    assert rpc.code(OIP + "RepositoryModelLoad") == Code.NOT_FOUND
    assert rpc.code(OIP + "SystemSharedMemoryStatus") == Code.UNIMPLEMENTED
    assert rpc.code("/modelworks.v1.Training/Create") == Code.INVALID_ARGUMENT


def test_an_unexpected_error_says_nothing_of_the_inside(rpc: GrpcHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("secret path")

    monkeypatch.setattr(rpc.house.services.library, "datasets", broken)
    with pytest.raises(grpc.RpcError) as caught:
        rpc.call("/modelworks.v1.Datasets/List")
    assert caught.value.code() == Code.INTERNAL
    assert "secret" not in str(caught.value)


def test_a_message_beyond_the_limit_is_refused_packed_or_not(rpc: GrpcHouse) -> None:
    large = infer_request()
    large.raw_input_contents[1] = bytes(3_000_000)
    assert rpc.code(OIP + "ModelInfer", large) == Code.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as caught:
        rpc.call(OIP + "ModelInfer", large, compression=grpc.Compression.Gzip)
    assert caught.value.code() == Code.RESOURCE_EXHAUSTED
    assert rpc.code(OIP + "ServerLive") == Code.OK


def test_a_message_that_does_not_come_is_not_waited_for(rpc: GrpcHouse) -> None:
    def never() -> Iterator[bytes]:
        time.sleep(5)
        yield b""

    call = rpc.channel.stream_unary("/modelworks.v1.Datasets/Upload")
    begun = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        call(never(), metadata=rpc.metadata(), timeout=10)
    assert caught.value.code() == Code.DEADLINE_EXCEEDED
    assert time.monotonic() - begun < 4


def test_health_is_open_and_knows_the_services(rpc: GrpcHouse) -> None:
    check = "/grpc.health.v1.Health/Check"
    for service in ("", "inference.GRPCInferenceService", "modelworks.v1.Deployment"):
        request = health_pb2.HealthCheckRequest(service=service)
        found = health_pb2.HealthCheckResponse.FromString(rpc.call(check, request, metadata=()))
        assert found.status == health_pb2.HealthCheckResponse.SERVING
    assert rpc.code(check, health_pb2.HealthCheckRequest(service="nothing"), metadata=()) == Code.NOT_FOUND


def test_large_messages_share_the_room_of_large_bodies(rpc: GrpcHouse) -> None:
    """Two at a time have room here (2 x max_body); a third is refused, small ones never are, and the room comes back."""
    large = infer_request()
    large.raw_input_contents[1] = struct.pack("<I", 1_900_000) + bytes(1_900_000)
    rpc.house.router.hold = True
    method = rpc.channel.unary_unary(OIP + "ModelInfer")
    try:
        before = len(rpc.house.router.calls)
        waiting = [method.future(large.SerializeToString(), metadata=rpc.metadata(), timeout=20) for _ in range(2)]
        until(lambda: len(rpc.house.router.calls) == before + 2, 10)
        with pytest.raises(grpc.RpcError) as caught:
            rpc.call(OIP + "ModelInfer", large)
        assert caught.value.code() == Code.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())["x-error-code"] == "too_many_large_bodies"
        stream = rpc.channel.stream_stream(OIP + "ModelStreamInfer")(
            iter([large.SerializeToString()]), metadata=rpc.metadata(), timeout=10
        )
        with pytest.raises(grpc.RpcError, match="too many large bodies"):
            next(stream)
        assert rpc.code(OIP + "ServerLive") == Code.OK
    finally:
        rpc.house.router.hold = False
        for call in waiting:
            call.cancel()
    until(lambda: rpc.house.services.room.taken == 0, 5)
    rpc.call(OIP + "ModelInfer", large)
    assert rpc.house.services.room.taken == 0


def test_a_stream_ends_when_its_key_is_revoked(rpc: GrpcHouse) -> None:
    """An idle stream of inferences and an upload that waits for its next chunk."""
    access, caller = rpc.house.services.access, rpc.house.caller()
    key, text = access.create_key(caller, KeySpec(name="streaming", role="developer"))
    metadata = (("authorization", f"Bearer {text}"),)
    released = threading.Event()

    def one(data: bytes) -> Iterator[bytes]:
        yield data
        released.wait(10)

    upload = message("modelworks.v1.UploadDatasetRequest")(header={"name": "never"}).SerializeToString()
    opened = [
        rpc.channel.stream_stream(path)(one(data), metadata=metadata, timeout=10)
        for path, data in (
            (OIP + "ModelStreamInfer", infer_request().SerializeToString()),
            ("/modelworks.v1.Datasets/Upload", upload),
        )
    ]
    try:
        next(opened[0])
        access.revoke_key(caller, key.id)
        rpc.house.services.authenticator.refresh()
        begun = time.monotonic()
        for call in opened:
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() == Code.UNAUTHENTICATED
        assert time.monotonic() - begun < 5
    finally:
        released.set()
    until(lambda: not rpc.door._open, 5)
    assert not list((rpc.house.home / "tmp").glob("upload-*"))


def test_headers_that_never_end_are_not_handed_over(rpc: GrpcHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """grpc gives the loop all that came when such a connection breaks: 100,000 entries here, from a client without a key."""
    made: list[str] = []
    pair = entries._pair

    def watched(name: str, value: Any) -> tuple[str, Any]:
        made.append(name)
        return pair(name, value)

    monkeypatch.setattr(cygrpc, "_Metadatum", watched)
    with socket.create_connection(("127.0.0.1", rpc.port), timeout=10) as connection:
        start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
        head = b"\x83\x86\x04\x04/a/b\x01\x01x\x0f\x10\x10application/grpc\x00\x02te\x08trailers"
        connection.sendall(start + frame(1, 0, 1, head) + frame(9, 0, 1, b"\x00\x01a\x01b" * 2000) * 50)
    until(lambda: "a" in made, 10)
    assert rpc.code(OIP + "ServerLive") == Code.OK
    assert made.count("a") <= entries.MAX + 1


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """One of HTTP/2."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def test_a_connection_that_does_not_take_our_bounds_is_closed(tmp_path: Path) -> None:
    """A client that never acknowledges the settings, as every HTTP/2 client must, within header_timeout."""
    with house(tmp_path, header_timeout=0.5) as found, grpc_house(found) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
            while connection.recv(65536):
                pass  # TimeoutError when it stays open
        assert served.code(OIP + "ServerLive") == Code.OK


def test_connections_beyond_the_most_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with house(tmp_path) as found, grpc_house(found) as served, contextlib.ExitStack() as opened:
        assert served.code(OIP + "ServerLive") == Code.OK  # the first
        ends = [
            opened.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=10)) for _ in range(6)
        ]
        closed = [end for end in ends if _is_closed(end)]
        assert len(closed) >= 4
        assert served.code(OIP + "ServerLive") == Code.OK


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(1.0)
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        return not connection.recv(9)
    except OSError:
        return True
