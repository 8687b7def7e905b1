"""Between named raw features (JSON rows) and tensors, by a signature. Pure Python: a few rows are faster without numpy.

The rules are those of ml/data/types.py `rows_to_batch` (a test holds the two together): null is a missing value, a
boolean is no number, an integer is a number, and every refusal names the feature, the row, what was expected and came.
"""

from __future__ import annotations

import difflib
import json
import math
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

from modelworks.core import sequences
from modelworks.core.errors import SHOWN, InvalidInput, ModelworksError, shown
from modelworks.core.tasks import FORECAST, TAGGING
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
_EXPECTED = {
    "number": "a number",
    "integer": "an integer",
    "boolean": "true or false",
    "category": "a text",
    "text": "a text",
    "time": "an ISO 8601 time as a text",
    "image": "an image file in base64",
    "audio": "a sound file in base64",
    "sequence": sequences.WORDS,
}
_MEDIA = ("image", "audio")
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
        self.kind = _kind(spec)
        # the history of a forecast: of a longer one the end counts, and none is the training's own
        self.series = task == FORECAST and spec.nullable and len(spec.shape) == 2 and spec.shape[1] > 1
        self.plain = bool(spec.shape) and spec.shape[1:] in ([], [1])
        self.single = self.plain and spec.shape[0] in (-1, 1) and self.kind not in (*_MEDIA, "sequence")
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
    if width == 1 and plan[0].series:
        rows = [{plan[0].name: None} if row == {} else row for row in rows]
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
    if field.kind in _MEDIA:
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
            _mistyped(field, value, row, "a text without lone surrogates")
    else:
        raw = _text(field, value, row).encode()
    if len(raw) > MAX_TEXT:
        _mistyped(field, value, row, f"a text of at most {MAX_TEXT} bytes")
    return struct.pack("<I", len(raw)) + raw


def _file_bytes(field: Field, value: Any, row: int) -> bytes:
    """A file, from base64 or as it came in a form. What it shows is the replica's to judge."""
    if value is None or value == "":
        _missing(field, row)
        return struct.pack("<I", 0)
    if type(value) is str:
        try:
            value = decode_base64(value)
        except ValueError:
            _mistyped(field, value, row, _EXPECTED[field.kind])
    elif type(value) is not bytes:
        _mistyped(field, value, row, _EXPECTED[field.kind])
    return struct.pack("<I", len(value)) + value


def _text(field: Field, value: Any, row: int) -> str:
    if value is None or value == "":
        # an input that is no table's column has no notion of missing: its empty text is a text
        if field.spec.column or value is None:
            _missing(field, row)
        return ""
    if field.kind == "sequence":
        return _sequence(field, value, row)
    if type(value) is not str:
        _mistyped(field, value, row, _EXPECTED[field.kind])
    if len(value) > MAX_TEXT:
        _mistyped(field, value, row, f"a text of at most {MAX_TEXT} bytes")
    if field.kind != "time":
        return value
    moment = _parse_time(value)
    if moment is None:
        _mistyped(field, value, row, _EXPECTED["time"])
    return moment


def _sequence(field: Field, value: Any, row: int) -> str:
    """A list, as JSON."""
    try:
        return sequences.dump(value)
    except ValueError:
        _mistyped(field, value, row, _EXPECTED["sequence"])


def _parse_time(text: str) -> str | None:
    """The form in which times travel (`2024-01-31T12:00:00`, `Z` if it has a zone); None when it is not ISO 8601."""
    text = text.strip()
    if not 7 <= len(text) <= 64:
        return None
    try:
        moment = datetime.fromisoformat(text + "-01" if len(text) == 7 else text)  # a month is its first day
        if moment.tzinfo is None:
            return moment.isoformat()
        return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
    except (ValueError, OverflowError):
        return None


def _scalar(field: Field, value: Any, row: int) -> Any:
    """One number or boolean, checked with all care."""
    if value is None:
        _missing(field, row)
        if field.datatype in _FLOATS:
            return math.nan
        if field.kind == "boolean":
            return BOOL_MISSING
        if field.datatype == "INT64":
            return INT64_MISSING
        _mistyped(field, value, row, f"an integer ({field.datatype} has no missing value)")
    if field.kind == "boolean":
        if type(value) is not bool:
            _mistyped(field, value, row, _EXPECTED["boolean"])
        return value
    if type(value) not in (int, float):
        _mistyped(field, value, row, _EXPECTED[field.kind])
    if type(value) is float and not math.isfinite(value):
        _mistyped(field, value, row, "a finite number")
    if field.kind == "integer" and type(value) is float and not value.is_integer():
        _mistyped(field, value, row, "an integer")
    if field.datatype in _FLOATS:
        if abs(value) > _FLOATS[field.datatype]:
            _mistyped(field, value, row, f"a number within the range of {field.datatype}")
        return float(value)
    whole = int(value)
    try:
        struct.pack(f"<{field.code}", whole)
    except (struct.error, OverflowError):
        _mistyped(field, value, row, f"an integer within the range of {field.datatype}")
    if field.datatype == "INT64" and whole == INT64_MISSING:
        _mistyped(field, value, row, "an integer within the range of INT64")
    return whole


