"""The profile of a dataset: what is in each column, by duckdb on the Parquet file, out of core."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from modelworks.core import sequences
from modelworks.core.features import format_time
from modelworks.core.types import Column
from modelworks.ml.data.findings import leakage_warnings, not_numbers, time_steps, warnings
from modelworks.ml.data.parquet import Data, open_parquet, quoted

BINS = 20
TOP = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXACT_ROWS = 2_000_000  # beyond, distinct values and quantiles are estimated
_CELLS = 4_000_000  # values that exact aggregates of one query may hold
_SHOWN = 200  # characters of a top value
_LOOKED_THROUGH = 500  # columns in which numbers among texts are looked for
_FEW = 20  # distinct integers that are counted one by one
_DISTINCT = 100_000  # elements of sequences that are counted one by one
_HEADERS = 100_000  # files whose headers are read
_EPOCH = datetime(1970, 1, 1)


def profile(parquet: Path, columns: list[Column], target: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """(profile, warnings) of a canonical Parquet file.

    The profile: `rows`, `duplicate_rows` and `columns`, each with name, type, missing, distinct and by type
    number, integer: min, max, mean, std (of a sample), quantiles p5 to p95, histogram {edges, counts}, top if few;
    time: min, max (ISO 8601), histogram, steps; category, boolean: top [{value, count}]; text: length {min, mean, max};
    image: width, height, bytes {min, median, max}, modes, formats; audio: seconds, bytes, rates, channels, formats; both
    duplicates, the files that are there already; sequence: length {min, mean, max}, elements, and what occurs most, top.
    `approximate` is true where distinct values and quantiles are estimates.
    """
    with open_parquet(parquet) as data:
        rows = data.one("SELECT count(*) FROM data")[0]
        described = _basics(data, columns, rows)
        _histograms(data, columns, described)
        for column in columns:
            entry = described[column.name]
            if column.type in ("category", "boolean") or (column.type == "integer" and entry["distinct"] <= _FEW):
                entry["top"] = _top(data, column)
            if column.type == "time":
                entry["steps"] = time_steps(data, column.name)
            if column.type == "sequence":
                entry |= sequence_profile(parquet, column)
            if column.type in ("image", "audio"):
                entry |= media_profile(parquet, column, rows)
                entry["duplicates"] = rows - entry["missing"] - entry["distinct"]
        result = {
            "rows": rows,
            "duplicate_rows": _duplicates(data, columns, rows),
            "columns": [described[column.name] for column in columns],
        }
        found = warnings(result, target)
        for column in columns[:_LOOKED_THROUGH]:
            found += not_numbers(data, column)
        if target is not None:
            found += leakage_warnings(data, columns, target, result)
    return result, found


def _groups(columns: Sequence[Column], rows: int) -> Iterator[Sequence[Column]]:
    """Columns that one query can take together."""
    size = max(1, min(100, _CELLS // max(1, min(rows, _EXACT_ROWS))))
    for start in range(0, len(columns), size):
        yield columns[start : start + size]


def _basics(data: Data, columns: Sequence[Column], rows: int) -> dict[str, dict[str, Any]]:
    import duckdb

    out: dict[str, dict[str, Any]] = {}
    for group in _groups(columns, rows):
        try:
            out |= _describe(data, group, rows, moments=True)
        except duckdb.OutOfRangeException:
            # numbers so large that their squares overflow: these columns go without mean and deviation
            for column in group:
                try:
                    out |= _describe(data, [column], rows, moments=True)
                except duckdb.OutOfRangeException:
                    out |= _describe(data, [column], rows, moments=False)
    return out


def _describe(data: Data, group: Sequence[Column], rows: int, *, moments: bool) -> dict[str, dict[str, Any]]:
    approximate = rows > _EXACT_ROWS
    selected: list[str] = []
    for column in group:
        name = quoted(column.name)
        one = f"hash({name})" if column.type in ("image", "audio") else name  # files are too large to be held
        one = f"CASE WHEN {name} IS NULL THEN NULL ELSE {one} END" if one != name else name
        selected += [f"count({name})", f"approx_count_distinct({one})" if approximate else f"count(DISTINCT {one})"]
        if column.type in ("number", "integer"):
            middle = f"avg({name}), stddev_samp({name})" if moments else "NULL, NULL"
            how = "approx_quantile" if approximate else "quantile_cont"
            selected += [f"min({name}), max({name}), {middle}, {how}({name}, {list(QUANTILES)})"]
        elif column.type == "time":
            selected.append(f"min(epoch_us({name})), max(epoch_us({name}))")
        elif column.type == "text":
            selected.append(f"min(length({name})), avg(length({name})), max(length({name}))")
    values = iter(data.one(f"SELECT {', '.join(selected)} FROM data"))
    out: dict[str, dict[str, Any]] = {}
    for column in group:
        present, distinct = next(values), next(values)
        entry: dict[str, Any] = {"name": column.name, "type": column.type, "missing": rows - present}
        entry["distinct"] = min(distinct, present)
        if approximate:
            entry["approximate"] = True
        if column.type in ("number", "integer"):
            for key in ("min", "max", "mean", "std"):
                entry[key] = _finite(next(values))
            quantiles = next(values) or [None] * len(QUANTILES)
            entry["quantiles"] = {f"p{q * 100:.0f}": _finite(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
        elif column.type == "time":
            entry["min"], entry["max"] = next(values), next(values)
        elif column.type == "text":
            entry["length"] = {key: _finite(next(values)) for key in ("min", "mean", "max")}
        out[column.name] = entry
    return out


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _histograms(data: Data, columns: Sequence[Column], described: dict[str, dict[str, Any]]) -> None:
    """Adds `histogram` to numbers, integers and times; then turns the bounds of times into ISO 8601."""
    drawn = [c for c in columns if c.type in ("number", "integer", "time") and described[c.name]["min"] is not None]
    for start in range(0, len(drawn), 100):
        group = drawn[start : start + 100]
        selected, parameters, grids = [], [], []
        for column in group:
            grid = _grid(described[column.name], column.type)
            name = f"epoch_us({quoted(column.name)})" if column.type == "time" else quoted(column.name)
            low, width, bins = grid
            # least and greatest pass over null, which must not be counted
            where = f"FILTER (WHERE {quoted(column.name)} IS NOT NULL)"
            bin_of = f"least(?, greatest(0, floor((CAST({name} AS DOUBLE) - ?) / ?)))"
            selected.append(f"histogram(CAST({bin_of} AS INTEGER)) {where}")
            parameters += [bins - 1, low, width]
            grids.append(grid)
        found = data.one(f"SELECT {', '.join(selected)} FROM data", parameters)
        for column, (low, width, bins), counts in zip(group, grids, found, strict=True):
            entry = described[column.name]
            edges: list[Any] = [low + width * index for index in range(bins)]
            edges.append(low + width * bins if bins < BINS and column.type == "integer" else float(entry["max"]))
            if column.type == "time":
                edges = [_iso(edge, column.name in data.zoned) for edge in edges]
            entry["histogram"] = {"edges": edges, "counts": [counts.get(index, 0) for index in range(bins)]}
    for column in columns:
        if column.type == "time":
            entry = described[column.name]
            entry["min"], entry["max"] = (_iso(entry[key], column.name in data.zoned) for key in ("min", "max"))


def _grid(entry: dict[str, Any], kind: str) -> tuple[float, float, int]:
    """(lower edge, width, bins): BINS of equal width, or one for each of a few integers, or one for a constant."""
    low, high = entry["min"], entry["max"]
    if low == high:
        return float(low), 1.0, 1
    if kind == "integer" and high - low < BINS:
        return float(low), 1.0, high - low + 1
    width = high / BINS - low / BINS  # high - low may overflow
    return float(low), width or 5e-324, BINS


def _iso(micros: float | None, zoned: bool) -> str | None:
    if micros is None:
        return None
    return format_time(_EPOCH + timedelta(microseconds=round(micros))) + ("Z" if zoned else "")


def _top(data: Data, column: Column) -> list[dict[str, Any]]:
    name = quoted(column.name)
    found = data.all(
        f"SELECT {name}, count(*) AS n FROM data WHERE {name} IS NOT NULL GROUP BY 1 ORDER BY n DESC, 1 LIMIT {TOP}"
    )
    return [{"value": value[:_SHOWN] if isinstance(value, str) else value, "count": count} for value, count in found]


def media_profile(parquet: Path, column: Column, rows: int) -> dict[str, Any]:
    """What the headers of a column's files say; of some of the files when there are very many."""
    import numpy as np
    import pyarrow.parquet as pq

    from modelworks.ml.data import media

    figures: dict[str, list[float]] = {"bytes": []}
    words: dict[str, Counter[str]] = {}
    every = -(-rows // _HEADERS)
    for group in range((file := pq.ParquetFile(parquet)).num_row_groups):
        for values in file.read_row_group(group, [column.name]).column(0).chunks:
            for data in values.take(list(range(0, len(values), every))).drop_null().to_pylist():
                figures["bytes"].append(len(data))
                header = media.image_header(data) if column.type == "image" else media.sound_header(data)
                for key, value in header.items():
                    if key in ("width", "height", "seconds"):
                        figures.setdefault(key, []).append(value)
                    else:
                        words.setdefault(key + "s", Counter())[str(value)] += 1
    file.close()
    told: dict[str, Any] = {
        key: {"min": min(values), "median": float(np.median(values)), "max": max(values)}
        for key, values in figures.items()
        if values
    }
    return told | {key: dict(counts.most_common(TOP)) for key, counts in words.items()}


def sequence_profile(parquet: Path, column: Column) -> dict[str, Any]:
    """How long a column's sequences are, and what is in them."""
    import pyarrow.parquet as pq

    lengths: list[int] = []
    counts: Counter[Any] = Counter()
    file = pq.ParquetFile(parquet)
    for batch in file.iter_batches(columns=[column.name]):
        for text in batch.column(0).drop_null().to_pylist():
            values = sequences.load(text)
            lengths.append(len(values))
            if len(counts) <= _DISTINCT:
                counts.update(values)
    file.close()
    if not lengths:
        return {}
    told: dict[str, Any] = {
        "length": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)}, "elements": sum(lengths)
    }
    if len(counts) <= _DISTINCT:
        ordered = sorted(counts.items(), key=lambda one: (-one[1], str(one[0])))[:TOP]
        told |= {
            "distinct_elements": len(counts),
            "top": [{"value": value[:_SHOWN] if isinstance(value, str) else value, "count": count} for value, count in ordered],
        }
    return told


def _duplicates(data: Data, columns: Sequence[Column], rows: int) -> int:
    """Rows that equal an earlier one, told by a 64-bit hash of the row."""
    names = ", ".join(quoted(column.name) for column in columns)
    distinct = data.one(f"SELECT count(*) FROM (SELECT hash({names}) AS h FROM data GROUP BY h)")[0]
    return rows - distinct
