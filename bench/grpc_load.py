"""A closed-loop gRPC load generator: N streams on one HTTP/2 connection, each with one unary call outstanding.

It writes and reads the frames itself, at a tenth of what grpcio's own client costs, so that on a small machine the
server is what is measured. A call that brings no message counts as failed.
"""

from __future__ import annotations

import asyncio
import statistics
import struct
import time

import uvloop

from bench.load import Figures

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
WINDOW = 2**31 - 1


def literal(name: str, value: str) -> bytes:
    """A header as HPACK's literal without indexing."""
    parts = b"\x00"
    for text in (name.encode(), value.encode()):
        size = bytes([len(text)]) if len(text) < 127 else bytes([127, len(text) - 127])
        parts += size + text
    return parts


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class _Streams(asyncio.Protocol):
    def __init__(self, path: str, headers: dict[str, str], message: bytes, streams: int, until: float) -> None:
        pairs = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "bench", "te": "trailers",
                 "content-type": "application/grpc", **headers}  # fmt: skip
        self._block = b"".join(literal(name, value) for name, value in pairs.items())
        self._message = b"\x00" + struct.pack(">I", len(message)) + message
        self._streams = streams
        self._until = until
        self._next = 1
        self._begun: dict[int, float] = {}
        self._answered: set[int] = set()
        self._buffer = b""
        self.latencies: list[float] = []
        self.failed = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        settings = struct.pack(">HI", 4, WINDOW)  # initial window size
        grow = frame(8, 0, 0, struct.pack(">I", WINDOW - 65535))
        transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings) + grow)
        transport.write(b"".join(self._call() for _ in range(self._streams)))

    def _call(self) -> bytes:
        number, self._next = self._next, self._next + 2
        self._begun[number] = time.perf_counter()
        return frame(HEADERS, 4, number, self._block) + frame(DATA, 1, number, self._message)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        offset, out, end = 0, [], len(data)
        while offset + 9 <= end:
            stop = offset + 9 + int.from_bytes(data[offset : offset + 3], "big")
            if stop > end:
                break
            kind, flags = data[offset + 3], data[offset + 4]
            number = int.from_bytes(data[offset + 5 : offset + 9], "big")
            if kind == DATA and stop > offset + 9:
                self._answered.add(number)
            elif kind == SETTINGS and not flags & 1:
                out.append(frame(SETTINGS, 1, 0, b""))
            elif kind == PING and not flags & 1:
                out.append(frame(PING, 1, 0, data[offset + 9 : stop]))
            elif kind == GOAWAY:
                self.failed += len(self._begun)
                self._finish()
            if (kind == HEADERS and flags & 1) or kind == RST:
                out.append(self._ended(number))
            offset = stop
        self._buffer = data[offset:]
        if out:
            self._transport.write(b"".join(out))

    def _ended(self, number: int) -> bytes:
        now = time.perf_counter()
        self.latencies.append(now - self._begun.pop(number))
        if number in self._answered:
            self._answered.discard(number)
        else:
            self.failed += 1
        if now < self._until:
            return self._call()
        if not self._begun:
            self._finish()
        return b""

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.failed += len(self._begun)
        self._finish()


def measure(port: int, path: str, headers: dict[str, str], message: bytes, *, streams: int, seconds: float) -> Figures:
    return uvloop.run(_run(port, path, headers, message, streams, seconds))


async def _run(port: int, path: str, headers: dict[str, str], message: bytes, streams: int, seconds: float) -> Figures:
    begun = time.perf_counter()
    _, protocol = await asyncio.get_running_loop().create_connection(
        lambda: _Streams(path, headers, message, streams, begun + seconds), "127.0.0.1", port
    )
    await protocol.done
    took = time.perf_counter() - begun
    found = sorted(protocol.latencies)
    p99 = found[min(len(found) - 1, int(len(found) * 0.99))] if found else 0.0
    p50 = statistics.median(found) if found else 0.0
    return Figures((len(found) - protocol.failed) / took, p50 * 1000, p99 * 1000, protocol.failed)
