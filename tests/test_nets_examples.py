"""What nets learn from: batches that a seed decides, resumed anywhere, from memory and streamed in a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from modelworks.ml.nets.examples import MemoryExamples, Pair, StreamedExamples


def rows(count: int) -> Pair:
    return np.arange(count * 2, dtype=np.float32).reshape(count, 2), np.arange(count) % 3


def memory(count: int = 103) -> MemoryExamples:
    return MemoryExamples(*rows(count), classes=3)


def streamed(count: int = 103, buffer: int = 20) -> StreamedExamples:
    features, target = rows(count)

    def read() -> Iterator[Pair]:
        for start in range(0, count, 7):
            yield features[start : start + 7], target[start : start + 7]

    return StreamedExamples(read, count, (2,), classes=3, buffer=buffer)


@pytest.fixture(params=["memory", "streamed"])
def examples(request: pytest.FixtureRequest) -> MemoryExamples | StreamedExamples:
    return memory() if request.param == "memory" else streamed()


def collected(batches: Iterator[Pair]) -> list[float]:
    return [float(value) for features, _ in batches for value in features[:, 0]]


def test_each_row_comes_once_in_an_epoch_and_in_another_order_in_the_next(
    examples: MemoryExamples | StreamedExamples,
) -> None:
    first, second = (collected(examples.batches(10, seed=(0, epoch))) for epoch in (1, 2))
    assert sorted(first) == sorted(second) == [2.0 * row for row in range(103)]
    assert first != second
    assert first == collected(examples.batches(10, seed=(0, 1)))
    assert [len(target) for _, target in examples.batches(10, seed=(0, 1))] == [10] * 10 + [3]
    assert collected(examples.batches(10)) == [2.0 * row for row in range(103)]


def test_batches_after_a_break_are_those_that_would_have_come(examples: MemoryExamples | StreamedExamples) -> None:
    whole = list(examples.batches(10, seed=(3, 1)))
    rest = list(examples.batches(10, seed=(3, 1), skip=4))
    assert len(rest) == len(whole) - 4
    for (features, target), (again, also) in zip(whole[4:], rest, strict=True):
        assert np.array_equal(features, again)
        assert np.array_equal(target, also)


def test_augmentation_changes_training_rows_only_and_alike_after_a_break() -> None:
    noisy = MemoryExamples(*rows(50), classes=3, augment=lambda batch, random: batch + random.normal(size=batch.shape))
    whole = list(noisy.batches(8, seed=(0, 0)))
    assert np.array_equal(whole[3][0], next(iter(noisy.batches(8, seed=(0, 0), skip=3)))[0])
    assert not np.isin(whole[0][0], rows(50)[0]).any()
    assert np.array_equal(np.concatenate([features for features, _ in noisy.batches(8)]), rows(50)[0])
    _, held = noisy.split(0.2, seed=0)
    assert np.isin(np.concatenate([features for features, _ in held.batches(8, seed=(0, 0))]), rows(50)[0]).all()


@pytest.mark.parametrize("how", ["split", "tail"])
def test_rows_set_aside_are_not_trained_on(examples: MemoryExamples | StreamedExamples, how: str) -> None:
    rest, held = examples.split(0.2, seed=0) if how == "split" else examples.tail(0.2)
    inside, outside = collected(rest.batches(10)), collected(held.batches(10))
    assert (len(inside), len(outside)) == (len(rest), len(held))
    assert sorted(inside + outside) == [2.0 * row for row in range(103)]
    assert 10 <= len(outside) <= 35
    if how == "tail":
        assert min(outside) > max(inside)


def test_a_stream_holds_no_more_than_its_buffer() -> None:
    open_rows, most = 0, 0

    def read() -> Iterator[Pair]:
        nonlocal open_rows
        for start in range(0, 1000, 10):
            open_rows += 10
            yield np.full((10, 1), start, dtype=np.float32), np.zeros(10, dtype=np.int64)

    stream = StreamedExamples(read, 1000, (1,), buffer=100)
    for features, _ in stream.batches(5, seed=(0, 0)):
        most = max(most, open_rows)
        open_rows -= len(features)
    assert open_rows == 0
    assert most <= 110
