"""A table posed as one series or many: one value a step, in order of time. Gaps, repeats and irregular steps are refused."""

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
from modelworks.ml.data.findings import CALENDAR, DAY, duration

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable

MOST = 10_000  # series of one model: their names and ends are in its package


@dataclass(frozen=True)
class Series:
    """`along` [n]: each row's time as a number.  `order`: the rows, series after series, each oldest first.

    `values` [n], `which` [n] (the number of the row's series): by row, not by time.  `step`: in words, the same of all.
    `last`: each series' last time, as it is written.  `names`: of the series, in order; none where there is but one.
    `resampled`: the rows are not the dataset's.
    """

    time: str
    along: np.ndarray
    order: np.ndarray
    values: np.ndarray
    which: np.ndarray
    step: str
    last: list[str]
    names: list[Any]
    resampled: bool = False

    def each(self, rows: np.ndarray) -> list[np.ndarray]:
        """`rows`, apart by series, in the order in which they come; of a series without any, none."""
        which = self.which[rows]
        ends = np.cumsum(np.bincount(which, minlength=len(self.last)))
        return np.split(rows[np.argsort(which, kind="stable")], ends[:-1])

    def called(self, number: int) -> str:
        """The series in words, to begin a sentence with."""
        return f"the series {str(self.names[number])[:80]!r}" if self.names else "the series"


def read_series(
    table: pa.Table | StoredTable,
    time: Column,
    target: Column,
    transforms: Sequence[TransformSpec] | None,
    series: Column | None = None,
) -> Series:
    """`series`: the column that tells them apart. InvalidInput says what is in the way, and what to do."""
    import pyarrow as pa

    if not table.num_rows:
        raise InvalidInput("the dataset has no rows", param="dataset")
    moments, values = table.column(time.name), table.column(target.name)
    labels = None if series is None else table.column(series.name)
    resampled = bool(transforms)
    if transforms:
        moments, values, labels = _resampled(moments, values, labels, time, target, series, transforms[0])
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
    names, which = _told_apart(labels, series, len(found))
    order = np.lexsort((np.arange(len(along)), along, which))
    ends = np.flatnonzero(np.diff(which[order], append=-1))
    runs = np.split(along[order], ends[:-1] + 1)
    step, first = "one step", 0
    for number, run in enumerate(runs):
        where = f" of the series {str(names[number])[:80]!r}" if names else ""
        mine = _step(run, time.name, where, pa.types.is_timestamp(kind))
        if len(run) < 2:  # too short, which is told where it is learnt from
            continue
        if step == "one step":
            step, first = mine, number
        if mine != step:
            raise InvalidInput(
                f"the steps of {time.name!r} are {step} in the series {str(names[first])[:80]!r} and {mine} in "
                f'{str(names[number])[:80]!r}; all have one: add the transform {{"op": "resample", "every": "1 day"}}',
                code="irregular_steps",
                param="time",
            )
    last = [str(moments[int(row)].as_py()) for row in order[ends]]
    return Series(time.name, along, order, found, which, step, last, names, resampled)


def _told_apart(labels: Any, series: Column | None, rows: int) -> tuple[list[Any], np.ndarray]:
    """(the names of the series, in order; the number of each row's)"""
    if series is None:
        return [], np.zeros(rows, dtype=np.int64)
    _refuse_gaps(labels, series.name, "series", "say in each row which series it belongs to, or drop those rows")
    said = labels.to_pylist()
    names = sorted(set(said))
    if len(names) > MOST:
        raise InvalidInput(
            f"the column {series.name!r} tells {len(names)} series apart, and a model learns from at most {MOST}; keep fewer",
            code="too_many_series",
            param="series",
        )
    places = {name: number for number, name in enumerate(names)}
    return names, np.fromiter((places[one] for one in said), dtype=np.int64, count=rows)


def _refuse_gaps(values: pa.ChunkedArray, name: str, param: str, advice: str) -> None:
    if values.null_count:
        first = next(i for i, valid in enumerate(values.is_valid().to_pylist()) if not valid)
        raise InvalidInput(
            f"the column {name!r} is missing in {values.null_count} rows, first in row {first + 1}; {advice}",
            code="missing_target" if param == "target" else "missing_values",
            param=param,
        )


def _step(along: np.ndarray, name: str, where: str, calendar: bool) -> str:
    """The step between rows, in words. InvalidInput when the times repeat or the steps differ. `where`: of which series."""
    steps = np.diff(along)
    if len(steps) and not steps.min() > 0:
        advice = "" if where else "if the table holds several series, name the column that tells them apart in series; or "
        raise InvalidInput(
            f"the time {name!r}{where} repeats: a series has one row a step; {advice}"
            'add the transform {"op": "resample", "every": "1 day", "how": "sum"}',
            code="repeated_time",
            param="time",
        )
    if not len(steps):
        return "one step"
    usual, fits = _usual(steps, calendar)
    if not fits.all():
        every = usual if calendar else "1 day"
        raise InvalidInput(
            f"the steps of {name!r}{where} are irregular: {np.sum(~fits)} of {len(steps)} are not {usual}; add the transform "
            f'{{"op": "resample", "every": "{every}"}} (or another step), or resample the dataset',
            code="irregular_steps",
            param="time",
        )
    return usual


def _usual(steps: np.ndarray, calendar: bool) -> tuple[str, np.ndarray]:
    """(the step that most have, in words; which of `steps` are such)"""
    if calendar:
        for words, lengths in CALENDAR.items():
            fits = np.isin(steps, [days * DAY for days in lengths])
            if 2 * fits.sum() > len(steps):
                return words, fits
    found, counts = np.unique(steps, return_counts=True)
    usual = found[counts.argmax()]
    return duration(int(usual)) if calendar else f"{usual:g}", np.abs(steps - usual) <= 1e-6 * abs(usual)


def _resampled(
    moments: Any, values: Any, labels: Any, time: Column, target: Column, series: Column | None, transform: TransformSpec
) -> tuple[Any, Any, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    from modelworks.ml.data.series import apply

    edit = DatasetEdit(op="resample", time=time.name, group=series.name if series else None, **transform.params)
    columns, data = [time, target], {time.name: moments, target.name: values}
    if series is not None:
        columns, data = [*columns, series], data | {series.name: labels}
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.parquet", Path(folder) / "after.parquet"
        parquet.write_table(pa.table(data), before)
        apply(before, columns, edit, "transforms[0]", after)
        table = parquet.read_table(after)
    return table.column(time.name), table.column(target.name), table.column(series.name) if series else None
