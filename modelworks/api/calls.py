"""One inference for a dialect: the gateway's answer, or an abort when the client goes away first."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from modelworks.api.services import Services
from modelworks.core.types import Answer, Call, Caller


async def infer(request: Request, services: Services, caller: Caller, call: Call) -> Answer:
    """The gateway's answer. When the client goes away first, the call is aborted in the replica too."""
    work = asyncio.ensure_future(services.gateway.infer(caller.principal, call))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        gone.cancel()
        work.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
