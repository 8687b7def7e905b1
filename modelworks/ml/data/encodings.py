"""Text files on their way in: their encoding, their conversion to UTF-8, and a first pass over their bytes."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelworks.core.errors import InvalidInput
from modelworks.ml.data.faults import MAX_ROW, fault

CHUNK = 4 << 20
# stands for bytes that do not decode: a lone surrogate never comes from bytes that do
MARK = "\udc80"
BOM = "\ufeff"
_ERRORS = "modelworks-mark"
codecs.register_error(_ERRORS, lambda error: (MARK, getattr(error, "end", 0)))
# text codecs of files; Python's other encodings (punycode, unicode_escape, hex...) are not for data from outside
_FILE_CODEC = re.compile(
    r"utf-8(-sig)?|utf-(16|32)(-[lb]e)?|ascii|iso8859-\d+|cp\d+|koi8-[rut]|mac-\w+|gb2312|gbk|gb18030|hz|big5(hkscs)?"
    r"|shift_jis\w*|euc_\w+|johab|tis-620|iso2022_\w+"
)
_WIDE = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

Trouble = Literal["undecodable", "nul", "bom"]


@dataclass(frozen=True)
class TextFile:
    """A text file and how to read it: `start` is the offset behind a UTF-8 byte order mark."""

    path: Path
    encoding: str = "utf-8"
    start: int = 0

    def lines(self, limit: int) -> Iterator[str]:
        """Its lines with their endings, at most `limit` characters at a time; bytes that do not decode come as MARK."""
        with self.path.open("rb") as raw:
            raw.seek(self.start)
            with io.TextIOWrapper(raw, encoding=self.encoding, errors=_ERRORS, newline="") as text:
                while line := text.readline(limit):
                    yield line


def open_text(path: Path, encoding: str | None) -> TextFile:
    """The file as text; InvalidInput for an unknown encoding, and for UTF-16 and UTF-32 that were not announced."""
    with path.open("rb") as file:
        head = file.read(4)
    if encoding is None or (name := codec_name(encoding)) in ("utf-8", "utf-8-sig", "ascii"):
        for mark, wide in _WIDE:
            if head.startswith(mark):
                raise fault(
                    f"the file starts with a byte order mark of {wide}; convert it to UTF-8, "
                    f"or give schema.encoding as {wide.lower()}",
                    row=1,
                    line=1,
                    field=1,
                    code="bad_encoding",
                )
        return TextFile(path, "utf-8", len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    return TextFile(path, name)


def codec_name(encoding: str) -> str:
    """Python's name for `encoding`; InvalidInput when it names no encoding of text files."""
    try:
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):  # ValueError: NUL or surrogates in the name
        name = ""
    if not _FILE_CODEC.fullmatch(name):
        raise InvalidInput(
            f"schema.encoding {encoding[:40]!r} is not an encoding of text files; "
            "give one such as utf-8, latin-1, cp1252 or gb18030",
            code="bad_encoding",
            param="schema.encoding",
        )
    return name


def trouble(text: TextFile) -> tuple[Trouble | None, bool]:
    """One pass over the bytes: the kind of trouble met first (the caller locates it), and whether there are quotes."""
    decoder = codecs.getincrementaldecoder(text.encoding)()
    quotes, first = False, True
    with text.path.open("rb") as file:
        file.seek(text.start)
        while True:
            chunk = file.read(CHUNK)
            try:
                decoded = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                return "undecodable", quotes
            if "\x00" in decoded:
                return "nul", quotes
            if BOM in decoded[1 if first and text.encoding == "utf-8-sig" else 0 :]:
                return "bom", quotes
            quotes = quotes or '"' in decoded
            first = False
            if not chunk:
                return None, quotes


def advice(kind: Trouble, text: TextFile) -> str:
    """What a message says of a cell with `kind` of trouble."""
    if kind == "undecodable":
        other = "its true encoding, such as latin-1 or gb18030," if text.encoding == "utf-8" else "another encoding"
        return f"bytes that are not {text.encoding.upper()}; give {other} as schema.encoding, or convert the file"
    if kind == "nul":
        return "a NUL byte; remove it, or convert the file to plain text"
    return "a byte order mark inside the file, perhaps where files were joined; remove it"


def is_troubled(value: str, kind: Trouble) -> bool:
    return {"undecodable": MARK, "nul": "\x00", "bom": BOM}[kind] in value


def to_utf8(text: TextFile, workdir: Path) -> TextFile:
    """The same text as UTF-8, in a new file in `workdir` if need be. Call it once `trouble` found none."""
    if text.encoding == "utf-8":
        return text
    out = workdir / "text.utf-8"
    decoder = codecs.getincrementaldecoder(text.encoding)()
    with text.path.open("rb") as source, out.open("wb") as target:
        while True:
            chunk = source.read(CHUNK)
            target.write(decoder.decode(chunk, final=not chunk).encode())
            if not chunk:
                return TextFile(out)


def numbered(text: TextFile) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that are not blank; InvalidInput for one that is too long."""
    row = 0
    for number, line in enumerate(text.lines(MAX_ROW + 1), start=1):
        if len(line) > MAX_ROW:
            raise fault(f"the line has more than {MAX_ROW} characters", row=row + 1, line=number, field=1)
        if line.strip():
            row += 1
            yield number, line
