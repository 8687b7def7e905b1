"""Opens an uploaded table: tells its format by content and by file name, and reads it in batches of bounded size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelworks.core.errors import InvalidInput, UnsupportedMedia
from modelworks.core.specs import TableSchema
from modelworks.ml.data.archives import is_archive, unpack_table
from modelworks.ml.data.faults import MAX_FIELD, check_names, fault
from modelworks.ml.data.media import MAX_FILE
from modelworks.ml.data.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

_SUPPORTED = "CSV, TSV, Parquet, JSON Lines or Arrow, or images, sounds or texts in a zip or tar"
_HEAD = 64 * 1024
_BATCH_CELLS = 1_000_000
_BATCH_ROWS = 32_768
_BATCH_BYTES = 16 << 20
_TEXT_FORMATS = {
    "csv": "csv",
    "txt": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
}
_BINARY_FORMATS = {
    "parquet": "parquet",
    "pq": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
    "ipc": "arrow",
    "arrows": "arrow",
}
PACKABLE = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson")  # texts that may come compressed: `x.csv.gz`
_REFUSED_NAMES = ("pkl", "pickle", "joblib", "dill", "pt", "pth", "npy", "npz")
_REFUSED_CONTENT = (
    (b"\x1f\x8b", "compressed by gzip"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstandard"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"%PDF", "a PDF document"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"FEA1", "a Feather file of version 1"),
    (b"ORC", "an ORC file"),
    (b"Obj\x01", "an Avro file"),
)
_TEXT_BYTES = bytes({*range(32, 256), 9, 10, 12, 13})
_PICKLE = re.compile(
    rb"\x80[\x02-\x05]|[\]})]q\x00|\(?c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n[(pq)tR0-9VSI]|\(i[\w.]+\n|[(\]}]?\(?[ld]p\d+\n"
)


def open_table(path: Path, filename: str, schema: TableSchema, workdir: Path) -> Table:
    """The file at `path`, uploaded as `filename`; `workdir` takes a converted copy if one is needed.

    UnsupportedMedia when it is no table of a known format; InvalidInput, naming row and column, when it is broken.
    """
    if is_archive(path) and Path(filename).suffix.lower().lstrip(".") not in _REFUSED_NAMES:
        from modelworks.ml.data.folders import open_archive

        return open_archive(path, schema, workdir, open_table)
    stem, _, packing = filename.rpartition(".")
    if packing.lower() in ("gz", "bz2", "xz") and stem.lower().endswith(PACKABLE):
        path, filename = unpack_table(path, workdir), stem
    kind = sniff(path, filename, schema)
    if kind == "jsonl":
        from modelworks.ml.data.jsonl import JsonLines

        return JsonLines(path, schema, workdir)
    if kind in ("csv", "tsv"):
        from modelworks.ml.data.delimited import Delimited
        from modelworks.ml.data.prose import prose

        if filename.lower().endswith(".txt") and (lines := prose(path, schema)) is not None:
            return lines
        return Delimited(path, schema, workdir, tabs=kind == "tsv")
    if schema.header is not None:
        raise InvalidInput(
            "schema.header is for text files without a header row; leave it out",
            param="schema.header",
            code="bad_header",
        )
    return ArrowFile(path, kind)


def sniff(path: Path, filename: str, schema: TableSchema) -> str:
    """One of csv, tsv, jsonl, parquet, arrow, stream. Content tells text from binary, the name tells texts apart."""
    suffix = Path(filename).suffix.lower().lstrip(".")
    size = path.stat().st_size
    if size == 0:
        raise InvalidInput(f"the file is empty; upload a table as {_SUPPORTED}", code="empty", param="file")
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    binary = _binary(head, tail)
    if binary:
        return binary
    _refuse(head, tail, suffix, wide=(schema.encoding or "").lower().startswith(("utf-16", "utf16", "utf-32", "utf32")))
    if suffix in _BINARY_FORMATS:
        raise UnsupportedMedia(
            f"the file is named .{suffix} but its content is not; upload a table as {_SUPPORTED}", param="file"
        )
    if suffix in ("tsv", "tab"):
        return "tsv"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if (
        schema.header is None
        and schema.delimiter is None
        and (_TEXT_FORMATS.get(suffix) == "jsonl" or start.startswith(b"{"))
    ):
        if start.startswith(b"["):
            raise UnsupportedMedia("the file is one JSON array; write JSON Lines, one object a line", param="file")
        return "jsonl"
    return "csv"


def _binary(head: bytes, tail: bytes) -> str | None:
    if head.startswith(b"PAR1"):
        if not tail.endswith(b"PAR1"):
            raise InvalidInput("the Parquet file is cut off; upload it again, whole", code="bad_file", param="file")
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow"
    # an IPC stream starts with a continuation mark and the size of its schema message
    if head.startswith(b"\xff\xff\xff\xff") and 0 < int.from_bytes(head[4:8], "little") < 1 << 26:
        return "stream"
    return None


def _refuse(head: bytes, tail: bytes, suffix: str, wide: bool) -> None:
    """UnsupportedMedia for pickles, archives and other bytes that are no text."""
    if suffix in _REFUSED_NAMES or (_PICKLE.match(head) and (head[0] == 0x80 or tail.rstrip().endswith(b"."))):
        raise UnsupportedMedia(
            f"pickled and similar files can run code and are never read; upload a table as {_SUPPORTED}", param="file"
        )
    for magic, what in _REFUSED_CONTENT:
        if head.startswith(magic):
            raise UnsupportedMedia(f"the file is {what}; upload a table as {_SUPPORTED}", param="file")
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")) or wide:
        return  # UTF-16 or UTF-32: the text readers know what to say
    # a control character or two in a text are named with row and column
    odd = len(head.translate(None, _TEXT_BYTES))
    if odd > 4 and odd > len(head) * 0.05:
        raise UnsupportedMedia(
            f"the file's content is neither text nor a known format; upload a table as {_SUPPORTED}", param="file"
        )


class ArrowFile:
    """A Parquet file, an Arrow IPC file (Feather version 2) or an Arrow IPC stream."""

    lexical = False
    header_cells: list[str] | None = None

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        self._schema = self._read_schema()
        self.names = self._names()
        check_names(self.names, line=None, advice="rename the columns in the file")

    def line(self, row: int) -> int | None:
        return None

    def _read_schema(self) -> pa.Schema:
        import pyarrow as pa

        try:
            if self._kind == "parquet":
                with self._parquet([]) as file:
                    return file.schema_arrow
            with pa.memory_map(str(self._path)) as source, self._ipc(source) as reader:
                return reader.schema
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _broken(self._kind, error) from None

    def _names(self) -> list[str]:
        try:
            return list(self._schema.names)
        except UnicodeDecodeError as error:
            raise _broken(self._kind, error) from None

    def types(self) -> dict[str, pa.DataType]:
        return {field.name: field.type for field in self._schema}

    def _parquet(self, dictionaries: list[str]):
        import pyarrow.parquet as pq

        # buffer_size streams each column chunk instead of holding whole row groups; dictionaries keep a text that is
        # repeated a million times from being written out a million times
        return pq.ParquetFile(
            self._path,
            read_dictionary=dictionaries,
            buffer_size=1 << 20,
            pre_buffer=False,
            memory_map=False,
            thrift_string_size_limit=64 << 20,
            thrift_container_size_limit=16 << 20,
        )

    def _ipc(self, source: pa.NativeFile):
        import pyarrow as pa

        return pa.ipc.open_file(source) if self._kind == "arrow" else pa.ipc.open_stream(source)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        names = self.names if columns is None else columns
        rows = 0
        try:
            for batch in self._raw(names):
                # offsets in a crafted file may point outside its buffers
                batch.validate(full=True)
                yield from _portions(batch, rows)
                rows += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _broken(self._kind, error) from None

    def _raw(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        size = max(64, min(_BATCH_ROWS, _BATCH_CELLS // max(1, len(names))))
        if self._kind == "parquet":
            texts = [field.name for field in self._schema if pa.types.is_string(field.type)]
            with self._parquet(texts) as file:
                # a name selects what it is a prefix of, too ("a" also "a.b"): hence the second selection
                for batch in file.iter_batches(batch_size=size, columns=names, use_threads=False):
                    yield batch.select(names)
            return
        with pa.memory_map(str(self._path)) as source, self._ipc(source) as reader:
            whole = (
                reader if self._kind == "stream" else (reader.get_batch(i) for i in range(reader.num_record_batches))
            )
            for batch in whole:
                chosen = batch.select(names)
                for start in range(0, chosen.num_rows, size):
                    yield chosen.slice(start, size)


def _portions(batch: pa.RecordBatch, before: int) -> Iterator[pa.RecordBatch]:
    """The batch in slices whose texts, written out, have at most some _BATCH_BYTES; `before`: rows before the batch."""
    import numpy as np

    sizes = np.zeros(batch.num_rows, dtype=np.int64)
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        lengths = _lengths(values)
        if lengths is None:
            continue
        most = MAX_FIELD if _is_text(values.type) else MAX_FILE
        if len(lengths) and lengths.max() > most:
            row = before + 1 + int((lengths > most).argmax())
            raise fault(f"a value of more than {most} bytes", row=row, column=name)
        sizes += lengths
    ends = sizes.cumsum()
    start = 0
    while start < batch.num_rows:
        reached = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, reached + _BATCH_BYTES, side="right")))
        yield batch.slice(start, stop - start)
        start = stop


def _lengths(values: pa.Array):
    """Bytes of each text, 0 for null; None for a column that has no texts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type):
        each = _lengths(values.dictionary)
        return (
            None
            if each is None
            else pc.take(pa.array(each), values.indices).fill_null(0).to_numpy(zero_copy_only=False)
        )
    if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        values = values.field("bytes")
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    if not (_is_text(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        return None
    return pc.binary_length(values).cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _broken(kind: str, error: Exception) -> InvalidInput:
    name = "Parquet" if kind == "parquet" else "Arrow"
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return InvalidInput(f"the {name} file is broken ({first}); write it again", code="bad_file", param="file")
