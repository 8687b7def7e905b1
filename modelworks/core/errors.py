"""The exception tree. Every error a user can meet is one of these and says in one sentence what to do next.

ModelworksError            500 internal
|- InvalidInput            400 invalid_input
|- Unauthenticated         401 unauthenticated
|- Forbidden               403 forbidden
|- NotFound                404 not_found
|- RequestTimeout          408 request_timeout
|- Conflict                409 conflict (never retried by clients: x-should-retry: false)
|- PayloadTooLarge         413 payload_too_large
|- UnsupportedMedia        415 unsupported_media_type
|- IdempotencyMismatch     422 idempotency_mismatch
|- RateLimited             429 rate_limited (retry_after seconds)
|- MissingExtra            501 missing_extra
|- Unavailable             503 unavailable (retry_after seconds)
|  `- CatalogUnavailable   503 catalog_unavailable
|- DeadlineExceeded        504 deadline_exceeded
`- LeaseLost               (inside the job loop: a stale worker tried to write)
"""

from __future__ import annotations

from typing import Any

SHOWN = 80  # characters of a value that an error quotes


class ModelworksError(Exception):
    """Base of all. `message` is for people, `code` for programs, `param` names the offending field if one does."""

    status = 500
    default_code = "internal"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after
        self.detail = detail or {}

    def as_dict(self) -> dict[str, Any]:
        """The form kept in a failed job and sent over the channel: message, code, param, status and detail."""
        return {
            "message": self.message,
            "code": self.code,
            "param": self.param,
            "status": self.status,
            "detail": self.detail,
        }


class InvalidInput(ModelworksError):
    status, default_code = 400, "invalid_input"


class Unauthenticated(ModelworksError):
    status, default_code = 401, "unauthenticated"


class Forbidden(ModelworksError):
    status, default_code = 403, "forbidden"


class NotFound(ModelworksError):
    status, default_code = 404, "not_found"


class RequestTimeout(ModelworksError):
    status, default_code = 408, "request_timeout"


class Conflict(ModelworksError):
    status, default_code = 409, "conflict"


class PayloadTooLarge(ModelworksError):
    status, default_code = 413, "payload_too_large"


class UnsupportedMedia(ModelworksError):
    status, default_code = 415, "unsupported_media_type"


class IdempotencyMismatch(ModelworksError):
    status, default_code = 422, "idempotency_mismatch"


class RateLimited(ModelworksError):
    status, default_code = 429, "rate_limited"


class MissingExtra(ModelworksError):
    status, default_code = 501, "missing_extra"


class Unavailable(ModelworksError):
    status, default_code = 503, "unavailable"


class CatalogUnavailable(Unavailable):
    default_code = "catalog_unavailable"


class DeadlineExceeded(ModelworksError):
    status, default_code = 504, "deadline_exceeded"


class LeaseLost(ModelworksError):
    default_code = "lease_lost"


_BY_STATUS = {
    cls.status: cls
    for cls in (
        InvalidInput,
        Unauthenticated,
        Forbidden,
        NotFound,
        RequestTimeout,
        Conflict,
        PayloadTooLarge,
        UnsupportedMedia,
        IdempotencyMismatch,
        RateLimited,
        MissingExtra,
        Unavailable,
        DeadlineExceeded,
    )
}


def from_dict(data: dict[str, Any]) -> ModelworksError:
    """The inverse of `as_dict`, for an error that crossed a process or the network."""
    cls = _BY_STATUS.get(int(data.get("status") or 500), ModelworksError)
    return cls(
        str(data.get("message") or "something went wrong on the server; its log has the request id"),
        code=data.get("code"),
        param=data.get("param"),
        retry_after=data.get("retry_after"),
        detail=data.get("detail"),
    )


def shown(value: Any) -> str:
    """A short, bounded picture of a value for an error: `the text 'abc'`, `true`, `a list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value[:SHOWN]!r}" + ("..." if len(value) > SHOWN else "")
    if isinstance(value, int):  # str() of a huge int is slow and refused beyond 4300 digits
        return f"the number {value}" if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return f"the number {value!r}"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
