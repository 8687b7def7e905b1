"""Keys, users, memberships and projects: nobody gives away more than they have, and nobody locks everybody out."""

from __future__ import annotations

import json
import threading

import pytest

from modelworks.control.access import Access
from modelworks.core.errors import Conflict, Forbidden, IdempotencyMismatch, InvalidInput, NotFound, Unauthenticated
from modelworks.core.specs import KeySpec, MembershipSpec, ProjectSpec, UserSpec
from modelworks.core.types import AuditRecord, Caller, Key, Project
from modelworks.security.identity import Authenticator, Secret
from modelworks.store.catalog import Catalog

START = 1_790_000_000.0
HOUR = 3600.0


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


class House:
    """A home after its first start: `admin` calls with the first key."""

    def __init__(self, home) -> None:
        self.home = home
        self.clock = Clock()
        self.catalog = Catalog(home / "catalog.sqlite")
        self.catalog.migrate()
        self.secret = Secret.load_or_create(home / "secret.key")
        self.access = Access(self.catalog, self.secret, clock=self.clock)
        self.authenticator = Authenticator(self.catalog, self.secret, clock=self.clock)
        self.texts = [self.access.bootstrap(home)]
        self.admin = self.caller(self.texts[0])

    def caller(self, text: str, project: str | None = None, **fields) -> Caller:
        self.authenticator.refresh()
        principal = self.authenticator.authenticate(f"Bearer {text}", project=project)
        return Caller(principal, request_id="req_1", **fields)

    def key(self, by: Caller | None = None, **spec) -> Caller:
        """Somebody who calls with a fresh key that `by` made."""
        _, text = self.access.create_key(by or self.admin, KeySpec(**{"name": "k", **spec}))
        self.texts.append(text)
        return self.caller(text)

    def project(self, name: str = "acme") -> Project:
        return self.access.create_project(self.admin, ProjectSpec(name=name))

    def in_project(self, name: str) -> Caller:
        return self.caller(self.texts[0], project=name)

    def member(self, role: str, project: str = "default", name: str = "ada"):
        user = self.access.create_user(self.admin, UserSpec(name=name))
        self.access.put_membership(self.admin, project, user.id, MembershipSpec(role=role))
        return user

    def audit(self) -> list[AuditRecord]:
        with self.catalog.read() as tx:
            return tx.list(AuditRecord)

    def row(self, caller: Caller) -> Key:
        with self.catalog.read() as tx:
            return tx.get(Key, caller.principal.key_id)


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.catalog.close()


# -- making keys


def test_a_key_is_shown_once_and_kept_as_a_hash(house):
    key, text = house.access.create_key(
        house.admin,
        KeySpec(name="scoring", role="invoke-only", models=["iris"], expires_in=HOUR, requests_per_minute=9),
    )
    assert text.endswith(key.hint)
    assert len(key.hint) == 4
    assert (key.expires_at, key.models, key.requests_per_minute) == (START + HOUR, ["iris"], 9)
    shown = json.dumps(key.public())
    assert "digest" not in key.public()
    assert text not in shown
    assert house.secret.digest(text) not in shown
    assert house.caller(text).principal.key_id == key.id
    assert text not in json.dumps([page.public() for page in house.access.list_keys(house.admin).items])


def test_neither_files_nor_audit_hold_the_text_of_a_key(house):
    for role in ("developer", "viewer"):
        house.key(role=role)
    leaky, text = house.access.create_key(house.admin, KeySpec(name="leaky"))
    house.access.revoke_key(house.admin, leaky.id)
    house.access.create_user(house.admin, UserSpec(name=text))  # pasted into the wrong field
    house.texts.append(text)
    kept = {path.name: path.read_bytes() for path in house.home.iterdir() if path.name.startswith("catalog")}
    assert {"catalog.sqlite", "catalog.sqlite-wal"} <= set(kept)
    assert house.secret.digest(text).encode() in b"".join(kept.values())  # the search does find what is there
    for secret in house.texts[:-1]:
        for name, content in kept.items():
            assert secret.encode() not in content, name
            assert secret[3:].encode() not in content, name
    records = json.dumps([record.public() for record in house.audit()])
    assert not [secret for secret in house.texts if secret in records]


