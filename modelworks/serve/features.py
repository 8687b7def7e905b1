"""Between named raw features (JSON rows) and tensors, by a signature. Pure Python: a few rows are faster without numpy.

The rules are those of ml/data/types.py `rows_to_batch` (a test holds the two together): null is a missing value, a
boolean is no number, an integer is a number, and every refusal names the feature, the row, what was expected and came.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from modelworks.core import sequences
from modelworks.core.errors import SHOWN, InvalidInput, ModelworksError, shown
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
from modelworks.core.tasks import TAGGING
from modelworks.core.tensors import BOOL_MISSING, DATATYPES, INT64_MISSING, Tensor, decode_base64, unpack
from modelworks.core.types import Answer, TensorSpec

if TYPE_CHECKING:
    from modelworks.serve.routes import Route

MAX_TEXT = 1024 * 1024  # bytes of one text
MAX_ROWS = 65_536
_FLOATS = {
    "FP16": 65504.0,
    "BF16": 3.3895313892515355e38,
    "FP32": 3.4028234663852886e38,
    "FP64": 1.7976931348623157e308,
}
_REWRITTEN = ("time", "sequence")
_NUMBERS = frozenset({int, float})
_PLACES = range(0, 4 * 1_000_000, 4)
_FAST_TYPES = {"number": (float, int), "integer": (int, int), "boolean": (bool, bool), "text": (str, str)}


class Field:
    """One input, ready to encode."""

    __slots__ = (
        "code", "datatype", "first", "kind", "name", "one", "pack_one", "plain", "second", "series", "single", "spec",
    )  # fmt: skip

    def __init__(self, spec: TensorSpec, task: str) -> None:
        self.spec = spec
        self.name = spec.name
        self.datatype = spec.datatype
        self.kind = kind_of(spec)
        self.series = is_series(spec, task)
        self.plain = bool(spec.shape) and spec.shape[1:] in ([], [1])
        self.single = self.plain and spec.shape[0] in (-1, 1) and self.kind not in (*MEDIA, "sequence")
        self.one = [1] * len(spec.shape)
        self.code = DATATYPES[spec.datatype][1]
        family = "text" if spec.datatype == "BYTES" else self.kind
        self.first, self.second = _FAST_TYPES[family]
        self.pack_one: Callable[[Any], bytes] | None = struct.Struct(f"<{self.code}").pack if self.code else None


def fields(inputs: Sequence[TensorSpec], task: str) -> list[Field]:
    """What `encode_features` needs to know of a signature; made once a route."""
    return [Field(spec, task) for spec in inputs if not spec.optional]


def encode_rows(route: Route, rows: Any) -> list[Tensor]:
    """Rows of named raw features as the tensors of the route's signature, for a table [n, 1] each. InvalidInput."""
    if route.numbers is not None and type(rows) is list and len(rows) == 1:
        tensors = _encode_numbers(route.fields, route.numbers, rows[0])
        if tensors is not None:
            return tensors
    return _encode(route.fields, rows)


def numbers(plan: Sequence[Field]) -> struct.Struct | None:
    """What packs one row of a signature that is nothing but plain FP32 numbers; None for any other."""
    plain = all(field.datatype == "FP32" and field.kind == "number" and field.single for field in plan)
    return struct.Struct(f"<{len(plan)}f") if plan and plain else None


def _encode_numbers(plan: list[Field], row_of: struct.Struct, row: Any) -> list[Tensor] | None:
    """The tensors of one row of numbers; None: look with all care, and say what is wrong."""
    if type(row) is not dict or len(row) != len(plan):
        return None
    try:
        values = [row[field.name] for field in plan]
        if not _NUMBERS.issuperset(map(type, values)):
            return None
        data = row_of.pack(*values)
        if not all(map(math.isfinite, values)):
            return None
    except (KeyError, OverflowError, struct.error):
        return None
    return [Tensor(field.name, "FP32", field.one, data[at : at + 4]) for field, at in zip(plan, _PLACES, strict=False)]


def encode_features(inputs: Sequence[TensorSpec], task: str, rows: Any) -> list[Tensor]:
    """`encode_rows` by the inputs of a signature and the model's task."""
    return _encode(fields(inputs, task), rows)


