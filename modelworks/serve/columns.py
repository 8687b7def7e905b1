"""Many small calls of one kind in one message, and the answers of one batch in one: what a call costs on the wire.

A kind (input names, datatypes, shapes behind the first axis) is announced once a connection and then named by a number;
so is a form, the same of an answer with the model version. All little-endian:

    KIND:  the kind in msgpack                       FORM:  (model version, kind) in msgpack
    CALLS: u32 n | u32 ids[n] | u32 rows[n] | f32 remaining[n] | u32 sizes[n * texts] | data, call by call
    PARTS: u32 n, run_us, batch | u32 ids[n] | u32 rows[n] | u32 queue_us[n] | u32 sizes[n * texts] | data, output by output

`sizes` are the bytes of each BYTES tensor of each call; all other sizes follow from the rows. Calls with parameters,
streams, scalars and large tensors travel by themselves (wire.py).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from modelworks.core.tensors import DATATYPES, Tensor
from modelworks.serve import wire
from modelworks.serve.shm import SHARED_FROM
from modelworks.serve.wire import CALLS, FORM, KIND, MAX_RANK, MAX_TENSORS, PARTS, Part, WireError

# name, datatype and shape after the first axis (None: a scalar) of each tensor, in the order given
Kind = tuple[tuple[str, str, tuple[int, ...] | None], ...]

MAX_KINDS = 1024  # that a connection remembers, of calls and of answers each; others travel by themselves
_MOST = 2**31  # bytes a row
_COUNT = struct.Struct("<I")
_BATCH = struct.Struct("<III")
_SINGLE = struct.Struct("<IIIIII")  # PARTS of one call without texts
_LONE = struct.Struct("<IIIf")  # CALLS of one call without texts
_encode = msgspec.msgpack.Encoder().encode
_kind = msgspec.msgpack.Decoder(Kind).decode
_form = msgspec.msgpack.Decoder(tuple[str, Kind]).decode


def kind_of(tensors: Sequence[Tensor]) -> Kind:
    """Calls of the same kind may run in one batch."""
    return tuple(
        [(tensor.name, tensor.datatype, tuple(tensor.shape[1:]) if tensor.shape else None) for tensor in tensors]
    )


class Layout:
    """How tensors of one kind lie in a message. `widths`: bytes a row of each, -1 for BYTES; `fixed`: their sum, -1 if
    there are BYTES."""

    __slots__ = ("fixed", "kind", "single", "texts", "widths")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.widths = [_width(datatype, trailing or ()) for _, datatype, trailing in kind]
        self.texts = self.widths.count(-1)
        self.fixed = -1 if self.texts else sum(self.widths)
        self.single = len(kind) == 1 and self.fixed > 0

    @classmethod
    def of(cls, kind: Kind) -> Layout | None:
        """None for a kind that travels by itself."""
        if not kind or any(trailing is None or datatype not in DATATYPES for _, datatype, trailing in kind):
            return None
        layout = cls(kind)
        return layout if layout.fixed and layout.fixed < SHARED_FROM else None

    def rows(self, tensors: Sequence[Tensor]) -> int:
        """The rows that all of the tensors have; -1 where they differ, or a size does not fit, or they are large."""
        rows = tensors[0].shape[0]
        size = 0
        for tensor, width in zip(tensors, self.widths, strict=True):
            have = len(tensor.data)
            size += have
            if tensor.shape[0] != rows or (width >= 0 and have != rows * width):
                return -1
        return rows if 0 <= rows <= size < SHARED_FROM else -1

    def cut(self, frame: bytes, at: int, rows: int, sizes: Sequence[int]) -> list[Tensor]:
        """The tensors of one call; `sizes` of its BYTES."""
        tensors = []
        text = 0
        for (name, datatype, trailing), width in zip(self.kind, self.widths, strict=True):
            if width < 0:
                size = sizes[text]
                text += 1
            else:
                size = rows * width
            tensors.append(Tensor(name, datatype, [rows, *(trailing or ())], frame[at : at + size]))
            at += size
        return tensors


def _width(datatype: str, trailing: tuple[int, ...]) -> int:
    if datatype == "BYTES":
        return -1
    width = DATATYPES[datatype][0]
    for size in trailing:
        width *= size
        if size < 0 or width > _MOST:
            raise WireError(f"a tensor with rows of shape {list(trailing)[:8]}")
    return width


class Calls:
    """Calls of one kind that leave together. `kind`: the number by which the connection knows it."""

    __slots__ = ("data", "kind", "layout", "numbers", "remaining", "rows", "sizes")

    def __init__(self, kind: int, layout: Layout) -> None:
        self.kind = kind
        self.layout = layout
        self.clear()

    def clear(self) -> None:
        self.numbers: list[int] = []
        self.rows: list[int] = []
        self.remaining: list[float] = []
        self.sizes: list[int] = []
        self.data: list[bytes] = []

    def add(self, number: int, tensors: Sequence[Tensor], rows: int, remaining: float) -> None:
        self.numbers.append(number)
        self.rows.append(rows)
        self.remaining.append(remaining)
        for tensor in tensors:
            self.data.append(tensor.data)
        if self.layout.texts:
            self.sizes += [
                len(tensor.data) for tensor, width in zip(tensors, self.layout.widths, strict=True) if width < 0
            ]

    def add_many(self, numbers: Sequence[int], rows: Sequence[int], data: Sequence[bytes], remaining: float) -> None:
        """Calls of fixed size, of each the bytes of all its tensors."""
        self.numbers += numbers
        self.rows += rows
        self.remaining += [remaining] * len(numbers)
        self.data += data

    def message(self) -> bytes:
        """The message; this is empty afterwards."""
        n = len(self.numbers)
        sizes = self.sizes
        if n == 1 and not sizes:
            head = _LONE.pack(1, self.numbers[0], self.rows[0], self.remaining[0])
        else:
            head = struct.pack(f"<{2 * n + 1}I{n}f{len(sizes)}I", n, *self.numbers, *self.rows, *self.remaining, *sizes)
        data = b"".join(self.data)
        message = wire.message(CALLS, self.kind, len(head) + len(data)) + head + data
        self.clear()
        return message


class Arrived:
    """Calls or answers as they came: of each its number, rows and time, and where its data begins.

    `times`: seconds that remain for calls, microseconds queued for answers.
    """

    __slots__ = ("at", "layout", "numbers", "rows", "sizes", "times")

    def __init__(
        self, layout: Layout, numbers: Sequence[int], rows: Sequence[int], times: Sequence[Any], sizes: Sequence[int]
    ) -> None:
        self.layout = layout
        self.numbers = numbers
        self.rows = rows
        self.times = times
        self.sizes = sizes
        self.at = 0


class Answers(Arrived):
    """The answers of one batch, output by output in `frame` from `at` on."""

    __slots__ = ("batch", "frame", "run_us", "version")
    version: str
    frame: bytes
    run_us: int
    batch: int

    def whole(self) -> list[Tensor]:
        """The outputs of all calls as one, row below row."""
        rows, at = sum(self.rows), self.at
        tensors = []
        text = 0
        for (name, datatype, trailing), width in zip(self.layout.kind, self.layout.widths, strict=True):
            size = rows * width
            if width < 0:
                size = sum(self.sizes[text :: self.layout.texts])
                text += 1
            tensors.append(Tensor(name, datatype, [rows, *(trailing or ())], self.frame[at : at + size]))
            at += size
        return tensors

    def parts(self) -> list[Part]:
        """The answer of each call."""
        columns: list[list[Tensor]] = [[] for _ in self.numbers]
        frame, layout, at = self.frame, self.layout, self.at
        text = 0
        for (name, datatype, trailing), width in zip(layout.kind, layout.widths, strict=True):
            sizes: Sequence[int]
            if width < 0:
                sizes = self.sizes[text :: layout.texts]
                text += 1
            else:
                sizes = [width * rows for rows in self.rows]
            tail = list(trailing or ())
            for tensors, rows, size in zip(columns, self.rows, sizes, strict=True):
                tensors.append(Tensor(name, datatype, [rows, *tail], frame[at : at + size]))
                at += size
        version, run_us, batch = self.version, self.run_us, self.batch
        return [
            Part(tensors, version, True, queue_us, run_us, batch)
            for tensors, queue_us in zip(columns, self.times, strict=True)
        ]


def kind(number: int, kind: Kind) -> list[bytes]:
    return wire.plain(KIND, number, _encode(kind))


def form(number: int, version: str, kind: Kind) -> list[bytes]:
    return wire.plain(FORM, number, _encode((version, kind)))


def read_kind(payload: bytes) -> Layout:
    return _layout(_decoded(_kind, payload))


def read_form(payload: bytes) -> tuple[str, Layout]:
    version, kind = _decoded(_form, payload)
    return version, _layout(kind)


def _decoded(decoder: Any, payload: bytes) -> Any:
    try:
        return decoder(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise WireError(f"a malformed kind: {problem}") from None


def _layout(kind: Kind) -> Layout:
    if len(kind) > MAX_TENSORS or any(len(trailing or ()) > MAX_RANK for _, _, trailing in kind):
        raise WireError("a kind of too many tensors or axes")
    layout = Layout.of(kind)
    if layout is None:
        raise WireError("a kind that travels by itself")
    return layout


def read_calls(layout: Layout, frame: bytes, start: int, stop: int) -> Arrived:
    """The calls of a CALLS message. WireError unless it is exactly as long as it says."""
    n = _count(frame, start, stop, 12 + 4 * layout.texts)
    count = n * layout.texts
    if n == 1 and not count:
        _, number, rows, remaining = _LONE.unpack_from(frame, start)
        found = Arrived(layout, (number,), (rows,), (remaining,), ())
        found.at = start + _LONE.size
    else:
        values = struct.unpack_from(f"<{2 * n}I{n}f{count}I", frame, start + 4)
        found = Arrived(layout, values[:n], values[n : 2 * n], values[2 * n : 3 * n], values[3 * n :])
        found.at = start + 4 + 4 * len(values)
    _check_size(found, stop)
    return found


def read_answers(version: str, layout: Layout, frame: bytes, start: int, stop: int) -> Answers:
    """The answers of a PARTS message. WireError as in `read_calls`."""
    n = _count(frame, start, stop, 12 + 4 * layout.texts, 12)
    if n == 1 and not layout.texts:
        _, run_us, batch, number, rows, queue_us = _SINGLE.unpack_from(frame, start)
        found = Answers(layout, (number,), (rows,), (queue_us,), ())
        found.at = start + _SINGLE.size
    else:
        _, run_us, batch = _BATCH.unpack_from(frame, start)
        values = struct.unpack_from(f"<{3 * n + n * layout.texts}I", frame, start + 12)
        found = Answers(layout, values[:n], values[n : 2 * n], values[2 * n : 3 * n], values[3 * n :])
        found.at = start + 12 + 4 * len(values)
    _check_size(found, stop)
    found.version, found.frame, found.run_us, found.batch = version, frame, run_us, batch
    return found


def _count(frame: bytes, start: int, stop: int, least: int, head: int = 4) -> int:
    """How many calls there are; each has at least `least` bytes."""
    if stop - start < head:
        raise WireError("a message too short for its header")
    (n,) = _COUNT.unpack_from(frame, start)
    if not 0 < n <= (stop - start - head) // least:
        raise WireError(f"a message of {stop - start} bytes with {n} calls")
    return n


def _check_size(found: Arrived, stop: int) -> None:
    layout = found.layout
    fixed = layout.fixed if not layout.texts else sum(width for width in layout.widths if width > 0)
    if found.at + sum(found.rows) * fixed + sum(found.sizes) != stop:
        raise WireError("a message whose sizes do not fit its bytes")


def parts(
    form: int,
    numbers: Sequence[int],
    rows: Sequence[int],
    queue_us: Sequence[int],
    sizes: Sequence[int],
    run_us: int,
    batch: int,
    data: Sequence[bytes],
) -> list[bytes]:
    """A PARTS message; `data`: of each output all calls' bytes."""
    n = len(numbers)
    head = struct.pack(f"<{3 + 3 * n + len(sizes)}I", n, run_us, batch, *numbers, *rows, *queue_us, *sizes)
    body = b"".join(data)
    return [wire.message(PARTS, form, len(head) + len(body)) + head + body]


def single(form: int, number: int, rows: int, sizes: Sequence[int], run_us: int, data: Sequence[bytes]) -> bytes:
    """`parts` of one call that did not wait."""
    head = _SINGLE.pack(1, run_us, 1, number, rows, 0)
    if sizes:
        head += struct.pack(f"<{len(sizes)}I", *sizes)
    body = b"".join((head, *data))
    return wire.message(PARTS, form, len(body)) + body
