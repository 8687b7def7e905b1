"""Forms on their way in: fields in memory, the one file streamed to disk. A client's file name is never a path."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import anyio
from python_multipart import MultipartParser, QuerystringParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from modelworks.core.errors import InvalidInput

MAX_FIELDS = 32
MAX_FIELD_BYTES = 1024 * 1024
WRITE_AT = 1024 * 1024  # bytes gathered before a write, which happens in a thread


@dataclass
class Form:
    """`fields` by name, and the file `path` (None: none was sent) whose client-side name was `filename`."""

    fields: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    filename: str = ""

    def require(self, name: str) -> str:
        if not (value := self.fields.get(name, "").strip()):
            raise InvalidInput(f"the form field {name!r} is required", param=name)
        return value

    def only(self, *names: str) -> None:
        """Refuse fields that are not among `names`, so that a typing error is not silently ignored."""
        for name in self.fields:
            if name not in names:
                raise InvalidInput(f"there is no form field {name[:100]!r}; use {', '.join(names)}", param=name[:100])


@contextlib.asynccontextmanager
async def receive_form(request: Request, folder: Path) -> AsyncIterator[Form]:
    """The form of `request`. Its file lies in a fresh folder under `folder`, which is removed when the block ends."""
    scratch = await anyio.to_thread.run_sync(_scratch, folder)
    try:
        media, options = parse_options_header(request.headers.get("content-type", ""))
        reader = _Multipart(options, scratch) if media == b"multipart/form-data" else _Urlencoded()
        try:
            async for chunk in request.stream():
                reader.feed(chunk)
                if reader.pending >= WRITE_AT:
                    await anyio.to_thread.run_sync(reader.flush)
            reader.finish()
            await anyio.to_thread.run_sync(reader.flush)
        except FormParserError as error:
            raise InvalidInput(f"the form cannot be read: {error}", code="bad_form") from None
        finally:
            reader.close()
        yield reader.form
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(scratch, ignore_errors=True))


def _scratch(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(tempfile.mkdtemp(prefix="upload-", dir=folder))


class _Fields:
    """Gathers fields within the bounds."""

    pending = 0

    def __init__(self) -> None:
        self.form = Form()
        self._name = bytearray()
        self._value = bytearray()

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def _take(self, target: bytearray, data: bytes) -> None:
        if len(target) + len(data) > MAX_FIELD_BYTES:
            raise InvalidInput(
                f"a form field has at most {MAX_FIELD_BYTES} bytes; send large content as `file`", code="bad_form"
            )
        target += data

    def _keep(self, name: str, value: bytes) -> None:
        if name in self.form.fields:
            raise InvalidInput(f"the form field {name[:100]!r} is there twice", code="bad_form", param=name[:100])
        if len(self.form.fields) >= MAX_FIELDS:
            raise InvalidInput(f"a form has at most {MAX_FIELDS} fields", code="bad_form")
        self.form.fields[name] = _text(value, name)


class _Urlencoded(_Fields):
    def __init__(self) -> None:
        super().__init__()
        self._parser = QuerystringParser(
            {
                "on_field_start": self._start,
                "on_field_name": lambda data, start, end: self._take(self._name, data[start:end]),
                "on_field_data": lambda data, start, end: self._take(self._value, data[start:end]),
                "on_field_end": self._end,
            }
        )

    def feed(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def finish(self) -> None:
        self._parser.finalize()

    def _start(self) -> None:
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        from urllib.parse import unquote_to_bytes

        name = unquote_to_bytes(bytes(self._name).replace(b"+", b" "))
        self._keep(_text(name, "a field's name"), unquote_to_bytes(bytes(self._value).replace(b"+", b" ")))


class _Multipart(_Fields):
    """One `file` part, written to `folder`/upload, and fields beside it."""

    def __init__(self, options: dict[bytes, bytes], folder: Path) -> None:
        super().__init__()
        boundary = options.get(b"boundary")
        if not boundary:
            raise InvalidInput(
                "multipart/form-data needs a boundary; let the HTTP client set Content-Type", code="bad_form"
            )
        self._target = folder / "upload"
        self._file: IO[bytes] | None = None
        self._in_file = False
        self._ended = False
        self._buffer = bytearray()
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        callbacks: dict[str, Callable[..., Any]] = {
            "on_part_begin": self._part,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    @property
    def pending(self) -> int:  # type: ignore[override]
        return len(self._buffer)

    def feed(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def finish(self) -> None:
        self._parser.finalize()
        if not self._ended:
            raise InvalidInput("the form ends before its closing boundary; send it again", code="bad_form")

    def flush(self) -> None:
        if self._file is not None and self._buffer:
            self._file.write(self._buffer)
            self._buffer.clear()

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()

    def _part(self) -> None:
        self._disposition = b""
        self._value = bytearray()
        self._in_file = False

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidInput("each part of the form needs a name in its Content-Disposition", code="bad_form")
        self._name = bytearray(options[b"name"])
        if b"filename" not in options:
            return
        if options[b"name"] != b"file":
            raise InvalidInput("send the file in the form field `file`", code="bad_form", param="file")
        if self._file is not None:
            raise InvalidInput(
                "a form has one file; send the others in calls of their own", code="bad_form", param="file"
            )
        self._in_file = True
        self._file = self._target.open("wb")
        self.form.path = self._target
        self.form.filename = _text(options[b"filename"], "file").replace("\\", "/").rsplit("/", 1)[-1][:255]

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._buffer += data[start:end]
        else:
            self._take(self._value, data[start:end])

    def _part_end(self) -> None:
        if not self._in_file:
            self._keep(_text(bytes(self._name), "a field's name"), bytes(self._value))

    def _end(self) -> None:
        self._ended = True


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"{what!r} is not UTF-8 text", code="bad_form") from None