def _encode(plan: list[Field], rows: Any) -> list[Tensor]:
    if type(rows) is not list or not rows or len(rows) > MAX_ROWS:
        _refuse_rows(rows)
    count = len(rows)
    width = len(plan)
    for field in plan:
        if field.series:
            rows = gone_on(rows, field.name)
    for row in rows:
        if type(row) is not dict or len(row) != width:
            _refuse(plan, rows)
    tensors: list[Tensor] = []
    try:
        if count == 1:
            row = rows[0]
            for field in plan:
                tensors.append(_encode_one(field, row[field.name]))
        else:
            for field in plan:
                name = field.name
                tensors.append(_encode_many(field, [row[name] for row in rows], count))
    except KeyError:
        _refuse(plan, rows)
    return tensors


def _encode_one(field: Field, value: Any) -> Tensor:
    kind = type(value)
    if field.single and (kind is field.first or kind is field.second):
        try:
            if kind is str:
                if value and field.kind != "time" and len(value) < SHOWN:
                    raw = value.encode()
                    return Tensor(field.name, "BYTES", field.one, len(raw).to_bytes(4, "little") + raw)
            elif field.pack_one is not None and value - value == 0 and value != INT64_MISSING:
                return Tensor(field.name, field.datatype, field.one, field.pack_one(value))
        except (struct.error, OverflowError, UnicodeEncodeError):
            pass  # told below, in words
    return _encode_many(field, [value], 1)


def _encode_many(field: Field, values: list[Any], count: int) -> Tensor:
    if not field.plain:
        return _encode_nested(field, values)
    shape = [count, 1] if len(field.spec.shape) == 2 else [count]
    if field.spec.shape and field.spec.shape[0] not in (-1, count):
        raise InvalidInput(
            f"the model takes exactly {field.spec.shape[0]} rows at once, not {count}", code="bad_shape", param="inputs"
        )
    return Tensor(field.name, field.datatype, shape, _flat(field, values, None))


def _flat(field: Field, values: list[Any], rows: Sequence[int] | None) -> bytes:
    """The bytes of a flat list; `rows`: the row of each value where it is not its place in the list."""
    if field.kind in MEDIA:
        return b"".join([_file_bytes(field, value, rows[i] if rows else i) for i, value in enumerate(values)])
    if field.datatype == "BYTES":
        return b"".join([_text_bytes(field, value, rows[i] if rows else i) for i, value in enumerate(values)])
    types = set(map(type, values))
    if field.code and types <= {field.first, field.second}:
        try:
            packed = struct.pack(f"<{len(values)}{field.code}", *values)
            if field.kind == "boolean" or (INT64_MISSING not in values and all(map(math.isfinite, values))):
                return packed
        except (struct.error, OverflowError):
            pass  # one of them is out of range: told below, in words
    checked = [_scalar(field, value, rows[i] if rows else i) for i, value in enumerate(values)]
    if not field.code:
        raise InvalidInput(f"{field.name!r}: {field.datatype} travels only as binary data", param=field.name)
    return struct.pack(f"<{len(checked)}{field.code}", *checked)


def _text_bytes(field: Field, value: Any, row: int) -> bytes:
    if type(value) is str and value and field.kind not in _REWRITTEN and len(value) <= MAX_TEXT:
        try:
            raw = value.encode()
        except UnicodeEncodeError:
            raise mistyped(value, row, field.spec, "a text without lone surrogates") from None
    else:
        raw = _text(field, value, row).encode()
    if len(raw) > MAX_TEXT:
        raise mistyped(value, row, field.spec, f"a text of at most {MAX_TEXT} bytes")
    return struct.pack("<I", len(raw)) + raw


def _file_bytes(field: Field, value: Any, row: int) -> bytes:
    """A file, from base64 or as it came in a form. What it shows is the replica's to judge."""
    if value is None or value == "":
        check_missing(row, field.spec)
        return struct.pack("<I", 0)
    if type(value) is str:
        try:
            value = decode_base64(value)
        except ValueError:
            raise mistyped(value, row, field.spec, EXPECTED[field.kind]) from None
    elif type(value) is not bytes:
        raise mistyped(value, row, field.spec, EXPECTED[field.kind])
    return struct.pack("<I", len(value)) + value


