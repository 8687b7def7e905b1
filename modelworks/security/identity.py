"""Who is calling: the server's secret, API keys, and the authenticator that makes a Principal of a header.

A key is 256 random bits and is never kept: the catalog has HMAC-SHA256(secret, key). What was verified once stays in
memory, so that the hot path asks no database; `refresh` verifies it anew whenever keys, users or memberships changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from modelworks.core.errors import CatalogUnavailable, Conflict, Forbidden, ModelworksError, NotFound, Unauthenticated
from modelworks.core.types import Key, Membership, Principal, Project, User
from modelworks.security import policy
from modelworks.store.catalog import Catalog, Tx

KEY_PREFIX = "mw_"
_KEY = re.compile(r"mw_[A-Za-z0-9_-]{43}")
_BEARER = re.compile(r"(?i:bearer) {1,4}(mw_[A-Za-z0-9_-]{43})")
_SECRET_BYTES = 32
Rates = tuple[int | None, int | None]  # calls and tokens a minute of keys that name none
_NEGATIVE_SECONDS = 1.0  # how long a refusal is remembered
_EXPIRED = "this key has expired; ask an administrator for another"
_CHUNK = 500  # keys verified anew by one query


def new_key() -> str:
    """A fresh API key: `mw_` and 43 characters that are safe in URLs (256 random bits)."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def is_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


