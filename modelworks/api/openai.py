"""/v1, OpenAI's API: models and chat completions, streamed or whole. A model's name is a deployment's."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import anyio
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from modelworks.api import openai_schemas as schemas
from modelworks.api.body import decode_json
from modelworks.api.errors import render
from modelworks.api.openai_stream import Generated
from modelworks.api.routes import NamePath, Routes, Use, Who, answer
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput, ModelworksError, NotFound
from modelworks.core.generation import check_messages, read_sampling
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.core.types import Call, Caller, Deployment
from modelworks.serve.routes import Route

routes = Routes("OpenAI", "openai")

TASK = "text-generation"
SECONDS = 600.0  # deadline of a generation
STALLED = 60.0  # seconds for which a client may take nothing of what was sent to it
_PAGES = 20
_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop")
_encode = msgspec.json.Encoder().encode

log = logger("openai")


@routes.get("/v1/models", "openai.models", "List models", answer=schemas.MODELS)
async def list_openai_models(services: Use, caller: Who) -> Response:
    """The deployments that this key may call here, by name."""
    found = [_model(deployment) for deployment in (await _deployments(services, caller)).values()]
    return answer({"object": "list", "data": found})


@routes.get("/v1/models/{name}", "openai.models", "Get a model", answer=schemas.MODEL)
async def get_openai_model(services: Use, caller: Who, name: NamePath) -> Response:
    """One deployment that this key may call."""
    found = (await _deployments(services, caller)).get(name)
    if found is None:
        raise _unknown(name)
    return answer(_model(found))


@routes.post(
    "/v1/chat/completions",
    "openai.chat",
    "Create a chat completion",
    answer=schemas.COMPLETION,
    errors=(404, 504),
    body="infer",
    request_body=schemas.REQUEST,
    stream=True,
)
async def create_chat_completion(request: Request, services: Use, caller: Who) -> Response:
    """Answer `messages`; with `stream` as server-sent events. Parameters that are not known here are ignored."""
    asked = read_chat(await request.body())
    route = _route(services, caller, asked.model)
    generated = Generated()
    call = Call(
        asked.model,
        [Tensor("messages", "BYTES", [1], pack_bytes([_encode(asked.messages)]))],
        services.gateway.deadline(SECONDS),
        caller.request_id,
        asked.params,
        stream=asked.stream,
    )
    request.scope["state"]["call"] = call
    chat = _Chat(request, services, caller, call, generated, asked, route)
    return await chat.answer()


class Asked(msgspec.Struct):
    """A checked request. `params` are the sampling parameters, by OpenAI's names."""

    model: str
    messages: list[dict[str, str]]
    params: dict[str, Any]
    stream: bool
    usage: bool


def read_chat(data: bytes) -> Asked:
    """InvalidInput names the parameter that is wrong, or that this server does not offer."""
    body = decode_json(data)
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidInput("model must be the name of a deployment; GET /v1/models lists them", param="model")
    _refuse_missing(body)
    limit = body.get("max_completion_tokens")
    params = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            read_sampling({"max_tokens": body[name]})
            params["max_tokens"] = limit if limit is not None else body[name]
    read_sampling(params)
    stream, options = body.get("stream"), body.get("stream_options")
    if stream not in (None, True, False):
        raise InvalidInput("stream must be true or false", param="stream")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise InvalidInput("stream_options is an object, and goes with stream", param="stream_options")
    usage = bool((options or {}).get("include_usage"))
    return Asked(model, check_messages(body.get("messages")), params, bool(stream), usage)


def _refuse_missing(body: dict[str, Any]) -> None:
    """What changes the answer and is not offered yet is refused, not ignored."""
    if body.get("n") not in (None, 1):
        raise InvalidInput("n must be 1: this server makes one choice a call", param="n")
    kind = body.get("response_format")
    if kind is not None and (not isinstance(kind, dict) or kind.get("type") != "text"):
        raise InvalidInput("response_format must be of type text: others are not offered yet", param="response_format")
    for name in ("tools", "functions", "logprobs", "logit_bias", "audio"):
        if body.get(name):
            raise InvalidInput(f"{name} is not offered by this server yet; leave it out", param=name)


