"""Bringing another dataset's columns to the types that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Column

_ARROW = {
    "number": pa.float64(),
    "integer": pa.int64(),
    "boolean": pa.bool_(),
    "category": pa.string(),
    "text": pa.string(),
    "image": pa.binary(),
    "audio": pa.binary(),
    "sequence": pa.string(),
}


def coerce(table: pa.Table, columns: Sequence[Column]) -> pa.Table:
    """A table of just `columns`, each in its canonical type.

    InvalidInput for a missing column and for values that do not fit.
    """
    return pa.table({column.name: _cast(table, column) for column in columns})


def _cast(table: pa.Table, column: Column) -> pa.ChunkedArray:
    index = table.schema.get_field_index(column.name)
    if index < 0:
        raise InvalidInput(
            f"the dataset has no column {column.name!r}, which the model needs; it has: "
            f"{', '.join(table.column_names[:30])}",
            code="missing_column",
            param="dataset",
        )
    values = table.column(index)
    wanted = _ARROW.get(column.type) or (values.type if pa.types.is_timestamp(values.type) else pa.timestamp("us"))
    try:
        return values.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InvalidInput(
            f"the column {column.name!r} does not fit: the model was trained on type {column.type}, and "
            f"{str(error)[:200]}",
            code="wrong_column_type",
            param="dataset",
        ) from None
