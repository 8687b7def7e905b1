"""/v2's extensions about models: the repository's index, a model's configuration and its statistics.

What is loaded follows from deployments: asking to load a model succeeds when it serves, unloading is not for here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.errors import NotImplementedHere
from modelworks.api.metrics import gathered
from modelworks.api.oip import Version
from modelworks.api.routes import NamePath, Routes, Use, Who, answer
from modelworks.api.services import Services
from modelworks.core.errors import Unavailable
from modelworks.core.types import Caller, TensorSpec
from modelworks.serve.figures import Tally
from modelworks.serve.routes import Route

routes = Routes("Open Inference Protocol", "oip")

# the protocol's datatypes as a configuration writes them
_TYPES = {"BYTES": "TYPE_STRING"}
_INDEX = schemas.plain(
    {"type": "array", "items": {"type": "object"}},
    [{"name": "iris", "version": "1", "state": "READY", "reason": ""}],
)
_CONFIG = schemas.plain(
    {"type": "object"},
    {
        "name": "iris",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": [{"name": "sepal length (cm)", "data_type": "TYPE_FP32", "dims": [-1, 1]}],
        "output": [{"name": "label", "data_type": "TYPE_STRING", "dims": [-1]}],
    },
)
_STATS = schemas.plain(
    {"type": "object"},
    {
        "model_stats": [
            {
                "name": "iris",
                "version": "1",
                "inference_count": 2,
                "inference_stats": {"success": {"count": 2, "ns": 900000}, "fail": {"count": 0, "ns": 0}},
            }
        ]
    },
)
_LOADED = schemas.plain({"type": "object"}, {})


class IndexBody(BaseModel):
    """`ready`: only the models that can answer now."""

    model_config = ConfigDict(extra="forbid", strict=True)
    ready: bool = False


class LoadBody(BaseModel):
    """Of the protocol's parameters only `unload_dependents` may be given, and nothing depends on a deployment."""

    model_config = ConfigDict(extra="forbid", strict=True)
    parameters: dict[Literal["unload_dependents"], bool] = {}


@routes.post(
    "/v2/repository/index", "oip.metadata", "Index of the models", answer=_INDEX, body="json", request={"ready": True}
)
async def oip_index(services: Use, caller: Who, body: IndexBody | None = None) -> Response:
    """The deployments that the key may call. `{"ready": true}` asks for those that can answer now."""
    return answer(repository_index(services, caller, ready_only=body is not None and body.ready))


@routes.post(
    "/v2/repository/models/{model}/load",
    "oip.metadata",
    "Load a model",
    answer=_LOADED,
    body="json",
    request={"parameters": {"unload_dependents": False}},
)
async def oip_load(services: Use, caller: Who, model: NamePath, body: LoadBody | None = None) -> Response:
    """Nothing is to be done for a deployment that is ready; 404 where there is none, 503 while it is not ready."""
    load(services, caller, model)
    return answer({})


@routes.post(
    "/v2/repository/models/{model}/unload",
    "oip.metadata",
    "Unload a model",
    answer=_LOADED,
    body="json",
    request={"parameters": {"unload_dependents": False}},
    errors=(501,),
)
async def oip_unload(services: Use, caller: Who, model: NamePath, body: LoadBody | None = None) -> Response:
    """501: a deployment is taken away by DELETE /api/v1/deployments/{name}."""
    unload(services, caller, model)
    return answer({})


@routes.get("/v2/models/stats", "oip.metadata", "Statistics of all models", answer=_STATS)
async def oip_all_stats(services: Use, caller: Who) -> Response:
    """Of all deployments that the key may call."""
    return answer({"model_stats": await statistics(services, services.gateway.routes(caller.principal))})


@routes.get("/v2/models/{model}/config", "oip.metadata", "Configuration of a model", answer=_CONFIG)
async def oip_config(services: Use, caller: Who, model: NamePath) -> Response:
    """The signature in the form of a model configuration."""
    return answer(configuration(services.gateway.route(caller.principal, model)))


