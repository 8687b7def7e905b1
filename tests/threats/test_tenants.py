"""Row 17: another tenant's objects. To another project's keys each of ours is as if it had never been."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest

from tests.threats.conftest import PROJECT, Estate
from tests.threats.hostile_files import graph
from tests.threats.probe import Probe
from tests.threats.walk import JSON, Way, document, guarded

# ways that make something of one's own under a name, whatever others have under it
MAKES_OWN = {("POST", "/api/v1/models/{name}/versions"), ("POST", "/api/v1/datasets")}
# what belongs to nobody: the same for every project
FIGURES = {"/api/v1/status", "/v2/models/stats", "/metrics"}
COMMON = {"/api/v1/algorithms", "/api/v1/transforms", "/api/v1/metrics", "/v2", "/v2/health/live", "/v2/health/ready"}
ABSENT = {"openai.models", "openai.responses"}  # the shared server has no chat model
WHO = ("other-admin", "other-developer")
NOTHING = {"name": "nothing", "model": "nothing", "id": "job_00000000000000000000ffff", "user": "user_00000000000000000000ffff",
           "alias": "nothing", "project": "nothing", "version": "1"}  # fmt: skip


def addressed() -> list[Way]:
    """Every route that names an object in its path."""
    return [way for way in guarded() if way.names and (way.method, way.path) not in MAKES_OWN]


def bodies(way: Way) -> dict[str, Any]:
    return way.request() if way.rule.body != "none" else {}


@pytest.fixture(scope="module")
def before(estate: Estate) -> dict[str, Any]:
    return snapshot(estate)


def snapshot(estate: Estate) -> dict[str, Any]:
    """What the first project has, as its own administrator sees it."""
    with estate.probe() as probe:
        lists = {way.path for way in guarded() if way.method == "GET" and not way.names} - COMMON - FIGURES
        # other tests of this session make and revoke keys
        return {path: probe.get(path).content for path in sorted(lists - {"/api/v1/audit", "/api/v1/keys"})}


def test_the_values_are_real(estate: Estate) -> None:
    """To its own project each of them is there: what follows would pass with any nonsense otherwise."""
    with estate.probe() as probe:
        for way in addressed():
            if way.method == "GET" and not way.rule.stream and way.rule.operation not in ABSENT:
                answer = probe.get(way.to(estate.values))
                assert answer.status_code == 200, (str(way), answer.text)


@pytest.mark.parametrize("who", WHO)
def test_every_object_of_ours_is_not_there_for_others(estate: Estate, before: dict[str, Any], who: str) -> None:
    """404, or the 403 that an object which is not there would get, word for word."""
    with estate.probe(who) as probe:
        for way in addressed():
            real, none = estate.values, _nothing(way)
            answer = probe.send(way.method, way.to(real), **bodies(way))
            absent = probe.send(way.method, way.to(none), **bodies(way))
            assert answer.status_code in (403, 404), (who, str(way), answer.text[:300])
            assert answer.status_code == absent.status_code, (who, str(way), answer.text[:300])
            named = {*real.values(), *none.values()}
            assert _told(answer, named) == _told(absent, named), "the answer tells that there is such a thing"
            if answer.status_code == 403:  # for want of a scope, which its own objects would not need less
                assert answer.json()["code"] in ("missing_scope", "forbidden"), (who, str(way), answer.text)
    assert snapshot(estate) == before


def _nothing(way: Way) -> dict[str, str]:
    return NOTHING | {f"{way.collection}.{name}": NOTHING[name] for name in way.names}


def _told(answer: Any, named: set[str]) -> str:
    """The answer without what the request itself named."""
    body = answer.json()
    body.pop("request_id", None)
    text = json.dumps(body)
    for value in sorted(named - {"1"}, key=len, reverse=True):
        text = text.replace(value, "*")
    return text


def test_every_list_has_ones_own_only(estate: Estate) -> None:
    """Whatever is asked for in the query; and the status, the audit and the figures say nothing of others either."""
    ours = [value for value in estate.values.values() if "_" in value]
    with estate.probe() as probe:
        project = probe.get("/api/v1/whoami").json()["project_id"]
    queries: list[dict[str, str]] = [
        {},
        {"limit": "100"},
        {"model": "iris"},
        {"project_id": project},
        {"project": "default"},
    ]
    for who in WHO:
        with estate.probe(who) as probe:
            for way in guarded():
                if way.method != "GET" or way.names or way.path in COMMON:
                    continue
                for query in queries:
                    answer = probe.get(way.path, params=query)
                    assert answer.status_code in (200, 403), (who, way.path, answer.text)
                    assert project not in answer.text, (who, way.path)
                    assert not [value for value in ours if value in answer.text], (who, way.path)
                    assert "iris" not in answer.text, (who, way.path, answer.text[:500])


def test_ids_of_others_open_no_page(estate: Estate) -> None:
    """`after` an id of ours, a page of theirs begins where it would for any other text."""
    with estate.probe("other-admin") as probe:
        for way in guarded():
            if way.method == "GET" and not way.names and ("query", "after") in way.parameters:
                for value in (value for value in estate.values.values() if "_" in value):
                    answer = probe.get(way.path, params={"after": value, "limit": "100"})
                    assert answer.status_code in (200, 403), (way.path, answer.text)
                    if answer.status_code == 200:
                        owners = {item.get("project_id", estate.other) for item in answer.json()["data"]}
                        assert owners <= {estate.other}, way.path


def test_no_body_reaches_another_projects_objects(estate: Estate, before: dict[str, Any]) -> None:
    """By name, version, alias or id, in each field that refers to something."""
    values = estate.values
    train = {"model": "mine", "dataset": "iris", "target": "species", "algorithm": "logistic-regression"}
    asked: list[tuple[str, str, Any]] = [
        ("POST", "/api/v1/training-jobs", train),
        ("POST", "/api/v1/training-jobs", train | {"dataset": "iris:1"}),
        ("POST", "/api/v1/training-jobs", train | {"validation": {"test": "iris:1"}}),
        ("POST", "/api/v1/evaluations", {"model": "iris:1", "method": {"kfold": 2}}),
        ("POST", "/api/v1/evaluations", {"model": "iris@threats", "method": {"test": "iris:1"}, "dataset": "iris"}),
        ("POST", "/api/v1/evaluations", {"model": "iris", "method": {"kfold": 2}, "compare": "iris:1"}),
        ("PUT", "/api/v1/deployments/mine", {"model": "iris"}),
        ("PUT", "/api/v1/deployments/mine", {"model": "iris:1"}),
        ("PUT", "/api/v1/deployments/mine", {"model": "iris@threats"}),
        ("POST", "/api/v1/keys", {"name": "mine", "user": values["user"]}),
        ("PUT", f"/api/v1/projects/default/members/{values['user']}", {"role": "viewer"}),
        ("DELETE", f"/api/v1/projects/default/members/{values['user']}", None),
        ("DELETE", f"/api/v1/keys/{estate.key_ids['developer']}", None),
    ]
    with estate.probe("other-admin") as probe:
        for method, path, body in asked:
            answer = probe.send(
                method, path, **({} if body is None else {"content": json.dumps(body), "headers": JSON})
            )
            assert answer.status_code in (400, 404), (method, path, body, answer.text)
        assert probe.get("/api/v1/jobs").json()["data"] == []
        assert probe.get("/api/v1/deployments").json()["data"] == []
    assert snapshot(estate) == before


def test_only_the_systems_administrator_crosses_by_the_header(estate: Estate) -> None:
    project = PROJECT
    for who, key in estate.keys.items():
        if who in ("revoked", "expired", "disabled"):
            continue
        with Probe(estate.server, key) as probe:
            for named in ("default", project, estate.other, "nowhere"):
                answer = probe.get("/api/v1/whoami", headers={"x-project": named})
                own = named in (project, estate.other) if who.startswith("other") else named == "default"
                crosses = who == "admin" and named != "nowhere"
                expected = 200 if own or crosses else 404 if who == "admin" else 403
                assert answer.status_code == expected, (who, named, answer.text)
                if expected == 200:
                    assert (answer.json()["project_id"] == estate.other) == (named != "default"), (who, named)


def test_the_same_names_are_different_things(estate: Estate) -> None:
    """Two projects use one name, one Idempotency-Key and the same content, and neither notices."""
    headers = {"idempotency-key": "threats-the-same"}
    with estate.probe("other-developer") as theirs, estate.probe("developer") as ours:
        made = {}
        for name, probe in (("theirs", theirs), ("ours", ours)):
            answer = probe.post(
                "/api/v1/datasets",
                data={"name": "threats-same"},
                files={"file": ("x.csv", b"a,b\n1,2\n3,4\n")},
                headers=headers,
            )
            assert answer.status_code == 201, answer.text
            made[name] = answer.json()
        assert made["theirs"]["id"] != made["ours"]["id"]
        assert made["theirs"]["project_id"] == estate.other != made["ours"]["project_id"]
        assert (made["theirs"]["version"], made["ours"]["version"]) == (1, 1), "the one counts the other's versions"
        model = theirs.post(
            "/api/v1/models/iris/versions",
            data={"task": "regression"},
            files={"file": ("m.onnx", graph())},
            headers=headers,
        )
        assert model.status_code == 201, model.text
        assert (model.json()["project_id"], model.json()["version"]) == (estate.other, 1)
        assert ours.get("/api/v1/models/iris/versions/1").json()["digest"] != model.json()["digest"]
        assert theirs.get("/v2/models/iris").status_code == 404, "a model of one's own is no deployment of others"
        assert theirs.delete("/api/v1/models/iris").status_code == 200
        assert ours.get("/api/v1/models/iris/versions/1").status_code == 200, "what they delete is theirs"


def test_every_kept_thing_has_a_project(estate: Estate) -> None:
    """A table whose rows belong to nobody could not be asked for by project."""
    with sqlite3.connect(f"file:{estate.server.home}/catalog.sqlite?mode=ro", uri=True) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {name: {row[1] for row in db.execute(f'PRAGMA table_info("{name}")')} for name in names}
    free = {name for name, found in columns.items() if not found & {"project_id", "job_id", "deployment_id"}}
    common = {"projects", "users", "changes", "migrations", "alembic_version", "sqlite_sequence", "project", "user"}
    assert free <= common, free - common


def test_the_documentation_names_every_route() -> None:
    """A test of the tests: what is walked is what is documented, with the errors that an absent object gives."""
    for way in addressed():
        responses = document()["paths"].get(way.path, {}).get(way.method.lower(), {}).get("responses", {})
        assert "404" in responses, str(way)
