"""What a row may give for a model's features, and in which words it is refused; the same in training and serving."""

from __future__ import annotations

import difflib
from datetime import UTC, datetime
from typing import Any, NoReturn

from modelworks.core import sequences
from modelworks.core.errors import SHOWN, InvalidInput, shown
from modelworks.core.tasks import FORECAST
from modelworks.core.types import TensorSpec

EXPECTED = {
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
MEDIA = ("image", "audio")
_REALS = ("FP16", "BF16", "FP32", "FP64")
_LONGEST_TIME = 64  # characters


def kind_of(spec: TensorSpec) -> str:
    """The column type to check against; told from the datatype for inputs that are not a table's columns."""
    if spec.column:
        return spec.column
    if spec.datatype == "BOOL":
        return "boolean"
    if spec.datatype == "BYTES":
        return "text"
    return "number" if spec.datatype in _REALS else "integer"


def is_series(spec: TensorSpec, task: str) -> bool:
    """Whether it is the history of a forecast: of a longer one the end counts, and none is the training's own."""
    return task == FORECAST and spec.nullable and len(spec.shape) == 2 and spec.shape[1] > 1


def history(value: Any, row: int, spec: TensorSpec) -> list[Any]:
    """The last steps of a history; of none, missing values."""
    steps = spec.shape[1]
    if value is None:
        return [None] * steps
    if type(value) is not list or len(value) < steps or None in value[-steps:]:
        raise mistyped(value, row, spec, f"a list of {steps} numbers or more, the newest last, or null")
    return value[-steps:]


def gone_on(rows: list[Any], series: str) -> list[Any]:
    """Rows of a forecast without its history, the input `series`, with none: they go on from the end of the training."""
    return [{**row, series: None} if type(row) is dict and series not in row else row for row in rows]


def shape_of(value: Any, depth: int) -> tuple[int, ...] | None:
    """The shape of lists nested `depth` deep; None when they are ragged or something else."""
    if depth == 0:
        return None if isinstance(value, list | dict) else ()
    if type(value) is not list:
        return None
    inner = {shape_of(item, depth - 1) for item in value}
    if len(inner) > 1 or None in inner:
        return None
    rest = inner.pop() if inner else (0,) * (depth - 1)
    return None if rest is None else (len(value), *rest)


def parse_time(text: str) -> datetime | None:
    """An ISO 8601 date or date and time, with or without offset (turned to UTC); None when it is not one."""
    text = text.strip()
    if not 7 <= len(text) <= _LONGEST_TIME:
        return None
    try:
        parsed = datetime.fromisoformat(text + "-01" if len(text) == 7 else text)  # a month is its first day
        return parsed if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def format_time(moment: datetime) -> str:
    """The one form in which times travel: `2024-01-31T12:00:00`, with microseconds if any, and `Z` if it has a zone."""
    text = moment.replace(tzinfo=None).isoformat()
    return text + "Z" if moment.tzinfo else text


# refusals; each names the feature, the row (from 0), what was expected and what came


def refuse_row(index: int, row: Any) -> NoReturn:
    raise InvalidInput(
        f"inputs[{index}] must be an object of feature names and values, not {shown(row)}",
        code="bad_row",
        param=f"inputs[{index}]",
    )


def refuse_names(index: int, row: dict[str, Any], names: list[str]) -> NoReturn:
    """Say what is wrong with the names of a row's features, in the order in which a reader would: one must be wrong."""
    known = set(names)
    unknown = [str(name)[:SHOWN] for name in row if name not in known]
    missed = next((name for name in names if name not in row), None)
    if missed is not None:
        near = difflib.get_close_matches(missed, unknown[:50], 1, 0.6)
        hint = f" ({near[0]!r} is not known: did you mean {missed!r}?)" if near else ""
        raise InvalidInput(
            f"inputs[{index}] lacks the feature {missed!r}{hint}; "
            "give it a value, or null where a missing value is accepted",
            code="missing_feature",
            param=missed,
            detail={"row": index, "feature": missed},
        )
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


def check_missing(row: int, spec: TensorSpec) -> None:
    """Raise InvalidInput for a missing value unless the model was made to accept it."""
    if spec.nullable:
        return
    expected = EXPECTED[kind_of(spec)]
    raise InvalidInput(
        f"inputs[{row}]: the feature {spec.name!r} expects {expected} but its value is missing, "
        "and the model was not made to accept that",
        code="missing_value",
        param=spec.name,
        detail={"row": row, "feature": spec.name, "expected": expected, "got": "null"},
    )


def mistyped(value: Any, row: int, spec: TensorSpec, expected: str) -> InvalidInput:
    return InvalidInput(
        f"inputs[{row}]: the feature {spec.name!r} expects {expected}, not {shown(value)}",
        code="bad_value",
        param=spec.name,
        detail={"row": row, "feature": spec.name, "expected": expected, "got": shown(value)},
    )
