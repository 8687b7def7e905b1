"""inference.GRPCInferenceService: the Open Inference Protocol, version 2. A model's name here is a deployment's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from time import monotonic
from typing import Any

from modelworks.api import oip_repository as repository
from modelworks.api.docs import release
from modelworks.api.errors import NotImplementedHere, problem
from modelworks.api.grpc import quick
from modelworks.api.grpc.door import Door, Rpc
from modelworks.api.grpc.messages import fill, message, parse
from modelworks.api.grpc.tensors import check, decode, encode, encode_raw, wanted
from modelworks.api.intake import SMALL
from modelworks.api.texts import parameters
from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Answer, Call
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ["model_configuration", "model_repository", "statistics"]
MAX_PIPELINED = 64  # requests of one stream that are under way at a time
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

_Request = message("inference.ModelInferRequest")
_StreamResponse = message("inference.ModelStreamInferResponse")
_Response = message("inference.ModelInferResponse")


def mount(door: Door) -> None:
    door.add(
        SERVICE,
        {
            "ServerLive": ("oip.ready", server_live),
            "ServerReady": ("oip.ready", server_ready),
            "ModelReady": ("oip.ready", model_ready),
            "ServerMetadata": ("oip.metadata", server_metadata),
            "ModelMetadata": ("oip.metadata", model_metadata),
            "ModelConfig": ("oip.metadata", model_config),
            "ModelStatistics": ("oip.metadata", model_statistics),
            "RepositoryIndex": ("oip.metadata", repository_index),
            "RepositoryModelLoad": ("oip.metadata", repository_load),
            "RepositoryModelUnload": ("oip.metadata", repository_unload),
            "ModelInfer": ("oip.infer", infer),
            "ModelStreamInfer": ("oip.infer", stream_infer),
        },
    )
    door.register(replace(door.methods[f"/{SERVICE}/ModelInfer"], request=None))  # it reads the bytes itself


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
    return kind(name=route.name, versions=versions, platform=route.platform, **described)


async def model_config(rpc: Rpc, request: Any) -> Any:
    """Triton's form of the signature. max_batch_size 0: each shape is given whole, the first axis included."""
    config = repository.configuration(_route(rpc, request.name, request.version))
    return fill(message("inference.ModelConfigResponse"), {"config": config})


async def model_statistics(rpc: Rpc, request: Any) -> Any:
    """Of one model, or of all that the key may call: calls, failures and nanoseconds, over all gateways."""
    gateway = rpc.services.gateway
    asked = [_route(rpc, request.name, request.version)] if request.name else gateway.routes(rpc.principal)
    found = await repository.statistics(rpc.services, asked)
    return fill(message("inference.ModelStatisticsResponse"), {"model_stats": found})


async def repository_index(rpc: Rpc, request: Any) -> Any:
    """The deployments that the key may call."""
    found = repository.repository_index(rpc.services, rpc.caller, ready_only=request.ready)
    return fill(message("inference.RepositoryIndexResponse"), {"models": found})


async def repository_load(rpc: Rpc, request: Any) -> Any:
    """Nothing is to be done for a deployment that is ready; NOT_FOUND where there is none, UNAVAILABLE while it is not."""
    _no_parameters(request)
    repository.load(rpc.services, rpc.caller, request.model_name)
    return message("inference.RepositoryModelLoadResponse")()


async def repository_unload(rpc: Rpc, request: Any) -> Any:
    """UNIMPLEMENTED, with what to do in its place; NOT_FOUND where there is no such deployment."""
    repository.unload(rpc.services, rpc.caller, request.model_name)
    raise AssertionError("unload always refuses")


def _no_parameters(request: Any) -> None:
    for name in request.parameters:
        if name != "unload_dependents":
            raise InvalidInput(
                f"the parameter {name[:80]!r} is not taken: deployments decide what is loaded", param="parameters"
            )


# -- inference ---------------------------------------------------------------------------------------------------------


async def infer(rpc: Rpc, data: bytes) -> bytes:
    """Named tensors in, named tensors out. A cancelled call is aborted in the replica too."""
    found: bytes = await rpc.in_turn(_infer, data)
    return found


