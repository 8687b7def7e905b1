"""The first start: one random key, kept once, whatever the moment at which the power goes."""

from __future__ import annotations

import json
import os
import stat

import pytest

from modelworks import server
from modelworks.control import access as module
from modelworks.control.access import Access
from modelworks.core.errors import CatalogUnavailable
from modelworks.core.types import Caller, Key, Project
from modelworks.security.identity import Authenticator, Secret, new_key
from modelworks.store.catalog import Catalog, Tx


class Crash(BaseException):
    """The power goes."""


class Home:
    def __init__(self, root) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        self.file = root / "admin.key"

    def start(self) -> str | None:
        catalog = Catalog(self.root / "catalog.sqlite")
        try:
            catalog.migrate()
            return Access(catalog, Secret.load_or_create(self.root / "secret.key")).bootstrap(self.root)
        finally:
            catalog.close()

    def rows(self, noun) -> list:
        catalog = Catalog(self.root / "catalog.sqlite")
        with catalog.read() as tx:
            rows = tx.list(noun)
        catalog.close()
        return rows

    def caller(self, text: str) -> Caller:
        catalog = Catalog(self.root / "catalog.sqlite")
        try:
            secret = Secret.load_or_create(self.root / "secret.key")
            return Caller(Authenticator(catalog, secret).authenticate(f"Bearer {text}"))
        finally:
            catalog.close()


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def test_the_first_start_makes_one_key_and_the_next_ones_none(home):
    text = home.start()
    assert home.file.read_text() == f"{text}\n"
    assert stat.S_IMODE(home.file.stat().st_mode) == 0o600
    assert home.start() is None
    assert home.start() is None
    assert [project.name for project in home.rows(Project)] == ["default"]
    assert [(key.name, key.role) for key in home.rows(Key)] == [("admin", "admin")]
    principal = home.caller(text).principal
    assert {"projects:write", "users:write", "keys:write", "invoke"} <= principal.scopes


def test_two_installs_share_nothing(tmp_path):
    one, other = Home(tmp_path / "one"), Home(tmp_path / "other")
    first, second = one.start(), other.start()
    assert first != second
    assert (one.root / "secret.key").read_bytes() != (other.root / "secret.key").read_bytes()
    assert {key.digest for key in one.rows(Key)}.isdisjoint(key.digest for key in other.rows(Key))
    with pytest.raises(Exception, match="not valid here"):
        other.caller(first)


def crash_before_file(monkeypatch):
    monkeypatch.setattr(module, "write_private", crash)


def crash_while_renaming(monkeypatch):
    monkeypatch.setattr(os, "fsync", crash)


def crash_after_file(monkeypatch):
    original = module.write_private

    def write_then_crash(path, content):
        original(path, content)
        raise Crash

    monkeypatch.setattr(module, "write_private", write_then_crash)


def crash_in_the_transaction(monkeypatch):
    monkeypatch.setattr(module.audit, "record", crash)


def crash_at_the_first_project(monkeypatch):
    monkeypatch.setattr(Tx, "add", crash)


def crash(*args, **fields):
    raise Crash


@pytest.mark.parametrize(
    "at",
    [crash_at_the_first_project, crash_before_file, crash_while_renaming, crash_after_file, crash_in_the_transaction],
)
def test_a_crash_in_the_first_start_is_made_good_by_the_next(home, at):
    home_secret = Secret.load_or_create(home.root / "secret.key")
    assert home_secret
    with pytest.MonkeyPatch.context() as patch:
        at(patch)
        with pytest.raises(Crash):
            home.start()
    left = home.file.read_text().strip() if home.file.exists() else None
    text = home.start()
    assert text is not None
    if left:
        assert text == left  # what the file said before the crash is what is valid now
    assert home.file.read_text() == f"{text}\n"
    assert len(home.rows(Key)) == 1
    assert home.caller(text).principal.role == "admin"
    assert home.start() is None


def test_a_key_that_lay_there_for_others_to_read_is_not_taken(home):
    planted = new_key()
    home.file.write_text(f"{planted}\n")
    home.file.chmod(0o644)
    text = home.start()
    assert text != planted
    assert home.file.read_text() == f"{text}\n"
    assert stat.S_IMODE(home.file.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "admin", "mw_short", "mw_" + "x" * 100, "\x00" * 10_000])
def test_a_file_that_holds_no_key_is_replaced(home, content):
    home.file.write_text(content)
    home.file.chmod(0o600)
    text = home.start()
    assert home.file.read_text() == f"{text}\n"


def test_a_link_is_not_followed(home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(f"{new_key()}\n")
    elsewhere.chmod(0o600)
    before = elsewhere.read_text()
    home.file.symlink_to(elsewhere)
    text = home.start()
    assert not home.file.is_symlink()
    assert home.file.read_text() == f"{text}\n"
    assert elsewhere.read_text() == before
    assert text not in before


def test_when_no_administrators_key_is_valid_any_more_the_next_start_makes_one(home):
    first = home.start()
    catalog = Catalog(home.root / "catalog.sqlite")
    with catalog.write() as tx:
        tx.update(tx.find(Key), expires_at=1.0)
    catalog.close()
    second = home.start()
    assert second not in (None, first)
    assert home.file.read_text() == f"{second}\n"
    assert home.caller(second).principal.role == "admin"
    with pytest.raises(Exception, match="expired"):
        home.caller(first)


def test_a_busy_catalog_makes_no_key(home):
    home.start()
    catalog = Catalog(home.root / "catalog.sqlite", busy_timeout=0.05)
    secret = Secret.load_or_create(home.root / "secret.key")
    blocker = Catalog(home.root / "catalog.sqlite")
    with blocker.write(), pytest.raises(CatalogUnavailable):
        Access(catalog, secret).bootstrap(home.root)
    catalog.close()
    blocker.close()
    assert len(home.rows(Key)) == 1


def test_a_server_that_stops_leaves_the_address_of_another(tmp_path) -> None:
    home = server.Home(tmp_path)
    for pid, stays in ((os.getpid() + 1, True), (os.getpid(), False)):
        home.address.write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": pid}))
        home.forget_address()
        assert home.address.exists() is stays
    home.forget_address()
