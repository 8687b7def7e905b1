"""Datasets: uploading a table, and what is there."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from modelworks.client.jobs import wait
from modelworks.client.lists import page, path
from modelworks.client.modes import Mode, Resource, call
from modelworks.client.transport import AWAY, Request, creation
from modelworks.client.types import build
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit, DatasetEdits, Ref, TableSchema
from modelworks.core.types import Dataset, Page

if TYPE_CHECKING:
    from collections.abc import Iterator

Progress = Callable[[int, int | None], None]
Schema = TableSchema | Mapping[str, Any]
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_WAIT = 24 * 3600.0


class Datasets(Resource[Mode]):
    @call
    async def upload(
        self,
        data: Any,
        *,
        name: str | None = None,
        schema: Schema | None = None,
        columns: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        filename: str | None = None,
        idempotency_key: str | None = None,
    ) -> Dataset:
        """Upload a table and wait until it is ingested and profiled.

        `data`: a file's path, a binary file, or a data frame (pandas, polars, pyarrow: anything with the Arrow stream
        interface). A folder, or a zip or tar of one, of images, sounds or texts in one folder a class becomes the
        columns `image` (`audio`, `text`) and `label`. `name` is by default the file's. `columns={"zip": "category"}`
        corrects types; it is short for `schema={"columns": ...}`. `progress(sent, total)` is called as bytes go out.
        The same content again answers the version that is there, which need not be the newest: go on with `.ref`
        ("houses:1"), since the bare name means the newest.
        """
        schema = _corrected(schema, columns)
        with opened(data, filename) as (file, known_as):
            counted = Counted(file, progress) if progress else file
            form = _fields(name or _name_of(known_as), schema) | {
                "file": (known_as, counted, "application/octet-stream")
            }
            return await self._create(form, idempotency_key)

    @call
    async def create(
        self,
        source: str,
        *,
        name: str,
        schema: Schema | None = None,
        columns: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Dataset:
        """Have the server fetch a table: `sklearn:NAME`, `package:DIST/PATH` or an https URL. Else as `upload`."""
        return await self._create(
            _fields(name, _corrected(schema, columns)) | {"source": (None, source)}, idempotency_key
        )

    async def _create(self, form: dict[str, Any], key: str | None) -> Dataset:
        return await self._made(await self._http.send(creation("/api/v1/datasets", key=key, form=form, patience=AWAY)))

    async def _made(self, response: Any) -> Dataset:
        if response.status_code != 202:
            return self._http.validate(Dataset, response.json())
        job = await wait(self._http, response.json()["id"], timeout=_WAIT)
        return await self._get(str(job.result["dataset"]))

    @call
    async def list(self, *, limit: int = 20, after: str | None = None) -> Page[Dataset]:
        """The newest version of each dataset."""
        return await page(self._http, "/api/v1/datasets", Dataset, limit=limit, after=after)

    @call
    async def get(self, name: str, version: int | None = None) -> Dataset:
        """`iris` (its newest version), `iris:3`, or the name and the version."""
        return await self._get(name, version)

    @call
    async def versions(self, name: str) -> tuple[int, ...]:
        """The numbers of all versions of the dataset `name`."""
        found = await self._http.json(Request("GET", path("/api/v1/datasets/{}", name)))
        return tuple(int(number) for number in found["versions"])

    @call
    async def diff(self, name: str, before: int, after: int, *, key: str | None = None) -> dict[str, Any]:
        """What changed between two versions: rows, columns, distributions. `key`: the column that tells rows apart."""
        query = {"from": before, "to": after, "key": key}
        response = await self._http.send(Request("GET", path("/api/v1/datasets/{}/diff", name), query=query))
        if response.status_code != 202:
            return dict(response.json())
        job = await wait(self._http, response.json()["id"], timeout=_WAIT)
        return dict(job.result)

    @call
    async def edit(
        self,
        name: str,
        edits: Sequence[DatasetEdit | Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
    ) -> Dataset:
        """A new version of `name` (or `name:version`): labels set, rows dropped, columns renamed, splits drawn.

        `edits=[{"op": "set", "column": "label", "value": "cat", "rows": [3, 17]}]`; see `DatasetEdit`.
        """
        ref = Ref.parse(name, "dataset")
        given = {"version": ref.version, "edits": [
            one.model_dump(mode="json", exclude_unset=True) if isinstance(one, DatasetEdit) else dict(one) for one in edits
        ]}  # fmt: skip
        spec = build(DatasetEdits, given, {}, "edits")
        body = spec.model_dump(mode="json", exclude_unset=True)
        where = path("/api/v1/datasets/{}/edits", ref.name)
        return await self._made(await self._http.send(creation(where, key=idempotency_key, json=body, patience=AWAY)))

    @call
    async def delete(self, name: str, *, force: bool = False) -> tuple[int, ...]:
        """Delete `name:version`, or with a bare name all versions; the numbers of those that are gone."""
        ref = Ref.parse(name, "dataset")
        where = path("/api/v1/datasets/{}", ref.name) + (f"/versions/{ref.version}" if ref.version else "")
        found = await self._http.json(Request("DELETE", where, query={"force": "true"} if force else {}))
        return tuple(int(number) for number in found["versions"])

    async def _get(self, name: str, version: int | None = None) -> Dataset:
        ref = Ref.parse(name, "dataset")
        number = version or ref.version
        where = path("/api/v1/datasets/{}", ref.name) + (f"/versions/{number}" if number else "")
        return await self._http.model(Request("GET", where), Dataset)


def _corrected(schema: Schema | None, columns: Mapping[str, str] | None) -> Schema | None:
    if columns is None:
        return schema
    given = schema.model_dump(exclude_unset=True) if isinstance(schema, TableSchema) else dict(schema or {})
    return {**given, "columns": {**given.get("columns", {}), **columns}}


def _fields(name: str, schema: Schema | None) -> dict[str, Any]:
    form: dict[str, Any] = {"name": (None, name)}
    if schema is not None:
        given = build(TableSchema, schema, {}, "schema")
        form["schema"] = (None, json.dumps(given.model_dump(mode="json", exclude_unset=True)))
    return form


def _name_of(filename: str) -> str:
    """A dataset's name from a file's: `Sales 2024.csv` -> `Sales-2024`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", filename.split(".")[0]).strip("-._")[:100] or "data"


