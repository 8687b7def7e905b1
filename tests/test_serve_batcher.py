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


def test_a_bad_item_is_found_by_halving(model, clock):
    batcher = make(model, clock)
    for i in range(64):
        batcher.admit(i, [tensor(FAULTY if i == 41 else i)], 200.0)
    found = values(batcher.step())
    assert isinstance(found.pop(41), ModelworksError)
    assert found == {i: [2.0 * i] for i in range(64) if i != 41}
    assert len(model.batches) <= 1 + 2 * 6
    assert sum(rows for rows, _ in model.batches) <= 3 * 64


def test_many_bad_items_cost_few_more_runs_than_one_by_one(model, clock):
    batcher = make(model, clock)
    for i in range(64):
        batcher.admit(i, [tensor(FAULTY)], 200.0)
    assert all(isinstance(answer, ModelworksError) for answer in values(batcher.step()).values())
    assert len(model.batches) <= 64 + 12
    model.batches.clear()
    for i in range(64):
        batcher.admit(i, [tensor(FAULTY if i % 16 == 3 else i)], 200.0)
    found = values(batcher.step())
    assert [i for i in range(64) if isinstance(found[i], ModelworksError)] == [3, 19, 35, 51]
    assert len(model.batches) < 64


class TimedModel:
    """Takes `base` + `each` * rows seconds of the clock."""

    def __init__(self, clock, base, each):
        self.clock, self.base, self.each = clock, base, each
        self.batches = []

    def __call__(self, inputs):
        rows = len(inputs["x"])
        self.batches.append(rows)
        self.clock.now += self.base + self.each * rows
        return {"value": inputs["x"][:, 0] * 2}


def pour(batcher, count, seconds=1000.0):
    """Admit so many calls, then run until none waits."""
    clock = batcher._clock
    for i in range(count):
        batcher.admit(i, [tensor(i)], clock.now + seconds)
    found = {}
    while batcher.waiting:
        found |= values(batcher.step())
    return found


def test_auto_takes_the_batch_size_where_throughput_stops_growing(clock):
    model = TimedModel(clock, base=0.010, each=0.001)
    batcher = make(model, clock, max_batch=1024, auto=True)
    begun = clock.now
    measured = batcher.measure([[tensor(1.0)], [tensor(2.0)]], 10.0)
    assert list(measured)[:4] == [1, 2, 4, 8]
    assert measured[8] == pytest.approx(0.018)
    assert clock.now - begun < 12
    model.batches.clear()
    pour(batcher, 1000)
    assert model.batches[0] == 128, "256 would be 3 % faster a row, and twice as long in coming"


def test_measuring_keeps_to_its_time(clock):
    model = TimedModel(clock, base=0.0, each=0.009)
    batcher = make(model, clock, auto=True)
    begun = clock.now
    batcher.measure([[tensor(1.0)]], 0.3)
    assert clock.now - begun < 0.35
    model.batches.clear()
    pour(batcher, 100)
    assert max(model.batches) <= 2, "batches of a model that gains nothing by them stay small"


def test_without_samples_it_begins_small_and_learns(clock):
    model = TimedModel(clock, base=0.010, each=0.0001)
    batcher = make(model, clock, max_batch=1024, auto=True)
    pour(batcher, 3000)
    assert model.batches[0] == 8
    assert model.batches[:4] == [8, 16, 32, 64]
    assert max(model.batches) == 1024


def test_a_latency_objective_bounds_the_batches_and_is_held_when_the_model_slows_down(clock):
    model = TimedModel(clock, base=0.006, each=0.001)
    batcher = make(model, clock, max_batch=1024, p99_ms=50)
    batcher.measure([[tensor(1.0)]], 0.3)
    model.batches.clear()
    pour(batcher, 500)
    assert 16 <= model.batches[-2] <= 19, "a batch may take half of it, 25 ms"
    model.each = 0.004  # longer texts, or a busy machine
    pour(batcher, 500)
    assert 3 <= model.batches[-2] <= 5
    model.each = 0.001
    pour(batcher, 3000)
    assert 16 <= model.batches[-2] <= 19


def test_a_near_deadline_is_not_delayed_by_a_large_batch(clock):
    model = TimedModel(clock, base=0.001, each=0.001)
    batcher = make(model, clock)
    pour(batcher, 64)
    pour(batcher, 1)
    for i in range(40):
        batcher.admit(i, [tensor(i)], clock.now + 60)
    batcher.admit("soon", [tensor(9.0)], clock.now + 0.020)
    model.batches.clear()
    begun = clock.now
    found = values(batcher.step())
    assert found["soon"] == [18.0]
    assert clock.now - begun <= 0.020
    assert 5 <= model.batches[0] <= 16, "with as much company as its deadline bears"
    while batcher.waiting:
        found |= values(batcher.step())
    assert len(found) == 41
    for i in range(40):
        batcher.admit(i, [tensor(i)], clock.now + 60)
    batcher.admit("hopeless", [tensor(9.0)], clock.now + 0.0001)
    assert set(values(batcher.step())) >= {"hopeless"}
    assert batcher.waiting < 10, "a call that cannot be saved makes no batch small"


def test_another_shapes_near_deadline_goes_first(clock):
    signature = Signature(inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1, -1])], outputs=[])
    model = TimedModel(clock, base=0.1, each=0.001)
    batcher = Batcher(model, signature, clock=clock)
    for turn in range(2):
        for i in range(10):
            batcher.admit((turn, i), [pack("x", "FP32", [1, 2], [1.0, 2.0])], 200.0)
        clock.now += 0.001
        batcher.admit((turn, "soon"), [pack("x", "FP32", [1, 3], [1.0] * 3)], clock.now + 0.15)
        first = {id for id, _, _ in batcher.step()}
        assert ((turn, "soon") in first) == (turn == 1), "it knows after the first turn how long a batch takes"
        while batcher.waiting:
            batcher.step()
