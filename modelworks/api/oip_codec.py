"""The Open Inference Protocol's bodies: JSON, and JSON followed by the tensors' raw bytes (the binary extension).

`prepare` makes the call of a request and what will encode its answer; both lanes go through it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from modelworks.api.body import decode_json
from modelworks.api.calls import JSON_HEADERS, Prepared, Read, Reply
from modelworks.api.errors import NotImplementedHere
from modelworks.api.texts import TEXT_INPUTS, TEXT_SPECS, parameters, settle_text
from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import GENERATION
from modelworks.core.tensors import (
    BOOL_MISSING,
    DATATYPES,
    INT64_MISSING,
    Tensor,
    element_count,
    pack,
    unpack,
    unpack_bytes,
)
from modelworks.core.types import Answer, Call, Principal, TensorSpec
from modelworks.serve.checks import check_inputs
from modelworks.serve.columns import Answers, Kind, kind_of
from modelworks.serve.gateway import Gateway
from modelworks.serve.routes import Route

MAX_TENSORS = 4096
MAX_RANK = 16
HEADER_LENGTH = b"inference-header-content-length"
_BINARY_TYPE = (b"content-type", b"application/octet-stream")
_TEXT = 80  # characters of a client's text that an error quotes

_BINARY_ONLY = frozenset({"FP16", "BF16"})
_FLOATS = frozenset({"FP32", "FP64"})
_TAKES: dict[str, set[type]] = {"BOOL": {bool}, "BYTES": {str}, **{name: {int, float} for name in _FLOATS}}
_WORDS = {"BOOL": "true or false", "BYTES": "texts", **dict.fromkeys(_FLOATS, "numbers")}
_PACKS: dict[str, tuple[frozenset[type], str]] = {
    name: (frozenset(_TAKES.get(name, {int})), DATATYPES[name][1])
    for name in DATATYPES
    if name != "BYTES" and name not in _BINARY_ONLY
}
_encode = msgspec.json.Encoder(enc_hook=str).encode


class InputTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class OutputTensor(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct):
    """The protocol's inference request. Fields it does not name are ignored, as the protocol's extensions ask."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[OutputTensor] | None = None


class Wanted(NamedTuple):
    """An output to answer; `binary`: after the JSON instead of in it."""

    name: str
    binary: bool = False


def prepare(
    gateway: Gateway,
    principal: Principal,
    model: str,
    version: str | None,
    data: bytes,
    header_length: bytes | None,
    request_id: str,
) -> Prepared:
    """The call that the body `data` asks for. `header_length`: the header of that name, which announces binary data.

    NotFound and Forbidden for the deployment, InvalidInput that names the tensor.
    """
    route = gateway.route(principal, model, version)
    if header_length is None:
        found = _usual(route, data)
        if found is not None:
            id, tensors, kind, wanted = found
            call = Call(model, tensors, gateway.deadline(), request_id, version=version, kind=kind)
            return Prepared(call, lambda answer: encode_answer(model, id, answer, wanted))
    size = _header_size(header_length, len(data))
    body: InferBody = decode_json(data if size == len(data) else data[:size], InferBody)
    tensors = decode_inputs(route, body, data, size)
    wanted = _wanted(route, body)
    params = parameters(route, body.parameters, strict=False)
    if "logprobs" in params and not body.outputs:
        wanted.append(Wanted("logprobs"))
    call = Call(model, tensors, gateway.deadline_of(route), request_id, params, version=version)
    return Prepared(call, lambda found: encode_answer(model, body.id, found, wanted))


# -- the usual request: flat numbers in JSON, of shapes that were seen before, all outputs wanted in JSON ---------------


class FlatTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]
    parameters: dict[str, Any] | None = None


class FlatBody(msgspec.Struct):
    inputs: list[FlatTensor]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[Any] | None = None


class MixedTensor(FlatTensor):
    data: list[int | float | bool]


class MixedBody(FlatBody):
    """For models that take integers and booleans too: the types of the values must be looked at."""

    inputs: list[MixedTensor]  # type: ignore[assignment]


_flat = msgspec.json.Decoder(FlatBody).decode
_mixed = msgspec.json.Decoder(MixedBody).decode
_MAX_FORMS = 256
_MAX_FLAT = 64 * 1024  # bytes of such a body


