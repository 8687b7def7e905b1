"""Many calls in one message: what comes out is what went in, and what is damaged is a WireError."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelworks.core.tensors import Tensor, pack, unpack
from modelworks.core.types import Signature, TensorSpec
from modelworks.serve import columns
from modelworks.serve.batcher import Batcher
from modelworks.serve.columns import Calls, Layout, kind_of
from modelworks.serve.wire import WireError


def call(rows, *, text=True):
    tensors = [
        pack("x", "FP32", [rows, 2], [0.5 * i for i in range(2 * rows)]),
        pack("名", "BYTES", [rows], ["ü" * i for i in range(rows)]),
        pack("n", "INT64", [rows, 1], range(rows)),
    ]
    return tensors if text else [tensors[0], tensors[2]]


def message(calls):
    layout = Layout.of(kind_of(calls[0]))
    filling = Calls(3, layout)
    for number, tensors in enumerate(calls):
        filling.add(number + 10, tensors, layout.rows(tensors), 1.5)
    return layout, filling.message()


@pytest.mark.parametrize("text", [True, False])
def test_calls_come_out_as_they_went_in(text):
    sent = [call(rows, text=text) for rows in (1, 3, 0, 2)]
    layout, whole = message(sent)
    found = columns.read_calls(layout, whole, 9, len(whole))
    assert (found.numbers, found.rows, found.times) == ((10, 11, 12, 13), (1, 3, 0, 2), (1.5,) * 4)
    at = found.at
    for index, tensors in enumerate(sent):
        sizes = found.sizes[index * layout.texts : (index + 1) * layout.texts]
        assert layout.cut(whole, at, found.rows[index], sizes) == tensors
        at += sum(len(tensor.data) for tensor in tensors)
    assert at == len(whole)


@pytest.mark.parametrize(
    "tensors",
    [
        [pack("x", "FP32", [], [1.0])],
        [pack("x", "FP32", [2], [1.0, 2.0]), pack("y", "FP32", [1], [1.0])],
        [Tensor("x", "FP32", [2], b"1234")],
        [Tensor("x", "FP32", [2**40, 0], b"")],
        [Tensor("x", "UINT8", [300_000], bytes(300_000))],
    ],
)
def test_what_cannot_be_joined_travels_by_itself(tensors):
    layout = Layout.of(kind_of(tensors))
    assert layout is None or layout.rows(tensors) == -1


def damaged(changes):
    _, whole = message([call(2), call(1)])
    payload = bytearray(whole[9:])
    for place, value in changes:
        payload[place % len(payload)] = value
    return bytes(payload)


@given(
    st.one_of(
        st.binary(max_size=200), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4).map(damaged)
    )
)
@settings(max_examples=300, deadline=None)
def test_damaged_messages_raise_wire_error_and_nothing_else(payload):
    layout = Layout.of(kind_of(call(1)))
    with contextlib.suppress(WireError):
        columns.read_calls(layout, payload, 0, len(payload))
    with contextlib.suppress(WireError):
        answers = columns.read_answers("m:1", layout, payload, 0, len(payload))
        assert len(answers.parts()) == len(answers.rows)
        assert [len(tensor.data) for tensor in answers.whole()] == [
            sum(sizes) for sizes in zip(*[[len(one.data) for one in part.outputs] for part in answers.parts()], strict=True)
        ]
    for read in (columns.read_kind, columns.read_form):
        with contextlib.suppress(WireError):
            read(payload)


def test_a_batch_of_several_columns_and_rows_is_answered_row_by_row():
    """Calls that came together and calls that came alone meet in one batch; each gets its own rows back."""
    signature = Signature(
        inputs=[
            TensorSpec(name="x", datatype="FP32", shape=[-1, 2]),
            TensorSpec(name="n", datatype="INT64", shape=[-1, 1]),
        ],
        outputs=[
            TensorSpec(name="label", datatype="BYTES", shape=[-1]),
            TensorSpec(name="sum", datatype="FP32", shape=[-1]),
        ],
    )

    def predict(inputs):
        total = inputs["x"].sum(axis=1) + inputs["n"][:, 0]
        return {"label": np.array([f"l{value:g}" for value in total], dtype=object), "sum": total.astype(np.float32)}

    for rows in ((1, 1, 1), (1, 2, 0, 3), (0, 1)):
        batcher = Batcher(predict, signature, model_version="m:1")
        sent = [call(count, text=False) for count in rows]
        shape = batcher.shape(kind_of(sent[0]))
        whole = [
            (number, rows[number], b"".join(one.data for one in sent[number]), 60.0) for number in range(len(rows))
        ]
        batcher.admit_whole(shape, whole)
        batcher.admit("alone", sent[0], 1e12)
        (batch, _) = batcher.take()
        ran = batcher.run(batch)
        assert ran.block is not None
        answers = {id: part for id, part, _ in batcher.settle(ran)}
        assert len(answers) == len(rows) + 1
        for number, tensors in [*enumerate(sent), ("alone", sent[0])]:
            x, n = (unpack(tensor) for tensor in tensors)
            want = [x[2 * i] + x[2 * i + 1] + n[i] for i in range(len(n))]
            label, total = answers[number].outputs
            assert unpack(total) == want
            assert [text.decode() for text in unpack(label)] == [f"l{value:g}" for value in want]
