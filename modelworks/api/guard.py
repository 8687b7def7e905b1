"""In front of everything: who calls, whether they may, how often and how much - on the headers alone, before the body.

Pure ASGI. What passes has `principal` and `request_id` in its scope's state and a body within its bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import re
import time
from typing import NamedTuple

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelworks.api.body import inflate
from modelworks.api.errors import MethodNotAllowed, no_route, render
from modelworks.api.intake import Intake
from modelworks.api.routes import RouteTable, Rule
from modelworks.api.services import Services
from modelworks.core.errors import (
    ModelworksError,
    PayloadTooLarge,
    RateLimited,
    RequestTimeout,
    Unauthenticated,
    UnsupportedMedia,
)
from modelworks.core.telemetry import logger
from modelworks.core.types import Call, Principal
from modelworks.security import policy
from modelworks.security.leases import LeasingLimiter
from modelworks.security.quota import RateLimiter
from modelworks.serve.observe import CANCELLED, rows_of
from modelworks.serve.tracing import RequestSpan

log = logger("api.guard")

MIB = 1024 * 1024
MAX_CONTROL_BODY = 4 * MIB  # JSON that describes something; tensors and files have the limits of the settings
MAX_IGNORED = 64 * 1024  # bytes of a refused body that are read and thrown away
LOOKUP_THREADS = 8  # key look-ups at a time, so that a flood of unknown keys does not take the other threads
_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._:=+/-]{1,128}$")
_JSON = re.compile(r"^application/(?:[a-z0-9.+-]+\+)?json$")
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class Disconnected(Exception):
    """The client went away while its body was read; nobody waits for an answer."""


class Guard:
    """`app` behind the checks. `table` holds the rule of every route."""

    def __init__(self, app: ASGIApp, table: RouteTable, services: Services) -> None:
        self.inner = app
        self.table = table
        self._services = services
        self._lookups: anyio.CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # websocket: there are none
            await send({"type": "websocket.close", "code": 1008, "reason": ""})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope["headers"])
        exchange = _Exchange(headers, scope["path"], send)
        state = scope.setdefault("state", {})
        state["request_id"] = exchange.request_id
        begun = time.monotonic()
        observer = self._services.gateway.observer
        span = observer.tracing.begin(scope["method"], headers.trace) if observer.tracing is not None else None
        try:
            with span or contextlib.nullcontext():
                await self._serve(scope, receive, headers, exchange)
        finally:
            if exchange.body is not None:
                exchange.body.intake.close()
            self._observe(scope, exchange, time.monotonic() - begun, span)

    def _observe(self, scope: Scope, exchange: _Exchange, seconds: float, span: RequestSpan | None) -> None:
        """One count and one line for the request, without its content."""
        state = scope["state"]
        status = exchange.status or CANCELLED
        principal: Principal | None = state.get("principal")
        call: Call | None = state.get("call")
        deployment = call.deployment if call is not None else ""
        if exchange.operation or status >= 400:  # probes of /health are not worth a line
            self._services.gateway.observer.request(
                exchange.operation,
                status,
                request_id=exchange.request_id,
                key_id=principal.key_id if principal else "",
                project_id=principal.project_id if principal else "",
                deployment=deployment,
                model_version=state.get("model_version", ""),
                seconds=seconds,
                bytes_in=exchange.body.size if exchange.body else 0,
                bytes_out=exchange.sent,
                rows=rows_of(call) if call is not None else 0,
            )
        if span is not None:
            span.end(exchange.operation, status, exchange.request_id, deployment)

    async def _serve(self, scope: Scope, receive: Receive, headers: Headers, exchange: _Exchange) -> None:
        try:
            rule = await self._admit(scope, headers, exchange)
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}  # the server leaves the body out
            receive = await self._receive(rule, headers, exchange, receive)
            principal: Principal | None = scope["state"].get("principal")
            if principal is None:
                await self.inner(scope, receive, exchange.send)
            else:
                await self._in_turn(principal.key_id, rule, scope, receive, exchange)
        except ModelworksError as error:
            await exchange.refuse(error)
        except (Disconnected, ClientDisconnect):
            exchange.status = CANCELLED  # whatever was sent, nobody read it
            log.debug("client went away", request_id=exchange.request_id)
        except Exception as error:  # the one error edge of this process
            log.error("unexpected error", request_id=exchange.request_id, path=scope["path"][:200], exc_info=error)
            await exchange.refuse(ModelworksError("unexpected"))

    async def _in_turn(self, key: str, rule: Rule, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        """Go on when the caller's share of the loop allows. What asks the catalog is also counted while it lasts, since
        it takes a thread; but not what its client, a job or a model may keep waiting."""
        shares = self._services.shares
        if not shares.crowded(key, time.monotonic()):
            await self.inner(scope, receive, exchange.send)
            return
        await shares.pace(key, fresh=True)
        if rule.stream or rule.body in ("infer", "form"):
            await self.inner(scope, receive, exchange.send)
            return
        await shares.admit(key)
        with contextlib.ExitStack() as place:
            place.callback(shares.leave, key)
            exchange.place = scope["state"]["place"] = place
            await self.inner(scope, receive, exchange.send)

    async def _admit(self, scope: Scope, headers: Headers, exchange: _Exchange) -> Rule:
        """Authenticate, authorise and count the call; returns the route's rule."""
        rules = self.table.match(scope["path"])
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        rule = rules.get(method) if rules else None
        if rule is not None:
            exchange.operation = rule.operation or ""
        if rule is not None and rule.operation is None:
            return rule
        principal = await self._principal(headers)
        if rules is None:
            raise no_route(scope["path"])
        if rule is None or (rule.stream and scope["method"] == "HEAD"):
            allowed = set(rules) | ({"HEAD"} if "GET" in rules and not rules["GET"].stream else set())
            raise MethodNotAllowed(scope["method"], allowed)
        assert rule.operation is not None
        policy.require(principal, rule.operation)
        self._count(principal, exchange)
        scope["state"].update(principal=principal, limits=exchange.limits)
        check_media(rule, headers)
        return rule

    async def _principal(self, headers: Headers) -> Principal:
        authorization = headers.authorization
        if authorization is None:
            raise Unauthenticated("send a valid API key as `Authorization: Bearer KEY`")
        if headers.project is None:
            known = self._services.authenticator.cached(authorization)
            if known is not None:
                return known
        if self._lookups is None:
            self._lookups = anyio.CapacityLimiter(LOOKUP_THREADS)
        text = authorization.decode("latin-1")
        project = headers.project
        return await anyio.to_thread.run_sync(
            lambda: self._services.authenticator.authenticate(text, project=project), limiter=self._lookups
        )

    def _count(self, principal: Principal, exchange: _Exchange) -> None:
        left, refusal = count(principal, self._services.limiter)
        exchange.limits = left.headers() if left is not None else []
        most = principal.tokens_per_minute
        if most is not None:
            exchange.limits += token_headers(most, *self._services.limiter.reserve(principal.key_id, most, 0)[1:])
        if refusal is not None:
            raise refusal

    async def _receive(self, rule: Rule, headers: Headers, exchange: _Exchange, receive: Receive) -> Receive:
        """What the application reads its body from: streamed for forms, else read here whole."""
        settings = self._services.settings
        if not headers.has_body:
            return receive
        limit = {"form": settings.max_upload, "infer": settings.max_body}.get(
            rule.body, min(settings.max_body, MAX_CONTROL_BODY)
        )
        if headers.length is not None and headers.length > limit:
            raise too_large(limit)
        intake = self._services.intake(time.monotonic())
        bounded = exchange.body = _BoundedBody(receive, limit, settings.body_timeout, intake, kept=rule.body != "form")
        if rule.body == "form":
            return bounded.receive
        data = await bounded.read()
        if rule.body == "none":
            return receive
        if headers.encoding:
            data = inflate(data, headers.encoding, limit)
            intake.hold(len(data))
        return _Replay(data, receive).receive


