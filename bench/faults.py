"""What users notice of faults, over HTTP on a real server: a table of faults and figures.

    python -m bench.faults [--seconds 60] [--cuts 10000] [--gateways 2] [--only killed,hung,cut,attacks,gateway]

One server, two replicas of iris, 64 connections. Replicas are killed, stopped, clients cut in mid-flight, a gateway killed.
Attacks (bench/attacks.py) come from a process of their own while 16 clients send 20 requests a second each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from bench.attacks import KINDS
from bench.load import post
from bench.predict import ROW
from bench.stage import Stage, stage

CONNECTIONS = 64
ATTACK_SECONDS = 15.0  # longer than header_timeout


@dataclass
class Seen:
    """What the clients saw. `broken`: connections that ended in the middle of a request, which was then sent again."""

    answered: int = 0
    broken: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def at(self, share: float) -> float:
        """Milliseconds that this share of the requests took at most."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000 if ordered else 0.0


class Load:
    """Connections that send one request after the other until stopped, each checked to be a right answer."""

    def __init__(self, port: int, request: bytes, connections: int = CONNECTIONS, pause: float = 0.0) -> None:
        self.seen = Seen()
        self._pause = pause
        self._port = port
        self._request = request
        self._stopped = False
        self._tasks = [asyncio.create_task(self._run()) for _ in range(connections)]

    async def stop(self) -> Seen:
        self._stopped = True
        await asyncio.gather(*self._tasks)
        return self.seen

    async def _run(self) -> None:
        while not self._stopped:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                await self._talk(reader, writer)
                writer.close()
            except (OSError, asyncio.IncompleteReadError):
                self.seen.broken += 1

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not self._stopped:
            begun = time.perf_counter()
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            body = await reader.readexactly(length)
            took = time.perf_counter() - begun
            self.seen.slowest = max(self.seen.slowest, took)
            self.seen.times.append(took)
            if head.startswith(b"HTTP/1.1 200") and b'"setosa"' in body:
                self.seen.answered += 1
            else:
                kind = f"{head[9:12].decode()} {body[:120].decode(errors='replace')}"
                self.seen.failures[kind] = self.seen.failures.get(kind, 0) + 1
            if self._pause:
                await asyncio.sleep(self._pause)


def request(server: Stage) -> bytes:
    return post("/api/v1/deployments/iris/predict", json.dumps({"inputs": [ROW]}).encode(), server.headers)


Row = tuple[str, str, str]


async def killed_replicas(server: Stage, seconds: float) -> Row:
    """kill -9 the longest-lived replica every second."""
    load = Load(server.port, request(server))
    until = time.monotonic() + seconds
    kills = 0
    while time.monotonic() < until:
        await asyncio.sleep(1.0)
        alive = server.processes("replica iris")
        if len(alive) > 1:  # the first one is the older
            os.kill(min(alive, key=lambda one: one.create_time()).pid, signal.SIGKILL)
            kills += 1
    seen = await load.stop()
    figures = f"{seen.failed} of {seen.answered + seen.failed:,} failed, slowest {seen.slowest:.2f} s {_kinds(seen)}"
    return "kill -9 of a replica every second", f"{kills} kills in {seconds:.0f} s", figures


async def hung_replica(server: Stage) -> Row:
    """SIGSTOP one of two."""
    while len(server.processes("replica iris")) < 2:
        await asyncio.sleep(0.1)
    await asyncio.sleep(2.0)
    load = Load(server.port, request(server))
    await asyncio.sleep(1.0)
    victim = server.processes("replica iris")[0]
    os.kill(victim.pid, signal.SIGSTOP)
    await asyncio.sleep(5.0)
    seen = await load.stop()
    if victim.is_running():
        os.kill(victim.pid, signal.SIGCONT)
    figures = f"{seen.failed} of {seen.answered + seen.failed:,} failed; calls aboard moved after {seen.slowest:.2f} s"
    return "SIGSTOP of a replica", "one of two", figures


async def cut_clients(server: Stage, cuts: int) -> Row:
    """Clients that send a request and are gone before the answer."""
    sent = request(server)
    processes = server.processes("gateway") + server.processes("replica iris")
    load = Load(server.port, sent, 8)
    await asyncio.sleep(1.0)
    before = [(one.memory_info().rss, one.num_fds()) for one in processes]

    async def cut(number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent if number % 3 else sent[:-20])
        if number % 2:
            await asyncio.sleep(0.0005 * (number % 5))
        writer.transport.abort()

    for start in range(0, cuts, 100):
        await asyncio.gather(*[cut(number) for number in range(start, min(cuts, start + 100))])
    seen = await load.stop()
    await asyncio.sleep(2.0)
    after = [(one.memory_info().rss, one.num_fds()) for one in processes]
    files = sum(a[1] - b[1] for a, b in zip(after, before, strict=True))
    memory = sum(a[0] - b[0] for a, b in zip(after, before, strict=True)) / 1e6
    figures = (
        f"others: {seen.failed} of {seen.answered + seen.failed:,} failed; {files:+d} descriptors, {memory:+.1f} MB"
    )
    return "clients cut in mid-flight", f"{cuts:,} cuts", figures


