"""The batcher, with a clock turned by hand and no processes."""

import numpy as np
import pytest

from modelworks.core.errors import DeadlineExceeded, InvalidInput, ModelworksError
from modelworks.core.tensors import Tensor, pack, to_numpy, unpack
from modelworks.core.types import Signature, TensorSpec
from modelworks.serve.batcher import Batcher
from modelworks.serve.wire import Part
from tests.serve_toys import FAULTY, SIGNATURE, tensor


class Model:
    """Doubles x, and remembers what it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, inputs):
        x = inputs["x"]
        self.batches.append(x.shape)
        if (x == FAULTY).any():
            raise ValueError("faulty")
        return {"value": x[:, 0] * 2}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def clock():
    return Clock()


def make(model, clock, **limits):
    return Batcher(model, SIGNATURE, model_version="toy:1", clock=clock, **limits)


def values(steps):
    return {id: unpack(item.outputs[0]) if isinstance(item, Part) else item for id, item, done in steps if done}


def test_whatever_waits_runs_together(model, clock):
    batcher = make(model, clock)
    for i in range(5):
        batcher.admit(i, [tensor(i)], 200.0)
    assert values(batcher.step()) == {i: [2.0 * i] for i in range(5)}
    assert model.batches == [(5, 1)]
    assert len(batcher) == batcher.waiting == 0
    assert batcher.step() == []


def test_batches_are_bounded_by_calls_and_by_rows(model, clock):
    batcher = make(model, clock, max_batch=3, max_rows=10)
    for i in range(4):
        batcher.admit(i, [tensor(i)], 200.0)
    batcher.admit("wide", [pack("x", "FP32", [9, 1], range(9))], 200.0)
    batcher.admit("huge", [pack("x", "FP32", [50, 1], range(50))], 200.0)
    batcher.admit("last", [tensor(1)], 200.0)
    found = {}
    while batcher.waiting:
        found |= values(batcher.step())
    assert model.batches == [(3, 1), (10, 1), (50, 1), (1, 1)]
    assert found["wide"] == [2.0 * i for i in range(9)]
    assert len(found["huge"]) == 50


def test_calls_of_different_shapes_never_meet(clock):
    seen = []
    signature = Signature(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1, -1])],
        outputs=[TensorSpec(name="n", datatype="INT64", shape=[-1])],
    )
    batcher = Batcher(
        lambda inputs: seen.append(inputs["x"].shape) or {"n": inputs["x"].sum(1)}, signature, clock=clock
    )
    for i, width in enumerate([2, 3, 2, 3]):
        batcher.admit(i, [pack("x", "FP32", [1, width], [1.0] * width)], 200.0)
        clock.now += 1
    assert set(values(batcher.step())) == {0, 2}, "the oldest call's group goes first"
    assert set(values(batcher.step())) == {1, 3}
    assert seen == [(2, 2), (2, 3)]


def test_a_bad_item_fails_alone(model, clock):
    batcher = make(model, clock)
    for i, x in enumerate([1.0, FAULTY, 3.0]):
        batcher.admit(i, [tensor(x)], 200.0)
    found = values(batcher.step())
    assert found[0] == [2.0]
    assert found[2] == [6.0]
    assert isinstance(found[1], ModelworksError)
    assert (found[1].status, found[1].code) == (500, "model_error")
    assert "faulty" not in found[1].message, "a model's own words may hold addresses and paths"


def test_expired_calls_are_answered_without_running(model, clock):
    batcher = make(model, clock)
    batcher.admit("late", [tensor(1.0)], 101.0)
    batcher.admit("fine", [tensor(2.0)], 200.0)
    clock.now = 102.0
    found = values(batcher.step())
    assert isinstance(found["late"], DeadlineExceeded)
    assert found["fine"] == [4.0]
    assert model.batches == [(1, 1)]
    assert len(batcher) == 0


def test_aborted_calls_do_not_run_and_running_ones_are_dropped(model, clock):
    batcher = make(model, clock)
    batcher.admit("a", [tensor(1.0)], 200.0)
    batcher.admit("b", [tensor(2.0)], 200.0)
    batcher.abort("a")
    batch, _ = batcher.take()
    results = batcher.run(batch)
    batcher.abort("b")
    batcher.admit("b", [tensor(5.0)], 200.0)  # the id is used again while the old call's answer is on its way
    assert batcher.settle(results) == []
    assert values(batcher.step()) == {"b": [10.0]}
    assert model.batches == [(1, 1), (1, 1)]
    batcher.abort("never admitted")


def test_it_waits_only_when_asked_to(model, clock):
    assert make(model, clock).delay() == 0.0
    batcher = make(model, clock, wait_ms=50, max_batch=2)
    batcher.admit(1, [tensor(1.0)], 200.0)
    assert batcher.delay() == pytest.approx(0.05)
    clock.now += 0.03
    assert batcher.delay() == pytest.approx(0.02)
    batcher.admit(2, [tensor(1.0)], 200.0)
    assert batcher.delay() == 0.0, "the batch is full"
    batcher.step()
    batcher.admit(3, [tensor(1.0)], clock.now + 0.06)
    assert batcher.delay() == pytest.approx(0.01), "a near deadline is not waited away"


@pytest.mark.parametrize(
    ("tensors", "code", "param"),
    [
        ([], "missing_input", "x"),
        ([pack("y", "FP32", [1, 1], [1])], "unknown_input", "y"),
        ([tensor(1), tensor(1)], "duplicate_input", "x"),
        ([pack("x", "FP64", [1, 1], [1])], "bad_datatype", "x"),
        ([pack("x", "FP32", [1], [1])], "bad_shape", "x"),
        ([pack("x", "FP32", [1, 2], [1, 2])], "bad_shape", "x"),
        ([Tensor("x", "FP32", [2, 1], b"1234")], "bad_shape", "x"),
        ([Tensor("x", "FP32", [-1, 1], b"")], "bad_shape", "x"),
        ([Tensor("x", "FP32", [], b"1234")], "bad_shape", "x"),
        ([Tensor("x", "FP32", [2**40, 1], b"1234")], "bad_shape", "x"),
    ],
)
def test_what_does_not_fit_the_signature_is_refused_before_the_batch(model, clock, tensors, code, param):
    batcher = make(model, clock)
    with pytest.raises(InvalidInput) as info:
        batcher.admit(1, tensors, 200.0)
    assert (info.value.code, info.value.param) == (code, param)
    assert len(batcher) == 0


def test_texts_integers_and_booleans_arrive_in_wire_form(clock):
    seen = {}
    names = {"n": "INT64", "b": "BOOL", "t": "BYTES"}
    kinds = {"n": "integer", "b": "boolean", "t": "text"}
    signature = Signature(
        inputs=[TensorSpec(name=n, datatype=d, shape=[-1, 1], column=kinds[n]) for n, d in names.items()],
        outputs=[TensorSpec(name="label", datatype="BYTES", shape=[-1])],
    )

    def predict(inputs):
        seen.update(inputs)
        return {"label": inputs["t"][:, 0], "n": inputs["n"][:, 0]}

    batcher = Batcher(predict, signature, clock=clock)
    for i, text in enumerate(["ü", ""]):
        data = [
            pack("n", "INT64", [1, 1], [i]),
            Tensor("b", "BOOL", [1, 1], bytes([2 * i])),
            pack("t", "BYTES", [1, 1], [text]),
        ]
        batcher.admit(i, data, 200.0)
    found = {id: part.outputs for id, part, _ in batcher.step()}
    assert seen["b"].tolist() == [[0], [2]], "2 is a missing boolean"
    assert seen["b"].dtype == np.uint8
    assert seen["t"].tolist() == [["ü"], [""]]
    assert to_numpy(found[0][0]).tolist() == ["ü".encode()]
    assert unpack(found[1][1]) == [1]
    with pytest.raises(InvalidInput, match="UTF-8"):
        batcher.admit(9, [*data[:2], pack("t", "BYTES", [1, 1], [b"\xff"])], 200.0)


def test_columns_of_different_length_are_refused(clock):
    signature = Signature(
        inputs=[TensorSpec(name=n, datatype="FP32", shape=[-1, 1], column="number") for n in "ab"], outputs=[]
    )
    batcher = Batcher(lambda inputs: {}, signature, clock=clock)
    with pytest.raises(InvalidInput, match="'b' has 2 rows but 'a' has 1"):
        batcher.admit(1, [pack("a", "FP32", [1, 1], [1]), pack("b", "FP32", [2, 1], [1, 2])], 200.0)


def test_a_model_whose_outputs_are_not_rows_runs_call_by_call(clock):
    calls = []

    def total(inputs):
        calls.append(len(inputs["x"]))
        return {"total": np.array(inputs["x"].sum())}

    batcher = Batcher(total, SIGNATURE, clock=clock)
    for turn in range(2):
        for i in range(3):
            batcher.admit((turn, i), [tensor(i)], 200.0)
        found = {}
        while batcher.waiting:
            found |= values(batcher.step())
        assert found == {(turn, i): [float(i)] for i in range(3)}
    assert calls == [3, 1, 1, 1, 1, 1, 1], "tried together once, then never again"
