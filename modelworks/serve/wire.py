"""The bytes between gateway and replica. A frame is a u32 size and that many bytes of messages; all little-endian.

    message: u32 payload size | u8 kind | u32 call id | payload
    CALL, PART: u32 header size | msgpack header | the tensors' raw bytes, in the header's order

Everything read is bounded and typed; what does not fit raises WireError, and the connection is closed. Never pickle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from modelworks.core.errors import InvalidInput, ModelworksError, PayloadTooLarge, from_dict
from modelworks.core.tensors import DATATYPES, Tensor
from modelworks.core.types import Call

HELLO, READY, CALL, PART, ERROR, ABORT, PING, PONG, DRAIN = range(1, 10)
VERSION = 1
MAX_FRAME = 256 * 1024 * 1024
MAX_HELLO = 4096  # what a peer may send before it has shown the secret
MAX_TENSORS = 4096
MAX_RANK = 16
_MANY = 1024  # chunks of one frame kept apart

_SIZE = struct.Struct("<I")
_MESSAGE = struct.Struct("<IBI")
_pack_size = _SIZE.pack
_pack_message = _MESSAGE.pack
_encode = msgspec.msgpack.Encoder().encode


class WireError(Exception):
    """The peer sent something that is not this protocol."""


class Hello(msgspec.Struct, array_like=True):
    """The first message of a client. `secret` is the server run's, in hex."""

    version: int
    secret: str


class Ready(msgspec.Struct, array_like=True):
    """The replica's answer to a hello: from now on it takes calls."""

    replica_id: str
    model_version: str


class TensorHead(msgspec.Struct, array_like=True):
    name: str
    datatype: str
    shape: list[int]
    size: int


class CallHead(msgspec.Struct, array_like=True):
    """`remaining`: seconds until the deadline, as clocks of two machines differ."""

    remaining: float
    request_id: str
    params: dict[str, Any]
    stream: bool
    tensors: list[TensorHead]


class PartHead(msgspec.Struct, array_like=True):
    done: bool
    model_version: str
    queue_us: int
    run_us: int
    tensors: list[TensorHead]


class Part(msgspec.Struct):
    """A piece of an answer; a single answer is a stream of one part. Times in microseconds, as the replica measured."""

    outputs: list[Tensor]
    model_version: str
    done: bool = True
    queue_us: int = 0
    run_us: int = 0


_hello = msgspec.msgpack.Decoder(Hello).decode
_ready = msgspec.msgpack.Decoder(Ready).decode
_call_head = msgspec.msgpack.Decoder(CallHead).decode
_part_head = msgspec.msgpack.Decoder(PartHead).decode
_error = msgspec.msgpack.Decoder(dict[str, Any]).decode


class FrameReader:
    """Cuts a byte stream into frames. `limit` may be raised between frames."""

    def __init__(self, limit: int = MAX_HELLO) -> None:
        self.limit = limit
        self._chunks: list[bytes] = []
        self._have = 0
        self._need = 4

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int, int]]:
        """Yields (buffer, start, stop) of each whole frame's messages; keeps the rest for the next call."""
        if self._chunks:
            self._chunks.append(data)
            self._have += len(data)
            if self._have < self._need:
                if len(self._chunks) > _MANY:  # dripped bytes must not cost an object each
                    self._chunks = [b"".join(self._chunks)]
                return
            data = b"".join(self._chunks)
            self._chunks = []
        offset, end = 0, len(data)
        self._need = 4
        while end - offset >= 4:
            (size,) = _SIZE.unpack_from(data, offset)
            if size > self.limit or size < _MESSAGE.size:
                raise WireError(f"a frame of {size} bytes, allowed are {_MESSAGE.size} to {self.limit}")
            stop = offset + 4 + size
            if stop > end:
                self._need = 4 + size
                break
            yield data, offset + 4, stop
            offset = stop
        if offset < end:
            self._chunks = [data[offset:] if offset else data]
            self._have = end - offset


