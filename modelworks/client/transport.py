"""One request and its answer: retries, deadlines, errors rebuilt from problem+json; by httpx2, sync or async."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from modelworks.client.connection import Connection
from modelworks.core.errors import DeadlineExceeded, ModelworksError, Unavailable, from_dict

TIMEOUT = httpx2.Timeout(90.0, connect=5.0)
RETRIES = 2
_RETRIED = frozenset({408, 429, 502, 503})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 8.0
_LONGEST_RETRY_AFTER = 60.0
_NEVER_LEFT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
AWAY = 30.0  # seconds that a server may be away while we wait for work of it

B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True)
class Request:
    """`idempotent`: may be sent again when it may have arrived. `form`: multipart parts as httpx2 takes them.
    `patience`: seconds that a server which went away in the middle of it is waited for."""

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    form: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = True
    timeout: float | None = None
    patience: float = 0.0


def creation(
    path: str, *, key: str | None, json: Any = None, form: Mapping[str, Any] | None = None, patience: float = 0.0
) -> Request:
    """A POST that makes something. Its Idempotency-Key (a fresh one unless given) makes sending it again safe."""
    headers = {"Idempotency-Key": key or f"sdk-{uuid.uuid4().hex}"}
    return Request("POST", path, json=json, form=form, headers=headers, patience=patience)


class Carrier(Protocol):
    """What differs between the two clients."""

    is_async: bool

    async def send(self, request: httpx2.Request) -> httpx2.Response: ...
    def open(self, request: httpx2.Request) -> AbstractAsyncContextManager[httpx2.Response]: ...
    def events(self, response: httpx2.Response) -> AsyncIterator[httpx2.ServerSentEvent]: ...
    def chunks(self, response: httpx2.Response) -> AsyncIterator[bytes]: ...
    async def read(self, response: httpx2.Response) -> bytes: ...
    async def sleep(self, seconds: float) -> None: ...
    async def close(self) -> None: ...


class SyncCarrier:
    """httpx2.Client behind coroutines that never suspend."""

    is_async = False

    def __init__(self, **options: Any) -> None:
        self.http = httpx2.Client(**options)

    async def send(self, request: httpx2.Request) -> httpx2.Response:
        return self.http.send(request)

    @asynccontextmanager
    async def open(self, request: httpx2.Request) -> AsyncIterator[httpx2.Response]:
        response = self.http.send(request, stream=True)
        try:
            yield response
        finally:
            response.close()

    async def events(self, response: httpx2.Response) -> AsyncIterator[httpx2.ServerSentEvent]:
        for event in httpx2.EventSource(response):
            yield event

    async def chunks(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_bytes():
            yield chunk

    async def read(self, response: httpx2.Response) -> bytes:
        return response.read()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self.http.close()


class AsyncCarrier:
    is_async = True

    def __init__(self, **options: Any) -> None:
        self.http = httpx2.AsyncClient(**options)

    async def send(self, request: httpx2.Request) -> httpx2.Response:
        return await self.http.send(request)

    @asynccontextmanager
    async def open(self, request: httpx2.Request) -> AsyncIterator[httpx2.Response]:
        response = await self.http.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def events(self, response: httpx2.Response) -> AsyncIterator[httpx2.ServerSentEvent]:
        async for event in httpx2.EventSource(response):
            yield event

    async def chunks(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        async for chunk in response.aiter_bytes():
            yield chunk

    async def read(self, response: httpx2.Response) -> bytes:
        return await response.aread()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self.http.aclose()


class Transport:
    """Sends requests to one server with one key. `retries` counts the times that a request is sent again."""

    def __init__(
        self, connection: Connection, carrier: Carrier, *, project: str | None = None, retries: int = RETRIES
    ) -> None:
        self.connection = connection
        self.carrier = carrier
        self.is_async = carrier.is_async
        self._retries = retries
        self._headers = {
            "authorization": f"Bearer {connection.key}",
            "user-agent": "modelworks-client",
            "accept": "*/*",
        }
        if project:
            self._headers["x-project"] = project

    async def json(self, request: Request) -> Any:
        """The answer's JSON value. Raises the server's error as one of `core.errors`."""
        return self._parse(await self.send(request))

    async def model(self, request: Request, model: type[B]) -> B:
        return self.validate(model, await self.json(request))

    def validate(self, model: type[B], value: Any) -> B:
        try:
            return model.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise self._strange(f"{model.__name__} has a bad {where!r}: {first['msg']}") from None

    async def send(self, request: Request) -> httpx2.Response:
        """The answer, its status below 300. Sends again what may be sent again, as often as allowed."""
        attempt = 0
        until = 0.0  # it went away in the middle, and is waited for
        while True:
            try:
                response = await self.carrier.send(self._build(request))
            except httpx2.TransportError as error:
                if not until and not isinstance(error, _NEVER_LEFT):
                    until = time.monotonic() + request.patience
                waits = time.monotonic() < until
                if not (waits or attempt < self._retries) or not _may_retry(request, error):
                    raise self._unreachable(error, request) from None
                pause = min(_pause(attempt, None), 1.0 if waits else _LONGEST_PAUSE)
            else:
                if response.is_success:
                    return response
                failure = error_of(response)
                waits = time.monotonic() < until
                if not (waits or attempt < self._retries) or not _should_retry(request, response, failure):
                    raise failure
                pause = _pause(attempt, failure.retry_after)
            attempt += 1
            await self.carrier.sleep(pause)

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[httpx2.Response]:
        """The answer with its body still to come. httpx2's errors while it comes are left to the caller."""
        async with self.carrier.open(self._build(request)) as response:
            if not response.is_success:
                await self.carrier.read(response)
                raise error_of(response)
            yield response

    def _build(self, request: Request) -> httpx2.Request:
        query = {name: value for name, value in request.query.items() if value is not None}
        timeout = TIMEOUT if request.timeout is None else httpx2.Timeout(request.timeout, connect=5.0)
        try:
            return httpx2.Request(
                request.method,
                self.connection.url + request.path,
                params=query or None,
                json=request.json,
                files=request.form,
                headers={**self._headers, **request.headers},
                extensions={"timeout": timeout.as_dict()},
            )
        except httpx2.InvalidURL as error:
            raise self._strange(f"no request can be made to {self.connection.url} ({error})") from None

    def _parse(self, response: httpx2.Response) -> Any:
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise self._strange("the answer is not JSON") from None

    def _strange(self, reason: str) -> ModelworksError:
        return ModelworksError(
            f"what answers at {self.connection.url} does not speak as this version of Modelworks does: {reason}",
            code="bad_answer",
        )

    def _unreachable(self, error: httpx2.TransportError, request: Request) -> ModelworksError:
        if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
            return DeadlineExceeded(
                f"{self.connection.url} did not answer {request.method} {request.path} in time", code="timeout"
            )
        return unreachable(self.connection, error)


