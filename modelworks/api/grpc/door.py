"""In front of every method: who calls, whether they may, and how often - on the metadata alone, before any message.

A method cannot be registered without an operation of the policy table, or the word PUBLIC. The verdicts are the HTTP
guard's. A call whose key was verified before goes the short way; all others read no message until they are admitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

import anyio
import grpc
from google.protobuf.message import Message
from pydantic import ValidationError

from modelworks.api.errors import NotImplementedHere, invalid
from modelworks.api.events import Stopping
from modelworks.api.grpc import entries
from modelworks.api.grpc.errors import render
from modelworks.api.grpc.messages import POOL, message, parse
from modelworks.api.guard import LOOKUP_THREADS, count, new_request_id
from modelworks.api.intake import SMALL, Intake
from modelworks.api.services import Services
from modelworks.core.errors import CatalogUnavailable, InvalidInput, ModelworksError, RequestTimeout, Unauthenticated
from modelworks.core.telemetry import logger
from modelworks.core.types import Answer, Call, Caller, Principal
from modelworks.security import policy
from modelworks.serve.hints import PRIORITY_HEADER, STICKY_HEADER, hint
from modelworks.serve.observe import CANCELLED, rows_of
from modelworks.serve.routes import Route

log = logger("api.grpc")

PUBLIC = None
_LOOK_AGAIN = 0.4  # seconds between two looks at the keys of open streams
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:=+/-]{1,128}")

Handler = Callable[..., Any]  # (rpc, request) -> awaitable of the answer, or async iterator of answers


class Rpc:
    """One call: who makes it, and the services that answer it. Of a public method, `principal` is not there."""

    __slots__ = (
        "_door", "began", "call", "carrier", "context", "ended", "metadata", "model_version", "operation", "principal",
        "received", "request_id", "sent", "services", "status", "stopping", "task",
    )  # fmt: skip

    def __init__(self, door: Door, carrier: _Carrier, method: Method, principal: Principal | None) -> None:
        self.services = door.services
        self.stopping = door.stopping
        self.request_id = carrier.request_id
        self.metadata: tuple[tuple[str, str], ...] = (("x-request-id", carrier.request_id),)
        self.context: Any = None
        # for the log line
        self.operation = method.operation
        self.began = monotonic()
        self.status = CANCELLED
        self.received = self.sent = 0
        self.call: Call | None = None
        self.model_version = ""
        self._door = door
        self.carrier = carrier
        self.ended: ModelworksError | None = None  # why a stream was ended from here
        self.task: asyncio.Task[Any] | None = None
        if principal is not None:
            self.principal = principal

    @property
    def caller(self) -> Caller:
        """For use cases. InvalidInput for an idempotency-key that cannot be one."""
        key = self.carrier.idempotency_key
        if key is not None and not (0 < len(key) <= 255 and key.isprintable()):
            raise InvalidInput("an idempotency-key has 1 to 255 printable characters", param="idempotency-key")
        return Caller(self.principal, self.request_id, key)

    def deadline(self, route: Route) -> float:
        """When a call of `route` must have its answer: the client's own deadline, or ours when that is nearer."""
        return self.services.gateway.deadline_of(route, self.context.time_remaining())

    async def infer(self, call: Call) -> Answer:
        """The gateway's answer. A cancelled call is aborted in the replica too."""
        self.call = call
        self.hint(call)
        found = await self.services.gateway.infer(self.principal, call)
        self.model_version = found.model_version
        return found

    async def in_turn(self, work: Callable[[Rpc, Any], Awaitable[Any]], request: Any) -> Any:
        """What `work` makes of the request, once the caller's share of the loop allows."""
        shares, key = self.services.shares, self.principal.key_id
        if not shares.crowded(key, self.began):
            return await work(self, request)
        await shares.turn(key)
        try:
            return await work(self, request)
        finally:
            shares.leave(key)

    def hint(self, call: Call) -> None:
        """Note in a call what its metadata asks of the router: x-priority, x-sticky-key."""
        carrier = self.carrier
        if carrier.priority is not None or carrier.sticky is not None:
            hint(call, self.principal, carrier.priority, carrier.sticky)

    async def admit_again(self, operation: str) -> None:
        """One more request in a stream: its key must still be valid, and it counts."""
        self.principal = await self._door.find_principal(self.carrier)
        policy.require(self.principal, operation)
        refusal = count(self.principal, self.services.limiter)[1]
        if refusal is not None:
            raise refusal

    def admit(self) -> None:
        """Whether the principal may call this and not too often. Forbidden, RateLimited."""
        assert self.operation is not None
        policy.require(self.principal, self.operation)
        if self.principal.requests_per_minute is not None:
            left, refusal = count(self.principal, self.services.limiter)
            if left is not None:
                self.metadata += tuple((name.decode(), value.decode()) for name, value in left.headers())
            if refusal is not None:
                raise refusal

    def encoded(self, found: Any) -> bytes:
        """An answer as it is sent."""
        data: bytes = found if isinstance(found, bytes) else found.SerializeToString()
        self.sent += len(data)
        return data

    def observe(self) -> None:
        """One count and one log line for the call, without its content."""
        if self.operation is None and self.status < 400:
            return  # a health check is not worth a line
        principal: Principal | None = getattr(self, "principal", None)
        call = self.call
        self.services.gateway.observer.request(
            self.operation or "",
            self.status,
            request_id=self.request_id,
            key_id=principal.key_id if principal else "",
            project_id=principal.project_id if principal else "",
            deployment=call.deployment if call is not None else "",
            model_version=self.model_version,
            seconds=monotonic() - self.began,
            bytes_in=self.received,
            bytes_out=self.sent,
            rows=rows_of(call) if call is not None else 0,
        )


