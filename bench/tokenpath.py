"""What one token of a chat's stream costs in a gateway: microseconds of CPU, without sockets, the best of many steps.

    python -m bench.tokenpath [--streams 32] [--steps 400] [--profile]

The real application, protocol, router and link in one loop; the frames of a replica are written here: one token of each
stream a step, as an engine makes them.
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
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from bench.hotpath import SECRET, Memory
from bench.load import post
from modelworks.api.app import create_app
from modelworks.api.fastlane import fast
from modelworks.api.services import Services
from modelworks.control.access import Access
from modelworks.core.generation import TEXT_GENERATION, part
from modelworks.core.settings import Settings
from modelworks.security.identity import Authenticator, Secret
from modelworks.security.quota import RateLimiter
from modelworks.serve.channel import Link
from modelworks.serve.continuous import Continuous
from modelworks.serve.gateway import Gateway
from modelworks.serve.host import Host, Session
from modelworks.serve.observe import Observer
from modelworks.serve.router import Router
from modelworks.serve.routes import Limits, Route, Snapshot, Target
from modelworks.serve.wire import Part
from modelworks.store.catalog import Catalog


class Silent:
    """An engine that says nothing: what it would is put in by hand."""

    slots = 10_000

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def admit(self, call_id: Any, inputs: Any, params: Any, stream: bool) -> None:
        self.calls.append(call_id)

    def step(self, timeout: float) -> list[Any]:
        time.sleep(timeout)
        return []

    def abort(self, call_id: Any) -> None:
        pass


async def run(folder: Path, streams: int, steps: int, profile: bool) -> None:
    catalog = Catalog(folder / "catalog.db")
    catalog.migrate()
    secret = Secret.load_or_create(folder / "secret.key")
    key = Access(catalog, secret).bootstrap(folder) or ""
    authenticator = Authenticator(catalog, secret)
    admin = authenticator.authenticate(f"Bearer {key}")
    router = Router(SECRET)
    services: Any = Services(
        settings=Settings(home=folder), catalog=catalog, library=None, deployments=None, access=None,
        authenticator=authenticator, limiter=RateLimiter(), gateway=Gateway(router, observer=Observer()), responses=None,
    )  # type: ignore[arg-type]  # fmt: skip
    host = Host(Continuous(Silent()), secret=SECRET, replica_id="r1", model_version="chat:1")
    session, replica_out = Session(host), Memory()
    session.connection_made(replica_out)
    route = Route(admin.project_id, "chat", "chat:1", TEXT_GENERATION, "text-generation", None, (Target("r1", "/nowhere"),),
                  Limits())  # fmt: skip
    router.apply(Snapshot(1, {route.key: route}))
    (peer,) = router._peers.values()
    if peer._task:
        peer._task.cancel()
        peer._task = None
    link = peer.link = Link(SECRET, peer._changed)
    gateway_out = Memory()
    link.connection_made(gateway_out)
    router._ticker.cancel()  # type: ignore[union-attr]
    for _ in range(6):  # the handshake
        await asyncio.sleep(0)
        session.data_received(gateway_out.take())
        await asyncio.sleep(0)
        link.data_received(replica_out.take())
    config = uvicorn.Config(app=create_app(services), http=fast(services), log_config=None)
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"Wed, 25 Nov 2026 18:53:23 GMT")]
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    request = post("/v1/chat/completions", json.dumps(body).encode(), {"authorization": f"Bearer {key}"})
    clients = []
    for _ in range(streams):
        protocol, transport = config.http_protocol_class(config, state, {}), Memory()  # type: ignore[operator]
        protocol.connection_made(transport)
        protocol.data_received(request)
        clients.append(transport)
    while len(link.calls) < streams:
        await asyncio.sleep(0.001)
    session.data_received(gateway_out.take())
    numbers = list(link.calls)
    found, replica = [], []
    watch = cProfile.Profile()
    gc.collect()
    gc.freeze()
    for step in range(1, steps + 20):
        parts = [
            ((session, number), Part(part(" token", "", 10, step, 4), "chat:1", False, 1, 2), False)
            for number in numbers
        ]
        begun = time.process_time()
        host._send(parts)
        session.flush()
        frame = replica_out.take()
        replica.append(time.process_time() - begun)
        if profile and step > 20:
            watch.enable()
        begun = time.process_time()
        link.data_received(frame)
        for _ in range(8):
            await asyncio.sleep(0)
            if clients[-1].written:
                break
        await asyncio.sleep(0)
        found.append(time.process_time() - begun)
        watch.disable()
        session.data_received(gateway_out.take())
        for transport in clients:
            assert b" token" in transport.take(), "not passed on in the same turn"
    if profile:
        pstats.Stats(watch).sort_stats("tottime").print_stats(40)
        return
    for name, seconds in (("gateway", found[20:]), ("replica's door", replica[20:])):
        print(f"{name}: {min(seconds) / streams * 1e6:.1f} us a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(run(Path(folder), options.streams, options.steps, options.profile))


if __name__ == "__main__":
    main()
