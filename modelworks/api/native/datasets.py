"""/api/v1/datasets: tables in immutable versions."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
from fastapi import Query
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api import errors, schemas
from modelworks.api.body import MAX_CONTROL_VALUES, check_depth, check_values, decode_json
from modelworks.api.routes import After, Limit, NamePath, Routes, Use, VersionPath, Who, answer, listing
from modelworks.api.services import Services
from modelworks.api.uploads import receive_form
from modelworks.api.waiting import outcome
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdits, TableSchema
from modelworks.core.types import Caller, Job

routes = Routes("Datasets")

FORM: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "description": "the dataset's name"},
        "file": {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": "CSV, TSV, Parquet, JSONL or Arrow; or a zip or tar of images (PNG, JPEG, WebP, BMP), sounds "
            "(WAV, FLAC, MP3, Ogg) or texts in one folder a class",
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


FromVersion = Annotated[
    int | None, Query(alias="from", ge=1, lt=10**9, description="by default the version before `to`", examples=[1])
]
ToVersion = Annotated[int | None, Query(ge=1, lt=10**9, description="by default the newest version", examples=[2])]
Key = Annotated[str | None, Query(max_length=1000, description="the column that tells rows apart")]
Force = Annotated[bool, Query(description="delete it although a model was trained on it")]
DELETED = schemas.plain(
    {
        "type": "object",
        "required": ["deleted", "name", "versions"],
        "properties": {
            "deleted": {"type": "boolean"},
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "integer"}},
        },
    },
    {"deleted": True, "name": "iris", "versions": [1]},
)
_PAIR = {"type": "object", "properties": {"from": {}, "to": {}}}
_ROWS = {"type": "array", "items": {"type": "object"}, "description": "at most 20, with their row numbers; files by digest"}
DIFF = schemas.plain(
    {
        "type": "object",
        "required": ["name", "from", "to", "key", "rows", "columns", "distributions", "samples"],
        "properties": {
            "name": {"type": "string"},
            "from": {"type": "integer"},
            "to": {"type": "integer"},
            "key": {"type": ["string", "null"]},
            "rows": {
                "type": "object",
                "description": "counts: from, to, added, removed, changed (null without a key), unchanged",
                "additionalProperties": {"type": ["integer", "null"]},
            },
            "columns": {
                "type": "object",
                "properties": {
                    "added": {"type": "array", "items": {"type": "object"}},
                    "removed": {"type": "array", "items": {"type": "object"}},
                    "changed": {"type": "array", "items": {"type": "object"}, "description": "name, and type from and to"},
                },
            },
            "changed_values": {"type": "object", "description": "with a key: by column, how many rows changed in it"},
            "distributions": {
                "type": "array",
                "description": "of each column that both versions have",
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "type": {"type": "string"},
                        "psi": {"type": ["number", "null"], "description": "population stability index"},
                        "ks": {"type": ["number", "null"], "description": "Kolmogorov-Smirnov statistic"},
                        "moved": {"type": "boolean"},
                        "missing": _PAIR,
                        "mean": _PAIR,
                        "range": _PAIR,
                    },
                },
            },
            "samples": {"type": "object", "properties": {"added": _ROWS, "removed": _ROWS, "changed": _ROWS}},
        },
    },
    {
        "name": "iris",
        "from": 1,
        "to": 2,
        "key": None,
        "rows": {"from": 150, "to": 149, "added": 2, "removed": 3, "changed": None, "unchanged": 147},
        "columns": {"added": [], "removed": [], "changed": []},
        "distributions": [
            {"name": "species", "type": "category", "missing": {"from": 0, "to": 0}, "psi": 0.0009, "ks": None, "moved": False}
        ],
        "samples": {"added": [], "removed": [{"row": 7, "values": {"species": "setosa"}}]},
    },
)


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

    An archive of files in one folder a class becomes the columns `image` (`audio`, `text`) and `label`; a table in the
    archive may name its files instead. A file that cannot be decoded is an error, or with `on_corrupt: "skip"` in the
    schema left out and counted.

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
    return await _made(request, services, caller, job)


async def _made(request: Request, services: Services, caller: Caller, job: Job) -> Response:
    """The dataset version that the job makes, once it has; after a minute the job."""

    async def version(job: Job) -> Response:
        dataset = await anyio.to_thread.run_sync(services.library.dataset, caller, str(job.result["dataset"]))
        where = f"/api/v1/datasets/{dataset.name}/versions/{dataset.version}"
        return answer(dataset.public(), 201, {"location": where})

    return await outcome(request, services, caller, job, version)


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


@routes.get(
    "/api/v1/datasets/{name}/diff",
    "datasets.diff",
    "Compare two versions",
    answer=DIFF,
    also={202: schemas.noun("Job")},
    errors=(404, 422),
)
async def diff_dataset(
    request: Request,
    services: Use,
    caller: Who,
    name: NamePath,
    from_: FromVersion = None,
    to: ToVersion = None,
    key: Key = None,
) -> Response:
    """Which rows and columns changed between two versions, and how the values' distributions moved.

    Rows are compared by their whole content, or by the column `key`, whose values are then all different. Waits for the
    comparison; when that takes more than a minute, it answers 202 with the job, and the same call again goes on waiting.
    """
    job = await anyio.to_thread.run_sync(lambda: services.library.diff_datasets(caller, name, from_, to, key))

    async def told(job: Job) -> Response:
        return answer(job.result)

    return await outcome(request, services, caller, job, told)


@routes.post(
    "/api/v1/datasets/{name}/edits",
    "datasets.edit",
    "Edit a dataset",
    status=201,
    answer=schemas.noun("Dataset"),
    also={202: schemas.noun("Job")},
    errors=(404, 422, 504),
    body="json",
    request={
        "edits": [
            {"op": "set", "column": "species", "value": "setosa", "rows": [3, 17]},
            {"op": "split", "shares": {"train": 0.8, "test": 0.2}, "stratify": "species"},
        ]
    },
    creates=True,
)
async def edit_dataset(request: Request, services: Use, caller: Who, name: NamePath, body: DatasetEdits) -> Response:
    """Correct labels, drop rows, rename columns, or put rows into splits: a new version, the old one stays as it is.

    Edits run in order, all or none. An edit that matches no row is an error.
    """
    job = await anyio.to_thread.run_sync(lambda: services.library.edit_dataset(caller, name, body))
    return await _made(request, services, caller, job)


@routes.delete("/api/v1/datasets/{name}", "datasets.delete", "Delete a dataset", answer=DELETED, errors=(409,))
def delete_dataset(services: Use, caller: Who, name: NamePath, force: Force = False) -> Response:
    """All its versions. 409 when a job works on one, or, without `force`, when a model was trained on one."""
    gone = services.library.delete_dataset(caller, name, force=force)
    return answer({"deleted": True, "name": name, "versions": gone})


@routes.delete(
    "/api/v1/datasets/{name}/versions/{version}", "datasets.delete", "Delete a version", answer=DELETED, errors=(409,)
)
def delete_dataset_version(
    services: Use, caller: Who, name: NamePath, version: VersionPath, force: Force = False
) -> Response:
    """One version; its number is never given again. 409 as for all versions."""
    gone = services.library.delete_dataset(caller, name, version, force=force)
    return answer({"deleted": True, "name": name, "versions": gone})


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
