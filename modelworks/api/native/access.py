"""Keys, projects, users, memberships and the audit trail; who am I, and the state of the server."""

from __future__ import annotations

from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.docs import release
from modelworks.api.routes import After, IdPath, Limit, NamePath, Routes, Use, Who, answer, listing
from modelworks.core.specs import KeySpec, MembershipSpec, ProjectSpec, UserSpec
from modelworks.core.types import FINAL_JOB_STATES, MOVES, Deployment, Job

routes = Routes("Access")
server = Routes("Server")

NO_STORE = {"cache-control": "no-store"}


@routes.get("/api/v1/keys", "keys.list", "List keys", answer=schemas.page("Key"))
def list_keys(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """Of the project, newest first. The keys themselves are not kept, only their last four characters."""
    found = services.access.list_keys(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@routes.post(
    "/api/v1/keys",
    "keys.create",
    "Create a key",
    status=201,
    answer=schemas.noun("Key", key="mw_the-key-itself-shown-only-now"),
    errors=(404, 409, 422),
    body="json",
    request={"name": "scoring", "role": "invoke-only", "models": ["iris"], "requests_per_minute": 600},
    creates=True,
)
def create_key(services: Use, caller: Who, spec: KeySpec) -> Response:
    """The key itself is in `key`, now and never again."""
    key, plaintext = services.access.create_key(caller, spec)
    return answer({**key.public(), "key": plaintext}, 201, NO_STORE)


@routes.delete("/api/v1/keys/{id}", "keys.revoke", "Revoke a key", answer=schemas.noun("Key"), errors=(409,))
def revoke_key(services: Use, caller: Who, id: IdPath) -> Response:
    """It is refused everywhere within a second. Revoking again changes nothing."""
    return answer(services.access.revoke_key(caller, id).public())


@routes.get("/api/v1/projects", "projects.list", "List projects", answer=schemas.page("Project"))
def list_projects(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """All of this installation; for its administrators."""
    found = services.access.list_projects(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@routes.post(
    "/api/v1/projects",
    "projects.create",
    "Create a project",
    status=201,
    answer=schemas.noun("Project"),
    errors=(409, 422),
    body="json",
    request={"name": "research"},
    creates=True,
)
def create_project(services: Use, caller: Who, spec: ProjectSpec) -> Response:
    """Datasets, models, deployments and keys belong to one project and are not seen from another."""
    return answer(services.access.create_project(caller, spec).public(), 201)


@routes.get("/api/v1/users", "users.list", "List users", answer=schemas.page("User"))
def list_users(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """Newest first."""
    found = services.access.list_users(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@routes.post(
    "/api/v1/users",
    "users.create",
    "Create a user",
    status=201,
    answer=schemas.noun("User"),
    errors=(409, 422),
    body="json",
    request={"name": "ada@example.org"},
    creates=True,
)
def create_user(services: Use, caller: Who, spec: UserSpec) -> Response:
    """A person, who gets roles by memberships and acts by keys."""
    return answer(services.access.create_user(caller, spec).public(), 201)


@routes.delete("/api/v1/users/{id}", "users.disable", "Disable a user", answer=schemas.noun("User"), errors=(409,))
def disable_user(services: Use, caller: Who, id: IdPath) -> Response:
    """The user's keys are refused within a second; what the user made stays."""
    return answer(services.access.disable_user(caller, id).public())


@routes.get("/api/v1/memberships", "memberships.list", "List memberships", answer=schemas.page("Membership"))
def list_memberships(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """Who has which role in the project."""
    found = services.access.list_memberships(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@routes.put(
    "/api/v1/projects/{project}/members/{user}",
    "memberships.put",
    "Give a user a role",
    answer=schemas.noun("Membership"),
    errors=(409,),
    body="json",
    request={"role": "developer"},
)
def put_membership(services: Use, caller: Who, project: NamePath, user: IdPath, spec: MembershipSpec) -> Response:
    """Or change it. The user's keys in that project never exceed the role."""
    return answer(services.access.put_membership(caller, project, user, spec).public())


@routes.delete(
    "/api/v1/projects/{project}/members/{user}",
    "memberships.delete",
    "Take a user's role",
    answer=schemas.plain(
        {"type": "object", "properties": {"deleted": {"type": "boolean"}}},
        {"id": "user_0198c0f4e1b25f3a9c0d1e2f", "deleted": True},
    ),
    errors=(409,),
)
def delete_membership(services: Use, caller: Who, project: NamePath, user: IdPath) -> Response:
    """The user's keys in that project are refused within a second."""
    services.access.delete_membership(caller, project, user)
    return answer({"id": user, "deleted": True})


@routes.get("/api/v1/audit", "audit.list", "Read the audit trail", answer=schemas.page("AuditRecord"))
def list_audit(services: Use, caller: Who, limit: Limit = 20, after: After = None) -> Response:
    """Every change in the project: who, what, when, newest first."""
    found = services.access.audit(caller, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@server.get(
    "/api/v1/whoami",
    "whoami.get",
    "Who am I",
    answer=schemas.plain(
        {"type": "object"},
        {"key_id": "key_0198c0f4e1b25f3a9c0d1e2f", "project_id": "proj_0198c0f4e1b25f3a9c0d1e2f", "role": "developer"},
    ),
)
def whoami(services: Use, caller: Who) -> Response:
    """The key that was sent: its project, role, scopes and limits."""
    return answer(services.access.whoami(caller))


_DEPLOYMENT = {
    "name": "iris",
    "status": "ready",
    "model_version": "iris:1",
    "ready_replicas": 1,
    "requests_per_second": 12.5,
    "errors_per_second": 0.0,
}


@server.get(
    "/api/v1/status",
    "status.get",
    "The server's state",
    answer=schemas.plain(
        {"type": "object"},
        {"version": "0.1.0", "jobs": {"running": 1, "queued": 0}, "deployments": [_DEPLOYMENT]},
    ),
)
def status(services: Use, caller: Who) -> Response:
    """Its version, the project's unfinished jobs by state, and the project's deployments with their rates.

    Rates are over the last ten seconds and all gateways; errors are answers with status 500 and above.
    """
    jobs: dict[str, int] = {}
    with services.catalog.read() as tx:
        for state in MOVES["job"]:
            if state not in FINAL_JOB_STATES:
                jobs[state] = tx.count(Job, project_id=caller.project_id, status=state)
        found = tx.list(Deployment, project_id=caller.project_id, limit=100, newest_first=True)
    shelf = services.gateway.observer.shelf
    loads = shelf.total().loads if shelf is not None else {}
    rates = {name: load for (project, name), load in loads.items() if project == caller.project_id}
    deployments = [
        {
            "name": item.name,
            "status": item.status,
            "model_version": item.model_version,
            "ready_replicas": item.ready_replicas,
            "requests_per_second": round(rates[item.name].per_second, 2) if item.name in rates else 0.0,
            "errors_per_second": round(rates[item.name].errors_per_second, 2) if item.name in rates else 0.0,
        }
        for item in found
    ]
    return answer({"version": release(), "jobs": jobs, "deployments": deployments})
