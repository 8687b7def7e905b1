"""From an uploaded file to a dataset's content: typed columns, canonical Parquet and the digest that names it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modelworks.core import sequences
from modelworks.core.errors import InvalidInput
from modelworks.core.features import parse_time
from modelworks.core.specs import TableSchema
from modelworks.core.tensors import decode_base64
from modelworks.core.types import Column
from modelworks.ml.data import cast, media
from modelworks.ml.data.canonical import CanonicalFile, Digest, arrow_schema
from modelworks.ml.data.faults import fault, shown
from modelworks.ml.data.infer import Inferred, files_of, infer
from modelworks.ml.data.pointed import Stores, follow
from modelworks.ml.data.readers import open_table
from modelworks.ml.data.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

_URI = re.compile(r"[a-z][a-z0-9+.-]{1,9}://")
Progress = Callable[[float, str], None]
_WORDS = {
    "number": "a number",
    "integer": "an integer",
    "boolean": "true or false",
    "time": "an ISO 8601 time",
    "category": "a text",
    "text": "a text",
    "image": media.FORMATS["image"],
    "audio": media.FORMATS["audio"],
    "sequence": sequences.WORDS,
}


@dataclass(frozen=True)
class Ingested:
    """`digest`: SHA-256 of the canonical content, as hexadecimal. A column is nullable when it has missing values.

    `notes`: what was left out, for the dataset's warnings.
    """

    rows: int
    columns: list[Column]
    digest: str
    notes: list[str] = field(default_factory=list)


def ingest(
    path: Path,
    *,
    filename: str,
    schema: TableSchema,
    out: Path,
    progress: Progress | None = None,
    stores: Stores | None = None,
) -> Ingested:
    """Read the table at `path`, uploaded as `filename`, and write it as canonical Parquet at `out`. What its columns point
    at in `stores` is read in their place.

    Memory is bounded whatever the file's size. InvalidInput names row and column of what is wrong; UnsupportedMedia:
    not a table. On an error there is no file at `out`.
    """
    report = progress or (lambda fraction, stage: None)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="ingest-") as folder:
        report(0.0, "reading")
        table = follow(open_table(path, filename, schema, Path(folder)), schema, stores or Stores(()))
        meter = _Meter(report, path.stat().st_size)
        given = schema.missing if schema.missing is not None else cast.MISSING if table.lexical else None
        missing = cast.Missing(given)
        columns = infer(table, schema, missing, meter.stage("telling types", 0.1))
        partial = Path(folder) / "canonical.parquet"
        corrupt = _Corrupt(table, schema.on_corrupt == "skip")
        result = _write(table, columns, missing, partial, meter.stage("writing", 0.5), corrupt)
        partial.replace(out)
    report(1.0, "written")
    return result


class _Meter:
    """Progress by the bytes seen of the file, as well as that can be told."""

    def __init__(self, report: Progress, size: int) -> None:
        self._report, self._size = report, max(1, size)

    def stage(self, name: str, start: float) -> Callable[[int], None]:
        seen = 0

        def add(count: int) -> None:
            nonlocal seen
            seen += count
            self._report(start + 0.4 * min(1.0, seen / self._size), name)

        return add


def _write(
    table: Table,
    columns: list[Inferred],
    missing: cast.Missing,
    out: Path,
    seen: Callable[[int], None],
    corrupt: _Corrupt,
) -> Ingested:
    import pyarrow as pa

    digest, file = Digest(columns), CanonicalFile(out, columns)
    schema = arrow_schema(columns)
    gaps = dict.fromkeys(table.names, False)
    read = rows = 0
    for batch in table.batches():
        arrays = [
            _canonical(table, column, values, missing, read) for column, values in zip(columns, batch.columns, strict=True)
        ]
        ready = corrupt.without(pa.RecordBatch.from_arrays(arrays, schema=schema), columns, read)
        for column, array in zip(columns, ready.columns, strict=True):
            gaps[column.name] = gaps[column.name] or array.null_count > 0
        digest.update(ready)
        file.write(ready)
        read += batch.num_rows
        rows += ready.num_rows
        seen(batch.nbytes)
    file.close()
    if rows == 0 and corrupt.names:
        raise InvalidInput(
            f"none of the {read} files can be decoded; the first is {corrupt.names[0]}", code="bad_media", param="file"
        )
    if rows == 0:
        raise InvalidInput("the file has no rows of data; give it at least one", code="empty", param="file")
    named = [Column(name=column.name, type=column.type, nullable=gaps[column.name]) for column in columns]
    return Ingested(rows, named, digest.hexdigest(), corrupt.notes())


class _Corrupt:
    """Files that cannot be decoded: the first is an error, or each is left out with its row and counted."""

    def __init__(self, table: Table, skip: bool) -> None:
        self._table, self._skip = table, skip
        self.names: list[str] = []

    def without(self, batch: pa.RecordBatch, columns: list[Inferred], before: int) -> pa.RecordBatch:
        """The batch without rows of broken files; `before` rows came before it."""
        import pyarrow as pa

        broken: set[int] = set()
        for column, values in zip(columns, batch.columns, strict=True):
            for index, data in enumerate(values.to_pylist() if column.type in ("image", "audio") else []):
                try:
                    if data is not None:
                        media.check(column.type, data)
                except media.Unreadable as error:
                    self._meet(before + index + 1, column.name, error)
                    broken.add(index)
        if not broken:
            return batch
        return batch.take(pa.array([index for index in range(batch.num_rows) if index not in broken], pa.int64()))

    def _meet(self, row: int, column: str, error: media.Unreadable) -> None:
        named = getattr(self._table, "origin", None)
        where = f"the file {shown(named(row))}" if named else f"row {row}, column {shown(column)}: the file"
        if not self._skip:
            raise InvalidInput(
                f"{where} {error}; mend or remove it, or give schema.on_corrupt as skip to leave such files out",
                code="bad_media",
                param="file",
                detail={"row": row, "column": column, "file": named(row) if named else None},
            )
        self.names.append(f"{where} {error}")

    def notes(self) -> list[str]:
        if not self.names:
            return []
        many = f"; and {len(self.names) - 3} more" if len(self.names) > 3 else ""
        count = "1 file" if len(self.names) == 1 else f"{len(self.names)} files"
        return [f"{count} could not be decoded and left out: {'; '.join(self.names[:3])}{many}"]


def _canonical(table: Table, column: Inferred, values: pa.Array, missing: cast.Missing, before: int) -> pa.Array:
    """A batch of a column in its canonical type; `before` rows came before it."""
    import pyarrow as pa

    if column.type in ("image", "audio"):
        return _files(table, column, values, before)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    given = values
    if pa.types.is_string(values.type):
        if column.type == "number" and not missing.among_numbers:
            # mostly it parses as it is, at a fraction of the cost
            array, bad = cast.cast(values, "number")
            if bad is None:
                return array
        values = cast.blank(values, missing, trim=table.lexical and column.type != "text")
    array, bad = cast.cast(values, column.type, zoned=column.zoned)
    if bad is not None:
        raise _wrong(table, column, given[bad].as_py(), before + bad + 1)
    return array


def _files(table: Table, column: Inferred, values: pa.Array, before: int) -> pa.Array:
    """Files as they are; in a table of texts, base64."""
    import pyarrow as pa

    if not (pa.types.is_string(values.type) or pa.types.is_dictionary(values.type) or pa.types.is_large_string(values.type)):
        return files_of(values)
    out: list[bytes | None] = []
    for row, text in enumerate(values.to_pylist(), start=before + 1):
        if text and _URI.match(text):
            raise fault(
                f"{shown(text)} is kept elsewhere, and this server was given no object store to read it from; its "
                "administrator names them by --stores, or pack the files into an archive beside the table",
                row=row,
                line=table.line(row),
                column=column.name,
                code="no_object_store",
            )
        try:
            out.append(decode_base64(text) if text else None)
        except ValueError:
            raise _wrong(table, column, text, row) from None
    return pa.array(out, pa.binary())


def _wrong(table: Table, column: Inferred, value: object, row: int) -> InvalidInput:
    what = f"{shown(value)} is not {_WORDS[column.type]}"
    if str(value).strip().lstrip("+-").lower() in ("inf", "infinity"):
        what = f"{shown(value)} is infinite, which no column of numbers may hold"
    elif column.type == "time" and parse_time(str(value).strip()):
        other = "without" if column.zoned else "with"
        what = f"{shown(value)} is a time {other} an offset, unlike most values of the column"
    elif column.mixed:
        what += f", while most values of the column are {column.type}s"
    advice = "correct the value"
    if table.lexical:
        advice += ", or list it in schema.missing"
    advice += ", or declare the column a category in schema.columns"
    line = table.line(row)
    return fault(f"{what}; {advice}", row=row, line=line, column=column.name, code="bad_value")
