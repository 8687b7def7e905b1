"""Slices: parts of the tested rows, named by conditions such as `age > 60 and sex == "F"`. Parsed, never evaluated as code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import SliceSpec
from modelworks.core.types import Column

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from modelworks.ml.evaluate.predictions import Predictions

_CONDITION = re.compile(r"\s*(?:`([^`]+)`|([^<>=!`]+?))\s*(<=|>=|==|!=|<|>|=)\s*(\"[^\"]*\"|'[^']*'|[^<>=!\"'`]+?)\s*")
_FUNCTIONS = {
    "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal", "==": "equal", "!=": "not_equal",
}  # fmt: skip
_FEW = 30  # rows below which a slice's figures say little


@dataclass(frozen=True)
class Condition:
    column: Column
    operator: str
    value: Any


def parse_slice(given: str | SliceSpec, columns: Sequence[Column]) -> list[Condition]:
    """The conditions, all of which must hold. InvalidInput for what cannot be read and a column that is not there."""
    if isinstance(given, SliceSpec):
        return [_condition(given.column, "==", given.equals, columns)]
    found = []
    for text in re.split(r"\s+and\s+(?=[^\"']*(?:[\"'][^\"']*[\"'][^\"']*)*$)", given.strip(), flags=re.IGNORECASE):
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise InvalidInput(
                f'{given[:80]!r} is not a slice; write conditions such as age > 60 and sex == "F", with <, <=, >, >=, '
                "== or != (a name with spaces or signs in backticks)",
                code="bad_slice",
                param="slices",
            )
        quoted, plain, operator, value = match.groups()
        found.append(_condition(quoted or plain, "==" if operator == "=" else operator, value, columns))
    return found


def name_of(given: str | SliceSpec) -> str:
    return given if isinstance(given, str) else f"{given.column} == {given.equals}"


def _condition(name: str, operator: str, value: Any, columns: Sequence[Column]) -> Condition:
    column = next((one for one in columns if one.name == name), None)
    if column is None:
        there = ", ".join(one.name for one in columns[:30])
        raise InvalidInput(
            f"a slice names the column {name[:80]!r}, which the dataset does not have; it has: {there}",
            code="unknown_column",
            param="slices",
        )
    if isinstance(value, str) and value[:1] in ("'", '"'):
        value = value[1:-1]
    return Condition(column, operator, _read(column, operator, value))


def _read(column: Column, operator: str, value: Any) -> Any:
    """`value` in the column's type."""
    kind = column.type
    if kind in ("number", "integer"):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _misfit(column, value, "a number") from None
    if operator not in ("==", "!=") and kind != "time":
        raise InvalidInput(
            f"the column {column.name!r} is of type {kind}, which has no order; use == or !=",
            code="bad_slice",
            param="slices",
        )
    if kind == "boolean":
        if str(value).lower() not in ("true", "false"):
            raise _misfit(column, value, "true or false")
        return str(value).lower() == "true"
    if kind in ("category", "text"):
        return str(value)
    if kind == "time":
        from datetime import datetime

        try:
            return datetime.fromisoformat(str(value))
        except ValueError:
            raise _misfit(column, value, "a time such as 2024-01-31") from None
    raise InvalidInput(
        f"the column {column.name!r} of type {kind} cannot make a slice", code="bad_slice", param="slices"
    )


def _misfit(column: Column, value: Any, wanted: str) -> InvalidInput:
    return InvalidInput(
        f"the column {column.name!r} is compared with {str(value)[:80]!r}; give {wanted}",
        code="bad_slice",
        param="slices",
    )


def mask(conditions: Sequence[Condition], table: pa.Table) -> np.ndarray:
    """bool [n]: the table's rows where all conditions hold; a missing value holds none."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import compute

    keep = np.ones(table.num_rows, dtype=bool)
    for one in conditions:
        values = table.column(one.column.name)
        if one.column.type in ("number", "integer"):
            values = values.cast(pa.float64())
        wanted = pa.scalar(one.value, values.type) if one.column.type == "time" else one.value
        held = compute.call_function(
            _FUNCTIONS[one.operator], [values, pa.scalar(wanted) if wanted is one.value else wanted]
        )
        keep &= held.fill_null(False).to_numpy().astype(bool)
    return keep


def measure(
    task: str,
    slices: Sequence[str | SliceSpec],
    whole: Predictions,
    table: pa.Table,
    columns: Sequence[Column],
    wanted: Sequence[str],
    seed: int,
) -> list[dict[str, Any]]:
    """For each slice of the tested rows: how many, and each metric with its bootstrap interval."""
    from modelworks.ml.evaluate.intervals import over_rows
    from modelworks.ml.evaluate.metrics import score

    found = []
    for given in slices:
        part = whole.take(mask(parse_slice(given, columns), table)[whole.rows])
        line: dict[str, Any] = {"slice": name_of(given), "rows": part.counted, "metrics": {}, "note": None}
        if len(part.rows):
            line["metrics"], _ = over_rows(task, part, score(task, part, wanted), seed)
        if line["rows"] < _FEW:
            line["note"] = "no row" if not len(part.rows) else f"fewer than {_FEW} rows: the figures say little"
        found.append(line)
    return found
