"""One request for generated text on its way: its calls are submitted, read, counted, and aborted when nobody waits."""

from __future__ import annotations

import asyncio
import time
from hashlib import blake2b
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from modelworks.api.errors import render
from modelworks.api.openai_stream import Generated, ready
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput, ModelworksError, NotFound
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Call, Caller
from modelworks.serve.detours import Errand
from modelworks.serve.hints import PRIORITY_HEADER, STICKY_HEADER, hint
from modelworks.serve.router import Pending
from modelworks.serve.routes import Route

TASK = "text-generation"
SECONDS = 600.0  # deadline of a generation
STALLED = 60.0  # seconds for which a client may take nothing of what was sent to it
MAX_CHOICES = 128  # of all prompts of one request
QUEUE_HEADER = "x-queue-position"  # calls that waited for the deployment when this one came
CACHE_HEADER = "x-cache"
_PREFIX = 1024  # bytes of a prompt by which it is sent to the replica that may have them in its cache
_SHORTEST = 256  # what a prompt must have for that

log = logger("openai")
encode = msgspec.json.Encoder().encode


class Asked(msgspec.Struct):
    """A checked request. `params` are those of core/generation.py's Sampling; `prompts` x `n` calls are made."""

    model: str
    prompts: list[Tensor]
    params: dict[str, Any]
    n: int = 1
    stream: bool = False
    usage: bool = False  # in a stream's last event
    tools: list[str] = []  # names that may be called
    forced: bool = False  # the answer is calls of them and nothing else


