"""The public routes: /health, the specification, and Swagger UI from this machine's own files under a strict CSP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from modelworks.api import schemas
from modelworks.api.errors import no_route
from modelworks.api.routes import RouteTable, Rule, answer
from modelworks.core.errors import MissingExtra

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HTML_HEADERS = {
    "content-security-policy": CSP,
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_START = """\
window.addEventListener("load", function () {
  window.ui = SwaggerUIBundle({
    url: "/openapi.json", dom_id: "#swagger-ui", layout: "BaseLayout", deepLinking: true, validatorUrl: null,
    docExpansion: "list", defaultModelsExpandDepth: 0, tryItOutEnabled: true,
    presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
  });
});
"""
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Modelworks API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
DESCRIPTION = """\
Data in, endpoint out: datasets, training, evaluation, packaging, deployment and prediction.

**Credentials.** Every call but `/health` and these pages needs `Authorization: Bearer KEY`. An administrator's key acts
in another project when the header `x-project` names it.

**References.** `name`, `name:version` or `name@alias`. A bare name means the newest version at the moment of the call.

**Long work** answers 202 with the job or the deployment itself and its address in `Location`.

**Creates** take an `Idempotency-Key`. **Lists** page by `limit` and `after`; `has_more` says whether to go on.

**Errors** are RFC 9457 problem details with `code` (for programs), `param` (the field) and `request_id`, which stands
also in the header `x-request-id` of every answer; `/v2` answers `{"error": "..."}` as the Open Inference Protocol asks.
"""
_TAGS = [
    {"name": "Datasets", "description": "tables, profiled and kept in immutable versions"},
    {"name": "Training", "description": "training jobs, algorithms, transforms and metrics"},
    {"name": "Jobs", "description": "everything that takes long, of all kinds"},
    {"name": "Evaluations", "description": "evaluations and their reports"},
    {"name": "Models", "description": "model versions, aliases, import and export"},
    {"name": "Deployments", "description": "what should be serving, and predictions"},
    {"name": "Open Inference Protocol", "description": "version 2, over JSON"},
    {"name": "OpenAI", "description": "chat completions and models, as OpenAI's clients expect them"},
    {"name": "Access", "description": "keys, projects, users and the audit trail"},
    {"name": "Server", "description": "its health and its state"},
]


def mount(app: FastAPI, table: RouteTable) -> None:
    """Add the public routes."""
    app.router.add_api_route(
        "/health",
        health,
        methods=["GET"],
        summary="Whether the server answers",
        tags=["Server"],
        operation_id="health",
        response_class=Response,
        responses={
            200: {
                "description": "OK",
                "content": schemas.plain(
                    {"type": "object", "properties": {"status": {"const": "ok"}, "version": {"type": "string"}}},
                    {"status": "ok", "version": "0.1.0"},
                ),
            }
        },
    )
    public = Rule(None)
    table.add("GET", "/health", public)
    pages: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/openapi.json": _openapi,
        "/docs": _page,
        "/docs/start.js": _start,
        "/docs/{asset}": _asset,
    }
    for path, endpoint in pages.items():
        app.router.add_route(path, endpoint, methods=["GET"], include_in_schema=False)
        table.add("GET", path, public)
    app.openapi = lambda: specification(app)  # type: ignore[method-assign]


async def health() -> Response:
    """Needs no key. Says only that the server is up; `GET /api/v1/status` says more."""
    return answer({"status": "ok", "version": release()})


@lru_cache(1)
def release() -> str:
    try:
        return version("modelworks")
    except PackageNotFoundError:
        return "0"


def specification(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title="Modelworks", version=release(), description=DESCRIPTION, routes=app.routes, tags=_TAGS
        )
        for route in app.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                for method in route.methods or ():
                    # as declared: FastAPI drops what is null in examples and adds a 422 that is a 400 here
                    responses = {str(status): response for status, response in route.responses.items()}
                    document["paths"][route.path][method.lower()]["responses"] = responses
        components = document.setdefault("components", {})
        derived = {name: schema for name, schema in components.get("schemas", {}).items() if "Validation" not in name}
        components["schemas"] = {**derived, **schemas.components()}
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "an API key, such as mw_..."}
        }
        app.openapi_schema = document
    return app.openapi_schema


async def _openapi(request: Request) -> Response:
    return answer(specification(request.app), headers={"cache-control": "no-cache"})


async def _page(request: Request) -> Response:
    return Response(_PAGE, headers=HTML_HEADERS, media_type="text/html")


async def _start(request: Request) -> Response:
    return Response(_START, headers={"cache-control": "no-cache"}, media_type="text/javascript")


async def _asset(request: Request) -> Response:
    name = request.path_params["asset"]
    if name not in _ASSETS:
        raise no_route(request.url.path)
    return FileResponse(_swagger() / name, media_type=_ASSETS[name], headers={"cache-control": "public, max-age=86400"})


@lru_cache(1)
def _swagger() -> Path:
    """The folder with Swagger UI's files, which the package fastapi-standalone-docs carries. It is not imported."""
    spec = find_spec("fastapi_standalone_docs")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("Swagger UI's files are missing; pip install fastapi-standalone-docs")
    return Path(next(iter(spec.submodule_search_locations))) / "static" / "swagger"
