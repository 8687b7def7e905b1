"""The error edge of gRPC: a ModelworksError as a status, with google.rpc details and what HTTP says in its headers."""

from __future__ import annotations

import math
from typing import Any

from grpc import StatusCode

from modelworks.api.errors import problem
from modelworks.api.grpc.messages import message
from modelworks.core.errors import ModelworksError

Metadata = tuple[tuple[str, str | bytes], ...]

STATUS: dict[int, StatusCode] = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    405: StatusCode.UNIMPLEMENTED,
    408: StatusCode.DEADLINE_EXCEEDED,
    409: StatusCode.FAILED_PRECONDITION,  # not ABORTED, which asks the client to try again
    413: StatusCode.RESOURCE_EXHAUSTED,
    415: StatusCode.INVALID_ARGUMENT,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    431: StatusCode.RESOURCE_EXHAUSTED,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
MAX_MESSAGE = 2000  # characters: it travels in a header

_Status = message("google.rpc.Status")
_RetryInfo = message("google.rpc.RetryInfo")
_ErrorInfo = message("google.rpc.ErrorInfo")
_RequestInfo = message("google.rpc.RequestInfo")
_BadRequest = message("google.rpc.BadRequest")


def render(error: ModelworksError, request_id: str) -> tuple[StatusCode, str, Metadata]:
    """Status, text and trailing metadata. Internal errors say no more than over HTTP."""
    code = STATUS.get(error.status, StatusCode.INTERNAL)
    body = problem(error, request_id)
    text = str(body["detail"])[:MAX_MESSAGE]
    details: list[Any] = [_ErrorInfo(reason=error.code, domain="modelworks"), _RequestInfo(request_id=request_id)]
    metadata: list[tuple[str, str | bytes]] = [("x-error-code", error.code)]
    if error.param:
        details.append(_BadRequest(field_violations=[{"field": error.param[:200], "description": text}]))
    if error.retry_after is not None:
        retry = _RetryInfo()
        retry.retry_delay.FromNanoseconds(math.ceil(error.retry_after * 1e9))
        details.append(retry)
        metadata.append(("retry-after", str(max(1, math.ceil(error.retry_after)))))
        metadata.append(("grpc-retry-pushback-ms", str(math.ceil(error.retry_after * 1000))))
    status = _Status(code=code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return code, text, (*metadata, ("grpc-status-details-bin", status.SerializeToString()))