@pytest.mark.parametrize("role", ["developer", "viewer", "invoke-only"])
def test_who_lacks_the_scope_lets_nobody_in(house, role):
    caller = house.key(role=role)
    user = house.access.create_user(house.admin, UserSpec(name="ada"))
    for attempt in (
        lambda: house.access.create_key(caller, KeySpec(name="x", role="invoke-only")),
        lambda: house.access.revoke_key(caller, caller.principal.key_id),
        lambda: house.access.list_keys(caller),
        lambda: house.access.create_project(caller, ProjectSpec(name="x")),
        lambda: house.access.create_user(caller, UserSpec(name="x")),
        lambda: house.access.list_users(caller),
        lambda: house.access.disable_user(caller, user.id),
        lambda: house.access.put_membership(caller, "default", user.id, MembershipSpec(role="viewer")),
        lambda: house.access.delete_membership(caller, "default", user.id),
        lambda: house.access.list_memberships(caller),
        lambda: house.access.audit(caller),
    ):
        with pytest.raises(Forbidden):
            attempt()


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        ({"role": "admin"}, "role"),
        ({"role": "developer"}, "role"),
        ({"role": "developer", "scopes": ["data:read", "data:write"]}, "scopes"),
        ({"role": "viewer", "scopes": ["data:read"]}, "models"),
        ({"role": "viewer", "scopes": ["data:read"], "models": ["iris", "wine"]}, "models"),
        ({"role": "viewer", "scopes": ["data:read"], "models": ["iris"]}, "expires_in"),
        ({"role": "viewer", "scopes": ["data:read"], "models": ["iris"], "expires_in": 2 * HOUR}, "expires_in"),
        (
            {
                "role": "viewer",
                "scopes": ["data:read"],
                "models": ["iris"],
                "expires_in": HOUR,
                "requests_per_minute": 61,
            },
            "requests_per_minute",
        ),
    ],
)
def test_nobody_makes_a_key_with_more_than_they_have(house, spec, param):
    maker = house.key(
        role="admin", scopes=["keys:write", "data:read"], models=["iris"], expires_in=HOUR, requests_per_minute=60
    )
    with pytest.raises(Forbidden) as caught:
        house.access.create_key(maker, KeySpec(name="x", **spec))
    assert caught.value.param == param


def test_a_key_with_as_much_or_less_is_fine_and_inherits_the_rate(house):
    maker = house.key(
        role="admin", scopes=["keys:write", "data:read"], models=["iris"], expires_in=HOUR, requests_per_minute=60
    )
    made = house.key(maker, role="admin", scopes=["keys:write", "data:read"], models=["iris"], expires_in=HOUR / 2)
    assert house.row(made).requests_per_minute == 60
    assert made.principal.scopes == {"keys:write", "data:read"}


def test_unknown_scopes_are_refused(house):
    with pytest.raises(InvalidInput) as caught:
        house.access.create_key(house.admin, KeySpec(name="x", scopes=["root"]))
    assert caught.value.param == "scopes"


def test_a_key_revoked_a_moment_ago_makes_no_key(house):
    stale = house.key(role="admin")
    house.access.revoke_key(house.admin, stale.principal.key_id)
    with pytest.raises(Unauthenticated):  # the gateway has not refreshed yet: the principal still says admin
        house.access.create_key(stale, KeySpec(name="x"))
    user = house.member("viewer")
    with pytest.raises(Unauthenticated):
        house.access.put_membership(stale, "default", user.id, MembershipSpec(role="admin"))


