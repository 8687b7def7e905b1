"""Who may: keys, projects, users, memberships, and the audit trail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelworks.client.lists import page, path
from modelworks.client.modes import Mode, Resource, call
from modelworks.client.transport import Request, creation
from modelworks.client.types import NewKey, build
from modelworks.core.specs import KeySpec
from modelworks.core.types import AuditRecord, Key, Membership, Page, Project, Role, User


class Keys(Resource[Mode]):
    """`client.keys`: of the caller's project."""

    @call
    async def list(self, *, limit: int = 20, after: str | None = None) -> Page[Key]:
        return await page(self._http, "/api/v1/keys", Key, limit=limit, after=after)

    @call
    async def create(
        self, spec: KeySpec | Mapping[str, Any] | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> NewKey:
        """A new key: a KeySpec, or its fields (name, role, scopes, models, expires_in...).

        Its secret is shown this once.
        """
        given = build(KeySpec, spec, fields, "the key")
        body = given.model_dump(mode="json", exclude_unset=True)
        return await self._http.model(creation("/api/v1/keys", key=idempotency_key, json=body), NewKey)

    @call
    async def revoke(self, key: Key | str) -> None:
        """Holds everywhere within a second."""
        await self._http.send(Request("DELETE", path("/api/v1/keys/{}", key if isinstance(key, str) else key.id)))


class Projects(Resource[Mode]):
    @call
    async def list(self, *, limit: int = 20, after: str | None = None) -> Page[Project]:
        return await page(self._http, "/api/v1/projects", Project, limit=limit, after=after)

    @call
    async def create(self, name: str, *, idempotency_key: str | None = None) -> Project:
        return await self._http.model(creation("/api/v1/projects", key=idempotency_key, json={"name": name}), Project)


class Users(Resource[Mode]):
    @call
    async def list(self, *, limit: int = 20, after: str | None = None) -> Page[User]:
        return await page(self._http, "/api/v1/users", User, limit=limit, after=after)

    @call
    async def create(self, name: str, *, idempotency_key: str | None = None) -> User:
        return await self._http.model(creation("/api/v1/users", key=idempotency_key, json={"name": name}), User)

    @call
    async def disable(self, user: User | str) -> None:
        """Its keys stop working within a second."""
        await self._http.send(Request("DELETE", path("/api/v1/users/{}", user if isinstance(user, str) else user.id)))


class Memberships(Resource[Mode]):
    @call
    async def list(self, project: str | None = None, *, limit: int = 20, after: str | None = None) -> Page[Membership]:
        """Who has which role in `project` (name or id), by default the client's own."""
        headers = {"x-project": project} if project else {}
        where = "/api/v1/memberships"
        return await page(self._http, where, Membership, limit=limit, after=after, headers=headers)

    @call
    async def put(self, project: str, user: str, role: Role) -> Membership:
        """`user` (id) acts in `project` (name or id) with `role`."""
        where = path("/api/v1/projects/{}/members/{}", project, user)
        return await self._http.model(Request("PUT", where, json={"role": role}), Membership)

    @call
    async def delete(self, project: str, user: str) -> None:
        await self._http.send(Request("DELETE", path("/api/v1/projects/{}/members/{}", project, user)))


class Audit(Resource[Mode]):
    @call
    async def list(self, *, limit: int = 20, after: str | None = None) -> Page[AuditRecord]:
        """Who changed what, newest first."""
        return await page(self._http, "/api/v1/audit", AuditRecord, limit=limit, after=after)
