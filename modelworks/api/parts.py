"""A form in memory: the parts of a small multipart body, such as a prediction with an image in it."""

from __future__ import annotations

from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from modelworks.core.errors import InvalidInput

MAX_PARTS = 256
_MAX_HEADER = 16 * 1024


def parts(content_type: str, data: bytes) -> list[tuple[str, bool, bytes]]:
    """(name, whether it is a file, content) of each part, in order. InvalidInput for what is no form."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidInput("multipart/form-data needs a boundary; let the HTTP client set Content-Type", code="bad_form")
    reader = _Parts()
    callbacks: dict[str, Any] = {
        "on_part_begin": reader.begin,
        "on_header_field": lambda data, start, end: reader.header(0, data[start:end]),
        "on_header_value": lambda data, start, end: reader.header(1, data[start:end]),
        "on_header_end": reader.header_end,
        "on_headers_finished": reader.headers_finished,
        "on_part_data": lambda data, start, end: reader.content.extend(data[start:end]),
        "on_part_end": reader.end,
        "on_end": reader.close,
    }
    try:
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        parser.write(data)
        parser.finalize()
    except FormParserError as error:
        raise InvalidInput(f"the form cannot be read: {error}", code="bad_form") from None
    if not reader.closed:
        raise InvalidInput("the form ends before its closing boundary; send it again", code="bad_form")
    return reader.found


class _Parts:
    def __init__(self) -> None:
        self.found: list[tuple[str, bool, bytes]] = []
        self.content = bytearray()
        self.closed = False
        self._pair = (bytearray(), bytearray())
        self._disposition = b""

    def begin(self) -> None:
        if len(self.found) == MAX_PARTS:
            raise InvalidInput(f"a form has at most {MAX_PARTS} parts", code="bad_form")
        self.content = bytearray()
        self._disposition = b""

    def header(self, side: int, data: bytes) -> None:
        self._pair[side].extend(data)
        if len(self._pair[side]) > _MAX_HEADER:
            raise InvalidInput("a part of the form has too long a header", code="bad_form")

    def header_end(self) -> None:
        name, value = self._pair
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._pair = (bytearray(), bytearray())

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidInput("each part of the form needs a name in its Content-Disposition", code="bad_form")
        try:
            self._name, self._is_file = options[b"name"].decode(), b"filename" in options
        except UnicodeDecodeError:
            raise InvalidInput("a part of the form has a name that is not UTF-8", code="bad_form") from None

    def end(self) -> None:
        self.found.append((self._name, self._is_file, bytes(self.content)))

    def close(self) -> None:
        self.closed = True