class _Carrier:
    """The few entries of a call's metadata that matter here."""

    __slots__ = ("authorization", "idempotency_key", "priority", "project", "request_id", "sticky", "trace")

    def __init__(self, metadata: Any) -> None:
        self.authorization: str | None = None
        self.project: str | None = None
        self.idempotency_key: str | None = None
        self.priority: str | None = None
        self.sticky: str | None = None
        self.trace: dict[str, str] = {}  # W3C Trace Context
        self.request_id = ""
        for name, value in metadata:
            if name == "authorization":
                # two of them: which one counts would depend on who looks
                self.authorization = value if self.authorization is None else ""
            elif name == "x-project":
                self.project = value[:200]
            elif name == "x-request-id":
                if _REQUEST_ID.fullmatch(value):
                    self.request_id = value
            elif name == "idempotency-key":
                self.idempotency_key = value
            elif name == PRIORITY_HEADER:
                self.priority = value
            elif name == STICKY_HEADER:
                self.sticky = value
            elif name == "traceparent" or name == "tracestate":
                self.trace[name] = value[:512]
        if not self.request_id:
            self.request_id = new_request_id()


@dataclass(frozen=True)
class Method:
    """`request`: the class of its messages, None for one that parses them itself."""

    path: str
    operation: str | None
    handler: Handler
    request: Any
    many_in: bool
    many_out: bool


class _Unary:
    """What grpc must know of a method with one message each way: it is made for each call, and grpc's own costs more."""

    __slots__ = ("unary_unary",)
    request_streaming = response_streaming = False
    request_deserializer = response_serializer = None

    def __init__(self, handler: Handler) -> None:
        self.unary_unary = handler


