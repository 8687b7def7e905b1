"""/api/v1/deployments: what should be serving."""

from __future__ import annotations

from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from modelworks.api import schemas
from modelworks.api.routes import After, Limit, NamePath, Routes, Use, Who, accepted, answer, listing
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.specs import Spec

routes = Routes("Deployments")

EXAMPLE = {"model": "iris@champion", "replicas": {"min": 1, "max": 4}}


class Rollback(Spec):
    """Where to go back to."""

    revision: int | None = Field(
        None, ge=1, le=2**31 - 1, description="the revision's number; by default the one before"
    )


@routes.put(
    "/api/v1/deployments/{name}",
    "deployments.put",
    "Deploy a model",
    status=202,
    answer=schemas.noun("Deployment"),
    errors=(422,),
    body="json",
    request=EXAMPLE,
    creates=True,
)
def put_deployment(services: Use, caller: Who, name: NamePath, spec: DeploymentSpec) -> Response:
    """Write what should be serving under `name`. Replicas start, prove themselves, and then the calls move over.

    The same again changes nothing; anything else is a new revision. An invoke-only key calls it by `predict`.
    """
    return accepted(services.deployments.put(caller, name, spec).public(), f"/api/v1/deployments/{name}")


@routes.get("/api/v1/deployments", "deployments.list", "List deployments", answer=schemas.page("Deployment"))
def list_deployments(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """Newest first."""
    found = services.deployments.list(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@routes.get("/api/v1/deployments/{name}", "deployments.get", "Get a deployment", answer=schemas.noun("Deployment"))
def get_deployment(services: Use, caller: Who, name: NamePath) -> Response:
    """What is desired, and in `status`, `message` and `ready_replicas` how near to it we are."""
    return answer(services.deployments.get(caller, name).public())


@routes.delete(
    "/api/v1/deployments/{name}",
    "deployments.delete",
    "Delete a deployment",
    status=202,
    answer=schemas.noun("Deployment"),
)
def delete_deployment(services: Use, caller: Who, name: NamePath) -> Response:
    """Its replicas finish what they are doing and stop; then it is gone (404) and the name is free."""
    return accepted(services.deployments.delete(caller, name).public(), f"/api/v1/deployments/{name}")


@routes.get(
    "/api/v1/deployments/{name}/revisions",
    "deployments.revisions",
    "List revisions",
    answer=schemas.page("DeploymentRevision"),
)
def list_revisions(services: Use, caller: Who, name: NamePath) -> Response:
    """Every spec it ever had, oldest first."""
    return listing([item.public() for item in services.deployments.revisions(caller, name)])


@routes.post(
    "/api/v1/deployments/{name}/rollback",
    "deployments.rollback",
    "Roll back a deployment",
    status=202,
    answer=schemas.noun("Deployment"),
    body="json",
    request={"revision": 1},
)
def rollback_deployment(services: Use, caller: Who, name: NamePath, spec: Rollback | None = None) -> Response:
    """Write an old spec, with the model version it had, as a new revision."""
    number = spec.revision if spec else None
    return accepted(services.deployments.rollback(caller, name, number).public(), f"/api/v1/deployments/{name}")


@routes.get("/api/v1/deployments/{name}/replicas", "deployments.get", "List replicas", answer=schemas.page("Replica"))
def list_replicas(services: Use, caller: Who, name: NamePath) -> Response:
    """Its processes as they were last seen."""
    return listing([item.public() for item in services.deployments.replicas(caller, name)])


@routes.get(
    "/api/v1/deployments/{name}/logs",
    "deployments.logs",
    "Read a deployment's logs",
    answer=schemas.plain({"type": "string"}, "== rpl_0198c0f4e1b25f3a9c0d1e2f\nready\n", "text/plain; charset=utf-8"),
)
def get_deployment_logs(services: Use, caller: Who, name: NamePath) -> Response:
    """The end of what its newest replicas wrote, as text."""
    return PlainTextResponse(services.deployments.logs(caller, name))
