"""The blobs: bytes named by their SHA-256 in a local folder. Written aside, fsynced, renamed; never changed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from modelworks.core.errors import InvalidInput, NotFound

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20


class Blobs:
    """`root` holds `ab/abcdef...` files and `tmp/` for what is being written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tmp = root / "tmp"
        self._tmp.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, digest: str) -> Path:
        """The file that holds `digest`; NotFound when there is none."""
        path = self._place(digest)
        if not path.exists():
            raise NotFound(f"blob {digest[:12]} is not in the store", code="blob_not_found")
        return path

    def exists(self, digest: str) -> bool:
        return self._place(digest).exists()

    def size(self, digest: str) -> int:
        return self.path(digest).stat().st_size

    def get(self, digest: str) -> bytes:
        return self.path(digest).read_bytes()

    def put_bytes(self, data: bytes) -> str:
        return self.put_chunks([data])

    def put_file(self, path: Path, *, move: bool = False) -> str:
        """Keep a copy of `path`, or with `move` the file itself when it lies on the same file system."""
        if move and path.stat().st_dev == self.root.stat().st_dev:
            with path.open("rb+") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            self._settle(path, digest)
            return digest
        with path.open("rb") as file:
            digest = self.put_stream(file)
        if move:
            path.unlink()
        return digest

    def put_stream(self, file: BinaryIO) -> str:
        return self.put_chunks(iter(lambda: file.read(_CHUNK), b""))

    def put_chunks(self, chunks: Iterable[bytes]) -> str:
        """Keep the bytes; returns their digest. What is there already is not written again."""
        sha = hashlib.sha256()
        handle, name = tempfile.mkstemp(dir=self._tmp)
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    sha.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            self._settle(Path(name), sha.hexdigest())
        finally:
            Path(name).unlink(missing_ok=True)
        return sha.hexdigest()

    def scratch(self, prefix: str = "work-") -> Path:
        """A fresh private folder on the store's file system, for files on their way in. The caller removes it."""
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self._tmp))

    def digests(self) -> Iterator[str]:
        for folder in self.root.iterdir():
            if len(folder.name) == 2:
                yield from (file.name for file in folder.iterdir() if _DIGEST.fullmatch(file.name))

    def collect(self, marked: set[str], *, older_than: float = 86_400.0) -> int:
        """Remove blobs that are not `marked` and are older than `older_than` seconds; returns how many."""
        horizon = time.time() - older_than
        removed = 0
        for digest in list(self.digests()):
            path = self._place(digest)
            if digest not in marked and path.stat().st_mtime < horizon:
                path.unlink(missing_ok=True)
                removed += 1
        for leftover in self._tmp.iterdir():
            if leftover.stat().st_mtime < horizon:
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        return removed

    def _settle(self, source: Path, digest: str) -> None:
        target = self._place(digest)
        if target.exists():
            os.utime(target)  # young again, so that a collection under way spares it
            source.unlink()
        else:
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True, mode=0o700)
                _sync(self.root)
            source.chmod(0o400)
            source.replace(target)
        _sync(target.parent)  # also for a blob that another process put a moment ago and has not synced yet

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise InvalidInput(f"{digest[:80]!r} is not a digest", code="bad_digest")
        return self.root / digest[:2] / digest


def _sync(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
