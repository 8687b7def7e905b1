"""/api/v1/datasets: tables in immutable versions."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api import errors, schemas
from modelworks.api.body import MAX_CONTROL_VALUES, check_depth, check_values, decode_json
from modelworks.api.events import Stopping
from modelworks.api.routes import After, Limit, NamePath, Routes, Use, VersionPath, Who, accepted, answer, listing
from modelworks.api.services import Services
from modelworks.api.uploads import receive_form
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.core.types import FINAL_JOB_STATES, Caller, Job

WAIT_SECONDS = 60.0  # how long an upload waits for its ingest before it answers 202
POLL = (0.05, 0.5)

routes = Routes("Datasets")

FORM: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "description": "the dataset's name"},
        "file": {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": "CSV, TSV, Parquet, JSONL or Arrow",
        },
        "source": {
            "type": "string",
            "description": "instead of a file: sklearn:NAME, package:DIST/PATH or an https URL",
        },
        "schema": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": "JSON text of a TableSchema: corrections to what would be inferred",
        },
    },
}


@routes.post(
    "/api/v1/datasets",
    "datasets.create",
    "Upload a dataset",
    status=201,
    answer=schemas.noun("Dataset"),
    also={202: schemas.noun("Job")},
    errors=(404, 422, 504),
    body="form",
    request_body={
        "multipart/form-data": {
            "schema": FORM,
            "example": {"name": "iris", "source": "sklearn:iris", "schema": '{"columns": {"species": "category"}}'},
        }
    },
    creates=True,
)
async def create_dataset(request: Request, services: Use, caller: Who) -> Response:
    """Ingest a table: its types are inferred, it is profiled, and kept as the next version of `name`.

    The same content again answers the version that holds it. Waits for the ingest; when that takes more than a minute,
    it answers 202 with the job, whose `result` names the dataset when it has succeeded.
    """
    async with receive_form(request, services.settings.home_path / "tmp") as form:
        form.only("name", "source", "schema")
        name, source = form.require("name"), form.fields.get("source") or None
        if (form.path is None) == (source is None):
            raise InvalidInput("send either a `file` or a `source`", param="file")
        schema = _schema(form.fields.get("schema"))
        job = await anyio.to_thread.run_sync(
            lambda: services.library.upload_dataset(
                caller, name=name, path=form.path, source=source, filename=form.filename, schema=schema
            )
        )
    job = await finished(request, services, caller, job)
    if job.status not in FINAL_JOB_STATES:
        return accepted(job.public(), f"/api/v1/jobs/{job.id}")
    if job.status != "succeeded":
        raise errors.from_job(job.error)
    reference = str(job.result["dataset"])
    dataset = await anyio.to_thread.run_sync(lambda: services.library.dataset(caller, reference))
    where = f"/api/v1/datasets/{dataset.name}/versions/{dataset.version}"
    return answer(dataset.public(), 201, {"location": where})


@routes.get("/api/v1/datasets", "datasets.list", "List datasets", answer=schemas.page("Dataset"))
def list_datasets(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """The newest version of each, newest first."""
    found = services.library.datasets(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@routes.get("/api/v1/datasets/{name}", "datasets.get", "Get a dataset", answer=schemas.noun("Dataset", versions=[1, 2]))
def get_dataset(services: Use, caller: Who, name: NamePath) -> Response:
    """The newest version, and the numbers of all of them in `versions`."""
    versions = services.library.dataset_versions(caller, name)
    newest = max(versions, key=lambda item: item.version)
    return answer({**newest.public(), "versions": sorted(item.version for item in versions)})


@routes.get(
    "/api/v1/datasets/{name}/versions/{version}", "datasets.get", "Get a version", answer=schemas.noun("Dataset")
)
def get_dataset_version(services: Use, caller: Who, name: NamePath, version: VersionPath) -> Response:
    """One version with its columns, its profile and its warnings."""
    return answer(services.library.dataset(caller, f"{name}:{version}").public())


def _schema(text: str | None) -> TableSchema:
    """The form field `schema`: JSON text."""
    if not text:
        return TableSchema()
    try:
        check_depth(text.encode())
        check_values(text.encode(), MAX_CONTROL_VALUES)
        return TableSchema.model_validate(decode_json(text.encode()))
    except ValidationError as error:
        found = errors.invalid([{**item, "loc": ("body", "schema", *item["loc"])} for item in error.errors()])
        raise found from None
    except InvalidInput as error:
        raise InvalidInput(f"the form field `schema`: {error.message}", param="schema") from None


async def finished(request: Request, services: Services, caller: Caller, job: Job) -> Job:
    """The job once it is final, or as it is after a minute or when the server stops. No thread waits meanwhile."""
    loop = asyncio.get_running_loop()
    until = loop.time() + WAIT_SECONDS
    pause = POLL[0]
    stopping = request.scope["state"].get("stopping") or Stopping()
    while job.status not in FINAL_JOB_STATES and loop.time() < until:
        if await stopping.wait(pause):
            break
        pause = min(pause * 1.5, POLL[1])
        job = await anyio.to_thread.run_sync(services.library.job, caller, job.id)
    return job
