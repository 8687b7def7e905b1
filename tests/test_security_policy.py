"""The policy table: who may do what, by role, and that nothing is left undeclared."""

from __future__ import annotations

import typing

import pytest

from modelworks.core.errors import Forbidden, InvalidInput
from modelworks.core.types import Principal, Role
from modelworks.security import policy


def principal(role="developer", project="default", scopes=None, models=None) -> Principal:
    return Principal("key_1", "k", "proj_1", role, policy.granted(role, project, scopes=scopes), models)


def allowed(who: Principal) -> set[str]:
    found = set()
    for operation in policy.OPERATIONS:
        try:
            policy.require(who, operation)
        except Forbidden:
            continue
        found.add(operation)
    return found


def test_every_operation_has_a_scope_that_some_role_has():
    scopes = set(policy.OPERATIONS.values()) - {policy.ANY_KEY}
    assert scopes <= policy.SCOPES
    assert policy.ANY_KEY not in policy.SCOPES
    assert [name for name, scope in policy.OPERATIONS.items() if scope == policy.ANY_KEY] == ["whoami.get", "usage.get"]


def test_every_role_is_in_the_table():
    assert set(policy.ROLES) == set(typing.get_args(Role))


def test_what_changes_something_needs_a_scope_that_writes():
    changing = ("create", "edit", "put", "delete", "rollback", "cancel", "pause", "resume", "set", "revoke", "disable")
    for operation, scope in policy.OPERATIONS.items():
        verb = operation.partition(".")[2].partition("_")[0]
        if scope not in ("invoke", policy.ANY_KEY):
            assert scope.endswith(":write") is (verb in changing), operation


def test_invoke_only_may_call_and_nothing_else():
    assert allowed(principal("invoke-only")) == {
        "whoami.get", "usage.get", "deployments.predict", "oip.metadata", "oip.ready", "oip.infer",
        "openai.models", "openai.chat", "openai.completions", "openai.responses", "openai.embeddings", "openai.rerank",
        "openai.moderations",
    }  # fmt: skip


def test_a_viewer_reads_and_changes_nothing():
    may = allowed(principal("viewer"))
    assert {"datasets.get", "models.export", "deployments.list", "training_jobs.logs", "projects.list"} <= may
    assert not [name for name in may if policy.OPERATIONS[name].endswith((":write", "invoke"))]
    assert may.isdisjoint({"keys.list", "audit.list", "users.list", "memberships.list"})


def test_a_developer_does_all_work_and_lets_nobody_in():
    may = allowed(principal("developer"))
    assert {"datasets.create", "training_jobs.cancel", "models.set_alias", "deployments.put", "oip.infer"} <= may
    assert not [name for name in may if name.partition(".")[0] in ("keys", "memberships", "users", "audit")]
    assert "projects.create" not in may


def test_only_the_first_projects_administrators_administer_the_system():
    assert allowed(principal("admin")) == set(policy.OPERATIONS)
    missing = set(policy.OPERATIONS) - allowed(principal("admin", project="acme"))
    assert missing == {"projects.create", "users.create", "users.list", "users.disable"}
    assert policy.is_system(principal("admin"))
    assert not policy.is_system(principal("admin", project="acme"))
    assert not policy.is_system(principal("admin", scopes=["data:read"]))
    assert not policy.is_system(principal("developer"))


def test_a_refusal_names_the_scope():
    with pytest.raises(Forbidden, match="models:write") as caught:
        policy.require(principal("viewer"), "models.create_version")
    assert caught.value.detail == {"scope": "models:write"}


def test_an_undeclared_operation_is_an_error_and_never_allowed():
    with pytest.raises(KeyError):
        policy.require(principal("admin"), "datasets.burn")


def test_unknown_scopes_are_refused_with_what_there_is():
    with pytest.raises(InvalidInput, match="data:read") as caught:
        policy.check_scopes(["data:read", "root"])
    assert caught.value.param == "scopes"
    with pytest.raises(InvalidInput):
        policy.check_scopes([policy.ANY_KEY])
    assert policy.check_scopes(["invoke", "data:read", "invoke"]) == ["data:read", "invoke"]


def test_the_weaker_role():
    assert policy.weaker("admin", "viewer") == policy.weaker("viewer", "admin") == "viewer"
    assert policy.weaker("developer", "invoke-only") == "invoke-only"


def test_the_model_list():
    assert policy.may_call(principal(), "anything")
    narrow = principal(models=frozenset({"iris"}))
    assert policy.may_call(narrow, "iris")
    assert not policy.may_call(narrow, "iris2")
    assert not policy.may_call(principal(models=frozenset()), "iris")
