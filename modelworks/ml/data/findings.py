"""What a profile warns of: duplicates, constants, ids, gaps, class imbalance, irregular time steps, target leakage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Column
from modelworks.ml.data.parquet import Data, open_parquet, quoted

_ID_NAME = re.compile(
    r"(^|[^a-z])(id|ids|uuid|guid|key|index|rowid|row|no|nr|number)$|^unnamed|^(id|uuid|guid)[^a-z]", re.I
)
_CAMEL_ID = re.compile(r"[a-z](Id|ID)$")
_LEAST_ROWS = 20  # below, nothing is said of ids, classes and leakage
_CLASSES = 20  # a column with more distinct values has no classes
_RARE = 0.1  # a class with less than this share of the most frequent one's rows
_MOSTLY_MISSING = 0.5
_UNIQUE = 0.95
_LOOKED_AT = 10_000  # rows in which numbers among texts are looked for
_NUMBER = r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,5})?"
_COMMA = r"[+-]?([0-9]+,[0-9]+|[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?|[0-9]{1,3}([. ][0-9]{3})+,[0-9]+)"
_THOUSANDS = r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?"
_CODE = r"[+-]?0[0-9].*"
_LEAKS = 0.02  # the share of the majority guess's errors that a leaking column leaves at most
_CORRELATES = 0.999
_LEAKAGE_COLUMNS = 500
DAY = 86_400_000_000  # microseconds
# calendar steps, in days, that are regular though they differ
CALENDAR = {"1 month": {28, 29, 30, 31}, "1 quarter": {89, 90, 91, 92}, "1 year": {365, 366}}


def warnings(profile: dict[str, Any], target: str | None = None) -> list[str]:
    """What is told from the profile alone. Without a target, a last column of classes is looked at for imbalance."""
    rows, columns = profile["rows"], profile["columns"]
    out = []
    if profile["duplicate_rows"]:
        count = profile["duplicate_rows"]
        said = "1 row repeats an earlier one" if count == 1 else f"{count} rows repeat earlier ones"
        out.append(f"{said}; the transform drop-duplicates removes them")
    for column in columns:
        out += _of_column(column, rows, rows - (profile["duplicate_rows"] or 0))
    chosen = [column for column in columns if column["name"] == target] if target else columns[-1:]
    for column in chosen:
        if target or column["type"] in ("category", "boolean"):
            out += _imbalance(column)
    return out


def _of_column(column: dict[str, Any], rows: int, different: int) -> list[str]:
    """`different`: how many rows there are without those that repeat others."""
    name, missing = _name(column["name"]), column["missing"]
    out = []
    if missing == rows:
        return [f"column {name} has no values; leave it out"]
    if missing > _MOSTLY_MISSING * rows:
        out.append(f"column {name} is mostly missing ({missing / rows:.1%} of rows)")
    if column.get("duplicates"):
        count = column["duplicates"]
        out.append(f"column {name}: {count} files repeat earlier ones; the transform drop-duplicates removes them")
    if column["distinct"] == 1 and rows > 1:
        out.append(f"column {name} has the same value in every row; it tells a model nothing")
    elif _is_id(column, different):
        out.append(f"column {name} looks like an id, as each row has its own value; leave it out of the features")
    steps = column.get("steps")
    if steps and not steps["regular"] and _is_series(column, steps, rows):
        out.append(
            f"the steps of time column {name} are irregular: {steps['usual_count']} of {steps['count']} are "
            f"{steps['usual']}, the others differ; if this is a series, resample it before forecasting"
        )
    return out


def _is_series(column: dict[str, Any], steps: dict[str, Any], rows: int) -> bool:
    """All but unique moments, most of them one step apart; other columns of times are dates of something."""
    unique = column["distinct"] >= _UNIQUE * (rows - column["missing"])
    return unique and 2 * steps["usual_count"] >= steps["count"]


def _is_id(column: dict[str, Any], rows: int) -> bool:
    """Different in every row, and a category, or integers without a gap, or integers named like an id."""
    if rows < _LEAST_ROWS or column["distinct"] != rows or column.get("approximate"):
        return False
    if column["type"] == "category":
        return True
    if column["type"] != "integer":
        return False
    named = _ID_NAME.search(column["name"]) or _CAMEL_ID.search(column["name"])
    return bool(named) or column["max"] - column["min"] + 1 == rows


def _imbalance(column: dict[str, Any]) -> list[str]:
    """Classes that are rare beside the most frequent one."""
    top, present = column.get("top"), sum(item["count"] for item in column.get("top", []))
    if not top or len(top) < 2 or column["distinct"] > _CLASSES or present < _LEAST_ROWS:
        return []
    most, least = top[0], top[-1]
    if least["count"] >= _RARE * most["count"]:
        return []
    return [
        f"the classes of {_name(column['name'])} are imbalanced: {_name(most['value'])} has {most['count']} rows and "
        f"{_name(least['value'])} {least['count']}; prefer balanced_accuracy or f1 to accuracy"
    ]


def _name(value: object) -> str:
    text = str(value)
    return repr(text[:80]) + ("..." if len(text) > 80 else "")


# numbers that were not taken as such


def not_numbers(data: Data, column: Column) -> list[str]:
    """Warns of a column of texts of which most, but not all, are numbers, or numbers written with commas."""
    if column.type != "category":
        return []
    numbers, commas, thousands, codes, count, other = data.one(
        f"""
        WITH looked AS (SELECT trim({quoted(column.name)}) AS v FROM data WHERE {quoted(column.name)} IS NOT NULL
                        LIMIT {_LOOKED_AT})
        SELECT count(*) FILTER (WHERE regexp_full_match(v, $1)), count(*) FILTER (WHERE regexp_full_match(v, $2)),
               count(*) FILTER (WHERE regexp_full_match(v, $3)), count(*) FILTER (WHERE regexp_full_match(v, $4)),
               count(*), min(v) FILTER (WHERE NOT regexp_full_match(v, $1))
        FROM looked
        """,
        [_NUMBER, _COMMA, _THOUSANDS, _CODE],
    )
    if codes or 2 * (numbers + commas) < count or not numbers + commas:
        return []
    name = _name(column.name)
    if commas:
        what = "decimal commas" if thousands < commas else "commas between thousands"
        return [
            f"column {name} looks like numbers with {what}, such as {_name(other)}, and was taken as a category; write "
            "them with a decimal point and nothing between thousands, and upload the file again"
        ]
    if numbers == count:
        return []
    return [
        f"column {name} was taken as a category, though {numbers} of {count} values are numbers: {_name(other)} is "
        "none; correct such values, or list them in schema.missing, unless it is a category"
    ]


# time steps


def time_steps(data: Data, name: str) -> dict[str, Any] | None:
    """How a time column's distinct moments follow one another; None for fewer than three of them.

    `regular`; `usual`: the most frequent step, in words; `usual_count` of `count` steps have it.
    """
    found = data.all(
        f"""
        WITH moments AS (SELECT DISTINCT epoch_us({quoted(name)}) AS t FROM data WHERE {quoted(name)} IS NOT NULL),
             steps AS (SELECT t - lag(t) OVER (ORDER BY t) AS step FROM moments)
        SELECT step, count(*) AS n, sum(count(*)) OVER () AS total FROM steps WHERE step IS NOT NULL
        GROUP BY step ORDER BY n DESC, step LIMIT 8
        """
    )
    if not found or found[0][2] < 2:
        return None
    usual, usual_count, total = found[0]
    result = {
        "regular": len(found) == 1,
        "usual": duration(usual),
        "usual_count": int(usual_count),
        "count": int(total),
    }
    if all(step % DAY == 0 for step, _, _ in found):
        days = {step // DAY for step, _, _ in found}
        for words, lengths in CALENDAR.items():
            if len(found) > 1 and days <= lengths:
                return result | {"regular": True, "usual": words, "usual_count": int(total)}
    return result


def duration(micros: int) -> str:
    """In the largest unit of which it is a whole number."""
    for unit, size in (("day", DAY), ("hour", 3_600_000_000), ("minute", 60_000_000), ("second", 1_000_000)):
        if micros >= size and micros % size == 0:
            return f"{micros // size} {unit}" + ("s" if micros != size else "")
    return f"{micros / 1e6:g} seconds"


# leakage


def of_target(parquet: Path, columns: Sequence[Column], target: str, profile: dict[str, Any]) -> list[str]:
    """What to know before training on `target`, with the dataset's profile at hand: leakage and imbalanced classes."""
    entry = next((entry for entry in profile["columns"] if entry["name"] == target), None)
    with open_parquet(parquet) as data:
        return leakage_warnings(data, columns, target, profile) + (_imbalance(entry) if entry else [])