def test_a_forged_project_gives_nothing(house):
    other = house.project()
    local = house.key(house.in_project("acme"), role="admin")
    forged = Caller(house.caller(house.texts[-1]).principal.__class__(**{
        **{name: getattr(local.principal, name) for name in local.principal.__struct_fields__},
        "project_id": house.admin.project_id,
    }))  # fmt: skip
    assert other.id == local.project_id
    with pytest.raises(Forbidden):
        house.access.create_key(forged, KeySpec(name="x", role="viewer"))


# -- idempotency


def test_the_same_create_again_makes_no_second_key_and_shows_no_secret(house):
    spec = KeySpec(name="x", role="viewer")
    again = Caller(house.admin.principal, "req_1", "idem-1")
    key, _ = house.access.create_key(again, spec)
    with pytest.raises(Conflict, match=key.id) as caught:
        house.access.create_key(again, spec)
    assert caught.value.code == "key_already_shown"
    with pytest.raises(IdempotencyMismatch):
        house.access.create_key(again, KeySpec(name="y", role="viewer"))
    assert len(house.access.list_keys(house.admin).items) == 2


def test_the_same_project_or_user_again_is_the_first(house):
    again = Caller(house.admin.principal, "req_1", "idem-1")
    for create, spec, listed in (
        (house.access.create_project, ProjectSpec(name="acme"), house.access.list_projects),
        (house.access.create_user, UserSpec(name="ada"), house.access.list_users),
    ):
        assert create(again, spec) == create(again, spec)
        assert len([item for item in listed(house.admin).items if item.name == spec.name]) == 1
        with pytest.raises(Conflict) as caught:  # without the header the name is taken
            create(house.admin, spec)
        assert caught.value.param == "name"


# -- revoking, and the last administrator


def test_revoking_holds_and_can_be_repeated(house):
    caller = house.key()
    revoked = house.access.revoke_key(house.admin, caller.principal.key_id)
    assert revoked.revoked_at == START
    house.clock.now += 5
    assert house.access.revoke_key(house.admin, caller.principal.key_id) == revoked
    with pytest.raises(Unauthenticated):
        house.caller(house.texts[-1])
    with pytest.raises(NotFound):
        house.access.revoke_key(house.admin, "key_nothing")


def test_the_last_administrators_key_cannot_be_revoked(house):
    def refused() -> None:
        with pytest.raises(Conflict, match="nobody who can administer") as caught:
            house.access.revoke_key(house.admin, house.admin.principal.key_id)
        assert caught.value.code == "last_administrator"
        assert house.row(house.admin).revoked_at is None

    refused()
    house.key(role="developer")
    house.key(role="admin", scopes=["keys:write"])  # narrowed: it could not create a project
    house.key(role="admin", models=["iris"])
    house.project()
    house.key(house.in_project("acme"), role="admin")  # administers its own project only
    house.key(role="admin", expires_in=HOUR)
    house.clock.now += HOUR  # it has expired
    refused()
    second = house.key(role="admin")
    house.access.revoke_key(second, house.admin.principal.key_id)
    with pytest.raises(Conflict):
        house.access.revoke_key(second, second.principal.key_id)


def test_a_user_who_holds_the_last_administrators_key_stays(house):
    user = house.member("admin")
    boss = house.key(role="admin", user=user.id)
    house.access.revoke_key(boss, house.admin.principal.key_id)
    for attempt in (
        lambda: house.access.disable_user(boss, user.id),
        lambda: house.access.delete_membership(boss, "default", user.id),
        lambda: house.access.put_membership(boss, "default", user.id, MembershipSpec(role="viewer")),
    ):
        with pytest.raises(Conflict) as caught:
            attempt()
        assert caught.value.code == "last_administrator"
    assert house.caller(house.texts[-1]).principal.role == "admin"


def test_two_last_administrators_cannot_revoke_each_other(house):
    second = house.key(role="admin")
    outcomes = []
    barrier = threading.Barrier(2)

    def revoke(by: Caller, other: Caller) -> None:
        barrier.wait()
        try:
            house.access.revoke_key(by, other.principal.key_id)
            outcomes.append("revoked")
        except Conflict:
            outcomes.append("refused")

    threads = [threading.Thread(target=revoke, args=pair) for pair in ((house.admin, second), (second, house.admin))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "revoked"]


