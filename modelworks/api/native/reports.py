"""/api/v1/reports/{id}/page and plots: a report for people. Made by a job when it is first asked for, then kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import anyio
from fastapi import Path as PathParam
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.routes import IdPath, Routes, Use, Who, listing
from modelworks.api.services import Services
from modelworks.api.waiting import outcome
from modelworks.core.types import Caller, Job

routes = Routes("Evaluations")

PlotPath = Annotated[str, PathParam(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", description="the figure", examples=["roc"])]
HTML = schemas.plain({"type": "string"}, "<!doctype html>...", "text/html; charset=utf-8")
PNG = schemas.plain({"type": "string", "format": "binary"}, "the image's bytes", "image/png")
PLOTS = schemas.page_of(
    {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "title": {"type": "string"}}},
    {"name": "confusion-matrix", "title": "Confusion matrix"},
)
# the page is shown as a document of nobody's: whatever it held could not act in the name of this server
SEALED = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox",
    "cache-control": "private, no-store",
}


@routes.get(
    "/api/v1/reports/{id}/page",
    "evaluations.get",
    "Get a report as a page",
    answer=HTML,
    also={202: schemas.noun("Job")},
    errors=(422,),
)
async def get_report_page(request: Request, services: Use, caller: Who, id: IdPath) -> Response:
    """One HTML page with its figures inside and nothing from elsewhere. The first call waits until a job has made it; when
    that takes more than a minute, it answers 202 with the job.
    """

    async def page(job: Job) -> Response:
        data = await anyio.to_thread.run_sync(services.library.rendering, caller, job)
        return Response(data, headers=SEALED, media_type="text/html")

    return await _rendered(request, services, caller, id, page)


@routes.get(
    "/api/v1/reports/{id}/plots",
    "evaluations.get",
    "List a report's figures",
    answer=PLOTS,
    also={202: schemas.noun("Job")},
    errors=(422,),
)
async def list_report_plots(request: Request, services: Use, caller: Who, id: IdPath) -> Response:
    """What there is depends on the task: confusion matrix, ROC, precision and recall, calibration, predicted against true,
    residuals, forecast, learning curve, folds, slices.
    """

    async def plots(job: Job) -> Response:
        return listing([{"name": one["name"], "title": one["title"]} for one in job.result["plots"]])

    return await _rendered(request, services, caller, id, plots)


@routes.get(
    "/api/v1/reports/{id}/plots/{name}",
    "evaluations.get",
    "Get a report's figure",
    answer=PNG,
    also={202: schemas.noun("Job")},
    errors=(422,),
)
async def get_report_plot(request: Request, services: Use, caller: Who, id: IdPath, name: PlotPath) -> Response:
    """As PNG."""

    async def plot(job: Job) -> Response:
        data = await anyio.to_thread.run_sync(services.library.rendering, caller, job, name)
        return Response(data, headers=SEALED, media_type="image/png")

    return await _rendered(request, services, caller, id, plot)


async def _rendered(
    request: Request, services: Services, caller: Caller, report_id: str, made: Callable[[Job], Awaitable[Response]]
) -> Response:
    job = await anyio.to_thread.run_sync(services.library.render_report, caller, report_id)
    return await outcome(request, services, caller, job, made)