class Exchange:
    """A request and its answer, whole or as server-sent events; each dialect says how these are written."""

    def __init__(self, request: Request, services: Services, caller: Caller, asked: Asked) -> None:
        self.request = request
        self.gateway = services.gateway
        self.services = services
        self.caller = caller
        self.asked = asked
        self.route = text_route(services, caller, asked.model)
        self.news = asyncio.Event()
        self.choices = [Generated(index, self.news) for index in range(len(asked.prompts) * asked.n)]
        self.pending: list[Pending | Errand] = []
        self.created = int(time.time())
        self.begun = time.monotonic()
        self.first: float | None = None
        self.end = "client_gone"
        self.queued = self.gateway.router.waiting(self.route.key)

    # what a dialect writes

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is complete."""
        raise NotImplementedError

    def opening(self) -> bytes:
        """The events before the first text."""
        return b""

    def news_of(self, made: Generated) -> bytes:
        """The events for what a choice has made since; `made.done` and nothing pending: it has ended."""
        raise NotImplementedError

    async def closing(self) -> bytes:
        """The events after the end of all choices."""
        return b"data: [DONE]\n\n"

    def failure(self, error: ModelworksError) -> bytes:
        """The event that ends a stream that failed."""
        _, _, body = render(error, "/v1", self.caller.request_id)
        return b"data: " + body + b"\n\n"

    # its way

    async def answer(self) -> Response:
        """The whole answer, or a stream whose first part is there. Errors before it are ordinary ones."""
        self.watch = asyncio.ensure_future(self._gone())
        response: Response | None = None
        try:
            self._submit()
            await ready(self.choices, self.news, whole=not self.asked.stream)
            if self.choices[0].gone:
                raise ClientDisconnect
            self._check()
            self.first = time.monotonic()
            state = self.request.scope["state"]
            state["model_version"] = self.version
            headers = {QUEUE_HEADER: str(self.queued)}
            if any(isinstance(pending, Errand) and pending.cached for pending in self.pending):
                headers[CACHE_HEADER] = "hit"
            if self.asked.stream:
                response = Events(self, headers)
                return response
            body = await self.whole()
            self.end = self.choices[0].reason
            return Response(encode(body), 200, headers, "application/json")
        finally:
            if response is None:
                self.close()

    def _submit(self) -> None:
        for made in self.choices:
            number, copy = divmod(made.index, self.asked.n)
            params = self.asked.params
            if copy:  # another answer to the same: another seed, and no copy of the first from a cache
                seed = params.get("seed")
                params = {**params, "choice": copy, **({} if seed is None else {"seed": seed + copy})}
            call = Call(
                self.asked.model,
                [self.asked.prompts[number]],
                self.gateway.deadline(SECONDS),
                self.caller.request_id,
                params,
                stream=self.asked.stream,
            )
            headers = self.request.headers
            hint(call, self.caller.principal, headers.get(PRIORITY_HEADER), headers.get(STICKY_HEADER))
            call.sticky = call.sticky or prefix_key(self.caller, call)
            self.request.scope["state"]["call"] = call
            self.pending.append(self.gateway.submit(self.caller.principal, call, made.deliver))

    def _check(self) -> None:
        for made in self.choices:
            if made.error is not None:
                self.end = made.error.code
                raise made.error

    @property
    def version(self) -> str:
        """The model version that answers."""
        return next((made.model_version for made in self.choices if made.model_version), self.route.model_version)

    def close(self) -> None:
        """Abort what still runs, and count tokens that were delivered, also those of a cut stream."""
        self.watch.cancel()
        for pending in self.pending:
            self.gateway.abort(pending)
        now = time.monotonic()
        heads = self.choices[:: self.asked.n]
        prompt, cached = (sum(getattr(one, name) for one in heads) for name in ("prompt_tokens", "cached_tokens"))
        delivered = sum(made.delivered for made in self.choices)
        key = self.caller.principal.key_id
        self.gateway.observer.tokens(self.route.key, key, prompt, delivered, cached)
        log.info(
            "generation",
            request_id=self.caller.request_id,
            key_id=key,
            deployment=self.asked.model,
            prompt_tokens=prompt,
            completion_tokens=delivered,
            end=self.end,
            first_ms=round(((self.first or now) - self.begun) * 1e3, 1),
            seconds=round(now - self.begun, 3),
        )

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        for made in self.choices:
            made.leave()


class Events(Response):
    """Server-sent events. What has come while the client was slow goes out as one event, so nothing piles up."""

    def __init__(self, exchange: Exchange, headers: dict[str, str]) -> None:
        self.exchange = exchange
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange = self.exchange

        async def put(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(STALLED):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if opening := exchange.opening():
                await put(opening)
            open_ = list(exchange.choices)
            while open_:
                await ready(open_, exchange.news)
                if open_[0].gone:
                    return
                for made in list(open_):
                    if made.error is not None:
                        exchange.end = made.error.code
                        await put(exchange.failure(made.error), more=False)
                        return
                    ended = made.done
                    if (made.pending or ended) and (events := exchange.news_of(made)):
                        await put(events)
                    if ended and not made.pending:
                        open_.remove(made)
            await put(await exchange.closing(), more=False)
            exchange.end = exchange.choices[0].reason
        except TimeoutError:
            exchange.end = "client_stalled"  # the server closes the connection: the answer is not complete
        finally:
            exchange.close()


def prefix_key(caller: Caller, call: Call) -> str:
    """What sends prompts that begin alike to the same replica, where their beginning may be in the cache."""
    data = call.inputs[0].data
    if len(data) < _SHORTEST:
        return ""
    digest = blake2b(data[4:_PREFIX] if call.inputs[0].datatype == "BYTES" else data[:_PREFIX], digest_size=8)
    digest.update(repr(call.params.get("tools", ""))[:_PREFIX].encode())
    return f"{caller.project_id}/prefix/{digest.hexdigest()}"


def text_route(services: Services, caller: Caller, name: str) -> Route:
    return task_route(services, caller, name, (TASK,), "generate text")


def task_route(services: Services, caller: Caller, name: str, tasks: tuple[str, ...], what: str) -> Route:
    """The route of a deployment of one of `tasks`; errors name the parameter model."""
    try:
        route = services.gateway.route(caller.principal, name)
    except NotFound:
        raise unknown_model(name) from None
    except ModelworksError as error:
        error.param = "model"
        raise
    if route.task not in tasks:
        raise InvalidInput(
            f"{name!r} serves {route.task} and does not {what}; GET /v1/models lists what there is", param="model"
        )
    return route


def unknown_model(name: str) -> NotFound:
    return NotFound(
        f"there is no model {name[:100]!r} that this key may call; GET /v1/models lists them",
        code="model_not_found",
        param="model",
    )


# reading requests


def read_body(data: bytes, decode: Any) -> tuple[dict[str, Any], str]:
    """The JSON object of a request and its model."""
    body = decode(data)
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidInput("model must be the name of a deployment; GET /v1/models lists them", param="model")
    return body, model


def read_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    """(whether to stream, whether with usage)."""
    stream, options = body.get("stream"), body.get("stream_options")
    if stream not in (None, True, False):
        raise InvalidInput("stream must be true or false", param="stream")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise InvalidInput("stream_options is an object, and goes with stream", param="stream_options")
    return bool(stream), bool((options or {}).get("include_usage"))


def read_number(body: dict[str, Any], name: str, least: int, most: int, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidInput(f"{name} must be a whole number from {least} to {most}", param=name)
    return value


def read_flag(body: dict[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} must be true or false", param=name)
    return value


def read_format(value: Any, param: str = "response_format") -> dict[str, Any] | None:
    """The JSON schema that a response_format asks for. The Responses API has name, schema and strict one level higher."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        given = value.get("json_schema", value) if param == "response_format" else value
        schema = given.get("schema") if isinstance(given, dict) else None
        if not isinstance(schema, dict):
            raise InvalidInput(f"{param} of type json_schema needs a schema (an object)", param=param)
        return schema
    raise InvalidInput(f"{param}.type must be text, json_object or json_schema", param=param)