# -- users and memberships


def test_a_users_key_dies_with_the_user(house):
    user = house.member("developer")
    caller = house.key(user=user.id)
    assert caller.principal.scopes
    assert house.access.disable_user(house.admin, user.id).disabled
    assert house.access.disable_user(house.admin, user.id).disabled  # again changes nothing
    with pytest.raises(Unauthenticated):
        house.caller(house.texts[-1])
    with pytest.raises(InvalidInput):
        house.access.create_key(house.admin, KeySpec(name="x", user=user.id))


def test_a_users_key_makes_keys_that_die_with_the_user(house):
    user = house.member("admin")
    boss = house.key(role="admin", user=user.id)
    heir = house.key(boss, role="developer")
    assert house.row(heir).user_id == user.id
    house.access.disable_user(house.admin, user.id)
    with pytest.raises(Unauthenticated):
        house.caller(house.texts[-1])


def test_a_users_key_has_the_membership_of_its_project(house):
    user = house.member("viewer")
    assert house.key(role="admin", user=user.id).principal.role == "viewer"
    text = house.texts[-1]
    house.access.put_membership(house.admin, "default", user.id, MembershipSpec(role="developer"))
    assert house.caller(text).principal.role == "developer"
    house.access.delete_membership(house.admin, "default", user.id)
    with pytest.raises(Unauthenticated):
        house.caller(text)


@pytest.mark.parametrize("user", ["user_nothing", "ada", "' OR 1=1 --"])
def test_a_key_for_nobody_is_refused(house, user):
    with pytest.raises(InvalidInput) as caught:
        house.access.create_key(house.admin, KeySpec(name="x", user=user))
    assert caught.value.param == "user"


def test_nobody_gives_a_membership_beyond_their_own_power(house):
    maker = house.key(role="admin", scopes=["keys:write", "invoke"])
    user = house.member("viewer")
    with pytest.raises(Forbidden):
        house.access.put_membership(maker, "default", user.id, MembershipSpec(role="admin"))
    with pytest.raises(Forbidden):  # nor takes what they could not give
        house.access.put_membership(maker, "default", user.id, MembershipSpec(role="invoke-only"))
    other = house.access.create_user(house.admin, UserSpec(name="grace"))
    assert house.access.put_membership(maker, "default", other.id, MembershipSpec(role="invoke-only"))


def test_a_membership_is_one_row_a_user_and_project(house):
    user = house.member("viewer")
    first = house.access.put_membership(house.admin, "default", user.id, MembershipSpec(role="viewer"))
    changed = house.access.put_membership(house.admin, "default", user.id, MembershipSpec(role="developer"))
    assert (changed.id, changed.role) == (first.id, "developer")
    assert house.access.list_memberships(house.admin).items == [changed]
    with pytest.raises(NotFound):
        house.access.put_membership(house.admin, "default", "user_nothing", MembershipSpec(role="viewer"))
    house.access.delete_membership(house.admin, "default", user.id)
    with pytest.raises(NotFound):
        house.access.delete_membership(house.admin, "default", user.id)
    house.access.disable_user(house.admin, user.id)
    with pytest.raises(Conflict):
        house.access.put_membership(house.admin, "default", user.id, MembershipSpec(role="viewer"))


@pytest.mark.parametrize("name", ["a\nb", " ada", "ada\x00", "\u202eada"])
def test_a_users_name_is_printable(house, name):
    with pytest.raises(InvalidInput) as caught:
        house.access.create_user(house.admin, UserSpec(name=name))
    assert caught.value.param == "name"


# -- one project and another


