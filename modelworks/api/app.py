"""The HTTP application: every dialect's routes behind the guard. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from modelworks.api import docs, errors, metrics, oip, oip_repository
from modelworks.api.events import Stopping
from modelworks.api.guard import Guard
from modelworks.api.native import access, datasets, deployments, jobs, models, predict, reports, usage
from modelworks.api.openai import chat, completions, embeddings, moderations, responses
from modelworks.api.openai import models as openai_models
from modelworks.api.routes import Routes, RouteTable
from modelworks.api.services import Services
from modelworks.core.errors import ModelworksError

ALL: tuple[Routes, ...] = (
    datasets.routes,
    jobs.training,
    jobs.jobs,
    models.evaluations,
    reports.routes,
    models.routes,
    deployments.routes,
    predict.routes,
    oip_repository.routes,  # has literal paths that oip's would match
    oip.routes,
    openai_models.routes,
    chat.routes,
    completions.routes,
    responses.routes,
    embeddings.routes,
    moderations.routes,
    access.routes,
    usage.routes,
    access.server,
    metrics.routes,
)


def create_app(services: Services) -> Guard:
    """The ASGI application. `app.table` has every route's rule, `app.inner` is the FastAPI application."""
    inner = FastAPI(
        openapi_url=None,  # docs.py serves the specification and its page
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        exception_handlers={
            ModelworksError: errors.on_modelworks_error,
            RequestValidationError: errors.on_validation_error,
            HTTPException: errors.on_http_exception,
            Exception: errors.on_unexpected,
        },
    )
    inner.state.services = services
    table = RouteTable()
    docs.mount(inner, table)
    for routes in ALL:
        routes.mount(inner, table)
    return Guard(inner, table, services)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """What every request finds in its state: `stopping`, which the protocol sets when the server begins to stop."""
    yield {"stopping": Stopping()}