async def attacked(server: Stage, kind: str, seconds: float) -> Row:
    """Whether polite clients notice, and what the gateways' memory does."""
    calm = await _polite(server, 5.0)
    gateways = server.processes("gateway")
    before = sum(one.memory_info().rss for one in gateways)
    command = [sys.executable, "-m", "bench.attacks", kind, str(server.port), str(server.grpc_port), str(seconds)]
    foe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert foe.stdin is not None
    foe.stdin.write(server.key + "\n")
    foe.stdin.close()
    await asyncio.sleep(1.0)
    watch = asyncio.create_task(_peak(gateways, seconds - 2))
    seen = await _polite(server, seconds - 2)
    peak = await watch
    while foe.poll() is None:
        await asyncio.sleep(0.2)
    assert foe.stdout is not None
    ends = json.loads(foe.stdout.read())
    shown = ", ".join(f"{count:,} x {end}" for end, count in sorted(ends.items()))
    figures = (
        f"{shown}; others: {seen.failed} of {seen.answered + seen.failed:,} failed, p50 {calm.at(0.5):.1f} -> "
        f"{seen.at(0.5):.1f} ms, p99 {calm.at(0.99):.1f} -> {seen.at(0.99):.1f} ms; "
        f"gateway {(peak - before) / 1e6:+.1f} MB at most {_kinds(seen)}"
    )
    return KINDS[kind], f"{seconds:.0f} s", figures


async def _polite(server: Stage, seconds: float) -> Seen:
    load = Load(server.port, request(server), 16, pause=0.05)
    await asyncio.sleep(seconds)
    return await load.stop()


async def _peak(processes: list[psutil.Process], seconds: float) -> int:
    until, most = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        most = max(most, sum(one.memory_info().rss for one in processes))
        await asyncio.sleep(0.2)
    return most


async def killed_gateway(server: Stage, kills: int = 4) -> Row:
    """kill -9 one gateway after the other, each time when all of them listen."""
    count = len(server.processes("gateway"))
    broken, slowest, back = [], 0.0, []
    failures: dict[str, int] = {}
    answered = 0
    for _ in range(kills):
        await _all_listen(server, count)
        load = Load(server.port, request(server))
        await asyncio.sleep(1.0)
        victim = min(server.processes("gateway"), key=lambda one: one.create_time())
        its = sum(link.laddr.port == server.port and link.status == "ESTABLISHED" for link in victim.net_connections())
        killed = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        await asyncio.sleep(2.0)
        await _all_listen(server, count, but=victim.pid)
        back.append(time.monotonic() - killed)
        seen = await load.stop()
        broken.append(f"{seen.broken} of {its}")
        slowest = max(slowest, seen.slowest)
        answered += seen.answered
        for kind, times in seen.failures.items():
            failures[kind] = failures.get(kind, 0) + times
    figures = (
        f"connections that broke, of those it had: {', '.join(broken)}; {sum(failures.values())} of {answered:,} failed "
        f"after connecting again, slowest {slowest:.2f} s; its successor listens after {max(back):.1f} s at most "
        f"{_kinds(Seen(failures=failures))}"
    )
    return "kill -9 of a gateway", f"{kills} times one of {count}", figures


async def _all_listen(server: Stage, count: int, but: int = 0) -> None:
    """Until `count` gateways do. gRPC is the last thing that one opens."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        ready = 0
        for one in server.processes("gateway"):
            with contextlib.suppress(psutil.Error):
                links = one.net_connections() if one.pid != but else ()
                ready += any(link.status == "LISTEN" and link.laddr.port == server.grpc_port for link in links)
        if ready >= count:
            return
        await asyncio.sleep(0.05)
    raise SystemExit("the gateways do not listen")


def _kinds(seen: Seen) -> str:
    return "; ".join(f"{count} x {kind}" for kind, count in list(seen.failures.items())[:3])


async def story(server: Stage, seconds: float, cuts: int, only: set[str]) -> AsyncIterator[Row]:
    if "killed" in only:
        yield await killed_replicas(server, seconds)
    if "hung" in only:
        yield await hung_replica(server)
    if "cut" in only:
        yield await cut_clients(server, cuts)
    for kind in KINDS:
        if "attacks" in only or kind in only:
            yield await attacked(server, kind, ATTACK_SECONDS)
    if "gateway" in only:
        yield await killed_gateway(server)


async def rows(server: Stage, seconds: float, cuts: int, only: set[str]) -> list[Row]:
    found = []
    async for row in story(server, seconds, cuts, only):
        print(": ".join(row), file=sys.stderr, flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cuts", type=int, default=10_000)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--only", default="killed,hung,cut,attacks,gateway")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mw-faults-") as folder:
        more = ["--gateways", str(options.gateways)] if options.gateways > 1 else []
        with stage(Path(folder), *more) as server:
            server.learn_iris(replicas={"min": 2})
            table = uvloop.run(rows(server, options.seconds, options.cuts, set(options.only.split(","))))
    shown = Table("fault", "how often", "what clients saw", title=f"{CONNECTIONS} connections, two replicas")
    for row in table:
        shown.add_row(*row)
    Console(width=160).print(shown)


if __name__ == "__main__":
    main()
