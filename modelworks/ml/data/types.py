"""The wire form of a table: from canonical Arrow tables and JSON rows to batches and back (batch: see ml/base.py).

Light at import: numpy only. Every refusal names the feature, the row, what was expected and what came.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core import sequences
from modelworks.core.errors import InvalidInput
from modelworks.core.features import (
    EXPECTED,
    MEDIA,
    check_missing,
    format_time,
    gone_on,
    history,
    is_series,
    kind_of,
    mistyped,
    parse_time,
    refuse_names,
    refuse_row,
    shape_of,
)
from modelworks.core.tensors import BOOL_MISSING, INT64_MISSING, decode_base64
from modelworks.core.types import Column, TensorSpec

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.base import Batch

_OIP = {"number": "FP32", "boolean": "BOOL"}  # all else is BYTES
_INTEGERS: dict[str, np.dtype[Any]] = {
    f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)
}
_FLOATS: dict[str, np.dtype[Any]] = {
    "FP16": np.dtype("float16"),
    "FP32": np.dtype("float32"),
    "FP64": np.dtype("float64"),
}
_DTYPES: dict[str, np.dtype[Any]] = {**_INTEGERS, **_FLOATS}


def signature_inputs(columns: Sequence[Column]) -> list[TensorSpec]:
    """One input of shape [-1, 1] for each column. Integers with gaps are FP32, as NaN is their missing value."""
    return [
        TensorSpec(
            name=column.name,
            datatype=("FP32" if column.nullable else "INT64")
            if column.type == "integer"
            else _OIP.get(column.type, "BYTES"),
            shape=[-1, 1],
            column=column.type,
            nullable=column.nullable,
        )
        for column in columns
    ]


# canonical tables -> batches


def to_batch(table: pa.Table, columns: Sequence[Column]) -> Batch:
    """The named `columns` of a canonical table in wire form, one 1-d array of `table.num_rows` each.

    An integer column is float32 when `nullable`; else it is int64, and nulls are INT64_MISSING.
    InvalidInput for a column the table lacks and for numbers beyond float32's range.
    """
    batch: Batch = {}
    for column in columns:
        index = table.schema.get_field_index(column.name)
        if index < 0:
            raise InvalidInput(f"the table has no column {column.name!r}", code="missing_column", param=column.name)
        batch[column.name] = _wire(table.column(index), column)
    return batch


def _wire(values: pa.ChunkedArray, column: Column) -> np.ndarray:
    import pyarrow as pa

    if column.type == "number" or (column.type == "integer" and column.nullable):
        wide = values.cast(pa.float64(), safe=False).to_numpy()  # nulls become NaN
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        beyond = np.isinf(narrow)
        if beyond.any():
            row = int(beyond.argmax())
            raise InvalidInput(
                f"column {column.name!r}, row {row + 1}: {float(wide[row])!r} is beyond float32's range (3.4e38); "
                "scale the column first",
                code="out_of_range",
                param=column.name,
            )
        return narrow
    if column.type == "integer":
        return values.cast(pa.int64()).fill_null(INT64_MISSING).to_numpy().astype(np.int64)
    if column.type == "boolean":
        return values.cast(pa.uint8()).fill_null(BOOL_MISSING).to_numpy().astype(np.uint8)
    if column.type == "time":
        return _iso(values)
    out = np.empty(len(values), dtype=object)
    if column.type in MEDIA:
        out[:] = values.cast(pa.binary()).fill_null(b"").to_pylist()
        return out
    out[:] = values.cast(pa.string()).fill_null("").to_pylist()
    return out


def _iso(values: pa.ChunkedArray) -> np.ndarray:
    """ISO 8601 to the second, with microseconds where there are any; `Z` when the column has a zone."""
    import pyarrow as pa

    zone = "Z" if values.type.tz else ""
    micros = values.cast(pa.timestamp("us")).to_numpy().astype("datetime64[us]")
    text = np.datetime_as_string(micros, unit="s").astype(object)
    fine = micros != micros.astype("datetime64[s]")
    fine &= ~np.isnat(micros)
    if fine.any():
        text[fine] = np.datetime_as_string(micros[fine], unit="us").astype(object)
    if zone:
        text = text + zone
    text[np.isnat(micros)] = ""
    return text


# JSON rows -> batches


def rows_to_batch(rows: Sequence[dict[str, Any]], inputs: Sequence[TensorSpec], task: str = "") -> Batch:
    """JSON rows (None = missing) as a batch: one array of len(rows) for each input, 1-d for shapes [-1, 1] and [-1].

    Other shapes take nested lists and give arrays [rows, *shape[1:]]; the history of a `task` forecast may be longer, or
    null. InvalidInput, with `param` the feature and
    `detail` the row (from 0), for a row that is no object, and for missing, unknown and mistyped features.
    """
    inputs = [spec for spec in inputs if not spec.optional]
    names = {spec.name for spec in inputs}
    for spec in inputs:
        if is_series(spec, task):
            rows = gone_on(list(rows), spec.name)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            refuse_row(index, row)
        if row.keys() != names:
            refuse_names(index, row, [spec.name for spec in inputs])
    found: Batch = {}
    for spec in inputs:
        values = [row[spec.name] for row in rows]
        if is_series(spec, task):
            values = [history(value, row, spec) for row, value in enumerate(values)]
        found[spec.name] = _column(values, spec)
    return found


def _column(values: list[Any], spec: TensorSpec) -> np.ndarray:
    if len(spec.shape) > 2 or (len(spec.shape) == 2 and spec.shape[1] != 1):
        return _nested(values, spec)
    kind = kind_of(spec)
    if kind == "boolean":
        return _booleans(values, spec)
    if kind in MEDIA:
        return _files(values, spec, kind)
    if kind in ("category", "text", "time", "sequence"):
        return _texts(values, spec, kind)
    return _numbers(values, spec, kind)


def _numbers(values: list[Any], spec: TensorSpec, kind: str) -> np.ndarray:
    """Numbers and integers. The common case needs no loop in Python; any doubt goes to `_number`, one by one."""
    dtype = _DTYPES.get(spec.datatype, np.dtype("float32"))
    types = set(map(type, values))
    if types <= {float, int} and kind == "number" and dtype.kind == "f":
        try:
            wide = np.array(values, dtype=np.float64)
        except OverflowError:
            wide = np.array([np.inf])
        with np.errstate(over="ignore"):
            narrow = wide.astype(dtype)
        if np.isfinite(narrow).all():
            return narrow
    out = np.empty(len(values), dtype=dtype)
    for row, value in enumerate(values):
        out[row] = _number(value, row, spec, kind, dtype)
    return out


def _number(value: Any, row: int, spec: TensorSpec, kind: str, dtype: np.dtype) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        check_missing(row, spec)
        if dtype.kind == "f":
            return np.nan
        if spec.datatype == "INT64":
            return INT64_MISSING
        raise mistyped(value, row, spec, f"an integer ({spec.datatype} has no missing value)")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise mistyped(value, row, spec, EXPECTED[kind])
    if math.isinf(value) if isinstance(value, float) else False:
        raise mistyped(value, row, spec, "a finite number")
    if kind == "integer" and isinstance(value, float) and not value.is_integer():
        raise mistyped(value, row, spec, "an integer")
    if dtype.kind == "f":
        if abs(value) > float(np.finfo(dtype).max):
            raise mistyped(value, row, spec, f"a number within the range of {spec.datatype}")
        return float(value)
    whole = int(value)
    bounds = np.iinfo(dtype)
    if not int(bounds.min) <= whole <= int(bounds.max) or (spec.datatype == "INT64" and whole == INT64_MISSING):
        raise mistyped(value, row, spec, f"an integer within the range of {spec.datatype}")
    return whole


def _booleans(values: list[Any], spec: TensorSpec) -> np.ndarray:
    if set(map(type, values)) <= {bool}:
        return np.array(values, dtype=np.uint8)
    out = np.empty(len(values), dtype=np.uint8)
    for row, value in enumerate(values):
        if value is None:
            check_missing(row, spec)
            out[row] = BOOL_MISSING
        elif isinstance(value, bool):
            out[row] = value
        else:
            raise mistyped(value, row, spec, EXPECTED["boolean"])
    return out


def _texts(values: list[Any], spec: TensorSpec, kind: str) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        if value is None or value == "":
            # an input that is no table's column (a user's own net) has no notion of missing: its empty text is a text
            if spec.column or value is None:
                check_missing(row, spec)
            out[row] = ""
        elif kind == "sequence":
            out[row] = _sequence(value, row, spec)
        elif not isinstance(value, str):
            raise mistyped(value, row, spec, EXPECTED[kind])
        elif kind == "time":
            out[row] = _time(value, row, spec)
        elif not _encodable(value):
            raise mistyped(value, row, spec, "a text without lone surrogates")
        else:
            out[row] = value
    return out


def _sequence(value: Any, row: int, spec: TensorSpec) -> str:
    try:
        return sequences.dump(value)
    except ValueError:
        raise mistyped(value, row, spec, EXPECTED["sequence"]) from None


def _files(values: list[Any], spec: TensorSpec, kind: str) -> np.ndarray:
    """Base64 texts as the files that they hold. What they show is the decoder's to judge."""
    out = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        if value is None or value == "":
            check_missing(row, spec)
            out[row] = b""
            continue
        if not isinstance(value, str):
            raise mistyped(value, row, spec, EXPECTED[kind])
        try:
            out[row] = decode_base64(value)
        except ValueError:
            raise mistyped(value, row, spec, EXPECTED[kind]) from None
    return out


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _time(value: str, row: int, spec: TensorSpec) -> str:
    parsed = parse_time(value)
    if parsed is None:
        raise mistyped(value, row, spec, EXPECTED["time"])
    return format_time(parsed)


