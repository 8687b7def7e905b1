"""Edits that look along time: lags, differences, windows, resampling, and wide tables made long. By duckdb, out of core.

What a row gets from its past becomes columns, so that any algorithm can learn from it; a hold-out along `time` then tests
on the tail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit
from modelworks.core.types import Column, ColumnType
from modelworks.ml.data.canonical import CanonicalFile, Digest, arrow_schema
from modelworks.ml.data.faults import MAX_COLUMNS, check_names, shown
from modelworks.ml.data.findings import CALENDAR, DAY
from modelworks.ml.data.infer import Inferred
from modelworks.ml.data.ingest import Ingested
from modelworks.ml.data.parquet import Data, open_parquet, quoted

if TYPE_CHECKING:
    import pyarrow as pa

OPS = ("lag", "difference", "window", "resample", "unpivot")
_EVERY = re.compile(r"([1-9][0-9]{0,5}) ?(second|minute|hour|day|week|month|quarter|year)s?")
_NUMBERS = ("number", "integer")
_MOST = 10_000_000  # steps that resampling may make
_DUCK: dict[str, str] = {"number": "DOUBLE", "integer": "BIGINT", "boolean": "BOOLEAN"}


def apply(parquet: Path, columns: Sequence[Column], one: DatasetEdit, where: str, out: Path) -> Ingested:
    """The canonical file at `parquet` with one such edit done, written to `out`. Its rows come in order of group and time.

    InvalidInput for columns that do not fit, and for steps that are irregular where the past is looked at by rows.
    """
    work = _Work(list(columns), one, where)
    with open_parquet(parquet) as data:
        work.zoned = data.zoned
        sql, made = getattr(work, f"_{one.op}")(data)
        check_names([column.name for column in made], line=None, advice="choose another name")
        return _write(data, sql, made, out, where)


class _Work:
    def __init__(self, columns: list[Column], one: DatasetEdit, where: str) -> None:
        self.columns, self.one, self.where = columns, one, where
        self.zoned: set[str] = set()
        self.known = {column.name: column for column in columns}

    def _old(self) -> list[Inferred]:
        return [Inferred(one.name, one.type, one.name in self.zoned) for one in self.columns]

    def _find(self, name: str | None, field: str, types: Sequence[str] | None = None) -> Column:
        column = self.known.get(name or "")
        if column is None:
            there = ", ".join(list(self.known)[:20])
            raise InvalidInput(
                f"{self.where}: {field} must be a column of the dataset, not {shown(name)}; it has {there}",
                code="unknown_column",
                param=self.where,
            )
        if types and column.type not in types:
            raise InvalidInput(
                f"{self.where}: {field} {shown(name)} is of type {column.type}; it must be {' or '.join(types)}", param=self.where
            )
        return column

    def _order(self) -> tuple[str, str, str]:
        """(the time, PARTITION BY clause, ORDER BY of the result), quoted."""
        time = quoted(self._find(self.one.time, "time", ("time", "integer", "number")).name)
        if self.one.group is None:
            return time, "", time
        group = quoted(self._find(self.one.group, "group").name)
        return time, f"PARTITION BY {group}", f"{group}, {time}"

    def _regular(self, data: Data) -> None:
        """Rows are steps of time only when all steps are alike."""
        time, partition, _ = self._order()
        gaps = data.one(f"SELECT count(*) - count({time}) FROM data")[0]
        value = f"epoch_us({time})" if self.known[str(self.one.time)].type == "time" else time
        steps = data.all(
            f"SELECT step, count(*) FROM (SELECT {value} - lag({value}) OVER ({partition} ORDER BY {time}) AS step FROM data) "
            "WHERE step IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 8"
        )
        if gaps or any(step <= 0 for step, _ in steps):
            raise InvalidInput(
                f"{self.where}: the time {shown(self.one.time)} is missing in {gaps} rows or repeats within a series; name the "
                "column that tells series apart as group, or resample first",
                code="irregular_steps",
                param=self.where,
            )
        calendar = value != time and all(step % DAY == 0 for step, _ in steps)
        if len(steps) > 1 and not (calendar and any({step // DAY for step, _ in steps} <= days for days in CALENDAR.values())):
            raise InvalidInput(
                f"{self.where}: the steps of {shown(self.one.time)} are irregular, so the row before is not the step before; "
                'put {"op": "resample", "time": ..., "every": "1 day"} first',
                code="irregular_steps",
                param=self.where,
            )

    def _along(self, data: Data, added: dict[str, str], kind: ColumnType) -> tuple[str, list[Inferred]]:
        """Each of `added` (name -> expression over the window `past`) as a new column; rows without a past are left out."""
        self._regular(data)
        time, partition, order = self._order()
        chosen = ", ".join([*(quoted(name) for name in self.known), *(f"{sql} AS {quoted(name)}" for name, sql in added.items())])
        sql = f"SELECT {chosen} FROM data WINDOW past AS ({partition} ORDER BY {time})"
        if not self.one.keep:
            whole = " AND ".join(f"{quoted(name)} IS NOT NULL" for name in added)
            sql = f"SELECT * FROM ({sql}) WHERE {whole}"
        return f"{sql} ORDER BY {order}", [*self._old(), *(Inferred(name, kind) for name in added)]

    def _lag(self, data: Data) -> tuple[str, list[Inferred]]:
        column = self._find(self.one.column, "column")
        name = quoted(column.name)
        added = {f"{column.name}_lag{step}": f"lag({name}, {step}) OVER past" for step in self.one.lags or [1]}
        return self._along(data, added, column.type)

    def _difference(self, data: Data) -> tuple[str, list[Inferred]]:
        column = self._find(self.one.column, "column", _NUMBERS)
        name = quoted(column.name)
        added = {f"{column.name}_diff{step}": f"({name} - lag({name}, {step}) OVER past)::DOUBLE" for step in self.one.lags or [1]}
        return self._along(data, added, "number")

    def _window(self, data: Data) -> tuple[str, list[Inferred]]:
        """Over the `size` steps before a row, not the row itself: what is to be predicted must not be in its features."""
        column = self._find(self.one.column, "column", _NUMBERS)
        size, name = int(self.one.size or 1), quoted(column.name)
        time, partition, _ = self._order()
        frame = f"({partition} ORDER BY {time} ROWS BETWEEN {size} PRECEDING AND 1 PRECEDING)"
        how = {"mean": "avg", "sum": "sum", "min": "min", "max": "max", "std": "stddev_pop", "last": "last"}[self.one.how]
        full = f"CASE WHEN count({name}) OVER {frame} = {size} THEN ({how}({name}) OVER {frame})::DOUBLE END"
        return self._along(data, {f"{column.name}_{self.one.how}{size}": full}, "number")

    def _resample(self, data: Data) -> tuple[str, list[Inferred]]:
        time = self._find(self.one.time, "time", ("time",))
        match = _EVERY.fullmatch(self.one.every or "")
        if match is None:
            raise InvalidInput(
                f"{self.where}: every must be a step such as '1 day', '15 minutes' or '1 month', not {shown(self.one.every)}",
                param=self.where,
            )
        step = f"INTERVAL {int(match[1])} {match[2]}"
        group = [quoted(self._find(self.one.group, "group").name)] if self.one.group else []
        moment = quoted(time.name)
        low, high = data.one(f"SELECT min({moment}), max({moment}) FROM data")
        counted = data.one("SELECT count(*) FROM range(1)")[0] if low is None else data.one(
            f"SELECT (epoch(max({moment})) - epoch(min({moment}))) / epoch(TIMESTAMP '2000-01-01' + {step} - TIMESTAMP '2000-01-01') "
            "FROM data"
        )[0]  # fmt: skip
        if high is None or counted > _MOST:
            raise InvalidInput(f"{self.where}: every is too short, it makes more than {_MOST} steps", param=self.where)
        how = {"mean": "avg", "sum": "sum", "min": "min", "max": "max", "std": "stddev_pop", "last": "last"}[self.one.how]
        others = [column for column in self.columns if column.name not in (self.one.group, time.name)]
        made, sums, filled = [], [], []
        for column in others:
            name = quoted(column.name)
            number = column.type in _NUMBERS
            sums.append(f"{how}({name} ORDER BY {moment}) AS {name}" if number else f"last({name} ORDER BY {moment}) AS {name}")
            kind: ColumnType = "number" if number and self.one.how in ("mean", "std", "sum") else column.type
            carry = f"last_value({name} IGNORE NULLS) OVER (PARTITION BY {', '.join([*group, '1'])} ORDER BY bucket)"
            value = carry if self.one.fill == "previous" else name
            filled.append(f"{value}::DOUBLE AS {name}" if kind == "number" else f"{value} AS {name}")
            made.append(Inferred(column.name, kind, column.name in self.zoned))
        keys = ", ".join([*group, f"time_bucket({step}, {moment})"])
        named = ", ".join([*group, f"time_bucket({step}, {moment}) AS bucket"])
        ends = ", ".join([*group, "min(bucket) AS low", "max(bucket) AS high"])
        by = f"GROUP BY {', '.join(group)}" if group else ""
        grid = ", ".join([*group, f"unnest(generate_series(low, high, {step})) AS bucket"])
        using = ", ".join([*group, "bucket"])
        told = ", ".join([f"bucket AS {moment}", *group, *filled])
        sql = (
            f"WITH met AS (SELECT {', '.join([named, *sums])} FROM data WHERE {moment} IS NOT NULL GROUP BY {keys}), "
            f"ends AS (SELECT {ends} FROM met {by}), grid AS (SELECT {grid} FROM ends) "
            f"SELECT {told} FROM grid LEFT JOIN met USING ({using}) ORDER BY {', '.join([*group, 'bucket'])}"
        )
        grouped = [Inferred(column.name, column.type) for column in self.columns if column.name == self.one.group]
        return sql, [Inferred(time.name, "time", time.name in self.zoned), *grouped, *made]

    def _unpivot(self, data: Data) -> tuple[str, list[Inferred]]:
        """A wide table, a column for each series, as a long one: the columns `series` and `value` beside the others."""
        chosen = [self._find(name, "columns", _NUMBERS) for name in self.one.columns or []]
        if not chosen or len(chosen) == len(self.columns):
            raise InvalidInput(
                f"{self.where}: unpivot needs columns, the series, and at least one other beside them", param=self.where
            )
        kept = [column for column in self.columns if column not in chosen]
        others = ", ".join(quoted(column.name) for column in kept)
        parts = [
            f"SELECT {others}, {_text(column.name)} AS series, {quoted(column.name)}::DOUBLE AS value, {index} AS place FROM data"
            for index, column in enumerate(chosen)
        ]
        sql = f"SELECT {others}, series, value FROM ({' UNION ALL '.join(parts)}) ORDER BY place, {others}"
        old = [one for one in self._old() if one.name in {column.name for column in kept}]
        return sql, [*old, Inferred("series", "category"), Inferred("value", "number")]


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _write(data: Data, sql: str, columns: list[Inferred], out: Path, where: str) -> Ingested:
    import duckdb
    import pyarrow as pa

    if len(columns) > MAX_COLUMNS:
        raise InvalidInput(f"{where}: a table has at most {MAX_COLUMNS} columns", param=where)
    schema = arrow_schema(columns)
    digest, file = Digest(columns), CanonicalFile(out, columns)
    gaps, rows = dict.fromkeys(schema.names, False), 0
    try:
        for batch in data.stream(sql):
            arrays: list[pa.Array] = [batch.column(at).cast(field.type) for at, field in enumerate(schema)]
            ready = pa.RecordBatch.from_arrays(arrays, schema=schema)
            for name, array in zip(schema.names, ready.columns, strict=True):
                gaps[name] = gaps[name] or array.null_count > 0
            digest.update(ready)
            file.write(ready)
            rows += ready.num_rows
    except (duckdb.Error, pa.ArrowInvalid) as error:
        raise InvalidInput(f"{where}: {' '.join(str(error).split())[:200]}", param=where) from None
    file.close()
    if not rows:
        raise InvalidInput(f"{where}: no row is left, as none has so long a past; use fewer steps", code="empty", param=where)
    named = [Column(name=one.name, type=one.type, nullable=gaps[one.name]) for one in columns]
    return Ingested(rows, named, digest.hexdigest())
