"""`keys`, `projects`, `users` and `audit`: who may."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from modelworks.cli.session import Session, command, group
from modelworks.cli.text import when

keys = group("API keys of the project.")
projects = group("Projects and who is in them.")
users = group("Users.")
Limit = Annotated[int, typer.Option(help="How many at most.")]
After = Annotated[str | None, typer.Option(help="Go on after this id.")]
Role = Annotated[str, typer.Option(help="admin, developer, viewer or invoke-only.")]
_DAY = 86400.0


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys")
    app.add_typer(projects, name="projects")
    app.add_typer(users, name="users")
    command(app, "audit")(audit)
    command(app, "usage")(usage)


@command(keys, "list")
def list_keys(session: Session, limit: Limit = 100, after: After = None) -> None:
    """List keys. The keys themselves are not kept, only their hashes."""
    found = session.client.keys.list(limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("id", "name", "role", "ends in", "scopes", "models", "expires", "revoked"),
        (
            (
                one.id, one.name, one.role, one.hint,
                ", ".join(one.scopes) if one.scopes is not None else "all of the role",
                ", ".join(one.models) if one.models is not None else "all", when(one.expires_at), when(one.revoked_at),
            )
            for one in found.items
        ),
    )  # fmt: skip


@command(keys, "create")
def create_key(
    session: Session,
    name: Annotated[str, typer.Argument(help="What it is for.")],
    role: Role = "developer",
    scope: Annotated[list[str] | None, typer.Option(help="Narrow the role to this scope. Repeatable.")] = None,
    deployment: Annotated[
        list[str] | None, typer.Option(help="A deployment it may call; else all. Repeatable.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="Days until it expires.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Rate limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Limit of tokens of language models.")] = None,
    user: Annotated[str | None, typer.Option(help="Id of the user it acts for.")] = None,
) -> None:
    """Make a key and print it, this once. In the table form the key alone goes to stdout."""
    given = {
        "name": name, "role": _role(role), "scopes": scope or None, "models": deployment or None,
        "expires_in": None if days is None else days * _DAY, "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute, "user": user,
    }  # fmt: skip
    key = session.client.keys.create({field: value for field, value in given.items() if value is not None})
    if session.json:
        session.emit(key)
        return
    session.note(f"{key.id} ({key.role}): keep the key now, it is not shown again")
    session.say(key.key)


@command(keys, "revoke")
def revoke_key(session: Session, key: Annotated[str, typer.Argument(help="Id of the key.")]) -> None:
    """Revoke a key; it stops working within a second."""
    session.client.keys.revoke(key)
    _done(session, "revoked", key)


@command(projects, "list")
def list_projects(session: Session, limit: Limit = 100, after: After = None) -> None:
    """List projects."""
    found = session.client.projects.list(limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(("id", "name", "created"), ((one.id, one.name, when(one.created_at)) for one in found.items))


@command(projects, "create")
def create_project(session: Session, name: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """Make a project."""
    project = session.client.projects.create(name)
    session.emit(project) if session.json else session.say(f"{project.id} {project.name}")


@command(projects, "members")
def list_members(
    session: Session,
    of: Annotated[str | None, typer.Argument(metavar="[PROJECT]", help="Name or id; by default the key's own.")] = None,
    limit: Limit = 100,
    after: After = None,
) -> None:
    """List who acts in a project, with which role."""
    found = session.client.memberships.list(of, limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(("project", "user", "role"), ((one.project_id, one.user_id, one.role) for one in found.items))


@command(projects, "add")
def add_member(
    session: Session,
    to: Annotated[str, typer.Argument(metavar="PROJECT", help="Name or id of the project.")],
    user: Annotated[str, typer.Argument(help="Id of the user.")],
    role: Role = "developer",
) -> None:
    """Give a user a role in a project."""
    member = session.client.memberships.put(to, user, _role(role))  # type: ignore[arg-type]
    session.emit(member) if session.json else session.say(f"{user} is {member.role} in {to}")


@command(projects, "remove")
def remove_member(
    session: Session,
    to: Annotated[str, typer.Argument(metavar="PROJECT", help="Name or id of the project.")],
    user: Annotated[str, typer.Argument(help="Id of the user.")],
) -> None:
    """Take a user out of a project."""
    session.client.memberships.delete(to, user)
    _done(session, "removed", user)


@command(users, "list")
def list_users(session: Session, limit: Limit = 100, after: After = None) -> None:
    """List users."""
    found = session.client.users.list(limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("id", "name", "disabled", "created"),
        ((one.id, one.name, "yes" if one.disabled else "no", when(one.created_at)) for one in found.items),
    )


@command(users, "create")
def create_user(session: Session, name: Annotated[str, typer.Argument(help="Such as an e-mail address.")]) -> None:
    """Make a user."""
    user = session.client.users.create(name)
    session.emit(user) if session.json else session.say(f"{user.id} {user.name}")


@command(users, "disable")
def disable_user(session: Session, user: Annotated[str, typer.Argument(help="Id of the user.")]) -> None:
    """Disable a user; the user's keys stop working within a second."""
    session.client.users.disable(user)
    _done(session, "disabled", user)


def audit(session: Session, limit: Limit = 50, after: After = None) -> None:
    """Show who changed what, newest first."""
    found = session.client.audit.list(limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("when", "key", "action", "object", "request"),
        ((when(one.created_at), one.principal, one.action, one.object, one.request_id) for one in found.items),
    )


def usage(
    session: Session,
    by: Annotated[str | None, typer.Option(help="key or deployment: the sum by that; else by both.")] = None,
    deployment: Annotated[str | None, typer.Option(help="Of this deployment only.")] = None,
) -> None:
    """Show the calls and tokens that keys have used: an administrator sees all keys of the project, others their own."""
    found = session.client.usage(by=by, deployment=deployment)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("key", "name", "deployment", "calls", "prompt tokens", "of them cached", "completion tokens", "of them repeated"),
        (
            (
                one.key_id or "all", one.key or "-", one.deployment or "all", one.calls, one.prompt_tokens,
                one.cached_tokens, one.completion_tokens, one.repeated_tokens,
            )
            for one in found
        ),
    )  # fmt: skip


def _role(role: str) -> str:
    from modelworks.core.errors import InvalidInput
    from modelworks.core.types import Role as Roles

    if role not in get_args(Roles):
        raise InvalidInput(f"there is no role {role[:50]!r}; choose one of: {', '.join(get_args(Roles))}", param="role")
    return role


def _done(session: Session, what: str, name: str) -> None:
    session.emit({what: name}) if session.json else session.say(f"{name} is {what}")
