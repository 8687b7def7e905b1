"""Archives as tables: files in one folder a class, or files that a table in the archive names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.ml.data import media
from modelworks.ml.data.archives import Archive, refuse_other
from modelworks.ml.data.faults import MAX_FIELD, fault, shown

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.table import Opener, Table

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather")
_BATCH_ROWS = 4096
_BATCH_BYTES = 16 << 20
_LOOKED_AT = 200  # names that tell whether a column names files
_NAMES_OF_FILES = ("file", "file_name", "filename", "path", "file_path", "filepath")
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})


def open_archive(path: Path, schema: TableSchema, workdir: Path, open_table: Opener) -> Table:
    """The table that an archive holds; `open_table` opens a file of it. UnsupportedMedia when there is nothing to learn from in it."""
    archive = Archive(path, workdir)
    files: dict[str, list[str]] = {"image": [], "audio": [], "text": [], "table": []}
    for name in archive.names:
        low = name.lower()
        kind = media.kind_of(name) or ("text" if low.endswith(".txt") else "table" if low.endswith(_TABLES) else None)
        if kind:
            files[kind].append(name)
    tables = files.pop("table")
    if len(tables) == 1:
        return _with_table(archive, tables[0], files, schema, workdir, open_table)
    kinds = [kind for kind, names in files.items() if names]
    if len(kinds) > 1 and "text" in kinds:  # a README beside images
        kinds.remove("text")
    if not kinds and not tables:
        raise refuse_other(archive.names)
    if len(kinds) != 1:
        found = " and ".join([*kinds, *(["several tables"] if tables else [])])
        raise InvalidInput(
            f"the archive holds {found}; pack files of one kind in a folder for each class, or one table that names them",
            code="bad_archive",
            param="file",
        )
    _no_header(schema)
    return Folders(archive, kinds[0], files[kinds[0]])


def _no_header(schema: TableSchema) -> None:
    if schema.header is not None:
        raise InvalidInput("schema.header is for tables of text; leave it out", param="schema.header", code="bad_header")


def _with_table(
    archive: Archive, name: str, files: dict[str, list[str]], schema: TableSchema, workdir: Path, open_table: Opener
) -> Table:
    """The one table of an archive; columns that name files of the archive become those files."""
    inner = workdir / ("table" + Path(name).suffix.lower())
    inner.write_bytes(archive.read(name))
    table = open_table(inner, Path(name).name, schema, workdir)
    known = {one: kind for kind, names in files.items() if kind != "text" for one in names}
    if not known:
        return table
    folder = name.rpartition("/")[0]
    columns = _naming(table, known, folder)
    if not columns:
        example = next(iter(known))
        raise InvalidInput(
            f"no column of {shown(name)} names the archive's files; give each row its file, such as {shown(example)}, or "
            "leave the table out and pack the files in a folder for each class",
            code="bad_archive",
            param="file",
        )
    return Manifest(table, archive, known, folder, columns)


def _naming(table: Table, known: dict[str, str], folder: str) -> dict[str, str]:
    """Column -> kind, of the columns whose first values are all names of files."""
    import pyarrow as pa

    texts = [name for name, kind in table.types().items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    first = next(iter(table.batches(texts)), None) if texts else None
    found = {}
    for name in texts if first is not None else []:
        assert first is not None
        values = first.column(first.schema.get_field_index(name)).slice(0, _LOOKED_AT).drop_null().to_pylist()
        kinds = {known.get(_located(str(value), folder, known)) for value in values}
        hits = [kind for kind in kinds if kind]
        if hits and (len(kinds) == 1 or name.lower() in _NAMES_OF_FILES):
            found[name] = hits[0]
    return found


def _located(value: str, folder: str, known: dict[str, str]) -> str:
    """A name in a table, as the archive has it: from the table's folder, or from the archive's root."""
    value = value.strip().removeprefix("./")
    beside = f"{folder}/{value}" if folder else value
    return beside if beside in known else value


class Folders:
    """Files in a folder for each class: columns `image` (or `audio`, `text`) and `label`; without folders no label."""

    lexical = False
    header_cells: list[str] | None = None

    def __init__(self, archive: Archive, kind: str, files: list[str]) -> None:
        self._archive, self._kind, self._files = archive, kind, files
        self._labels = _labels(files)
        self._splits = _splits(files) if self._labels else None
        more = {"label": self._labels, "split": self._splits}
        self._columns = {name: values for name, values in more.items() if values}
        self.names = [kind, *self._columns]
        self.media = {kind: kind}

    def types(self) -> dict[str, pa.DataType]:
        import pyarrow as pa

        return {self._kind: pa.string() if self._kind == "text" else pa.binary()} | dict.fromkeys(self._columns, pa.string())

    def line(self, row: int) -> int | None:
        return None

    def origin(self, row: int) -> str:
        return self._files[row - 1]

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        names = self.names if columns is None else columns
        types = self.types()
        start = 0
        while start < len(self._files):
            stop = self._portion(start, self._kind in names)
            arrays = [
                pa.array(self._contents(start, stop) if name == self._kind else self._columns[name][start:stop], types[name])
                for name in names
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=names)
            start = stop

    def _portion(self, start: int, contents: bool) -> int:
        size, stop = 0, start
        while stop < min(len(self._files), start + _BATCH_ROWS) and (size <= _BATCH_BYTES or not contents):
            size += self._archive.size(self._files[stop])
            stop += 1
        return stop

    def _contents(self, start: int, stop: int) -> list[Any]:
        found = [self._archive.read(name) for name in self._files[start:stop]]
        return found if self._kind != "text" else [_text(data, name) for data, name in zip(found, self._files[start:stop], strict=True)]


def _text(data: bytes, name: str) -> str:
    if len(data) > MAX_FIELD:
        raise InvalidInput(f"the file {shown(name)} has more than {MAX_FIELD} bytes; split it", code="bad_data", param="file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidInput(
            f"the file {shown(name)} is not UTF-8 text; convert it", code="bad_encoding", param="file"
        ) from None


def _labels(files: list[str]) -> list[str] | None:
    """The folder that each lies in; None when all lie in the same place without being told apart."""
    parts = [name.split("/")[:-1] for name in files]
    if not any(parts):
        return None
    if not all(parts):
        lone = next(name for name, folders in zip(files, parts, strict=True) if not folders)
        raise InvalidInput(
            f"the file {shown(lone)} lies in no folder, while others do; put each into the folder of its class",
            code="bad_archive",
            param="file",
        )
    return [folders[-1] for folders in parts]


def _splits(files: list[str]) -> list[str] | None:
    """The folder above the classes, when there is one of a split's name above each."""
    above = [name.split("/")[:-2] for name in files]
    if all(folders and folders[-1].lower() in SPLITS for folders in above):
        return [folders[-1].lower() for folders in above]
    return None


