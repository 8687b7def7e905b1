"""CSV and TSV files. pyarrow reads; Python's csv module, slower but exact, checks quotes and finds errors."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.ml.data.encodings import TextFile, Trouble, advice, is_troubled, open_text, to_utf8, trouble
from modelworks.ml.data.faults import MAX_COLUMNS, MAX_FIELD, MAX_ROW, check_names, fault, shown

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITERS = (",", "\t", ";", "|")
_SNIFFED_ROWS = 30
_SNIFFED_CHARS = 1 << 18
_HEADER_ADVICE = (
    "name it in the file's first row, or, if the file has no header row, give the names of the columns as schema.header "
    "(false numbers them)"
)


class Delimited:
    """A delimited text file with a header row, or with names by schema.header. Every value is a text."""

    lexical = True

    def __init__(self, path: Path, schema: TableSchema, workdir: Path, *, tabs: bool = False) -> None:
        """InvalidInput, naming row and column, for text that is no table. `tabs`: the file is named as TSV."""
        text = open_text(path, schema.encoding)
        self._delimiter = schema.delimiter or ("\t" if tabs else sniff_delimiter(text))
        self._has_header = schema.header in (None, True)
        if self._delimiter in '"\r\n\x00':
            raise InvalidInput("schema.delimiter cannot be a quote or a line end", param="schema.delimiter")
        kind, quoted = trouble(text)
        if kind:
            raise self._locate(text, kind)
        self._text = to_utf8(text, workdir)
        self._quoted = quoted
        self._rows: int | None = None
        self._read_header(schema)
        if quoted:  # pyarrow takes a stray or unterminated quote without a word and shifts what follows
            self._rows = self._check()

    def _read_header(self, schema: TableSchema) -> None:
        """Sets `names`, `header_cells` (None when the names were given) and the offset where the data starts."""
        self._start = self._text.start
        self.header_cells: list[str] | None = None
        lines = _Lines(self._text)
        first = next(_scan(lines, self._delimiter, self._has_header), None)
        if first is None:
            raise InvalidInput("the file is empty; upload one with a header row and data", code="empty", param="file")
        line, cells = first
        if schema.header is False:
            self.names = [f"column_{number}" for number in range(1, len(cells) + 1)]
            check_names(self.names, line=None, advice="check the delimiter")
            return
        if isinstance(schema.header, list):
            self.names = list(schema.header)
            if len(self.names) != len(cells) and len(self.names) <= MAX_COLUMNS:
                raise InvalidInput(
                    f"schema.header gives {fields(len(self.names), 'name')}, but row 1 (line {line}) has {fields(len(cells))}",
                    code="bad_header",
                    param="schema.header",
                )
            check_names(self.names, line=None, advice="change schema.header")
            return
        self.names = self.header_cells = [cell.strip() for cell in cells]
        check_names(self.names, line=line, advice=_HEADER_ADVICE)
        self._start += lines.skipped + lines.size

    def types(self) -> dict[str, pa.DataType]:
        import pyarrow as pa

        return dict.fromkeys(self.names, pa.string())

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows as batches of strings, some megabytes each; always all columns, as a line is parsed whole."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        short = [f"c{index}" for index in range(len(self.names))]
        rows = 0
        with pa.OSFile(str(self._text.path), "rb") as file:
            file.seek(self._start)
            try:
                reader = arrow_csv.open_csv(
                    file,
                    read_options=arrow_csv.ReadOptions(column_names=short, block_size=MAX_ROW),
                    parse_options=arrow_csv.ParseOptions(
                        delimiter=self._delimiter,
                        quote_char='"' if self._quoted else False,
                        newlines_in_values=self._quoted,
                    ),
                    convert_options=arrow_csv.ConvertOptions(
                        column_types=dict.fromkeys(short, pa.string()), strings_can_be_null=False, check_utf8=False
                    ),
                )
                for batch in reader:
                    self._check_fields(batch, rows)
                    rows += batch.num_rows
                    yield pa.RecordBatch.from_arrays(batch.columns, names=self.names)
            except pa.ArrowInvalid as error:
                # "Empty CSV file" is how pyarrow calls a file with a header only
                checked = self._check()
                if checked:
                    raise InvalidInput(
                        f"the file cannot be read as CSV: {str(error)[:200]}", code="bad_data", param="file"
                    ) from None
        if self._rows is not None and rows != self._rows:
            raise InvalidInput(
                "the file's quotes and line ends can be read in more than one way; write it anew with texts in quotes",
                code="bad_data",
                param="file",
            )

    def _check_fields(self, batch: pa.RecordBatch, rows: int) -> None:
        import pyarrow.compute as pc

        for name, values in zip(self.names, batch.columns, strict=True):
            if values.nbytes > MAX_FIELD and pc.max(pc.binary_length(values)).as_py() > MAX_FIELD:
                row = rows + 1 + pc.index(pc.greater(pc.binary_length(values), MAX_FIELD), True).as_py()
                what = f"a value of more than {MAX_FIELD} bytes; shorten it, or leave the column out"
                raise fault(what, row=row, line=self.line(row), column=name)

    def _check(self) -> int:
        """Reads all rows exactly; raises at the first bad one. Returns their number."""
        rows = 0
        for line, cells in self._data():
            rows += 1
            if len(cells) != len(self.names):
                raise self._wrong_count(rows, line, cells)
        return rows

    def _wrong_count(self, row: int, line: int, cells: list[str]) -> InvalidInput:
        want, have = len(self.names), len(cells)
        if have < want:
            what = f"{fields(have)} where there should be {want}: this is the first that is absent; complete the row"
            return fault(what, row=row, line=line, column=self.names[have], code="bad_row")
        what = (
            f"{fields(have)} where there should be {want}: there is no such column for {shown(cells[want])}; "
            "put texts that contain the delimiter in quotes"
        )
        return fault(what, row=row, line=line, field=want + 1, code="bad_row")

    def _data(self) -> Iterator[tuple[int, list[str]]]:
        rows = scan(self._text, self._delimiter, header=self._has_header)
        if self._has_header:
            next(rows, None)
        return rows

    def line(self, row: int) -> int | None:
        """The line of the file on which data row `row` (from 1) starts. Reads the file up to there."""
        for number, (line, _) in enumerate(self._data(), start=1):
            if number == row:
                return line
        return None

    def _locate(self, text: TextFile, kind: Trouble) -> InvalidInput:
        """The error for the first cell that has `kind` of trouble."""
        names: list[str] = []
        lines = scan(text, self._delimiter, header=self._has_header)
        for number, (line, cells) in enumerate(lines, start=0 if self._has_header else 1):
            if number == 0:
                names = [cell.strip() for cell in cells]
            for index, cell in enumerate(cells):
                if is_troubled(cell, kind):
                    column = names[index] if number and index < len(names) else None
                    return fault(
                        advice(kind, text),
                        row=number,
                        line=line,
                        column=column,
                        field=index + 1,
                        code="bad_encoding" if kind != "nul" else "bad_data",
                    )
        return InvalidInput(f"the file has {advice(kind, text)}", code="bad_encoding", param="file")


def fields(count: int, what: str = "field") -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def sniff_delimiter(text: TextFile) -> str:
    """The delimiter that splits the first rows into the most fields, equally many in most of them."""
    head: list[str] = []
    size = 0
    for line in text.lines(_SNIFFED_CHARS):
        head.append(line)
        size += len(line)
        if len(head) > 2 * _SNIFFED_ROWS or size > _SNIFFED_CHARS:
            break
    best, most = ",", (0.0, 1)
    for delimiter in DELIMITERS:
        counts = _counts(head, delimiter)
        if counts and counts[0] > 1:
            score = (sum(count == counts[0] for count in counts) / len(counts), counts[0])
            if score > most:
                best, most = delimiter, score
    return best


def _counts(head: list[str], delimiter: str) -> list[int]:
    counts: list[int] = []
    try:
        for cells in csv.reader(head, delimiter=delimiter):
            if cells:
                counts.append(len(cells))
            if len(counts) == _SNIFFED_ROWS:
                break
    except csv.Error:
        pass  # a broken row is for the exact scan to report
    return counts


def scan(text: TextFile, delimiter: str, *, header: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Every row as (line it starts on, its cells); blank lines are skipped, as pyarrow does.

    Raises InvalidInput at a stray or unterminated quote and at rows and fields beyond the bounds. `header`: the first
    row counts as 0.
    """
    return _scan(_Lines(text), delimiter, header)


