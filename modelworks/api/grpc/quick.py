"""Plain inference requests, read without protobuf: their tensors' heads are the same from call to call, and kept.

Whatever is not plain (parameters, a choice of outputs, typed contents, odd or broken bytes) is for protobuf to read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from modelworks.api.grpc.messages import message
from modelworks.core.tensors import Tensor
from modelworks.serve.columns import Kind, kind_of

_TEXTS = (0x0A, 0x12, 0x1A)  # model_name, model_version, id: field << 3 | 2 of ModelInferRequest
_INPUT, _RAW = 0x2A, 0x3A  # inputs, raw_input_contents
_MAX_HEADS = 4096  # bytes of the heads of one request that are kept
_MAX_KNOWN = 1024

_Input = message("inference.ModelInferRequest.InferInputTensor")


class Heads(NamedTuple):
    """Of the inputs of one kind of request: name, datatype, shape of each, and what `kind_of` says of them."""

    tensors: list[tuple[str, str, list[int]]]
    kind: Kind


class Plain(NamedTuple):
    model: str
    version: str
    id: str
    kind: Kind
    tensors: list[Tensor]


_known: dict[tuple[bytes, ...], Heads] = {}


def read(data: bytes) -> Plain | None:
    """The request that `data` is, when it is a plain one; its tensors are not checked yet."""
    texts = [b"", b"", b""]  # model_name, model_version, id
    inputs: list[bytes] = []
    raw: list[bytes] = []
    at, end = 0, len(data)
    try:
        while at < end:
            tag, size = data[at], data[at + 1]
            at += 2
            if size > 0x7F:
                size, at = _long(data, at - 1)
            stop = at + size
            if stop > end:
                return None
            piece = data[at:stop]
            at = stop
            if tag == _RAW:
                raw.append(piece)
            elif tag == _INPUT:
                inputs.append(piece)
            elif tag in _TEXTS:
                texts[(tag >> 3) - 1] = piece
            else:
                return None
        model, version, id = [text.decode() for text in texts]
    except (IndexError, UnicodeDecodeError):
        return None
    heads = _heads(tuple(inputs))
    if heads is None or len(raw) != len(heads.tensors) or not raw:
        return None
    tensors = [
        Tensor(name, datatype, shape.copy(), content)
        for (name, datatype, shape), content in zip(heads.tensors, raw, strict=True)
    ]
    return Plain(model, version, id, heads.kind, tensors)


def _long(data: bytes, at: int) -> tuple[int, int]:
    """A length of more than one byte: its value, and where it ends. IndexError for one that is too long."""
    value = 0
    for shift in range(0, 35, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _heads(inputs: tuple[bytes, ...]) -> Heads | None:
    found = _known.get(inputs)
    if found is not None:
        return found
    if sum(map(len, inputs)) > _MAX_HEADS:
        return None
    try:
        given: list[Any] = [_Input.FromString(piece) for piece in inputs]
    except DecodeError:
        return None
    if any(item.parameters or item.HasField("contents") or len(item.shape) > 16 for item in given):
        return None
    heads = [(item.name, item.datatype, list(item.shape)) for item in given]
    found = Heads(heads, kind_of([Tensor(*head, b"") for head in heads]))
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[inputs] = found
    return found