class Form(NamedTuple):
    """Inputs whose names, datatypes and shapes fit a route's signature: how many values each has, and what packs them,
    each and all together. `types`: of each, what its values may be. `rows`: that all of them have; 0 where they differ."""

    counts: list[int]
    types: list[frozenset[type]]
    packs: list[Callable[..., bytes]]
    kind: Kind
    pack: Callable[..., bytes]
    rows: int


def _usual(route: Route, data: bytes) -> tuple[str | None, list[Tensor], Kind, list[Wanted]] | None:
    """The id, tensors, kind and outputs of a usual request; None: read it with all care."""
    wanted = usual_outputs(route)
    read = _read_usual(route, data) if wanted is not None else None
    if read is None or wanted is None:
        return None
    body, form = read
    tensors = []
    try:
        for one, pack_all in zip(body.inputs, form.packs, strict=True):
            tensors.append(Tensor(one.name, one.datatype, one.shape, pack_all(*one.data)))
    except (struct.error, OverflowError):
        return None
    return body.id, tensors, form.kind, wanted


def _read_usual(route: Route, data: bytes) -> tuple[FlatBody, Form] | None:
    """The body, and the form that its inputs fit, with as many values as that asks for."""
    if not route.numeric or len(data) > _MAX_FLAT:
        return None
    floats = route.floats  # JSON's integers become such
    try:
        body = _flat(data) if floats else _mixed(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if body.parameters or body.outputs:
        return None
    inputs = body.inputs
    key = tuple([(one.name, one.datatype, *one.shape) for one in inputs])
    forms: dict[Any, Form] = route.memo.setdefault("oip", {})
    form = forms.get(key)
    if form is None:
        form = _form(route, inputs)
        if form is None:
            return None
        if len(forms) < _MAX_FORMS:
            forms[key] = form
    for one, count in zip(inputs, form.counts, strict=True):
        if len(one.data) != count or one.parameters:
            return None
    if not floats:
        for one, types in zip(inputs, form.types, strict=True):
            if not types.issuperset(map(type, one.data)):
                return None
    return body, form


class Usual:
    """Reads usual requests of a route and writes their answers, many at once (express.py)."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._outputs = usual_outputs(route)
        self._templates: dict[tuple[Any, str, int], bytes] = {}

    def read(self, data: bytes) -> Read | None:
        """None: it is not for this."""
        found = _read_usual(self.route, data) if self._outputs is not None else None
        if found is None:
            return None
        body, form = found
        if form.rows < 1:
            return None
        try:
            if len(body.inputs) == 1:
                return form.kind, form.rows, form.pack(*body.inputs[0].data), body.id
            return form.kind, form.rows, form.pack(*[value for one in body.inputs for value in one.data]), body.id
        except (struct.error, OverflowError):
            return None

    def reply(self, answer: Answer, request_id: str, id: str | None) -> Reply:
        """One answer that comes alone."""
        return encode_answer(self.route.name, id, answer, self._outputs or ())

    def write(self, answers: Answers, request_ids: Sequence[str], ids: Sequence[str | None]) -> list[bytes]:
        """The body of each answer, as `encode_answer` makes it."""
        bodies = self._bodies(answers)
        if ids.count(None) == len(ids):
            return bodies
        place = len(self._head(answers.version))
        return [
            body if id is None else b'%b,"id":%b%b' % (body[:place], _encode(id), body[place:])
            for body, id in zip(bodies, ids, strict=True)
        ]

    def _head(self, version: str) -> bytes:
        """What all answers begin with."""
        return _encode({"model_name": self.route.name, "model_version": version.rpartition(":")[2]})[:-1]

    def _bodies(self, answers: Answers) -> list[bytes]:
        columns = [_texts(tensor, answers.rows) for tensor in answers.whole()]
        rows = answers.rows
        values: Iterable[tuple[bytes, ...]] = zip(*columns, strict=True)
        if rows.count(rows[0]) == len(rows):
            template = self._template(answers, rows[0])
            return [template % one for one in values]
        return [self._template(answers, count) % one for count, one in zip(rows, values, strict=True)]

    def _template(self, answers: Answers, rows: int) -> bytes:
        """An answer of so many rows but for its values."""
        key = (answers.layout.kind, answers.version, rows)
        found = self._templates.get(key)
        if found is None:
            described = [
                _encode({"name": name, "datatype": datatype, "shape": [rows, *(trailing or ())]})
                for name, datatype, trailing in answers.layout.kind
            ]
            parts = [one[:-1].replace(b"%", b"%%") + b',"data":[%b]}' for one in described]
            found = self._head(answers.version).replace(b"%", b"%%") + b',"outputs":[' + b",".join(parts) + b"]}"
            if len(self._templates) < _MAX_FORMS:
                self._templates[key] = found
        return found


def _texts(tensor: Tensor, rows: Sequence[int]) -> list[bytes]:
    """The values of each call in JSON, between the brackets; the calls lie row below row."""
    flat = _data(tensor)
    if len(rows) == 1:
        return [_encode(flat)[1:-1]]
    size = math.prod(tensor.shape[1:])
    if tensor.datatype != "BYTES" and rows.count(rows[0]) == len(rows) and rows[0] * size:
        step = rows[0] * size
        parts = [flat[at : at + step] for at in range(0, len(flat), step)]
        return _encode(parts)[2:-2].split(b"],[")  # numbers hold no brackets
    found = []
    at = 0
    for count in rows:
        found.append(_encode(flat[at : at + count * size])[1:-1])
        at += count * size
    return found


def _form(route: Route, inputs: list[FlatTensor]) -> Form | None:
    tensors = []
    counts = []
    packs = []
    for one in inputs:
        if one.datatype not in _PACKS or len(one.shape) > MAX_RANK or min(one.shape, default=1) < 1:
            return None
        count = math.prod(one.shape)
        if count > _MAX_FLAT:
            return None
        pack_all = struct.Struct(f"<{count}{DATATYPES[one.datatype][1]}")
        counts.append(count)
        packs.append(pack_all.pack)
        tensors.append(Tensor(one.name, one.datatype, one.shape, bytes(pack_all.size)))
    try:
        check_inputs(route.signature, tensors, route.shapes)
    except InvalidInput:  # the careful way says it with what came
        return None
    rows = {one.shape[0] if one.shape else 0 for one in inputs}
    codes = [f"{count}{DATATYPES[one.datatype][1]}" for count, one in zip(counts, inputs, strict=True)]
    whole = struct.Struct("<" + "".join(codes)).pack
    types = [_PACKS[one.datatype][0] for one in inputs]
    return Form(counts, types, packs, kind_of(tensors), whole, rows.pop() if len(rows) == 1 else 0)


def usual_outputs(route: Route) -> list[Wanted] | None:
    """All outputs, in JSON; None where one of them travels only as binary data."""
    found: list[Wanted] | None = route.memo.get("oip outputs")
    if found is None and "oip outputs" not in route.memo:
        specs = route.signature.outputs
        plain = all(spec.datatype not in _BINARY_ONLY for spec in specs)
        found = route.memo["oip outputs"] = [Wanted(spec.name) for spec in specs] if plain else None
    return found


# -- requests ----------------------------------------------------------------------------------------------------------


def _header_size(header_length: bytes | None, whole: int) -> int:
    """Where the JSON ends."""
    if header_length is None:
        return whole
    size = int(header_length) if header_length.isdigit() and len(header_length) < 20 else -1
    if not 0 <= size <= whole:
        raise InvalidInput(
            f"Inference-Header-Content-Length must be the length of the JSON, at most {whole} here",
            code="bad_header_length",
            param="Inference-Header-Content-Length",
        )
    return size


def decode_inputs(route: Route, body: InferBody, data: bytes = b"", offset: int = 0) -> list[Tensor]:
    """The request's tensors, checked against the route's signature; binary ones lie in `data` from `offset` on.

    InvalidInput names the tensor.
    """
    if len(body.inputs) > MAX_TENSORS:
        raise InvalidInput(f"a request has at most {MAX_TENSORS} inputs", code="too_many_inputs", param="inputs")
    signature, specs = route.signature, route.specs
    texts = route.task == GENERATION
    if texts:
        signature, specs = TEXT_INPUTS, TEXT_SPECS
    tensors = []
    binary = []
    for given in body.inputs:
        spec = specs.get(given.name)
        size = given.parameters.get("binary_data_size") if given.parameters else None
        if size is None:
            tensors.append(_plain(spec, given) or _tensor(spec, given))
            continue
        tensors.append(_binary(given, size, data, offset))
        offset += size
        if spec is not None:
            binary.append((spec, tensors[-1]))
    if offset < len(data):
        raise InvalidInput(
            f"{len(data) - offset} bytes follow the last tensor; binary_data_size says how many each has",
            code="bad_binary_size",
            param="binary_data_size",
        )
    if texts:
        settle_text(tensors)
    check_inputs(signature, tensors, route.shapes)
    for spec, tensor in binary:
        _check_missing(spec, tensor)
    return tensors


def _binary(given: InputTensor, size: Any, data: bytes, offset: int) -> Tensor:
    name = given.name[:_TEXT]
    left = max(0, len(data) - offset)
    if type(size) is not int or not 0 <= size <= left:
        raise InvalidInput(
            f"the input {name!r} has a binary_data_size that does not fit: {left} bytes are left for it",
            code="bad_binary_size",
            param=name,
        )
    if given.data is not None:
        raise InvalidInput(f"the input {name!r} has both `data` and binary data", code="bad_data", param=name)
    if len(given.shape) > MAX_RANK:
        raise _too_many_axes(name)
    return Tensor(given.name, given.datatype, given.shape, data[offset : offset + size])


def _too_many_axes(name: str) -> InvalidInput:
    return InvalidInput(f"the input {name!r} has more than {MAX_RANK} axes", code="bad_shape", param=name)


def _check_missing(spec: TensorSpec, tensor: Tensor) -> None:
    """Refuse what stands for a missing value in the column of a table that must not have one."""
    if not spec.column or spec.nullable:
        return
    if tensor.datatype in ("FP32", "FP64"):
        missing = any(map(math.isnan, unpack(tensor)))
    elif tensor.datatype == "BYTES":
        missing = b"" in unpack_bytes(tensor.data, tensor.name)
    elif tensor.datatype == "BOOL":
        missing = bool(tensor.data) and max(tensor.data) > 1
    else:
        missing = tensor.datatype == "INT64" and INT64_MISSING in unpack(tensor)
    if missing:
        raise _missing_value(spec)


def _plain(spec: TensorSpec | None, given: InputTensor) -> Tensor | None:
    """The tensor of flat numbers that are all as they should be; None: look with all care, and say what is wrong."""
    data, shape = given.data, given.shape
    if spec is None or not data or given.parameters or given.datatype != spec.datatype or len(shape) > MAX_RANK:
        return None
    packs = _PACKS.get(spec.datatype)
    if packs is None or not packs[0].issuperset(map(type, data)):
        return None
    if math.prod(shape) != len(data) or min(shape, default=1) < 1:
        return None
    try:
        return Tensor(spec.name, spec.datatype, shape, struct.pack(f"<{len(data)}{packs[1]}", *data))
    except (struct.error, OverflowError):
        return None


def _tensor(spec: TensorSpec | None, given: InputTensor) -> Tensor:
    name = given.name[:_TEXT]
    if "shared_memory_region" in given.parameters:
        raise NotImplementedHere("regions of shared memory are not taken from clients; send the tensors' data")
    if spec is None or given.datatype != spec.datatype:
        return Tensor(given.name, given.datatype, given.shape[:MAX_RANK], b"")  # check_inputs says what is wrong
    if given.data is None:
        raise InvalidInput(f"the input {name!r} has no `data`", code="missing_data", param=name)
    if spec.datatype in _BINARY_ONLY:
        raise InvalidInput(
            f"the input {name!r} is {spec.datatype}, which travels only as binary data", code="binary_only", param=name
        )
    if len(given.shape) > MAX_RANK:
        raise _too_many_axes(name)
    flat = _flatten(given, name)
    count = element_count(given.shape)
    if len(flat) != count:
        raise InvalidInput(
            f"the input {name!r} has {len(flat)} values but its shape {given.shape} asks for {count}",
            code="bad_shape",
            param=name,
        )
    return pack(spec.name, spec.datatype, given.shape, _values(spec, flat))


def _flatten(given: InputTensor, name: str) -> list[Any]:
    """`data` as it is when flat; nested lists must have exactly the shape."""
    flat: list[Any] = given.data or []
    if not any(type(value) is list for value in flat):
        return flat
    for axis, size in enumerate(given.shape):
        if axis == 0:
            fits = len(flat) == size
        else:
            fits = all(type(value) is list and len(value) == size for value in flat)
            flat = [item for value in flat for item in value] if fits else flat
        if not fits:
            raise InvalidInput(
                f"the nested data of {name!r} does not have the shape {given.shape}", code="bad_shape", param=name
            )
    return flat


def _values(spec: TensorSpec, flat: list[Any]) -> Sequence[Any]:
    """`flat` as the datatype's values, with what stands for null."""
    types = set(map(type, flat))
    if type(None) in types:
        flat = _with_missing(spec, flat)
        types.discard(type(None))
    unfit = types - _TAKES.get(spec.datatype, {int})
    if unfit:
        at = next(index for index, value in enumerate(flat) if type(value) in unfit)
        raise InvalidInput(
            f"the input {spec.name!r} is {spec.datatype} and takes {_WORDS.get(spec.datatype, 'integers')}; "
            f"its value {at} is {_kind(flat[at])}",
            code="bad_value",
            param=spec.name,
        )
    if spec.datatype == "BYTES":
        try:
            return [text.encode() for text in flat]
        except UnicodeEncodeError:
            raise InvalidInput(f"the input {spec.name!r} has a text that is not UTF-8", param=spec.name) from None
    return flat


def _with_missing(spec: TensorSpec, flat: list[Any]) -> list[Any]:
    missing: Any = None
    if spec.nullable:
        floats = dict.fromkeys(_FLOATS, float("nan"))
        missing = {**floats, "BYTES": "", "INT64": INT64_MISSING, "BOOL": BOOL_MISSING}.get(spec.datatype)
    if missing is None:
        raise _missing_value(spec)
    return [missing if value is None else value for value in flat]


def _missing_value(spec: TensorSpec) -> InvalidInput:
    return InvalidInput(
        f"the input {spec.name!r} has a missing value, which the model was not made to accept",
        code="missing_value",
        param=spec.name,
    )


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def _wanted(route: Route, body: InferBody) -> list[Wanted]:
    """The outputs to answer: those asked for, or all."""
    default = body.parameters.get("binary_data_output") is True
    known = {spec.name: spec.datatype for spec in route.signature.outputs}
    wanted: dict[str, Wanted] = {}
    if not body.outputs:
        wanted = {name: Wanted(name, default) for name in known}
    for output in body.outputs or ():
        name = output.name
        if name not in known:
            raise InvalidInput(
                f"the model has no output {name[:_TEXT]!r}; its outputs are {', '.join(known)}",
                code="unknown_output",
                param=name[:_TEXT],
            )
        asked = output.parameters
        if "classification" in asked or "shared_memory_region" in asked:
            raise NotImplementedHere(f"the output {name!r} is answered as it is: no classification, no shared memory")
        wanted.setdefault(name, Wanted(name, asked.get("binary_data", default) is True))
    for item in wanted.values():
        if not item.binary and known[item.name] in _BINARY_ONLY:
            raise InvalidInput(
                f"the output {item.name!r} is {known[item.name]}, which travels only as binary data; "
                "ask for it with binary_data: true",
                code="binary_only",
                param=item.name,
            )
    return list(wanted.values())


# -- answers -----------------------------------------------------------------------------------------------------------


def encode_answer(model: str, id: str | None, found: Answer, wanted: Sequence[Wanted]) -> Reply:
    """The protocol's answer. NaN and infinity, which JSON does not have, are null there."""
    outputs = {tensor.name: tensor for tensor in found.outputs}
    body: dict[str, Any] = {"model_name": model, "model_version": found.model_version.rpartition(":")[2]}
    if id is not None:
        body["id"] = id
    described = body["outputs"] = []
    blobs = []
    for name, binary in wanted:
        tensor = outputs.get(name)
        if tensor is None:
            continue
        item: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": tensor.shape}
        if binary:
            item["parameters"] = {"binary_data_size": len(tensor.data)}
            blobs.append(tensor.data)
        else:
            item["data"] = _data(tensor)
        described.append(item)
    head = _encode(body)
    if not blobs:
        return Reply(JSON_HEADERS, head)
    return Reply((_BINARY_TYPE, (HEADER_LENGTH, b"%d" % len(head))), b"".join([head, *blobs]))


def _data(tensor: Tensor) -> list[Any]:
    flat = unpack(tensor)
    return [raw.decode(errors="replace") for raw in flat] if tensor.datatype == "BYTES" else flat