def _scan(lines: _Lines, delimiter: str, header: bool) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    row = 0 if header else 1
    names: list[str] = []
    while True:
        lines.begin()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _broken(str(error), lines, row, delimiter, names) from None
        except _RowTooLong:
            field = _bad_field(lines.taken, delimiter)
            name = names[field - 1] if field <= len(names) else None
            what = (
                f"the row has more than {MAX_ROW} bytes, of which the last that fit are here; if no closing quote is "
                "missing, shorten its values, or leave columns out"
            )
            raise fault(what, row=row, line=lines.first, column=name, field=field) from None
        if cells is None:
            return
        if cells:
            yield lines.first, cells
            if row == 0:
                names = [cell.strip() for cell in cells]
            row += 1
        else:
            lines.skipped += lines.size


def _broken(error: str, lines: _Lines, row: int, delimiter: str, names: list[str]) -> InvalidInput:
    column = _bad_field(lines.taken, delimiter)
    if "limit" in error:
        what = f"a value of more than {MAX_FIELD} characters; if no closing quote is missing, shorten it, or leave the column out"
    elif "unexpected end" in error:
        what = "the quote that opens this value is never closed; close it, or double quotes that belong to the text"
    else:
        what = "text follows the closing quote of this value; double quotes that belong to the text"
    name = names[column - 1] if column <= len(names) else None
    return fault(what, row=row, line=lines.first, column=name, field=column, code="bad_quote")


def _bad_field(taken: list[str], delimiter: str) -> int:
    """The number (from 1) of the field at which a row's quoting breaks, or which is too long."""
    text, at, column = "".join(taken), 0, 1
    while at < len(text):
        if text[at] == '"':
            end = text.find('"', at + 1)
            while end >= 0 and text[end + 1 : end + 2] == '"':
                end = text.find('"', end + 2)
            if end < 0 or text[end + 1 : end + 2] not in (delimiter, "\r", "\n", ""):
                return column
            start, at = at, end + 1
        else:
            start, at = at, text.find(delimiter, at)
        if at - start > MAX_FIELD:
            return column
        if at < 0 or text[at : at + 1] != delimiter:
            return column
        at, column = at + 1, column + 1
    return column


class _RowTooLong(Exception):
    pass


class _Lines:
    """The file's lines for csv.reader, which remembers those that the current row took."""

    def __init__(self, text: TextFile) -> None:
        self._lines = text.lines(MAX_ROW + 1)
        self._number = 0
        self.size = 0  # bytes of the row so far
        self.skipped = 0  # bytes of blank lines
        self.first = 1
        self.taken: list[str] = []

    def begin(self) -> None:
        self.first, self.taken, self.size = self._number + 1, [], 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        self.size += len(line) if line.isascii() else len(line.encode(errors="replace"))
        self.taken.append(line)
        if self.size > MAX_ROW:
            raise _RowTooLong
        return line
