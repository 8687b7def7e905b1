"""A job's events as server-sent events, until the job is final, the client leaves, or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import msgspec
from starlette.responses import StreamingResponse

from modelworks.api.services import Services
from modelworks.core.errors import CatalogUnavailable, ModelworksError
from modelworks.core.types import FINAL_JOB_STATES, Caller

HEARTBEAT = 15.0  # seconds without an event until a comment keeps the connection alive
POLL = (0.15, 1.0)  # seconds between looks: first, and at most
BATCH = 100


class Stopping:
    """Set once when the server begins to stop, so that endless answers end by themselves."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """True as soon as the server stops, False after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        return True


def stream(
    services: Services,
    caller: Caller,
    job_id: str,
    after: int,
    stopping: Stopping,
    carrier: str | None,
    kinds: Sequence[str] | None = None,
) -> StreamingResponse:
    """The events of `job_id` after number `after`, as text/event-stream; ends with an event named `end`.

    `carrier`: the Authorization header, looked at again on the way: a key that is revoked reads no further.
    """
    return StreamingResponse(
        _events(services, caller, job_id, after, stopping, carrier, kinds),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _events(
    services: Services,
    caller: Caller,
    job_id: str,
    after: int,
    stopping: Stopping,
    carrier: str | None,
    kinds: Sequence[str] | None,
) -> AsyncIterator[bytes]:
    library = services.library
    pause, silent = POLL[0], 0.0
    yield b"retry: 1000\n\n"
    while await anyio.to_thread.run_sync(_still, services, caller, carrier):
        job = await anyio.to_thread.run_sync(library.job, caller, job_id)
        found = await anyio.to_thread.run_sync(library.events, caller, job_id, after, BATCH, kinds)
        for event in found:
            after = event.seq
            yield frame(event.kind, event.public(), event.seq)
        if len(found) >= BATCH:
            continue
        if job.status in FINAL_JOB_STATES:  # read before the events, so none is missed
            yield frame("end", {"status": job.status})
            return
        pause = POLL[0] if found else min(pause * 1.5, POLL[1])
        silent = 0.0 if found else silent + pause
        if silent >= HEARTBEAT:
            silent = 0.0
            yield b": still here\n\n"
        if await stopping.wait(pause):
            return


def _still(services: Services, caller: Caller, carrier: str | None) -> bool:
    """Whether the key is still one, with the scopes that it had. While the catalog is away, it is."""
    try:
        return services.authenticator.authenticate(carrier).scopes >= caller.principal.scopes
    except CatalogUnavailable:
        return True
    except ModelworksError:
        return False


def frame(name: str, data: Any, number: int | None = None) -> bytes:
    """One event. `data` becomes one line of JSON, so that nothing in it can end the event."""
    identity = b"" if number is None else b"id: %d\n" % number
    return (
        identity
        + b"event: "
        + name.encode().translate(None, b"\r\n")
        + b"\ndata: "
        + msgspec.json.encode(data, enc_hook=str)
        + b"\n\n"
    )
