"""Row 18: key handling. Kept as keyed hashes, shown once, revoked within a second, and nowhere to be found."""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.server import until
from tests.test_e2e_lifecycle import ROW
from tests.threats.conftest import Estate
from tests.threats.probe import Probe, Wire, head
from tests.threats.walk import guarded

SECONDS = 1.0


def files(home: Path) -> Iterator[Path]:
    for path in home.rglob("*"):
        if path.is_file() and path.name != "admin.key":
            yield path


def found_in(home: Path, needles: dict[str, bytes]) -> list[str]:
    """Which of the needles stand in which files, in whatever is on the disk by now."""
    seen = []
    for path in files(home):
        data = path.read_bytes()
        seen += [f"{who} in {path.relative_to(home)}" for who, needle in needles.items() if needle in data]
    return seen


def new_key(probe: Probe, **spec: object) -> tuple[str, str]:
    made = probe.post("/api/v1/keys", json={"name": "threats-key", "role": "developer", **spec})
    assert made.status_code == 201, made.text
    return made.json()["key"], made.json()["id"]


def test_no_key_is_anywhere_in_the_home(estate: Estate) -> None:
    """Not after use, misuse, in a wrong place, or with an error."""
    with estate.probe() as probe:
        key, _ = new_key(probe)
        wrong = "mw_" + "Zz9-" * 10 + "abc"
        for text in (key, wrong):
            with estate.probe(None) as client:
                bearer = {"authorization": f"Bearer {text}"}
                client.get("/api/v1/whoami", headers=bearer)
                client.get(f"/api/v1/nowhere/{text}", headers=bearer)
                client.get("/api/v1/jobs", params={"after": text}, headers=bearer)
                client.post("/api/v1/training-jobs", content="{", headers=bearer)
                client.post("/api/v1/deployments/iris/predict", json={"inputs": [ROW]}, headers=bearer)
                client.get("/api/v1/whoami", headers={"cookie": text, "x-api-key": text})
        keys = {who: text.encode() for who, text in estate.keys.items()} | {
            "new": key.encode(),
            "wrong": wrong.encode(),
        }
    assert (estate.server.home / "admin.key").read_bytes().strip() == keys["admin"]
    time.sleep(0.5)  # logs are written beside the answers
    assert found_in(estate.server.home, keys) == []
    bodies = {who: key.removeprefix(b"mw_") for who, key in keys.items()}
    assert found_in(estate.server.home, bodies) == [], "without its prefix"


def test_no_key_and_no_secret_is_in_a_process(estate: Estate) -> None:
    """Arguments and environments can be read by others of the machine."""
    secret = (estate.server.home / "secret.key").read_bytes()
    needles = [key.encode() for key in estate.keys.values()] + [secret, secret.hex().encode()]
    processes = [process for kind in ("gateway", "worker", "replica") for process in estate.server.processes(kind)]
    assert len(processes) >= 3
    for process in processes:
        for name in ("cmdline", "environ"):
            seen = Path(f"/proc/{process.pid}/{name}").read_bytes()
            assert not [needle for needle in needles if needle in seen], (process, name)


def test_what_is_kept_is_a_keyed_hash(estate: Estate) -> None:
    secret = (estate.server.home / "secret.key").read_bytes()
    with sqlite3.connect(f"file:{estate.server.home}/catalog.sqlite?mode=ro", uri=True) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = next(name for name in names if name.lower() in ("key", "keys"))
        kept = dict(db.execute(f'SELECT id, digest FROM "{table}"').fetchall())
    for who, key_id in estate.key_ids.items():
        key = estate.keys[who].encode()
        assert kept[key_id] == hmac.digest(secret, key, "sha256").hex()
        assert kept[key_id] not in (hashlib.sha256(key).hexdigest(), hashlib.sha512(key).hexdigest())


def test_a_key_is_told_once_and_its_hash_never(estate: Estate) -> None:
    """Every list and object that the administrator can read, and the answer to the create itself."""
    with estate.probe() as probe:
        made = probe.post("/api/v1/keys", json={"name": "threats-once"})
        key = made.json()["key"]
        assert made.text.count(key) == 1
        assert made.headers["cache-control"] == "no-store"
        texts = []
        for way in guarded():
            if way.method == "GET" and not way.rule.stream:
                texts.append(probe.get(way.to(estate.values), params={"limit": 100} if not way.names else {}).text)
        everything = "\n".join(texts)
        assert "threats-once" in everything
        for secret in (key, key[3:], *estate.keys.values()):
            assert secret not in everything
        with sqlite3.connect(f"file:{estate.server.home}/catalog.sqlite?mode=ro", uri=True) as db:
            names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            table = next(name for name in names if name.lower() in ("key", "keys"))
            digests = [digest for (digest,) in db.execute(f'SELECT digest FROM "{table}"')]
        assert not [digest for digest in digests if digest in everything]


