"""What type each column has: told from all its values in one pass, or declared in schema.columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.core.tensors import INT64_MISSING
from modelworks.core.types import ColumnType
from modelworks.ml.data import cast, media
from modelworks.ml.data.faults import fault, shown

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.table import Table

MOSTLY = (
    0.9  # a column with this share of numbers (or booleans, or times) has mixed types if the rest is something else
)
_DISTINCT_LIMIT = 20_000  # distinct texts of a column that are remembered
_YEARS = range(1900, 2101)
_PADDED = r"^[+-]?0[0-9xX]"


@dataclass(frozen=True)
class Inferred:
    """A column's type. `zoned`: its times have offsets. `mixed`: most values are of the type, but not all."""

    name: str
    type: ColumnType
    zoned: bool = False
    mixed: bool = False


@dataclass
class _Tally:
    """Counts over the values of a column that are not missing."""

    header: str | None = None
    count: int = 0
    integers: int = 0
    numbers: int = 0
    booleans: int = 0
    times: int = 0
    zoned: int = 0
    padded: int = 0  # such as 007 and 0x1F: codes, not quantities
    too_big: bool = False  # integers beyond int64
    texts: int = 0  # values looked at as texts, for the four that follow
    chars: int = 0
    words: int = 0
    distinct: set[int] = field(default_factory=set)  # hashes of values
    distinct_of: int = 0  # values among which `distinct` was counted
    header_among: bool = False  # the header's cell is also a value


def infer(
    table: Table, schema: TableSchema, missing: cast.Missing, seen: Callable[[int], None] | None = None
) -> list[Inferred]:
    """The type of every column; `missing`: the texts that mean a missing value.

    `seen` is called with the bytes of each batch. InvalidInput for declared columns that do not exist, for types that a
    table cannot hold, and for a header row that is data.
    """
    import pyarrow as pa

    _check_declared(table.names, schema)
    types = table.types()
    headers = dict(zip(table.names, table.header_cells or [], strict=False))
    tallies = {name: _Tally(headers.get(name)) for name in table.names if _undecided(types[name])}
    if tallies:
        for batch in table.batches(list(tallies)):
            for name, tally in tallies.items():
                values = batch.column(batch.schema.get_field_index(name))
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                if pa.types.is_integer(values.type):
                    _count_integers(tally, values)
                else:
                    _count_texts(tally, values.cast(pa.string()), missing, lexical=table.lexical)
            if seen:
                seen(batch.nbytes)
    files: dict[str, ColumnType] = dict(getattr(table, "media", {}))
    for name, kind in types.items():
        if name not in files and _holds_files(kind):
            files[name] = _kind_of_files(table, name, schema)
    found = [
        Inferred(name, files[name])
        if name in files
        else _typed(name, types[name], tallies.get(name), schema, table.lexical)
        for name in table.names
    ]
    if table.header_cells is not None and schema.header is None:
        _check_header(table, table.header_cells, found, tallies)
    return found


def _check_declared(names: list[str], schema: TableSchema) -> None:
    for name in schema.columns:
        if name not in names:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InvalidInput(
                f"schema.columns names {shown(name)}, which the file lacks; its columns are {known}",
                code="unknown_column",
                param="schema.columns",
            )