def test_a_projects_administrator_administers_that_project_and_sees_no_other(house):
    acme = house.project()
    house.project("rival")
    boss = house.key(house.in_project("acme"), role="admin")
    user = house.member("developer", project="acme")
    assert boss.project_id == acme.id
    worker = house.key(boss, role="developer", user=user.id)
    assert worker.project_id == acme.id
    assert [project.name for project in house.access.list_projects(boss).items] == ["acme"]
    assert {project.name for project in house.access.list_projects(house.admin).items} == {"default", "acme", "rival"}
    assert [member.user_id for member in house.access.list_memberships(boss).items] == [user.id]
    assert {key.id for key in house.access.list_keys(boss).items} == {boss.principal.key_id, worker.principal.key_id}
    assert house.access.put_membership(boss, "acme", user.id, MembershipSpec(role="viewer")).project_id == acme.id
    for elsewhere in ("default", "rival", house.admin.project_id, "nowhere"):
        with pytest.raises(NotFound):
            house.access.put_membership(boss, elsewhere, user.id, MembershipSpec(role="viewer"))
        with pytest.raises(NotFound):
            house.access.delete_membership(boss, elsewhere, user.id)
    with pytest.raises(NotFound):
        house.access.revoke_key(boss, house.admin.principal.key_id)
    for attempt in (
        lambda: house.access.create_project(boss, ProjectSpec(name="x")),
        lambda: house.access.create_user(boss, UserSpec(name="x")),
        lambda: house.access.disable_user(boss, user.id),
        lambda: house.access.list_users(boss),
    ):
        with pytest.raises(Forbidden):
            attempt()
    assert "default" not in json.dumps([record.public() for record in house.access.audit(boss).items])


def test_a_system_administrator_acts_elsewhere_by_the_header_only(house):
    house.project()
    elsewhere = house.in_project("acme")
    made = house.key(elsewhere, role="developer")
    assert made.project_id == elsewhere.project_id
    with pytest.raises(NotFound):
        house.access.revoke_key(house.admin, made.principal.key_id)
    assert house.access.revoke_key(elsewhere, made.principal.key_id).revoked_at


# -- the record of changes


def test_each_change_is_recorded_with_who_what_and_request(house):
    user = house.member("viewer")
    key, _ = house.access.create_key(house.admin, KeySpec(name="x", role="viewer", user=user.id))
    house.access.revoke_key(house.admin, key.id)
    house.access.delete_membership(house.admin, "default", user.id)
    house.access.disable_user(house.admin, user.id)
    house.project()
    records = house.audit()
    assert [(record.action, record.object) for record in records[1:6]] == [
        ("users.create", user.id),
        ("memberships.put", user.id),
        ("keys.create", key.id),
        ("keys.revoke", key.id),
        ("memberships.delete", user.id),
    ]
    for record in records[1:]:
        assert record.principal == house.admin.principal.key_id
        assert record.detail["key_name"] == "admin"
        assert record.request_id == "req_1"
    assert records[0].principal == "system"  # the first key


def test_what_is_refused_is_not_recorded(house):
    before = len(house.audit())
    with pytest.raises(Conflict):
        house.access.revoke_key(house.admin, house.admin.principal.key_id)
    with pytest.raises(Conflict):
        house.access.create_project(house.admin, ProjectSpec(name="default"))
    assert len(house.audit()) == before


def test_the_record_is_paged_newest_first(house):
    for number in range(5):
        house.access.create_user(house.admin, UserSpec(name=f"user {number}"))
    page = house.access.audit(house.admin, limit=4)
    assert page.has_more
    rest = house.access.audit(house.admin, limit=4, after=page.items[-1].id)
    assert not rest.has_more
    ids = [record.id for record in [*page.items, *rest.items]]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == 6


def test_who_am_i(house):
    caller = house.key(role="invoke-only", models=["iris"], expires_in=HOUR)
    assert house.access.whoami(caller) == {
        "key_id": caller.principal.key_id,
        "key_name": "k",
        "user_id": None,
        "project_id": caller.project_id,
        "project_name": "default",
        "role": "invoke-only",
        "scopes": ["invoke"],
        "models": ["iris"],
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "expires_at": START + HOUR,
        "system_administrator": False,
    }
    assert house.access.whoami(house.admin)["system_administrator"] is True
