"""The bytes between gateway and replica. A frame is a u32 size and that many bytes of messages; all little-endian.

    message: u32 payload size | u8 kind | u32 call id | payload
    CALL, PART: u32 header size | msgpack header | the tensors' raw bytes, in the header's order

A connection opens with proofs, both ways, that each end has the secret, which itself never travels:
HELLO(nonce) ->, <- CHALLENGE(nonce, proof), PROOF(proof) ->, <- READY. On one host a large tensor's bytes may lie in
shared memory instead (shm.py): its header then names the slot, and FREE gives that back.

Everything read is bounded and typed; what does not fit raises WireError, and the connection is closed. Never pickle.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec

from modelworks.core.errors import InvalidInput, ModelworksError, PayloadTooLarge, from_dict
from modelworks.core.tensors import DATATYPES, Tensor
from modelworks.core.types import Call
from modelworks.serve.shm import SHARED_FROM, SharingError, Slot

HELLO, READY, CALL, PART, ERROR, ABORT, PING, PONG, DRAIN = range(1, 10)
CHALLENGE, PROOF = 10, 11
CREDIT = 12  # number: a call, payload: how many parts of its stream were consumed
SEGMENT, MAPPED, FREE, DROP = range(13, 17)  # number: a segment, of FREE: a slot
KIND, CALLS, FORM, PARTS = range(17, 21)  # see columns.py
VERSION = 4
NONCE = 32
MAX_FRAME = 256 * 1024 * 1024
MAX_HELLO = 4096  # what a peer may send before it has shown the secret
MAX_TENSORS = 4096
MAX_RANK = 16
_SLOT_SIZE = 32  # at most so many bytes more a head has when it names a slot
_MANY = 1024  # chunks of one frame kept apart

_SIZE = struct.Struct("<I")
_LONG = struct.Struct("<Q")
_MESSAGE = struct.Struct("<IBI")
_pack_size = _SIZE.pack
_pack_message = _MESSAGE.pack
_encode = msgspec.msgpack.Encoder().encode


Share = Callable[[bytes], Slot | None]
View = Callable[[Slot], memoryview]


class WireError(Exception):
    """The peer sent something that is not this protocol."""


class Hello(msgspec.Struct, array_like=True):
    """The first message of a gateway: 32 random bytes, of which the replica must prove to know the secret."""

    version: int
    nonce: bytes


class Challenge(msgspec.Struct, array_like=True):
    """The replica's proof, and its own random bytes for the gateway to prove itself on."""

    nonce: bytes
    proof: bytes


class Ready(msgspec.Struct, array_like=True):
    """The replica's answer to a hello: from now on it takes calls."""

    replica_id: str
    model_version: str


class Stats(msgspec.Struct, array_like=True):
    """What a replica says of itself with each pong. `memory`: resident, in bytes; 0: not known. `waiting`: calls aboard
    that its engine has not begun."""

    memory: int = 0
    waiting: int = 0


class TensorHead(msgspec.Struct, array_like=True):
    """`slot`: -1 where the bytes travel in the message itself, else they lie in the sender's shared memory."""

    name: str
    datatype: str
    shape: list[int]
    size: int
    slot: int = -1
    segment: int = 0
    offset: int = 0


class CallHead(msgspec.Struct, array_like=True):
    """`remaining`: seconds until the deadline, as clocks of two machines differ. `key`, `priority`: as a Call's, for calls
    that wait in the replica."""

    remaining: float
    request_id: str
    params: dict[str, Any]
    stream: bool
    key: str
    priority: int
    tensors: list[TensorHead]


class PartHead(msgspec.Struct, array_like=True):
    done: bool
    model_version: str
    queue_us: int
    run_us: int
    tensors: list[TensorHead]
    batch: int = 1


class Part(msgspec.Struct):
    """A piece of an answer; a single answer is a stream of one part. Times in microseconds, as the replica measured;
    `batch`: how many calls ran together."""

    outputs: list[Tensor]
    model_version: str
    done: bool = True
    queue_us: int = 0
    run_us: int = 0
    batch: int = 1