def _nested(values: list[Any], spec: TensorSpec) -> np.ndarray:
    """Tensors given as nested lists: every row must have the shape `spec.shape[1:]` (-1: free, equal in all rows)."""
    wanted = spec.shape[1:]
    flat_spec = spec.model_copy(update={"shape": [-1]})
    shape: tuple[int, ...] | None = None
    leaves: list[Any] = []
    for row, value in enumerate(values):
        found = shape_of(value, len(wanted))
        fits = found is not None and all(want in (-1, have) for want, have in zip(wanted, found, strict=True))
        if not fits or (shape is not None and found != shape):
            raise mistyped(value, row, spec, f"nested lists of shape {list(shape or wanted)}")
        shape = found
        leaves.extend(_leaves(value, len(wanted)))
    array = _column(leaves, flat_spec)
    return array.reshape(len(values), *(shape or (0,) * len(wanted)))


def _leaves(value: Any, depth: int) -> list[Any]:
    return [value] if depth == 0 else [leaf for item in value for leaf in _leaves(item, depth - 1)]


# batches -> JSON rows


def batch_to_rows(batch: Batch, inputs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """The inverse of `rows_to_batch`: JSON values, None = missing. Fed back, the rows give the same arrays."""
    columns = {spec.name: _values(np.asarray(batch[spec.name]), spec) for spec in inputs}
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _values(array: np.ndarray, spec: TensorSpec) -> list[Any]:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim > 1:
        return array.tolist()
    kind = kind_of(spec)
    if kind in MEDIA:
        return [base64.b64encode(value).decode() if value else None for value in array.tolist()]
    if kind == "boolean":
        return [None if value > 1 else bool(value) for value in array.astype(np.uint8).tolist()]
    if kind == "sequence":
        return [sequences.load(value.decode() if isinstance(value, bytes) else value) if value else None for value in array.tolist()]
    if kind in ("category", "text", "time"):
        texts = [value.decode() if isinstance(value, bytes) else value for value in array.tolist()]
        return [value if value or not spec.column else None for value in texts]
    if array.dtype.kind == "f":
        # str() of a float32 is the shortest text that reads back as the same float32: 5.1, not 5.099999904632568
        read = int if kind == "integer" else float
        return [None if np.isnan(value) else read(float(str(value))) for value in array]
    missing = INT64_MISSING if spec.datatype == "INT64" else None
    return [None if value == missing else value for value in array.tolist()]
