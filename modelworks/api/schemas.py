"""What /openapi.json says beyond what FastAPI derives: nouns without their hidden fields, lists, errors, examples."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from modelworks.api.examples import Example, example
from modelworks.core import types

NOUNS: tuple[type[types.Noun], ...] = (
    types.Alias,
    types.AuditRecord,
    types.Dataset,
    types.Deployment,
    types.DeploymentRevision,
    types.Job,
    types.JobEvent,
    types.Key,
    types.Membership,
    types.ModelVersion,
    types.Project,
    types.Replica,
    types.Report,
    types.User,
)
Content = dict[str, Any]

PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457 problem details",
    "required": ["type", "title", "status", "detail", "code", "param", "request_id"],
    "properties": {
        "type": {"type": "string", "description": "a URN that ends with the code"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "one sentence that says what to do next"},
        "code": {"type": "string", "description": "for programs; stable"},
        "param": {"type": ["string", "null"], "description": "the field that is at fault, as a dotted path"},
        "request_id": {"type": "string", "description": "also in the header x-request-id; the server's log has it"},
        "errors": {
            "type": "array",
            "description": "when several fields are at fault",
            "items": {
                "type": "object",
                "properties": {
                    "param": {"type": "string"},
                    "message": {"type": "string"},
                    "code": {"type": "string"},
                },
            },
        },
    },
}
OIP_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "OipError",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
OPENAI_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "OpenAIError",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def json_content(schema: dict[str, Any], example: Any) -> Content:
    return {"application/json": {"schema": schema, "example": example}}


def noun(name: str, **extra: Any) -> Content:
    """The noun `name` as the API answers it; `extra` are fields that this answer has beside it."""
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{name}"}
    if extra:
        schema = {"allOf": [schema, {"type": "object", "properties": {field: {} for field in extra}}]}
    return json_content(schema, {**EXAMPLES[name], **extra})


def page(name: str) -> Content:
    """A page of the noun `name`."""
    return page_of({"$ref": f"#/components/schemas/{name}"}, EXAMPLES[name])


def page_of(items: dict[str, Any], example: Any) -> Content:
    schema = {
        "type": "object",
        "required": ["object", "data", "first_id", "last_id", "has_more"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": items},
            "first_id": {"type": ["string", "null"]},
            "last_id": {"type": ["string", "null"], "description": "give it as `after` to get the next page"},
            "has_more": {"type": "boolean"},
        },
    }
    identity = example.get("id")
    return json_content(
        schema, {"object": "list", "data": [example], "first_id": identity, "last_id": identity, "has_more": False}
    )


def plain(schema: dict[str, Any], example: Any, media: str = "application/json") -> Content:
    return {media: {"schema": schema, "example": example}}


def responses(
    dialect: str, good: dict[int, Content], errors: Iterable[int], operation: str
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation: its good answers and each error as it answers it, in the dialect's form."""
    found: dict[int | str, dict[str, Any]] = {}
    for status, content in good.items():
        found[status] = {"description": HTTPStatus(status).phrase, "content": content, **_location(status)}
    for status in sorted(errors):
        content = _error(dialect, status, example(operation, status))
        found[status] = {"description": HTTPStatus(status).phrase, "content": content}
    return found


def _location(status: int) -> dict[str, Any]:
    if status != HTTPStatus.ACCEPTED:
        return {}
    described = {"description": "where to see how it goes on", "schema": {"type": "string"}}
    return {"headers": {"Location": described}}


def _error(dialect: str, status: int, found: Example) -> Content:
    code, sentence, param = found
    if dialect == "oip":
        return plain({"$ref": "#/components/schemas/OipError"}, {"error": sentence})
    if dialect == "openai":
        kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        body = {"message": sentence, "type": kind, "param": param, "code": code}
        return plain({"$ref": "#/components/schemas/OpenAIError"}, {"error": body})
    problem = {
        "type": f"urn:modelworks:error:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": sentence,
        "code": code,
        "param": param,
        "request_id": "req_5f3a9c0d1e2f4a6b",
    }
    return plain({"$ref": "#/components/schemas/Problem"}, problem, "application/problem+json")


def extra(request: Any, request_body: dict[str, Any] | None, *, creates: bool) -> dict[str, Any]:
    """The part of an operation that FastAPI does not derive: the key it needs, the body's example, Idempotency-Key."""
    found: dict[str, Any] = {"security": [{"key": []}]}
    if request_body is not None:
        found["requestBody"] = {"required": True, "content": request_body}
    elif request is not None:
        found["requestBody"] = {"content": {"application/json": {"example": request}}}
    if creates:
        found["parameters"] = [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "sent twice within 24 hours: with the same body the first answer comes again, else 422",
                "schema": {"type": "string", "maxLength": 255},
            }
        ]
    return found


def components() -> dict[str, Any]:
    """The schemas of the nouns, without what never leaves the server, and of the errors."""
    found: dict[str, Any] = {
        "Problem": PROBLEM_SCHEMA,
        "OipError": OIP_ERROR_SCHEMA,
        "OpenAIError": OPENAI_ERROR_SCHEMA,
    }
    for cls in NOUNS:
        schema = cls.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        found.update(schema.pop("$defs", {}))
        for hidden in cls.HIDDEN:
            schema["properties"].pop(hidden, None)
        schema["required"] = [name for name in schema.get("required", []) if name not in cls.HIDDEN]
        found[cls.__name__] = schema
    return found


