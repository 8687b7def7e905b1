"""Tables that point: columns whose values name objects of the administrator's stores become those objects.

A user names a store's object, never an address: where a store lies and with which key it is read is the administrator's
word, so a table reaches nothing else of the network or the disk. What is read is kept with the dataset's version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from modelworks.core.errors import InvalidInput, Unavailable
from modelworks.core.specs import TableSchema
from modelworks.core.stores import Store
from modelworks.ml.data import media
from modelworks.ml.data.faults import fault, shown

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.table import Table

_LOOKED_AT = 200  # names that tell whether a column points
_ROWS = 64  # objects that are read and held at a time
_AT_ONCE = 8
_SECONDS = 30.0
_SCHEMES = ("s3://", "store://")
_MAX_URI = 2048


class Stores:
    """The administrator's stores, to read from. `offline`: folders alone."""

    def __init__(self, stores: Sequence[Store], *, offline: bool = False) -> None:
        self._stores, self._offline = list(stores), offline
        self._open: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._stores)

    def read(self, uri: str, most: int = media.MAX_FILE) -> bytes:
        """The object's bytes. ValueError in words for what is refused or not there; Unavailable when a store is away."""
        store, key = self._find(uri)
        data = self._read_s3(store, key, most) if store.bucket else self._read_file(store, key, most)
        if len(data) > most:
            raise ValueError(f"has more than {most >> 20} MiB")
        return data

    def _find(self, uri: str) -> tuple[Store, str]:
        """(the store, the key or path in it)"""
        if len(uri) > _MAX_URI or not uri.isprintable():
            raise ValueError("is no name of an object")
        scheme, _, rest = uri.partition("://")
        place, _, key = rest.partition("/")
        if ".." in PurePosixPath(key).parts or "\\" in key or not key:
            raise ValueError("is no name of an object")
        for store in self._stores:
            if scheme == "store" and store.name == place:
                return store, store.prefix + key
        mine = [one for one in self._stores if scheme == "s3" and one.bucket == place and key.startswith(one.prefix)]
        if mine:
            return max(mine, key=lambda one: len(one.prefix)), key
        raise ValueError("lies in no store that this server was given; its administrator names them by --stores")

    def _read_file(self, store: Store, key: str, most: int) -> bytes:
        root = Path(store.at).resolve()
        path = (root / key).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise ValueError("is not there")
        with path.open("rb") as file:
            return file.read(most + 1)

    def _read_s3(self, store: Store, key: str, most: int) -> bytes:
        if self._offline:
            raise ValueError("lies in an object store, and this server runs offline")
        try:
            with self._filesystem(store).open_input_stream(f"{store.bucket}/{key}") as stream:
                parts, size = [], 0
                while size <= most and (part := stream.read(min(1 << 20, most + 1 - size))):
                    parts.append(part)
                    size += len(part)
            return b"".join(parts)
        except FileNotFoundError:
            raise ValueError("is not there") from None
        except PermissionError:
            raise ValueError(f"may not be read with the key of the store {store.name!r}") from None
        except OSError as error:
            if "ACCESS_DENIED" in str(error) or "HTTP status 403" in str(error):
                raise ValueError(f"may not be read with the key of the store {store.name!r}") from None
            raise Unavailable(
                f"the store {store.name!r} cannot be read now; the job is tried again", param="file", code="store_away"
            ) from None

    def _filesystem(self, store: Store) -> Any:
        if store.name not in self._open:
            from pyarrow import fs

            scheme, _, address = (store.endpoint or "https://").partition("://")
            more = {"endpoint_override": address, "scheme": scheme} if store.endpoint else {}
            signed = {"access_key": store.key, "secret_key": store.secret} if store.key else {"anonymous": True}
            self._open[store.name] = fs.S3FileSystem(
                region=store.region,
                connect_timeout=_SECONDS,
                request_timeout=_SECONDS,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
                **signed,
                **more,
            )
        return self._open[store.name]


