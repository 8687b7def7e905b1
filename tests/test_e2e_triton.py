"""tritonclient, unchanged, against the real server, from a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import httpx2
import pytest

from tests.every_datatype import write_model
from tests.server import RunningServer

ROWS = [
    {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2},
    {"sepal length (cm)": 6.7, "sepal width (cm)": 3.0, "petal length (cm)": 5.2, "petal width (cm)": 2.3},
]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="needs tritonclient")


@pytest.fixture(scope="module")
def told(iris: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    client = iris.client
    version = client.models.import_("every", write_model(tmp_path_factory.mktemp("every") / "every.onnx"))
    client.deployments.put("every", model=f"every:{version.version}")
    client.deployments.wait_ready("every")
    address = iris.url.removeprefix("http://")
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_story", address, iris.key, str(iris.grpc_port)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_form_of_request_gets_the_same_right_answer(iris: RunningServer, told: dict[str, Any]) -> None:
    with iris.http() as http:
        native = http.post("/api/v1/deployments/iris/predict", json={"inputs": ROWS}).json()["outputs"]
    expected = {
        "label": [row["label"] for row in native],
        "probabilities": [[round(value, 4) for value in row["probabilities"].values()] for row in native],
    }
    assert expected["label"] == ["setosa", "virginica"]
    assert len(told["answers"]) == 7
    for name, answer in [*told["answers"].items(), *(("aio", answer) for answer in told["concurrent"])]:
        assert answer["label"] == expected["label"], name
        for have, want in zip(answer["probabilities"], expected["probabilities"], strict=True):
            assert have == pytest.approx(want, abs=2e-4), name


def test_every_datatype_comes_back_as_it_went_over_every_carrier(told: dict[str, Any]) -> None:
    assert set(told["datatypes"]) == {
        "http None", "http gzip", "http deflate", "http JSON", "http aio", "grpc", "grpc stream", "grpc aio",
    }  # fmt: skip
    assert {way: wrong for way, wrong in told["datatypes"].items() if wrong} == {}


def test_what_the_client_asks_about_the_server_and_its_models(told: dict[str, Any]) -> None:
    assert told["live"] == [True, True]
    assert told["ready"] == [True, False]
    assert "binary_tensor_data" in told["server"]["extensions"]
    assert told["model"]["versions"] == ["1"]
    assert [item["data_type"] for item in told["config"]["output"]] == ["TYPE_STRING", "TYPE_FP32"]
    assert {"name": "iris", "version": "1", "state": "READY", "reason": ""} in told["index"]
    stats = told["stats"]["model_stats"][0]
    assert stats["inference_count"] >= 7
    assert stats["inference_stats"]["success"]["ns"] > 0


def test_errors_reach_the_client_as_its_own_exceptions(told: dict[str, Any]) -> None:
    assert told["unload"].startswith("501")
    assert "DELETE /api/v1/deployments/iris" in told["unload"]
    assert told["unknown"].startswith("404")
    assert told["few"].startswith("400")
    assert "petal width" in told["few"]
    assert told["keyless"].startswith("401")


def test_the_index_can_be_asked_for_what_is_ready_only(iris: RunningServer) -> None:
    with iris.http() as http:
        for content in (b"", b"{}", b'{"ready": true}'):
            answer: httpx2.Response = http.post("/v2/repository/index", content=content)
            assert answer.status_code == 200, answer.text
            assert "iris" in [item["name"] for item in answer.json()]
        assert http.post("/v2/repository/models/none/load").status_code == 404
        assert http.get("/v2/models/stats").json()["model_stats"]