def _text(field: Field, value: Any, row: int) -> str:
    if value is None or value == "":
        # an input that is no table's column has no notion of missing: its empty text is a text
        if field.spec.column or value is None:
            check_missing(row, field.spec)
        return ""
    if field.kind == "sequence":
        return _sequence(field, value, row)
    if type(value) is not str:
        raise mistyped(value, row, field.spec, EXPECTED[field.kind])
    if len(value) > MAX_TEXT:
        raise mistyped(value, row, field.spec, f"a text of at most {MAX_TEXT} bytes")
    if field.kind != "time":
        return value
    moment = parse_time(value)
    if moment is None:
        raise mistyped(value, row, field.spec, EXPECTED["time"])
    return format_time(moment)


def _sequence(field: Field, value: Any, row: int) -> str:
    """A list, as JSON."""
    try:
        return sequences.dump(value)
    except ValueError:
        raise mistyped(value, row, field.spec, EXPECTED["sequence"]) from None


def _scalar(field: Field, value: Any, row: int) -> Any:
    """One number or boolean, checked with all care."""
    if value is None:
        check_missing(row, field.spec)
        if field.datatype in _FLOATS:
            return math.nan
        if field.kind == "boolean":
            return BOOL_MISSING
        if field.datatype == "INT64":
            return INT64_MISSING
        raise mistyped(value, row, field.spec, f"an integer ({field.datatype} has no missing value)")
    if field.kind == "boolean":
        if type(value) is not bool:
            raise mistyped(value, row, field.spec, EXPECTED["boolean"])
        return value
    if type(value) not in (int, float):
        raise mistyped(value, row, field.spec, EXPECTED[field.kind])
    if type(value) is float and not math.isfinite(value):
        raise mistyped(value, row, field.spec, "a finite number")
    if field.kind == "integer" and type(value) is float and not value.is_integer():
        raise mistyped(value, row, field.spec, "an integer")
    if field.datatype in _FLOATS:
        if abs(value) > _FLOATS[field.datatype]:
            raise mistyped(value, row, field.spec, f"a number within the range of {field.datatype}")
        return float(value)
    whole = int(value)
    try:
        struct.pack(f"<{field.code}", whole)
    except (struct.error, OverflowError):
        raise mistyped(value, row, field.spec, f"an integer within the range of {field.datatype}") from None
    if field.datatype == "INT64" and whole == INT64_MISSING:
        raise mistyped(value, row, field.spec, "an integer within the range of INT64")
    return whole


def _encode_nested(field: Field, values: list[Any]) -> Tensor:
    """Inputs that are no columns: every row's value is a nested list of the shape after the first axis."""
    wanted = field.spec.shape[1:]
    if field.series:
        values = [history(value, row, field.spec) for row, value in enumerate(values)]
    if not field.spec.shape or field.spec.shape[0] not in (-1, len(values)):
        raise InvalidInput(
            f"the input {field.name!r} has shape {field.spec.shape} and cannot be given row by row; use /v2 infer",
            code="bad_shape",
            param=field.name,
        )
    shape: tuple[int, ...] | None = None
    leaves: list[Any] = []
    rows: list[int] = []
    for row, value in enumerate(values):
        found = shape_of(value, len(wanted))
        fits = found is not None and all(want in (-1, have) for want, have in zip(wanted, found, strict=True))
        if not fits or (shape is not None and found != shape):
            raise mistyped(value, row, field.spec, f"nested lists of shape {list(shape or wanted)}")
        shape = found
        before = len(leaves)
        _collect(value, len(wanted), leaves)
        rows += [row] * (len(leaves) - before)
    return Tensor(field.name, field.datatype, [len(values), *(shape or ())], _flat(field, leaves, rows))


def _collect(value: Any, depth: int, leaves: list[Any]) -> None:
    if depth == 0:
        leaves.append(value)
    elif depth == 1:
        leaves.extend(value)
    else:
        for item in value:
            _collect(item, depth - 1, leaves)


