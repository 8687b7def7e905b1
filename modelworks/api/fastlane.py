"""The fast lane: predictions are answered by the HTTP protocol itself, with no ASGI scope, no task and no framework.

Only what is plainly a prediction by a key that was seen before is taken; everything else, and all that is odd about a
prediction, falls through to the application unchanged, so that the guard alone says no to a request's head.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from modelworks.api import oip_codec
from modelworks.api.calls import JSON_HEADERS, Prepared, Reply
from modelworks.api.errors import render
from modelworks.api.express import Bulk, Express
from modelworks.api.guard import ALLOWANCE, MAX_IGNORED, Allowance, Headers, count, new_request_id, stalled
from modelworks.api.intake import Intake
from modelworks.api.native import predict
from modelworks.api.protocol import BODY, BUSY, IDLE, BoundedProtocol, bounded
from modelworks.api.services import Services
from modelworks.core.errors import ModelworksError
from modelworks.core.specs import NAME_PATTERN
from modelworks.core.telemetry import logger
from modelworks.core.types import Answer, Call, Principal
from modelworks.security.policy import OPERATIONS
from modelworks.serve.detours import Errand
from modelworks.serve.observe import CANCELLED, rows_of
from modelworks.serve.router import Pending
from modelworks.serve.routes import Route
from modelworks.serve.tracing import RequestSpan
from modelworks.serve.wire import Part

log = logger("api.fastlane")

_NAME = NAME_PATTERN.strip("^$").encode()
_PATHS = re.compile(
    rb"/api/v1/deployments/(?P<name>%b)/predict|/v2/models/(?P<model>%b)(?:/versions/(?P<version>[1-9][0-9]{0,8}))?/infer"
    % (_NAME, _NAME)
)
_MAX_TARGETS = 4096
_MANY = 1024  # pieces of one body that are kept apart
_TENSORS = "application/octet-stream"
_MAX_HEAD = 4096  # bytes of a head that is remembered
_COMMON = b"content-length: %d\r\nx-request-id: %b\r\nx-content-type-options: nosniff\r\n"
_GOOD = b"%b" + _COMMON + b"%b\r\n%b"
_LIMITS = b"".join(b"%b: %b\r\n" % pair for pair in ALLOWANCE)


class Target(NamedTuple):
    """What a hot URL names. `prepare(gateway, principal, data, binary, request_id)` makes the call of its body; `bulk`
    is for many at once."""

    path: str
    operation: str
    scope: str
    deployment: str
    version: str | None
    binary: bool
    prepare: Callable[[Any, Principal, bytes, bytes | None, str], Prepared]
    bulk: Callable[[Route], Bulk]


def target(url: bytes) -> Target | None:
    """The hot path that `url` is, exactly: no query, no escapes."""
    match = _PATHS.fullmatch(url)
    if match is None:
        return None
    path = url.decode("ascii")
    if match["name"] is not None:
        name = match["name"].decode("ascii")
        return Target(
            path,
            "deployments.predict",
            OPERATIONS["deployments.predict"],
            name,
            None,
            False,
            lambda gateway, who, data, binary, id: predict.prepare(gateway, who, name, data, id),
            predict.Numbers,
        )
    model = match["model"].decode("ascii")
    version = match["version"].decode("ascii") if match["version"] else None
    return Target(
        path,
        "oip.infer",
        OPERATIONS["oip.infer"],
        model,
        version,
        True,
        lambda gateway, who, data, binary, id: oip_codec.prepare(gateway, who, model, version, data, binary, id),
        oip_codec.Usual,
    )


class Head(NamedTuple):
    """What a request's head says, where it is plainly hot. `carrier`: a salted hash in the place of its key."""

    target: Target
    carrier: bytes
    binary: bytes | None
    length: int


class _Never:
    """Stands for the event that uvicorn sets in a cycle when its client goes away."""

    def set(self) -> None:
        """There is no task to wake."""


