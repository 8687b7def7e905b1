"""A real API on a real socket over a real catalog; only the data plane behind the gateway answers by itself."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from modelworks.api.app import create_app
from modelworks.api.fastlane import fast
from modelworks.api.guard import Guard
from modelworks.api.services import Services
from modelworks.control.access import Access
from modelworks.control.deployments import Deployments
from modelworks.control.library import Library
from modelworks.control.responses import Responses
from modelworks.core import telemetry
from modelworks.core.settings import Settings
from modelworks.core.specs import KeySpec
from modelworks.core.tensors import pack
from modelworks.core.types import Caller, Principal, Signature, TensorSpec
from modelworks.security.identity import Authenticator, Secret
from modelworks.security.quota import RateLimiter
from modelworks.serve.gateway import Gateway
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog

SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="length", datatype="FP32", shape=[-1, 1], column="number", nullable=True),
        TensorSpec(name="colour", datatype="BYTES", shape=[-1, 1], column="category"),
        TensorSpec(name="count", datatype="INT64", shape=[-1, 1], column="integer"),
        TensorSpec(name="ripe", datatype="BOOL", shape=[-1, 1], column="boolean"),
    ],
    outputs=[
        TensorSpec(name="label", datatype="BYTES", shape=[-1]),
        TensorSpec(name="probabilities", datatype="FP32", shape=[-1, 2]),
    ],
)
ROW = {"length": 1.5, "colour": "red", "count": 3, "ripe": True}


class FakeRouter:
    """Answers every row of the deployment `iris` with the label b; remembers the calls."""

    def __init__(self, project_id: str) -> None:
        self.known = Route(project_id, "iris", "iris:1", SIGNATURE, "tabular-classification", ["a", "b"])
        self.calls: list[Any] = []
        self.aborted: list[Any] = []
        self.hold = False  # never answer
        self.is_ready = True

    def route(self, key: tuple[str, str]) -> Route | None:
        return self.known if key == self.known.key else None

    def routes(self) -> list[Route]:
        return [self.known]

    def ready(self, key: tuple[str, str]) -> bool:
        return self.is_ready

    def submit(self, key: tuple[str, str], call: Any, deliver: Callable[[Any], None], *, manual: bool = False) -> Any:
        self.calls.append(call)
        pending = _Pending()
        pending.deliver = deliver
        if not self.hold:
            rows = call.inputs[0].shape[0]
            outputs = [
                pack("label", "BYTES", [rows], ["b"] * rows),
                pack("probabilities", "FP32", [rows, 2], [0.25, 0.75] * rows),
            ]
            pending.done = True
            deliver(Part(outputs=outputs, model_version="iris:1", done=True))
        return pending

    def abort(self, pending: Any) -> None:
        self.aborted.append(pending)


class _Pending:
    done = False
    deliver: Any = None
    peer: Any = None
    meter: Any = None


@dataclass
class House:
    """`keys`: role -> API key of the project `default`; `other`: an admin-less developer's key of another project."""

    home: Path
    services: Services
    app: Guard
    router: FakeRouter
    keys: dict[str, str]
    admin: Principal
    port: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, role: str | None = "admin", **options: Any) -> httpx2.Client:
        headers = {"authorization": f"Bearer {self.keys[role]}"} if role else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=10, **options)

    def caller(self) -> Caller:
        return Caller(self.admin)

    def make_key(self, role: str, **spec: Any) -> str:
        return self.services.access.create_key(self.caller(), KeySpec(name=f"k-{role}", role=role, **spec))[1]  # type: ignore[arg-type]

    def head(self, method: str, path: str, *more: str) -> bytes:
        """The head of a request with the administrator's key, for sockets."""
        lines = [f"{method} {path} HTTP/1.1", "host: x", f"authorization: Bearer {self.keys['admin']}", *more]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def raw(self, data: bytes, *, seconds: float = 5.0, gap: float = 0.0) -> bytes:
        """Send `data` on a fresh connection (a byte each `gap` seconds) and read until the end or for `seconds`."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            try:
                if gap:
                    for byte in data:
                        connection.sendall(bytes([byte]))
                        time.sleep(gap)
                else:
                    connection.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


@contextlib.contextmanager
def house(home: Path, **settings: Any) -> Iterator[House]:
    """A served House in `home`."""
    telemetry.configure("critical")
    home.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(home / "catalog.db")
    catalog.migrate()
    secret = Secret.load_or_create(home / "secret.key")
    access = Access(catalog, secret)
    key = access.bootstrap(home)
    assert key
    authenticator = Authenticator(catalog, secret)
    admin = authenticator.authenticate(f"Bearer {key}")
    router = FakeRouter(admin.project_id)
    limiter = RateLimiter()
    services = Services(
        settings=Settings(home=home, **settings),
        catalog=catalog,
        library=Library(catalog, Blobs(home / "blobs")),
        deployments=Deployments(catalog, home / "logs" / "replicas"),
        access=access,
        responses=Responses(catalog),
        authenticator=authenticator,
        limiter=limiter,
        gateway=Gateway(router, limiter=limiter),  # type: ignore[arg-type]
    )
    found = House(home, services, create_app(services), router, {"admin": key}, admin)
    for role in ("developer", "viewer", "invoke-only"):
        found.keys[role] = found.make_key(role)
    try:
        with served(found):
            yield found
    finally:
        catalog.close()


@contextlib.contextmanager
def served(found: House) -> Iterator[None]:
    config = uvicorn.Config(
        found.app,
        host="127.0.0.1",
        port=0,
        http=fast(found.services),
        ws="none",
        access_log=False,
        log_level="error",
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.01)
    found.port = server.servers[0].sockets[0].getsockname()[1]
    found.extra["server"] = server
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"
