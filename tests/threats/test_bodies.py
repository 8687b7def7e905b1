"""Mass assignment, verbs above one's power, numbers beyond any machine, and what answers tell of the inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from modelworks.security import policy
from tests.server import until
from tests.test_e2e_lifecycle import ROW
from tests.threats.conftest import Estate
from tests.threats.probe import Probe, Wire, head
from tests.threats.walk import JSON, Way, declared, guarded, objects, replaced, with_json

OWNED = {
    "id": "mine_1", "status": "ready", "owner": "me", "owner_id": "me", "project_id": "", "project": "", "revision": 99, "created_at": 0,
    "created_by": "me", "digest": "0" * 64, "role_": "admin", "is_admin": True, "token": 1, "lease_owner": "me", "spec_revision": 9,
    "ready_replicas": 9, "model_version_id": "x", "blob": "x", "key": "mw_mine", "hint": "mine", "revoked_at": None, "disabled": False,
    "user_id": "me", "__class__": "x", "__proto__": {"admin": True}, "$set": {"role": "admin"},
}  # fmt: skip
# these protocols ask that fields which they do not name are ignored; that they change nothing is tested below
LENIENT = {"oip.infer", *(name for name in policy.OPERATIONS if name.startswith("openai."))}
FAR = (2**63, 10**30, 10**300, -1, -(2**63) - 1)


CELL = ("edits", 0, "value")  # what an edit puts into a table is data, whatever it is


def test_no_field_of_ours_is_taken_from_a_body(estate: Estate) -> None:
    """Every object of every JSON body: a field that it does not declare is refused and named."""
    # what is data: rows by feature, parameters of algorithms and transforms. They are judged by what they belong to.
    with estate.probe() as probe:
        for way in with_json():
            if way.rule.operation in LENIENT:
                continue
            example = way.body()
            for place in objects(example):
                if place and place[-1] in ("shares", "where"):  # names of a split's parts and of columns
                    continue
                for name, value in OWNED.items():
                    known = example if not place else None
                    if known is not None and name in known:
                        continue
                    answer = _send(probe, way, estate, replaced(example, (*place, name), value))
                    assert answer.status_code == 400, (str(way), place, name, answer.text[:300])
                    assert name in answer.text, (str(way), place, name, answer.text[:300])


def test_no_field_of_ours_is_taken_from_a_form_or_a_query(estate: Estate) -> None:
    with estate.probe() as probe:
        for way in guarded():
            if way.rule.body != "form":
                continue
            for name in OWNED:
                data, files = {"name": "threats-mass", name: "x"}, {"file": ("x.csv", b"a,b\n1,2\n")}
                answer = probe.send(way.method, way.to(estate.values), data=data, files=files)
                assert answer.status_code == 400, (str(way), name, answer.text[:300])
        query = {"role": "admin", "project_id": estate.other, "status": "ready", "id": "mine"}
        made = probe.post("/api/v1/keys", params=query, json={"name": "threats-mass", "role": "viewer"}).json()
        assert (made["role"], made["project_id"] != estate.other, made["id"] != "mine") == ("viewer", True, True)
        probe.delete(f"/api/v1/keys/{made['id']}")


def test_what_an_inference_carries_beside_changes_nothing(estate: Estate) -> None:
    tensors = [{"name": name, "shape": [1, 1], "datatype": "FP32", "data": [value]} for name, value in ROW.items()]
    with estate.probe() as probe:
        plain = probe.post("/v2/models/iris/infer", json={"inputs": tensors}).json()
        extra = {
            **OWNED,
            "inputs": [{**one, **OWNED, "parameters": {**OWNED}} for one in tensors],
            "parameters": {**OWNED},
        }
        extra |= {"model_name": "other", "model_version": "2", "deployment": "other", "deadline": 1e9, "priority": -1}
        answer = probe.post("/v2/models/iris/infer", json=extra | {"id": "1"}).json()
        assert answer.pop("id") == "1"
        assert answer == plain


def test_members_keys_do_nothing_of_an_administrators(estate: Estate) -> None:
    asked = (
        ("POST", "/api/v1/keys", {"name": "threats-more", "role": "admin"}),
        ("POST", "/api/v1/keys", {"name": "threats-more", "role": "invoke-only"}),
        ("POST", "/api/v1/projects", {"name": "threats-more"}),
        ("POST", "/api/v1/users", {"name": "threats-more"}),
        ("PUT", f"/api/v1/projects/default/members/{estate.values['user']}", {"role": "admin"}),
        ("DELETE", f"/api/v1/keys/{estate.key_ids['viewer']}", None),
        ("DELETE", f"/api/v1/users/{estate.values['user']}", None),
        ("GET", "/api/v1/keys", None),
        ("GET", "/api/v1/users", None),
        ("GET", "/api/v1/audit", None),
        ("GET", "/api/v1/memberships", None),
    )
    for who in ("developer", "viewer", "invoke-only", "narrow", "listed", "user", "other-developer"):
        with estate.probe(who) as probe:
            for method, path, body in asked:
                answer = probe.send(method, path, **({} if body is None else {"json": body}))
                assert answer.status_code == 403, (who, method, path, answer.text)
                assert answer.json()["scope"] not in probe.get("/api/v1/whoami").json()["scopes"]


def test_another_projects_administrator_administers_nothing_else(estate: Estate) -> None:
    with estate.probe("other-admin") as probe:
        for method, path, body in (
            ("POST", "/api/v1/projects", {"name": "threats-more"}),
            ("POST", "/api/v1/users", {"name": "threats-more"}),
            ("GET", "/api/v1/users", None),
        ):
            answer = probe.send(method, path, **({} if body is None else {"json": body}))
            assert answer.status_code == 403, (method, path, answer.text)
        for wanted in ({"scopes": ["projects:write"]}, {"scopes": ["users:write"], "role": "admin"}, {"scopes": ["*"]}):
            answer = probe.post("/api/v1/keys", json={"name": "threats-more", "role": "admin"} | wanted)
            if answer.status_code == 201:  # what such a key may do is less than it says
                mine = set(probe.get("/api/v1/whoami").json()["scopes"])
                with Probe(estate.server, answer.json()["key"]) as more:
                    assert set(more.get("/api/v1/whoami").json()["scopes"]) <= mine
                    assert more.post("/api/v1/projects", json={"name": "threats-more"}).status_code == 403


# -- numbers and nesting -----------------------------------------------------------------------------------------------


def numbers() -> Iterator[tuple[Way, tuple[str | int, ...]]]:
    for way in with_json():
        for place in dict.fromkeys(declared(way.schema, "integer")):
            yield way, place


def test_the_walk_finds_the_numbers() -> None:
    found = {f"{way.path} {'.'.join(map(str, place))}" for way, place in numbers()}
    assert found >= {
        "/api/v1/deployments/{name} resources.memory_mb",
        "/api/v1/deployments/{name} replicas.max",
        "/api/v1/keys requests_per_minute",
        "/api/v1/training-jobs seed",
        "/api/v1/models/{name}/aliases/{alias} version",
        "/api/v1/deployments/{name}/rollback revision",
    }


@pytest.mark.parametrize("number", FAR, ids="{:.0e}".format)
def test_no_integer_is_beyond_all_machines(estate: Estate, number: int) -> None:
    """What no machine has so much of is refused when it is asked for, not by the process that would need it."""
    taken = []
    with estate.probe() as probe:
        for way, place in numbers():
            if place == CELL:
                continue
            body = _meaningless(replaced(way.body(), place, number))
            answer = probe.send(way.method, way.to(estate.values), **way.request(body))
            if answer.status_code != 400:  # 404: the number passed, and only what it was asked for is not there
                taken.append(f"{way} {place}: {answer.status_code}")
    assert not taken


def _meaningless(body: Any) -> Any:
    """The same body about a model or data that is not there, where it names some: nothing is made of it."""
    return {**body, **{name: "threats-nothing" for name in ("dataset", "model") if name in body}}


def test_predictions_are_bounded_in_rows_and_nesting(estate: Estate) -> None:
    predict, infer = "/api/v1/deployments/iris/predict", "/v2/models/iris/infer"
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    first = next(iter(ROW))
    bodies: list[tuple[str, Any]] = [
        (predict, {"inputs": [ROW] * 65_537}),
        (predict, {"inputs": []}),
        (predict, {"inputs": [[]]}),
        (predict, {"inputs": [deep]}),
        (predict, {"inputs": [{**ROW, first: deep}]}),
        (predict, {"inputs": [{**ROW, first: {"a": 1}}]}),
        (predict, {"inputs": [{**ROW, **{f"more {number}": 1 for number in range(10_000)}}]}),
        (predict, {"inputs": [ROW], "n": 10**9}),
        (infer, {"inputs": [{"name": first, "shape": [1, 1], "datatype": "FP32", "data": [1]}] * 5000}),
        (infer, {"inputs": [{"name": first, "shape": [1] * 200, "datatype": "FP32", "data": deep}]}),
    ]
    with estate.probe() as probe:
        for path, body in bodies:
            answer = probe.post(path, json=body)
            assert answer.status_code in (400, 413), (path, str(body)[:100], answer.text[:300])
            assert len(answer.content) < 10_000


def test_an_error_does_not_send_back_what_it_was_sent(estate: Estate) -> None:
    """A text of a megabyte in each field that takes one."""
    with estate.probe() as probe:
        for way in with_json():
            for place in dict.fromkeys(declared(way.schema, "string")):
                if place == CELL:
                    continue
                text = "x" * 1_000_000
                answer = _send(probe, way, estate, _meaningless_but(place, replaced(way.body(), place, text)))
                assert answer.status_code >= 400, (str(way), place)
                assert len(answer.content) < 20_000, (str(way), place, len(answer.content))


def _meaningless_but(place: tuple[str | int, ...], body: Any) -> Any:
    return body if place in (("dataset",), ("model",)) else _meaningless(body)


# -- what answers tell -------------------------------------------------------------------------------------------------


def test_errors_have_one_form_and_tell_nothing_of_the_inside(estate: Estate) -> None:
    """Every way to be wrong on every route; the probe looks for frames, addresses and paths in each answer."""
    wrong: tuple[Any, ...] = (
        "",
        "{",
        "[]",
        "null",
        "1",
        '"x"',
        "[[]]",
        '{"":0}',
        "\x00",
        "\ufffe",
        "{}",
        '{"a":1,"a":2}',
        "true",
    )
    with estate.probe() as probe:
        for way in guarded():
            for text in wrong:
                content = {} if way.rule.body == "none" else {"content": text.encode(), "headers": JSON}
                answer = probe.send(way.method, way.to(_nowhere(way, estate)), **content)
                if answer.status_code >= 400:
                    _formed(way, answer)
                if way.rule.body == "none":
                    break


def _formed(way: Way, answer: Any) -> None:
    body = answer.json()
    if way.path.startswith("/v2"):
        assert body.keys() == {"error"}
        return
    if way.path.startswith("/v1"):
        assert body["error"].keys() == {"message", "type", "param", "code"}, str(way)
        return
    assert answer.headers["content-type"] == "application/problem+json", str(way)
    assert {"type", "title", "status", "detail", "code", "param", "request_id"} <= body.keys(), str(way)
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["status"] == answer.status_code


def _nowhere(way: Way, estate: Estate) -> dict[str, str]:
    """Values that name nothing, so that no route finds something to do."""
    ids = {f"{way.collection}.{name}": "threats-nothing" for name in way.names}
    return estate.values | ids | {f"{way.collection}.version": "9"}


def test_logs_tell_nothing_of_the_machine(estate: Estate) -> None:
    """Of jobs and replicas, also of one that broke: the probe looks at each."""
    job = estate.values["training-jobs.id"]
    with estate.probe() as probe:
        until(lambda: "accuracy" in probe.get(f"/api/v1/training-jobs/{job}/log").text, 60)  # the job may still run
        assert "ready" in probe.get("/api/v1/deployments/iris/logs").text
        replica = probe.get("/api/v1/deployments/iris/replicas").json()["data"][0]
        log = next(estate.server.home.rglob(f"{replica['id']}.log"))
        home = str(estate.server.home)
        with log.open("a") as file:  # as a replica's process writes when it breaks
            file.write(f'Traceback (most recent call last):\n  File "{__file__}", line 1, in x\n    y()\n')
            file.write(f"OSError: cannot open {home}/blobs/ab and {__file__.rpartition('tests')[0]}modelworks\n")
        text = probe.get("/api/v1/deployments/iris/logs").text
        assert "OSError: cannot open" in text, "what went wrong is still said"


def test_head_and_options_tell_no_more_than_get(estate: Estate) -> None:
    with Wire(estate.server) as wire:
        for path in ("/api/v1/models", "/api/v1/keys", "/v2/models/iris"):
            whole = wire.ask(head("GET", path, estate.server.key))
            empty = wire.ask(head("HEAD", path, estate.server.key))
            assert (empty.status, empty.body) == (whole.status, b"")
            assert wire.ask(head("OPTIONS", path, estate.server.key)).status == 405
            traced = wire.ask(head("TRACE", path, estate.server.key, "x-secret: mirrored"))
            assert traced.status == 405
            assert b"mirrored" not in traced.body
            answer = wire.ask(
                head("OPTIONS", path, estate.server.key, "origin: http://evil", "access-control-request-method: GET")
            )
            assert not [name for name in answer.headers if name.startswith("access-control")]


def _send(probe: Probe, way: Way, estate: Estate, body: Any) -> Any:
    return probe.send(way.method, way.to(estate.values), content=json.dumps(body), headers=JSON)