class Exchange:
    """One request in the fast lane. To uvicorn's protocol it looks like a cycle: what comes behind it waits for it."""

    # what most requests never change stands here, once for all of them
    message_event = _Never()
    body = b""
    parts: list[bytes] | None = None
    received = rows = 0
    intake: Intake | None = None  # of a body that comes in pieces
    span: RequestSpan | None = None  # when traces are on
    refusal: ModelworksError | None = None  # told once the body is there, which keeps the connection
    response_complete = disconnected = False
    id: str | None = None  # that the body of its answer repeats, where express.py read it
    shared = False  # it counts in its key's share
    keep_alive = True
    _allowance: Allowance | None = None
    _pending: Pending | Errand | None = None
    _outputs: list[Any] | None = None
    _reply: Callable[[Answer], Reply]

    def __init__(self, protocol: FastLane, head: Head, principal: Principal, request_id: str) -> None:
        self.target, _, self.binary, self.length = head
        self.principal = principal
        self.request_id = request_id
        self.began = monotonic()
        self._protocol = protocol

    def add(self, piece: bytes) -> None:
        self.received += len(piece)
        if self.refusal is not None:
            return
        if not self.body:
            self.body = piece
            return
        if self.parts is None:
            self.parts = []
        self.parts.append(piece)
        if len(self.parts) > _MANY:  # dripped bytes must not cost an object each
            self.parts = [b"".join(self.parts)]

    def start(self) -> None:
        """The body is there: make the call."""
        self._submit(self._prepare)

    def start_with(self, call: Callable[[], Call], reply: Callable[[Answer], Reply]) -> None:
        """As `start`, of a body that was read elsewhere."""
        self._reply = reply
        self._submit(call)

    def _prepare(self) -> Call:
        if self.refusal is not None:
            raise self.refusal
        data = b"".join([self.body, *self.parts]) if self.parts else self.body
        gateway = self._protocol.services.gateway
        call, self._reply = self.target.prepare(gateway, self.principal, data, self.binary, self.request_id)
        return call

    def _submit(self, prepare: Callable[[], Call]) -> None:
        try:
            gateway = self._protocol.services.gateway
            call = prepare()
            if self.body:
                self._let_go()
            self.rows = rows_of(call)
            if self.span is None:
                pending = gateway.submit(self.principal, call, self.deliver)
            else:
                with self.span:
                    pending = gateway.submit(self.principal, call, self.deliver)
            if not self.response_complete:
                self._pending = pending
        except ModelworksError as error:
            self.refuse(error)
        except Exception as error:  # the same edge as the guard's
            self.unexpected(error)

    def _let_go(self) -> None:
        """The body is read, or nobody will."""
        self.body, self.parts = b"", None
        if self.intake is not None:
            self.intake.close()

    def deliver(self, item: Part | ModelworksError) -> None:
        """What the gateway brings: parts of the answer, or one error."""
        if self.response_complete:
            return
        if not isinstance(item, Part):
            self.refuse(item)
            return
        outputs = item.outputs
        if not item.done or self._outputs is not None:
            outputs = self._outputs = [*(self._outputs or ()), *outputs]
            if not item.done:
                return
        try:
            reply = self._reply(Answer(outputs, item.model_version))
        except ModelworksError as error:
            self.refuse(error)
        except Exception as error:  # as in start
            self.unexpected(error)
        else:
            self._write(200, reply.headers, reply.body, item.model_version)

    def _leave(self) -> None:
        self.shared = False
        self._protocol.services.shares.leave(self.principal.key_id)

    def resume(self) -> bool:
        """Its key has room for it: begin, in a turn of its own."""
        if self.response_complete:
            return False
        self.shared = True
        protocol = self._protocol
        protocol.loop.call_soon(protocol.run, self)
        return True

    def answer_by(self, reply: Callable[[Answer], Reply]) -> None:
        """What encodes the answer of a call that was not made by `start`."""
        self._reply = reply

    def good(self, body: bytes) -> None:
        """Write an answer that is counted and logged elsewhere."""
        self._send(200, JSON_HEADERS, body)
        self._protocol.on_response_complete()

    def unexpected(self, error: Exception) -> None:
        log.error("unexpected error", request_id=self.request_id, path=self.target.path, exc_info=error)
        self.refuse(ModelworksError("unexpected"), quiet=True)

    def refuse(self, error: ModelworksError, *, quiet: bool = False) -> None:
        self._let_go()
        if error.status >= 500 and not quiet:
            log.error("request failed", request_id=self.request_id, code=error.code, exc_info=error)
        status, headers, body = render(error, self.target.path, self.request_id)
        self._write(status, [pair for pair in headers if pair[0] != b"content-length"], body)

    def drop(self) -> None:
        """The client went away: nobody waits for the answer."""
        self.disconnected = True
        self._let_go()
        if not self.response_complete:
            self.response_complete = True
            if self._pending is not None:
                self._protocol.services.gateway.abort(self._pending)
            if self.shared:
                self._leave()
            self._observe(CANCELLED, 0, "")

    def _write(self, status: int, headers: Any, body: bytes, version: str = "") -> None:
        self._send(status, headers, body)
        self._observe(status, len(body), version)
        self._protocol.on_response_complete()

    def _send(self, status: int, headers: Any, body: bytes) -> None:
        self.response_complete = True
        self._pending = None
        if self.shared:
            self._leave()
        protocol = self._protocol
        transport = protocol.transport
        if not transport.is_closing():
            if headers is JSON_HEADERS and self.keep_alive and status == 200:
                left = b"" if self._allowance is None else _LIMITS % self._allowance
                transport.write(_GOOD % (protocol.good_head(), len(body), self.request_id.encode(), left, body))
            else:
                transport.write(self._message(status, headers, body))
                if not self.keep_alive:
                    protocol.close()

    def _message(self, status: int, headers: Any, body: bytes) -> bytes:
        allowance = self._allowance
        lines = [
            STATUS_LINE[status],
            self._protocol.default_head(),
            *[b"%b: %b\r\n" % pair for pair in headers],
            _COMMON % (len(body), self.request_id.encode()),
            b"" if allowance is None else _LIMITS % allowance,
            b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n",
            body,
        ]
        return b"".join(lines)

    def _observe(self, status: int, sent: int, version: str) -> None:
        """Count and log the request, once."""
        target = self.target
        self._protocol.services.gateway.observer.request(
            target.operation,
            status,
            request_id=self.request_id,
            key_id=self.principal.key_id,
            project_id=self.principal.project_id,
            deployment=target.deployment,
            model_version=version,
            seconds=monotonic() - self.began,
            bytes_in=self.length,
            bytes_out=sent,
            rows=self.rows,
        )
        if self.span is not None:
            self.span.end(target.operation, status, self.request_id, target.deployment)


