"""Plain inference requests, read without protobuf: what is the same from call to call is kept.

`read` splits a request into texts, heads of tensors and their data; heads are parsed once. A `Form` goes further: all
bytes before the data of its tensors, which are numbers, are one key, and what it fits was checked before.
Whatever is not plain (parameters, a choice of outputs, typed contents, odd or broken bytes) is for protobuf to read.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from modelworks.api.grpc.messages import message, varint
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.serve.columns import Kind, kind_of

_TEXTS = (0x0A, 0x12, 0x1A)  # model_name, model_version, id: field << 3 | 2 of ModelInferRequest
_INPUT, _RAW = 0x2A, 0x3A  # inputs, raw_input_contents
_MAX_HEADS = 4096  # bytes of the heads of one request that are kept
_MAX_SIZE = 64 * 1024  # bytes of a request that a form is made for
_MAX_KNOWN = 1024
_MAX_CUTS = 4  # forms of requests of one length that are tried

_Input = message("inference.ModelInferRequest.InferInputTensor")


class Heads(NamedTuple):
    """Of the inputs of one kind of request: name, datatype, shape of each, and what `kind_of` says of them."""

    tensors: list[tuple[str, str, list[int]]]
    kind: Kind


class Form:
    """Requests that differ in the numbers of their tensors alone. `fits`: the signature that they were checked against."""

    __slots__ = ("_marks", "_split", "_tensors", "fits", "kind", "model", "version")

    def __init__(self, model: str, version: str, kind: Kind, tensors: list[Tensor], fits: Signature) -> None:
        self.model, self.version, self.kind, self.fits = model, version, kind, fits
        self._tensors = [(tensor.name, tensor.datatype, tensor.shape) for tensor in tensors]
        marks = [bytes([_RAW]) + varint(len(tensor.data)) for tensor in tensors]
        self._marks = tuple(marks)
        self._split = Struct("".join(f"{len(mark)}s{len(one.data)}s" for mark, one in zip(marks, tensors, strict=True)))

    def read(self, data: bytes, cut: int) -> Plain | None:
        """The request `data`, whose bytes before `cut` are this form's; None where its rest lies differently."""
        if len(data) - cut != self._split.size:
            return None
        parts = self._split.unpack_from(data, cut)
        if parts[::2] != self._marks:
            return None
        tensors = [
            Tensor(name, datatype, shape, content)
            for (name, datatype, shape), content in zip(self._tensors, parts[1::2], strict=True)
        ]
        return Plain(self.model, self.version, "", self.kind, tensors, cut, self)


class Plain(NamedTuple):
    model: str
    version: str
    id: str
    kind: Kind
    tensors: list[Tensor]
    cut: int  # where their data begins
    form: Form | None = None

    def fits(self, data: bytes, signature: Signature) -> None:
        """This request, `data`, was checked against the signature: the next one like it need not be."""
        if self.form is not None:
            self.form.fits = signature
        elif not self.id and self.cut <= _MAX_HEADS and len(data) <= _MAX_SIZE:
            self._keep(data, signature)

    def _keep(self, data: bytes, signature: Signature) -> None:
        if any(tensor.datatype == "BYTES" or not tensor.data for tensor in self.tensors):
            return
        form = Form(self.model, self.version, self.kind, self.tensors, signature)
        if form.read(data, self.cut) is None:
            return  # its lengths are not written in the fewest bytes
        if len(_forms) >= _MAX_KNOWN:
            _forms.clear()
            _cuts.clear()
        _forms[data[: self.cut]] = form
        cuts = _cuts.get(len(data), ())
        if self.cut not in cuts:
            _cuts[len(data)] = (self.cut, *cuts)[:_MAX_CUTS]


_known: dict[tuple[bytes, ...], Heads] = {}
_forms: dict[bytes, Form] = {}
_cuts: dict[int, tuple[int, ...]] = {}  # length of a request -> where the data may begin


def read(data: bytes) -> Plain | None:
    """The request that `data` is, when it is a plain one; its tensors are checked only where its form `fits`."""
    for cut in _cuts.get(len(data), ()):
        form = _forms.get(data[:cut])
        if form is not None:
            found = form.read(data, cut)
            if found is not None:
                return found
    return _read(data)


def _read(data: bytes) -> Plain | None:
    texts = [b"", b"", b""]  # model_name, model_version, id
    inputs: list[bytes] = []
    raw: list[bytes] = []
    at, end, cut = 0, len(data), 0
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
                continue
            if raw:
                return None  # the data comes last, but for odd writers
            cut = stop
            if tag == _INPUT:
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
    return Plain(model, version, id, heads.kind, tensors, cut)


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
