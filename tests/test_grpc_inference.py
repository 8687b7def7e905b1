"""The Open Inference Protocol over gRPC: tensors in every form, streams, cancelling, deadlines."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.api.grpc import quick
from modelworks.api.grpc.messages import POOL, message
from modelworks.api.grpc.tensors import CONTENTS, decode, encode
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import KeySpec
from modelworks.core.tensors import DATATYPES, Tensor, pack
from modelworks.core.types import Answer, Signature, TensorSpec
from modelworks.serve.routes import Route
from tests.api_house import house
from tests.grpc_house import OIP, GrpcHouse, grpc_house
from tests.server import until
from tests.test_grpc_door import infer_request

Code = grpc.StatusCode
ANSWER = "inference.ModelInferResponse"


@pytest.fixture(scope="module")
def rpc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcHouse]:
    with house(tmp_path_factory.mktemp("home")) as found, grpc_house(found) as served:
        yield served


def route_of(datatype: str) -> Route:
    spec = TensorSpec(name="x", datatype=datatype, shape=[-1, 2])
    return Route("p", "m", "m:1", Signature(inputs=[spec], outputs=[spec]), "tensors")


def test_raw_in_raw_out(rpc: GrpcHouse) -> None:
    found = rpc.call(OIP + "ModelInfer", infer_request(id="7"), answer=ANSWER)
    assert (found.model_name, found.model_version, found.id) == ("iris", "1", "7")
    assert [(out.name, out.datatype, list(out.shape)) for out in found.outputs] == [
        ("label", "BYTES", [1]), ("probabilities", "FP32", [1, 2]),
    ]  # fmt: skip
    assert list(found.raw_output_contents) == [b"\x01\0\0\0b", struct.pack("<ff", 0.25, 0.75)]


def test_typed_in_typed_out(rpc: GrpcHouse) -> None:
    request = message("inference.ModelInferRequest")(model_name="iris", outputs=[{"name": "probabilities"}])
    for name, datatype, field, value in (
        ("length", "FP32", "fp32_contents", 1.5), ("colour", "BYTES", "bytes_contents", b"red"),
        ("count", "INT64", "int64_contents", 3), ("ripe", "BOOL", "bool_contents", True),
    ):  # fmt: skip
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1], contents={field: [value]})
    found = rpc.call(OIP + "ModelInfer", request, answer=ANSWER)
    assert [out.name for out in found.outputs] == ["probabilities"]
    assert list(found.outputs[0].contents.fp32_contents) == [0.25, 0.75]
    assert not found.raw_output_contents
    assert [tensor.data for tensor in rpc.house.router.calls[-1].inputs] == [
        struct.pack("<f", 1.5), b"\x03\0\0\0red", struct.pack("<q", 3), b"\x01",
    ]  # fmt: skip


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_passes_raw_and_typed(datatype: str) -> None:
    size = DATATYPES[datatype][0]
    raw = b"\x01\0\0\0a\x02\0\0\0bc" if datatype == "BYTES" else bytes([1] + [0] * (size - 1)) * 2
    route = route_of(datatype)
    request = message("inference.ModelInferRequest")(model_name="m", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    tensors = decode(route, request)
    assert tensors == [Tensor("x", datatype, [1, 2], raw)]
    back = message(ANSWER).FromString(encode("m", request, Answer(tensors, "m:1"), None))
    assert (back.outputs[0].datatype, list(back.outputs[0].shape), list(back.raw_output_contents)) == (
        datatype,
        [1, 2],
        [raw],
    )

    typed = message("inference.ModelInferRequest")(model_name="m")
    given = typed.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    if datatype not in CONTENTS:
        with pytest.raises(InvalidInput, match="raw_input_contents"):
            decode(route, typed)
        return
    values = [b"a", b"bc"] if datatype == "BYTES" else [1, 0]
    getattr(given.contents, CONTENTS[datatype]).extend(values)
    tensors = decode(route, typed)
    assert tensors == [pack("x", datatype, [1, 2], values)]
    back = message(ANSWER).FromString(encode("m", typed, Answer(tensors, "m:1"), None))
    assert list(getattr(back.outputs[0].contents, CONTENTS[datatype])) == values


def test_the_hand_written_answer_is_what_protobuf_writes() -> None:
    tensors = [
        Tensor("ä" * 100, "FP32", [300, 0, 1], b""),
        Tensor("y", "INT8", [], b"\x05"),
        Tensor("z", "UINT8", [200], bytes(200)),
    ]
    request = message("inference.ModelInferRequest")(id="x" * 200)
    data = encode("m", request, Answer(tensors, "m:12"), None)
    expected = message(ANSWER)(model_name="m", model_version="12", id="x" * 200)
    for tensor in tensors:
        expected.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        expected.raw_output_contents.append(tensor.data)
    assert message(ANSWER).FromString(data) == expected
    assert len(data) == expected.ByteSize()


HEADS = st.tuples(
    st.text(max_size=200), st.sampled_from(["FP32", "BYTES", "x"]), st.lists(st.integers(-2, 2**40), max_size=3)
)


@given(
    texts=st.lists(st.text(max_size=5), min_size=3, max_size=3),
    heads=st.lists(
        st.tuples(
            st.text(max_size=200), st.sampled_from(["FP32", "BYTES", "x"]), st.lists(st.integers(-2, 2**40), max_size=3)
        ),
        max_size=4,
    ),
    raw=st.lists(st.binary(max_size=300), max_size=4),
    tail=st.binary(max_size=6),
    cut=st.integers(0, 4),
)
def test_what_is_read_by_hand_is_what_protobuf_reads(
    texts: list[str], heads: list[tuple[str, str, list[int]]], raw: list[bytes], tail: bytes, cut: int
) -> None:
    kind = message("inference.ModelInferRequest")
    request = kind(model_name=texts[0], model_version=texts[1], id=texts[2], raw_input_contents=raw)
    for name, datatype, shape in heads:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
    whole = request.SerializeToString()
    data = whole[: len(whole) - cut] + tail
    found = quick.read(data)
    if found is None:
        assert cut or tail or len(raw) != len(heads) or not heads
        return
    expected = kind.FromString(data)
    assert (found.model, found.version, found.id) == (expected.model_name, expected.model_version, expected.id)
    assert found.tensors == [
        Tensor(item.name, item.datatype, list(item.shape), content)
        for item, content in zip(expected.inputs, expected.raw_input_contents, strict=True)
    ]
    assert not expected.parameters
    assert not expected.outputs


def test_a_request_like_a_checked_one_is_read_by_its_form() -> None:
    signature = Signature(inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1, 2])], outputs=[])
    kind = message("inference.ModelInferRequest")

    def request(rows: int, data: bytes, **more: Any) -> bytes:
        made = kind(model_name="formed", raw_input_contents=[data], **more)
        made.inputs.add(name="x", datatype="FP32", shape=[rows, 2])
        return bytes(made.SerializeToString())

    first = request(30, bytes(240))  # a length of two bytes
    found = quick.read(first)
    assert found is not None
    assert found.form is None
    found.fits(first, signature)
    again = quick.read(request(30, bytes(range(240))))
    assert again is not None
    assert again.form is not None
    assert again.form.fits is signature
    assert again.tensors == [Tensor("x", "FP32", [30, 2], bytes(range(240)))]
    assert (again.model, again.version, again.id) == ("formed", "", "")
    for other in (request(30, bytes(239)), request(31, bytes(240)), request(30, bytes(240), id="7")):
        unlike = quick.read(other)
        assert unlike is not None
        assert unlike.form is None
    assert quick.read(request(30, bytes(240)) + b"\x3a\x00") is None
    assert quick.read(first[:-1]) is None


def test_priority_and_sticky_key_are_metadata_too(rpc: GrpcHouse) -> None:
    hints = (("x-priority", "low"), ("x-sticky-key", "me"))
    rpc.call(OIP + "ModelInfer", infer_request(), metadata=rpc.metadata("admin", *hints))
    call = rpc.house.router.calls[-1]
    assert call.priority == 2
    assert call.sticky.endswith("/me")
    wrong = rpc.metadata("admin", ("x-priority", "urgent"))
    assert rpc.code(OIP + "ModelInfer", infer_request(), metadata=wrong) == Code.INVALID_ARGUMENT


def broken(change: Any) -> Any:
    request = infer_request()
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r.raw_input_contents.pop(), "raw_input_contents"),
        (lambda r: r.inputs[0].shape.append(2), "length"),
        (lambda r: r.inputs[0].shape.__setitem__(0, -1), "length"),
        (lambda r: r.inputs[0].shape.__setitem__(0, 2**62), "shape"),
        (lambda r: r.raw_input_contents.__setitem__(0, b"123"), "length"),
        (lambda r: r.raw_input_contents.__setitem__(1, b"\xff\xff\xff\xffx"), "colour"),
        (lambda r: r.raw_input_contents.__setitem__(1, b"\x01\0\0\0\xff"), "colour"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP64"), "length"),
        (lambda r: setattr(r.inputs[0], "datatype", "nothing"), "length"),
        (lambda r: setattr(r.inputs[0], "name", "width"), "width"),
        (lambda r: setattr(r.inputs[1], "name", "length"), "length"),
        (lambda r: r.inputs[0].contents.fp32_contents.append(1.0), "length"),
        (lambda r: r.inputs[0].shape.extend([1] * 20), "length"),
        (lambda r: r.outputs.add(name="nothing"), "nothing"),
        (lambda r: setattr(r, "model_version", "x"), "version"),
        (lambda r: r.ClearField("inputs"), "raw_input_contents"),
    ],
)
def test_a_bad_tensor_is_invalid_and_named(rpc: GrpcHouse, change: Any, word: str) -> None:
    calls = len(rpc.house.router.calls)
    with pytest.raises(grpc.RpcError) as caught:
        rpc.call(OIP + "ModelInfer", broken(change))
    assert caught.value.code() == Code.INVALID_ARGUMENT
    assert word in caught.value.details()
    assert len(rpc.house.router.calls) == calls


def test_what_is_not_supported_is_unimplemented(rpc: GrpcHouse) -> None:
    shared = infer_request()
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert rpc.code(OIP + "ModelInfer", shared) == Code.UNIMPLEMENTED
    sequence = infer_request()
    sequence.parameters["sequence_id"].int64_param = 5
    assert rpc.code(OIP + "ModelInfer", sequence) == Code.UNIMPLEMENTED


def test_versions(rpc: GrpcHouse) -> None:
    assert rpc.code(OIP + "ModelInfer", infer_request(model_version="1")) == Code.OK
    assert rpc.code(OIP + "ModelInfer", infer_request(model_version="2")) == Code.NOT_FOUND


def test_the_allow_list_of_a_key_holds(rpc: GrpcHouse) -> None:
    key = rpc.house.make_key("invoke-only", models=["other"])
    metadata = (("authorization", f"Bearer {key}"),)
    assert rpc.code(OIP + "ModelInfer", infer_request(), metadata=metadata) == Code.PERMISSION_DENIED
    assert (
        not message("inference.RepositoryIndexResponse")
        .FromString(rpc.call(OIP + "RepositoryIndex", metadata=metadata))
        .models
    )


@pytest.fixture
def held(rpc: GrpcHouse) -> Iterator[GrpcHouse]:
    """Calls get no answer."""
    rpc.house.router.hold = True
    rpc.house.router.aborted.clear()
    yield rpc
    rpc.house.router.hold = False


def test_a_cancelled_call_is_aborted_in_the_replica(held: GrpcHouse) -> None:
    calls = len(held.house.router.calls)
    call = held.channel.unary_unary(OIP + "ModelInfer").future(
        infer_request().SerializeToString(), metadata=held.metadata()
    )
    until(lambda: len(held.house.router.calls) > calls, 5, 0.01)
    call.cancel()
    until(lambda: held.house.router.aborted, 5, 0.01)


def test_the_clients_deadline_is_the_calls(held: GrpcHouse) -> None:
    begun = time.monotonic()
    assert held.code(OIP + "ModelInfer", infer_request(), timeout=0.3) == Code.DEADLINE_EXCEEDED
    assert held.house.router.calls[-1].deadline - begun < 0.5
    until(lambda: held.house.router.aborted, 5, 0.01)


def test_a_stream_answers_in_order_and_an_error_ends_its_request_only(rpc: GrpcHouse) -> None:
    requests = [infer_request(id=str(number)) for number in range(100)]
    requests[50].model_name = "nope"
    requests[99].parameters["triton_enable_empty_final_response"].bool_param = True
    stream = rpc.channel.stream_stream(OIP + "ModelStreamInfer")
    found = stream(iter([request.SerializeToString() for request in requests]), metadata=rpc.metadata(), timeout=20)
    answers = [message("inference.ModelStreamInferResponse").FromString(data) for data in found]
    assert [answer.infer_response.id for answer in answers] == [str(number) for number in range(100)]
    assert [number for number, answer in enumerate(answers) if answer.error_message] == [50]
    assert "nope" in answers[50].error_message
    assert answers[99].infer_response.parameters["triton_final_response"].bool_param


def test_a_stream_that_is_left_aborts_its_calls(held: GrpcHouse) -> None:
    calls = len(held.house.router.calls)
    data = infer_request().SerializeToString()
    stream = held.channel.stream_stream(OIP + "ModelStreamInfer")(iter([data] * 3), metadata=held.metadata())
    until(lambda: len(held.house.router.calls) == calls + 3, 5, 0.01)
    stream.cancel()
    until(lambda: len(held.house.router.aborted) == 3, 5, 0.01)


def test_each_request_of_a_stream_counts_and_revocation_ends_it(rpc: GrpcHouse) -> None:
    key = rpc.house.make_key("developer", requests_per_minute=3) if False else None
    spec = KeySpec(name="stream", role="invoke-only", requests_per_minute=3)
    key = rpc.house.services.access.create_key(rpc.house.caller(), spec)[1]
    stream = rpc.channel.stream_stream(OIP + "ModelStreamInfer")
    data = infer_request().SerializeToString()
    found = stream(iter([data] * 5), metadata=(("authorization", f"Bearer {key}"),), timeout=10)
    errors = [message("inference.ModelStreamInferResponse").FromString(item).error_message for item in found]
    assert [bool(error) for error in errors] == [False, False, False, True, True]
    assert "3 requests a minute" in errors[3]


def test_metadata_configuration_and_readiness(rpc: GrpcHouse) -> None:
    ask = message("inference.ModelMetadataRequest")(name="iris")
    found = rpc.call(OIP + "ModelMetadata", ask, answer="inference.ModelMetadataResponse")
    assert next((item.name, item.datatype, list(item.shape)) for item in found.inputs) == ("length", "FP32", [-1, 1])
    assert found.platform == "onnxruntime_onnx"
    config = rpc.call(OIP + "ModelConfig", ask, answer="inference.ModelConfigResponse").config
    assert [item.data_type for item in config.output] == [13, 11]
    known = rpc.house.router.known
    rpc.house.router.known = replace(known, platform="llama.cpp_gguf")
    assert rpc.call(OIP + "ModelMetadata", ask, answer="inference.ModelMetadataResponse").platform == "llama.cpp_gguf"
    config = rpc.call(OIP + "ModelConfig", ask, answer="inference.ModelConfigResponse").config
    assert (config.platform, config.backend) == ("llama.cpp_gguf", "llama.cpp")
    rpc.house.router.known = known
    for ready in (True, False):
        rpc.house.router.is_ready = ready
        assert rpc.call(OIP + "ModelReady", ask, answer="inference.ModelReadyResponse").ready is ready
    rpc.house.router.is_ready = True


FIELDS = """
import sys
from tritonclient.grpc import model_config_pb2, service_pb2
for file in (service_pb2, model_config_pb2):
    def walk(found):
        for item in found:
            for field in item.fields:
                kind = field.message_type.name if field.message_type else field.enum_type.name if field.enum_type else field.type
                print(item.full_name, field.name, field.number, kind)
            walk(item.nested_types)
    walk(file.DESCRIPTOR.message_types_by_name.values())
"""


def test_field_numbers_are_tritons() -> None:
    pytest.importorskip("tritonclient")
    output = subprocess.run(
        [sys.executable, "-c", FIELDS], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    theirs = set(output.splitlines())
    ours = set()

    def walk(found: Any) -> None:
        for item in found:
            for field in item.fields:
                kind = (
                    field.message_type.name
                    if field.message_type
                    else field.enum_type.name
                    if field.enum_type
                    else field.type
                )
                ours.add(f"{item.full_name} {field.name} {field.number} {kind}")
            walk(item.nested_types)

    walk(POOL.FindFileByName("inference.proto").message_types_by_name.values())
    assert len(ours) > 80
    assert ours <= theirs


def test_a_route_that_changed_is_checked_by_its_own_signature() -> None:
    request = message("inference.ModelInferRequest")(model_name="m", raw_input_contents=[bytes(8)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    route = route_of("FP32")
    decode(route, request)
    other = dataclasses.replace(route, signature=route_of("FP64").signature)
    with pytest.raises(InvalidInput, match="FP64"):
        decode(other, request)
