"""Whether a call's tensors fit a signature, and how calls of one kind are joined into a batch and cut apart again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from modelworks.core.errors import InvalidInput
from modelworks.core.tensors import (
    DATATYPES,
    Tensor,
    check_size,
    datatype_of,
    dtype_of,
    element_count,
    from_numpy,
    pack_bytes,
    to_numpy,
    unpack_bytes,
)
from modelworks.core.types import Signature, TensorSpec
from modelworks.serve.columns import Kind, kind_of
from modelworks.serve.shm import SHARED_FROM

if TYPE_CHECKING:
    import numpy as np


_KNOWN_SHAPES = 1024


def check_inputs(signature: Signature, tensors: Sequence[Tensor], known: dict[Kind, Shape] | None = None) -> None:
    """InvalidInput that names the input unless names, datatypes, shapes and sizes are what the signature asks for.

    `known`: where the kinds of calls of this signature that were seen are kept, so that each is looked at once.
    """
    kind = kind_of(tensors)
    shape = known.get(kind) if known is not None else None
    if shape is None:
        shape = Shape(signature.inputs, kind)
        if known is not None and len(known) < _KNOWN_SHAPES:
            known[kind] = shape
    shape.read(tensors)


class Input(NamedTuple):
    spec: TensorSpec
    trailing: tuple[int, ...]
    width: int  # elements a row
    row: int  # bytes a row; -1 for BYTES


class Reading(NamedTuple):
    """A call's data, checked. `alone`: its rows cannot be joined with another call's."""

    rows: int
    # a list, of each input bytes or for BYTES the flat list of str (of bytes, where they are files); or one bytes of all
    data: Any
    alone: bool


class Shape:
    """One kind of call, checked against the signature once and then used for every call and batch of that kind."""

    def __init__(self, inputs: Sequence[TensorSpec], kind: Kind) -> None:
        specs = {spec.name: spec for spec in inputs}
        _check_names(specs, [name for name, _, _ in kind])
        self.inputs = [_check_input(specs[name], datatype, trailing) for name, datatype, trailing in kind]
        self.batchable = bool(inputs) and all(spec.shape and spec.shape[0] == -1 for spec in inputs)
        self.fixed = all(one.row >= 0 for one in self.inputs)  # no BYTES
        self.row = sum(one.row for one in self.inputs)

    def fits(self, rows: int) -> bool:
        """Whether the model takes `rows` rows at once."""
        return all(not spec.shape or spec.shape[0] in (-1, rows) for spec, _, _, _ in self.inputs)

    def read(self, tensors: Sequence[Tensor]) -> Reading:
        """InvalidInput where a size does not fit its shape, or a table's columns differ in length."""
        rows = -1
        alone = not self.batchable
        data: list[Any] = []
        for tensor, (spec, _, width, row) in zip(tensors, self.inputs, strict=True):
            lead = tensor.shape[0] if tensor.shape else 1
            if lead < 0 or (spec.shape and spec.shape[0] not in (-1, lead)):
                raise _bad_shape(spec, tensor.shape)
            if rows == -1:
                rows = lead
            elif lead != rows:
                if spec.column:
                    raise InvalidInput(
                        f"the input {spec.name!r} has {lead} rows but {tensors[0].name!r} has {rows}",
                        code="bad_shape",
                        param=spec.name,
                    )
                alone = True
            if row >= 0:
                if len(tensor.data) != lead * row:
                    _refuse_size(tensor)
                data.append(tensor.data)
            else:
                files = spec.column in ("image", "audio")
                texts: list[Any] = unpack_bytes(tensor.data, tensor.name) if files else _texts(tensor)
                if len(texts) != lead * width:
                    _refuse_size(tensor)
                data.append(texts)
        return Reading(max(rows, 0) if tensors else 1, data, alone)

    def join(self, readings: Sequence[Reading], tensors: Sequence[Tensor] | None) -> dict[str, np.ndarray]:
        """One array an input. `tensors` are the first call's: their shapes count where it runs by itself."""
        import numpy as np

        whole = [reading.data for reading in readings if type(reading.data) is bytes]
        if len(whole) == len(readings):
            arrays = self._join_whole(readings, b"".join(whole))
            if arrays is not None:
                return arrays
        if whole:
            readings = [self._split(reading) for reading in readings]
        single = len(readings) == 1
        total = sum([reading.rows for reading in readings])
        arrays = {}
        for index, (spec, trailing, _, row) in enumerate(self.inputs):
            shape = tensors[index].shape if single and tensors else [total, *trailing]
            if row < 0:
                flat = [text for reading in readings for text in reading.data[index]]
                array = np.empty(len(flat), dtype=object)
                array[:] = flat
                arrays[spec.name] = array.reshape(shape)
                continue
            raw: Any = readings[0].data[index] if single else b"".join([reading.data[index] for reading in readings])
            arrays[spec.name] = _array(spec, shape, raw)
        return arrays

    def arrays(self, rows: int, raw: bytes) -> dict[str, np.ndarray]:
        """One array an input of one call, whose inputs lie in `raw` one behind the other."""
        arrays = {}
        at = 0
        for spec, trailing, _, row in self.inputs:
            stop = at + row * rows
            whole = stop == len(raw) and not at
            arrays[spec.name] = _array(spec, (rows, *trailing), raw if whole else raw[at:stop])
            at = stop
        return arrays

    def _join_whole(self, readings: Sequence[Reading], raw: bytes) -> dict[str, np.ndarray] | None:
        """The arrays of calls whose inputs lie one behind the other; None where they cannot be had without cutting."""
        import numpy as np

        if len(self.inputs) == 1:
            spec, trailing, _, row = self.inputs[0]
            return {spec.name: _array(spec, [len(raw) // row, *trailing], raw)} if row else None
        count = len(readings)
        if [reading.rows for reading in readings].count(1) != count:
            return None
        table = np.frombuffer(raw, dtype=np.uint8).reshape(count, self.row)
        arrays = {}
        at = 0
        for spec, trailing, _, row in self.inputs:
            arrays[spec.name] = _array(spec, [count, *trailing], table[:, at : at + row].tobytes())
            at += row
        return arrays

    def _split(self, reading: Reading) -> Reading:
        if type(reading.data) is not bytes:
            return reading
        data = []
        at = 0
        for one in self.inputs:
            data.append(reading.data[at : at + one.row * reading.rows])
            at += one.row * reading.rows
        return Reading(reading.rows, data, reading.alone)


def _array(spec: TensorSpec, shape: Sequence[int], raw: bytes) -> np.ndarray:
    if spec.datatype == "BOOL" and spec.column:
        import numpy as np

        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)  # the third value is "missing"
    if spec.datatype == "BF16":
        return to_numpy(Tensor(spec.name, spec.datatype, list(shape), raw))
    import numpy as np

    return np.frombuffer(raw, dtype=dtype_of(spec.datatype)).reshape(shape)


class Block(NamedTuple):
    """The outputs of a batch, each as one piece: its kind, of each output all bytes, and of BYTES those of each call."""

    kind: Kind
    data: list[bytes]
    sizes: list[list[int]]


class NotSplittable(Exception):
    """An output's first axis is not the batch's rows."""


def cut(outputs: dict[str, np.ndarray], rows: Sequence[int]) -> list[list[Tensor]]:
    """The outputs of a batch for each of its calls, which have `rows` rows. NotSplittable for more than one call."""
    if len(rows) == 1:
        return [[_whole(name, array) for name, array in outputs.items()]]
    total = sum(rows)
    calls: list[list[Tensor]] = [[] for _ in rows]
    for name, array in outputs.items():
        if not array.shape or array.shape[0] != total:
            raise NotSplittable(f"output {name!r} has shape {list(array.shape)} for {total} rows")
        trailing = list(array.shape[1:])
        texts = array.ravel().tolist() if array.dtype.kind in "OUS" else None
        whole = Tensor(name, "BYTES", [], b"") if texts is not None else _whole(name, array)
        # in texts: elements a row; otherwise: bytes a row
        step = element_count(trailing) if texts is not None else len(whole.data) // total if total else 0
        start = 0
        for call, count in zip(calls, rows, strict=True):
            stop = start + count * step
            data = pack_bytes(texts[start:stop]) if texts is not None else whole.data[start:stop]
            call.append(Tensor(name, whole.datatype, [count, *trailing], data))
            start = stop
    return calls


def block(outputs: dict[str, np.ndarray], rows: Sequence[int], known: dict[str, bytes]) -> Block | None:
    """The outputs of a batch of small calls, uncut; None where they must be cut. `known`: packed texts seen before."""
    total = sum(rows)
    kind = []
    data = []
    sizes: list[list[int]] = []
    for name, array in outputs.items():
        if not array.shape or array.shape[0] != total or array.nbytes >= SHARED_FROM:
            return None
        trailing = array.shape[1:]
        if array.dtype.kind not in "OUS":
            datatype = datatype_of(array)
            if datatype is None:
                return None
            kind.append((name, datatype, trailing))
            data.append(array.tobytes())
            continue
        packed = _packed(array.ravel().tolist(), known)
        if sum(map(len, packed)) >= SHARED_FROM:
            return None
        kind.append((name, "BYTES", trailing))
        data.append(b"".join(packed))
        width = element_count(trailing)
        if len(packed) == len(rows) == rows.count(1):
            sizes.append([len(text) for text in packed])
        else:
            ends = [0, *accumulate([count * width for count in rows])]
            sizes.append([sum(map(len, packed[start:stop])) for start, stop in pairwise(ends)])
    return Block(tuple(kind), data, sizes)


_KNOWN_TEXTS, _SHORT_TEXT = 4096, 64


def _packed(texts: list[Any], known: dict[str, bytes]) -> list[bytes]:
    """Each text as an element of a BYTES tensor. Labels are few: they are packed once."""
    found = []
    for text in texts:
        packed = known.get(text)
        if packed is None:
            packed = pack_bytes([text])
            if len(packed) <= _SHORT_TEXT and len(known) < _KNOWN_TEXTS:
                known[text] = packed
        found.append(packed)
    return found


def _whole(name: str, array: np.ndarray) -> Tensor:
    """The array as a tensor; a large one's data is a view of it, which is copied once, when it is sent."""
    if array.nbytes < SHARED_FROM or array.dtype.kind not in "biuf" or not array.flags.c_contiguous:
        return from_numpy(name, array)
    view: Any = memoryview(cast(Any, array)).toreadonly().cast("B")
    return Tensor(name, from_numpy(name, array[:0]).datatype, list(array.shape), view)


def _check_names(specs: dict[str, TensorSpec], names: Sequence[str]) -> None:
    known = ", ".join(list(specs)[:20]) + (", ..." if len(specs) > 20 else "")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidInput(f"the input {name[:80]!r} is given twice", code="duplicate_input", param=name[:80])
        if name not in specs:
            raise InvalidInput(
                f"the model has no input {name[:80]!r}; its inputs are {known}", code="unknown_input", param=name[:80]
            )
        seen.add(name)
    for name, spec in specs.items():
        if name not in seen and not spec.optional:
            raise InvalidInput(
                f"the input {name!r} is missing; the model takes {known}", code="missing_input", param=name
            )


def _check_input(spec: TensorSpec, datatype: str, trailing: tuple[int, ...] | None) -> Input:
    if datatype != spec.datatype:
        raise InvalidInput(
            f"the input {spec.name!r} is {spec.datatype}, not {datatype}", code="bad_datatype", param=spec.name
        )
    given = [] if trailing is None else [-1, *trailing]
    if len(given) != len(spec.shape) or any(
        want not in (-1, have) for want, have in zip(spec.shape[1:], given[1:], strict=True)
    ):
        raise _bad_shape(spec, given)
    width = element_count(trailing or ())
    return Input(spec, trailing or (), width, -1 if datatype == "BYTES" else DATATYPES[datatype][0] * width)


def _texts(tensor: Tensor) -> list[str]:
    try:
        return [raw.decode() for raw in unpack_bytes(tensor.data, tensor.name)]
    except UnicodeDecodeError:
        raise InvalidInput(
            f"the input {tensor.name!r} has a text that is not UTF-8", code="bad_value", param=tensor.name
        ) from None


def _refuse_size(tensor: Tensor) -> None:
    """InvalidInput that tells how far shape and data are apart."""
    try:
        check_size(tensor)
    except InvalidInput as error:
        error.param = tensor.name
        raise


def _bad_shape(spec: TensorSpec, have: Sequence[int]) -> InvalidInput:
    return InvalidInput(
        f"the input {spec.name!r} has shape {list(have)}, but the model takes {spec.shape} (-1: any size)",
        code="bad_shape",
        param=spec.name,
    )
