"""A canonical Parquet file as rows to read, when it is too large to be held: by numbers, in portions, or mixed on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.types import Column
from modelworks.ml.data.types import to_batch

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.base import Batch

PORTION_ROWS = 2048
PORTION_BYTES = 2 << 20  # of what a portion holds, as the file's own figures tell
PART_BYTES = 4 << 20  # of a part while rows are mixed
_READ = 64 << 10  # bytes of each column that are read at once
_SAMPLED = 8  # row groups that a sample is drawn from
_ROW = "\x00row"  # the number of a mixed row; no column can be called so


class StoredTable:
    """`path` holds the table; rows are numbered from 0."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        meta = pq.read_metadata(path)
        self.num_rows = int(meta.num_rows)
        sizes = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._widths = _widths(meta)
        self.column_names = list(pq.read_schema(path).names)

    def width(self, names: Sequence[str]) -> float:
        """Bytes that a row takes in these columns, uncompressed."""
        return sum(self._widths.get(name, 8.0) for name in names)

    def portion(self, names: Sequence[str]) -> int:
        return int(max(16, min(PORTION_ROWS, PORTION_BYTES / max(1.0, self.width(names)))))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column, whole: for targets and groups, which are small."""
        import pyarrow.parquet as pq

        return pq.read_table(self.path, columns=[name], memory_map=False).column(name)

    def sample(self, most: int) -> pa.Table:
        """All rows, or about `most` of them: evenly spread ones of a few row groups, which are spread as well."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.num_rows <= most:
            return pq.read_table(self.path)
        count = len(self._starts) - 1
        groups = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED)).round().astype(np.int64)).tolist()
        every = max(1, sum(int(self._starts[one + 1] - self._starts[one]) for one in groups) // most)
        parts = [
            batch.take(pa.array(np.flatnonzero(numbers % every == 0)))
            for numbers, batch in self._batches(self.column_names, groups)
        ]
        return pa.Table.from_batches(parts)

    def chunks(self, columns: Sequence[Column]) -> Iterator[tuple[np.ndarray, Batch]]:
        """(numbers of the rows, the rows) in portions, in the order of the file."""
        names = [column.name for column in columns]
        for numbers, batch in self._batches(names, range(len(self._starts) - 1)):
            yield numbers, to_batch(_table(batch), columns)

    def batch(self, columns: Sequence[Column], rows: np.ndarray) -> Batch:
        """The rows with these numbers, in their order."""
        import pyarrow as pa

        names = [column.name for column in columns]
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        groups = np.unique(np.searchsorted(self._starts, wanted, side="right") - 1)
        parts = []
        for numbers, batch in self._batches(names, groups.tolist()):
            low, high = np.searchsorted(wanted, [numbers[0], numbers[-1] + 1])
            if high > low:
                parts.append(batch.take(pa.array(wanted[low:high] - numbers[0])))
        table = pa.Table.from_batches(parts) if parts else _empty(self.path, names)
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return {name: values[back] for name, values in to_batch(table, columns).items()}

    def mixed(self, columns: Sequence[Column], workdir: Path, seed: int) -> MixedTable:
        """The same rows in random order, as a file in `workdir`: dealt into parts, each of which is shuffled by itself."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [column.name for column in columns]
        count = int(max(1, -(-self.width(names) * self.num_rows // PART_BYTES)))
        random = np.random.default_rng((seed, 7))
        parts = [workdir / f"mix-{seed}-{index}.arrow" for index in range(count)]
        writers: list[Any] = []
        schema = pa.schema([*(pq.read_schema(self.path).field(name) for name in names), pa.field(_ROW, pa.int64())])
        try:
            writers = [pa.ipc.new_stream(pa.OSFile(str(part), "wb"), schema) for part in parts]
            for numbers, batch in self._batches(names, range(len(self._starts) - 1)):
                whole = pa.RecordBatch.from_arrays([*batch.columns, pa.array(numbers)], schema=schema)
                dealt = random.integers(count, size=len(numbers))
                for index in np.unique(dealt):
                    writers[index].write_batch(whole.take(pa.array(np.flatnonzero(dealt == index))))
        finally:
            for writer in writers:
                writer.close()
        out = workdir / f"mixed-{seed}.parquet"
        with pq.ParquetWriter(out, schema, compression="lz4") as target:
            for part in parts:
                with pa.OSFile(str(part)) as source:
                    table = pa.ipc.open_stream(source).read_all()
                table = table.take(pa.array(random.permutation(table.num_rows)))
                if table.num_rows:
                    target.write_table(table, row_group_size=max(1, min(table.num_rows, 4 * self.portion(names))))
                part.unlink()
        pa.default_memory_pool().release_unused()
        return MixedTable(out, columns, self.portion(names))

    def _batches(self, names: list[str], groups: Sequence[int]) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        import pyarrow.parquet as pq

        size = self.portion(names)
        with pq.ParquetFile(self.path, memory_map=False, pre_buffer=False, buffer_size=_READ) as file:
            for group in groups:
                start = int(self._starts[group])
                for batch in file.iter_batches(size, row_groups=[group], columns=names, use_threads=False):
                    yield np.arange(start, start + batch.num_rows), batch.select(names)
                    start += batch.num_rows


class MixedTable:
    """The rows of a table in random order, on disk."""

    def __init__(self, path: Path, columns: Sequence[Column], portion: int) -> None:
        self._path, self._columns, self._portion = path, list(columns), portion

    def chunks(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """(numbers of the rows in the original table, the rows), in portions."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._path, memory_map=False, pre_buffer=False, buffer_size=_READ) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(self._portion, row_groups=[group], use_threads=False):
                    yield batch.column(batch.num_columns - 1).to_numpy(), to_batch(_table(batch), self._columns)


def _table(batch: pa.RecordBatch) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches([batch])


def _empty(path: Path, names: list[str]) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_schema(path).empty_table().select(names)


def _widths(meta: Any) -> dict[str, float]:
    """Bytes a row of each column, uncompressed but perhaps encoded; at least 8."""
    total: dict[str, int] = {}
    for group in range(meta.num_row_groups):
        for index in range(meta.num_columns):
            chunk = meta.row_group(group).column(index)
            name = chunk.path_in_schema
            total[name] = total.get(name, 0) + chunk.total_uncompressed_size
    return {name: max(8.0, size / max(1, meta.num_rows)) for name, size in total.items()}
