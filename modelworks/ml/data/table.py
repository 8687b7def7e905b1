"""What every reader of a file gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from modelworks.core.specs import TableSchema

if TYPE_CHECKING:
    import pyarrow as pa


class Table(Protocol):
    """An opened file. `lexical`: all values are texts whose types have to be told from them.

    One that holds files also has `media` (column -> image, audio or text, whose type is known) and `origin(row)`, the name of a row's file.
    """

    names: list[str]
    lexical: bool
    header_cells: list[str] | None

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows from the start, each time it is called; `columns` may leave out the others."""

    def types(self) -> dict[str, pa.DataType]:
        """The Arrow type of each column as `batches` gives it (its texts may come dictionary-encoded)."""

    def line(self, row: int) -> int | None:
        """The line of data row `row` (from 1) in a text file; may read the file up to there."""


Opener = Callable[[Path, str, TableSchema, Path], Table]  # a file, the name it came with, how to read it, a folder for copies
