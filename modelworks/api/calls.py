"""One inference for a dialect: a body becomes a call and the means to encode its answer, in either lane."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from modelworks.api.services import Services
from modelworks.core.types import Answer, Call, Caller
from modelworks.serve.columns import Kind
from modelworks.serve.hints import PRIORITY_HEADER, STICKY_HEADER, hint

JSON_HEADERS = ((b"content-type", b"application/json"),)


class Reply(NamedTuple):
    """A good answer: its headers but for those that every answer has, and its body."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


Read = tuple[Kind, int, bytes, str | None]  # of a body: kind, rows, bytes of all inputs, the id that its answer repeats


class Prepared(NamedTuple):
    """A request that was read and checked; `reply` encodes what the gateway answers."""

    call: Call
    reply: Callable[[Answer], Reply]


async def respond(request: Request, services: Services, caller: Caller, prepared: Prepared) -> Response:
    """The slow lane's answer. When the client goes away first, the call is aborted in the replica too."""
    headers, body = prepared.reply(await infer(request, services, caller, prepared.call))
    response = Response(body)
    response.raw_headers = [(b"content-length", b"%d" % len(body)), *headers]
    return response


async def infer(request: Request, services: Services, caller: Caller, call: Call) -> Answer:
    """The gateway's answer; ClientDisconnect, with the call aborted, when the client goes away first."""
    headers = request.headers
    hint(call, caller.principal, headers.get(PRIORITY_HEADER), headers.get(STICKY_HEADER))
    seen = request.scope["state"]  # what the guard's log line says of it
    seen["call"] = call
    work = asyncio.ensure_future(services.gateway.infer(caller.principal, call))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        found = work.result()
        await services.shares.pace(caller.principal.key_id)
        seen["model_version"] = found.model_version
        return found
    finally:
        gone.cancel()
        work.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
