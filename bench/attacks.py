"""Hostile clients at a bounded rate, for bench.faults: each kind tells how its connections ended.

    python -m bench.attacks KIND HTTP_PORT GRPC_PORT SECONDS     KEY on stdin; prints one JSON object: end -> count

An end is a status ("400"), "closed" without one, or "open" when the server still waited at the end.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import os
import struct
import sys

import uvloop

from bench.grpc_load import DATA, HEADERS, SETTINGS, frame, literal

PREDICT = "/api/v1/deployments/iris/predict"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b"")
CROWD = 500  # slow connections at a time
Ends = collections.Counter[str]


class Attack:
    def __init__(self, http: int, grpc: int, seconds: float, key: str) -> None:
        self.http, self.grpc, self.seconds = http, grpc, seconds
        self.head = f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n".encode()
        self.ends: Ends = collections.Counter()
        self.until = asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float:
        return self.until - asyncio.get_running_loop().time()

    async def once(self, port: int, pieces: list[bytes], pause: float = 0.0) -> None:
        """One connection that sends the pieces, `pause` seconds between two, and waits for what comes."""
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answer = asyncio.ensure_future(reader.read(4096))
            for piece in pieces:
                if answer.done() or self.left < 0:
                    break
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), max(0.1, self.left))
                await asyncio.sleep(pause)
            got = await asyncio.wait_for(answer, max(1.0, self.left + 1))
            self.ends[got[9:12].decode("latin1") if got.startswith(b"HTTP/1.") else "closed"] += 1
        except TimeoutError:
            self.ends["open"] += 1
        except (OSError, asyncio.IncompleteReadError):
            self.ends["closed"] += 1
        finally:
            if writer is not None:
                writer.transport.abort()

    async def at_rate(self, port: int, kinds: list[list[bytes]], rate: float) -> None:
        under_way: set[asyncio.Task[None]] = set()
        for pieces in itertools.cycle(kinds):
            if self.left < 1:
                break
            if len(under_way) < 200:
                task = asyncio.ensure_future(self.once(port, pieces))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*under_way)

    async def crowd(self, port: int, start: bytes, piece: bytes) -> None:
        """CROWD connections at any time, each of which sends a byte a second."""

        async def one() -> None:
            while self.left > 0:
                await self.once(port, [start, *[piece] * int(self.seconds)], 1.0)

        await asyncio.gather(*(one() for _ in range(CROWD)))

    # kinds

    async def malformed(self) -> None:
        json_head = self.head + b"content-type: application/json\r\n"
        bodies = [b'{"inputs": [', b"\xff\xfe", b"[" * 5000, b'{"inputs": "x"}', b'{"inputs": [{}]}', b"NaN", b""]
        kinds = [[json_head + b"content-length: %d\r\n\r\n" % len(body) + body] for body in bodies]
        kinds += [
            [line]
            for line in (
                b"\r\n" * 50 + b"x", os.urandom(400), b"GET / HTTP/9.9\r\n\r\n", b"G\0T / HTTP/1.1\r\n\r\n",
                self.head + b"content-length: -1\r\n\r\n", self.head + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
                self.head + b"transfer-encoding: chunked\r\n\r\nzz\r\n", self.head + b"no colon\r\n\r\n",
                self.head + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b"\x16\x03\x01" + os.urandom(200),
            )
        ]  # fmt: skip
        await self.at_rate(self.http, kinds, 300)

    async def oversized(self) -> None:
        megabyte = b"x" * 2**20
        chunk = b"100000\r\n" + megabyte + b"\r\n"
        kinds = [
            [self.head + b"content-length: 1073741824\r\n\r\n", *[megabyte] * 80],
            [self.head + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 80],
            [self.head + b"x: " + b"y" * 2**20],
            [self.head, *[b"a%d: b\r\n" % number for number in range(20_000)]],
            [b"GET /" + b"a" * 2**20],
        ]
        await self.at_rate(self.http, kinds, 10)

    async def slowloris(self) -> None:
        await self.crowd(self.http, self.head + b"x: ", b"a")

    async def dripping(self) -> None:
        await self.crowd(self.http, self.head + b"content-type: application/json\r\ncontent-length: 9999\r\n\r\n", b" ")

    async def grpc_garbage(self) -> None:
        path = "/inference.GRPCInferenceService/ModelInfer"
        block = b"".join(
            literal(name, value)
            for name, value in {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x",
                                "te": "trailers", "content-type": "application/grpc"}.items()
        )  # fmt: skip
        kinds = [
            [os.urandom(500)],
            [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"],
            [PREFACE + os.urandom(2000)],
            [PREFACE + frame(HEADERS, 4, 1, os.urandom(300))],
            [PREFACE + b"\xff\xff\xff" + bytes(6) + os.urandom(100)],
            [PREFACE + b"".join(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, n)) for n in range(2000))],
            [PREFACE + b"".join(frame(HEADERS, 4, 2 * n + 1, block) + frame(3, 0, 2 * n + 1, b"\0\0\0\x08") for n in range(500))],
            [PREFACE + frame(HEADERS, 0, 1, block), *[frame(9, 0, 1, b"\0\x01a\x01b" * 2000)] * 50],  # no end of headers
            [PREFACE + frame(HEADERS, 4, 1, block) + frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + bytes(9000))],
            [PREFACE + frame(HEADERS, 4, 1, block) + frame(DATA, 1, 1, b"\x01\0\0\0\x09" + os.urandom(9))],
        ]  # fmt: skip
        await self.at_rate(self.grpc, kinds, 60)


KINDS = {
    "malformed": "malformed requests, 300 a second",
    "oversized": "oversized heads and bodies, 10 a second",
    "slowloris": f"{CROWD} heads that come a byte a second",
    "dripping": f"{CROWD} bodies that come a byte a second",
    "grpc_garbage": "garbage on the gRPC port, 60 connections a second",
}


async def attack(kind: str, http: int, grpc: int, seconds: float, key: str) -> Ends:
    made = Attack(http, grpc, seconds, key)
    await getattr(made, kind)()
    return made.ends


def main() -> None:
    kind, http, grpc, seconds = sys.argv[1:]
    ends = uvloop.run(attack(kind, int(http), int(grpc), float(seconds), sys.stdin.readline().strip()))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
