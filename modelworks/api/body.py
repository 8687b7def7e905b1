"""Request bodies: strict JSON with bounded nesting, and gzip or deflate inflated within a bound."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api.errors import Refused
from modelworks.core.errors import InvalidInput, PayloadTooLarge

MAX_DEPTH = 64
MAX_VALUES = 4_000_000  # of the tensors or rows in a body: each takes some tens of bytes of memory
MAX_CONTROL_VALUES = 32_768  # of a body that describes something; each may become an error that names it
_CONTAINER = 8  # an array or object takes the memory of so many numbers
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}  # one for each type that is asked for
_STRUCTURE = b'"[]{}'
_NOISE = bytes(byte for byte in range(256) if byte not in _STRUCTURE)


def check_depth(data: bytes, limit: int = MAX_DEPTH) -> None:
    """Raise InvalidInput when arrays and objects are nested deeper than `limit`. Cheap: looks at the brackets only."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return
    # without escapes, every second part between quotation marks lies outside the strings
    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOISE)
    depth = 0
    for mark in b"".join(marks.split(b'"')[::2]):
        if mark in b"[{":
            depth += 1
            if depth > limit:
                raise InvalidInput(f"the JSON is nested deeper than {limit} levels", code="too_deep")
        else:
            depth -= 1


def check_values(data: bytes, limit: int) -> None:
    """Raise PayloadTooLarge when JSON would take much more memory and time than its bytes. Looks at marks only."""
    if len(data) * (_CONTAINER + 1) <= limit * 3:  # the shortest is `{},`
        return
    if data.count(b",") + _CONTAINER * (data.count(b"[") + data.count(b"{")) > limit:
        raise PayloadTooLarge(
            f"the JSON has too many values (with commas counted, arrays and objects {_CONTAINER} times, more than "
            f"{limit}); send it in several calls",
            code="too_many_values",
        )


def decode_json(data: bytes, type: Any = Any) -> Any:
    """Strict JSON (no NaN, no Infinity, valid UTF-8); InvalidInput says what is wrong and where."""
    check_values(data, MAX_VALUES)
    decoder = _decoders.get(type)
    if decoder is None:
        decoder = _decoders[type] = msgspec.json.Decoder(type)
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"the body does not have the expected form: {error}", code="invalid_input") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise InvalidInput("the JSON is nested too deeply", code="too_deep") from None


class StrictRequest(Request):
    """A request whose JSON is decoded strictly."""

    async def json(self) -> Any:
        data = await self.body()
        try:
            check_depth(data)
            check_values(data, MAX_CONTROL_VALUES)
            return decode_json(data)
        except (InvalidInput, PayloadTooLarge) as error:
            raise Refused(error) from None


class StrictRoute(APIRoute):
    """Gives FastAPI a StrictRequest to read the body from."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """gzip or deflate -> the bytes, at most `limit`. PayloadTooLarge beyond it, InvalidInput for another format."""
    # 47: zlib or gzip header, told from the data; deflate without a header is also seen in the wild
    inflater = zlib.decompressobj(47 if encoding == "gzip" or data[:1] == b"\x78" else -15)
    try:
        out = inflater.decompress(data, limit + 1)
    except zlib.error:
        raise InvalidInput(f"the body is not {encoding} data", code="bad_encoding", param="Content-Encoding") from None
    if len(out) > limit:
        raise PayloadTooLarge(f"the inflated body is larger than {limit} bytes")
    if not inflater.eof:
        raise InvalidInput(f"the {encoding} body ends too early", code="bad_encoding", param="Content-Encoding")
    return out
