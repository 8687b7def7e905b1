"""Turns a column's values into its canonical Arrow type, all at once; where that fails, says which value is first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modelworks.core import sequences
from modelworks.core.features import parse_time
from modelworks.core.tensors import INT64_MISSING
from modelworks.core.types import ColumnType

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?")
INTEGER = r"^[+-]?[0-9]{1,400}$"
NUMBER = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,5})?$|^[+-]?([iI][nN][fF](inity)?|Infinity|INFINITY)$"
_OFFSET = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)"
TIME = r"^[0-9]{4}-[0-9]{2}(-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]{1,9})?)?" + _OFFSET + r"?)?)?$"
OFFSET = r":[0-9.,]+" + _OFFSET + "$"
TRUE = ("true", "yes")
FALSE = ("false", "no")
# accepted where a column is declared boolean
_MORE_TRUE = (*TRUE, "1", "t", "y")
_MORE_FALSE = (*FALSE, "0", "f", "n")
_EARLIEST, _LATEST = -62_135_596_800_000_000, 253_402_300_799_999_999  # years 1 to 9999 in microseconds


def arrow_type(kind: ColumnType, zoned: bool) -> pa.DataType:
    """The canonical type in Arrow and Parquet."""
    import pyarrow as pa

    if kind == "time":
        return pa.timestamp("us", tz="UTC" if zoned else None)
    types = {"number": pa.float64(), "integer": pa.int64(), "boolean": pa.bool_()}
    types |= {"image": pa.binary(), "audio": pa.binary()}
    return types.get(kind, pa.string())


class Missing:
    """The texts that mean a missing value. The empty text always does; `texts` None: it alone.

    `among_numbers`: one of them (-999, say) is itself a number, so that a column of numbers has to be searched for it.
    """

    def __init__(self, texts: Sequence[str] | None) -> None:
        import pyarrow as pa

        self.values = None if texts is None else pa.array(["", *(text.strip() for text in texts)], pa.string())
        self.among_numbers = any(re.match(NUMBER, text.strip()) for text in texts or ())


def blank(values: pa.Array, missing: Missing, *, trim: bool) -> pa.Array:
    """Texts with null for those that mean a missing value (always the empty one); `trim` drops spaces around others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    bare = pc.utf8_trim_whitespace(values)
    kept = bare if trim else values
    absent = pc.equal(kept, "") if missing.values is None else pc.is_in(bare, value_set=missing.values)
    return pc.if_else(absent, pa.scalar(None, pa.string()), kept)


def cast(values: pa.Array, kind: ColumnType, *, zoned: bool = False) -> tuple[pa.Array, int | None]:
    """(values in the canonical type of `kind`, index of the first that cannot be). Nulls stay null, NaN becomes null.

    `zoned`: the column's times have offsets, and one without is an error; else one with an offset is.
    The array means something only when the index is None.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    if pa.types.is_null(values.type):
        return pa.nulls(len(values), arrow_type(kind, zoned)), None
    if kind == "number":
        return _numbers(values)
    if kind == "integer":
        return _integers(values)
    if kind == "boolean":
        return _booleans(values)
    if kind == "time":
        return _times(values, zoned)
    if kind == "sequence":
        return _sequences(values)
    return _texts(values), None


def _first(mask: pa.Array) -> int | None:
    """Index of the first true value of a boolean array, nulls being false."""
    import pyarrow.compute as pc

    index = pc.index(mask, True).as_py()
    return None if index < 0 else index


def _numbers(values: pa.Array) -> tuple[pa.Array, int | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(values.type):
        values, bad = _parse_numbers(values)
        if bad is not None:
            return values, bad
    elif pa.types.is_temporal(values.type):
        return values, _first(pc.is_valid(values))
    else:
        values = values.cast(pa.float64(), safe=False)
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    # + 0.0 turns -0.0 into 0.0: equal numbers have equal bytes
    return pc.add(values, 0.0), _first(pc.is_inf(values))


def _parse_numbers(values: pa.Array) -> tuple[pa.Array, int | None]:
    """Texts to float64. Words for infinity are numbers here; the caller refuses them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return values.cast(pa.float64()), None
    except pa.ArrowInvalid:
        pass
    values = _plain_numbers(values)
    bad = _first(pc.invert(pc.match_substring_regex(values, NUMBER)))
    return (values, bad) if bad is not None else (values.cast(pa.float64()), None)


