"""The models that OpenAI's API may be asked for. A model's name is a deployment's."""

from __future__ import annotations

from typing import Any

import anyio
from starlette.responses import Response

from modelworks.api.openai import schemas
from modelworks.api.openai.generation import unknown_model
from modelworks.api.routes import NamePath, Routes, Use, Who, answer
from modelworks.api.services import Services
from modelworks.core.embedding import EMBEDDING, RERANK
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Caller, Deployment

routes = Routes("OpenAI", "openai")

TASKS = (GENERATION, EMBEDDING, RERANK, "text-classification")  # what this API has routes for
_PAGES = 20


@routes.get("/v1/models", "openai.models", "List models", answer=schemas.MODELS)
async def list_openai_models(services: Use, caller: Who) -> Response:
    """The deployments that this key may call here, by name."""
    found = [_model(deployment) for deployment in (await _deployments(services, caller)).values()]
    return answer({"object": "list", "data": found})


@routes.get("/v1/models/{name}", "openai.models", "Get a model", answer=schemas.MODEL)
async def get_openai_model(services: Use, caller: Who, name: NamePath) -> Response:
    """One deployment that this key may call."""
    found = (await _deployments(services, caller)).get(name)
    if found is None:
        raise unknown_model(name)
    return answer(_model(found))


async def _deployments(services: Services, caller: Caller) -> dict[str, Deployment]:
    mine = {route.name for route in services.gateway.routes(caller.principal) if route.task in TASKS}
    return await anyio.to_thread.run_sync(_rows, services, caller, mine) if mine else {}


def _rows(services: Services, caller: Caller, mine: set[str]) -> dict[str, Deployment]:
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
