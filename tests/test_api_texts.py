"""Text generation by native predict and the Open Inference Protocol, over HTTP and gRPC: the same parameters reach the model."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from modelworks.api.grpc.messages import fill, message
from tests.api_house import House, house
from tests.grpc_house import OIP, V1, GrpcHouse, grpc_house
from tests.openai_house import TextRouter, furnish

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
GIVEN = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a", "b"], "adapter": "pirate"}
PREDICT = "/api/v1/deployments/chat/predict"
INFER = "/v2/models/chat/infer"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home")) as found:
        furnish(found)
        yield found


@pytest.fixture(scope="module")
def rpc(api: House) -> Iterator[GrpcHouse]:
    with grpc_house(api) as found:
        yield found


def post(api: House, path: str, body: Any) -> Any:
    with api.client() as http:
        return http.post(path, json=body)


def last(api: House) -> Any:
    assert isinstance(api.router, TextRouter)
    return api.router.calls[-1]


def oip(text: str = json.dumps(PARIS), **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "messages", "datatype": "BYTES", "shape": [1], "data": [text]}
    return {"inputs": [tensor], "parameters": parameters}


@pytest.mark.parametrize("lane", ["", "?lane=slow"])
def test_native_takes_messages_prompts_and_tokens_with_parameters(api: House, lane: str) -> None:
    answer = post(api, PREDICT + lane, {"inputs": [{"messages": PARIS}], "parameters": GIVEN})
    assert answer.status_code == 200, answer.text
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "cached_tokens": 4}
    assert answer.json()["outputs"] == [{"text": "Hello", "finish_reason": "stop", "usage": usage}]
    assert last(api).params == GIVEN
    for row, data in (
        ({"prompt": "Once"}, b"\x04\0\0\0Once"),
        ({"tokens": [5, 6]}, struct.pack("<2i", 5, 6)),
        ({"messages": json.dumps(PARIS)}, None),
    ):
        answer = post(api, PREDICT + lane, {"inputs": [row], "parameters": {"max_tokens": 3, "logprobs": 0}})
        assert answer.json()["outputs"][0]["logprobs"][0]["id"] == 7
        assert last(api).inputs[0].data == data or data is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": [{"messages": PARIS}], "parameters": {"max_tokns": 3}}, "parameters.max_tokns"),
        ({"inputs": [{"messages": PARIS}], "parameters": {"max_tokens": 0}}, "max_tokens"),
        ({"inputs": [{"messages": PARIS}], "parameters": {"temperature": 9}}, "temperature"),
        ({"inputs": [{"messages": PARIS}], "parameters": {"max_tokens": "7"}}, "max_tokens"),
        ({"inputs": [{"messages": []}]}, "messages"),
        ({"inputs": [{"prompt": 5}]}, "prompt"),
        ({"inputs": [{"tokens": [1, -1]}]}, "prompt[1]"),
        ({"inputs": [{"prompt": "a", "tokens": [1]}]}, "inputs"),
        ({"inputs": [{"prompt": "a"}, {"prompt": "b"}]}, "inputs"),
    ],
)
def test_what_is_wrong_is_named(api: House, body: Any, param: str) -> None:
    for lane in ("", "?lane=slow"):
        answer = post(api, PREDICT + lane, body)
        assert (answer.status_code, answer.json()["param"]) == (400, param), answer.text


def test_parameters_of_other_models_are_refused(api: House) -> None:
    for lane in ("", "?lane=slow"):
        body = {"inputs": [{"text": "a"}], "parameters": {"max_tokens": 3}}
        answer = post(api, "/api/v1/deployments/judge/predict" + lane, body)
        assert (answer.status_code, answer.json()["param"]) == (400, "parameters")


@pytest.mark.parametrize("lane", ["", "?lane=slow"])
def test_oip_takes_the_same_parameters_and_leaves_the_protocols_own(api: House, lane: str) -> None:
    answer = post(api, INFER + lane, oip(binary_data_output=False, priority=1, **GIVEN))
    assert answer.status_code == 200, answer.text
    assert {one["name"]: one["data"] for one in answer.json()["outputs"]} == {
        "text": ["Hello"], "finish_reason": ["stop"], "usage": [10, 1, 4]
    }  # fmt: skip
    assert last(api).params == GIVEN
    told = post(api, INFER + lane, oip(max_tokens=3, logprobs=0)).json()["outputs"][-1]
    assert (told["name"], json.loads(told["data"][0])[0]["id"]) == ("logprobs", 7)
    refused = post(api, INFER + lane, oip(max_tokens=-1))
    assert (refused.status_code, "max_tokens" in refused.json()["error"]) == (400, True)


def infer_request(**parameters: Any) -> Any:
    request = message("inference.ModelInferRequest")(model_name="chat")
    tensor = request.inputs.add(name="messages", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(json.dumps(PARIS).encode())
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def test_grpc_takes_the_same_parameters(api: House, rpc: GrpcHouse) -> None:
    given = {**GIVEN, "stop": '["a", "b"]', "priority": 2, "logit_bias": '{"7": 1.5}', "top_k": 4.0}
    found = rpc.call(OIP + "ModelInfer", infer_request(**given), answer="inference.ModelInferResponse")
    assert [one.name for one in found.outputs] == ["text", "finish_reason", "usage"]
    assert last(api).params == {**GIVEN, "logit_bias": {"7": 1.5}, "top_k": 4}
    assert rpc.code(OIP + "ModelInfer", infer_request(temperature=9.0)).name == "INVALID_ARGUMENT"
    assert rpc.code(OIP + "ModelInfer", infer_request(logit_bias="{")).name == "INVALID_ARGUMENT"

    stream = rpc.channel.stream_stream(OIP + "ModelStreamInfer")
    (part,) = stream(iter([infer_request(max_tokens=5).SerializeToString()]), metadata=rpc.metadata(), timeout=10)
    assert b"Hello" in part
    assert (last(api).stream, last(api).params) == (True, {"max_tokens": 5})

    request = fill(
        message("modelworks.v1.PredictRequest"), {"name": "chat", "inputs": [{"messages": PARIS}], "parameters": GIVEN}
    )
    answer = rpc.call(V1 + "Deployment/Predict", request, answer="modelworks.v1.PredictResponse")
    assert answer.outputs[0]["text"] == "Hello"
    assert last(api).params == GIVEN


def tensor(name: str, data: Any, *, datatype: str = "BYTES", shape: Any = (1,)) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


@pytest.mark.parametrize(
    ("given", "name", "data"),
    [
        (tensor("prompt", ["Once"]), "prompt", b"\x04\0\0\0Once"),
        (tensor("text_input", ["Once"]), "prompt", b"\x04\0\0\0Once"),
        (tensor("text_input", [["Once"]], shape=(1, 1)), "prompt", b"\x04\0\0\0Once"),
        (tensor("tokens", [5, 6], datatype="INT32", shape=(2,)), "tokens", struct.pack("<2i", 5, 6)),
    ],
)
def test_oip_takes_prompts_and_tokens(
    api: House, rpc: GrpcHouse, given: dict[str, Any], name: str, data: bytes
) -> None:
    for lane in ("", "?lane=slow"):
        answer = post(api, INFER + lane, {"inputs": [given], "parameters": {"max_tokens": 3}})
        assert answer.status_code == 200, answer.text
        (sent,) = last(api).inputs
        assert (sent.name, sent.shape, sent.data) == (name, [data.count(b"\0\0\0") if name == "tokens" else 1], data)

    def request(raw: bool) -> Any:
        asked = message("inference.ModelInferRequest")(model_name="chat")
        put = asked.inputs.add(name=given["name"], datatype=given["datatype"], shape=given["shape"])
        if raw:
            asked.raw_input_contents.append(data)
        elif name == "tokens":
            put.contents.int_contents.extend(given["data"])
        else:
            put.contents.bytes_contents.append(b"Once")
        return asked

    for raw in (True, False):
        found = rpc.call(OIP + "ModelInfer", request(raw), answer="inference.ModelInferResponse")
        assert [one.name for one in found.outputs] == ["text", "finish_reason", "usage"]
        (sent,) = last(api).inputs
        assert (sent.name, sent.data) == (name, data)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([tensor("question", ["Once"])], "its inputs are messages, prompt, tokens"),
        ([tensor("prompt", ["Once"]), tensor("stream", [True], datatype="BOOL")], "one input, not 2"),
        ([], "one input, not 0"),
        ([tensor("prompt", ["a", "b"], shape=(2,))], "'prompt'"),
        ([tensor("tokens", [5], datatype="INT64")], "INT32, not INT64"),
    ],
)
def test_oip_says_what_a_language_model_takes(api: House, rpc: GrpcHouse, inputs: list[Any], said: str) -> None:
    for lane in ("", "?lane=slow"):
        answer = post(api, INFER + lane, {"inputs": inputs})
        assert (answer.status_code, said in answer.json()["error"]) == (400, True), answer.text
    request = message("inference.ModelInferRequest")(model_name="chat")
    for one in inputs:
        request.inputs.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
        request.raw_input_contents.append(b"\x01")
    assert rpc.code(OIP + "ModelInfer", request).name == "INVALID_ARGUMENT"


def test_an_answer_has_the_deadline_of_language_models_by_every_way(api: House, rpc: GrpcHouse) -> None:
    def seconds() -> int:
        return round((last(api).deadline - time.monotonic()) / 10) * 10

    def row() -> Any:
        return fill(message("modelworks.v1.PredictRequest"), {"name": "chat", "inputs": [{"messages": PARIS}]})

    for lane in ("", "?lane=slow"):
        post(api, PREDICT + lane, {"inputs": [{"messages": PARIS}]})
        assert seconds() == 600
        post(api, INFER + lane, oip())
        assert seconds() == 600
    post(api, "/v1/chat/completions", {"model": "chat", "messages": PARIS})
    assert seconds() == 600
    # a client of gRPC names its own, which counts where it is nearer
    for timeout, left in ((None, 600), (5000, 600), (50, 50)):
        for method, request in ((OIP + "ModelInfer", infer_request()), (V1 + "Deployment/Predict", row())):
            rpc.channel.unary_unary(method)(request.SerializeToString(), metadata=rpc.metadata(), timeout=timeout)
            assert seconds() == left
        list(
            rpc.channel.stream_stream(OIP + "ModelStreamInfer")(
                iter([infer_request().SerializeToString()]), metadata=rpc.metadata(), timeout=timeout
            )
        )
        assert seconds() == left
    post(api, "/api/v1/deployments/judge/predict", {"inputs": [{"text": "a"}]})
    assert seconds() == 30
