"""One request for generated text on its way: its calls are submitted, read, counted, and aborted when nobody waits."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import blake2b
from types import TracebackType
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from modelworks.api.allowance import Allowance
from modelworks.api.errors import render
from modelworks.api.openai.stream import Generated, ready
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput, ModelworksError, NotFound, Unavailable
from modelworks.core.generation import unsupported
from modelworks.core.tasks import GENERATION
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Call, Caller
from modelworks.serve.detours import Errand
from modelworks.serve.hints import PRIORITY_HEADER, STICKY_HEADER, hint
from modelworks.serve.metering import ANSWER, estimate
from modelworks.serve.router import Pending
from modelworks.serve.routes import Route

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
    running: bool = False  # and so far, in each
    tools: list[str] = []  # names that may be called
    forced: bool = False  # the answer is calls of them and nothing else
    images: bool = False  # among the messages


class Exchange:
    """A request and its answer, whole or as server-sent events; each dialect says how these are written."""

    def __init__(self, request: Request, services: Services, caller: Caller, asked: Asked) -> None:
        self.request = request
        self.gateway = services.gateway
        self.services = services
        self.caller = caller
        self.asked = asked
        self.route, self.adapter = text_route(services, caller, asked.model)
        if asked.images and not self.route.images and not self.route.detours:
            raise unsupported("images", "messages")  # with detours, another deployment may see them
        self.news = asyncio.Event()
        self.choices = [Generated(index, self.news) for index in range(len(asked.prompts) * asked.n)]
        self.pending: list[Pending | Errand] = []
        self.created = int(time.time())
        self.begun = time.monotonic()
        self.first: float | None = None
        self.end = "client_gone"
        self.outcome = ""  # its end, once a stream's last event is written
        self.queued = self.gateway.router.ahead(self.route.key)
        self.allowance = Allowance(services, caller, request)
        self.plain = not asked.running and "logprobs" not in asked.params  # an event has nothing new but its text
        self._frames: dict[int, tuple[bytes, bytes]] = {}

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

    def filled(self, made: Generated, text: str, event: Callable[[str], bytes]) -> bytes:
        """The event for a text, as `event` makes it; all but the text is encoded once for each choice."""
        frame = self._frames.get(made.index)
        if frame is None:
            mark = os.urandom(16).hex()
            before, _, after = event(mark).partition(b'"' + mark.encode() + b'"')
            frame = self._frames[made.index] = before, after
        return frame[0] + encode(text) + frame[1]

    # its way

    async def answer(self) -> Response:
        """The whole answer, or a stream whose first part is there. Errors before it are ordinary ones."""
        self.watch = asyncio.ensure_future(self._gone())
        response: Response | None = None
        try:
            self._submit()
            await ready(self.choices, self.news, whole=not self.asked.stream)
            await self.services.shares.pace(self.caller.principal.key_id)
            if self.choices[0].gone:
                raise ClientDisconnect
            self._check()
            self.first = time.monotonic()
            state = self.request.scope["state"]
            state["model_version"] = self.version
            headers = {QUEUE_HEADER: str(self.queued)}
            if any(made.repeated for made in self.choices):
                headers[CACHE_HEADER] = "hit"
            if self.asked.stream:
                response = Events(self, headers)
                return response
            body = await self.whole()
            self.end = self.choices[0].reason
            return Response(encode(body), 200, headers, "application/json")
        except asyncio.CancelledError:  # the server's grace is over
            self.end = "stopping"
            raise _stopping() from None
        finally:
            if response is None:
                self.close()

    def _submit(self) -> None:
        self.allowance.take(self.asked.prompts, len(self.choices) * self.asked.params.get("max_tokens", ANSWER))
        for made in self.choices:
            number, copy = divmod(made.index, self.asked.n)
            params = {**self.asked.params, "adapter": self.adapter} if self.adapter else self.asked.params
            if copy:  # another answer to the same: another seed, and no copy of the first from a cache
                seed = params.get("seed")
                params = {**params, "choice": copy, **({} if seed is None else {"seed": seed + copy})}
            call = Call(
                self.route.name,
                [self.asked.prompts[number]],
                self.gateway.deadline_of(self.route),
                self.caller.request_id,
                params,
                stream=self.asked.stream,
                counted=True,
            )
            headers = self.request.headers
            hint(call, self.caller.principal, headers.get(PRIORITY_HEADER), headers.get(STICKY_HEADER))
            call.sticky = call.sticky or prefix_key(self.caller, call)
            self.request.scope["state"]["call"] = call
            pending = self.gateway.submit(self.caller.principal, call, made.deliver)
            made.repeated = isinstance(pending, Errand) and pending.cached
            self.pending.append(pending)

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
        left = [self.gateway.abort(pending) for pending in self.pending]
        now = time.monotonic()
        heads = self.choices[:: self.asked.n]
        prompt, cached = (sum(getattr(one, name) for one in heads) for name in ("prompt_tokens", "cached_tokens"))
        delivered = sum(made.delivered for made in self.choices)
        repeated = sum(made.delivered for made in self.choices if made.repeated)
        key = self.caller.principal.key_id
        self.gateway.observer.tokens(self.route.key, key, prompt, delivered, cached, repeated)
        read = sum(one.prompt_tokens for one in heads if not one.repeated)
        # whoever leaves before a replica has told what it read pays what the prompt was taken for
        unread = {one.index // self.asked.n for one, at_work in zip(self.choices, left, strict=False) if at_work}
        read += sum(estimate([self.asked.prompts[at]]) for at in unread if not heads[at].prompt_tokens)
        self.allowance.settle(read + delivered - repeated)
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


class Patience:
    """Ends a task by TimeoutError when one write has kept it for `seconds`: one timer a stream, not one a write."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._over = False

    async def write(self, writing: Awaitable[None]) -> None:
        self._since = self._loop.time()
        await writing
        self._since = None

    def __enter__(self) -> Patience:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if not self._over or self._task is None:
            return
        others = self._task.uncancel()
        if kind is asyncio.CancelledError and not others:
            raise TimeoutError from None

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._seconds
        self._over = due <= now
        if not self._over:
            self._timer = self._loop.call_at(due, self._look)
        elif self._task is not None:
            self._task.cancel()


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
        try:
            with Patience(STALLED) as patience:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for events, last in self._events():
                    await patience.write(send({"type": "http.response.body", "body": events, "more_body": not last}))
                    if last:
                        exchange.end = exchange.outcome
        except TimeoutError:
            exchange.end = "client_stalled"  # the server closes the connection: the answer is not complete
        except asyncio.CancelledError:  # the server's grace is over
            exchange.end = "stopping"
            await send({"type": "http.response.body", "body": exchange.failure(_stopping()), "more_body": False})
            raise
        finally:
            exchange.close()

    async def _events(self) -> AsyncIterator[tuple[bytes, bool]]:
        """What to write, and whether it is the last; nothing more once the client has gone."""
        exchange = self.exchange
        if opening := exchange.opening():
            yield opening, False
        open_ = list(exchange.choices)
        while open_:
            await ready(open_, exchange.news)
            await exchange.services.shares.pace(exchange.caller.principal.key_id)
            if open_[0].gone:
                return
            for made in list(open_):
                if made.error is not None:
                    exchange.outcome = made.error.code
                    yield exchange.failure(made.error), True
                    return
                ended = made.done
                if (made.pending or ended) and (events := exchange.news_of(made)):
                    yield events, False
                if ended and not made.pending:
                    open_.remove(made)
        exchange.outcome = exchange.choices[0].reason
        yield await exchange.closing(), True


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping; ask again in a moment", code="stopping", retry_after=2.0)


