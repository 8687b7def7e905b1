"""Archives on their way in: zip and tar, opened within bounds. Nothing in them is ever written under its own name.

Refused: names that are absolute, climb (`..`) or hold backslashes and NUL, links, devices, encrypted entries, methods but
deflate, more than MAX_ENTRIES entries, files beyond MAX_FILE, and what unpacks to RATIO times the archive.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from modelworks.core.errors import InvalidInput, PayloadTooLarge, UnsupportedMedia
from modelworks.ml.data.media import MAX_FILE

MAX_ENTRIES = 200_000
MAX_DIRECTORY = 64 << 20  # bytes of a ZIP's table of contents
RATIO = 200
LEAST = 256 << 20  # bytes that any archive may unpack to
_BLOCK = 1 << 20
_NOISE = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
_PACKED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, OSError,
    RuntimeError, ValueError,
)  # fmt: skip


class Archive:
    """The files of an archive by their names, sorted. `read` unpacks one into memory."""

    def __init__(self, path: Path, workdir: Path) -> None:
        """InvalidInput or PayloadTooLarge for an archive that is broken or breaks a bound, UnsupportedMedia for none."""
        self._limit = max(LEAST, RATIO * path.stat().st_size)
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        self._entries: dict[str, Any] = {}
        try:
            with path.open("rb") as file:
                head = file.read(4)
                if head[:2] == b"PK":
                    self._open_zip(path, file)
                else:
                    self._open_tar(_unpacked(path, head, workdir, self._limit))
        except _BROKEN as error:
            raise broken(error) from None
        self.names = sorted(self._entries)

    def size(self, name: str) -> int:
        entry = self._entries[name]
        return int(entry.file_size if self._zip else entry.size)

    def read(self, name: str) -> bytes:
        """The bytes of one file, no more than the archive declares for it."""
        entry = self._entries[name]
        try:
            if self._zip is not None:
                with self._zip.open(entry) as source:
                    data = source.read(entry.file_size + 1)
            else:
                assert self._tar is not None
                found = self._tar.extractfile(entry)
                data = found.read() if found else b""
        except _BROKEN as error:
            raise broken(error, name) from None
        if len(data) != self.size(name):
            raise broken(ValueError("it is not as long as the archive says"), name)
        return data

    def _open_zip(self, path: Path, file: BinaryIO) -> None:
        entries, length = zip_directory(file)
        if entries > MAX_ENTRIES or length > MAX_DIRECTORY:
            raise _too_many(entries)
        self._zip = zipfile.ZipFile(path)
        total = 0
        for entry in self._zip.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if entry.orig_filename != entry.filename:
                raise unsafe(entry.orig_filename)
            if entry.is_dir() and kind in (0, stat.S_IFDIR):
                check_name(entry.filename)
                continue
            if kind not in (0, stat.S_IFREG):
                raise unsafe(entry.filename, "is a link or a device")
            if entry.flag_bits & 0x1:
                raise unsafe(entry.filename, "is encrypted")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise unsafe(entry.filename, "is compressed by another method than deflate")
            total += entry.file_size
            self._add(entry.filename, entry, entry.file_size, total)

    def _open_tar(self, path: Path) -> None:
        self._tar = tarfile.TarFile(fileobj=Bounded(path.open("rb"), path.stat().st_size))  # type: ignore[arg-type]
        total = 0
        for count, entry in enumerate(self._tar, start=1):
            if count > MAX_ENTRIES:
                raise _too_many(count)
            if entry.isdir():
                check_name(entry.name)
                continue
            if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise unsafe(entry.name, "is a link or a device")
            total += entry.size
            self._add(entry.name, entry, entry.size, total)

    def _add(self, name: str, entry: Any, size: int, total: int) -> None:
        name = check_name(name)
        if name in self._entries:
            raise unsafe(name, "is there twice")
        if size > MAX_FILE and not name.lower().endswith((".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow")):
            raise PayloadTooLarge(f"the file {_shown(name)} of the archive has {size} bytes, more than {MAX_FILE}", param="file")
        if total > self._limit:
            raise PayloadTooLarge(
                f"the archive unpacks to more than {self._limit} bytes, {RATIO} times its size; send its files otherwise",
                code="archive_bomb",
                param="file",
            )
        if not any(part in _NOISE or part.startswith("._") for part in name.split("/")):
            self._entries[name] = entry


class Bounded:
    """A file whose reads are of bounded size, whatever a header inside it asks for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int = -1) -> bytes:
        if count < 0 or count > self._size - self._file.tell() + _BLOCK or count > MAX_FILE + _BLOCK:
            raise ValueError("a header asks for more than the archive has")
        return self._file.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def zip_directory(file: BinaryIO) -> tuple[int, int]:
    """(entries, bytes) of a ZIP's table of contents, read by hand: zipfile would read one of any size into memory.

    ValueError when there is none.
    """
    file.seek(0, 2)
    size = file.tell()
    file.seek(max(0, size - 65_557))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise ValueError("it is no ZIP archive")
    entries, length = struct.unpack_from("<HI", tail, at + 10)
    if b"PK\x06\x07" in tail[max(0, at - 20) : at]:  # ZIP64: the true figures stand elsewhere
        file.seek(max(0, size - len(tail) + at - 76))
        record = file.read(56)
        if record[:4] != b"PK\x06\x06":
            raise ValueError("its ZIP64 record is not where it belongs")
        entries, length = struct.unpack_from("<QQ", record, 32)
    file.seek(0)
    return entries, length


