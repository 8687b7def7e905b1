"""Row 9: archives that break out or blow up. A package's import writes nothing outside and no more than is declared."""

from __future__ import annotations

import stat
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.ml.build import MAX_MANIFEST, import_package
from tests.server import until
from tests.threats.conftest import Estate
from tests.threats.hostile_files import bomb, crowd, entries_of, million, with_entry, zipped
from tests.threats.probe import together

MIB = 1024 * 1024
MODELS = "/api/v1/models/threats-archive/versions"
OUTSIDE = (
    "../evil",
    "files/../../evil",
    "/tmp/threats-evil",
    "files\\..\\evil",
    "C:\\evil",
    "files/.",
    "files/..",
    "files//x",
)

SLIPS: dict[str, Callable[[bytes], bytes]] = {
    **{f"entry {name}": (lambda package, name=name: with_entry(package, name)) for name in OUTSIDE},
    "a link": lambda package: with_entry(package, "files/link", b"/etc/passwd", mode=stat.S_IFLNK),
    "a device": lambda package: with_entry(package, "files/device", mode=stat.S_IFCHR),
    "a pipe": lambda package: with_entry(package, "files/pipe", mode=stat.S_IFIFO),
    "a folder": lambda package: with_entry(package, "files/folder/", b"", mode=stat.S_IFDIR),
    "the graph twice": lambda package: with_entry(package, "files/model.onnx"),
    "a name with NUL": lambda package: with_entry(package, "files/a\0b"),
}
BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "a graph 1000:1": lambda package: bomb(package, "files/model.onnx", 32 * MIB, zipfile.ZIP_DEFLATED),
    "a graph 10000:1": lambda package: bomb(package, "files/model.onnx", 128 * MIB, zipfile.ZIP_BZIP2),
    "a manifest 1000:1": lambda package: bomb(package, "manifest.json", 128 * MIB, zipfile.ZIP_DEFLATED),
    "a million entries": lambda package: million(),
    "5000 entries": lambda package: crowd(5000),
    "an archive in an archive": lambda package: zipped({"manifest.json": package, "files/a.zip": package}),
}


@pytest.fixture(scope="module")
def package(estate: Estate) -> bytes:
    with estate.probe() as probe:
        answer = probe.get("/api/v1/models/iris/versions/1/export")
    assert answer.status_code == 200
    return answer.content


@pytest.fixture(scope="module")
def bombs(package: bytes) -> dict[str, bytes]:
    return {kind: make(package) for kind, make in BOMBS.items()}


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that Python held at once inside of the block, as its one item."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
    finally:
        found.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def test_the_package_itself_is_fine(package: bytes, tmp_path: Path) -> None:
    (tmp_path / "fine").write_bytes(zipped(entries_of(package)))
    import_package(tmp_path / "fine", tmp_path)


@pytest.mark.parametrize("kind", SLIPS)
def test_nothing_is_written_outside(kind: str, package: bytes, tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (tmp_path / "hostile").write_bytes(SLIPS[kind](package))
    with pytest.raises(InvalidInput):
        import_package(tmp_path / "hostile", inside)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found <= {"hostile", "a", "a/b", "a/b/model.onnx"}
    assert not Path("/tmp/threats-evil").exists()


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_within_bounds(kind: str, bombs: dict[str, bytes], tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "bomb").write_bytes(bombs[kind])
    began = time.monotonic()
    with peak() as memory, pytest.raises(ModelworksError) as caught:
        import_package(tmp_path / "bomb", inside)
    assert caught.value.status in (400, 413), caught.value
    assert time.monotonic() - began < 5
    assert memory[0] < 3 * MAX_MANIFEST, "memory grows with what the archive unpacks to"
    assert sum(path.stat().st_size for path in inside.rglob("*")) < 2 * MIB


def test_the_server_refuses_them_and_keeps_nothing(estate: Estate, package: bytes, bombs: dict[str, bytes]) -> None:
    home = estate.server.home
    slips = {kind: SLIPS[kind](package) for kind in ("entry ../evil", "a link")}
    sent = slips | {kind: bombs[kind] for kind in ("a graph 10000:1", "a manifest 1000:1")}
    outside = sorted(path for path in home.parent.rglob("*") if home not in path.parents)
    before = set((home / "blobs").rglob("*"))
    with estate.probe() as probe:
        began = time.monotonic()
        calls = [lambda one=one: probe.post(MODELS, files={"file": ("x.zip", one)}) for one in sent.values()]
        for kind, answer in zip(sent, together(calls, threads=3), strict=True):
            assert answer.status_code in (400, 413, 415), (kind, answer.status_code, answer.text[:500])
            assert answer.json()["code"] != "internal", kind
        assert time.monotonic() - began < 30
        assert probe.get("/api/v1/models/threats-archive").status_code == 404
    assert sorted(path for path in home.parent.rglob("*") if home not in path.parents) == outside
    until(lambda: not list((home / "tmp").iterdir()), 10)
    stored = max(
        (path.stat().st_size for path in set((home / "blobs").rglob("*")) - before if path.is_file()), default=0
    )
    assert stored < 10 * MIB, "what a bomb unpacked to was kept"
