"""The protobuf classes of our .proto files, in a descriptor pool of their own, and their JSON forms.

tritonclient and kserve bring another file of the package `inference`; in the default pool the two would clash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError, Message

from modelworks.api.body import MAX_DEPTH
from modelworks.core.errors import InvalidInput

DESCRIPTORS = Path(__file__).parent.parent / "proto" / "descriptors.bin"


def _load() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load()


def message(name: str) -> Any:
    """The class of the message with this full name, such as `inference.ModelInferRequest`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def parse(kind: Any, data: bytes) -> Any:
    """A message of the class `kind`; InvalidInput when `data` is not one."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidInput(
            f"the message is not a {kind.DESCRIPTOR.full_name}; generate the client from the current .proto file",
            code="bad_message",
        ) from None


def varint(value: int) -> bytes:
    """A length or a size as protobuf writes it."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fill(kind: Any, data: Any) -> Message:
    """A message of the class `kind` from a JSON object with its fields; members it has no field for are left out."""
    plain = msgspec.json.decode(msgspec.json.encode(data, enc_hook=str))  # NaN and infinity become null, as in REST
    found = json_format.ParseDict(plain, kind(), ignore_unknown_fields=True)
    assert isinstance(found, Message)
    return found


def plain(given: Message) -> dict[str, Any]:
    """The JSON object of a message: fields that are not set are left out, whole numbers in a Struct are int."""
    try:
        found = json_format.MessageToDict(given, preserving_proto_field_name=True)
    except (json_format.Error, ValueError, RecursionError) as error:
        raise InvalidInput(f"a Struct of the request cannot be read as JSON: {str(error)[:200]}") from None
    whole = _whole(found, 0)
    assert isinstance(whole, dict)
    return whole


def _whole(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InvalidInput(f"a Struct is nested deeper than {MAX_DEPTH} levels", code="too_deep")
    if isinstance(value, dict):
        return {name: _whole(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item, depth + 1) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