class Manifest:
    """A table of the archive, in which columns that name files hold those files."""

    header_cells: list[str] | None = None

    def __init__(
        self, table: Table, archive: Archive, known: dict[str, str], folder: str, columns: dict[str, str]
    ) -> None:
        self._table, self._archive, self._known, self._folder = table, archive, known, folder
        self.lexical = table.lexical
        called = {name: renamed(name, kind, table.names) for name, kind in columns.items()}
        self._of = {called[name]: name for name in columns}
        self.media = {called[name]: kind for name, kind in columns.items()}
        self.names = [called.get(name, name) for name in table.names]
        self._given: dict[int, str] = {}

    def types(self) -> dict[str, pa.DataType]:
        import pyarrow as pa

        given = self._table.types()
        return {name: pa.binary() if name in self.media else given[name] for name in self.names}

    def line(self, row: int) -> int | None:
        return self._table.line(row)

    def origin(self, row: int) -> str:
        return self._given.get(row, f"row {row}")

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        names = self.names if columns is None else columns
        row = 0
        for batch in self._table.batches([self._of.get(name, name) for name in names]):
            start = 0
            while start < batch.num_rows:
                stop = self._portion(batch, start, names)
                part = batch.slice(start, stop - start)
                self._given.clear()
                arrays = []
                for name in names:
                    values = part.column(part.schema.get_field_index(self._of.get(name, name)))
                    if name in self.media:
                        values = pa.array(self._read(name, values.to_pylist(), row), pa.binary())
                    arrays.append(values)
                yield pa.RecordBatch.from_arrays(arrays, names=names)
                row += part.num_rows
                start = stop

    def _portion(self, batch: pa.RecordBatch, start: int, names: list[str]) -> int:
        chosen = [batch.column(batch.schema.get_field_index(self._of[name])) for name in names if name in self.media]
        if not chosen:
            return batch.num_rows
        size, stop = 0, start
        while stop < batch.num_rows and size <= _BATCH_BYTES:
            for column in chosen:
                name = _located(str(column[stop].as_py() or ""), self._folder, self._known)
                size += self._archive.size(name) if name in self._known else 0
            stop += 1
        return stop

    def _read(self, column: str, values: list[str | None], before: int) -> list[bytes | None]:
        found: list[bytes | None] = []
        for row, value in enumerate(values, start=before + 1):
            if value is None or not value.strip():
                found.append(None)
                continue
            name = _located(value, self._folder, self._known)
            if name not in self._known:
                what = f"the archive has no file {shown(value)}; add it, or leave the row out"
                raise fault(what, row=row, line=self._table.line(row), column=self._of[column], code="missing_file")
            self._given[row] = name
            found.append(self._archive.read(name))
        return found


def renamed(name: str, kind: str, taken: list[str]) -> str:
    """`file_name` -> `image`: what the column holds now."""
    return kind if name.lower() in _NAMES_OF_FILES and kind not in taken else name


