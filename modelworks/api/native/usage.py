"""GET /api/v1/usage: the calls and tokens that keys have used of deployments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.metrics import gathered
from modelworks.api.routes import Routes, Use, Who, listing
from modelworks.api.services import Services
from modelworks.core.types import Key
from modelworks.security import policy
from modelworks.serve.gather import Totals

routes = Routes("Access")

By = Annotated[Literal["key", "deployment"] | None, Query(description="the sum by that; left out: by both")]
Of = Annotated[str | None, Query(max_length=100, description="of this deployment only")]
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens", "repeated_tokens")  # as Observer.tokens has them

_INTEGER = {"type": "integer", "minimum": 0}
_LINE: dict[str, Any] = {
    "type": "object",
    "required": ["project_id", "key_id", "key", "deployment", "calls", *TOKENS],
    "properties": {
        "project_id": {"type": "string"},
        "key_id": {"type": ["string", "null"], "description": "null: all keys"},
        "key": {"type": ["string", "null"], "description": "the key's name"},
        "deployment": {"type": ["string", "null"], "description": "null: all deployments"},
        "calls": _INTEGER,
        **dict.fromkeys(TOKENS, _INTEGER),
    },
}
_EXAMPLE = {
    "project_id": "proj_0198c0f4e1b25f3a9c0d1e2f", "key_id": "key_0198c0f4e1b25f3a9c0d1e2f", "key": "scoring",
    "deployment": "smollm2-chat", "calls": 12, "prompt_tokens": 480, "completion_tokens": 310, "cached_tokens": 96,
    "repeated_tokens": 0,
}  # fmt: skip


@routes.get("/api/v1/usage", "usage.get", "Usage by key and deployment", answer=schemas.page_of(_LINE, _EXAMPLE))
async def usage(services: Use, caller: Who, by: By = None, deployment: Of = None) -> Response:
    """Calls that deployments took and tokens of language and embedding models, since the server's home was made.

    A key sees what it has used itself; an administrator's (scope keys:read) what all keys of its project have. Counts
    are those of /metrics: over all gateways, and kept over restarts.
    """
    totals = await gathered(services)
    everyone = policy.OPERATIONS["keys.list"] in caller.principal.scopes
    lines = _lines(totals, caller.project_id, None if everyone else caller.principal.key_id, by, deployment)
    names = await run_in_threadpool(_names, services, caller.project_id) if everyone else {}
    names[caller.principal.key_id] = caller.principal.key_name
    for line in lines:
        line["key"] = names.get(line["key_id"])
    return listing(lines)


def _lines(totals: Totals, project_id: str, key_id: str | None, by: str | None, only: str | None) -> list[dict[str, Any]]:
    """One a key and deployment, or their sums, in order. `key_id`: of this key alone."""
    found: dict[tuple[str | None, str | None], dict[str, Any]] = {}
    for spender in totals.calls.keys() | totals.tokens.keys():
        project, deployment, key = spender
        if project != project_id or key_id not in (None, key) or only not in (None, deployment):
            continue
        place = (None if by == "deployment" else key, None if by == "key" else deployment)
        line = found.setdefault(
            place,
            {"project_id": project, "key_id": place[0], "key": None, "deployment": place[1], "calls": 0} | dict.fromkeys(TOKENS, 0),
        )
        line["calls"] += totals.calls.get(spender, 0)
        for name, count in zip(TOKENS, totals.tokens.get(spender, [0] * len(TOKENS)), strict=True):
            line[name] += count
    return [found[place] for place in sorted(found, key=lambda place: (place[1] or "", place[0] or ""))]


def _names(services: Services, project_id: str) -> dict[str | None, str]:
    with services.catalog.read() as tx:
        return {key.id: key.name for key in tx.list(Key, project_id=project_id)}
