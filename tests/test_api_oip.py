"""The Open Inference Protocol over JSON, against the signature of a deployment."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from modelworks.api.body import inflate
from modelworks.api.oip_codec import Wanted, encode_answer
from modelworks.core.errors import InvalidInput, PayloadTooLarge
from modelworks.core.tensors import Tensor, pack, unpack
from modelworks.core.types import Answer
from tests.api_house import House, house

INFER = "/v2/models/iris/infer"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home"), max_body=1_000_000) as found:
        yield found


def inputs(**changes: Any) -> list[dict[str, Any]]:
    """Two rows that fit; `changes` by input name replace members of it."""
    tensors = [
        {"name": "length", "shape": [2, 1], "datatype": "FP32", "data": [1.5, 2]},
        {"name": "colour", "shape": [2, 1], "datatype": "BYTES", "data": ["red", "grün"]},
        {"name": "count", "shape": [2, 1], "datatype": "INT64", "data": [3, -4]},
        {"name": "ripe", "shape": [2, 1], "datatype": "BOOL", "data": [True, False]},
    ]
    return [{**tensor, **changes.get(str(tensor["name"]), {})} for tensor in tensors]


def test_metadata_readiness_and_health(api: House) -> None:
    with api.client("invoke-only") as client:
        assert client.get("/v2").json()["name"] == "modelworks"
        assert client.get("/v2/health/live").json() == {"live": True}
        assert client.get("/v2/health/ready").json() == {"ready": True}
        for path in ("/v2/models/iris", "/v2/models/iris/versions/1"):
            model = client.get(path).json()
            assert (model["name"], model["versions"]) == ("iris", ["1"])
            assert model["inputs"][0] == {"name": "length", "datatype": "FP32", "shape": [-1, 1]}
            assert [item["name"] for item in model["outputs"]] == ["label", "probabilities"]
            assert client.get(f"{path}/ready").json() == {"name": "iris", "ready": True}
        for path in ("/v2/models/none", "/v2/models/iris/versions/2", "/v2/models/none/ready"):
            missing = client.get(path)
            assert missing.status_code == 404
            assert missing.json().keys() == {"error"}
        api.router.is_ready = False
        try:
            assert client.get("/v2/models/iris/ready").status_code == 503
        finally:
            api.router.is_ready = True


def test_infer_without_a_content_type_answers_all_outputs(api: House) -> None:
    with api.client("invoke-only") as client:
        answer = client.post(INFER, content=json.dumps({"id": "42", "inputs": inputs()}).encode())
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "model_name": "iris",
        "model_version": "1",
        "id": "42",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["b", "b"]},
            {"name": "probabilities", "datatype": "FP32", "shape": [2, 2], "data": [0.25, 0.75, 0.25, 0.75]},
        ],
    }
    call = api.router.calls[-1]
    values = {tensor.name: unpack(tensor) for tensor in call.inputs}
    assert values == {
        "length": [1.5, 2.0],
        "colour": [b"red", "grün".encode()],
        "count": [3, -4],
        "ripe": [True, False],
    }


def test_nested_data_selected_outputs_and_a_version(api: House) -> None:
    nested = inputs(length={"data": [[1.5], [2.5]]}, colour={"data": [["red"], ["blue"]]})
    body = {
        "inputs": nested,
        "outputs": [{"name": "label", "parameters": {"binary_data": False}}],
        "parameters": {"x": 1},
    }
    with api.client() as client:
        answer = client.post("/v2/models/iris/versions/1/infer", json=body)
        assert [item["name"] for item in answer.json()["outputs"]] == ["label"]
        assert "id" not in answer.json()
        assert client.post("/v2/models/iris/versions/7/infer", json=body).status_code == 404
    assert unpack(api.router.calls[-1].inputs[0]) == [1.5, 2.5]


def test_null_is_missing_where_the_model_accepts_it(api: House) -> None:
    with api.client() as client:
        assert client.post(INFER, json={"inputs": inputs(length={"data": [None, 2.0]})}).status_code == 200
        first, second = unpack(api.router.calls[-1].inputs[0])
        assert math.isnan(first)
        assert second == 2.0
        refused = client.post(INFER, json={"inputs": inputs(colour={"data": [None, "red"]})})
        assert refused.status_code == 400
        assert "'colour'" in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "'length'"),
        ({"inputs": inputs()[:3]}, "'ripe'"),
        ({"inputs": [*inputs(), {"name": "extra", "shape": [1], "datatype": "FP32", "data": [1]}]}, "'extra'"),
        ({"inputs": [*inputs(), inputs()[0]]}, "'length'"),
        ({"inputs": inputs(length={"datatype": "FP64"})}, "FP32, not FP64"),
        ({"inputs": inputs(length={"datatype": "NONSENSE"})}, "'length'"),
        ({"inputs": inputs(length={"shape": [2]})}, "'length'"),
        ({"inputs": inputs(length={"shape": [1, 2]})}, "'length'"),
        ({"inputs": inputs(length={"shape": [3, 1], "data": [1, 2, 3]})}, "rows"),
        ({"inputs": inputs(length={"shape": [3, 1]})}, "'length'"),
        ({"inputs": inputs(length={"shape": [-2, -1]})}, "negative"),
        ({"inputs": inputs(length={"shape": [2**40, 2**40]})}, "more than 2**31"),
        ({"inputs": inputs(length={"shape": [1] * 40})}, "axes"),
        ({"inputs": inputs(length={"shape": "x"})}, "shape"),
        ({"inputs": inputs(length={"data": [[1.5], 2]})}, "'length'"),
        ({"inputs": inputs(length={"data": [[1.5, 2.5], []]})}, "'length'"),
        ({"inputs": inputs(length={"data": [[[1.5]], [[2.5]]]})}, "'length'"),
        ({"inputs": inputs(length={"data": {"a": 1}})}, "data"),
        ({"inputs": inputs(length={"data": ["a", 1]})}, "a text"),
        ({"inputs": inputs(length={"data": [True, 1]})}, "true or false"),
        ({"inputs": inputs(length={"data": [1e39, 1]})}, "'length'"),
        ({"inputs": inputs(length={"data": None})}, "no `data`"),
        ({"inputs": inputs(count={"data": [1.5, 2]})}, "integers"),
        ({"inputs": inputs(count={"data": [2**70, 2]})}, "'count'"),
        ({"inputs": inputs(ripe={"data": [1, 0]})}, "'ripe'"),
        ({"inputs": inputs(colour={"data": [1, "a"]})}, "'colour'"),
        ({"inputs": inputs(), "outputs": [{"name": "logits"}]}, "'logits'"),
        ({"inputs": "x"}, "inputs"),
        ([], "object"),
    ],
)
def test_what_does_not_fit_is_400_and_named(api: House, body: Any, named: str) -> None:
    before = len(api.router.calls)
    with api.client() as client:
        answer = client.post(INFER, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"error"}
    assert named in answer.json()["error"]
    assert len(api.router.calls) == before


def test_compressed_bodies_are_inflated_within_the_bound(api: House) -> None:
    body = json.dumps({"inputs": inputs()}).encode()
    raw = zlib.compressobj(wbits=-15)
    with api.client() as client:
        for encoding, data in (
            ("gzip", gzip.compress(body)),
            ("deflate", zlib.compress(body)),
            ("deflate", raw.compress(body) + raw.flush()),
            ("identity", body),
        ):
            assert client.post(INFER, content=data, headers={"content-encoding": encoding}).status_code == 200, encoding
        bomb = gzip.compress(b" " * 100_000_000)
        assert len(bomb) < 200_000
        assert client.post(INFER, content=bomb, headers={"content-encoding": "gzip"}).status_code == 413
        assert client.post(INFER, content=body, headers={"content-encoding": "gzip"}).status_code == 400
        assert (
            client.post(INFER, content=gzip.compress(body)[:-9], headers={"content-encoding": "gzip"}).status_code
            == 400
        )
        assert client.post(INFER, content=body, headers={"content-encoding": "br"}).status_code == 415
        elsewhere = client.post(
            "/api/v1/training-jobs", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"}
        )
        assert elsewhere.status_code == 415


def test_inflate_stops_at_the_limit() -> None:
    assert inflate(gzip.compress(b"a" * 100), "gzip", 100) == b"a" * 100
    with pytest.raises(PayloadTooLarge):
        inflate(gzip.compress(b"a" * 101), "gzip", 100)
    with pytest.raises(InvalidInput):
        inflate(b"nonsense", "deflate", 100)


def test_what_json_does_not_have_is_null_in_an_answer() -> None:
    found = Answer([pack("value", "FP32", [3], [1.0, float("nan"), float("inf")])], "m:3")
    text = encode_answer("d", None, found, [Wanted("value")]).body
    assert json.loads(text)["outputs"][0]["data"] == [1.0, None, None]
    broken = Answer([Tensor("label", "BYTES", [1], b"\x01\x00\x00\x00\xff")], "m:3")
    assert json.loads(encode_answer("d", None, broken, [Wanted("label")]).body)["outputs"][0]["data"] == ["\ufffd"]