ALLOWANCE = (
    (b"x-ratelimit-limit-requests", b"%d"),
    (b"x-ratelimit-remaining-requests", b"%d"),
    (b"x-ratelimit-reset-requests", b"%ds"),
)


class Allowance(NamedTuple):
    """What a rate limit leaves of a key's calls: the headers of every answer to it."""

    limit: int
    remaining: int
    reset: int  # seconds

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(name, form % value) for (name, form), value in zip(ALLOWANCE, self, strict=True)]


def count(principal: Principal, limiter: RateLimiter | LeasingLimiter) -> tuple[Allowance | None, RateLimited | None]:
    """Count one call of the principal: what is left, if there is a limit, and the refusal when nothing was."""
    limit = principal.requests_per_minute
    if limit is None:
        return None, None
    allowed, remaining, reset = limiter.take(principal.key_id, limit)
    seconds = math.ceil(reset)
    left = Allowance(limit, remaining, seconds)
    if allowed:
        return left, None
    message = f"this key may make {limit} requests a minute; try again in {seconds} s"
    return left, RateLimited(message, retry_after=reset, detail={"limit": "requests"})


def token_headers(limit: int, remaining: int, reset: float) -> list[tuple[bytes, bytes]]:
    """What a key's limit of tokens leaves: the headers beside those of its calls."""
    values = (b"%d" % limit, b"%d" % remaining, b"%ds" % math.ceil(reset))
    names = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
    return list(zip(names, values, strict=True))


