"""Blobs: named by their digest, whole or not there, and nothing outside of their folder."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from modelworks.core.errors import InvalidInput, NotFound
from modelworks.store.blobs import Blobs

DAY = 86_400.0
WRITER = """
import os, signal, sys
from pathlib import Path
from modelworks.store.blobs import Blobs
def chunks():
    yield b"x" * (1 << 20)
    print("half", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    yield b"never"
Blobs(Path(sys.argv[1])).put_chunks(chunks())
"""


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "blobs")


def make_old(blobs, digest, seconds=2 * DAY):
    then = time.time() - seconds
    os.utime(blobs.path(digest), (then, then))


def test_bytes_come_back_under_their_digest(blobs):
    digest = blobs.put_bytes(b"petals")
    assert digest == hashlib.sha256(b"petals").hexdigest()
    assert blobs.get(digest) == b"petals"
    assert blobs.size(digest) == 6
    assert blobs.exists(digest)
    assert list(blobs.digests()) == [digest]
    assert blobs.put_bytes(b"petals") == digest  # twice is once
    assert list(blobs.digests()) == [digest]


@pytest.mark.parametrize("move", [False, True])
def test_a_file_is_kept(blobs, tmp_path, move):
    source = tmp_path / "table.csv"
    source.write_bytes(b"a,b\n1,2\n")
    digest = blobs.put_file(source, move=move)
    assert blobs.get(digest) == b"a,b\n1,2\n"
    assert source.exists() is not move
    if not move:
        source.write_bytes(b"changed")
        assert blobs.get(digest) == b"a,b\n1,2\n"


def test_a_blob_is_not_writable(blobs):
    assert blobs.path(blobs.put_bytes(b"x")).stat().st_mode & 0o777 == 0o400


def test_a_crash_while_writing_leaves_no_half_blob(blobs):
    writer = subprocess.run(
        [sys.executable, "-c", WRITER, str(blobs.root)], stdout=subprocess.PIPE, check=False, timeout=60
    )
    assert writer.returncode == -signal.SIGKILL
    assert writer.stdout == b"half\n"
    assert list(blobs.digests()) == []
    leftovers = list((blobs.root / "tmp").iterdir())
    assert len(leftovers) == 1
    os.utime(leftovers[0], (0, 0))
    blobs.collect(set())
    assert list((blobs.root / "tmp").iterdir()) == []


def test_an_error_while_writing_leaves_nothing(blobs):
    def chunks():
        yield b"half"
        raise OSError("the client went away")

    with pytest.raises(OSError, match="went away"):
        blobs.put_chunks(chunks())
    assert list(blobs.digests()) == []
    assert list((blobs.root / "tmp").iterdir()) == []


def test_collection_spares_the_marked_and_the_young(blobs):
    marked, old, young = (blobs.put_bytes(name) for name in (b"marked", b"old", b"young"))
    make_old(blobs, marked)
    make_old(blobs, old)
    make_old(blobs, young, DAY / 2)
    assert blobs.collect({marked}) == 1
    assert blobs.exists(marked)
    assert blobs.exists(young)
    assert not blobs.exists(old)
    with pytest.raises(NotFound):
        blobs.get(old)


def test_putting_an_old_blob_again_makes_it_young(blobs):
    digest = blobs.put_bytes(b"again")
    make_old(blobs, digest)
    blobs.put_bytes(b"again")
    assert blobs.collect(set()) == 0
    assert blobs.exists(digest)


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a" * 63,
        "A" * 64,
        "a" * 65,
        "../" + "a" * 61,
        "a" * 64 + "\n",
        "%2e%2e",
    ],
)
@pytest.mark.parametrize("verb", ["get", "path", "exists", "size"])
def test_what_is_not_a_digest_is_refused(blobs, verb, digest):
    with pytest.raises(InvalidInput):
        getattr(blobs, verb)(digest)