class FastLane(BoundedProtocol):
    """See `fast` for how the services and limits get here."""

    services: Services
    express: Express
    _targets: dict[bytes, Target]  # what URLs name, for all connections

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._intake: Exchange | None = None  # its body is being received
        self._exchange: Exchange | None = None  # the last one
        self._remember: Head | None = None  # of the request that the parser just read
        self._begun = 0  # messages that began in what was received last
        self._known: tuple[bytes, Head] | None = None  # the head that the parser read last, and what it says
        self._defaults: tuple[Any, bytes, bytes] = (None, b"", b"")

    def default_head(self) -> bytes:
        """uvicorn's own headers (the date), as it makes them each second."""
        headers = self.server_state.default_headers
        if self._defaults[0] is not headers:
            common = b"".join([b"%b: %b\r\n" % pair for pair in headers])
            self._defaults = headers, common, STATUS_LINE[200] + common + b"%b: %b\r\n" % JSON_HEADERS[0]
        return self._defaults[1]

    def good_head(self) -> bytes:
        """What a good answer in JSON begins with."""
        if self._defaults[0] is not self.server_state.default_headers:
            self.default_head()
        return self._defaults[2]

    # -- heads that are known ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """A request whose head is the last one's of this connection, byte by byte, and whose body is there, needs no parser.

        Only between two messages, so that the parser's state stays as it is.
        """
        known = self._known
        if known is not None and self._phase == IDLE and data.startswith(known[0]):
            raw, head = known
            if head.length == len(data) - len(raw) and not self._message_open and self._free():
                exchange = self._begin(head, new_request_id())
                if exchange is not None:
                    self.cycle = self._exchange = exchange  # type: ignore[assignment]
                    self._phase, self._deadline = BUSY, None
                    exchange.body = data[len(raw) :]
                    self._go(exchange)
                    return
        self._remember = None
        self._begun = 0
        super().data_received(data)
        found, self._remember = self._remember, None
        # one message, whole, without anything before or behind it: then its head is what stands in front of its body
        if found is not None and self._begun == 1 and not self._message_open and data.startswith(b"POST "):
            end = len(data) - found.length
            if end <= _MAX_HEAD and data.find(b"\r\n\r\n") + 4 == end:
                self._known = data[:end], found

    # -- the parser ----------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        exchange = self._take()
        if exchange is None:
            super().on_headers_complete()
            return
        self._check_head()
        self._head_open = False
        self.cycle = self._exchange = self._intake = exchange  # type: ignore[assignment]
        self._enter(BODY, self.write_timeout)

    def _take(self) -> Exchange | None:
        """The exchange of a request that is plainly hot; None: let it fall through. Counts it only if it is taken."""
        found = self._target()
        if found is None or self.parser.get_method() != b"POST" or not self._free():
            return None
        parser = self.parser
        if self.expect_100_continue or parser.should_upgrade() or not parser.should_keep_alive():
            return None
        if parser.get_http_version() != "1.1":
            return None
        headers = Headers(self.headers)
        length = headers.length
        settings = self.services.settings
        if length is None or length > settings.max_body or headers.odd or headers.project is not None:
            return None
        if headers.encoding or headers.authorization is None:
            return None
        media = headers.media
        if media and media != "application/json" and not (found.binary and headers.binary and media == _TENSORS):
            return None
        head = Head(found, self.services.authenticator.tag(headers.authorization), headers.binary, length)
        exchange = self._begin(head, headers.request_id, headers.trace)
        if exchange is not None and headers.plain and not self._head_split:
            self._remember = head
        return exchange

    def _begin(self, head: Head, request_id: str, trace: dict[str, str] | None = None) -> Exchange | None:
        """Authenticate, authorise and count; None: let the guard say what is wrong."""
        services = self.services
        found = head.target
        principal = services.authenticator.tagged(head.carrier)
        if principal is None or found.scope not in principal.scopes:
            return None
        allowance, refusal = count(principal, services.limiter)
        if refusal is not None and head.length > MAX_IGNORED:
            return None  # a refused call was not counted: the guard refuses it again, and ends the connection
        exchange = Exchange(self, head, principal, request_id)
        if allowance is not None:
            exchange._allowance, exchange.refusal = allowance, refusal
        tracing = services.gateway.observer.tracing
        if tracing is not None:
            exchange.span = tracing.begin("POST", trace)
        return exchange

    def _target(self) -> Target | None:
        url = self.url
        found = self._targets.get(url)
        if found is None:
            found = target(url)
            if found is not None:
                if len(self._targets) >= _MAX_TARGETS:
                    self._targets.clear()
                self._targets[url] = found
        return found

    def _free(self) -> bool:
        """Whether nothing is before this request on the connection, and its client reads what it is sent."""
        cycle = self.cycle
        return (
            (cycle is None or cycle.response_complete)
            and not self.pipeline
            and not self.flow.write_paused
            and self.limit_concurrency is None
            and not self.root_path
        )

    def on_body(self, body: bytes) -> None:
        exchange = self._intake
        if exchange is None:
            super().on_body(body)
            return
        exchange.add(body)
        if exchange.received < exchange.length:
            self._deadline = self.loop.time() + self.write_timeout
            try:
                exchange.intake = exchange.intake or self.services.intake(exchange.began)
                exchange.intake.add(len(body), monotonic())
            except ModelworksError as error:
                self._give_up(exchange, error)

    def on_message_complete(self) -> None:
        exchange = self._intake
        if exchange is None:
            super().on_message_complete()
            return
        self._intake = None
        self._message_open = False
        self._enter(BUSY, None)
        self._go(exchange)

    def _go(self, exchange: Exchange) -> None:
        """The body is there."""
        shares, key = self.services.shares, exchange.principal.key_id
        if shares.crowded(key, exchange.began):
            if not shares.enter(key, exchange.resume):
                return
            exchange.shared = True
        self.run(exchange)

    def run(self, exchange: Exchange) -> None:
        """Answer it with others of this turn, or where there is anything unusual about it, by itself."""
        if exchange.response_complete:
            return  # its client left meanwhile
        if exchange.binary is None and exchange.span is None and exchange.refusal is None and exchange.intake is None:
            self.express.add(exchange)
        else:
            exchange.start()

    def _give_up(self, exchange: Exchange, error: ModelworksError) -> None:
        """The body does not come: say so and end the connection."""
        self._intake = None
        exchange.keep_alive = False
        exchange.refuse(error)

    # -- the connection ------------------------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._exchange is not None:
            self._exchange.drop()

    def _expired(self) -> None:
        exchange = self._intake
        if self._phase == BODY and exchange is not None:
            self._give_up(exchange, stalled(self.write_timeout))
        else:
            super()._expired()


def fast(services: Services) -> type[FastLane]:
    """The protocol class with the limits of the services' settings, for uvicorn's `http=`."""
    base = bounded(services.settings)
    shared = {"services": services, "express": Express(services.gateway), "_targets": {}}
    return type("ModelworksFastLane", (FastLane, base), shared)
