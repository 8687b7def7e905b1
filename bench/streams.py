"""Streaming clients of an OpenAI-shaped server, light enough to share a small machine with it: sockets, no JSON."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

_TEXT = re.compile(rb'"(?:content|text)":\s*"[^"]')
_COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
_CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')
_END = b"data: [DONE]"


@dataclass
class Figures:
    """`seconds` from the first request to the last end; `firsts`: seconds to each stream's first text."""

    tokens: int
    seconds: float
    firsts: list[float] = field(default_factory=list)
    failed: int = 0
    cached: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def first_ms(self) -> float:
        return median(self.firsts) * 1e3 if self.firsts else float("nan")


class Stream(asyncio.Protocol):
    """One streamed request. `cut`: half-close after so many reads, and read on to the end of what was sent."""

    def __init__(self, request: bytes, cut: int | None = None) -> None:
        self._request = request
        self._cut = cut
        self.begun = self.first = 0.0
        self.reads = 0
        self.text = False
        self.tail = b""
        self.tokens = self.cached = 0
        self.complete = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.begun = time.perf_counter()
        transport.write(self._request)
        if self._cut == 0:
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        self.tail = (self.tail + data)[-4096:]
        if not self.text and _TEXT.search(self.tail):
            self.text = True
            self.first = time.perf_counter() - self.begun
        if found := _COUNT.findall(self.tail):
            self.tokens = int(found[-1])
        if self._cut == self.reads:
            self.transport.write_eof()
        if _END in self.tail:
            self.complete = True
            if cached := _CACHED.findall(self.tail):
                self.cached = int(cached[-1])
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def request(url: str, path: str, body: dict[str, Any], key: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"host: {urlsplit(url).netloc}", "content-type: application/json",
            f"content-length: {len(data)}"]  # fmt: skip
    head += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


async def open_streams(url: str, requests: list[bytes], cuts: list[int | None] | None = None) -> list[Stream]:
    place = urlsplit(url)
    loop = asyncio.get_running_loop()
    cuts = cuts or [None] * len(requests)
    return [
        (await loop.create_connection(lambda one=one, cut=cut: Stream(one, cut), place.hostname, place.port))[1]  # type: ignore[misc]
        for one, cut in zip(requests, cuts, strict=True)
    ]


async def _together(url: str, requests: list[bytes]) -> Figures:
    begun = time.perf_counter()
    streams = await open_streams(url, requests)
    await asyncio.gather(*(one.closed for one in streams))
    return Figures(
        sum(one.tokens for one in streams),
        time.perf_counter() - begun,
        [one.first for one in streams if one.text],
        sum(not one.complete for one in streams),
        sum(one.cached for one in streams),
    )


def together(url: str, requests: list[bytes]) -> Figures:
    """Send all at once and read all to their end."""
    return asyncio.run(_together(url, requests))
