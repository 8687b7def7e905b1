"""JSON Lines: one object a line, of plain values and of lists of them. Two passes: the kind of each column first, then typed batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from modelworks.core import sequences
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.core.tensors import INT64_MISSING
from modelworks.ml.data.encodings import TextFile, advice, is_troubled, numbered, open_text, to_utf8, trouble
from modelworks.ml.data.faults import MAX_COLUMNS, MAX_FIELD, MAX_NAME, check_names, fault, shown

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 32_768
_BATCH_CHARS = 8 << 20
_KINDS: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "text", list: "sequence"}
_WORDS = {"boolean": "true or false", "number": "a number", "text": "a text", "sequence": "a list"}


class JsonLines:
    """A JSON Lines file. Columns are the keys in order of appearance; a key that a line lacks is missing there."""

    lexical = False
    header_cells: list[str] | None = None

    def __init__(self, path: Path, schema: TableSchema, workdir: Path) -> None:
        """InvalidInput, naming line and field, for lines that are no flat objects and for columns of several kinds."""
        if schema.header is not None:
            raise InvalidInput(
                "schema.header is for files without names; JSON Lines name each value",
                param="schema.header",
                code="bad_header",
            )
        text = open_text(path, schema.encoding)
        kind, _ = trouble(text)
        if kind:
            raise self._locate(text, kind)
        self._text = to_utf8(text, workdir)
        self._declared = schema.columns
        # column -> kind -> the rows that have it, and the first of them
        self._seen: dict[str, dict[str, tuple[int, int]]] = {}
        self._floats: set[str] = set()
        self._lists: dict[str, str] = {}  # column -> what its lists are of
        rows = 0
        for first, objects in self._chunks():
            self._look(first, objects)
            rows += len(objects)
        if rows == 0:
            raise InvalidInput("the file is empty; upload one object of values a line", code="empty", param="file")
        self.names = list(self._seen)
        check_names(self.names, line=None, advice="name every value")
        self._kinds = {name: self._kind(name) for name in self.names}

    def _chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(row number of the first, objects), in portions of bounded size."""
        first, size = 1, 0
        objects: list[dict[str, Any]] = []
        decode = msgspec.json.Decoder().decode
        for row, (line, text) in enumerate(numbered(self._text), start=1):
            objects.append(_object(decode, text, row, line))
            size += len(text)
            if len(objects) == _BATCH_ROWS or size > _BATCH_CHARS:
                yield first, objects
                first, size, objects = row + 1, 0, []
        if objects:
            yield first, objects

    def _look(self, first: int, objects: list[dict[str, Any]]) -> None:
        """Notes which kinds of values each column has."""
        names = dict.fromkeys(name for item in objects for name in item)
        for name in names:
            if name not in self._seen:
                if len(self._seen) == MAX_COLUMNS or len(name) > MAX_NAME:
                    what = f"more than {MAX_COLUMNS} columns, or a name of more than {MAX_NAME} characters"
                    row = next(row for row, item in enumerate(objects, first) if name in item)
                    raise fault(what, row=row, line=self.line(row), column=name)
                self._seen[name] = {}
            values = [item.get(name) for item in objects]
            for kind in set(map(type, values)) - {type(None)}:
                self._note(name, kind, values, first)

    def _note(self, name: str, kind: type, values: list[Any], first: int) -> None:
        at = [index for index, value in enumerate(values) if type(value) is kind]
        if kind not in _KINDS:
            row = first + at[0]
            what = "an object inside the row; give one plain value, or a list of them, for each name"
            raise fault(what, row=row, line=self.line(row), column=name, code="nested")
        if kind is str:
            for index in at:
                if len(values[index]) > MAX_FIELD:
                    row = first + index
                    what = f"a value of more than {MAX_FIELD} characters"
                    raise fault(what, row=row, line=self.line(row), column=name)
        if kind is list:
            self._note_lists(name, values, at, first)
        if kind is float or (kind is int and any(not INT64_MISSING < values[index] < 2**63 for index in at)):
            self._floats.add(name)
        word = _KINDS[kind]
        count, earliest = self._seen[name].get(word, (0, first + at[0]))
        self._seen[name][word] = (count + len(at), min(earliest, first + at[0]))

    def _note_lists(self, name: str, values: list[Any], at: list[int], first: int) -> None:
        """Each is of texts or of numbers, and so are all of the column."""
        for index in at:
            inside = set(map(type, values[index]))
            found = "texts" if inside == {str} else "numbers" if inside else ""
            usual = self._lists.setdefault(name, found) if found else ""
            try:
                long = len(sequences.dump(values[index])) > MAX_FIELD
            except ValueError:
                what = f"a list that is not {sequences.WORDS}"
            else:
                if not long and found == usual:
                    continue
                what = f"a list of more than {MAX_FIELD} characters" if long else f"a list of {found} where those above are of {usual}"
            row = first + index
            raise fault(what, row=row, line=self.line(row), column=name, code="nested")
        if any(type(one) is float or (type(one) is int and not INT64_MISSING < one < 2**63) for i in at for one in values[i]):
            self._floats.add(name)

    def _kind(self, name: str) -> str:
        """The one kind of a column's values; "text" when it is declared so. Raises at the first of a rarer kind."""
        seen = self._seen[name]
        if self._declared.get(name) in ("category", "text"):
            return "text" if len(seen) > 1 else next(iter(seen), "text")
        if len(seen) <= 1:
            return next(iter(seen), "text")
        usual = max(seen, key=lambda kind: seen[kind][0])
        row, other = min((first, kind) for kind, (_, first) in seen.items() if kind != usual)
        raise fault(
            f"{_WORDS[other]} where most values of the column are {_WORDS[usual]}; correct the value, "
            "or declare the column a category in schema.columns",
            row=row,
            line=self.line(row),
            column=name,
            code="mixed_types",
        )

    def types(self) -> dict[str, pa.DataType]:
        import pyarrow as pa

        kinds = {"boolean": pa.bool_(), "text": pa.string()}
        numbers = {name: pa.float64() if name in self._floats else pa.int64() for name in self.names}
        found = {name: kinds.get(kind, numbers[name]) for name, kind in self._kinds.items()}
        for name, kind in self._kinds.items():
            if kind == "sequence":
                found[name] = pa.list_(numbers[name] if self._lists.get(name) == "numbers" else pa.string())
        return found

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows (only `columns`, if given) as typed batches of bounded size."""
        import pyarrow as pa

        types = self.types()
        names = self.names if columns is None else columns
        for _, objects in self._chunks():
            arrays = []
            for name in names:
                values = [item.get(name) for item in objects]
                if types[name] == pa.float64():
                    values = _floats(values)
                elif types[name] == pa.string():
                    values = _texts(values)
                arrays.append(pa.array(values, types[name]))
            yield pa.RecordBatch.from_arrays(arrays, names=names)

    def line(self, row: int) -> int | None:
        """The line of the file that holds data row `row` (from 1). Reads the file up to there."""
        for number, (line, _) in enumerate(numbered(self._text), start=1):
            if number == row:
                return line
        return None

    def _locate(self, text: TextFile, kind: Any) -> InvalidInput:
        for row, (line, raw) in enumerate(numbered(text), start=1):
            if is_troubled(raw, kind):
                return fault(
                    advice(kind, text),
                    row=row,
                    line=line,
                    column=_troubled_name(raw, kind),
                    field=1,
                    code="bad_encoding",
                )
        return InvalidInput(f"the file has {advice(kind, text)}", code="bad_encoding", param="file")


def _troubled_name(raw: str, kind: Any) -> str | None:
    """The name of the first value in a JSON line that has trouble; None when the line is no object."""
    import json

    try:
        item = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(item, dict):
        return None
    return next((name for name, value in item.items() if is_troubled(f"{name}{value}", kind)), None)


def _object(decode: Any, text: str, row: int, line: int) -> dict[str, Any]:
    try:
        item = decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        what = f"not a line of JSON ({str(error)[:120]}): {shown(text.strip())}; write one object a line"
        raise fault(what, row=row, line=line, field=1, code="bad_json") from None
    if not isinstance(item, dict):
        what = f"{shown(text.strip())} is not an object; write one object of names and values a line"
        raise fault(what, row=row, line=line, field=1, code="bad_json")
    return item


def _floats(values: list[Any]) -> list[float | None]:
    """Integers of any size as floats; those beyond the range of floats become infinite, which the caller refuses."""
    out: list[float | None] = []
    for value in values:
        try:
            out.append(None if value is None else float(value))
        except OverflowError:
            out.append(float("inf"))
    return out


def _texts(values: list[Any]) -> list[str | None]:
    return [
        value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode() for value in values
    ]