_challenge = msgspec.msgpack.Decoder(Challenge).decode
_hello = msgspec.msgpack.Decoder(Hello).decode
_ready = msgspec.msgpack.Decoder(Ready).decode
_stats = msgspec.msgpack.Decoder(Stats).decode
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


def message(kind: int, number: int, size: int) -> bytes:
    """What stands before a payload of `size` bytes."""
    return _pack_message(size, kind, number)


def plain(kind: int, number: int = 0, payload: bytes = b"") -> list[bytes]:
    """A message without tensors, as pieces to be written one after the other."""
    return [_pack_message(len(payload), kind, number) + payload]


def proof(secret: str, role: str, gateway_nonce: bytes, replica_nonce: bytes) -> bytes:
    """What only an end that has the secret can say; `role` (gateway, replica) keeps one's proof from being the other's."""
    return hmac.digest(secret.encode(), role.encode() + gateway_nonce + replica_nonce, "sha256")


def hello(nonce: bytes) -> list[bytes]:
    return plain(HELLO, 0, _encode(Hello(VERSION, nonce)))


def challenge(nonce: bytes, proof: bytes) -> list[bytes]:
    return plain(CHALLENGE, 0, _encode(Challenge(nonce, proof)))


def credit(number: int, parts: int) -> list[bytes]:
    return plain(CREDIT, number, _pack_size(parts))


def segment(number: int, size: int) -> list[bytes]:
    return plain(SEGMENT, number, _LONG.pack(size))


def ready(replica_id: str, model_version: str) -> list[bytes]:
    return plain(READY, 0, _encode(Ready(replica_id, model_version)))


def pong(number: int, stats: Stats) -> list[bytes]:
    return plain(PONG, number, _encode(stats))


def call(number: int, body: Call, remaining: float, share: Share | None = None) -> list[bytes]:
    """InvalidInput for parameters and names that cannot be written, PayloadTooLarge for too many bytes.

    Tensors from SHARED_FROM bytes on go through shared memory, as far as `share` has room for them.
    """
    tensors = body.inputs
    fields = (remaining, body.request_id, body.params, body.stream, body.key_id, body.priority)
    try:
        head = _encode((*fields, _heads(tensors)))
    except (OverflowError, TypeError, UnicodeEncodeError, RecursionError) as problem:
        raise InvalidInput(f"a parameter, name or shape of this call cannot be sent: {problem}") from None
    size = _message_size(head, tensors)
    if share is None or size < SHARED_FROM:
        return _pieces(CALL, number, size, head, [tensor.data for tensor in tensors])
    heads, data, size = _place(tensors, share)  # after all that may refuse the call, so that no slot is left behind
    head = _encode((*fields, heads))
    return _pieces(CALL, number, size + 4 + len(head), head, data)


def part(number: int, body: Part, share: Share | None = None) -> list[bytes]:
    """As `call`."""
    tensors = body.outputs
    head = _part_fields(body, _heads(tensors))
    size = _message_size(head, tensors)
    if share is None or size < SHARED_FROM:
        return _pieces(PART, number, size, head, [tensor.data for tensor in tensors])
    heads, data, size = _place(tensors, share)
    head = _part_fields(body, heads)
    return _pieces(PART, number, size + 4 + len(head), head, data)


def _part_fields(body: Part, heads: list[Any]) -> bytes:
    return _encode((body.done, body.model_version, body.queue_us, body.run_us, heads, body.batch))


def error(number: int, body: ModelworksError) -> list[bytes]:
    return plain(ERROR, number, _encode(body.as_dict() | {"retry_after": body.retry_after}))


def _heads(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in tensors]


def _message_size(head: bytes, tensors: list[Tensor]) -> int:
    """Of the payload. PayloadTooLarge, also where only shared memory could carry it: that may have no room."""
    size = 4 + len(head)
    for tensor in tensors:
        size += len(tensor.data)
    if size > MAX_FRAME - 9 - _SLOT_SIZE * len(tensors):
        raise PayloadTooLarge(
            f"the tensors of one call have {size} bytes, more than the {MAX_FRAME} that travel at once; send fewer rows"
        )
    return size