# refusals


def _refuse_rows(rows: Any) -> NoReturn:
    if isinstance(rows, list) and len(rows) > MAX_ROWS:
        raise InvalidInput(
            f"inputs has {len(rows)} rows; send at most {MAX_ROWS} at once", code="too_many_rows", param="inputs"
        )
    came = "an empty one" if rows == [] else shown(rows)
    raise InvalidInput(
        f"inputs must be a list with at least one object of feature names and values, not {came}",
        code="bad_inputs",
        param="inputs",
    )


def _refuse(plan: list[Field], rows: list[Any]) -> NoReturn:
    names = [field.name for field in plan]
    known = set(names)
    for index, row in enumerate(rows):
        if type(row) is not dict:
            refuse_row(index, row)
        if row.keys() != known:
            refuse_names(index, row, names)
    raise AssertionError("the names are right")  # pragma: no cover


# answers


def decode_outputs(route: Route, answer: Answer) -> list[dict[str, Any]]:
    """JSON rows of an answer: {"label", "probabilities": {class: p}}, {"value"}, or outputs by name. NaN is null."""
    if route.scores is not None and len(answer.outputs) == 2:
        row = _decode_class(route, route.scores, *answer.outputs)
        if row is not None:
            return [row]
    columns = {tensor.name: _rows(tensor) for tensor in answer.outputs}
    if route.task == TAGGING and "tags" in columns:
        columns = _unpadded(columns)
    if len(columns) > 1 and len({len(column) for column in columns.values()}) > 1:
        raise ModelworksError("the model's outputs have different numbers of rows", code="bad_model_output")
    if route.classes is not None and "label" in columns:
        labels = route.labels
        columns["label"] = [labels.get(label, label) if isinstance(label, str) else label for label in columns["label"]]
    if route.classes is not None and "probabilities" in columns:
        names = route.class_names
        columns["probabilities"] = [
            dict(zip(names, row, strict=True)) if isinstance(row, list) and len(row) == len(names) else row
            for row in columns["probabilities"]
        ]
    if len(columns) == 1:
        ((name, column),) = columns.items()
        return [{name: value} for value in column]
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _unpadded(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """One value an element: behind the last there are empty tags."""
    lengths = [len(tags) - tags.count("") for tags in columns["tags"]]
    return {name: [row[:length] for row, length in zip(rows, lengths, strict=True)] for name, rows in columns.items()}


def _decode_class(route: Route, scores: struct.Struct, label: Tensor, chances: Tensor) -> dict[str, Any] | None:
    """The one row of a classifier's answer in its usual form; None for anything else."""
    if label.name != "label" or label.datatype != "BYTES" or label.shape != [1]:
        return None
    if chances.name != "probabilities" or chances.datatype != "FP32" or len(chances.data) != scores.size:
        return None
    values = scores.unpack(chances.data)
    if chances.shape != [1, len(values)] or not all(map(math.isfinite, values)):
        return None
    (text,) = unpack(label)
    known: Any = text.decode(errors="replace")
    return {
        "label": route.labels.get(known, known),
        "probabilities": dict(zip(route.class_names, values, strict=True)),
    }


def _rows(tensor: Tensor) -> list[Any]:
    """The JSON value of each row: a scalar for [n] and [n, 1], nested lists otherwise."""
    flat = unpack(tensor)
    if tensor.datatype == "BYTES":
        flat = [raw.decode(errors="replace") for raw in flat]
    elif tensor.datatype in _FLOATS and not all(map(math.isfinite, flat)):
        flat = [value if math.isfinite(value) else None for value in flat]
    shape = tensor.shape
    if len(shape) <= 1 or shape[1:] == [1]:
        return flat
    if 0 in shape[1:]:
        return _hollow(shape)
    if len(shape) == 2 and shape[0] == 1:
        return [flat]
    for size in reversed(shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]
    return flat


def _hollow(shape: Sequence[int]) -> list[Any]:
    """Nested lists of a shape that holds nothing."""
    return [_hollow(shape[1:]) for _ in range(shape[0])]


def class_name(value: Any) -> str:
    """A class as the key of a JSON object: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
