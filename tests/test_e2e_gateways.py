"""Several gateways on one port: one limit, one revocation for all; one of them is killed under load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.server import RunningServer, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = RunningServer(tmp_path_factory.mktemp("gateways") / "home", "--gateways", "2")
    until(lambda: len(server.processes("gateway")) == 2, 10)
    yield server
    server.stop()
    assert not server.left_behind()


def key(server: RunningServer, name: str, **spec: object) -> dict:
    with server.http() as http:
        made = http.post("/api/v1/keys", json={"name": name, "role": "viewer", **spec})
    assert made.status_code == 201, made.text
    return made.json()


def owners(server: RunningServer, connections: list[httpx2.Client]) -> set[int]:
    """The gateways that hold the connections, by the sockets they have."""
    port = int(server.url.rsplit(":", 1)[1])
    found = set()
    for process in server.processes("gateway"):
        if any(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in process.net_connections()):
            found.add(process.pid)
    return found


def test_limits_and_revocations_hold_across_gateways(two: RunningServer) -> None:
    made = key(two, "limited", requests_per_minute=30)
    connections = [two.http(made["key"]) for _ in range(24)]
    try:
        begun = time.monotonic()
        statuses = [connection.get("/api/v1/models").status_code for connection in connections * 3]
        elapsed = time.monotonic() - begun
        assert owners(two, connections) == {process.pid for process in two.processes("gateway")}
        assert 30 <= statuses.count(200) <= 30 + elapsed / 2 + 1
        assert set(statuses) == {200, 429}
        free = key(two, "free")
        for connection in connections:
            connection.headers["authorization"] = f"Bearer {free['key']}"
            assert connection.get("/api/v1/models").status_code == 200
        with two.http() as http:
            assert http.delete(f"/api/v1/keys/{free['id']}").status_code in (200, 204)
        time.sleep(1.0)  # the promise: within a second, everywhere
        assert {connection.get("/api/v1/models").status_code for connection in connections} == {401}
    finally:
        for connection in connections:
            connection.close()


def test_a_killed_gateway_is_replaced_and_the_other_keeps_answering(two: RunningServer) -> None:
    first, second = two.processes("gateway")
    first.kill()
    failed = 0
    replaced = False
    end = time.monotonic() + 15
    while time.monotonic() < end and not replaced:
        with two.http() as http:  # a new connection each
            try:
                assert http.get("/api/v1/models").status_code == 200
            except httpx2.TransportError:
                failed += 1
        replaced = len([process for process in two.processes("gateway") if process.pid != first.pid]) == 2
    assert replaced
    assert failed <= 1, "what was queued at the dead one's door, at most"
    assert second.is_running()


def test_the_home_has_no_file_of_the_shared_limits(two: RunningServer) -> None:
    assert not list(Path(two.home, "run").glob("limits-*"))
