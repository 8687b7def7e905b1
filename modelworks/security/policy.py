"""Who may do what: the one table from operation to scope, and from role to scopes. Pure; nothing else decides.

A principal's scopes are the intersection of what its key's role has, what the key was narrowed to and, for a key that
is bound to a user, what the user's role in that project has. A key with role admin of the project `default`, which
every home begins with, is a system administrator's: only it can hold SYSTEM_SCOPES, and with projects:write among them
it may act in another project, named by the header x-project. Administrators of other projects administer their own.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelworks.core.errors import Forbidden, InvalidInput
from modelworks.core.types import Principal, Role

SYSTEM_PROJECT = "default"
ANY_KEY = "any-key"  # what every valid key may do; not a scope that a key can be narrowed to

SYSTEM_SCOPES = frozenset({"projects:write", "users:read", "users:write"})
_VIEWER = frozenset({"data:read", "jobs:read", "models:read", "deployments:read", "usage:read", "projects:read"})
_DEVELOPER = _VIEWER | {"data:write", "jobs:write", "models:write", "deployments:write", "invoke"}

ROLES: dict[Role, frozenset[str]] = {  # from the strongest to the weakest
    "admin": _DEVELOPER | {"audit:read", "keys:read", "keys:write"} | SYSTEM_SCOPES,
    "developer": _DEVELOPER,
    "viewer": _VIEWER,
    "invoke-only": frozenset({"invoke"}),
}
SCOPES: frozenset[str] = frozenset().union(*ROLES.values())

OPERATIONS: dict[str, str] = {
    "whoami.get": ANY_KEY,
    "status.get": "deployments:read",
    "metrics.scrape": "usage:read",
    "usage.get": ANY_KEY,  # of the key itself; of all keys with keys:read
    # data
    "datasets.create": "data:write",
    "datasets.list": "data:read",
    "datasets.get": "data:read",
    "datasets.diff": "data:read",
    "datasets.edit": "data:write",
    "datasets.delete": "data:write",
    # jobs and what they can be asked for
    "training_jobs.create": "jobs:write",
    "training_jobs.list": "jobs:read",
    "training_jobs.get": "jobs:read",
    "training_jobs.events": "jobs:read",
    "training_jobs.logs": "jobs:read",
    "training_jobs.cancel": "jobs:write",
    "training_jobs.pause": "jobs:write",
    "training_jobs.resume": "jobs:write",
    "evaluations.create": "jobs:write",
    "evaluations.list": "jobs:read",
    "evaluations.get": "jobs:read",
    "algorithms.list": "jobs:read",
    "transforms.list": "jobs:read",
    "metrics.list": "jobs:read",
    # models
    "models.list": "models:read",
    "models.get": "models:read",
    "models.create_version": "models:write",
    "models.create_measurement": "models:write",
    "models.export": "models:read",
    "models.set_alias": "models:write",
    "models.delete_alias": "models:write",
    "models.delete": "models:write",
    # deployments
    "deployments.put": "deployments:write",
    "deployments.list": "deployments:read",
    "deployments.get": "deployments:read",
    "deployments.delete": "deployments:write",
    "deployments.rollback": "deployments:write",
    "deployments.revisions": "deployments:read",
    "deployments.logs": "deployments:read",
    "deployments.predict": "invoke",
    "oip.metadata": "invoke",
    "oip.ready": "invoke",
    "oip.infer": "invoke",
    "openai.models": "invoke",
    "openai.chat": "invoke",
    "openai.completions": "invoke",
    "openai.responses": "invoke",
    "openai.embeddings": "invoke",
    "openai.rerank": "invoke",
    "openai.moderations": "invoke",
    # who may enter a project
    "keys.create": "keys:write",
    "keys.list": "keys:read",
    "keys.revoke": "keys:write",
    "memberships.put": "keys:write",
    "memberships.delete": "keys:write",
    "memberships.list": "keys:read",
    "audit.list": "audit:read",
    # the whole installation
    "projects.create": "projects:write",
    "projects.list": "projects:read",
    "users.create": "users:write",
    "users.list": "users:read",
    "users.disable": "users:write",
}


def granted(
    role: Role, project: str, *, scopes: Iterable[str] | None = None, member: Role | None = None
) -> frozenset[str]:
    """The scopes of a key with `role` in the project named `project`, narrowed to `scopes` and to a user's role."""
    allowed = ROLES[role]
    if member is not None:
        allowed &= ROLES[member]
    if scopes is not None:
        allowed &= frozenset(scopes)
    return allowed if project == SYSTEM_PROJECT else allowed - SYSTEM_SCOPES


def weaker(role: Role, other: Role) -> Role:
    """The one of two roles that is further down in ROLES."""
    order = list(ROLES)
    return max(role, other, key=order.index)


def check_scopes(scopes: Iterable[str]) -> list[str]:
    """`scopes` in order and without repeats; InvalidInput for one that there is not."""
    wanted = frozenset(scopes)
    if unknown := wanted - SCOPES:
        raise InvalidInput(
            f"there is no scope {sorted(unknown)[0][:100]!r}; choose among: {', '.join(sorted(SCOPES))}",
            param="scopes",
            code="unknown_scope",
        )
    return sorted(wanted)


def require(principal: Principal, operation: str) -> None:
    """Forbidden, naming the scope that is missing, unless `principal` may do `operation`."""
    scope = OPERATIONS[operation]
    if scope not in principal.scopes and scope != ANY_KEY:
        raise Forbidden(
            f"this key may not do that, it lacks the scope {scope}; use a key that has it or ask an administrator",
            code="missing_scope",
            detail={"scope": scope},
        )


def may_call(principal: Principal, deployment: str) -> bool:
    """Whether the key's model allow-list has `deployment` in it (a key without a list may call all of its project)."""
    return principal.models is None or deployment in principal.models


def is_system(principal: Principal) -> bool:
    """Whether it may act in every project: a system administrator's key that was not narrowed out of it."""
    return "projects:write" in principal.scopes
