"""The gRPC server of a house (tests/api_house.py) on a real port, and small callers for raw methods."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
from grpc._cython import cygrpc

from modelworks.api.grpc.door import Door
from modelworks.api.grpc.messages import message
from modelworks.api.grpc.server import build
from tests.api_house import House

OIP = "/inference.GRPCInferenceService/"
V1 = "/modelworks.v1."


class GrpcHouse:
    def __init__(self, house: House, door: Door, port: int) -> None:
        self.house = house
        self.door = door
        self.port = port
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        )

    def metadata(self, role: str | None = "admin", *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
        return (*((("authorization", f"Bearer {self.house.keys[role]}"),) if role else ()), *more)

    def call(self, path: str, request: Any = b"", *, answer: str | None = None, **options: Any) -> Any:
        """One message there, one back: parsed as `answer`, else bytes."""
        return self.with_call(path, request, answer=answer, **options)[0]

    def with_call(self, path: str, request: Any = b"", *, answer: str | None = None, **options: Any) -> tuple[Any, Any]:
        method = self.channel.unary_unary(path)
        data = request if isinstance(request, bytes) else request.SerializeToString()
        options = {"metadata": self.metadata(), "timeout": 10, **options}
        found, call = method.with_call(data, **options)
        return (message(answer).FromString(found) if answer else found), call

    def code(self, path: str, request: Any = b"", **options: Any) -> grpc.StatusCode:
        """The status of a call of any shape."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        options = {"metadata": self.metadata(), "timeout": 10, **options}
        call = self.channel.stream_stream(path)(iter([data]), **options)
        try:
            next(call)
            call.cancel()
        except StopIteration:
            pass
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


@contextlib.contextmanager
def grpc_house(house: House) -> Iterator[GrpcHouse]:
    """`house` over gRPC too, in a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    entry = cygrpc._Metadatum  # which the server replaces in its process, and that is the tests' here

    async def start() -> tuple[Any, Door, int]:
        server, door, port = build(house.services, "127.0.0.1:0")
        await server.start()
        return server, door, port

    server, door, port = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    found = GrpcHouse(house, door, port)
    try:
        yield found
    finally:
        found.channel.close()
        loop.call_soon_threadsafe(door.stopping.set)
        asyncio.run_coroutine_threadsafe(server.stop(1), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        cygrpc._Metadatum = entry
