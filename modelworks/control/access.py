"""Use cases on who may enter: projects, users, memberships, keys, and the record of who changed what.

Nobody gives away more than they have: a key or a membership that somebody makes never has a scope, a model, a lifetime
or a rate that its maker's own key lacks. There is always one key left that administers the system.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelworks.control.idempotency import create_once
from modelworks.core.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from modelworks.core.specs import KeySpec, MembershipSpec, ProjectSpec, UserSpec
from modelworks.core.types import AuditRecord, Caller, Key, Membership, Page, Principal, Project, User, new_id
from modelworks.security import audit, policy
from modelworks.security.identity import Secret, find_project, is_key, new_key, principals, write_private
from modelworks.store.catalog import Catalog, Tx

_MAX_MODELS = 1000
_HINT = 4


class Access:
    """`clock`: seconds since the epoch, the catalog's when not given."""

    def __init__(self, catalog: Catalog, secret: Secret, *, clock: Callable[[], float] | None = None) -> None:
        self._catalog = catalog
        self._secret = secret
        self._clock = clock

    def bootstrap(self, home: Path) -> str | None:
        """Make sure that somebody can administer this home; returns the first administrator's key when it was made now.

        The key is written to `home`/admin.key (0600) before its hash enters the catalog: after a crash in between, the
        next start takes that same key. When no administrator's key is left that is valid, the next start makes one, as
        whoever can start the server owns the home anyway.
        """
        with self._catalog.write() as tx:
            project = tx.find(Project, name=policy.SYSTEM_PROJECT) or tx.add(Project(name=policy.SYSTEM_PROJECT))
            if self._administrators(tx):
                return None
        path = home / "admin.key"
        text = self._unused_key(path)
        if text is None:
            text = new_key()
            write_private(path, f"{text}\n".encode())
        with self._catalog.write() as tx:
            if self._administrators(tx):
                return None
            key = tx.add(self._key(project.id, text, name="admin", role="admin"))
            starter = Principal("system", "server start", project.id, "admin", frozenset())
            audit.record(tx, Caller(starter), "keys.create", key.id, name=key.name, role=key.role)
        return text

    def whoami(self, caller: Caller) -> dict[str, Any]:
        """What the caller's key is and may do, and the project that the call acts in."""
        principal = caller.principal
        with self._catalog.read() as tx:
            project = tx.get(Project, caller.project_id)
            key = tx.get(Key, principal.key_id)
        return {
            "key_id": principal.key_id,
            "key_name": principal.key_name,
            "user_id": key.user_id,
            "project_id": project.id,
            "project_name": project.name,
            "role": principal.role,
            "scopes": sorted(principal.scopes),
            "models": None if principal.models is None else sorted(principal.models),
            "requests_per_minute": principal.requests_per_minute,
            "tokens_per_minute": principal.tokens_per_minute,
            "expires_at": principal.expires_at,
            "system_administrator": policy.is_system(principal),
        }

    # -- projects and users: system administrators only

    def create_project(self, caller: Caller, spec: ProjectSpec) -> Project:
        policy.require(caller.principal, "projects.create")
        with self._catalog.write() as tx:

            def make() -> Project:
                if find_project(tx, spec.name):
                    raise Conflict(f"there is a project {spec.name!r} already", code="project_exists", param="name")
                project = tx.add(Project(name=spec.name))
                audit.record(tx, caller, "projects.create", project.id, name=project.name)
                return project

            return create_once(tx, caller, "projects.create", spec.model_dump(mode="json"), Project, make)

    def list_projects(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[Project]:
        """All for a system administrator, else the caller's own."""
        policy.require(caller.principal, "projects.list")
        own = {} if policy.is_system(caller.principal) else {"id": caller.project_id}
        with self._catalog.read() as tx:
            return tx.page(Project, limit=limit, after=after, **own)

    def create_user(self, caller: Caller, spec: UserSpec) -> User:
        policy.require(caller.principal, "users.create")
        if not spec.name.isprintable() or spec.name != spec.name.strip():
            raise InvalidInput("a user's name is printable text without blanks around it", param="name")
        with self._catalog.write() as tx:

            def make() -> User:
                if tx.find(User, name=spec.name):
                    raise Conflict(f"there is a user {spec.name!r} already", code="user_exists", param="name")
                user = tx.add(User(name=spec.name))
                audit.record(tx, caller, "users.create", user.id, name=user.name)
                return user

            return create_once(tx, caller, "users.create", spec.model_dump(mode="json"), User, make)

    def list_users(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[User]:
        policy.require(caller.principal, "users.list")
        with self._catalog.read() as tx:
            return tx.page(User, limit=limit, after=after)

    def disable_user(self, caller: Caller, user_id: str) -> User:
        """All keys of the user are refused from now on. Disabling again changes nothing."""
        policy.require(caller.principal, "users.disable")
        with self._catalog.write() as tx:
            user = _user(tx, user_id)
            if user.disabled:
                return user
            administered = bool(self._administrators(tx))
            user = tx.update(user, disabled=True)
            self._keep_an_administrator(tx, administered)
            audit.record(tx, caller, "users.disable", user.id, name=user.name)
            return user

    # -- memberships: an administrator's own project, or any for system administrators

    def put_membership(self, caller: Caller, project: str, user_id: str, spec: MembershipSpec) -> Membership:
        """Give the user a role in `project` (name or id), at most the caller's own power."""
        policy.require(caller.principal, "memberships.put")
        role = spec.role
        with self._catalog.write() as tx:
            principal = self._present(tx, caller, "memberships.put")
            where = _project(tx, caller, project)
            user = _user(tx, user_id)
            if user.disabled:
                raise Conflict(f"the user {user.name!r} is disabled", code="user_disabled", param="user")
            _check_scopes_given(principal, policy.granted(role, where.name), "role")
            known = tx.find(Membership, user_id=user.id, project_id=where.id)
            if known and known.role == role:
                return known
            if known:
                # who may not give a role may not take it either
                _check_scopes_given(principal, policy.granted(known.role, where.name), "role")
                administered = bool(self._administrators(tx))
                membership = tx.update(known, role=role)
                self._keep_an_administrator(tx, administered)
            else:
                membership = tx.add(Membership(user_id=user.id, project_id=where.id, role=role))
            audit.record(tx, caller, "memberships.put", user.id, project_id=where.id, role=role)
            return membership

    def delete_membership(self, caller: Caller, project: str, user_id: str) -> Membership:
        """The user's keys for `project` are refused from now on."""
        policy.require(caller.principal, "memberships.delete")
        with self._catalog.write() as tx:
            where = _project(tx, caller, project)
            known = tx.find(Membership, user_id=user_id, project_id=where.id)
            if known is None:
                raise NotFound(
                    f"there is no member {user_id[:100]!r} in this project", code="membership_not_found", param="user"
                )
            administered = bool(self._administrators(tx))
            tx.delete(known)
            self._keep_an_administrator(tx, administered)
            audit.record(tx, caller, "memberships.delete", user_id, project_id=where.id, role=known.role)
            return known

    def list_memberships(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[Membership]:
        policy.require(caller.principal, "memberships.list")
        with self._catalog.read() as tx:
            return tx.page(Membership, limit=limit, after=after, project_id=caller.project_id)

    # -- keys

    def create_key(self, caller: Caller, spec: KeySpec) -> tuple[Key, str]:
        """The key as kept, and its text, which is shown this once. A key made by a user's key is that user's, too,
        unless `spec.user` names another."""
        policy.require(caller.principal, "keys.create")
        text = new_key()
        made: list[Key] = []
        with self._catalog.write() as tx:

            def make() -> Key:
                made.append(self._make_key(tx, caller, spec, text))
                return made[0]

            key = create_once(tx, caller, "keys.create", spec.model_dump(mode="json"), Key, make)
        if not made:  # its text went with the first answer, and nobody kept it
            raise Conflict(
                f"this request made the key {key.id} before, and a key is shown only once; revoke it and make another",
                code="key_already_shown",
                param="Idempotency-Key",
            )
        return key, text

    def list_keys(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[Key]:
        policy.require(caller.principal, "keys.list")
        with self._catalog.read() as tx:
            return tx.page(Key, limit=limit, after=after, project_id=caller.project_id)

    def revoke_key(self, caller: Caller, key_id: str) -> Key:
        """The key is refused everywhere within a second. Revoking again changes nothing."""
        policy.require(caller.principal, "keys.revoke")
        with self._catalog.write() as tx:
            key = tx.get(Key, key_id, project_id=caller.project_id)
            if key.revoked_at is not None:
                return key
            administered = bool(self._administrators(tx))
            key = tx.update(key, revoked_at=self._now(tx))
            self._keep_an_administrator(tx, administered)
            audit.record(tx, caller, "keys.revoke", key.id, name=key.name)
            return key

    # -- the record

    def audit(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[AuditRecord]:
        """Who changed what in the project, the newest first."""
        policy.require(caller.principal, "audit.list")
        with self._catalog.read() as tx:
            return tx.page(AuditRecord, limit=limit, after=after, project_id=caller.project_id)

    # -- below

    def _now(self, tx: Tx) -> float:
        return self._clock() if self._clock else tx.now()

    def _key(self, project_id: str, text: str, **fields: Any) -> Key:
        return Key(
            id=new_id(Key.PREFIX), project_id=project_id, digest=self._secret.digest(text), hint=text[-_HINT:], **fields
        )

    def _make_key(self, tx: Tx, caller: Caller, spec: KeySpec, text: str) -> Key:
        principal = self._present(tx, caller, "keys.create")
        own = tx.get(Key, principal.key_id)
        project = tx.get(Project, caller.project_id)
        scopes = None if spec.scopes is None else policy.check_scopes(spec.scopes)
        expires_at = None if spec.expires_in is None else self._now(tx) + spec.expires_in
        given = policy.granted(spec.role, project.name, scopes=scopes)
        _check_scopes_given(principal, given, "role" if scopes is None else "scopes")
        models = _models_given(principal, spec)
        if own.expires_at is not None and (expires_at is None or expires_at > own.expires_at):
            raise Forbidden("a key cannot outlive the key that makes it; give a shorter expires_in", param="expires_in")
        rates = {}
        for what in ("requests", "tokens"):
            name = f"{what}_per_minute"
            most = getattr(own, name)
            rates[name] = getattr(spec, name) or most
            if most is not None and rates[name] > most:
                raise Forbidden(f"you have {most} {what} a minute and cannot give more", param=name)
        user_id = spec.user or own.user_id
        if user_id:
            _check_member(tx, user_id, project)
        key = self._key(
            project.id,
            text,
            name=spec.name,
            role=spec.role,
            user_id=user_id,
            scopes=scopes,
            models=models,
            **rates,
            expires_at=expires_at,
        )
        told = key.model_dump(
            include={"name", "role", "scopes", "models", "user_id", *rates, "expires_at"}
        )
        audit.record(tx, caller, "keys.create", key.id, **told)
        return tx.add(key)

    def _present(self, tx: Tx, caller: Caller, operation: str) -> Principal:
        """The caller's principal as the catalog has it now: what was revoked a moment ago gives nothing away."""
        keys = tx.list(Key, id=caller.principal.key_id)
        verdict = principals(tx, keys, now=self._now(tx)).get(caller.principal.key_id)
        if not isinstance(verdict, Principal):
            raise verdict or Unauthenticated("this key is not valid here; check it, or ask for another")
        policy.require(verdict, operation)
        if caller.project_id != verdict.project_id and not policy.is_system(verdict):
            raise Forbidden("this key belongs to another project; leave out the header x-project", param="x-project")
        return verdict

    def _administrators(self, tx: Tx) -> list[Key]:
        """The keys that are valid now and may do everything in the whole system."""
        project = tx.find(Project, name=policy.SYSTEM_PROJECT)
        if project is None:
            return []
        table = tx.table(Key)
        keys = tx.list(Key, table.c.revoked_at.is_(None), project_id=project.id, role="admin")
        verdicts = principals(tx, keys, now=self._now(tx))
        return [key for key in keys if _may_do_all(verdicts[key.id])]

    def _keep_an_administrator(self, tx: Tx, administered: bool) -> None:
        """Conflict, which undoes the transaction, when it took the last administrator's key."""
        if administered and not self._administrators(tx):
            raise Conflict(
                "this would leave nobody who can administer the system; first create another key with role admin in "
                f"the project {policy.SYSTEM_PROJECT!r}",
                code="last_administrator",
            )

    def _unused_key(self, path: Path) -> str | None:
        """The key in a file that an interrupted first start left: private, well-formed, and not in the catalog yet."""
        if not path.is_file() or path.is_symlink() or stat.S_IMODE(path.stat().st_mode) & 0o077:
            return None
        text = path.read_bytes()[:100].decode("latin-1").strip()
        if not is_key(text):
            return None
        with self._catalog.read() as tx:
            return None if tx.find(Key, digest=self._secret.digest(text)) else text


def _may_do_all(verdict: object) -> bool:
    return isinstance(verdict, Principal) and verdict.scopes >= policy.ROLES["admin"] and verdict.models is None


def _user(tx: Tx, user_id: str) -> User:
    user = tx.find(User, id=user_id)
    if user is None:
        raise NotFound(f"there is no user {user_id[:100]!r}", code="user_not_found", param="user")
    return user


def _project(tx: Tx, caller: Caller, text: str) -> Project:
    """The project named, if the caller may administer it; else it does not exist for them."""
    project = find_project(tx, text)
    if project is None or (project.id != caller.project_id and not policy.is_system(caller.principal)):
        raise NotFound(f"there is no project {text[:100]!r}", code="project_not_found", param="project")
    return project


def _check_member(tx: Tx, user_id: str, project: Project) -> None:
    user = tx.find(User, id=user_id)
    if user is None or user.disabled or not tx.find(Membership, user_id=user_id, project_id=project.id):
        raise InvalidInput(
            f"{user_id[:100]!r} is not an active member of project {project.name!r}; add the user to the project first",
            param="user",
            code="not_a_member",
        )


def _check_scopes_given(principal: Principal, scopes: frozenset[str], param: str) -> None:
    if missing := scopes - principal.scopes:
        raise Forbidden(
            f"you cannot give what you do not have: {', '.join(sorted(missing))}; give a smaller role or fewer scopes",
            param=param,
            code="beyond_own_power",
        )


def _models_given(principal: Principal, spec: KeySpec) -> list[str] | None:
    models = None if spec.models is None else sorted(set(spec.models))
    if models is not None and len(models) > _MAX_MODELS:
        raise InvalidInput(f"a key's model list has at most {_MAX_MODELS} names", param="models")
    if principal.models is not None and (models is None or not principal.models.issuperset(models)):
        raise Forbidden(
            f"your key may call {', '.join(sorted(principal.models))[:500]} only; name models among these",
            param="models",
        )
    return models
