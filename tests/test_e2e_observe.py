"""The real server's figures: they outlive a killed gateway, and predictions go on while the catalog is locked."""

from __future__ import annotations

import json
import signal
import sqlite3
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server import RunningServer, until
from tests.test_e2e_faults import ROW, answers, prepare

PREDICT = "/api/v1/deployments/iris/predict"


def scraped(server: RunningServer) -> dict[str, dict[tuple[str, ...], float]]:
    with server.http() as client:
        text = client.get("/metrics").raise_for_status().text
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def answered(server: RunningServer) -> float:
    requests = scraped(server)["modelworks_requests_total"]
    return sum(count for labels, count in requests.items() if "200" in labels)


def logged(server: RunningServer) -> list[dict[str, Any]]:
    """The request log's lines of predictions."""
    lines = map(json.loads, (server.home / "logs" / "requests.log").read_text().splitlines())
    return [line for line in lines if line.get("operation") == "deployments.predict"]


@pytest.mark.slow
def test_what_the_server_says_of_itself(server: RunningServer) -> None:
    prepare(server)
    with server.http() as client:
        for _ in range(25):
            client.post(PREDICT, json={"inputs": [ROW]}).raise_for_status()
        first = until(lambda: scraped(server).get("modelworks_replica_memory_bytes"), 10)
        assert answered(server) == 25
        until(lambda: min(scraped(server)["modelworks_replica_memory_bytes"].values()) > 1e6, 10)
        assert len(first) == 1
        found = scraped(server)
        assert found["modelworks_replicas"] == {("iris", "default"): 1.0}
        assert found["modelworks_gateways"] == {(): float(len(server.processes("gateway")))}
        assert found["modelworks_jobs"]["default", "succeeded"] == 2.0
        (deployment,) = client.get("/api/v1/status").json()["deployments"]
        assert deployment["requests_per_second"] >= 0

        # the catalog locked by somebody else: predictions and figures go on
        other = sqlite3.connect(server.home / "catalog.sqlite", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        try:
            for _ in range(500):
                client.post(PREDICT, json={"inputs": [ROW]}).raise_for_status()
            assert answered(server) == 525
        finally:
            other.execute("ROLLBACK")
            other.close()

    # a killed gateway's counts and lines stay, but for its last moment
    until(lambda: len(logged(server)) == 525, 5)
    (gateway, *_) = server.processes("gateway")
    gateway.send_signal(signal.SIGKILL)
    until(lambda: gone_and_back(server, gateway.pid), 20)
    assert answered(server) == 525
    assert until(lambda: answers(server), 10)
    assert answered(server) == 526

    # and a restart of everything
    assert answers(server)
    server.stop()
    lines = logged(server)  # the last ones are written on the way out
    assert len(lines) == 527
    assert {(line["status"], line["rows"], line["model_version"]) for line in lines} == {(200, 1, "iris:1")}
    text = (server.home / "logs" / "requests.log").read_text()
    assert "sepal" not in text
    assert server.key not in text
    server.restart()
    assert until(lambda: answers(server), 15)
    assert answered(server) == 528


def gone_and_back(server: RunningServer, pid: int) -> bool:
    try:
        return bool(scraped(server)) and all(process.pid != pid for process in server.processes("gateway"))
    except httpx2.HTTPError:
        return False
