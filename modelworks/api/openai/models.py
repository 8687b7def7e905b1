"""The models that OpenAI's API may be asked for. A model's name is a deployment's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

import anyio
from fastapi import Path as PathParam
from starlette.responses import Response

from modelworks.api.openai import schemas
from modelworks.api.openai.generation import unknown_model
from modelworks.api.routes import Routes, Use, Who, answer
from modelworks.api.services import Services
from modelworks.core.embedding import EMBEDDING, RERANK
from modelworks.core.specs import NAME_PATTERN
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Caller, Deployment

routes = Routes("OpenAI", "openai")

TASKS = (GENERATION, EMBEDDING, RERANK, "text-classification")  # what this API has routes for
_PAGES = 20
ModelPath = Annotated[
    str,
    PathParam(
        pattern=NAME_PATTERN.removesuffix("$") + r"(:[A-Za-z0-9][A-Za-z0-9._-]{0,99})?$",
        description="a deployment's name, or DEPLOYMENT:ADAPTER",
        examples=["smollm2-chat"],
    ),
]


@routes.get("/v1/models", "openai.models", "List models", answer=schemas.MODELS)
async def list_openai_models(services: Use, caller: Who) -> Response:
    """The deployments that this key may call here, by name, each followed by its LoRA adapters as DEPLOYMENT:ADAPTER."""
    return answer({"object": "list", "data": list((await _models(services, caller)).values())})


@routes.get("/v1/models/{name}", "openai.models", "Get a model", answer=schemas.MODEL)
async def get_openai_model(services: Use, caller: Who, name: ModelPath) -> Response:
    """One deployment that this key may call, or one of its adapters."""
    found = (await _models(services, caller)).get(name)
    if found is None:
        raise unknown_model(name)
    return answer(found)


async def _models(services: Services, caller: Caller) -> dict[str, dict[str, Any]]:
    mine = {route.name: route for route in services.gateway.routes(caller.principal) if route.task in TASKS}
    if not mine:
        return {}
    found = {}
    for name, deployment in (await anyio.to_thread.run_sync(_rows, services, caller, mine)).items():
        found[name] = model = _model(deployment)
        for adapter, version in sorted(mine[name].adapters.items()):
            id = f"{name}:{adapter}"
            found[id] = {**model, "id": id, "owned_by": version, "parent": name}
    return found


def _rows(services: Services, caller: Caller, mine: Collection[str]) -> dict[str, Deployment]:
    found: dict[str, Deployment] = {}
    after: str | None = None
    for _ in range(_PAGES):
        page = services.deployments.list(caller, limit=100, after=after)
        found.update({item.name: item for item in page.items if item.name in mine})
        if not page.has_more:
            break
        after = page.items[-1].id
    return dict(sorted(found.items()))


def _model(deployment: Deployment) -> dict[str, Any]:
    return {
        "id": deployment.name,
        "object": "model",
        "created": int(deployment.created_at),
        "owned_by": deployment.model_version,
        "task": deployment.task,
    }
