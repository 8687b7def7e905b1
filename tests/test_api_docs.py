"""The specification and its page: complete, valid, and without any request to elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from modelworks.core.types import Dataset, Job, Key, Replica
from tests.api_house import House, house


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture(scope="module")
def document(api: House) -> dict[str, Any]:
    with api.client(None) as client:
        return client.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, body) for path, item in document["paths"].items() for method, body in item.items()]


def test_every_route_is_documented(api: House, document: dict[str, Any]) -> None:
    documented = {(path, method.upper()) for path, method, _ in operations(document)}
    pages = {"/docs", "/docs/start.js", "/docs/{asset}", "/openapi.json"}
    assert documented == {(path, method) for path, method, _ in api.app.table if path not in pages}


def test_every_operation_says_what_it_does_and_has_examples_and_errors(document: dict[str, Any]) -> None:
    identities = [body["operationId"] for _, _, body in operations(document)]
    assert len(set(identities)) == len(identities)
    for path, method, body in operations(document):
        where = f"{method} {path}"
        assert body["summary"], where
        assert body["description"], where
        assert body["tags"], where
        for parameter in body.get("parameters", []):
            assert parameter.get("description"), (where, parameter["name"])
        good = [response for status, response in body["responses"].items() if status.startswith("2")]
        assert good, where
        for response in good:
            assert all("example" in content for content in response["content"].values()), where
        if path == "/health":
            continue
        assert body["security"] == [{"key": []}], where
        assert {"400", "401", "403", "429", "500", "503"} <= body["responses"].keys(), where
        assert "{" not in path or "404" in body["responses"], where
        form = "application/json" if path.startswith(("/v1", "/v2")) else "application/problem+json"
        for status, response in body["responses"].items():
            if status[0] in "45":
                assert response["content"].keys() == {form}, where
                assert "example" in response["content"][form], where
        if "requestBody" in body:
            assert {"413", "415"} <= body["responses"].keys(), where
            for content in body["requestBody"]["content"].values():
                assert "example" in content, where


def test_the_examples_fit_their_schemas(document: dict[str, Any]) -> None:
    def check(schema: dict[str, Any], example: Any, where: str) -> None:
        whole = {**schema, "components": document["components"]}
        validator = jsonschema_rs.Draft202012Validator(whole)
        errors = [error.message for error in validator.iter_errors(example)]
        assert not errors, (where, errors)

    for path, method, body in operations(document):
        contents = [response["content"] for response in body["responses"].values()]
        contents += [body["requestBody"]["content"]] if "requestBody" in body else []
        for content in contents:
            for media, described in content.items():
                if media != "multipart/form-data":
                    check(described["schema"], described["example"], f"{method} {path} {media}")


def test_an_error_is_one_that_the_operation_may_answer(document: dict[str, Any]) -> None:
    def error(method: str, path: str, status: str) -> Any:
        (content,) = document["paths"][path][method]["responses"][status]["content"].values()
        return content["example"]

    predict = "/api/v1/deployments/{name}/predict"
    assert error("post", predict, "400")["code"] == "unknown_feature"
    assert error("post", predict, "404")["code"] == "deployment_not_found"
    assert error("post", "/api/v1/training-jobs", "400")["param"] == "target"
    assert error("post", "/api/v1/training-jobs", "404")["code"] == "dataset_not_found"
    assert "input" in error("post", "/v2/models/{model}/infer", "400")["error"]
    for path, method, body in operations(document):
        if "400" in body["responses"] and path.startswith("/api/") and "training" not in path:
            assert "target" not in error(method, path, "400")["detail"], f"{method} {path}"


def test_the_error_examples_belong_to_operations_that_there_are() -> None:
    from modelworks.api.examples import OWN
    from modelworks.security import policy

    nouns = {operation.partition(".")[0] for operation in policy.OPERATIONS}
    assert OWN.keys() <= nouns | policy.OPERATIONS.keys()


def test_the_document_is_valid_openapi_and_its_references_resolve(document: dict[str, Any]) -> None:
    import schemathesis

    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    assert len(list(schema.get_all_operations())) == len(operations(document))
    text = str(document)
    for reference in set(re.findall(r"#/components/schemas/([A-Za-z0-9_]+)", text)):
        assert reference in document["components"]["schemas"], reference


def test_hidden_fields_are_not_in_the_schemas(document: dict[str, Any]) -> None:
    for noun in (Dataset, Job, Key, Replica):
        assert not noun.HIDDEN & document["components"]["schemas"][noun.__name__]["properties"].keys()


def test_the_page_loads_from_here_only_and_under_a_strict_policy(api: House) -> None:
    with api.client(None) as client:
        page = client.get("/docs")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "<script>" not in page.text
        assert "style=" not in page.text
        assert "://" not in page.text
        for asset in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            found = client.get(asset)
            assert found.status_code == 200, asset
            assert found.headers["content-type"].startswith(("text/javascript", "text/css"))
        assert client.get("/docs/../openapi.json").status_code in (200, 401)
        for path in ("/docs/..%2fhealth", "/docs/LICENSE", "/docs/swagger-ui.css.map", "/docs/%2e%2e%2fapp.py"):
            assert client.get(path).status_code in (401, 404), path


def test_the_application_imports_nothing_heavy_and_needs_no_network() -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a connection was made")
socket.socket.connect = refuse
import modelworks.api.app, modelworks.api.protocol
from modelworks.control import access, deployments, library
heavy = {"torch", "sklearn", "onnxruntime", "pandas", "lightgbm", "transformers", "matplotlib", "skl2onnx", "scipy"}
found = heavy & set(sys.modules)
assert not found, found
from modelworks.api.native import jobs
for catalogue in (jobs.list_algorithms, jobs.list_transforms, jobs.list_metrics):
    assert catalogue().status_code == 200
found = heavy & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
