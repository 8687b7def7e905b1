"""inference.GRPCInferenceService: the Open Inference Protocol, version 2. A model's name here is a deployment's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

from modelworks.api.docs import release
from modelworks.api.errors import NotImplementedHere, problem
from modelworks.api.grpc.door import Door, Rpc, unsupported
from modelworks.api.grpc.messages import message
from modelworks.api.grpc.tensors import decode, encode, wanted
from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.types import Answer, Call
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ["model_configuration", "model_repository"]
MAX_PIPELINED = 64  # requests of one stream that are under way at a time
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

_Request = message("inference.ModelInferRequest")
_StreamResponse = message("inference.ModelStreamInferResponse")
_Response = message("inference.ModelInferResponse")


def mount(door: Door) -> None:
    load = unsupported("models are loaded by a deployment; put one with modelworks.v1.Deployment or the REST API")
    unload = unsupported(
        "models are unloaded with their deployment; delete it with modelworks.v1.Deployment or the REST API"
    )
    statistics = unsupported("statistics over gRPC are not supported; GET /metrics has them")
    door.add(
        SERVICE,
        {
            "ServerLive": ("oip.ready", server_live),
            "ServerReady": ("oip.ready", server_ready),
            "ModelReady": ("oip.ready", model_ready),
            "ServerMetadata": ("oip.metadata", server_metadata),
            "ModelMetadata": ("oip.metadata", model_metadata),
            "ModelConfig": ("oip.metadata", model_config),
            "ModelStatistics": ("oip.metadata", statistics),
            "RepositoryIndex": ("oip.metadata", repository_index),
            "RepositoryModelLoad": ("oip.metadata", load),
            "RepositoryModelUnload": ("oip.metadata", unload),
            "ModelInfer": ("oip.infer", infer),
            "ModelStreamInfer": ("oip.infer", stream_infer),
        },
    )


# -- what is there -----------------------------------------------------------------------------------------------------


async def server_live(rpc: Rpc, request: Any) -> Any:
    return message("inference.ServerLiveResponse")(live=True)


async def server_ready(rpc: Rpc, request: Any) -> Any:
    return message("inference.ServerReadyResponse")(ready=True)


async def model_ready(rpc: Rpc, request: Any) -> Any:
    """Whether a replica can answer now; NOT_FOUND for a model or version that is not served."""
    ready = rpc.services.gateway.ready(rpc.principal, request.name, _version(request.version))
    return message("inference.ModelReadyResponse")(ready=ready)


async def server_metadata(rpc: Rpc, request: Any) -> Any:
    return message("inference.ServerMetadataResponse")(name="modelworks", version=release(), extensions=EXTENSIONS)


async def model_metadata(rpc: Rpc, request: Any) -> Any:
    route = _route(rpc, request.name, request.version)
    described = {
        side: [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
        for side, specs in (("inputs", route.signature.inputs), ("outputs", route.signature.outputs))
    }
    versions = [route.model_version.rpartition(":")[2]]
    kind = message("inference.ModelMetadataResponse")
    return kind(name=route.name, versions=versions, platform="onnxruntime_onnx", **described)


async def model_config(rpc: Rpc, request: Any) -> Any:
    """Triton's form of the signature. max_batch_size 0: each shape is given whole, the first axis included."""
    route = _route(rpc, request.name, request.version)
    tensors = {
        side: [{"name": spec.name, "data_type": _data_type(spec.datatype), "dims": spec.shape} for spec in specs]
        for side, specs in (("input", route.signature.inputs), ("output", route.signature.outputs))
    }
    config = message("inference.ModelConfig")(
        name=route.name, platform="onnxruntime_onnx", backend="onnxruntime", max_batch_size=0, **tensors
    )
    return message("inference.ModelConfigResponse")(config=config)


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


async def repository_index(rpc: Rpc, request: Any) -> Any:
    """The deployments that the key may call."""
    response = message("inference.RepositoryIndexResponse")()
    for route in rpc.services.gateway.routes(rpc.principal):
        ready = rpc.services.gateway.ready(rpc.principal, route.name)
        if ready or not request.ready:
            version = route.model_version.rpartition(":")[2]
            state, reason = ("READY", "") if ready else ("UNAVAILABLE", "no replica is ready")
            response.models.add(name=route.name, version=version, state=state, reason=reason)
    return response


# -- inference ---------------------------------------------------------------------------------------------------------


