"""A table posed as a series: one value a step, in order of time. What is not one (gaps, repeats, irregular steps) is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit, TransformSpec
from modelworks.core.types import Column
from modelworks.ml.data.findings import CALENDAR, DAY

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable


@dataclass(frozen=True)
class Series:
    """`along` [n]: each row's time as a number.  `order`: the rows, oldest first.  `values` [n]: by row, not by time.

    `step`: in words.  `last`: the last time, as it is written.  `resampled`: the rows are not the dataset's.
    """

    time: str
    along: np.ndarray
    order: np.ndarray
    values: np.ndarray
    step: str
    last: str
    resampled: bool = False


def read_series(
    table: pa.Table | StoredTable, time: Column, target: Column, transforms: Sequence[TransformSpec] | None
) -> Series:
    """InvalidInput says what is in the way, and what to do."""
    import pyarrow as pa

    if not table.num_rows:
        raise InvalidInput("the dataset has no rows", param="dataset")
    moments, values = table.column(time.name), table.column(target.name)
    resampled = bool(transforms)
    if transforms:
        moments, values = _resampled(moments, values, time, target, transforms[0])
    kind = moments.type
    _refuse_gaps(moments, time.name, "time", "drop those rows from the data")
    _refuse_gaps(values, target.name, "target", 'fill them, or add the transform {"op": "resample", "every": "1 day"}')
    if pa.types.is_timestamp(kind):
        along = moments.cast(pa.timestamp("us", kind.tz)).cast(pa.int64()).to_numpy()
    else:
        along = moments.cast(pa.float64()).to_numpy()
    found = values.cast(pa.float64()).to_numpy().astype(np.float64)
    if not np.isfinite(found).all():
        raise InvalidInput(
            f"the target {target.name!r} has infinite values; correct those rows", code="bad_target", param="target"
        )
    order = np.argsort(along, kind="stable")
    step = _step(along[order], time.name, pa.types.is_timestamp(kind))
    last = str(moments[int(order[-1])].as_py())
    return Series(time.name, along, order, found, step, last, resampled)


def _refuse_gaps(values: pa.ChunkedArray, name: str, param: str, advice: str) -> None:
    if values.null_count:
        first = next(i for i, valid in enumerate(values.is_valid().to_pylist()) if not valid)
        raise InvalidInput(
            f"the column {name!r} is missing in {values.null_count} rows, first in row {first + 1}; {advice}",
            code="missing_target" if param == "target" else "missing_values",
            param=param,
        )


def _step(along: np.ndarray, name: str, calendar: bool) -> str:
    """The step between rows, in words. InvalidInput when the times repeat or the steps differ."""
    steps = np.diff(along)
    if len(steps) and not steps.min() > 0:
        raise InvalidInput(
            f"the time {name!r} repeats: a forecast is of one series, with one row a step; keep the rows of one series, or "
            'add the transform {"op": "resample", "every": "1 day", "how": "sum"}',
            code="repeated_time",
            param="time",
        )
    if not len(steps):
        return "one step"
    found, counts = np.unique(steps, return_counts=True)
    if calendar and (found % DAY == 0).all():
        days = {int(one) // DAY for one in found}
        for words, lengths in CALENDAR.items():
            if days <= lengths:
                return words
    usual = found[counts.argmax()]
    if np.abs(found - usual).max() > 1e-6 * abs(usual):
        raise InvalidInput(
            f"the steps of {name!r} are irregular: {len(steps) - counts.max()} of {len(steps)} differ from the usual one; add "
            'the transform {"op": "resample", "every": "1 day"} (or another step), or resample the dataset',
            code="irregular_steps",
            param="time",
        )
    if not calendar:
        return f"{usual:g}"
    micros = int(usual)
    for unit, size in (("day", DAY), ("hour", 3_600_000_000), ("minute", 60_000_000), ("second", 1_000_000)):
        if micros % size == 0:
            return f"{micros // size} {unit}" + ("s" if micros != size else "")
    return f"{micros / 1e6:g} seconds"


def _resampled(
    moments: pa.ChunkedArray, values: pa.ChunkedArray, time: Column, target: Column, transform: TransformSpec
) -> tuple[Any, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    from modelworks.ml.data.series import apply

    edit = DatasetEdit(op="resample", time=time.name, **transform.params)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.parquet", Path(folder) / "after.parquet"
        parquet.write_table(pa.table({time.name: moments, target.name: values}), before)
        apply(before, [time, target], edit, "transforms[0]", after)
        table = parquet.read_table(after)
    return table.column(time.name), table.column(target.name)