def _place(tensors: list[Tensor], share: Share) -> tuple[list[Any], list[bytes], int]:
    """Heads of which the large ones name slots; the data that still travels in the message, and its bytes."""
    heads: list[Any] = []
    data: list[bytes] = []
    total = 0
    for tensor in tensors:
        size = len(tensor.data)
        slot = share(tensor.data) if size >= SHARED_FROM else None
        if slot is not None:
            heads.append((tensor.name, tensor.datatype, tensor.shape, size, slot.number, slot.segment, slot.offset))
            continue
        heads.append((tensor.name, tensor.datatype, tensor.shape, size))
        data.append(tensor.data)
        total += size
    return heads, data, total


def _pieces(kind: int, number: int, size: int, head: bytes, data: list[bytes]) -> list[bytes]:
    return [_pack_message(size, kind, number) + _pack_size(len(head)) + head, *data]


def read_hello(payload: bytes) -> Hello:
    return _decode(_hello, payload)


def read_ready(payload: bytes) -> Ready:
    return _decode(_ready, payload)


def read_pong(payload: bytes) -> Stats:
    return _decode(_stats, payload) if payload else Stats()


def read_error(payload: bytes) -> ModelworksError:
    try:
        return from_dict(_decode(_error, payload))
    except (TypeError, ValueError) as problem:
        raise WireError(f"a malformed error: {problem}") from None


def read_challenge(payload: bytes) -> Challenge:
    return _decode(_challenge, payload)


def read_credit(payload: bytes) -> int:
    """How many parts; at least 1."""
    if len(payload) != 4 or payload == b"\0\0\0\0":
        raise WireError("a malformed credit")
    return _SIZE.unpack(payload)[0]


def read_segment(payload: bytes) -> int:
    """The segment's bytes."""
    if len(payload) != 8:
        raise WireError("a malformed segment")
    return _LONG.unpack(payload)[0]


def read_call(frame: bytes, start: int, stop: int, view: View | None = None) -> tuple[CallHead, list[Tensor]]:
    head, offset = _head(_call_head, frame, start, stop)
    return head, _tensors(head.tensors, frame, offset, stop, view)


def read_part(frame: bytes, start: int, stop: int, view: View | None = None) -> Part:
    head, offset = _head(_part_head, frame, start, stop)
    tensors = _tensors(head.tensors, frame, offset, stop, view)
    return Part(tensors, head.model_version, head.done, head.queue_us, head.run_us, head.batch)


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


def _tensors(heads: list[TensorHead], frame: bytes, offset: int, stop: int, view: View | None) -> list[Tensor]:
    if len(heads) > MAX_TENSORS:
        raise WireError(f"{len(heads)} tensors in one message")
    tensors = []
    for head in heads:
        if len(head.shape) > MAX_RANK or head.datatype not in DATATYPES:
            raise WireError(f"a tensor of rank {len(head.shape)} and datatype {head.datatype[:20]!r}")
        if head.slot >= 0:
            tensors.append(Tensor(head.name, head.datatype, head.shape, _shared(head, view)))
            continue
        end = offset + head.size
        if head.size < 0 or end > stop:
            raise WireError(f"a tensor of {head.size} bytes that does not fit its message")
        tensors.append(Tensor(head.name, head.datatype, head.shape, frame[offset:end]))
        offset = end
    if offset != stop:
        raise WireError(f"{stop - offset} bytes after the last tensor")
    return tensors


def _shared(head: TensorHead, view: View | None) -> bytes:
    if view is None or head.slot > 2**32 - 1:
        raise WireError("a tensor in shared memory, of which this connection has none")
    try:
        data = view(Slot(head.slot, head.segment, head.offset, head.size))
    except SharingError as problem:
        raise WireError(str(problem)) from None
    # the lengths inside BYTES are read more than once: they must not change meanwhile
    return bytes(data) if head.datatype == "BYTES" else cast(bytes, data)