_run = os.urandom(8).hex()
_numbers = itertools.count(1)


def new_request_id() -> str:
    """`req_` and 24 hexadecimal digits: those of this process, then of the request."""
    return f"req_{_run}{next(_numbers):08x}"


def too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit} bytes, the most that is taken here")


def stalled(timeout: float) -> RequestTimeout:
    return RequestTimeout(f"no byte of the announced body came for {timeout:g} s; send it again")


def check_media(rule: Rule, headers: Headers) -> None:
    """Raise UnsupportedMedia for a body that the route cannot read."""
    media = headers.media
    if rule.body == "form":
        if media not in _FORMS:
            raise UnsupportedMedia(f"send multipart/form-data, not {media or 'a body without Content-Type'}")
    elif (rule.binary and headers.binary and media == "application/octet-stream") or (media == _FORMS[0] and rule.multipart):
        pass
    elif media and not _JSON.match(media):
        hint = "; curl sends this type unless you add -H 'Content-Type: application/json'" if media in _FORMS else ""
        raise UnsupportedMedia(f"send application/json, not {media}{hint}")
    encoding = headers.encoding
    if encoding and (rule.body != "infer" or encoding not in ("gzip", "deflate")):
        raise UnsupportedMedia(f"Content-Encoding {encoding} is not taken here; send the body as it is")


