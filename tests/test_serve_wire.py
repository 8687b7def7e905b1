"""Frames: whole however they are cut, bounded, and never trusted."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelworks.core.errors import InvalidInput, NotFound, RateLimited
from modelworks.core.tensors import Tensor, pack
from modelworks.core.types import Call
from modelworks.serve import wire
from modelworks.serve.wire import FrameReader, Part, WireError

CALL = Call(
    "toy",
    [pack("x", "FP32", [2, 1], [1.0, 2.0]), pack("名", "BYTES", [1], ["ü"])],
    0.0,
    request_id="r",
    params={"a": [1, None]},
)


def frame(*messages):
    body = b"".join(piece for message in messages for piece in message)
    return len(body).to_bytes(4, "little") + body


def read_all(reader, data):
    return [
        (kind, number, buffer[first:last])
        for buffer, start, stop in reader.feed(data)
        for kind, number, first, last in wire.messages(buffer, start, stop)
    ]


def test_a_call_comes_out_as_it_went_in():
    ((kind, number, payload),) = read_all(FrameReader(), frame(wire.call(7, CALL, 1.5)))
    head, tensors = wire.read_call(payload, 0, len(payload))
    assert (kind, number, head.remaining, head.request_id, head.params) == (wire.CALL, 7, 1.5, "r", {"a": [1, None]})
    assert tensors == CALL.inputs


def test_parts_and_errors_come_out_as_they_went_in():
    part = Part([pack("value", "FP64", [1], [0.1])], "toy:1", False, 3, 4)
    error = RateLimited("slow down", retry_after=2.5, param="x")
    (_, _, first), (_, _, second) = read_all(FrameReader(), frame(wire.part(1, part), wire.error(2, error)))
    assert wire.read_part(first, 0, len(first)) == part
    found = wire.read_error(second)
    assert (type(found), found.message, found.retry_after, found.param) == (RateLimited, "slow down", 2.5, "x")
    assert isinstance(wire.read_error(wire.error(1, NotFound("no"))[0][9:]), NotFound)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=5), st.lists(st.integers(1, 90), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_frames_are_whole_however_they_are_cut(sizes, cuts):
    data = b"".join(frame(wire.plain(wire.PING, n, b"p" * n), wire.plain(wire.ABORT, n)) for n in sizes)
    reader, got, offset = FrameReader(), [], 0
    while offset < len(data):
        for cut in cuts:
            got += read_all(reader, data[offset : offset + cut])
            offset += cut
    assert got == [m for n in sizes for m in ((wire.PING, n, b"p" * n), (wire.ABORT, n, b""))]


def test_dripped_bytes_are_kept_in_few_objects():
    reader = FrameReader(1 << 20)
    data = frame(wire.plain(wire.PING, 1, b"p" * 100_000))
    for i in range(len(data) - 1):
        assert list(reader.feed(data[i : i + 1])) == []
    assert len(reader._chunks) < 2000
    assert len(read_all(reader, data[-1:])) == 1


@pytest.mark.parametrize("size", [0, 8, wire.MAX_HELLO + 1, 2**32 - 1])
def test_a_frame_of_impossible_size_is_refused_before_its_bytes_come(size):
    with pytest.raises(WireError):
        list(FrameReader().feed(size.to_bytes(4, "little")))


def damaged(data):
    """A valid call's payload with some bytes changed."""
    payload = bytearray(b"".join(wire.call(7, CALL, 1.5))[9:])
    for place, value in data:
        payload[place % len(payload)] = value
    return bytes(payload)


@given(
    st.one_of(
        st.binary(max_size=300), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4).map(damaged)
    )
)
@settings(max_examples=400, deadline=None)
def test_damaged_messages_raise_wire_error_and_nothing_else(payload):
    for read in (wire.read_call, wire.read_part):
        try:
            read(payload, 0, len(payload))
        except WireError:
            continue
    for decode in (wire.read_hello, wire.read_ready, wire.read_error, wire.read_challenge, wire.read_credit):
        try:
            decode(payload)
        except WireError:
            continue
    with contextlib.suppress(WireError):
        read_all(FrameReader(), payload)


def test_deep_headers_do_not_exhaust_the_stack():
    deep = b"\x91" * 100_000 + b"\x00"
    with pytest.raises(WireError):
        wire.read_call(len(deep).to_bytes(4, "little") + deep, 0, len(deep) + 4)


@pytest.mark.parametrize("params", [{"a": 2**70}, {"a": "\ud800"}])
def test_parameters_that_cannot_be_sent_are_the_callers_error(params):
    with pytest.raises(InvalidInput):
        wire.call(1, Call("toy", [], 0.0, params=params), 1.0)


def test_a_tensor_may_not_claim_its_neighbours_bytes():
    a, b = Tensor("a", "FP32", [1], b"1234"), Tensor("b", "FP32", [1], b"5678")
    pieces = wire.call(1, Call("toy", [a, b], 0.0), 1.0)
    payload = b"".join(pieces)[9:]
    wire.read_call(payload, 0, len(payload))
    with pytest.raises(WireError, match="after the last"):
        wire.read_call(payload + b"x", 0, len(payload) + 1)
    with pytest.raises(WireError, match="does not fit"):
        wire.read_call(payload[:-1], 0, len(payload) - 1)