class _Chat:
    """One chat completion on its way: submits the call, answers, counts what was delivered, and aborts if need be."""

    def __init__(
        self,
        request: Request,
        services: Services,
        caller: Caller,
        call: Call,
        made: Generated,
        asked: Asked,
        route: Route,
    ) -> None:
        self.request = request
        self.gateway = services.gateway
        self.caller = caller
        self.call = call
        self.made = made
        self.asked = asked
        self.begun = time.monotonic()
        self.first: float | None = None
        self.end = "client_gone"
        self.head = {
            "id": f"chatcmpl-{os.urandom(12).hex()}",
            "object": "chat.completion.chunk" if asked.stream else "chat.completion",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": route.model_version,
        }

    async def answer(self) -> Response:
        """The whole completion, or a stream whose first part is there. Errors before it are ordinary ones."""
        self.pending = self.gateway.submit(self.caller.principal, self.call, self.made.deliver)
        self.watch = asyncio.ensure_future(self._gone())
        response: Response | None = None
        try:
            await self.made.ready(whole=not self.asked.stream)
            if self.made.gone:
                raise ClientDisconnect
            if self.made.error is not None:
                self.end = self.made.error.code
                raise self.made.error
            self.first = time.monotonic()
            self.request.scope["state"]["model_version"] = self.made.model_version
            response = _Stream(self) if self.asked.stream else self._whole()
            return response
        finally:
            if not isinstance(response, _Stream):
                self.close()

    def _whole(self) -> Response:
        text = self.made.take()
        self.end = self.made.reason
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": self.made.reason,
        }
        return answer({**self.head, "choices": [choice], "usage": self.made.usage()})

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """One event of the stream."""
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        body: dict[str, Any] = {**self.head, "choices": [choice]}
        if self.asked.usage:
            body["usage"] = None
        return b"data: " + _encode(body) + b"\n\n"

    def last(self) -> bytes:
        """The end of the stream after its last text."""
        events = self.chunk({}, self.made.reason)
        if self.asked.usage:
            events += b"data: " + _encode({**self.head, "choices": [], "usage": self.made.usage()}) + b"\n\n"
        return events + b"data: [DONE]\n\n"

    def failure(self, error: ModelworksError) -> bytes:
        _, _, body = render(error, "/v1", self.caller.request_id)
        return b"data: " + body + b"\n\n"

    def close(self) -> None:
        """Abort what still runs, and say what was counted: tokens that were delivered, also of a cut stream."""
        self.watch.cancel()
        self.gateway.abort(self.pending)
        now = time.monotonic()
        log.info(
            "generation",
            request_id=self.caller.request_id,
            key_id=self.caller.principal.key_id,
            deployment=self.call.deployment,
            prompt_tokens=self.made.prompt_tokens,
            completion_tokens=self.made.delivered,
            end=self.end,
            first_ms=round(((self.first or now) - self.begun) * 1e3, 1),
            seconds=round(now - self.begun, 3),
        )

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.made.leave()


class _Stream(Response):
    """Server-sent events. What has come while the client was slow goes out as one event, so nothing piles up."""

    def __init__(self, chat: _Chat) -> None:
        self.chat = chat
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        chat, made = self.chat, self.chat.made

        async def put(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(STALLED):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await put(chat.chunk({"role": "assistant", "content": "", "refusal": None}))
            while not made.gone:
                await made.ready()
                if made.gone:
                    return
                if text := made.take():
                    await put(chat.chunk({"content": text}))
                if made.error is not None:
                    chat.end = made.error.code
                    await put(chat.failure(made.error), more=False)
                    return
                if made.done and not made.pending:
                    await put(chat.last(), more=False)
                    chat.end = made.reason
                    return
        except TimeoutError:
            chat.end = "client_stalled"  # the server closes the connection: the answer is not complete
        finally:
            chat.close()


def _route(services: Services, caller: Caller, name: str) -> Route:
    try:
        route = services.gateway.route(caller.principal, name)
    except NotFound:
        raise _unknown(name) from None
    except ModelworksError as error:
        error.param = "model"
        raise
    if route.task != TASK:
        raise InvalidInput(f"{name!r} serves {route.task}, not chat; GET /v1/models lists what does", param="model")
    return route


def _unknown(name: str) -> NotFound:
    return NotFound(
        f"there is no model {name[:100]!r} that this key may call; GET /v1/models lists them",
        code="model_not_found",
        param="model",
    )


async def _deployments(services: Services, caller: Caller) -> dict[str, Deployment]:
    mine = {route.name for route in services.gateway.routes(caller.principal) if route.task == TASK}
    return await anyio.to_thread.run_sync(_rows, services, caller, mine) if mine else {}


def _rows(services: Services, caller: Caller, mine: set[str]) -> dict[str, Deployment]:
    found: dict[str, Deployment] = {}
    after: str | None = None
    for _ in range(_PAGES):
        page = services.deployments.list(caller, limit=100, after=after)
        found.update({item.name: item for item in page.items if item.name in mine})
        if not page.has_more:
            break
        after = page.items[-1].id
    return dict(sorted(found.items()))


def _model(deployment: Deployment) -> dict[str, Any]:
    return {
        "id": deployment.name,
        "object": "model",
        "created": int(deployment.created_at),
        "owned_by": deployment.model_version,
    }