def test_a_revoked_key_is_refused_within_a_second(estate: Estate) -> None:
    """In use at full speed by each lane, on connections that stay open."""
    body = json.dumps({"inputs": [ROW]}).encode()
    more = ("content-type: application/json", f"content-length: {len(body)}")
    with estate.probe() as probe:
        key, key_id = new_key(probe)
        calls = {
            "read": head("GET", "/api/v1/models", key),
            "predict": head("POST", "/api/v1/deployments/iris/predict", key, *more) + body,
            "who": head("GET", "/api/v1/whoami", key),
        }
        wires = {name: Wire(estate.server) for name in calls}
        for name, wire in wires.items():
            assert [wire.ask(calls[name]).status for _ in range(3)] == [200] * 3, name
        assert probe.delete(f"/api/v1/keys/{key_id}").status_code == 200
        revoked = time.monotonic()
        while time.monotonic() < revoked + SECONDS:
            for name, wire in wires.items():
                wire.ask(calls[name])  # goes on, so that it stays in every memory that there is
        for name, wire in wires.items():
            assert [wire.ask(calls[name]).status for _ in range(3)] == [401] * 3, name
            wire.socket.close()


@pytest.mark.parametrize("end", ["user", "member", "expiry"])
def test_so_is_a_key_whose_right_ends_otherwise(estate: Estate, end: str) -> None:
    with estate.probe() as probe:
        user = probe.post("/api/v1/users", json={"name": f"threats-ending-{end}"}).json()["id"]
        probe.send("PUT", f"/api/v1/projects/default/members/{user}", json={"role": "developer"})
        spec = {"expires_in": 1.0} if end == "expiry" else {"user": user}
        key, _ = new_key(probe, **spec)
        with Probe(estate.server, key) as theirs:
            assert theirs.get("/api/v1/models").status_code == 200
            if end == "user":
                assert probe.delete(f"/api/v1/users/{user}").status_code == 200
            elif end == "member":
                assert probe.delete(f"/api/v1/projects/default/members/{user}").status_code == 200
            until(lambda: theirs.get("/api/v1/models").status_code == 401, SECONDS + (1.0 if end == "expiry" else 0.0))


def test_a_stream_ends_with_its_key(estate: Estate) -> None:
    """What was opened with a key is not read on after it was revoked."""
    with estate.probe() as probe:
        key, key_id = new_key(probe)
        job = probe.post(
            "/api/v1/training-jobs",
            json={
                "model": "threats-stream",
                "dataset": "iris",
                "target": "species",
                "algorithm": "logistic-regression",
            },
        ).json()["id"]
        assert probe.post(f"/api/v1/jobs/{job}/pause").status_code == 202
        until(lambda: probe.get(f"/api/v1/jobs/{job}").json()["status"] == "paused", 20)
        with (
            httpx2.Client(base_url=estate.server.url, headers={"authorization": f"Bearer {key}"}, timeout=10) as client,
            client.stream("GET", f"/api/v1/jobs/{job}/events/stream") as stream,
        ):
            assert stream.status_code == 200
            lines = stream.iter_lines()
            assert next(lines).startswith("retry")
            assert probe.delete(f"/api/v1/keys/{key_id}").status_code == 200
            began = time.monotonic()
            assert not [line for line in lines if "event: end" in line]
            assert time.monotonic() - began < 3
        probe.post(f"/api/v1/jobs/{job}/cancel")


def test_keys_cannot_be_tried_out(estate: Estate) -> None:
    """A thousand guesses: each refused alike, and neither the memory nor another client's calls suffer."""
    gateway = psutil.Process(estate.server.processes("gateway")[0].pid)
    before = gateway.memory_info().rss
    answers = set()
    with Wire(estate.server) as wire:
        for number in range(1000):
            guess = f"mw_{hashlib.sha256(str(number).encode()).hexdigest()[:43]}"
            answer = wire.ask(head("GET", "/api/v1/whoami", guess))
            body = json.loads(answer.body)
            answers.add((answer.status, body["code"], body["detail"]))
    assert answers == {(401, "unauthenticated", "this key is not valid here; check it, or ask for another")}
    assert gateway.memory_info().rss - before < 20_000_000
    with estate.probe("viewer") as probe:
        assert probe.get("/api/v1/whoami").status_code == 200