def messages(frame: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (kind, call id, payload start, payload stop) of each message in a frame."""
    offset = start
    while offset < stop:
        if stop - offset < 9:
            raise WireError("a frame ends inside a message")
        size, kind, number = _MESSAGE.unpack_from(frame, offset)
        offset += 9
        if size > stop - offset:
            raise WireError("a message runs past the end of its frame")
        yield kind, number, offset, offset + size
        offset += size


def plain(kind: int, number: int = 0, payload: bytes = b"") -> list[bytes]:
    """A message without tensors, as pieces to be written one after the other."""
    return [_pack_message(len(payload), kind, number) + payload]


def hello(secret: str) -> list[bytes]:
    return plain(HELLO, 0, _encode(Hello(VERSION, secret)))


def ready(replica_id: str, model_version: str) -> list[bytes]:
    return plain(READY, 0, _encode(Ready(replica_id, model_version)))


def call(number: int, body: Call, remaining: float) -> list[bytes]:
    """InvalidInput for parameters and names that cannot be written, PayloadTooLarge for too many bytes."""
    tensors = body.inputs
    try:
        head = _encode(
            (
                remaining,
                body.request_id,
                body.params,
                body.stream,
                [(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in tensors],
            )
        )
    except (OverflowError, TypeError, UnicodeEncodeError, RecursionError) as problem:
        raise InvalidInput(f"a parameter, name or shape of this call cannot be sent: {problem}") from None
    return _with_tensors(CALL, number, head, tensors)


def part(number: int, body: Part) -> list[bytes]:
    tensors = body.outputs
    head = _encode(
        (
            body.done,
            body.model_version,
            body.queue_us,
            body.run_us,
            [(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in tensors],
        )
    )
    return _with_tensors(PART, number, head, tensors)


def error(number: int, body: ModelworksError) -> list[bytes]:
    return plain(ERROR, number, _encode(body.as_dict() | {"retry_after": body.retry_after}))


def _with_tensors(kind: int, number: int, head: bytes, tensors: list[Tensor]) -> list[bytes]:
    size = 4 + len(head)
    for tensor in tensors:
        size += len(tensor.data)
    if size > MAX_FRAME - 9:
        raise PayloadTooLarge(
            f"the tensors of one call have {size} bytes, more than the {MAX_FRAME} that travel at once; send fewer rows"
        )
    pieces = [_pack_message(size, kind, number) + _pack_size(len(head)) + head]
    pieces += [tensor.data for tensor in tensors]
    return pieces


def read_hello(payload: bytes) -> Hello:
    return _decode(_hello, payload)


def read_ready(payload: bytes) -> Ready:
    return _decode(_ready, payload)


def read_error(payload: bytes) -> ModelworksError:
    try:
        return from_dict(_decode(_error, payload))
    except (TypeError, ValueError) as problem:
        raise WireError(f"a malformed error: {problem}") from None


def read_call(frame: bytes, start: int, stop: int) -> tuple[CallHead, list[Tensor]]:
    head, offset = _head(_call_head, frame, start, stop)
    return head, _tensors(head.tensors, frame, offset, stop)


def read_part(frame: bytes, start: int, stop: int) -> Part:
    head, offset = _head(_part_head, frame, start, stop)
    tensors = _tensors(head.tensors, frame, offset, stop)
    return Part(tensors, head.model_version, head.done, head.queue_us, head.run_us)


def _decode(decoder: Any, payload: bytes) -> Any:
    try:
        return decoder(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise WireError(f"a malformed header: {problem}") from None


def _head(decoder: Any, frame: bytes, start: int, stop: int) -> tuple[Any, int]:
    if stop - start < 4:
        raise WireError("a message too short for its header")
    (size,) = _SIZE.unpack_from(frame, start)
    offset = start + 4
    if size > stop - offset:
        raise WireError("a header runs past the end of its message")
    return _decode(decoder, frame[offset : offset + size]), offset + size


def _tensors(heads: list[TensorHead], frame: bytes, offset: int, stop: int) -> list[Tensor]:
    if len(heads) > MAX_TENSORS:
        raise WireError(f"{len(heads)} tensors in one message")
    tensors = []
    for head in heads:
        end = offset + head.size
        if head.size < 0 or end > stop or len(head.shape) > MAX_RANK or head.datatype not in DATATYPES:
            raise WireError(f"a tensor of {head.size} bytes, rank {len(head.shape)} that does not fit its message")
        tensors.append(Tensor(head.name, head.datatype, head.shape, frame[offset:end]))
        offset = end
    if offset != stop:
        raise WireError(f"{stop - offset} bytes after the last tensor")
    return tensors