async def _infer(rpc: Rpc, data: bytes) -> bytes:
    plain = quick.read(data)
    if plain is None:
        return await _infer_request(rpc, data)
    name, version, form = plain.model, _version(plain.version), plain.form
    route = rpc.services.gateway.route(rpc.principal, name, version)
    if route.task == GENERATION:  # it has several forms of input
        return await _infer_request(rpc, data)
    if form is None or form.fits is not route.signature:
        check(route, plain.tensors, plain.kind)
        plain.fits(data, route.signature)
    call = Call(name, plain.tensors, rpc.deadline(route), rpc.request_id, version=version, kind=plain.kind)
    found = await rpc.infer(call)
    return encode_raw(name, plain.id, found.model_version, found.outputs)


async def _infer_request(rpc: Rpc, data: bytes) -> bytes:
    request = parse(_Request, data)
    call, names = _call(rpc, request)
    return encode(request.model_name, request, await rpc.infer(call), names)


def _call(rpc: Rpc, request: Any) -> tuple[Call, list[str] | None]:
    name, version = request.model_name, _version(request.model_version)
    route = rpc.services.gateway.route(rpc.principal, name, version)
    if request.parameters and "sequence_id" in request.parameters and _is_sequence(request.parameters["sequence_id"]):
        raise NotImplementedHere("sequences are not supported; send each request by itself")
    tensors = decode(route, request)
    given = {
        key: getattr(one, one.WhichOneof("parameter_choice") or "bool_param") for key, one in request.parameters.items()
    }
    params = parameters(route, given, strict=False)
    return Call(name, tensors, rpc.deadline(route), rpc.request_id, params, version=version), wanted(route, request)


def _is_sequence(parameter: Any) -> bool:
    return bool(getattr(parameter, parameter.WhichOneof("parameter_choice") or "int64_param"))


async def stream_infer(rpc: Rpc, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Requests run as they come, answers leave in the order of the requests; an error ends its request, not the stream."""
    lines: asyncio.Queue[_Line | Exception | None] = asyncio.Queue(MAX_PIPELINED)
    under_way: set[_Line] = set()
    shares = rpc.services.shares

    async def read() -> None:
        counted = True  # the first request was, when the stream began
        try:
            async for request in requests:
                line = _Line(rpc, request)
                shares.crowded(rpc.principal.key_id, monotonic())
                under_way.add(line)
                if not counted:
                    await line.admit()
                counted = False
                await shares.pace(rpc.principal.key_id, fresh=True)
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
            line.end()
    finally:
        reader.cancel()
        for line in under_way:
            line.end()


class _Line:
    """One request of a stream, from its arrival to its last answer."""

    def __init__(self, rpc: Rpc, request: Any) -> None:
        self._rpc = rpc
        self._request = request
        self._arrived: asyncio.Queue[Part | ModelworksError] = asyncio.Queue()
        self._pending: Any = None
        self._names: list[str] | None = None
        self._refused = False
        self._intake = rpc.services.intake(monotonic())
        if (size := request.ByteSize()) > SMALL:
            try:
                self._intake.hold(size)
            except ModelworksError as error:
                self._refuse(error)

    async def admit(self) -> None:
        try:
            await self._rpc.admit_again("oip.infer")
        except ModelworksError as error:
            if error.status in (401, 403):  # the stream itself is not theirs any more
                raise
            if not self._refused:
                self._refuse(error)

    def begin(self) -> None:
        if self._refused:
            return
        try:
            call, self._names = _call(self._rpc, self._request)
            call.stream = True
            self._rpc.hint(call)
            self._pending = self._rpc.services.gateway.submit(
                self._rpc.principal, call, self._arrived.put_nowait, manual=True
            )
        except ModelworksError as error:
            self._refuse(error)

    def _refuse(self, error: ModelworksError) -> None:
        self._refused = True
        self._arrived.put_nowait(error)

    def end(self) -> None:
        """It was answered, or nobody waits for it any more."""
        self._intake.close()
        if self._pending is not None:
            self._rpc.services.gateway.abort(self._pending)

    async def responses(self) -> AsyncIterator[Any]:
        asked = self._request.parameters
        empty_final = (
            "triton_enable_empty_final_response" in asked and asked["triton_enable_empty_final_response"].bool_param
        )
        while True:
            item = await self._arrived.get()
            await self._rpc.services.shares.pace(self._rpc.principal.key_id)
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
