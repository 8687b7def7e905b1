"""/v2: the Open Inference Protocol, version 2, over HTTP. A model's name here is a deployment's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Path as PathParam
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.calls import respond
from modelworks.api.docs import release
from modelworks.api.oip_codec import HEADER_LENGTH, prepare
from modelworks.api.routes import NamePath, Routes, Use, Who, answer
from modelworks.api.texts import PARAMETERS
from modelworks.core.errors import Unavailable
from modelworks.core.types import Caller, TensorSpec
from modelworks.serve.routes import Route

routes = Routes("Open Inference Protocol", "oip")

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
Version = Annotated[
    str, PathParam(pattern=r"^[1-9][0-9]{0,8}$", description="a version that the deployment serves", examples=["1"])
]

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
                "parameters": PARAMETERS,
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
    {"name": "modelworks", "version": "0.1.0", "extensions": ["binary_tensor_data"]},
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
    return answer({"name": "modelworks", "version": release(), "extensions": EXTENSIONS})


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
    binary=True,
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
    binary=True,
    request_body=REQUEST,
)
async def oip_infer_version(
    request: Request, services: Use, caller: Who, model: NamePath, version: Version
) -> Response:
    """404 for a version that the deployment does not serve."""
    return await _infer(request, services, caller, model, version)


async def _infer(request: Request, services: Use, caller: Caller, model: str, version: str | None) -> Response:
    headers = dict(request.scope["headers"])
    prepared = prepare(
        services.gateway,
        caller.principal,
        model,
        version,
        await request.body(),
        headers.get(HEADER_LENGTH),
        caller.request_id,
    )
    return await respond(request, services, caller, prepared)


def _metadata(route: Route) -> dict[str, Any]:
    def described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]

    return {
        "name": route.name,
        "versions": [route.model_version.rpartition(":")[2]],
        "platform": route.platform,
        "inputs": described(route.signature.inputs),
        "outputs": described(route.signature.outputs),
    }


def _ready(ready: bool, model: str) -> Response:
    if not ready:
        raise Unavailable(f"no replica of {model!r} is ready at the moment", code="not_ready", retry_after=1)
    return answer({"name": model, "ready": True})
