"""Rows to learn from: in memory, or read again from where they lie in each epoch and shuffled in a buffer. Numpy alone.

The order of an epoch, and what augmentation does in it, depend on the seed, the epoch and the number of the batch alone:
a run that goes on in the middle of an epoch sees the same batches as one that was never broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modelworks.ml.base import Block

Pair = tuple[np.ndarray, np.ndarray]
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class MemoryExamples:
    """`features` [n, *shape] float32 and `target` [n] that are there as arrays."""

    features: np.ndarray
    target: np.ndarray
    blocks: tuple[Block, ...] = ()
    classes: int | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if not self.blocks:
            object.__setattr__(self, "blocks", (whole(self.shape),))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.features.shape[1:])

    def __len__(self) -> int:
        return len(self.features)

    def batches(self, size: int, *, seed: tuple[int, ...] | None = None, skip: int = 0) -> Iterator[Pair]:
        order = None if seed is None else np.random.default_rng(seed).permutation(len(self))
        for number in range(skip, math.ceil(len(self) / size)):
            rows: Any = slice(number * size, (number + 1) * size)
            if order is not None:
                rows = order[rows]
            features = self.features[rows]
            if seed is not None and self.augment is not None:
                features = self.augment(features, np.random.default_rng((*seed, number)))
            yield features, self.target[rows]

    def targets(self) -> Iterator[np.ndarray]:
        yield self.target

    def split(self, share: float, seed: int) -> tuple[MemoryExamples, MemoryExamples]:
        """(the rest, `share` of the rows), drawn at random; by class where each has several rows."""
        held = _held(len(self), share, seed, self.target if self.classes else None)
        return self._part(~held), replace(self._part(held), augment=None)

    def tail(self, share: float) -> tuple[MemoryExamples, MemoryExamples]:
        """(the rest, the last `share` of the rows)."""
        last = np.zeros(len(self), dtype=bool)
        last[len(self) - max(1, round(share * len(self))) :] = True
        return self._part(~last), replace(self._part(last), augment=None)

    def _part(self, rows: np.ndarray) -> MemoryExamples:
        return replace(self, features=self.features[rows], target=self.target[rows])


@dataclass(frozen=True)
class StreamedExamples:
    """Rows that `open` yields anew for each epoch, a chunk (features, target) at a time; only `buffer` of them are held.

    Shuffling draws from the buffer, which is filled again as it empties: rows that lie far apart are mixed only if the
    buffer is large, so data that is sorted by class should be mixed once before.
    """

    open: Callable[[], Iterable[Pair]]
    rows: int
    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    classes: int | None = None
    augment: Augment | None = None
    buffer: int = 4096
    keep: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)
    """Which of the rows with these numbers (in the order of `open`) belong to it; None: all."""

    def __post_init__(self) -> None:
        if not self.blocks:
            object.__setattr__(self, "blocks", (whole(self.shape),))

    def __len__(self) -> int:
        return self.rows

    def batches(self, size: int, *, seed: tuple[int, ...] | None = None, skip: int = 0) -> Iterator[Pair]:
        chunks = self._chunks() if seed is None else self._shuffled(np.random.default_rng(seed))
        for number, (features, target) in enumerate(_cut(chunks, size)):
            if number < skip:
                continue
            if seed is not None and self.augment is not None:
                features = self.augment(features, np.random.default_rng((*seed, number)))
            yield features, target

    def targets(self) -> Iterator[np.ndarray]:
        for _, target in self._chunks():
            yield target

    def split(self, share: float, seed: int) -> tuple[StreamedExamples, StreamedExamples]:
        """(the rest, about `share` of the rows), by a hash of each row's number."""

        def held(numbers: np.ndarray) -> np.ndarray:
            mixed = (numbers.astype(np.uint64) + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            return (mixed >> np.uint64(40)).astype(np.float64) / 2**24 < share

        return self._part(lambda numbers: ~held(numbers)), replace(self._part(held), augment=None)

    def tail(self, share: float) -> tuple[StreamedExamples, StreamedExamples]:
        first = self.rows - max(1, round(share * self.rows))
        return self._part(lambda numbers: numbers < first), replace(self._part(lambda n: n >= first), augment=None)

    def _part(self, keep: Callable[[np.ndarray], np.ndarray]) -> StreamedExamples:
        before = self.keep
        both = keep if before is None else lambda numbers: before(numbers) & keep(numbers)
        count = sum(len(target) for _, target in replace(self, keep=both)._chunks())
        return replace(self, keep=both, rows=count)

    def _chunks(self) -> Iterator[Pair]:
        start = 0
        for features, target in self.open():
            if self.keep is not None:
                mask = self.keep(np.arange(start, start + len(features)))
                start += len(features)
                features, target = features[mask], target[mask]
            if len(features):
                yield features, target

    def _shuffled(self, random: np.random.Generator) -> Iterator[Pair]:
        """Chunks in random order within the buffer: it is filled, half of it leaves, it is filled again."""
        held: list[Pair] = []
        count = 0
        for features, target in self._chunks():
            held.append((features, target))
            count += len(features)
            if count >= self.buffer:
                (leaving, rest), count = _draw(held, count // 2, random), count - count // 2
                held = [rest]
                yield leaving
        if held:
            yield _draw(held, count, random)[0]


def whole(shape: tuple[int, ...]) -> Block:
    """Features that are one table, or one array of `shape`."""
    return Block("features", "table", shape, 0, math.prod(shape))


def _held(rows: int, share: float, seed: int, classes: np.ndarray | None) -> np.ndarray:
    """bool [rows]"""
    random = np.random.default_rng((seed, 1))
    held = np.zeros(rows, dtype=bool)
    groups = [np.arange(rows)] if classes is None else [np.flatnonzero(classes == one) for one in np.unique(classes)]
    for group in groups:
        count = round(share * len(group))
        held[random.permutation(group)[:count]] = True
    if not held.any():
        held[random.integers(rows)] = True
    return held


def _draw(held: list[Pair], count: int, random: np.random.Generator) -> tuple[Pair, Pair]:
    """(`count` rows drawn at random, the rest)."""
    features = np.concatenate([pair[0] for pair in held]) if len(held) > 1 else held[0][0]
    target = np.concatenate([pair[1] for pair in held]) if len(held) > 1 else held[0][1]
    order = random.permutation(len(features))
    first, rest = order[:count], order[count:]
    return (features[first], target[first]), (features[rest], target[rest])


def _cut(chunks: Iterable[Pair], size: int) -> Iterator[Pair]:
    """The rows of `chunks` in batches of `size`; the last may be smaller."""
    held: list[Pair] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk[0])
        if count < size:
            continue
        features = np.concatenate([pair[0] for pair in held]) if len(held) > 1 else held[0][0]
        target = np.concatenate([pair[1] for pair in held]) if len(held) > 1 else held[0][1]
        for start in range(0, count - size + 1, size):
            yield features[start : start + size], target[start : start + size]
        left = count % size
        held, count = ([(features[count - left :], target[count - left :])] if left else []), left
    if count:
        yield np.concatenate([pair[0] for pair in held]), np.concatenate([pair[1] for pair in held])