async def infer(rpc: Rpc, request: Any) -> bytes:
    """Named tensors in, named tensors out. A cancelled call is aborted in the replica too."""
    call, names = _call(rpc, request)
    found = await rpc.infer(call)
    return encode(request.model_name, request, found, names)


def _call(rpc: Rpc, request: Any) -> tuple[Call, list[str] | None]:
    name, version = request.model_name, _version(request.model_version)
    route = rpc.services.gateway.route(rpc.principal, name, version)
    if request.parameters and "sequence_id" in request.parameters and _is_sequence(request.parameters["sequence_id"]):
        raise NotImplementedHere("sequences are not supported; send each request by itself")
    tensors = decode(route, request)
    return Call(name, tensors, rpc.deadline(), rpc.request_id, version=version), wanted(route, request)


def _is_sequence(parameter: Any) -> bool:
    return bool(getattr(parameter, parameter.WhichOneof("parameter_choice") or "int64_param"))


async def stream_infer(rpc: Rpc, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Requests run as they come, answers leave in the order of the requests; an error ends its request, not the stream."""
    lines: asyncio.Queue[_Line | Exception | None] = asyncio.Queue(MAX_PIPELINED)
    under_way: set[_Line] = set()

    async def read() -> None:
        counted = True  # the first request was, when the stream began
        try:
            async for request in requests:
                line = _Line(rpc, request)
                under_way.add(line)
                if not counted:
                    await line.admit()
                counted = False
                line.begin()
                await lines.put(line)
        except ModelworksError as error:
            await lines.put(error)
        else:
            await lines.put(None)

    reader = asyncio.ensure_future(read())
    try:
        while (line := await lines.get()) is not None:
            if isinstance(line, Exception):
                raise line
            async for response in line.responses():
                yield response
            under_way.discard(line)
    finally:
        reader.cancel()
        for line in under_way:
            line.abort()


class _Line:
    """One request of a stream, from its arrival to its last answer."""

    def __init__(self, rpc: Rpc, request: Any) -> None:
        self._rpc = rpc
        self._request = request
        self._arrived: asyncio.Queue[Part | ModelworksError] = asyncio.Queue()
        self._pending: Any = None
        self._names: list[str] | None = None
        self._refused = False

    async def admit(self) -> None:
        try:
            await self._rpc.admit_again("oip.infer")
        except ModelworksError as error:
            if error.status in (401, 403):  # the stream itself is not theirs any more
                raise
            self._refuse(error)

    def begin(self) -> None:
        if self._refused:
            return
        try:
            call, self._names = _call(self._rpc, self._request)
            call.stream = True
            self._pending = self._rpc.services.gateway.submit(
                self._rpc.principal, call, self._arrived.put_nowait, manual=True
            )
        except ModelworksError as error:
            self._refuse(error)

    def _refuse(self, error: ModelworksError) -> None:
        self._refused = True
        self._arrived.put_nowait(error)

    def abort(self) -> None:
        if self._pending is not None:
            self._rpc.services.gateway.abort(self._pending)

    async def responses(self) -> AsyncIterator[Any]:
        asked = self._request.parameters
        empty_final = (
            "triton_enable_empty_final_response" in asked and asked["triton_enable_empty_final_response"].bool_param
        )
        while True:
            item = await self._arrived.get()
            if isinstance(item, ModelworksError):
                text = str(problem(item, self._rpc.request_id)["detail"])
                failed = _Response(model_name=self._request.model_name[:100], id=self._request.id)
                yield _StreamResponse(error_message=text, infer_response=failed)
                return
            if item.outputs or (item.done and not empty_final):
                answer = Answer(item.outputs, item.model_version)
                response = _Response.FromString(encode(self._request.model_name, self._request, answer, self._names))
                if item.done and empty_final:
                    response.parameters["triton_final_response"].bool_param = True
                yield _StreamResponse(infer_response=response)
            elif item.done:
                response = _Response(model_name=self._request.model_name, id=self._request.id)
                response.parameters["triton_final_response"].bool_param = True
                yield _StreamResponse(infer_response=response)
            if item.done:
                return
            self._rpc.services.gateway.took(self._pending)  # it has left, so that a slow client slows the model


def _route(rpc: Rpc, name: str, version: str) -> Route:
    return rpc.services.gateway.route(rpc.principal, name, _version(version))


def _version(text: str) -> str | None:
    """A model version of a request; empty: whichever is served."""
    if not text:
        return None
    if not _VERSION.fullmatch(text):
        raise InvalidInput(f"{text[:20]!r} is not a version; versions are 1, 2, 3...", param="version")
    return text