def _encode_nested(field: Field, values: list[Any]) -> Tensor:
    """Inputs that are no columns: every row's value is a nested list of the shape after the first axis."""
    wanted = field.spec.shape[1:]
    if field.series:
        values = [_history(field, value, row) for row, value in enumerate(values)]
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
        found = _shape_of(value, len(wanted))
        fits = found is not None and all(want in (-1, have) for want, have in zip(wanted, found, strict=True))
        if not fits or (shape is not None and found != shape):
            _mistyped(field, value, row, f"nested lists of shape {list(shape or wanted)}")
        shape = found
        before = len(leaves)
        _collect(value, len(wanted), leaves)
        rows += [row] * (len(leaves) - before)
    return Tensor(field.name, field.datatype, [len(values), *(shape or ())], _flat(field, leaves, rows))


def _history(field: Field, value: Any, row: int) -> list[Any]:
    """The last steps of a history; of none, missing values."""
    steps = field.spec.shape[1]
    if value is None:
        return [None] * steps
    if type(value) is not list or len(value) < steps or None in value[-steps:]:
        _mistyped(field, value, row, f"a list of {steps} numbers or more, the newest last, or null")
    return value[-steps:]


def _shape_of(value: Any, depth: int) -> tuple[int, ...] | None:
    """The shape of lists nested `depth` deep; None when they are ragged or something else."""
    if depth == 0:
        return None if isinstance(value, list | dict) else ()
    if type(value) is not list:
        return None
    inner = {_shape_of(item, depth - 1) for item in value}
    if len(inner) > 1 or None in inner:
        return None
    rest = inner.pop() if inner else (0,) * (depth - 1)
    return None if rest is None else (len(value), *rest)


def _collect(value: Any, depth: int, leaves: list[Any]) -> None:
    if depth == 0:
        leaves.append(value)
    elif depth == 1:
        leaves.extend(value)
    else:
        for item in value:
            _collect(item, depth - 1, leaves)


def _kind(spec: TensorSpec) -> str:
    """The column type to check against; told from the datatype for inputs that are not a table's columns."""
    if spec.column:
        return spec.column
    if spec.datatype == "BOOL":
        return "boolean"
    if spec.datatype == "BYTES":
        return "text"
    return "number" if spec.datatype in _FLOATS else "integer"


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
    """Find what is wrong with the names of the rows' features, in the order in which a reader would."""
    names = [field.name for field in plan]
    known = set(names)
    for index, row in enumerate(rows):
        if type(row) is not dict:
            raise InvalidInput(
                f"inputs[{index}] must be an object of feature names and values, not {shown(row)}",
                code="bad_row",
                param=f"inputs[{index}]",
            )
        unknown = [str(name)[:SHOWN] for name in row if name not in known]
        missing = [name for name in names if name not in row]
        if missing:
            near = difflib.get_close_matches(missing[0], unknown[:50], 1, 0.6)
            hint = f" ({near[0]!r} is not known: did you mean {missing[0]!r}?)" if near else ""
            raise InvalidInput(
                f"inputs[{index}] lacks the feature {missing[0]!r}{hint}; "
                "give it a value, or null where a missing value is accepted",
                code="missing_feature",
                param=missing[0],
                detail={"row": index, "feature": missing[0]},
            )
        if unknown:
            near = difflib.get_close_matches(unknown[0], names[:500], 1, 0.6)
            hint = f"did you mean {near[0]!r}? " if near else ""
            listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InvalidInput(
                f"inputs[{index}] has the feature {unknown[0]!r}, which the model does not know; "
                f"{hint}its features are {listed}",
                code="unknown_feature",
                param=unknown[0],
                detail={"row": index, "feature": unknown[0]},
            )
    raise AssertionError("the names are right")  # pragma: no cover


def _missing(field: Field, row: int) -> None:
    if not field.spec.nullable:
        expected = _EXPECTED[field.kind]
        raise InvalidInput(
            f"inputs[{row}]: the feature {field.name!r} expects {expected} but its value is missing, "
            "and the model was not made to accept that",
            code="missing_value",
            param=field.name,
            detail={"row": row, "feature": field.name, "expected": expected, "got": "null"},
        )


def _mistyped(field: Field, value: Any, row: int, expected: str) -> NoReturn:
    raise InvalidInput(
        f"inputs[{row}]: the feature {field.name!r} expects {expected}, not {shown(value)}",
        code="bad_value",
        param=field.name,
        detail={"row": row, "feature": field.name, "expected": expected, "got": shown(value)},
    )


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
