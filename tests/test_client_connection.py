"""Which server, with which key; and that importing the SDK stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelworks.client import Client, locate
from modelworks.core.errors import InvalidInput, Unauthenticated, Unavailable


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MODELWORKS_URL", "MODELWORKS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELWORKS_HOME", str(tmp_path))
    (tmp_path / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": os.getpid()}))
    (tmp_path / "admin.key").write_text("mw_home\n")
    return tmp_path


def test_the_local_home_comes_last(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate()
    assert (found.url, found.key, found.key_file) == ("http://127.0.0.1:9", "mw_home", home / "admin.key")
    monkeypatch.setenv("MODELWORKS_URL", "https://models.example.org/")
    monkeypatch.setenv("MODELWORKS_API_KEY", "mw_env")
    found = locate()
    assert (found.url, found.key, found.key_source) == ("https://models.example.org", "mw_env", "environment")
    found = locate("http://10.0.0.1:8000", "mw_arg")
    assert (found.url, found.key, found.key_source) == ("http://10.0.0.1:8000", "mw_arg", "argument")
    assert locate(home=home).key == "mw_home"


def test_a_homes_key_is_given_to_its_own_server_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELWORKS_URL", "http://elsewhere.example.org")
    with pytest.raises(Unauthenticated, match="MODELWORKS_API_KEY"):
        locate()
    with pytest.raises(Unauthenticated):
        locate("http://127.0.0.1:8000", home=home)
    assert locate("http://127.0.0.1:9", home=home).key == "mw_home"


def test_a_server_that_is_gone_is_not_called(home: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (home / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": child.pid}))
    with pytest.raises(Unavailable, match="modelworks up"):
        locate()


def test_the_key_is_in_no_repr(home: Path) -> None:
    with Client() as client:
        assert "mw_home" not in repr(client.connection)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://user:pw@host", "http://host/?q=1"])
def test_a_bad_address_is_refused(home: Path, url: str) -> None:
    with pytest.raises(InvalidInput):
        locate(url, "mw_x")


def test_a_key_cannot_smuggle_a_header(home: Path) -> None:
    with pytest.raises(Unauthenticated):
        locate("http://127.0.0.1:9", "mw_x\r\nx-project: other")


def test_a_bad_environment_variable_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELWORKS_PORT", "many")
    with pytest.raises(InvalidInput, match="MODELWORKS_PORT"):
        locate()


HEAVY = ("httpx2", "pydantic", "typer", "rich", "numpy", "fastapi", "sqlalchemy", "pyarrow", "onnxruntime", "sklearn")


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("import modelworks", HEAVY),
        ("from modelworks.cli.app import app", tuple(name for name in HEAVY if name != "typer")),
        (
            "from modelworks import Client, AsyncClient, __version__",
            ("rich", "typer", "numpy", "fastapi", "sqlalchemy", "pyarrow"),
        ),
    ],
)
def test_imports_stay_light(code: str, refused: tuple[str, ...]) -> None:
    check = f"{code}; import sys; print(','.join(name for name in {refused!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
