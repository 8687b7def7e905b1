"""The canonical form of a table: the digest that names its content, and the Parquet file that holds it.

Neither depends on the source's format or on how it was cut into batches. The digest covers names, types, the order of
columns and rows, and every value. Equal numbers are equal: -0.0 is 0.0, and NaN is a missing value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.tensors import BOOL_MISSING, INT64_MISSING
from modelworks.ml.data.cast import arrow_type
from modelworks.ml.data.infer import Inferred

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "modelworks-table-1"
GROUP_CELLS = 2_000_000  # cells of a row group
GROUP_ROWS = (1024, 131_072)  # least and most rows, unless its texts are long
GROUP_BYTES = 16 << 20  # bytes of texts and files in a row group
_SIZED = ("category", "text", "image", "audio", "sequence")


def arrow_schema(columns: Sequence[Inferred]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([pa.field(column.name, arrow_type(column.type, column.zoned)) for column in columns])


class Digest:
    """SHA-256 over a table that comes in batches. A stream for each column, so that batches leave no trace."""

    def __init__(self, columns: Sequence[Inferred]) -> None:
        self._columns = list(columns)
        self._values = [hashlib.sha256() for _ in columns]
        self._lengths = [hashlib.sha256() for _ in columns]
        self._rows = 0

    def update(self, batch: pa.RecordBatch) -> None:
        """Adds rows in canonical types."""
        self._rows += batch.num_rows
        for index, (column, values) in enumerate(zip(self._columns, batch.columns, strict=True)):
            if column.type in _SIZED:
                lengths, data = _text_bytes(values)
                self._lengths[index].update(lengths)
                self._values[index].update(data)
            else:
                self._values[index].update(_fixed_bytes(values, column.type))

    def hexdigest(self) -> str:
        types = [["time-utc" if column.zoned else column.type, column.name] for column in self._columns]
        head = json.dumps([FORMAT, self._rows, types], ensure_ascii=True, separators=(",", ":"))
        total = hashlib.sha256(head.encode())
        for values, lengths in zip(self._values, self._lengths, strict=True):
            total.update(values.digest())
            total.update(lengths.digest())
        return total.hexdigest()


def _fixed_bytes(values: pa.Array, kind: str) -> bytes:
    """Little-endian values; a null is the one value that no canonical column holds."""
    import pyarrow as pa

    if kind == "boolean":
        return values.cast(pa.uint8()).fill_null(BOOL_MISSING).to_numpy(zero_copy_only=False).tobytes()
    if kind == "number":
        return values.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype("<f8", copy=False).tobytes()
    return (
        values.cast(pa.int64())
        .fill_null(INT64_MISSING)
        .to_numpy(zero_copy_only=False)
        .astype("<i8", copy=False)
        .tobytes()
    )


def _text_bytes(values: pa.Array) -> tuple[bytes, Any]:
    """(little-endian lengths, -1 for null; all the texts or files on end)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.binary_length(values).cast(pa.int32()).fill_null(-1)
    filled = pa.concat_arrays([values.fill_null(b"" if pa.types.is_binary(values.type) else "")])  # bytes behind a null slot must not count
    _, offsets, data = filled.buffers()
    raw = lengths.to_numpy(zero_copy_only=False).astype("<i4", copy=False).tobytes()
    if data is None or len(filled) == 0:
        return raw, b""
    import numpy as np

    ends = np.frombuffer(offsets, dtype=np.int32)[filled.offset : filled.offset + len(filled) + 1]
    return raw, memoryview(data)[int(ends[0]) : int(ends[-1])]


class CanonicalFile:
    """Writes canonical batches as Parquet. The bytes depend on the content alone, not on how it was batched."""

    def __init__(self, path: Path, columns: Sequence[Inferred]) -> None:
        import pyarrow.parquet as pq

        self._schema = arrow_schema(columns)
        least, most = GROUP_ROWS
        self._group_rows = max(least, min(most, GROUP_CELLS // len(columns)))
        self._texts = [index for index, column in enumerate(columns) if column.type in _SIZED]
        self._pending: list[pa.RecordBatch] = []
        self._rows = 0
        self._bytes = 0
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", compression_level=3, version="2.6")

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows. A row joins the group in hand if the group is empty or has room for it."""
        import numpy as np

        ends = self._row_bytes(batch).cumsum()
        start = 0
        while start < batch.num_rows:
            before = int(ends[start - 1]) if start else 0
            fits = int(np.searchsorted(ends, before + GROUP_BYTES - self._bytes, side="right"))
            stop = min(max(fits, start + (self._rows == 0)), start + self._group_rows - self._rows, batch.num_rows)
            if stop > start:
                self._pending.append(batch.slice(start, stop - start))
                self._rows += stop - start
                self._bytes += int(ends[stop - 1]) - before
                start = stop
            if start < batch.num_rows:
                self._flush()

    def _row_bytes(self, batch: pa.RecordBatch):
        import numpy as np
        import pyarrow.compute as pc

        sizes = np.zeros(batch.num_rows, dtype=np.int64)
        for index in self._texts:
            sizes += pc.binary_length(batch.column(index)).fill_null(0).to_numpy(zero_copy_only=False)
        return sizes

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            group = pa.Table.from_batches(self._pending, self._schema).combine_chunks()
            self._writer.write_table(group, row_group_size=self._rows)
            self._pending, self._rows, self._bytes = [], 0, 0

    def close(self) -> None:
        self._flush()
        self._writer.close()