def is_archive(path: Path) -> bool:
    """Whether it is a ZIP, a tar or a compressed tar, told from its bytes."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or head[257:262] == b"ustar":
        return True
    opener = _opener(head)
    if opener is None:
        return False
    try:
        with opener(path, "rb") as inner:
            return bytes(inner.read(512))[257:262] == b"ustar"
    except _BROKEN:
        return False


def _opener(head: bytes) -> Any:
    return next((opener for magic, opener in _PACKED.items() if head.startswith(magic)), None)


def _unpacked(path: Path, head: bytes, workdir: Path, limit: int) -> Path:
    """The tar or table without its compression, within `limit`."""
    opener = _opener(head)
    if opener is None:
        return path
    out = workdir / "unpacked"
    left = limit
    with opener(path, "rb") as source, out.open("wb") as target:
        while block := source.read(_BLOCK):
            left -= len(block)
            if left < 0:
                raise PayloadTooLarge(
                    f"the archive unpacks to more than {limit} bytes, {RATIO} times its size; send its files otherwise",
                    code="archive_bomb",
                    param="file",
                )
            target.write(block)
    return out


def unpack_table(path: Path, workdir: Path) -> Path:
    """The one compressed file, within bounds; as it is when it is not compressed. InvalidInput, PayloadTooLarge."""
    with path.open("rb") as file:
        head = file.read(4)
    try:
        return _unpacked(path, head, workdir, max(LEAST, RATIO * path.stat().st_size))
    except _BROKEN as error:
        raise broken(error) from None


def check_name(name: str) -> str:
    """The name as it is used to find the file: relative, with slashes. InvalidInput for one that leads elsewhere."""
    path = PurePosixPath(name)
    if "\\" in name or "\x00" in name or len(name) > 1000 or name.startswith("/") or ".." in path.parts or ":" in name[:2]:
        raise unsafe(name)
    return str(path)


def unsafe(name: str, why: str = "leads out of the archive") -> InvalidInput:
    return InvalidInput(
        f"the entry {_shown(name)} of the archive {why}; pack plain files in plain folders", code="bad_archive", param="file"
    )


def broken(error: Exception, name: str | None = None) -> InvalidInput:
    where = f"the file {_shown(name)} in it" if name else "it"
    reason = (" ".join(str(error).split()) or type(error).__name__)[:120]
    return InvalidInput(
        f"the archive is damaged: {where} cannot be read ({reason}); pack it again", code="bad_archive", param="file"
    )


def _too_many(count: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the archive lists {count} entries, more than {MAX_ENTRIES}; split it", code="bad_archive", param="file"
    )


def _shown(name: str) -> str:
    return repr(name[:80]) + ("..." if len(name) > 80 else "")


def refuse_other(names: list[str]) -> UnsupportedMedia:
    """What to say of an archive without anything to learn from."""
    if "[Content_Types].xml" in names:
        what = "an Office document; save it as CSV"
    elif any(name.endswith("data.pkl") for name in names):
        what = "a PyTorch checkpoint, which can run code and is never read"
    else:
        what = "an archive without images, sounds, texts or a table; put them into one folder for each class"
    return UnsupportedMedia(f"the file is {what}", param="file")
