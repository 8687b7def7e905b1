"""A table's Parquet file under SQL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_IN_MEMORY = 16 << 20  # bytes of a file that is loaded at once
_IN_MEMORY_CELLS = 5_000_000


def quoted(name: str) -> str:
    """A column's name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class Data:
    """A Parquet file as the view `data` of a duckdb that can reach nothing else."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        described = connection.execute("SELECT column_name, column_type FROM (DESCRIBE data)").fetchall()
        self.zoned = {name for name, kind in described if kind == "TIMESTAMP WITH TIME ZONE"}

    def all(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, list(parameters)).fetchall()

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query, a batch at a time, in its order."""
        found: Any = self._connection.sql(sql)
        yield from found.to_arrow_reader(65_536)

    def one(self, sql: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
        return self.all(sql, parameters)[0]


@contextmanager
def open_parquet(path: Path, *, threads: int = 2, memory: str = "1GB") -> Iterator[Data]:
    """Queries on the file; what does not fit into `memory` is spilled beside the file."""
    import tempfile

    import duckdb

    with tempfile.TemporaryDirectory(dir=path.parent, prefix="profile-") as spill:
        connection = duckdb.connect(
            ":memory:",
            config={
                "threads": threads,
                "memory_limit": memory,
                "temp_directory": spill,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "preserve_insertion_order": False,
            },
        )
        try:
            literal = "'" + str(path.absolute()).replace("'", "''") + "'"
            connection.execute(f"SET allowed_paths = [{literal}]")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET lock_configuration = true")
            source = f"read_parquet({literal})"
            rows, columns = connection.execute(
                f"SELECT (SELECT count(*) FROM {source}), (SELECT count(*) FROM (DESCRIBE FROM {source}))"
            ).fetchall()[0]
            # each query on a Parquet file reads all of its footer anew, which is slow for a wide one
            small = rows * columns < _IN_MEMORY_CELLS and path.stat().st_size < _IN_MEMORY
            connection.execute(f"CREATE {'TABLE' if small else 'VIEW'} data AS FROM {source}")
            yield Data(connection)
        finally:
            connection.close()
