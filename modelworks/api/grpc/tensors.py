"""Inference messages and tensors: raw and typed contents in, the same form out. Written for speed on the raw way."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from modelworks.api.errors import NotImplementedHere
from modelworks.api.grpc.messages import message, varint
from modelworks.api.texts import TEXT_INPUTS, settle_text
from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import GENERATION
from modelworks.core.tensors import DATATYPES, Tensor, element_count, pack, unpack
from modelworks.core.types import Answer, Signature
from modelworks.serve.checks import Shape
from modelworks.serve.columns import Kind, kind_of
from modelworks.serve.routes import Route

MAX_TENSORS = 4096
MAX_RANK = 16
_TEXT = 80  # characters of a client's text that an error quotes

Response = message("inference.ModelInferResponse")

_SMALL = {"BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents"}
CONTENTS: dict[str, str] = {  # datatype -> the field of InferTensorContents; FP16 and BF16 have none
    **_SMALL,
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def decode(route: Route, request: Any) -> list[Tensor]:
    """The request's tensors, checked against the route's signature. InvalidInput names the tensor."""
    inputs, raw = request.inputs, request.raw_input_contents
    if len(inputs) > MAX_TENSORS:
        raise InvalidInput(f"a request has at most {MAX_TENSORS} inputs", code="too_many_inputs", param="inputs")
    if raw and len(raw) != len(inputs):
        raise InvalidInput(
            f"raw_input_contents has {len(raw)} parts for {len(inputs)} inputs; send one for each, or none",
            code="bad_tensor",
            param="raw_input_contents",
        )
    tensors = []
    for index, given in enumerate(inputs):
        shape = list(given.shape)
        if len(shape) > MAX_RANK:
            raise InvalidInput(
                f"{given.name[:_TEXT]!r} has more than {MAX_RANK} axes", code="bad_shape", param="inputs"
            )
        if given.parameters and "shared_memory_region" in given.parameters:
            raise NotImplementedHere("shared memory regions are not supported; send the tensor's data in the request")
        if not raw:
            tensors.append(_typed(given, shape))
        elif given.HasField("contents"):
            raise InvalidInput(
                f"{given.name[:_TEXT]!r} has contents and raw_input_contents; send one of them",
                code="bad_tensor",
                param=given.name[:_TEXT],
            )
        else:
            tensors.append(Tensor(given.name, given.datatype, shape, raw[index]))
    if route.task == GENERATION:
        settle_text(tensors)
        _shape(TEXT_INPUTS, kind_of(tensors)).read(tensors)
    else:
        check(route, tensors, kind_of(tensors))
    return tensors


def check(route: Route, tensors: list[Tensor], kind: Kind) -> None:
    """InvalidInput unless the tensors, of this kind, fit the route's signature."""
    _shape(route.signature, kind).read(tensors)


def _typed(given: Any, shape: list[int]) -> Tensor:
    name, datatype = given.name, given.datatype
    field = CONTENTS.get(datatype)
    if field is None:
        known = datatype in DATATYPES
        words = (
            f"{datatype} has no typed contents; send it in raw_input_contents" if known else "there is no such datatype"
        )
        raise InvalidInput(f"{name[:_TEXT]!r}: {words}", code="bad_datatype", param=name[:_TEXT])
    values = getattr(given.contents, field)
    if len(values) != element_count(shape):
        raise InvalidInput(
            f"{name[:_TEXT]!r} has {len(values)} values in {field} but its shape {shape} asks for {element_count(shape)}",
            code="bad_shape",
            param=name[:_TEXT],
        )
    return pack(name, datatype, shape, values)


_shapes: dict[tuple[int, Any], tuple[Any, Shape]] = {}


def _shape(signature: Signature, kind: Kind) -> Shape:
    """The check of this kind of call against a signature, made once."""
    key = (id(signature), kind)
    known = _shapes.get(key)
    if known is None:
        if len(_shapes) >= 1024:
            _shapes.clear()
        known = _shapes[key] = (signature, Shape(signature.inputs, kind))  # kept, so the id stays its own
    return known[1]


def wanted(route: Route, request: Any) -> list[str] | None:
    """The names of the outputs asked for, in order; None: all."""
    if not request.outputs:
        return None
    known = [spec.name for spec in route.signature.outputs]
    names: dict[str, None] = {}
    for output in request.outputs:
        if output.name not in known:
            raise InvalidInput(
                f"the model has no output {output.name[:_TEXT]!r}; its outputs are {', '.join(known)}",
                code="unknown_output",
                param=output.name[:_TEXT],
            )
        if output.parameters and "shared_memory_region" in output.parameters:
            raise NotImplementedHere("shared memory regions are not supported; read the tensor from the answer")
        if (
            output.parameters
            and output.parameters.get("classification") is not None
            and "classification" in output.parameters
        ):
            raise NotImplementedHere("the classification extension is not supported; ask for the output itself")
        names[output.name] = None
    return list(names)


def encode(model: str, request: Any, found: Answer, names: list[str] | None) -> bytes:
    """The answer as bytes: raw contents, or typed ones when the request's were (and every datatype has that form)."""
    outputs = found.outputs
    if names is not None:
        by_name = {tensor.name: tensor for tensor in outputs}
        outputs = [by_name[name] for name in names if name in by_name]
    if request.inputs and not request.raw_input_contents and all(tensor.datatype in CONTENTS for tensor in outputs):
        return _encode_typed(model, request.id, found, outputs)
    return encode_raw(model, request.id, found.model_version, outputs)


def encode_raw(model: str, id: str, model_version: str, outputs: list[Tensor]) -> bytes:
    """The answer with raw contents."""
    parts = [_head(model, model_version)]
    if id:
        parts += _part(b"\x1a", id.encode())
    parts += [_output(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in outputs]
    for tensor in outputs:
        parts += _part(b"\x32", tensor.data)
    return b"".join(parts)


def _encode_typed(model: str, id: str, found: Answer, outputs: list[Tensor]) -> bytes:
    response = Response(model_name=model, model_version=_version(found.model_version), id=id)
    for tensor in outputs:
        out = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        getattr(out.contents, CONTENTS[tensor.datatype]).extend(unpack(tensor))
    data = response.SerializeToString()
    assert isinstance(data, bytes)
    return data


# the few fields of ModelInferResponse that the raw way writes, as bytes: tag (field << 3 | 2), length, content


@lru_cache(1024)
def _head(model: str, model_version: str) -> bytes:
    return b"".join([*_part(b"\x0a", model.encode()), *_part(b"\x12", _version(model_version).encode())])


@lru_cache(4096)
def _output(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    sizes = b"".join(varint(size) for size in shape)
    packed = _part(b"\x1a", sizes) if shape else []
    body = b"".join([*_part(b"\x0a", name.encode()), *_part(b"\x12", datatype.encode()), *packed])
    return b"".join(_part(b"\x2a", body))


def _part(tag: bytes, content: bytes) -> list[bytes]:
    return [tag, varint(len(content)), content]


def _version(model_version: str) -> str:
    return model_version.rpartition(":")[2]
