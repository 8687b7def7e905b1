"""How the tests ask: by a client that looks at every answer, and byte for byte over a socket."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import psutil

import modelworks
from tests.server import RunningServer

CODE = str(Path(modelworks.__file__).parent.parent)
# what an answer must never hold: stack frames, addresses, paths of this machine, the database's own words
SIGNS = re.compile(
    rb"Traceback \(most|File \"[^\"]+\", line \d|site-packages|\b0x[0-9a-fA-F]{6,}\b|<[a-z_.]+ object at|"
    rb"sqlite|sqlalchemy|UNIQUE constraint|psycopg|SELECT .{0,200} FROM |pydantic_core|" + re.escape(CODE).encode(),
    re.IGNORECASE,
)


class Probe:
    """A client with one key, or none, that fails on a 5xx and on an answer that tells of the server's inside."""

    def __init__(self, server: RunningServer, key: str | None) -> None:
        self.server = server
        headers = {"authorization": f"Bearer {key}"} if key else {}
        # verify=False: plain HTTP needs no certificates, which take longer to load than most tests run
        self.client = httpx2.Client(base_url=server.url, headers=headers, timeout=60, verify=False)

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()

    def send(self, method: str, path: str, *, said: str = "", **more: Any) -> httpx2.Response:
        """`said`: what the request itself has of such, which an answer may repeat."""
        answer = self.client.request(method, path, **more)
        check(self.server, f"{method} {path}", answer.status_code, answer.content, said)
        return answer

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return self.send("GET", path, **more)

    def post(self, path: str, **more: Any) -> httpx2.Response:
        return self.send("POST", path, **more)

    def delete(self, path: str, **more: Any) -> httpx2.Response:
        return self.send("DELETE", path, **more)

    def finished(self, job: str, seconds: float = 60) -> dict[str, Any]:
        """The job once it is final."""
        until = time.monotonic() + seconds
        while True:
            found = self.get(f"/api/v1/jobs/{job}").json()
            if found["status"] in ("succeeded", "failed", "refused", "cancelled"):
                return found
            assert time.monotonic() < until, f"{job} is {found['status']} after {seconds} s"
            time.sleep(0.05)


def check(server: RunningServer, what: str, status: int, body: bytes, said: str = "") -> None:
    assert status < 500 or status == 501, f"{what}: {status} {body[:500]!r}"
    if status == 200 and what.startswith("GET /docs"):
        return  # the program of the page, the same for everybody
    found = SIGNS.search(body)
    assert not found or found[0].decode() in said, f"{what}: the answer tells {found and found[0]!r}: {body[:1000]!r}"
    home = str(server.home)
    assert home.encode() not in body or home in said, f"{what}: the answer names the home: {body[:1000]!r}"


@dataclass(frozen=True)
class Raw:
    """An answer off the wire. `status` 0: the server closed the connection without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Wire:
    """One connection on which requests are bytes."""

    def __init__(self, server: RunningServer, *, timeout: float = 10.0, buffer: int | None = None) -> None:
        self.server = server
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(timeout)
        self.socket.connect((host, int(port)))

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """False when the server has closed the connection meanwhile."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def answer(self, method: str = "GET", said: str = "") -> Raw:
        """The next answer, checked as a Probe's."""
        found = http.client.HTTPResponse(self.socket, method=method)
        try:
            found.begin()
            body = found.read()
        except (ConnectionResetError, http.client.RemoteDisconnected, http.client.BadStatusLine):
            return Raw(0)
        finally:
            found.close()
        check(self.server, f"raw {method}", found.status, body, said)
        return Raw(found.status, {name.lower(): value for name, value in found.getheaders()}, body)

    def ask(self, data: bytes, method: str = "", said: str = "") -> Raw:
        self.send(data)
        return self.answer(method or data.split(b" ", 1)[0].decode("latin-1"), said)

    def is_closed(self, seconds: float) -> bool:
        """Whether the server ends the connection within `seconds`; what it says until then is thrown away."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                if not self.socket.recv(65536):
                    return True
            except ConnectionResetError:
                return True
            except TimeoutError:
                return False
        return False


def head(method: str, target: str, key: str | None = None, *lines: str, version: str = "1.1") -> bytes:
    """The head of a request, the blank line at its end included."""
    given = [f"{method} {target} HTTP/{version}", "host: x"]
    if key:
        given.append(f"authorization: Bearer {key}")
    return ("\r\n".join([*given, *lines]) + "\r\n\r\n").encode("latin-1")


def ask(server: RunningServer, data: bytes, *, timeout: float = 10.0) -> Raw:
    """One request on a connection of its own."""
    with Wire(server, timeout=timeout) as wire:
        return wire.ask(data)


class Bystander:
    """Another client, who notices nothing of an attack: counts its calls, keeps the slowest and what failed."""

    def __init__(self, server: RunningServer, path: str = "/api/v1/whoami") -> None:
        self.server = server
        self.path = path
        self.calls = 0
        self.slowest = 0.0
        self.failures: list[str] = []
        self.peak = 0  # bytes of memory of the gateway
        self._stop = threading.Event()

    def run(self) -> None:
        gateway = self.server.processes("gateway")[0]
        with Probe(self.server, self.server.key) as probe:
            while not self._stop.is_set() or self.calls < 5:
                began = time.monotonic()
                try:
                    status = probe.client.get(self.path).status_code
                    if status != 200:
                        self.failures.append(f"status {status}")
                except httpx2.HTTPError as error:
                    self.failures.append(repr(error))
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.calls += 1
                with suppress(psutil.Error):
                    self.peak = max(self.peak, gateway.memory_info().rss)
                self._stop.wait(0.01)

    def stop(self) -> None:
        self._stop.set()


@contextmanager
def bystander(server: RunningServer, *, patience: float, path: str = "/api/v1/whoami") -> Iterator[Bystander]:
    """Around an attack: fails when another client's call failed, or took longer than `patience` seconds."""
    found = Bystander(server, path)
    thread = threading.Thread(target=found.run, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.stop()
        thread.join(60)
    assert not found.failures, found.failures[:3]
    assert found.slowest < patience, f"another client waited {found.slowest:.1f} s"


def together(calls: list[Callable[[], Any]], threads: int = 4) -> list[Any]:
    """The results of `calls`, run by a few threads."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