def _plain_numbers(values: pa.Array) -> pa.Array:
    """Texts of numbers as Arrow's parser takes them: no spaces around, no plus sign. NaN is null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.replace_substring_regex(pc.utf8_trim_whitespace(values), r"^\+([0-9.iI])", r"\1")
    absent = pc.equal(pc.utf8_lower(values), "nan")
    return pc.if_else(absent, pa.scalar(None, pa.string()), values)


def _integers(values: pa.Array) -> tuple[pa.Array, int | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_integer(values.type):
        bad = _first(pc.greater(values, 2**63 - 1)) if pa.types.is_uint64(values.type) else None
        return (values, bad) if bad is not None else _in_range(values.cast(pa.int64()))
    if pa.types.is_boolean(values.type):
        return values.cast(pa.int64()), None
    if pa.types.is_string(values.type):
        plain = _plain_numbers(values)
        try:
            if _first(pc.invert(pc.match_substring_regex(plain, INTEGER))) is None:
                return _in_range(plain.cast(pa.int64()))
        except pa.ArrowInvalid:
            pass  # beyond int64: the way below finds which
    numbers, bad = _numbers(values)
    if bad is not None:
        return values, bad
    wrong = pc.or_(pc.not_equal(numbers, pc.floor(numbers)), pc.greater_equal(pc.abs(numbers), 2.0**63))
    bad = _first(wrong)
    return (values, bad) if bad is not None else (numbers.cast(pa.int64()), None)


def _in_range(values: pa.Array) -> tuple[pa.Array, int | None]:
    """-2**63 is the wire's mark for a missing integer, so no column may hold it."""
    import pyarrow.compute as pc

    return values, _first(pc.equal(values, INT64_MISSING))


def _booleans(values: pa.Array) -> tuple[pa.Array, int | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_boolean(values.type):
        return values, None
    if pa.types.is_string(values.type):
        low = pc.utf8_lower(pc.utf8_trim_whitespace(values))
        true, false = pc.is_in(low, value_set=pa.array(_MORE_TRUE)), pc.is_in(low, value_set=pa.array(_MORE_FALSE))
    elif pa.types.is_temporal(values.type):
        return values, _first(pc.is_valid(values))
    else:
        wide = values.cast(pa.float64(), safe=False)
        wide = pc.if_else(pc.is_nan(wide), pa.scalar(None, pa.float64()), wide)
        values, true, false = wide, pc.equal(wide, 1.0), pc.equal(wide, 0.0)
    bad = _first(pc.and_(pc.is_valid(values), pc.invert(pc.or_(true, false))))
    return pc.if_else(pc.is_valid(values), true, pa.scalar(None, pa.bool_())), bad


def _times(values: pa.Array, zoned: bool) -> tuple[pa.Array, int | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    target = arrow_type("time", zoned)
    if pa.types.is_string(values.type):
        return _parse_times(values, zoned)
    if not (pa.types.is_timestamp(values.type) or pa.types.is_date(values.type)):
        return values, _first(pc.is_valid(values))
    try:
        moved = (
            values.cast(target, safe=False) if pa.types.is_timestamp(values.type) else values.cast(pa.timestamp("us"))
        )
    except pa.ArrowInvalid:
        return values, 0  # a date so far off that microseconds cannot hold it
    return moved, _beyond(moved)


def _beyond(moments: pa.Array) -> int | None:
    """The first time outside the years 1 to 9999, which ISO 8601 cannot write."""
    import pyarrow as pa
    import pyarrow.compute as pc

    micros = moments.cast(pa.int64())
    return _first(pc.or_(pc.less(micros, _EARLIEST), pc.greater(micros, _LATEST)))


def _parse_times(values: pa.Array, zoned: bool) -> tuple[pa.Array, int | None]:
    """ISO 8601 texts. Arrow parses the usual forms quickly; Python's parser knows all and finds the first bad one."""
    import pyarrow as pa

    target = arrow_type("time", zoned)
    try:
        moments = values.cast(target)
        return moments, _beyond(moments)
    except pa.ArrowInvalid:
        pass
    out: list[Any] = []
    for index, text in enumerate(values.to_pylist()):
        moment = None if text is None else parse_time(text)
        if text is not None and (moment is None or (moment.tzinfo is not None) != zoned):
            return values, index
        out.append(moment)
    return pa.array(out, target), None


def _texts(values: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(values.type):
        return values
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64(), safe=False)
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("us", tz=values.type.tz), safe=False)
    return values.cast(pa.string())


def is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _sequences(values: pa.Array) -> tuple[pa.Array, int | None]:
    """Lists, or texts of lists (JSON, or words with blanks between), as JSON."""
    import pyarrow as pa

    floats = is_list(values.type) and pa.types.is_floating(values.type.value_type)
    out: list[str | None] = []
    for index, value in enumerate(values.to_pylist()):
        try:
            given = sequences.load(value) if isinstance(value, str) else value
            out.append(None if given is None else sequences.dump(given, floats=floats))
        except ValueError:
            return values, index
    return pa.array(out, pa.string()), None


def mask_of(values: pa.Array, pattern: str) -> np.ndarray:
    """Which texts match `pattern`, null being false."""
    import pyarrow.compute as pc

    return pc.match_substring_regex(values, pattern).fill_null(False).to_numpy(zero_copy_only=False)