def leakage_warnings(data: Data, columns: Sequence[Column], target: str, profile: dict[str, Any]) -> list[str]:
    """Warnings of columns that all but determine `target`, of the first 500. InvalidInput when there is no such column."""
    entries = {entry["name"]: entry for entry in profile["columns"]}
    if target not in entries:
        known = ", ".join(list(entries)[:20])
        raise InvalidInput(f"there is no target {_name(target)}; the columns are {known}", param="target")
    if profile["rows"] < _LEAST_ROWS or entries[target]["distinct"] < 2:
        return []
    out = []
    for column in [column for column in columns if column.name != target][:_LEAKAGE_COLUMNS]:
        entry = entries[column.name]
        if entry["distinct"] > 1 and (how := _leaks(data, entry, entries[target])):
            out.append(
                f"column {_name(column.name)} may leak the target {_name(target)}: {how}; "
                "leave it out unless it is known before the target is"
            )
    return out


def _has_classes(entry: dict[str, Any]) -> bool:
    return entry["type"] in ("category", "boolean") or (entry["type"] == "integer" and entry["distinct"] <= _CLASSES)


def _leaks(data: Data, column: dict[str, Any], target: dict[str, Any]) -> str | None:
    """In words how the column gives the target away; None if it does not."""
    if {column["type"], target["type"]} & {"text", "time", "image", "audio", "sequence"}:
        return None
    if _has_classes(column):
        return _purity(data, column, target) if _has_classes(target) else _variance(data, column, target)
    if _has_classes(target):
        return _ranges(data, column, target)
    return _correlation(data, column, target)


