"""A small closed-loop HTTP load generator: N keep-alive connections, each with one request outstanding."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

import httptools
import uvloop


@dataclass(frozen=True)
class Figures:
    """`rate` in requests a second; `p50` and `p99` in milliseconds; `failed`: answers that were not 200."""

    rate: float
    p50: float
    p99: float
    failed: int


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, latencies: list[float], until: float) -> None:
        self._request = request
        self._latencies = latencies
        self._until = until
        self.failed = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self._latencies.append(now - self._sent)
        self.failed += self._parser.get_status_code() != 200
        if now < self._until:
            self._parser = httptools.HttpResponseParser(self)
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.failed += 1
        if not self.done.done():
            self.done.set_result(None)

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)


async def _run(host: str, port: int, request: bytes, connections: int, seconds: float) -> Figures:
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    begun = time.perf_counter()
    made = [
        (await loop.create_connection(lambda: _Connection(request, latencies, begun + seconds), host, port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*(connection.done for connection in made))
    elapsed = time.perf_counter() - begun
    ordered = sorted(latencies)
    p99 = ordered[int(len(ordered) * 0.99)] if ordered else float("nan")
    p50 = statistics.median(ordered) if ordered else float("nan")
    return Figures(len(ordered) / elapsed, p50 * 1e3, p99 * 1e3, sum(connection.failed for connection in made))


def post(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The bytes of one POST request."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def measure(host: str, port: int, request: bytes, *, connections: int, seconds: float = 3.0) -> Figures:
    """Send `request` again and again over `connections` connections for `seconds`."""
    return uvloop.run(_run(host, port, request, connections, seconds))
