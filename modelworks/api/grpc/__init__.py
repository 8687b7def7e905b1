"""gRPC: the Open Inference Protocol and the lifecycle, in the gateway's process, over HTTP's own checks and use cases.

`start_grpc` returns at once; grpc is imported, in a thread, when the HTTP side is up.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any, Protocol

from modelworks.core.telemetry import logger

if TYPE_CHECKING:
    from modelworks.api.services import Services

log = logger("api.grpc")

_LOOK = 0.02  # seconds between two looks at what the HTTP side does while it starts
_CALM = 0.1  # ... and from then on, as often as uvicorn looks whether to stop


class Leader(Protocol):
    """The HTTP server, as far as it matters here (uvicorn.Server)."""

    started: bool
    should_exit: bool


class GrpcServer:
    """Starts after `leader` has started and begins to stop when that does."""

    def __init__(self, services: Services, address: tuple[str, int], leader: Leader) -> None:
        host, port = address
        self._services = services
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._leader = leader
        self._closing = False
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Calls that run get the grace of the settings to finish."""
        self._closing = True
        await self._task

    async def _run(self) -> None:
        while not self._leader.started:
            if self._stops():
                return
            await asyncio.sleep(_LOOK)
        try:
            build = await asyncio.to_thread(_import)
            server, door, _ = build(self._services, self._address)
            await server.start()
            gc.freeze()  # what was loaded is never garbage: later collections skip it
            gc.set_threshold(20_000, 20, 20)  # grpcio makes many objects a call and leaves hardly a cycle
        except RuntimeError as error:  # grpc's word for an address that it cannot have
            log.error("gRPC does not listen", address=self._address, reason=str(error)[:200])
            return
        finally:
            gc.enable()
        while not self._stops():
            await asyncio.sleep(_CALM)
        door.stopping.set()
        await server.stop(self._services.settings.shutdown_grace)

    def _stops(self) -> bool:
        return self._closing or self._leader.should_exit


def _import() -> Any:
    from modelworks.api.grpc.server import build

    return build


def start_grpc(services: Services, address: tuple[str, int], leader: Leader) -> GrpcServer:
    """Listen on `address` (IP and port, which gateways share) for as long as `leader` runs; then await `close()`."""
    return GrpcServer(services, address, leader)
