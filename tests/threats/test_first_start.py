"""Row 6: default passwords. A fresh install has a secret and a key of its own, shown once and kept private."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.server import RunningServer
from tests.threats.probe import together

KEY = re.compile(r"mw_[A-Za-z0-9_-]{43}")
GUESSES = ("admin", "password", "mw_admin", "mw_" + "0" * 43, "mw_" + "a" * 43, "changeme", "sk-1234", "root", "test")


@pytest.fixture(scope="module")
def installs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    """Two fresh ones, stopped when the tests of this file are done."""
    homes = [tmp_path_factory.mktemp("install") / "home" for _ in range(2)]
    servers = together([lambda home=home: RunningServer(home) for home in homes], threads=2)
    yield servers
    for server in servers:
        server.stop()


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def test_two_installs_share_no_secret(installs: list[RunningServer]) -> None:
    one, other = (server.home for server in installs)
    for name in ("admin.key", "secret.key"):
        assert (one / name).read_bytes() != (other / name).read_bytes()
    keys = [server.key for server in installs]
    assert all(KEY.fullmatch(key) for key in keys)
    assert len(set(keys[0])) > 15, "not random"
    for server, key in zip(installs, reversed(keys), strict=True):
        with server.http(key) as client:
            assert client.get("/api/v1/whoami").status_code == 401


def test_what_is_secret_is_its_owners_only(installs: list[RunningServer]) -> None:
    for server in installs:
        assert mode(server.home) == "0700"
        assert {mode(server.home / name) for name in ("admin.key", "secret.key")} == {"0600"}
        # whatever else lies there is behind the home's own mode; nothing may be writable by others even so
        for path in server.home.rglob("*"):
            if not path.is_symlink():
                assert not path.stat().st_mode & 0o022, f"{path} is {mode(path)}"


def test_nothing_that_one_could_guess_is_a_key(installs: list[RunningServer]) -> None:
    server = installs[0]
    secret = (server.home / "secret.key").read_bytes()
    derived = (secret.hex(), hashlib.sha256(secret).hexdigest(), str(server.home), server.url)
    with httpx2.Client(base_url=server.url) as client:
        for guess in (*GUESSES, *derived):
            for scheme in ("Bearer", "Basic"):
                headers = {"authorization": f"{scheme} {guess}"}
                assert client.get("/api/v1/whoami", headers=headers).status_code == 401, guess
        # and nobody becomes the administrator by being the first to come
        for path in ("/setup", "/api/v1/setup", "/api/v1/users", "/api/v1/keys", "/register", "/login"):
            assert client.post(path, json={"name": "admin", "password": "x"}).status_code == 401, path


def test_the_key_is_printed_once_and_never_again(installs: list[RunningServer]) -> None:
    server = installs[1]
    key = server.key
    first = server.stop()
    assert KEY.findall(first) == [key]
    server.restart()
    with server.http() as client:
        assert client.get("/api/v1/whoami").status_code == 200
    second = server.stop()
    assert "is up at" in second
    assert not KEY.findall(second)
    assert server.key == key, "a restart made another key"