def _undecided(kind: pa.DataType) -> bool:
    """Whether values must be looked at: texts may be times, and an integer column may hold what int64 cannot."""
    import pyarrow as pa

    return _is_text(kind) or pa.types.is_int64(kind) or pa.types.is_uint64(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_files(kind: pa.DataType) -> bool:
    """Bytes, or bytes beside a path, as Hugging Face writes images and sounds into Parquet."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        kind = kind.field(at).type if at >= 0 else pa.null()
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _kind_of_files(table: Table, name: str, schema: TableSchema) -> ColumnType:
    """Image or audio: as declared, or as the first file's content says."""
    declared = schema.columns.get(name)
    if declared in ("image", "audio"):
        return declared
    for batch in table.batches([name]):
        values = files_of(batch.column(0)).drop_null()
        if len(values):
            kind = media.sniff(values[0].as_py())
            if kind is None:
                break
            return kind
    raise InvalidInput(
        f"column {shown(name)} holds bytes that are neither {media.FORMATS['image']} nor {media.FORMATS['audio']}; "
        "leave it out",
        code="unsupported_type",
        param="file",
        detail={"column": name},
    )


def files_of(values: pa.Array) -> pa.Array:
    """A column of files as plain bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")
    return values.cast(pa.binary())


# counting


def _count_integers(tally: _Tally, values: pa.Array) -> None:
    import pyarrow.compute as pc

    bounds = pc.min_max(values).as_py()
    tally.count += len(values) - values.null_count
    if bounds["min"] is not None and (bounds["min"] <= INT64_MISSING or bounds["max"] >= 2**63):
        tally.too_big = True


def _count_texts(tally: _Tally, values: pa.Array, missing: cast.Missing, *, lexical: bool) -> None:
    """Adds a batch. Texts of a typed source are never numbers or booleans, but they may be times."""
    # first as they are, then without missing values and spaces: most columns of numbers are done at the first try
    plain = lexical and not missing.among_numbers
    if plain and tally.numbers == tally.count and _count_numbers(tally, values):
        return
    values = cast.blank(values, missing, trim=True).drop_null()
    if len(values) == 0:
        return
    if lexical and tally.numbers == tally.count and _count_numbers(tally, values):
        return
    if lexical:
        numbers = cast.mask_of(values, cast.NUMBER)
        tally.numbers += int(numbers.sum())
        if numbers.any():
            tally.integers += int(cast.mask_of(values, cast.INTEGER).sum())
        tally.padded += int(cast.mask_of(values, _PADDED).sum())
        tally.booleans += _count_booleans(values)
    times = cast.mask_of(values, cast.TIME)
    if times.any():
        tally.times += int(times.sum())
        tally.zoned += int((times & cast.mask_of(values, cast.OFFSET)).sum())
    _describe(tally, values)
    tally.count += len(values)


def _count_numbers(tally: _Tally, values: pa.Array) -> bool:
    """Adds a batch in which every value is a number; False, with nothing added, when one is not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        numbers = values.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    absent = pc.is_nan(numbers).fill_null(True)
    if pc.any(absent).as_py():
        values = values.filter(pc.invert(absent))
    whole = tally.integers == tally.count
    if whole and len(values):
        try:
            integers = values.cast(pa.int64())
            tally.too_big = tally.too_big or pc.min(integers).as_py() <= INT64_MISSING
            tally.integers += len(values)
        except pa.ArrowInvalid:
            count = int(cast.mask_of(values, cast.INTEGER).sum())
            tally.too_big = tally.too_big or (count == len(values) and cast.cast(values, "integer")[1] is not None)
            tally.integers += count
        tally.padded += int(cast.mask_of(values, _PADDED).sum())
    tally.numbers += len(values)
    tally.count += len(values)
    return True


def _count_booleans(values: pa.Array) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    words = pc.is_in(pc.utf8_lower(values), value_set=pa.array(cast.TRUE + cast.FALSE))
    return pc.sum(words).as_py() or 0


def _describe(tally: _Tally, values: pa.Array) -> None:
    """Lengths, words and distinctness, which tell texts from categories."""
    import pyarrow.compute as pc

    tally.texts += len(values)
    tally.chars += pc.sum(pc.utf8_length(values)).as_py()
    tally.words += pc.sum(pc.count_substring_regex(values, r"\s+")).as_py() + len(values)
    if len(tally.distinct) < _DISTINCT_LIMIT:
        tally.distinct.update(map(hash, pc.unique(values).to_pylist()))
        tally.distinct_of += len(values)
    if tally.header is not None and not tally.header_among:
        tally.header_among = pc.index(values, tally.header).as_py() >= 0


# deciding


def _typed(name: str, kind: pa.DataType, tally: _Tally | None, schema: TableSchema, lexical: bool) -> Inferred:
    declared = schema.columns.get(name)
    if tally is not None and _is_text(kind):
        zoned = tally.zoned * 2 > tally.count
        if declared:
            return Inferred(name, declared, zoned and declared == "time")
        told, mixed = _decide(tally, lexical)
        return Inferred(name, told, zoned and told == "time", mixed)
    told, zoned = _from_arrow(name, kind)
    if told == "integer" and tally is not None and tally.too_big:
        told = "number"
    return Inferred(name, declared or told, zoned and (declared or told) == "time")


def _decide(tally: _Tally, lexical: bool) -> tuple[ColumnType, bool]:
    """(type, whether some values are of another type)."""
    count = tally.count
    if count == 0:
        return "category", False
    if lexical and tally.integers == count:
        return ("category" if tally.padded else "number" if tally.too_big else "integer"), False
    shares: list[tuple[int, ColumnType]] = [(tally.times, "time")]
    if lexical:
        shares += [
            (tally.booleans, "boolean"),
            (0 if tally.padded and tally.numbers < count else tally.numbers, "number"),
        ]
    most, kind = max(shares, key=lambda share: share[0])
    if most >= MOSTLY * count:
        return kind, most < count or (kind == "time" and 0 < tally.zoned < count)
    return _category_or_text(tally), False


def _category_or_text(tally: _Tally) -> ColumnType:
    """Text is prose: several words or many characters, mostly different from row to row. All else is a category."""
    prose = tally.words >= 3 * tally.texts or tally.chars > 40 * tally.texts
    return "text" if prose and len(tally.distinct) > 0.5 * tally.distinct_of else "category"


def _from_arrow(name: str, kind: pa.DataType) -> tuple[ColumnType, bool]:
    """(type, zoned) of a column in Parquet or Arrow; InvalidInput for those a table cannot hold."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(kind):
        told, zoned = _from_arrow(name, kind.value_type)
        return ("category" if _is_text(kind.value_type) else told), zoned
    if kinds.is_boolean(kind):
        return "boolean", False
    if kinds.is_integer(kind):
        return "integer", False
    if kinds.is_floating(kind) or kinds.is_decimal(kind):
        return "number", False
    if kinds.is_timestamp(kind):
        return "time", kind.tz is not None
    if kinds.is_date(kind):
        return "time", False
    if _is_text(kind) or kinds.is_null(kind):
        return "category", False
    if cast.is_list(kind) and (_is_text(kind.value_type) or kinds.is_integer(kind.value_type) or kinds.is_floating(kind.value_type)):
        return "sequence", False
    raise InvalidInput(
        f"column {shown(name)} has the type {str(kind)[:80]}, which a table cannot hold; "
        "turn it into numbers, texts, booleans, times, or lists of texts or numbers, or leave it out",
        code="unsupported_type",
        param="file",
        detail={"column": name},
    )


# the header


def _check_header(table: Table, cells: list[str], found: list[Inferred], tallies: dict[str, _Tally]) -> None:
    """InvalidInput when the first row is of the same kind as those below it."""
    values = [
        (cell, column)
        for cell, column in zip(cells, found, strict=True)
        if column.type not in ("category", "text", "sequence")
    ]
    texts = [column for column in found if column.type in ("category", "text")]
    repeated = bool(texts) and all(tallies[column.name].header_among for column in texts)
    if values:
        if not all(_fits(cell, column.type) for cell, column in values):
            return
        if not repeated and _could_be_names(table, [cell for cell, _ in values]):
            return
    elif not repeated:
        return
    cell, column = values[0] if values else (texts[0].name, texts[0])
    raise fault(
        f"{shown(cell)} is of the same kind as the values below it, so the file seems to have no header row; "
        "give the names of its columns as schema.header, or false to have them numbered, or true if this row is the header",
        row=0,
        line=1,
        field=found.index(column) + 1,
        code="no_header",
    )


def _fits(cell: str, kind: ColumnType) -> bool:
    import pyarrow as pa

    if cell in cast.MISSING:
        return False
    words = cell.lower() in cast.TRUE + cast.FALSE
    if kind == "boolean":
        return words
    both = (False, True) if kind == "time" else (False,)
    return any(cast.cast(pa.array([cell]), kind, zoned=zoned)[1] is None for zoned in both)


def _could_be_names(table: Table, cells: list[str]) -> bool:
    """Whether numbers are names of columns: years above other values, or the 0, 1, 2... that pandas writes."""
    if not all(cell.isascii() and cell.isdigit() and len(cell) < 6 for cell in cells):
        return False
    numbers = [int(cell) for cell in cells]
    below = next(table.batches(), None)
    values = [set(below.column(name).to_pylist()) for name in cells] if below is not None else []
    if all(number in _YEARS for number in numbers):
        return not all(_is_year(value) for column in values for value in column)
    counted = len(numbers) > 1 and numbers == list(range(len(numbers)))
    return counted and not all(cell in column for cell, column in zip(cells, values, strict=False))


def _is_year(value: str) -> bool:
    return value.isascii() and value.isdigit() and len(value) < 6 and int(value) in _YEARS
