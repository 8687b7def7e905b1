"""The guard: who may, before the body, on every route; sizes, rates, times, content types."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.api.body import check_depth
from modelworks.api.routes import Routes, RouteTable
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import ProjectSpec
from modelworks.security import policy
from tests.api_house import ROW, House, house, read_all

PUBLIC = {"/health", "/docs", "/docs/start.js", "/docs/{asset}", "/openapi.json"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home"), max_body=2_000_000, max_upload=200_000, body_timeout=1.0) as found:
        yield found


def concrete(path: str) -> str:
    for name, value in {"version": "1", "asset": "swagger-ui.css"}.items():
        path = path.replace(f"{{{name}}}", value)
    parts = ["iris" if part.startswith("{") else part for part in path.split("/")]
    return "/".join(parts)


def routes(api: House) -> list[tuple[str, str, Any]]:
    return list(api.app.table)


def test_every_route_has_an_operation_of_the_policy_table_or_is_declared_public(api: House) -> None:
    public = {path for path, _, rule in routes(api) if rule.operation is None}
    assert public == PUBLIC
    assert all(rule.operation in policy.OPERATIONS for path, _, rule in routes(api) if path not in PUBLIC)
    used = {rule.operation for _, _, rule in routes(api)} - {None}
    assert used == set(policy.OPERATIONS), "operations without a route, or the other way round"


def test_the_guard_knows_every_route_of_the_application_and_no_other(api: House) -> None:
    inside = {(route.path, method) for route in api.app.inner.routes for method in route.methods - {"HEAD"}}
    assert inside == {(path, method) for path, method, _ in routes(api)}


def test_a_route_without_an_operation_cannot_be_registered(api: House) -> None:
    rogue = Routes("Rogue")
    rogue.get("/api/v1/rogue", "rogue.list", "Rogue", answer={})(lambda: None)
    with pytest.raises(ValueError, match=r"rogue\.list"):
        rogue.mount(api.app.inner, RouteTable())


def test_without_a_key_every_route_and_method_is_401(api: House) -> None:
    with api.client(None) as client:
        paths = {concrete(path) for path, _, _ in routes(api) if path not in PUBLIC}
        for path in [*paths, "/", "/nowhere", "/api/v1/nowhere", "/v2/nowhere", "/console", "/metrics", "/v1/models"]:
            for method in METHODS:
                answer = client.request(method, path)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"].startswith("Bearer")
        for path in PUBLIC:  # other methods on the public paths
            assert client.post(concrete(path)).status_code == 401
            assert client.get(concrete(path)).status_code == 200
            assert client.head(concrete(path)).status_code == 200


def test_a_wrong_key_is_401_however_it_is_wrong(api: House) -> None:
    key = api.keys["admin"]
    wrong = ["", "Bearer", f"Basic {key}", key, f"Bearer {key}x", f"Bearer {key[:-1]}", "Bearer mw_" + "a" * 43]
    for value in wrong:
        with api.client(None) as client:
            assert client.get("/api/v1/models", headers={"authorization": value}).status_code == 401, value
    with api.client(None) as client:
        assert client.get("/api/v1/models", headers={"cookie": f"authorization=Bearer {key}"}).status_code == 401
        assert client.get(f"/api/v1/models?api_key={key}").status_code == 401
        twice = [("authorization", f"Bearer {key}"), ("authorization", "Bearer mw_nonsense")]
        assert client.get("/api/v1/models", headers=twice).status_code == 401


def test_each_role_gets_exactly_what_the_policy_table_gives_it(api: House) -> None:
    for role in ("developer", "viewer", "invoke-only"):
        with api.client(role) as client:
            for path, method, rule in routes(api):
                if rule.operation is None:
                    continue
                scope = policy.OPERATIONS[rule.operation]
                granted = scope == policy.ANY_KEY or scope in policy.granted(role, "default")
                # a content type that no route takes: what is allowed stops at 415, before anything is done
                headers = {"content-type": "application/x-nothing"}
                status = client.request(method, concrete(path), headers=headers, content=b"x").status_code
                assert status == (415 if granted else 403), (role, method, path)


def test_unknown_paths_and_methods_with_a_key_are_404_and_405_in_the_dialects_form(api: House) -> None:
    with api.client() as client:
        nowhere = client.get("/api/v1/nowhere")
        assert nowhere.status_code == 404
        assert nowhere.headers["content-type"] == "application/problem+json"
        assert nowhere.json()["code"] == "no_such_route"
        assert client.get("/v2/nowhere").json().keys() == {"error"}
        wrong = client.patch("/api/v1/models")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")
        assert client.get("/api/v1/models/").status_code == 404  # no redirect


def test_another_project_is_not_seen_and_x_project_is_for_administrators(api: House) -> None:
    other = api.services.access.create_project(api.caller(), ProjectSpec(name="other"))
    with api.client() as client:
        made = client.post("/api/v1/keys", json={"name": "there", "role": "admin"}, headers={"x-project": "other"})
        assert made.json()["project_id"] == other.id
    with api.client("developer") as client:
        assert client.get("/api/v1/models", headers={"x-project": "other"}).status_code == 403
    there = {"authorization": f"Bearer {made.json()['key']}"}
    with api.client(None) as client:
        assert client.get("/v2/models/iris", headers=there).status_code == 404
        answer = client.post("/api/v1/deployments/iris/predict", json={"inputs": [ROW]}, headers=there)
        assert answer.status_code == 404
        assert client.delete(f"/api/v1/keys/{api.admin.key_id}", headers=there).status_code == 404


def test_a_key_may_call_only_the_deployments_on_its_list(api: House) -> None:
    key = api.make_key("invoke-only", models=["other"])
    with api.client(None) as client:
        headers = {"authorization": f"Bearer {key}"}
        assert client.get("/v2/models/iris", headers=headers).status_code == 403
        assert client.post("/v2/models/iris/infer", json={"inputs": []}, headers=headers).status_code == 403
        answer = client.post("/api/v1/deployments/iris/predict", json={"inputs": [ROW]}, headers=headers)
        assert answer.status_code == 403


def test_the_body_is_not_waited_for_before_the_key_is_checked(api: House) -> None:
    head = b"POST /api/v1/training-jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
    before = time.monotonic()
    answer = api.raw(head + b"connection: close\r\n\r\n", seconds=3)
    assert answer.startswith(b"HTTP/1.1 401")
    assert time.monotonic() - before < 0.9  # body_timeout is 1 s
    expecting = api.raw(head + b"expect: 100-continue\r\nconnection: close\r\n\r\n", seconds=3)
    assert expecting.startswith(b"HTTP/1.1 401")


def test_request_ids_are_taken_when_sane_and_made_otherwise(api: House) -> None:
    with api.client(None) as client:
        assert client.get("/health", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
        for bad in ("a b", "x" * 129, "<script>", ""):
            made = client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
            assert made.startswith("req_")
        refused = client.get("/api/v1/models", headers={"x-request-id": "mine"})
        assert refused.json()["request_id"] == refused.headers["x-request-id"] == "mine"


def test_rate_limits_are_told_and_kept(api: House) -> None:
    key = api.make_key("viewer", requests_per_minute=2)
    with api.client(None) as client:
        headers = {"authorization": f"Bearer {key}"}
        first = client.get("/api/v1/models", headers=headers)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        client.get("/api/v1/models", headers=headers)
        refused = client.get("/api/v1/models", headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize(
    "media", ["application/octet-stream", "application/x-pickle", "application/python-pickle", "text/plain"]
)
def test_pickle_and_other_types_are_refused_on_every_route(api: House, media: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickled = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    with api.client() as client:
        for path, method, rule in routes(api):
            if rule.operation is not None:
                answer = client.request(method, concrete(path), content=pickled, headers={"content-type": media})
                assert answer.status_code == 415, (method, path)
                # and under a type that is taken, it is not read as anything but JSON or a form
                if rule.body == "json":
                    lying = client.request(
                        method, concrete(path), content=pickled, headers={"content-type": "application/json"}
                    )
                    assert lying.status_code == 400, (method, path)
    assert not canary.exists()


def test_bodies_are_bounded_by_what_is_announced_and_by_what_comes(api: House) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 65536

    with api.client() as client:
        assert client.post("/api/v1/deployments/iris/predict", content=b" " * 2_000_001).status_code == 413
        for path in ("/api/v1/deployments/iris/predict", "/v2/models/iris/infer", "/api/v1/training-jobs"):
            assert client.post(path, content=chunks()).status_code == 413
        big = client.post("/api/v1/datasets", data={"name": "x"}, files={"file": ("x.csv", b"a\n" * 200_000)})
        assert big.status_code == 413
    assert not list((api.home / "tmp").glob("*")), "the upload's folder was left behind"


def test_a_gigabyte_that_is_announced_is_refused_before_it_comes(api: House) -> None:
    key = api.keys["admin"].encode()
    head = b"POST /api/v1/datasets HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key
    head += (
        b"\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: 1073741824\r\nconnection: close\r\n\r\n"
    )
    assert api.raw(head, seconds=3).startswith(b"HTTP/1.1 413")


def test_a_body_that_stalls_is_408_and_the_connection_closes(api: House) -> None:
    key = api.keys["admin"].encode()
    for path, media in (
        (b"/api/v1/training-jobs", b"application/json"),
        (b"/api/v1/datasets", b"multipart/form-data; boundary=b"),
    ):
        with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
            connection.sendall(
                b"POST "
                + path
                + b" HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
                + key
                + b"\r\ncontent-type: "
                + media
                + b"\r\ncontent-length: 100\r\n\r\n--b\r\n"
            )
            before = time.monotonic()
            answer = read_all(connection)  # until the server closes
            assert answer.startswith(b"HTTP/1.1 408"), answer
            assert b'"code":"request_timeout"' in answer
            assert 0.5 < time.monotonic() - before < 4


def test_a_body_that_drips_is_408(api: House) -> None:
    key = api.keys["admin"].encode()
    with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
        connection.sendall(
            b"POST /api/v1/training-jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
            + key
            + b"\r\ncontent-length: 1000\r\n\r\n"
        )
        for _ in range(40):
            try:
                connection.sendall(b" ")
            except OSError:
                break
            time.sleep(0.05)
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_deep_json_is_400_on_every_route_that_reads_json(api: House) -> None:
    deep = [b"[" * 100_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000, b'{"inputs":' + b"[" * 5_000 + b"]" * 5_000 + b"}"]
    with api.client() as client:
        for path, method, rule in routes(api):
            if rule.body in ("json", "infer"):
                for body in deep:
                    answer = client.request(
                        method, concrete(path), content=body, headers={"content-type": "application/json"}
                    )
                    assert answer.status_code == 400, (method, path, answer.text)


def test_depth_counts_brackets_outside_of_strings_only() -> None:
    check_depth(json.dumps({"text": "[" * 1000 + '"\\' + "{" * 1000}).encode())
    check_depth(b"[[]," * 30 + b"[]" + b"]" * 30)
    with pytest.raises(InvalidInput, match="nested"):
        check_depth(b'["\\\\",' * 65 + b"1" + b"]" * 65)


def test_constants_that_json_does_not_have_are_refused(api: House) -> None:
    with api.client() as client:
        for text in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"\xff"):
            body = (
                b'{"model":"iris","dataset":"iris","target":"t","algorithm":"ridge","hyperparameters":{"alpha":'
                + text
                + b"}}"
            )
            answer = client.post("/api/v1/training-jobs", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            assert answer.json()["code"] in ("invalid_json", "invalid_input")
