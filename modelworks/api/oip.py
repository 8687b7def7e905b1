"""/v2: the Open Inference Protocol, version 2, over JSON. A model's name here is a deployment's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import Path as PathParam
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.body import decode_json
from modelworks.api.calls import infer
from modelworks.api.docs import release
from modelworks.api.errors import NotImplementedHere
from modelworks.api.routes import NamePath, Routes, Use, Who, answer
from modelworks.core.errors import InvalidInput, Unavailable
from modelworks.core.tensors import BOOL_MISSING, INT64_MISSING, Tensor, element_count, pack, unpack
from modelworks.core.types import Answer, Call, Caller, TensorSpec
from modelworks.serve.checks import check_inputs
from modelworks.serve.routes import Route

routes = Routes("Open Inference Protocol", "oip")

MAX_TENSORS = 4096
MAX_RANK = 16
_TEXT = 80  # characters of a client's text that an error quotes
Version = Annotated[
    str, PathParam(pattern=r"^[1-9][0-9]{0,8}$", description="a version that the deployment serves", examples=["1"])
]

_FLOATS = frozenset({"FP16", "FP32", "FP64"})
_TAKES: dict[str, set[type]] = {"BOOL": {bool}, "BYTES": {str}, **{name: {int, float} for name in _FLOATS}}
_WORDS = {"BOOL": "true or false", "BYTES": "texts", **dict.fromkeys(_FLOATS, "numbers")}


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


_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype", "data"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "data": {"type": "array", "items": {}, "description": "flat or nested, row-major; null is a missing value"},
        "parameters": {"type": "object"},
    },
}
REQUEST = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string"},
                "parameters": {"type": "object"},
                "inputs": {"type": "array", "items": _TENSOR},
                "outputs": {
                    "type": "array",
                    "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
                },
            },
        },
        "example": {
            "id": "42",
            "inputs": [{"name": "sepal length (cm)", "shape": [1, 1], "datatype": "FP32", "data": [5.1]}],
            "outputs": [{"name": "label"}],
        },
    }
}
ANSWER = schemas.plain(
    {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": _TENSOR},
        },
    },
    {
        "model_name": "iris",
        "model_version": "1",
        "id": "42",
        "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1], "data": ["setosa"]}],
    },
)
_LIVE = schemas.plain({"type": "object", "properties": {"live": {"type": "boolean"}}}, {"live": True})
_READY = schemas.plain({"type": "object", "properties": {"ready": {"type": "boolean"}}}, {"ready": True})
_MODEL_READY = schemas.plain(
    {"type": "object", "properties": {"name": {"type": "string"}, "ready": {"type": "boolean"}}},
    {"name": "iris", "ready": True},
)
_SERVER = schemas.plain(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "version": {"type": "string"},
            "extensions": {"type": "array", "items": {"type": "string"}},
        },
    },
    {"name": "modelworks", "version": "0.1.0", "extensions": []},
)
_METADATA = schemas.plain(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string"},
            "inputs": {"type": "array", "items": {"type": "object"}},
            "outputs": {"type": "array", "items": {"type": "object"}},
        },
    },
    {
        "name": "iris",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "sepal length (cm)", "datatype": "FP32", "shape": [-1, 1]}],
        "outputs": [{"name": "label", "datatype": "BYTES", "shape": [-1]}],
    },
)


@routes.get("/v2", "oip.metadata", "Server metadata", answer=_SERVER)
async def oip_server() -> Response:
    """Name, version and the extensions that are spoken."""
    return answer({"name": "modelworks", "version": release(), "extensions": []})


@routes.get("/v2/health/live", "oip.ready", "Is the server live", answer=_LIVE)
async def oip_live() -> Response:
    """Answers when the server does."""
    return answer({"live": True})


@routes.get("/v2/health/ready", "oip.ready", "Is the server ready", answer=_READY)
async def oip_ready() -> Response:
    """The server takes calls; each model says for itself whether it is ready."""
    return answer({"ready": True})


@routes.get("/v2/models/{model}", "oip.metadata", "Model metadata", answer=_METADATA)
async def oip_model(services: Use, caller: Who, model: NamePath) -> Response:
    """The signature of what the deployment serves."""
    return answer(_metadata(services.gateway.route(caller.principal, model)))


@routes.get("/v2/models/{model}/versions/{version}", "oip.metadata", "Metadata of a version", answer=_METADATA)
async def oip_model_version(services: Use, caller: Who, model: NamePath, version: Version) -> Response:
    """404 for a version that the deployment does not serve."""
    return answer(_metadata(services.gateway.route(caller.principal, model, version)))


@routes.get("/v2/models/{model}/ready", "oip.ready", "Is a model ready", answer=_MODEL_READY)
async def oip_model_ready(services: Use, caller: Who, model: NamePath) -> Response:
    """200 when a replica can answer now, else 503."""
    return _ready(services.gateway.ready(caller.principal, model), model)


@routes.get("/v2/models/{model}/versions/{version}/ready", "oip.ready", "Is a version ready", answer=_MODEL_READY)
async def oip_model_version_ready(services: Use, caller: Who, model: NamePath, version: Version) -> Response:
    """200 when a replica can answer now, else 503."""
    return _ready(services.gateway.ready(caller.principal, model, version), model)


@routes.post(
    "/v2/models/{model}/infer",
    "oip.infer",
    "Infer",
    answer=ANSWER,
    errors=(501, 504),
    body="infer",
    request_body=REQUEST,
)
async def oip_infer(request: Request, services: Use, caller: Who, model: NamePath) -> Response:
    """Named tensors in, named tensors out; `outputs` selects among them."""
    return await _infer(request, services, caller, model, None)


@routes.post(
    "/v2/models/{model}/versions/{version}/infer",
    "oip.infer",
    "Infer with a version",
    answer=ANSWER,
    errors=(501, 504),
    body="infer",
    request_body=REQUEST,
)
async def oip_infer_version(
    request: Request, services: Use, caller: Who, model: NamePath, version: Version
) -> Response:
    """404 for a version that the deployment does not serve."""
    return await _infer(request, services, caller, model, version)


async def _infer(request: Request, services: Use, caller: Caller, model: str, version: str | None) -> Response:
    route = services.gateway.route(caller.principal, model, version)
    if "inference-header-content-length" in request.headers:
        raise NotImplementedHere("the binary tensor extension is not supported; send the tensors' data as JSON")
    body: InferBody = decode_json(await request.body(), InferBody)
    tensors = decode_inputs(route, body)
    wanted = _wanted(route, body)
    call = Call(model, tensors, services.gateway.deadline(), caller.request_id, version=version)
    found = await infer(request, services, caller, call)
    return answer(encode_answer(model, body.id, found, wanted))


# -- requests ----------------------------------------------------------------------------------------------------------


def decode_inputs(route: Route, body: InferBody) -> list[Tensor]:
    """The request's tensors, checked against the route's signature. InvalidInput names the tensor."""
    if len(body.inputs) > MAX_TENSORS:
        raise InvalidInput(f"a request has at most {MAX_TENSORS} inputs", code="too_many_inputs", param="inputs")
    specs = {spec.name: spec for spec in route.signature.inputs}
    tensors = [_tensor(specs.get(given.name), given) for given in body.inputs]
    check_inputs(route.signature, tensors)
    return tensors


def _tensor(spec: TensorSpec | None, given: InputTensor) -> Tensor:
    name = given.name[:_TEXT]
    if spec is None or given.datatype != spec.datatype:
        return Tensor(given.name, given.datatype, given.shape[:MAX_RANK], b"")  # check_inputs says what is wrong
    if given.data is None:
        raise InvalidInput(f"the input {name!r} has no `data`", code="missing_data", param=name)
    if len(given.shape) > MAX_RANK:
        raise InvalidInput(f"the input {name!r} has more than {MAX_RANK} axes", code="bad_shape", param=name)
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
        raise InvalidInput(
            f"the input {spec.name!r} has a missing value, which the model was not made to accept",
            code="missing_value",
            param=spec.name,
        )
    return [missing if value is None else value for value in flat]


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def _wanted(route: Route, body: InferBody) -> list[str]:
    """The names of the outputs to answer: those asked for, or all."""
    known = [spec.name for spec in route.signature.outputs]
    if not body.outputs:
        return known
    for output in body.outputs:
        if output.name not in known:
            raise InvalidInput(
                f"the model has no output {output.name[:_TEXT]!r}; its outputs are {', '.join(known)}",
                code="unknown_output",
                param=output.name[:_TEXT],
            )
    return list(dict.fromkeys(output.name for output in body.outputs))


# -- answers -----------------------------------------------------------------------------------------------------------


def encode_answer(model: str, id: str | None, found: Answer, wanted: list[str]) -> dict[str, Any]:
    """The protocol's answer. NaN and infinity, which JSON does not have, are null."""
    outputs = {tensor.name: tensor for tensor in found.outputs}
    body: dict[str, Any] = {"model_name": model, "model_version": found.model_version.rpartition(":")[2]}
    if id is not None:
        body["id"] = id
    body["outputs"] = [
        {"name": name, "datatype": outputs[name].datatype, "shape": outputs[name].shape, "data": _data(outputs[name])}
        for name in wanted
        if name in outputs
    ]
    return body


def _data(tensor: Tensor) -> list[Any]:
    flat = unpack(tensor)
    return [raw.decode(errors="replace") for raw in flat] if tensor.datatype == "BYTES" else flat


def _metadata(route: Route) -> dict[str, Any]:
    def described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]

    return {
        "name": route.name,
        "versions": [route.model_version.rpartition(":")[2]],
        "platform": "onnxruntime_onnx",
        "inputs": described(route.signature.inputs),
        "outputs": described(route.signature.outputs),
    }


def _ready(ready: bool, model: str) -> Response:
    if not ready:
        raise Unavailable(f"no replica of {model!r} is ready at the moment", code="not_ready", retry_after=1)
    return answer({"name": model, "ready": True})
