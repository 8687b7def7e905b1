"""/api/v1/models: versions, aliases, import and export; /api/v1/evaluations and /api/v1/reports."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import Query
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from modelworks.api import schemas
from modelworks.api.body import check_depth, decode_json
from modelworks.api.native.datasets import DELETED
from modelworks.api.routes import (
    After,
    AliasPath,
    IdPath,
    Limit,
    NamePath,
    Routes,
    Use,
    VersionPath,
    Who,
    accepted,
    answer,
    listing,
)
from modelworks.api.uploads import receive_form
from modelworks.api.waiting import outcome
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import AliasSpec, EvaluationSpec
from modelworks.core.types import Job

routes = Routes("Models")
evaluations = Routes("Evaluations")

MAX_CLASSES = 100_000
ModelName = Annotated[str | None, Query(max_length=100, description="only those of this model")]
FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "file": {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": "an ONNX or GGUF model or LoRA adapter, a ZIP of a model's folder (config.json, safetensors, "
            "tokenizer.json), or a package that was exported from Modelworks",
        },
        "source": {"type": "string", "description": "in place of the file: `package:DIST/PATH` or an https URL"},
        "task": {"type": "string", "description": "such as tabular-classification or image-embedding; needed for a bare ONNX model"},
        "classes": {
            "type": "string",
            "description": "JSON list of the class labels, in the order of the probabilities",
        },
        "licence": {"type": "string"},
        "convert": {
            "type": "string",
            "enum": ["q8_0"],
            "description": "for GGUF: write weights of fewer bits anew in 8, which the faster engines read",
        },
    },
}
MODEL = schemas.plain(
    {
        "type": "object",
        "required": ["name", "versions", "aliases"],
        "properties": {
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"$ref": "#/components/schemas/ModelVersion"}},
            "aliases": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
    },
    {"name": "iris", "versions": [schemas.EXAMPLES["ModelVersion"]], "aliases": {"champion": 1}},
)
DELETED_ALIAS = schemas.plain(
    {"type": "object", "properties": {"deleted": {"type": "boolean"}}}, {"deleted": True, "id": "champion"}
)


@routes.get("/api/v1/models", "models.list", "List models", answer=schemas.page("ModelVersion"))
def list_models(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """The newest version of each model, newest first."""
    found = services.library.models(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@routes.get("/api/v1/models/{name}", "models.get", "Get a model", answer=MODEL)
def get_model(services: Use, caller: Who, name: NamePath) -> Response:
    """All its versions and its aliases."""
    versions = services.library.model_versions(caller, name)
    aliases = {item.alias: item.version for item in services.library.aliases(caller, name)}
    return answer({"name": name, "versions": [item.public() for item in versions], "aliases": aliases})


@routes.get(
    "/api/v1/models/{name}/versions/{version}", "models.get", "Get a model version", answer=schemas.noun("ModelVersion")
)
def get_model_version(services: Use, caller: Who, name: NamePath, version: VersionPath) -> Response:
    """Its signature, digest, metrics and lineage."""
    return answer(services.library.model_version(caller, f"{name}:{version}").public())


@routes.post(
    "/api/v1/models/{name}/versions",
    "models.create_version",
    "Upload a model version",
    status=201,
    answer=schemas.noun("ModelVersion"),
    also={202: schemas.noun("Job")},
    errors=(422,),
    body="form",
    request_body={
        "multipart/form-data": {
            "schema": FORM,
            "example": {"task": "tabular-classification", "classes": '["setosa", "versicolor", "virginica"]'},
        }
    },
    creates=True,
)
async def create_model_version(request: Request, services: Use, caller: Who, name: NamePath) -> Response:
    """A model of your own (ONNX or GGUF), or a package exported elsewhere: checked in a process of its own, then registered.

    When that takes longer than a minute, it answers 202 with the job.
    """
    async with receive_form(request, services.settings.home_path / "tmp") as form:
        form.only("task", "classes", "licence", "source", "convert")
        source = form.fields.get("source") or None
        if (form.path is None) == (source is None):
            raise InvalidInput("send the model as the form field `file`, or name its `source`", param="file")
        path, classes = form.path, _classes(form.fields.get("classes"))
        job = await anyio.to_thread.run_sync(
            lambda: services.library.import_version(
                caller,
                name=name,
                path=path,
                source=source,
                filename=form.filename,
                task=form.fields.get("task") or None,
                classes=classes,
                licence=form.fields.get("licence") or None,
                convert=form.fields.get("convert") or None,
            )
        )

    async def registered(job: Job) -> Response:
        version = await anyio.to_thread.run_sync(services.library.model_version, caller, str(job.model_version))
        where = f"/api/v1/models/{version.name}/versions/{version.version}"
        return answer(version.public(), 201, {"location": where})

    return await outcome(request, services, caller, job, registered)


@routes.post(
    "/api/v1/models/{name}/versions/{version}/measurements",
    "models.create_measurement",
    "Measure a language model's engines",
    status=202,
    answer=schemas.noun("Job"),
    errors=(404,),
    creates=True,
)
def measure_model_version(services: Use, caller: Who, name: NamePath, version: VersionPath) -> Response:
    """A job whose result tells, for each engine that runs the model here, tokens a second and the time to the first
    token, for one call and for many. Deployments with `engine: auto` that start afterwards take the fastest for many.
    """
    job = services.library.measure(caller, f"{name}:{version}")
    return accepted(job.public(), f"/api/v1/jobs/{job.id}")


@routes.delete("/api/v1/models/{name}", "models.delete", "Delete a model", answer=DELETED, errors=(409,))
def delete_model(services: Use, caller: Who, name: NamePath) -> Response:
    """All its versions. 409, and nothing is deleted, while an alias, a deployment or a job uses one."""
    gone = services.library.delete_model(caller, name)
    return answer({"deleted": True, "name": name, "versions": gone})


@routes.delete(
    "/api/v1/models/{name}/versions/{version}",
    "models.delete",
    "Delete a model version",
    answer=DELETED,
    errors=(409,),
)
def delete_model_version(services: Use, caller: Who, name: NamePath, version: VersionPath) -> Response:
    """One version; its number is never given again and its reports stay. 409 while something uses it, which it names."""
    gone = services.library.delete_model(caller, name, version)
    return answer({"deleted": True, "name": name, "versions": gone})


@routes.get(
    "/api/v1/models/{name}/versions/{version}/export",
    "models.export",
    "Export a model version",
    answer=schemas.plain({"type": "string", "format": "binary"}, "the package's bytes", "application/octet-stream"),
)
def export_model_version(services: Use, caller: Who, name: NamePath, version: VersionPath) -> Response:
    """The package as one file, which another Modelworks imports by `POST /api/v1/models/{name}/versions`."""
    parent = services.settings.home_path / "tmp"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = Path(tempfile.mkdtemp(prefix="export-", dir=parent))
    remove = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
    try:
        path = services.library.export_version(caller, f"{name}:{version}", folder / f"{name}-{version}.mwpkg")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return FileResponse(
        path, media_type="application/octet-stream", filename=f"{name}-{version}{path.suffix}", background=remove
    )


@routes.put(
    "/api/v1/models/{name}/aliases/{alias}",
    "models.set_alias",
    "Set an alias",
    answer=schemas.noun("Alias"),
    body="json",
    request={"version": 1},
)
def set_alias(services: Use, caller: Who, name: NamePath, alias: AliasPath, spec: AliasSpec) -> Response:
    """Point `name@alias` at a version. Deployments keep the version they resolved until they are put again."""
    return answer(services.library.set_alias(caller, name, alias, spec.version).public())


@routes.delete("/api/v1/models/{name}/aliases/{alias}", "models.delete_alias", "Delete an alias", answer=DELETED_ALIAS)
def delete_alias(services: Use, caller: Who, name: NamePath, alias: AliasPath) -> Response:
    """The version itself stays."""
    services.library.delete_alias(caller, name, alias)
    return answer({"id": alias, "deleted": True})


def _classes(text: str | None) -> list[Any] | None:
    """The form field `classes`: a JSON list of texts or numbers."""
    if not text:
        return None
    try:
        check_depth(text.encode(), 2)
        found = decode_json(text.encode())
    except InvalidInput as error:
        raise InvalidInput(f"the form field `classes`: {error.message}", param="classes") from None
    if not isinstance(found, list) or not 0 < len(found) <= MAX_CLASSES:
        raise InvalidInput("`classes` must be a JSON list of class labels", param="classes")
    if not all(isinstance(item, (str, int, float)) for item in found):
        raise InvalidInput("`classes` must hold texts or numbers only", param="classes")
    return found


# -- evaluations -------------------------------------------------------------------------------------------------------


@evaluations.post(
    "/api/v1/evaluations",
    "evaluations.create",
    "Evaluate a model",
    status=202,
    answer=schemas.noun("Job"),
    errors=(404, 422),
    body="json",
    request={"model": "iris:1", "method": {"kfold": 5}, "metrics": ["accuracy", "log_loss"], "seed": 0},
    creates=True,
)
def create_evaluation(services: Use, caller: Who, spec: EvaluationSpec) -> Response:
    """Queue an evaluation. Its `metrics`, when done, have mean, deviation, a 95 % interval and the folds.

    With `predictions` in place of a method, what any model said, in a dataset's columns or in `predictions.rows`, is
    scored against the truth beside it: `{"model": "theirs", "dataset": "answers", "predictions": {"task":
    "classification", "reference": "label", "prediction": "said"}}`.
    """
    job = services.library.evaluate(caller, spec)
    return accepted(job.public(), f"/api/v1/evaluations/{job.id}")


@evaluations.get("/api/v1/evaluations", "evaluations.list", "List evaluations", answer=schemas.page("Job"))
def list_evaluations(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """Newest first."""
    found = services.library.jobs(caller, kind="evaluate", limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@evaluations.get("/api/v1/evaluations/{id}", "evaluations.get", "Get an evaluation", answer=schemas.noun("Job"))
def get_evaluation(services: Use, caller: Who, id: IdPath) -> Response:
    """The job; `result` names its report when it has succeeded."""
    from modelworks.api.native.jobs import find_job

    return answer(find_job(services, caller, id, "evaluate").public())


@evaluations.get("/api/v1/reports", "evaluations.list", "List reports", answer=schemas.page("Report"))
def list_reports(
    services: Use, caller: Who, model: ModelName = None, limit: Limit = 20, after: After = None
) -> Response:
    """Of trainings and evaluations, newest first."""
    found = services.library.reports(caller, model=model, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@evaluations.get("/api/v1/reports/{id}", "evaluations.get", "Get a report", answer=schemas.noun("Report"))
def get_report(services: Use, caller: Who, id: IdPath) -> Response:
    """Every metric with its folds; the confusion matrix or the residuals, the comparison and the gates in `details`."""
    return answer(services.library.report(caller, id).public())