@contextmanager
def opened(data: Any, filename: str | None) -> Iterator[tuple[IO[bytes], str]]:
    """The bytes to send and the file name that tells their format."""
    if isinstance(data, str | os.PathLike):
        file_path = Path(data)
        if file_path.is_dir():
            with tempfile.TemporaryFile() as file:
                _zip_folder(file_path, file)
                file.seek(0)
                yield file, filename or f"{file_path.resolve().name}.zip"
            return
        try:
            with file_path.open("rb") as file:
                yield file, filename or file_path.name
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise InvalidInput(
                f"cannot read {file_path} ({error.strerror}); give the path of a file or a folder", param="file"
            ) from None
    elif hasattr(data, "__arrow_c_stream__"):
        with tempfile.TemporaryFile() as file:
            _write_parquet(data, file)
            file.seek(0)
            yield file, filename or "data.parquet"
    elif isinstance(data, bytes | bytearray):
        yield io.BytesIO(data), filename or "data.csv"
    elif hasattr(data, "read"):
        yield data, filename or Path(str(getattr(data, "name", "data.csv"))).name
    else:
        raise InvalidInput(
            f"a {type(data).__name__} cannot be uploaded; give a path, a binary file or a data frame", param="file"
        )


def _zip_folder(folder: Path, file: IO[bytes]) -> None:
    """All files below `folder`, without hidden ones, in the order of their names; links are followed only within it."""
    root = folder.resolve()
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [(path, path.relative_to(folder).as_posix()) for path in found]
    names = [(path, name) for path, name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise InvalidInput(f"the folder {folder} holds no files; put them into one folder for each class", param="file")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path, name in names:
            if not path.resolve().is_relative_to(root):
                raise InvalidInput(f"{path} leads out of the folder; copy the file into it", param="file")
            archive.write(path, name)


def _write_parquet(frame: Any, file: IO[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    reader = pa.RecordBatchReader.from_stream(frame)
    keep = [name for name in reader.schema.names if not _PANDAS_INDEX.fullmatch(name)]  # a filtered frame's row numbers
    schema = pa.schema([reader.schema.field(name) for name in keep])
    with pq.ParquetWriter(file, schema) as writer:
        for batch in reader:
            writer.write_batch(batch.select(keep))


class Counted:
    """A binary file that tells how much of it was read. Starts anew when it is sent again."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._sent = 0
        try:
            self._total: int | None = file.seek(0, os.SEEK_END)
            file.seek(0)
        except (AttributeError, io.UnsupportedOperation):
            self._total = None

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._sent += len(chunk)
        self._progress(self._sent, self._total)
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) == (0, 0):
            self._sent = 0
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