class Door(grpc.GenericRpcHandler):
    """All methods of the server, each behind the same checks."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.stopping = Stopping()
        self.methods: dict[str, Method] = {}
        self.names: list[str] = []
        self._lookups: anyio.CapacityLimiter | None = None
        self._open: set[Rpc] = set()  # calls that may last
        self._watcher: asyncio.Task[None] | None = None

    # registration

    def add(self, service: str, methods: dict[str, tuple[str | None, Handler]]) -> None:
        """Register all methods of a service of the .proto files: name -> (operation, handler).

        ValueError unless each has a handler and an operation of the policy table (or PUBLIC).
        """
        descriptor = POOL.FindServiceByName(service)
        if missing := {method.name for method in descriptor.methods} ^ set(methods):
            raise ValueError(f"{service}: {sorted(missing)} are not both declared and handled")
        for method in descriptor.methods:
            operation, handler = methods[method.name]
            kind = message(method.input_type.full_name)
            path = f"/{service}/{method.name}"
            self.register(Method(path, operation, handler, kind, method.client_streaming, method.server_streaming))
        self.names.append(service)

    def register(self, method: Method) -> None:
        if method.operation is not PUBLIC and method.operation not in policy.OPERATIONS:
            raise ValueError(f"{method.path} has no operation of the policy table: {method.operation!r}")
        self.methods[method.path] = method

    # calls

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Called by grpc in the loop for each call, when its metadata is there and no message was read yet."""
        entries.begin()
        carrier = _Carrier(details.invocation_metadata)
        method = self.methods.get(details.method) or Method(details.method, "whoami.get", _unknown, None, True, True)
        if method.many_in or method.many_out or self.services.gateway.observer.tracing is not None:
            return self._slow(method, carrier)
        principal = self._cached(carrier)
        if principal is None and method.operation is not PUBLIC:
            return self._slow(method, carrier)
        rpc = Rpc(self, carrier, method, principal)

        async def run(data: bytes, context: Any) -> bytes:
            rpc.context = context
            rpc.received = size = len(data)
            intake = self.services.intake(rpc.began) if size > SMALL else None
            try:
                if intake is not None:
                    intake.hold(size)
                if method.operation is not PUBLIC:
                    rpc.admit()
                context.set_trailing_metadata(rpc.metadata)
                request = data if method.request is None else parse(method.request, data)
                answer = rpc.encoded(await method.handler(rpc, request))
                rpc.status = 200
                return answer
            except Exception as error:
                raise await _refused(rpc, method, error) from None
            finally:
                if intake is not None:
                    intake.close()
                rpc.observe()

        return _Unary(run)

    def _cached(self, carrier: _Carrier) -> Principal | None:
        """Who calls, when that was verified before; None: look it up."""
        if carrier.authorization is None or carrier.project is not None:
            return None
        return self.services.authenticator.cached(carrier.authorization.encode())

    async def find_principal(self, carrier: _Carrier) -> Principal:
        """Who calls; raises what the authenticator raises."""
        if carrier.authorization is None:
            raise Unauthenticated("send a valid API key as `Authorization: Bearer KEY`")
        known = self._cached(carrier)
        if known is not None:
            return known
        if self._lookups is None:
            self._lookups = anyio.CapacityLimiter(LOOKUP_THREADS)
        authenticate = self.services.authenticator.authenticate
        text, project = carrier.authorization, carrier.project
        return await anyio.to_thread.run_sync(lambda: authenticate(text, project=project), limiter=self._lookups)

    def _slow(self, method: Method, carrier: _Carrier) -> Any:
        """The way that reads messages one by one, after the caller was admitted."""
        rpc = Rpc(self, carrier, method, None)

        async def one(messages: AsyncIterator[bytes], context: Any) -> bytes:
            try:
                with self._span(method, carrier), self._watched(rpc, method), contextlib.ExitStack() as held:
                    request = await self._enter(rpc, method, carrier, messages, context, held)
                    answer = rpc.encoded(await method.handler(rpc, request))
                    rpc.status = 200
                    return answer
            except asyncio.CancelledError:
                if rpc.ended is None:
                    raise
                raise await _refused(rpc, method, rpc.ended) from None
            except Exception as error:
                raise await _refused(rpc, method, error) from None
            finally:
                rpc.observe()

        async def many(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            try:
                with self._span(method, carrier), self._watched(rpc, method), contextlib.ExitStack() as held:
                    request = await self._enter(rpc, method, carrier, messages, context, held)
                    async for part in method.handler(rpc, request):
                        yield rpc.encoded(part)
                    rpc.status = 200
            except asyncio.CancelledError:
                if rpc.ended is None:
                    raise
                raise await _refused(rpc, method, rpc.ended) from None
            except Exception as error:
                raise await _refused(rpc, method, error) from None
            finally:
                rpc.observe()

        if method.many_out:
            return grpc.stream_stream_rpc_method_handler(many)
        return grpc.stream_unary_rpc_method_handler(one)

    @contextlib.contextmanager
    def _span(self, method: Method, carrier: _Carrier) -> Iterator[None]:
        """A trace of the call, when traces are on."""
        tracing = self.services.gateway.observer.tracing
        if tracing is None:
            yield
            return
        span = tracing.begin(method.path, carrier.trace)
        status = 500
        try:
            with span:
                yield
            status = 200
        except ModelworksError as error:
            status = error.status
            raise
        finally:
            span.end(method.operation or "", status, carrier.request_id, "")

    @contextlib.contextmanager
    def _watched(self, rpc: Rpc, method: Method) -> Iterator[None]:
        """While the call is open, its key is looked at again and again: one that is revoked ends it."""
        if method.operation is PUBLIC:
            yield
            return
        rpc.task = asyncio.current_task()
        self._open.add(rpc)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            self._open.discard(rpc)

    async def _watch(self) -> None:
        while self._open:
            await asyncio.sleep(_LOOK_AGAIN)
            verdicts: dict[tuple[str | None, str | None, str | None], ModelworksError | None] = {}
            for rpc in list(self._open):
                if not hasattr(rpc, "principal"):
                    continue  # it is not admitted yet
                key = (rpc.carrier.authorization, rpc.carrier.project, rpc.operation)
                if key not in verdicts:
                    verdicts[key] = await self._no_longer(rpc)
                error = verdicts[key]
                if error is not None and rpc in self._open and rpc.task is not None:
                    rpc.ended = error
                    rpc.task.cancel()

    async def _no_longer(self, rpc: Rpc) -> ModelworksError | None:
        """Why this caller may not go on. While the catalog is away, it may."""
        assert rpc.operation is not None
        try:
            policy.require(await self.find_principal(rpc.carrier), rpc.operation)
        except CatalogUnavailable:
            return None
        except ModelworksError as error:
            return error
        return None

    async def _enter(
        self,
        rpc: Rpc,
        method: Method,
        carrier: _Carrier,
        messages: AsyncIterator[bytes],
        context: Any,
        held: contextlib.ExitStack,
    ) -> Any:
        """Admit the caller, then the request: one message, in memory until `held` ends, or an iterator of them."""
        rpc.context = context
        if method.operation is not PUBLIC:
            rpc.principal = await self.find_principal(carrier)
            rpc.admit()
        context.set_trailing_metadata(rpc.metadata)
        if method.many_in:
            return _messages(rpc, method, messages)
        timeout = self.services.settings.body_timeout
        try:
            async with asyncio.timeout(timeout):
                data = await anext(aiter(messages))
        except StopAsyncIteration:
            raise InvalidInput("the call ended without its message", code="bad_message") from None
        except TimeoutError:
            raise RequestTimeout(f"the message did not come within {timeout:g} s; send it again") from None
        rpc.received = len(data)
        held.callback(hold(self.services, len(data)).close)
        return data if method.request is None else parse(method.request, data)


def hold(services: Services, size: int) -> Intake:
    """So many bytes of a message are in memory, until it is closed. RateLimited when large messages leave no room."""
    intake = services.intake(monotonic())
    intake.hold(size)
    return intake


async def _messages(rpc: Rpc, method: Method, messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """One at a time is in memory here."""
    async for data in messages:
        rpc.received += len(data)
        intake = hold(rpc.services, len(data))
        try:
            yield data if method.request is None else parse(method.request, data)
        finally:
            intake.close()


async def _refused(rpc: Rpc, method: Method, error: Exception) -> Exception:
    """End the call with the status of `error`. The one error edge of the gRPC server."""
    if isinstance(error, grpc.aio.AbortError):
        return error
    if isinstance(error, ValidationError):
        error = invalid([{**one, "loc": ("body", *one["loc"])} for one in error.errors()])
    elif not isinstance(error, ModelworksError):
        log.error("unexpected error", request_id=rpc.request_id, method=method.path[:200], exc_info=error)
        error = ModelworksError("unexpected")
    elif error.status >= 500:
        log.error("request failed", request_id=rpc.request_id, code=error.code, exc_info=error)
    rpc.status = error.status
    code, text, metadata = render(error, rpc.request_id)
    try:
        await rpc.context.abort(code, text, (*rpc.metadata, *metadata))
    except grpc.aio.AbortError as ended:
        return ended
    return error


async def _unknown(rpc: Rpc, messages: Any) -> AsyncIterator[Message]:
    raise NotImplementedHere("there is no such method; the services are listed by server reflection")
    yield