class Secret:
    """What key hashes are made under. A copy of the catalog without it helps nobody to test keys."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "Secret(...)"

    @classmethod
    def load_or_create(cls, path: Path) -> Secret:
        """Read the 32 bytes at `path` (0600), made at random the first time; Conflict when the file is not as made."""
        if not path.exists():
            write_private(path, secrets.token_bytes(_SECRET_BYTES), replace=False)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise Conflict(
                f"{path} can be read by others (mode {mode:04o}); if nobody else has seen it: chmod 600 {path}",
                code="secret_exposed",
            )
        value = path.read_bytes()
        if len(value) != _SECRET_BYTES:
            raise Conflict(
                f"{path} is damaged: it has {len(value)} bytes instead of {_SECRET_BYTES}; restore it from a backup",
                code="secret_damaged",
            )
        return cls(value)

    def digest(self, key: str) -> str:
        """HMAC-SHA256 of `key`, hexadecimal."""
        return hmac.digest(self._value, key.encode(), "sha256").hex()


def write_private(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write `content` to `path`, mode 0600, whole or not at all, on disk before it returns.

    Without `replace`, a file that is there already, be it made by another process a moment ago, is left alone.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            aside.replace(path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -- from keys to principals -------------------------------------------------------------------------------------------


def principals(
    tx: Tx, keys: Iterable[Key], *, now: float, default_rates: Rates = (None, None)
) -> dict[str, Principal | Unauthenticated]:
    """Key id -> who calls with it, or why nobody does: revoked, expired, its user disabled or no member any more."""
    keys = list(keys)
    user_ids = {key.user_id for key in keys if key.user_id}
    users = {user.id: user for user in tx.list(User, id=user_ids)} if user_ids else {}
    members = tx.list(Membership, user_id=user_ids) if user_ids else []
    roles = {(member.user_id, member.project_id): member.role for member in members}
    projects = (
        {project.id: project.name for project in tx.list(Project, id={key.project_id for key in keys})} if keys else {}
    )
    found: dict[str, Principal | Unauthenticated] = {}
    for key in keys:
        reason = _dead(key, users, now)
        member = roles.get((key.user_id, key.project_id)) if key.user_id else None
        if reason is None and key.user_id and member is None:
            reason = "the user of this key is not a member of its project any more; ask an administrator"
        if reason is not None:
            found[key.id] = Unauthenticated(reason)
            continue
        found[key.id] = Principal(
            key_id=key.id,
            key_name=key.name,
            project_id=key.project_id,
            role=policy.weaker(key.role, member) if member else key.role,
            scopes=policy.granted(key.role, projects.get(key.project_id, ""), scopes=key.scopes, member=member),
            models=None if key.models is None else frozenset(key.models),
            requests_per_minute=key.requests_per_minute or default_rates[0],
            tokens_per_minute=key.tokens_per_minute or default_rates[1],
            expires_at=key.expires_at,
        )
    return found


def _dead(key: Key, users: dict[str, User], now: float) -> str | None:
    if key.revoked_at is not None:
        return "this key was revoked; ask an administrator for another"
    if key.expires_at is not None and key.expires_at <= now:
        return _EXPIRED
    if key.user_id and (key.user_id not in users or users[key.user_id].disabled):
        return "the user of this key is disabled; ask an administrator"
    return None


class _Refusal:
    """Why a key was refused, until when that is not looked up again."""

    __slots__ = ("error", "until")

    def __init__(self, error: ModelworksError, until: float) -> None:
        self.error = error
        self.until = until


class Authenticator:
    """Thread-safe. `clock`: seconds since the epoch; `capacity`: how many keys stay in memory.

    While the catalog is away, keys that are in memory stay valid, revocations already seen stay revoked, and an unknown
    key is refused after one look, or at once within a second after it.
    """

    def __init__(
        self,
        catalog: Catalog,
        secret: Secret,
        *,
        default_rates: Rates = (None, None),
        clock: Callable[[], float] = time.time,
        capacity: int = 4096,
    ) -> None:
        self._catalog = catalog
        self._secret = secret
        self._default_rates = default_rates
        self._clock = clock
        self._capacity = capacity
        self._salt = os.urandom(32)
        self._lock = threading.Lock()
        self._generation = 0
        self._seen: int | None = None
        self._away_until = 0.0
        self._known: dict[str, Principal] = {}  # digest of the key -> principal
        self._carriers: dict[bytes, str] = {}  # salted hash of a header's exact bytes -> digest of the key
        self._refused: dict[str, _Refusal] = {}
        self._projects: dict[str, str] = {}  # project as a header named it -> its id

    def cached(self, authorization: bytes) -> Principal | None:
        """The principal of a header that was verified before; None: ask `authenticate`. No I/O: for the event loop."""
        return self.tagged(self.tag(authorization))

    def tag(self, carrier: bytes) -> bytes:
        """A salted hash of bytes that may hold a key: what may be kept in memory in their place."""
        return hashlib.blake2b(carrier, key=self._salt, digest_size=16).digest()

    def tagged(self, tag: bytes) -> Principal | None:
        """`cached` for a header of which only the `tag` was kept."""
        digest = self._carriers.get(tag)
        principal = self._known.get(digest) if digest is not None else None
        if principal is None or (principal.expires_at is not None and principal.expires_at <= self._clock()):
            return None
        return principal

    def authenticate(self, authorization: str | None, *, project: str | None = None) -> Principal:
        """Who calls with this Authorization header. May look into the catalog: call it in a thread.

        `project` (header x-project; name or id) is where a system administrator's call acts. Raises Unauthenticated;
        Forbidden when another project is named by anyone else; NotFound when there is none; CatalogUnavailable.
        """
        match = _BEARER.fullmatch(authorization or "")
        if match is None:
            raise Unauthenticated("send a valid API key as `Authorization: Bearer KEY`")
        digest = self._secret.digest(match[1])
        principal = self._known.get(digest) or self._verify(digest)
        if principal.expires_at is not None and principal.expires_at <= self._clock():
            raise Unauthenticated(_EXPIRED)
        self._remember_carrier(match.string, digest)
        return principal if project is None else self._elsewhere(principal, project)

    def refresh(self) -> bool:
        """Verify anew what is in memory if keys, users, memberships or projects changed; whether they did.

        Call it several times a second, so that a revocation holds in this process within one. Never raises for a
        catalog that is away: then all stays as it was seen last.
        """
        try:
            with self._catalog.read() as tx:
                counter = tx.counter("access")
                if counter == self._seen:
                    return False
                with self._lock:
                    # look-ups that began before may have read older rows: they must not enter
                    self._generation += 1
                    revoked = [digest for digest, refusal in self._refused.items() if refusal.until == math.inf]
                    digests = [*self._known, *revoked]
                fresh = self._look_up(tx, digests)
        except CatalogUnavailable:
            return False
        with self._lock:
            self._seen = counter
            # swapped whole, as `cached` reads without the lock; what came in meanwhile is looked up at its next use
            self._known = {digest: found for digest, found in fresh.items() if isinstance(found, Principal)}
            self._carriers = {tag: digest for tag, digest in self._carriers.items() if digest in self._known}
            # what was revoked before our eyes stays so, even when the catalog goes away
            self._refused = {
                digest: _Refusal(found, math.inf)
                for digest, found in fresh.items()
                if isinstance(found, Unauthenticated)
            }
            self._projects = {}
        return True

    def _verify(self, digest: str) -> Principal:
        """One look at the catalog for a key that is not in memory."""
        now = self._clock()
        with self._lock:
            generation = self._generation
            refusal = self._refused.get(digest)
            away = now < self._away_until
        if refusal is not None and now < refusal.until:
            raise _again(refusal.error)
        if away:
            raise CatalogUnavailable(
                "this key cannot be checked as the catalog is away; try again in a moment",
                retry_after=_NEGATIVE_SECONDS,
            )
        try:
            with self._catalog.read() as tx:
                looked_up = self._look_up(tx, [digest])
        except CatalogUnavailable:
            with self._lock:
                self._away_until = self._clock() + _NEGATIVE_SECONDS
            raise
        found: Principal | Unauthenticated = Unauthenticated("this key is not valid here; check it, or ask for another")
        for kept, verdict in looked_up.items():
            if hmac.compare_digest(kept, digest):
                found = verdict
        with self._lock:
            if isinstance(found, Principal):
                if generation == self._generation:
                    self._make_room(self._known)
                    self._known[digest] = found
                return found
            self._make_room(self._refused)
            self._refused[digest] = _Refusal(found, self._clock() + _NEGATIVE_SECONDS)
        raise _again(found)

    def _look_up(self, tx: Tx, digests: list[str]) -> dict[str, Principal | Unauthenticated]:
        """What the catalog says of the keys with these digests; those that it does not have are left out."""
        found: dict[str, Principal | Unauthenticated] = {}
        for start in range(0, len(digests), _CHUNK):
            keys = tx.list(Key, digest=digests[start : start + _CHUNK])
            verdicts = principals(tx, keys, now=self._clock(), default_rates=self._default_rates)
            found.update({key.digest: verdicts[key.id] for key in keys})
        return found

    def _remember_carrier(self, authorization: str, digest: str) -> None:
        tag = self.tag(authorization.encode("latin-1"))
        with self._lock:
            if tag not in self._carriers and digest in self._known:
                self._make_room(self._carriers)
                self._carriers[tag] = digest

    def _elsewhere(self, principal: Principal, project: str) -> Principal:
        """`principal`, acting in the project with the name or id `project`."""
        project_id = self._projects.get(project) or self._find_project(project)
        if project_id == principal.project_id:
            return principal
        if not policy.is_system(principal):  # said before whether there is such a project
            raise Forbidden("this key belongs to another project; leave out the header x-project", param="x-project")
        if project_id is None:
            raise NotFound(f"there is no project {project[:100]!r}", code="project_not_found", param="x-project")
        return msgspec.structs.replace(principal, project_id=project_id)

    def _find_project(self, text: str) -> str | None:
        with self._lock:
            generation = self._generation
        with self._catalog.read() as tx:
            found = find_project(tx, text)
        if found is None:
            return None
        with self._lock:
            if generation == self._generation:
                self._make_room(self._projects)
                self._projects[text] = found.id
        return found.id

    def _make_room(self, held: dict[Any, Any]) -> None:
        """Forget the oldest entries of a dictionary that is full."""
        while len(held) >= self._capacity:
            del held[next(iter(held))]


def find_project(tx: Tx, text: str) -> Project | None:
    """The project with the id or, failing that, the name `text`."""
    return tx.find(Project, id=text) or tx.find(Project, name=text)


def _again(error: ModelworksError) -> ModelworksError:
    return type(error)(error.message, code=error.code, param=error.param, retry_after=error.retry_after)