class Headers:
    """The few headers that the guard looks at. `length` None: not announced; `has_body`: one was announced; `odd`:
    nothing for the fast lane."""

    __slots__ = (
        "authorization", "binary", "encoding", "has_body", "length", "media", "odd", "plain", "project",
        "request_id", "trace",
    )  # fmt: skip

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self.authorization: bytes | None = None
        self.project: str | None = None
        self.length: int | None = None
        self.media = self.encoding = ""
        self.has_body = self.odd = False
        self.trace: dict[str, str] | None = None  # W3C Trace Context
        self.binary: bytes | None = None  # how long the JSON in front of binary data is
        self.request_id = ""
        for name, value in raw:
            if name == b"authorization":
                # two of them: which one counts would depend on who looks
                self.authorization = value if self.authorization is None else b""
            elif name == b"content-length":
                self.length = int(value) if value.isdigit() and len(value) < 20 else None
                self.has_body = self.has_body or self.length != 0
            elif name == b"transfer-encoding":
                self.has_body = self.odd = True
            elif name == b"content-type":
                self.media = value.split(b";", 1)[0].strip().lower().decode("latin-1")[:100]
            elif name == b"content-encoding":
                encoding = value.strip().lower().decode("latin-1")[:100]
                self.encoding = "" if encoding == "identity" else encoding
            elif name == b"inference-header-content-length":
                self.binary = value
            elif name == b"traceparent" or name == b"tracestate":
                self.trace = {**(self.trace or {}), name.decode(): value.decode("latin-1")[:512]}
            elif name == b"x-project":
                self.project = value.decode("latin-1")[:200]
            elif name == b"idempotency-key" or name == b"x-priority" or name == b"x-sticky-key":
                self.odd = True
            elif name == b"x-request-id" and _REQUEST_ID.match(value):
                self.request_id = value.decode()
        self.plain = not self.request_id and self.trace is None  # nothing in it belongs to one request alone
        self.request_id = self.request_id or new_request_id()


class _Exchange:
    """The answer's side of one request: adds the headers that every answer has, and knows whether it has begun."""

    __slots__ = (
        "_headers", "_path", "_send", "body", "limits", "operation", "place", "request_id", "sent", "started", "status",
    )  # fmt: skip

    def __init__(self, headers: Headers, path: str, send: Send) -> None:
        self.request_id = headers.request_id
        self._headers = headers
        self._path = path
        self._send = send
        self.started = False
        self.status = 0  # 0: none was sent
        self.sent = 0  # bytes of the answer's body
        self.operation = ""
        self.body: _BoundedBody | None = None
        self.limits: list[tuple[bytes, bytes]] = []
        self.place: contextlib.ExitStack | None = None  # in its key's share, until it answers

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            if self.place is not None:
                self.place.close()
            self.status = message["status"]
            headers = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
                *self.limits,
            ]
            if self._is_unread():
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        else:
            self.sent += len(message.get("body", b""))
        await self._send(message)

    def _is_unread(self) -> bool:
        """Whether more is still to come than is worth reading just to keep the connection."""
        if self.body is not None:
            return not self.body.complete
        return self._headers.has_body and (self._headers.length is None or self._headers.length > MAX_IGNORED)

    async def refuse(self, error: ModelworksError) -> None:
        if self.started:  # too late to say anything; the server closes the connection
            return
        status, headers, body = render(error, self._path, self.request_id)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


class _BoundedBody:
    """A request's body, of at most `limit` bytes, which must not stall for `timeout` seconds nor drip."""

    def __init__(self, receive: Receive, limit: int, timeout: float, intake: Intake, *, kept: bool) -> None:
        self._receive = receive
        self._limit = limit
        self._timeout = timeout
        self._kept = kept  # gathered in memory
        self.intake = intake
        self.size = 0
        self.complete = False

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()  # waits for the client to go away
        try:
            async with asyncio.timeout(self._timeout):
                message = await self._receive()
        except TimeoutError:
            raise stalled(self._timeout) from None
        if message["type"] == "http.disconnect":
            self.complete = True
            return message
        self.size += len(message.get("body", b""))
        if self.size > self._limit:
            raise too_large(self._limit)
        self.complete = not message.get("more_body", False)
        if not self.complete:
            self.intake.add(len(message.get("body", b"")), time.monotonic(), kept=self._kept)
        return message

    async def read(self) -> bytes:
        whole: bytes | bytearray = b""
        while not self.complete:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            if not whole:
                whole = message.get("body", b"")
            else:  # one buffer: a list of one-byte parts would take forty times the bytes
                whole = bytearray(whole) if isinstance(whole, bytes) else whole
                whole += message.get("body", b"")
        return bytes(whole)


class _Replay:
    """Gives a body that was read to the application, then what the connection has to say."""

    __slots__ = ("_body", "_receive")

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
