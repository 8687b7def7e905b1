"""What the attacks are tried on: the shared server with something of every kind in it, keys of every kind, two projects."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server import RunningServer
from tests.threats.probe import Probe
from tests.threats.walk import VALUES

PROJECT = "threats-other"
ROLES = ("developer", "viewer", "invoke-only")


@dataclass(frozen=True)
class Estate:
    """`keys` by who holds them; `values`: of path parameters, naming objects of the first project; `other`: an id."""

    server: RunningServer
    keys: dict[str, str]
    key_ids: dict[str, str]
    values: dict[str, str]
    other: str

    def probe(self, who: str | None = "admin") -> Probe:
        return Probe(self.server, self.keys[who] if who else None)


@pytest.fixture(scope="session")
def estate(iris: RunningServer) -> Iterator[Estate]:
    with Probe(iris, iris.key) as admin:
        yield _furnish(iris, admin)


def _furnish(server: RunningServer, admin: Probe) -> Estate:
    keys, key_ids = {"admin": server.key}, {}

    def make(who: str, **spec: Any) -> str:
        project = {"x-project": PROJECT} if who.startswith("other") else {}
        answer = admin.post("/api/v1/keys", json={"name": f"threats-{who}", **spec}, headers=project)
        assert answer.status_code == 201, answer.text
        keys[who], key_ids[who] = answer.json()["key"], answer.json()["id"]
        return key_ids[who]

    other = admin.post("/api/v1/projects", json={"name": PROJECT}).json()["id"]
    for role in ROLES:
        make(role, role=role)
        make(f"other-{role}", role=role)
    make("other-admin", role="admin")
    make("listed", role="invoke-only", models=["somewhere-else"])
    make("narrow", role="developer", scopes=["data:read", "invoke"])
    make("expired", role="admin", expires_in=0.01)
    admin.delete(f"/api/v1/keys/{make('revoked', role='admin')}")
    user, gone = (
        admin.post("/api/v1/users", json={"name": f"threats-{name}"}).json()["id"] for name in ("user", "gone")
    )
    for member in (user, gone):
        answer = admin.send("PUT", f"/api/v1/projects/default/members/{member}", json={"role": "developer"})
        assert answer.status_code == 200, answer.text
    make("user", role="admin", user=user)
    make("disabled", role="developer", user=gone)
    admin.delete(f"/api/v1/users/{gone}")
    values = VALUES | _objects(admin) | {"keys.id": key_ids["viewer"], "users.id": user, "user": user}
    time.sleep(0.5)  # what was refused a moment ago is now refused from memory, too
    return Estate(server, keys, key_ids, values, other)


def _objects(admin: Probe) -> dict[str, str]:
    """An id of each kind of thing that has one."""
    alias = admin.send("PUT", "/api/v1/models/iris/aliases/threats", json={"version": 1})
    assert alias.status_code == 200, alias.text
    evaluation = admin.post("/api/v1/evaluations", json={"model": "iris:1", "method": {"holdout": 0.5}}).json()
    assert admin.finished(evaluation["id"])["status"] == "succeeded"
    ingest = admin.get("/api/v1/jobs?kind=ingest").json()["data"][0]["id"]
    training = admin.get("/api/v1/training-jobs?status=succeeded").json()["data"][0]["id"]
    report = admin.get("/api/v1/reports?model=iris").json()["data"][0]["id"]
    return {
        "jobs.id": ingest,
        "training-jobs.id": training,
        "evaluations.id": evaluation["id"],
        "reports.id": report,
        "reports.name": "calibration",
    }


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that appears only if something that we sent was run."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something that was sent was run"
