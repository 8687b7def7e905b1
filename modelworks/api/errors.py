"""The error edge: every error becomes one answer, in the form of its dialect (problem+json, OIP, OpenAI)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from modelworks.core.errors import InvalidInput, ModelworksError, NotFound, Unauthenticated, from_dict
from modelworks.core.telemetry import logger

log = logger("api")

INTERNAL = "something went wrong on the server; its log has the details under this request id"
MAX_ERRORS = 20
MAX_MESSAGE = 2000  # characters; a client's text that an error quotes is not sent back whole


class Refused(HTTPException):
    """Carries a ModelworksError through FastAPI's body parsing, which lets no other exception pass unchanged."""

    def __init__(self, error: ModelworksError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


class MethodNotAllowed(ModelworksError):
    status, default_code = 405, "method_not_allowed"

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"{method} is not allowed here; use {self.allowed}")


class UriTooLong(ModelworksError):
    status, default_code = 414, "uri_too_long"


class HeadersTooLarge(ModelworksError):
    status, default_code = 431, "headers_too_large"


class NotImplementedHere(ModelworksError):
    status, default_code = 501, "not_implemented"


def no_route(path: str) -> NotFound:
    return NotFound(f"there is nothing at {path[:200]!r}; /docs lists what there is", code="no_such_route")


def render(error: ModelworksError, path: str, request_id: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of the answer to a request on `path`: /v2 is OIP, /v1 OpenAI, all else RFC 9457."""
    if path.startswith("/v2"):
        body: dict[str, Any] = {"error": _public(error)}
        media = b"application/json"
    elif path.startswith("/v1"):
        kind = "server_error" if error.status >= 500 else error.detail.get("limit", "invalid_request_error")
        body = {"error": {"message": _public(error), "type": kind, "param": error.param, "code": error.code}}
        media = b"application/json"
    else:
        body = problem(error, request_id)
        media = b"application/problem+json"
    content = msgspec.json.encode(body, enc_hook=str)
    headers = [(b"content-type", media), (b"content-length", b"%d" % len(content))]
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b'Bearer realm="modelworks"'))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if "queued" in error.detail:
        headers.append((b"x-queue-position", b"%d" % error.detail["queued"]))
    if error.status == HTTPStatus.CONFLICT:
        headers.append((b"x-should-retry", b"false"))
    return error.status, headers, content


def problem(error: ModelworksError, request_id: str) -> dict[str, Any]:
    """RFC 9457. What `error.detail` names in addition stands beside the standard members."""
    body: dict[str, Any] = {
        "type": f"urn:modelworks:error:{error.code}",
        "title": _title(error.status),
        "status": error.status,
        "detail": _public(error),
        "code": error.code,
        "param": error.param,
        "request_id": request_id,
    }
    if error.status != HTTPStatus.INTERNAL_SERVER_ERROR:
        body.update({name: value for name, value in error.detail.items() if name not in body})
    return body


def from_job(error: Mapping[str, Any] | None) -> ModelworksError:
    """The error that ended a job, as the answer to the call that waited for it."""
    return from_dict(dict(error or {}))


def _public(error: ModelworksError) -> str:
    return INTERNAL if type(error) is ModelworksError and error.code == "internal" else error.message[:MAX_MESSAGE]


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


# -- FastAPI's handlers ------------------------------------------------------------------------------------------------


def answer_error(request: Request, error: ModelworksError) -> Response:
    status, headers, content = render(error, request.url.path, request.scope["state"].get("request_id", ""))
    response = Response(content, status)
    response.raw_headers = headers
    return response


async def on_modelworks_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ModelworksError)
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error(
            "request failed", request_id=request.scope["state"].get("request_id"), code=error.code, exc_info=error
        )
    return answer_error(request, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors, and what a body parser refused."""
    assert isinstance(error, HTTPException)
    if isinstance(error, Refused):
        return answer_error(request, error.error)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return answer_error(request, no_route(request.url.path))
    ours = from_dict({"message": str(error.detail), "status": error.status_code})
    return answer_error(request, ours)


async def on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return answer_error(request, invalid(error.errors()))


async def on_unexpected(request: Request, error: Exception) -> Response:
    """The answer only; starlette raises the error again and the guard logs it."""
    return answer_error(request, ModelworksError(INTERNAL))


# -- what pydantic found, in words -------------------------------------------------------------------------------------


def invalid(found: Sequence[Mapping[str, Any]]) -> InvalidInput:
    """pydantic's errors as one InvalidInput: its `param` is the first field, `errors` in the detail lists them all."""
    errors = [{"param": _param(item["loc"]), "message": _sentence(item), "code": item["type"]} for item in found]
    first = errors[0]
    rest = f" (and {len(errors) - 1} more, see errors)" if len(errors) > 1 else ""
    return InvalidInput(
        f"{first['message']}{rest}",
        code="invalid_input",
        param=first["param"] or None,
        detail={"errors": errors[:MAX_ERRORS]},
    )


def _param(loc: Sequence[Any]) -> str:
    """("body", "columns", 0, "name") -> "columns.0.name"."""
    parts = [str(part)[:100] for part in loc]
    return ".".join(parts[1:] if parts and parts[0] in ("body", "query", "path", "header") else parts)


def _sentence(item: Mapping[str, Any]) -> str:
    param, kind, context = _param(item["loc"]), item["type"], item.get("ctx") or {}
    place = item["loc"][0] if item["loc"] else "body"
    if kind == "missing":
        return (
            f"{param!r} is required" if param else "this request needs a JSON body; send Content-Type: application/json"
        )
    if kind == "extra_forbidden":
        return f"{param!r} is not a field of this request; check its spelling, /docs lists the fields"
    if kind == "json_invalid":
        return f"the body is not valid JSON: {context.get('error', '')}"
    if kind == "string_pattern_mismatch":
        return f"{param!r} has characters or a length that are not allowed; it must match {context.get('pattern')}"
    if kind in ("model_attributes_type", "model_type", "dict_type") and not param:
        return "the body must be a JSON object"
    message = str(item.get("msg", "is not valid")).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{param!r} ({place}): {message}" if param else message
