"""Plain text files, a row a line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.ml.data.delimited import DELIMITERS
from modelworks.ml.data.encodings import advice, numbered, open_text, trouble

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 32_768
_BATCH_BYTES = 16 << 20
_SNIFFED_ROWS = 30
_SNIFFED_CHARS = 1 << 18


def prose(path: Path, schema: TableSchema) -> Lines | None:
    """The file as lines of text, when it is prose and no table: several words a line, delimiters here and there."""
    if schema.header is not None or schema.delimiter is not None:
        return None
    text = open_text(path, schema.encoding)
    first = list(islice((line for line in text.lines(_SNIFFED_CHARS) if line.strip()), _SNIFFED_ROWS))
    words = [len(line.split()) for line in first]
    if not first or sum(words) < 3 * len(words):
        return None
    for delimiter in DELIMITERS:
        counts = {line.count(delimiter) for line in first}
        if len(counts) == 1 and counts != {0} and len(first) > 1:
            return None
    kind, _ = trouble(text)
    if kind:
        raise InvalidInput(f"the file has {advice(kind, text)}", code="bad_encoding", param="file")
    return Lines(partial(numbered, text))


class Lines:
    """A plain text file: the column `text`, a row for each line that is not blank."""

    lexical = False
    header_cells: list[str] | None = None

    def __init__(self, lines: Any) -> None:
        self.names = ["text"]
        self.media = {"text": "text"}
        self._lines = lines

    def types(self) -> dict[str, pa.DataType]:
        import pyarrow as pa

        return {"text": pa.string()}

    def line(self, row: int) -> int | None:
        return next((number for number, (line, _) in enumerate(self._lines(), start=1) if number == row), None)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        waiting: list[str] = []
        size = 0
        for _, text in self._lines():
            waiting.append(text.strip())
            size += len(text)
            if len(waiting) == _BATCH_ROWS or size > _BATCH_BYTES:
                yield pa.RecordBatch.from_arrays([pa.array(waiting, pa.string())], names=["text"])
                waiting, size = [], 0
        if waiting:
            yield pa.RecordBatch.from_arrays([pa.array(waiting, pa.string())], names=["text"])