def follow(table: Table, schema: TableSchema, stores: Stores) -> Table:
    """`table`, or one in which the columns that point hold what they point at."""
    if not stores:
        return table
    kinds = _pointing(table, schema)
    return Pointed(table, kinds, stores) if kinds else table


def _pointing(table: Table, schema: TableSchema) -> dict[str, str]:
    """Column -> image, audio or text, of the columns all of whose first values name objects of such a kind."""
    import pyarrow as pa

    texts = [name for name, kind in table.types().items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    first = next(iter(table.batches(texts)), None) if texts else None
    found: dict[str, str] = {}
    for name in texts if first is not None else []:
        assert first is not None
        given = first.column(first.schema.get_field_index(name)).slice(0, _LOOKED_AT).drop_null().to_pylist()
        values = [value for value in given if value.strip()]
        if not values or not all(value.strip().startswith(_SCHEMES) for value in values):
            continue
        declared = schema.columns.get(name)
        kinds = {declared} if declared in ("image", "audio", "text") else {_kind(value) for value in values}
        if len(kinds) == 1 and (kind := kinds.pop()):
            found[name] = kind
    return found


def _kind(name: str) -> str | None:
    low = name.strip().lower()
    return media.kind_of(low) or ("text" if low.endswith(".txt") else None)


class Pointed:
    """A table in which some columns hold the objects that they name."""

    header_cells: list[str] | None = None

    def __init__(self, table: Table, columns: dict[str, str], stores: Stores) -> None:
        from modelworks.ml.data.folders import renamed

        self._table, self._stores = table, stores
        self.lexical = table.lexical
        names = {name: renamed(name, kind, table.names) for name, kind in columns.items()}
        self._of = {names[name]: name for name in columns}
        self.media = {names[name]: kind for name, kind in columns.items()}
        self.names = [names.get(name, name) for name in table.names]
        self._given: dict[int, str] = {}

    def types(self) -> dict[str, pa.DataType]:
        import pyarrow as pa

        kinds = {"text": pa.string()}
        given = self._table.types()
        return {n: kinds.get(self.media[n], pa.binary()) if n in self.media else given[n] for n in self.names}

    def line(self, row: int) -> int | None:
        return self._table.line(row)

    def origin(self, row: int) -> str:
        return self._given.get(row, f"row {row}")

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        names = self.names if columns is None else columns
        reads = any(name in self.media for name in names)
        types, row = self.types(), 0
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for batch in self._table.batches([self._of.get(name, name) for name in names]):
                for start in range(0, batch.num_rows, _ROWS if reads else max(1, batch.num_rows)):
                    part = batch.slice(start, _ROWS) if reads else batch
                    self._given.clear()
                    arrays = []
                    for name in names:
                        values = part.column(part.schema.get_field_index(self._of.get(name, name)))
                        if name in self.media:
                            values = pa.array(self._read(name, values.to_pylist(), row, pool), types[name])
                        arrays.append(values)
                    yield pa.RecordBatch.from_arrays(arrays, names=names)
                    row += part.num_rows

    def _read(self, column: str, values: list[str | None], before: int, pool: ThreadPoolExecutor) -> list[Any]:
        wanted = [value.strip() if value else "" for value in values]
        pending = [pool.submit(self._stores.read, uri) if uri else None for uri in wanted]
        found: list[Any] = []
        for row, (uri, future) in enumerate(zip(wanted, pending, strict=True), start=before + 1):
            if future is None:
                found.append(None)
                continue
            self._given[row] = uri
            try:
                data = future.result()
                found.append(data.decode("utf-8-sig") if self.media[column] == "text" else data)
            except UnicodeDecodeError:
                self._refuse(f"{shown(uri)} is not UTF-8 text", row, column)
            except ValueError as error:
                self._refuse(f"{shown(uri)} {error}", row, column)
        return found

    def _refuse(self, what: str, row: int, column: str) -> NoReturn:
        wrong: InvalidInput = fault(
            f"{what}; correct the row or leave it out",
            row=row,
            line=self._table.line(row),
            column=self._of[column],
            code="missing_file",
        )
        raise wrong from None
