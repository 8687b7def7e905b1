"""Whether a call's tensors fit a signature, and how calls of one kind are joined into a batch and cut apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from modelworks.core.errors import InvalidInput
from modelworks.core.tensors import (
    DATATYPES,
    Tensor,
    check_size,
    element_count,
    from_numpy,
    pack_bytes,
    to_numpy,
    unpack_bytes,
)
from modelworks.core.types import Signature, TensorSpec
from modelworks.serve.shm import SHARED_FROM

if TYPE_CHECKING:
    import numpy as np

# name, datatype and shape after the first axis (None: a scalar) of each input, in the order given
Kind = tuple[tuple[str, str, tuple[int, ...] | None], ...]


_KNOWN_SHAPES = 1024


def kind_of(tensors: Sequence[Tensor]) -> Kind:
    """Calls of the same kind may run in one batch."""
    return tuple(
        [(tensor.name, tensor.datatype, tuple(tensor.shape[1:]) if tensor.shape else None) for tensor in tensors]
    )


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
    data: list[Any]  # of each input: bytes, or for BYTES the flat list of str (of bytes, where they are files)
    alone: bool


class Shape:
    """One kind of call, checked against the signature once and then used for every call and batch of that kind."""

    def __init__(self, inputs: Sequence[TensorSpec], kind: Kind) -> None:
        specs = {spec.name: spec for spec in inputs}
        _check_names(specs, [name for name, _, _ in kind])
        self.inputs = [_check_input(specs[name], datatype, trailing) for name, datatype, trailing in kind]
        self.batchable = bool(inputs) and all(spec.shape and spec.shape[0] == -1 for spec in inputs)

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

    def join(self, readings: Sequence[Reading], tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """One array an input. `tensors` are the first call's: its shapes count where it runs by itself."""
        import numpy as np

        single = len(readings) == 1
        total = sum([reading.rows for reading in readings])
        arrays: dict[str, np.ndarray] = {}
        for index, (spec, trailing, _, row) in enumerate(self.inputs):
            shape = tensors[index].shape if single else [total, *trailing]
            if row < 0:
                flat = [text for reading in readings for text in reading.data[index]]
                array = np.empty(len(flat), dtype=object)
                array[:] = flat
                arrays[spec.name] = array.reshape(shape)
                continue
            raw = readings[0].data[index] if single else b"".join([reading.data[index] for reading in readings])
            if spec.datatype == "BOOL" and spec.column:
                arrays[spec.name] = np.frombuffer(raw, dtype=np.uint8).reshape(shape)  # the third value is "missing"
            else:
                arrays[spec.name] = to_numpy(Tensor(spec.name, spec.datatype, shape, raw))
        return arrays


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