def prefix_key(caller: Caller, call: Call) -> str:
    """What sends prompts that begin alike to the same replica, where their beginning may be in the cache."""
    data = call.inputs[0].data
    if len(data) < _SHORTEST:
        return ""
    digest = blake2b(data[4:_PREFIX] if call.inputs[0].datatype == "BYTES" else data[:_PREFIX], digest_size=8)
    digest.update(repr(call.params.get("tools", ""))[:_PREFIX].encode())
    digest.update(str(call.params.get("adapter", "")).encode())
    return f"{caller.project_id}/prefix/{digest.hexdigest()}"


def text_route(services: Services, caller: Caller, name: str) -> tuple[Route, str]:
    """Of the model `name`, a deployment or DEPLOYMENT:ADAPTER: the deployment's route, and the adapter ("" for none)."""
    deployment, _, adapter = name.partition(":")
    route = task_route(services, caller, deployment, (GENERATION,), "generate text")
    if adapter not in route.adapters and name != deployment:
        raise unknown_model(name)
    return route, adapter


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


def read_stream(body: dict[str, Any]) -> tuple[bool, bool, bool]:
    """(whether to stream, whether with usage at the end, whether with usage so far in each event)."""
    stream, options = body.get("stream"), body.get("stream_options")
    if stream not in (None, True, False):
        raise InvalidInput("stream must be true or false", param="stream")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise InvalidInput("stream_options is an object, and goes with stream", param="stream_options")
    found = options or {}
    return bool(stream), bool(found.get("include_usage")), bool(found.get("continuous_usage_stats"))


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