def unreachable(connection: Connection, error: Exception) -> Unavailable:
    how = "start it with `modelworks up`" if connection.local else "check the address and the network"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        how = "name the file of the authority or certificate to trust as ca (--ca)"
    return Unavailable(
        f"no server can be reached at {connection.url} ({str(error)[:200] or type(error).__name__}); {how}",
        code="unreachable",
    )


def error_of(response: httpx2.Response) -> ModelworksError:
    """The server's error. `detail` keeps the other members of its problem document, `request_id` among them."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {}
    if isinstance(body.get("error"), dict):  # OpenAI's form
        body = {**body["error"], "detail": body["error"].get("message")}
        body.pop("message", None)
    rest = {
        name: value
        for name, value in body.items()
        if name not in ("type", "title", "status", "detail", "code", "param")
    }
    message = body.get("detail")
    error = from_dict(
        {
            "status": response.status_code,
            "message": message
            if isinstance(message, str)
            else f"the server answered {response.status_code} without saying why",
            "code": body.get("code"),
            "param": body.get("param"),
            "retry_after": _retry_after(response),
            "detail": rest,
        }
    )
    error.status = response.status_code
    return error


def _retry_after(response: httpx2.Response) -> float | None:
    for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers[header]) * unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    return None


def _may_retry(request: Request, error: httpx2.TransportError) -> bool:
    """What never left us may always be sent again; a slow answer is not asked for twice."""
    if isinstance(error, _NEVER_LEFT):
        return True
    return request.idempotent and isinstance(error, httpx2.NetworkError | httpx2.RemoteProtocolError)


def _should_retry(request: Request, response: httpx2.Response, error: ModelworksError) -> bool:
    if response.headers.get("x-should-retry") == "false" or (error.retry_after or 0) > _LONGEST_RETRY_AFTER:
        return False
    return request.idempotent and response.status_code in _RETRIED


def _pause(attempt: int, retry_after: float | None) -> float:
    """Seconds until the next try: what the server asked for, else doubling, give or take a quarter."""
    if retry_after is not None:
        return retry_after
    return min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
