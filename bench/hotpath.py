"""What one prediction costs in a gateway and in a replica: microseconds of CPU, without sockets, the best of many bursts.

    python -m bench.hotpath MODEL.onnx [--calls 32] [--profile gateway|replica]

The real protocol, router, link, session, batcher and onnxruntime in one loop; what they write is kept, not sent. Noise of
the machine hardly touches the best of many short bursts: for tuning, not for comparing with others.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import pstats
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from bench.load import post
from modelworks.api.fastlane import fast
from modelworks.api.services import Services
from modelworks.control.access import Access
from modelworks.core.settings import Settings
from modelworks.core.types import Signature, TensorSpec
from modelworks.ml.package import Manifest
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.security.identity import Authenticator, Secret
from modelworks.security.quota import RateLimiter
from modelworks.serve.batcher import Batcher
from modelworks.serve.channel import Link
from modelworks.serve.gateway import Gateway
from modelworks.serve.host import Host, Session
from modelworks.serve.observe import Observer
from modelworks.serve.requestlog import RequestLog
from modelworks.serve.router import Router
from modelworks.serve.routes import Limits, Route, Snapshot, Target
from modelworks.store.catalog import Catalog

SECRET = "bench" * 8
SIGNATURE = Signature(
    inputs=[TensorSpec(name="X", datatype="FP32", shape=[-1, 4])],
    outputs=[
        TensorSpec(name="label", datatype="INT64", shape=[-1]),
        TensorSpec(name="probabilities", datatype="FP32", shape=[-1, 3]),
    ],
)
BODY = {"inputs": [{"name": "X", "shape": [1, 4], "datatype": "FP32", "data": [5.1, 3.5, 1.4, 0.2]}]}


class Memory(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(data)

    def writelines(self, pieces: Any) -> None:
        self.written.append(b"".join(pieces))

    def take(self) -> bytes:
        data, self.written = b"".join(self.written), []
        return data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    abort = close
    pause_reading = resume_reading = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("the fast lane did not take it")


class Stage:
    """One gateway, one replica, `calls` connections."""

    def __init__(self, folder: Path, model: Path, calls: int) -> None:
        self.catalog = Catalog(folder / "catalog.db")
        self.catalog.migrate()
        secret = Secret.load_or_create(folder / "secret.key")
        key = Access(self.catalog, secret).bootstrap(folder) or ""
        authenticator = Authenticator(self.catalog, secret)
        self.admin = authenticator.authenticate(f"Bearer {key}")
        self.router = Router(SECRET)
        self.log = RequestLog(folder / "requests.log", lines=10**9)
        self.gateway = Gateway(self.router, observer=Observer(log=self.log))
        services: Any = Services(
            settings=Settings(home=folder), catalog=self.catalog, library=None, deployments=None, access=None,
            authenticator=authenticator, limiter=RateLimiter(), gateway=self.gateway, responses=None,
        )  # type: ignore[arg-type]  # fmt: skip
        self._services = services
        self.request = post("/v2/models/w1/infer", json.dumps(BODY).encode(), {"authorization": f"Bearer {key}"})
        self._model, self._calls = model, calls

    async def open(self) -> None:
        runtime = OnnxRuntime()
        manifest = Manifest(task="custom", runtime="onnx", signature=SIGNATURE, files={})
        package: Any = SimpleNamespace(manifest=manifest, path=lambda name: self._model)
        runtime.load(package, 1)
        batcher = Batcher(runtime.predict, SIGNATURE, model_version="w1:1")
        self.host = Host(batcher, secret=SECRET, replica_id="r1", model_version="w1:1")
        self.host.batch_seconds = 20e-6
        self.session = Session(self.host)
        self.replica_out = Memory()
        self.session.connection_made(self.replica_out)
        route = Route(
            self.admin.project_id, "w1", "w1:1", SIGNATURE, "custom", None, (Target("r1", "/nowhere"),), Limits()
        )
        self.router.apply(Snapshot(1, {route.key: route}))
        (peer,) = self.router._peers.values()
        if peer._task:
            peer._task.cancel()
            peer._task = None
        self.link = Link(SECRET, peer._changed)
        peer.link = self.link
        self.gateway_out = Memory()
        self.link.connection_made(self.gateway_out)
        self.router._ticker.cancel()  # type: ignore[union-attr]  # no pings
        for _ in range(6):  # the handshake
            await asyncio.sleep(0)
            self.session.data_received(self.gateway_out.take())
            await asyncio.sleep(0)
            self.link.data_received(self.replica_out.take())
        assert self.link.usable
        config = uvicorn.Config(app=_no_app, http=fast(self._services), log_config=None)
        config.load()
        state = ServerState()
        state.default_headers = [(b"date", b"Wed, 25 Nov 2026 18:53:23 GMT")]
        self.clients = []
        for _ in range(self._calls):
            protocol, transport = config.http_protocol_class(config, state, {}), Memory()  # type: ignore[operator]
            protocol.connection_made(transport)
            self.clients.append((protocol, transport))

    async def burst(self, clock: Any) -> tuple[float, float]:
        """Seconds of one request a connection in the gateway and in the replica."""
        begun = clock()
        for protocol, _ in self.clients:
            protocol.data_received(self.request)
        await asyncio.sleep(0)
        frame = self.gateway_out.take()
        first = clock()
        self.session.data_received(frame)
        await asyncio.sleep(0)
        while self.host._batcher.waiting or self.host._busy or not self.replica_out.written:
            await asyncio.sleep(0)
        reply = self.replica_out.take()
        second = clock()
        self.link.data_received(reply)
        await asyncio.sleep(0)
        third = clock()
        for _, transport in self.clients:
            assert b"200 OK" in transport.take(), "not answered in the same turn"
        return first - begun + third - second, second - first


async def run(folder: Path, model: Path, calls: int, bursts: int, profile: str | None) -> None:
    stage = Stage(folder, model, calls)
    await stage.open()
    gc.collect()
    gc.freeze()
    for _ in range(20):
        await stage.burst(time.process_time)
    if profile:
        watch = cProfile.Profile(time.process_time)
        turn = 0

        def clock() -> float:
            nonlocal turn
            inside = {"gateway": (0, 2), "replica": (1,)}[profile or ""]
            if turn % 4 in inside:
                watch.enable()
            else:
                watch.disable()
            turn += 1
            return 0.0

        for _ in range(bursts):
            await stage.burst(clock)
        watch.disable()
        pstats.Stats(watch).sort_stats("tottime").print_stats(45)
        return
    found = []
    for number in range(bursts):
        found.append(await stage.burst(time.process_time))
        if number % 100 == 0:
            stage.log.flush()
    found.sort()
    gateway, replica = (sorted(one[part] for one in found) for part in (0, 1))
    for name, seconds in (("gateway", gateway), ("replica", replica)):
        print(
            f"{name}: {seconds[0] / calls * 1e6:.2f} us a call (10th percentile {seconds[bursts // 10] / calls * 1e6:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calls", type=int, default=32)
    parser.add_argument("--bursts", type=int, default=3000)
    parser.add_argument("--profile", choices=("gateway", "replica"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(run(Path(folder), options.model, options.calls, options.bursts, options.profile))


if __name__ == "__main__":
    main()