@routes.get(
    "/v2/models/{model}/versions/{version}/config", "oip.metadata", "Configuration of a version", answer=_CONFIG
)
async def oip_version_config(services: Use, caller: Who, model: NamePath, version: Version) -> Response:
    """404 for a version that the deployment does not serve."""
    return answer(configuration(services.gateway.route(caller.principal, model, version)))


@routes.get("/v2/models/{model}/stats", "oip.metadata", "Statistics of a model", answer=_STATS)
async def oip_stats(services: Use, caller: Who, model: NamePath) -> Response:
    """Calls, failures and times since the home was made, over all gateways."""
    return answer({"model_stats": await statistics(services, [services.gateway.route(caller.principal, model)])})


@routes.get("/v2/models/{model}/versions/{version}/stats", "oip.metadata", "Statistics of a version", answer=_STATS)
async def oip_version_stats(services: Use, caller: Who, model: NamePath, version: Version) -> Response:
    """404 for a version that the deployment does not serve."""
    route = services.gateway.route(caller.principal, model, version)
    return answer({"model_stats": await statistics(services, [route])})


# -- what gRPC answers too ---------------------------------------------------------------------------------------------


def repository_index(services: Services, caller: Caller, *, ready_only: bool = False) -> list[dict[str, str]]:
    """name, version, state (READY, UNAVAILABLE) and reason of each deployment that the caller may call."""
    found = []
    for route in services.gateway.routes(caller.principal):
        ready = services.gateway.ready(caller.principal, route.name)
        if ready or not ready_only:
            state = ("READY", "") if ready else ("UNAVAILABLE", "no replica is ready at the moment")
            found.append({"name": route.name, "version": _version(route), "state": state[0], "reason": state[1]})
    return found


def load(services: Services, caller: Caller, model: str) -> None:
    """Raise NotFound or Unavailable unless the deployment is loaded already."""
    if not services.gateway.ready(caller.principal, model):
        raise Unavailable(f"no replica of {model!r} is ready yet; deployments load by themselves", retry_after=1.0)


def unload(services: Services, caller: Caller, model: str) -> None:
    """NotFound, or NotImplementedHere with what to do in its place."""
    services.gateway.route(caller.principal, model)
    raise NotImplementedHere(
        f"models are not unloaded over this protocol; DELETE /api/v1/deployments/{model} takes the deployment away"
    )


def configuration(route: Route) -> dict[str, Any]:
    def described(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {"name": spec.name, "data_type": _TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"), "dims": spec.shape}
            for spec in specs
        ]

    return {
        "name": route.name,
        "platform": route.platform,
        "backend": route.platform.rpartition("_")[0],
        "max_batch_size": 0,  # dims have the batch's axis
        "version_policy": {"specific": {"versions": [int(_version(route))]}},
        "input": described(route.signature.inputs),
        "output": described(route.signature.outputs),
    }


async def statistics(services: Services, asked: list[Route]) -> list[dict[str, Any]]:
    """Of each route, over all gateways: counts, and nanoseconds in total, waiting and in the model."""
    totals = await gathered(services)
    found = []
    for route in asked:
        tally = totals.tallies.get((route.project_id, route.name, route.model_version), Tally())
        good, failed = tally.answered, sum(tally.failed.values())
        spent, queued, ran, _ = (int(histogram.total * 1e9) for histogram in tally.histograms())
        found.append(
            {
                "name": route.name,
                "version": _version(route),
                "inference_count": good,
                "inference_stats": {
                    "success": {"count": good, "ns": spent},  # of all calls: times are not kept apart by outcome
                    "fail": {"count": failed, "ns": 0},
                    "queue": {"count": good, "ns": queued},
                    "compute_infer": {"count": good, "ns": ran},
                },
            }
        )
    return found


def _version(route: Route) -> str:
    return route.model_version.rpartition(":")[2]