# -- examples ----------------------------------------------------------------------------------------------------------

_WHEN = 1790000000.0
_COLUMNS = [
    {"name": "sepal length (cm)", "type": "number", "nullable": False},
    {"name": "species", "type": "category", "nullable": False},
]
_SIGNATURE = {
    "inputs": [
        {"name": "sepal length (cm)", "datatype": "FP32", "shape": [-1, 1], "column": "number", "nullable": False}
    ],
    "outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [-1], "column": None, "nullable": False},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3], "column": None, "nullable": False},
    ],
}
_METRICS = {"accuracy": {"mean": 0.96, "std": 0.02, "low": 0.93, "high": 0.98, "folds": [0.97, 0.93, 1.0, 0.97, 0.93]}}


def _example(prefix: str, **fields: Any) -> dict[str, Any]:
    return {"id": f"{prefix}_0198c0f4e1b25f3a9c0d1e2f", "revision": 1, "created_at": _WHEN, **fields}


_OWNED = {"project_id": "proj_0198c0f4e1b25f3a9c0d1e2f"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "Alias": _example("alias", **_OWNED, model="iris", alias="champion", version=1),
    "AuditRecord": _example(
        "aud",
        **_OWNED,
        principal="key_0198c0f4e1b25f3a9c0d1e2f",
        action="deployments.put",
        object="iris",
        request_id="req_5f3a9c0d1e2f4a6b",
        detail={"model_version": "iris:1"},
    ),
    "Dataset": _example(
        "ds",
        **_OWNED,
        name="iris",
        version=1,
        digest="9f86d081884c7d65...",
        rows=150,
        size=4312,
        columns=_COLUMNS,
        profile={"rows": 150},
        warnings=[],
        source="sklearn:iris",
        created_by="key_0198c0f4e1b25f3a9c0d1e2f",
    ),
    "Deployment": _example(
        "dep",
        **_OWNED,
        name="iris",
        spec={"model": "iris@champion", "replicas": {"min": 1, "max": None}},
        spec_revision=1,
        model_version="iris:1",
        model_version_id="mv_0198c0f4e1b25f3a9c0d1e2f",
        digest="9f86d081884c7d65...",
        task="tabular-classification",
        signature=_SIGNATURE,
        status="ready",
        message="",
        ready_replicas=1,
        created_by="key_0198c0f4e1b25f3a9c0d1e2f",
    ),
    "DeploymentRevision": _example(
        "drev",
        **_OWNED,
        deployment_id="dep_0198c0f4e1b25f3a9c0d1e2f",
        number=1,
        spec={"model": "iris@champion"},
        model_version="iris:1",
        created_by="key_0198c0f4e1b25f3a9c0d1e2f",
    ),
    "Job": _example(
        "job",
        **_OWNED,
        kind="train",
        spec={"model": "iris", "dataset": "iris:1", "target": "species"},
        status="running",
        progress=0.4,
        stage="fold 3 of 5",
        attempt=1,
        metrics={},
        result={},
        error=None,
        model_version=None,
        started_at=_WHEN,
        finished_at=None,
        created_by="key_0198c0f4e1b25f3a9c0d1e2f",
    ),
    "JobEvent": _example(
        "ev",
        job_id="job_0198c0f4e1b25f3a9c0d1e2f",
        seq=7,
        kind="fold",
        message="fold 3 of 5: accuracy 0.967",
        data={"accuracy": 0.967},
    ),
    "Key": _example(
        "key",
        **_OWNED,
        name="laptop",
        role="developer",
        hint="Qx4z",
        user_id=None,
        scopes=None,
        models=None,
        requests_per_minute=600,
        expires_at=None,
        revoked_at=None,
    ),
    "Membership": _example("mem", **_OWNED, user_id="user_0198c0f4e1b25f3a9c0d1e2f", role="developer"),
    "ModelVersion": _example(
        "mv",
        **_OWNED,
        name="iris",
        version=1,
        digest="9f86d081884c7d65...",
        task="tabular-classification",
        signature=_SIGNATURE,
        classes=["setosa", "versicolor", "virginica"],
        algorithm="logistic-regression",
        size=2841,
        metrics=_METRICS,
        lineage={"dataset": "iris:1", "seed": 0},
        licence=None,
        report_id="rep_0198c0f4e1b25f3a9c0d1e2f",
        job_id="job_0198c0f4e1b25f3a9c0d1e2f",
        created_by="key_0198c0f4e1b25f3a9c0d1e2f",
    ),
    "Project": _example("proj", name="default"),
    "Replica": _example(
        "rpl",
        **_OWNED,
        deployment_id="dep_0198c0f4e1b25f3a9c0d1e2f",
        spec_revision=1,
        model_version="iris:1",
        status="ready",
        message="",
        ready_at=_WHEN,
    ),
    "Report": _example(
        "rep",
        **_OWNED,
        job_id="job_0198c0f4e1b25f3a9c0d1e2f",
        model="iris:1",
        model_version="mv_0198c0f4e1b25f3a9c0d1e2f",
        dataset="iris:1",
        dataset_digest="9f86d081884c7d65...",
        method={"kfold": 5},
        metrics=_METRICS,
        details={},
        seed=0,
    ),
    "User": _example("user", name="ada@example.org", disabled=False),
}