def _pair(column: dict[str, Any], target: dict[str, Any]) -> str:
    x, y = quoted(column["name"]), quoted(target["name"])
    return f"(SELECT {x} AS x, {y} AS y FROM data WHERE {x} IS NOT NULL AND {y} IS NOT NULL)"


def _purity(data: Data, column: dict[str, Any], target: dict[str, Any]) -> str | None:
    """Guessing the usual class of each value is almost always right, more so than guessing one class throughout."""
    pair = _pair(column, target)
    groups, right, rows = data.one(
        f"SELECT count(*), sum(m), sum(n) FROM (SELECT x, max(k) AS m, sum(k) AS n FROM "
        f"(SELECT x, y, count(*) AS k FROM {pair} GROUP BY x, y) GROUP BY x)"
    )
    if not rows or rows < _LEAST_ROWS or groups * 5 > rows:
        return None
    (majority,) = data.one(f"SELECT max(k) FROM (SELECT count(*) AS k FROM {pair} GROUP BY y)")
    if majority == rows or rows - right > _LEAKS * (rows - majority):
        return None
    return f"each of its values goes with one class in {float(right) / float(rows):.1%} of rows"


def _variance(data: Data, column: dict[str, Any], target: dict[str, Any]) -> str | None:
    pair = _pair(column, target)
    groups, within, rows = data.one(
        f"SELECT count(*), sum(v * n), sum(n) FROM (SELECT x, var_pop(y) AS v, count(*) AS n FROM {pair} GROUP BY x)"
    )
    (total,) = data.one(f"SELECT var_pop(y) FROM {pair}")
    if not rows or rows < _LEAST_ROWS or groups * 5 > rows or not total:
        return None
    explained = 1 - float(within) / (total * float(rows))
    return f"its values explain {explained:.2%} of the target's variance" if explained >= _CORRELATES else None


def _ranges(data: Data, column: dict[str, Any], target: dict[str, Any]) -> str | None:
    """Each class has a range of the column to itself."""
    if target["distinct"] > _CLASSES:
        return None
    found = data.all(f"SELECT min(x), max(x), count(*) FROM {_pair(column, target)} GROUP BY y ORDER BY min(x), max(x)")
    if len(found) < 2 or sum(count for _, _, count in found) < _LEAST_ROWS or min(count for _, _, count in found) < 3:
        return None
    apart = all(before[1] < after[0] for before, after in pairwise(found))
    return "each class has a range of its values to itself" if apart else None


def _correlation(data: Data, column: dict[str, Any], target: dict[str, Any]) -> str | None:
    import duckdb

    try:
        found, rows = data.one(f"SELECT corr(x, y), count(*) FROM {_pair(column, target)}")
    except duckdb.OutOfRangeException:
        return None
    if found is None or rows < _LEAST_ROWS or abs(found) < _CORRELATES:
        return None
    return f"its correlation with the target is {found:.4f}"
