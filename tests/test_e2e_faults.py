"""Pulling the plug: kill -9 of every kind of process, at moments nobody chose, loses nothing that was acknowledged."""

from __future__ import annotations

import random
import signal
import time

import pytest

from modelworks.core.errors import ModelworksError
from tests.server import RunningServer, until

ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}
LONG = {"kfold": 5, "repeats": 12}  # some seconds of training, a checkpoint after each fold


def prepare(server: RunningServer) -> None:
    client = server.client
    client.datasets.create(name="iris", source="sklearn:iris")
    job = client.training_jobs.create(model="iris", dataset="iris", target="species", algorithm="logistic-regression")
    assert client.training_jobs.wait(job).status == "succeeded"
    client.deployments.put("iris", model="iris")
    client.deployments.wait_ready("iris")


def answers(server: RunningServer) -> bool:
    try:
        return server.client.deployments.predict("iris", [ROW]).outputs[0].label == "setosa"
    except (ModelworksError, OSError):
        return False


def long_job(server: RunningServer, name: str):
    return server.client.training_jobs.create(
        model=name, dataset="iris", target="species", algorithm="gradient-boosted-trees", validation=LONG
    )


def test_sigterm_stops_everything_cleanly(server: RunningServer) -> None:
    prepare(server)
    assert len(server.processes("replica")) == 1
    server.stop()
    assert server.process.returncode == 0
    assert server.left_behind() == []
    assert not server.address.exists()


@pytest.mark.slow
def test_kill_of_the_server_leaves_no_orphan_and_a_restart_serves_again(server: RunningServer) -> None:
    prepare(server)
    before = server.client.deployments.predict("iris", [ROW]).outputs
    job = long_job(server, "resumed")
    until(lambda: server.client.training_jobs.get(job.id).progress > 0.1, 30)
    server.kill()
    until(lambda: server.left_behind() == [], 2)
    server.restart()
    until(lambda: answers(server), 10)
    assert server.client.deployments.predict("iris", [ROW]).outputs == before
    done = server.client.training_jobs.wait(job.id, timeout=120)
    assert (done.status, done.model_version) == ("succeeded", "resumed:1")
    unbroken = server.client.training_jobs.wait(long_job(server, "unbroken"), timeout=120)
    assert done.metrics == unbroken.metrics
    digests = [server.client.models.version(name).lineage["dataset_digest"] for name in ("resumed", "unbroken")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_kill_of_worker_child_and_replica_at_random_points(server: RunningServer) -> None:
    """Chaos: a job runs and calls go in while processes are killed at random; all ends as if nothing had happened."""
    prepare(server)
    chance = random.Random(0)
    job = long_job(server, "chaos")
    for kind in ("job", "replica", "worker", "gateway", "job", "replica"):
        time.sleep(chance.uniform(0.1, 1.2))
        for process in server.processes(kind):
            process.send_signal(signal.SIGKILL)
    until(lambda: answers(server), 10)
    done = server.client.training_jobs.wait(job.id, timeout=120)
    assert done.status == "succeeded", done.error
    versions = server.client.models.get("chaos").versions
    assert [version.version for version in versions] == [1]
    events = server.client.training_jobs.events(done.id)
    assert sum(event.kind == "status" and event.data.get("status") == "succeeded" for event in events) <= 1


@pytest.mark.slow
def test_a_hung_replica_is_replaced_without_anyones_doing(server: RunningServer) -> None:
    prepare(server)
    (replica,) = server.processes("replica")
    replica.send_signal(signal.SIGSTOP)
    until(lambda: [process.pid for process in server.processes("replica")] not in ([], [replica.pid]), 20)
    until(lambda: answers(server), 10)


def test_a_second_server_on_the_same_home_is_refused(server: RunningServer) -> None:
    with pytest.raises(AssertionError, match="already runs on"):
        RunningServer.start(_twin(server))
    assert server.client.status()


def _twin(server: RunningServer) -> RunningServer:
    twin = RunningServer.__new__(RunningServer)
    twin.home, twin.arguments, twin.workers = server.home, (), 1
    server_json = server.address.read_bytes()
    twin.__class__ = type("Twin", (RunningServer,), {"address": server.home / "twin.json"})
    assert server_json
    return twin


def test_revocation_takes_effect_within_a_second(server: RunningServer) -> None:
    prepare(server)
    made = server.client.keys.create(name="shop", role="invoke-only")
    body = {"inputs": [ROW]}
    with server.http(made.key) as shop:
        path = "/api/v1/deployments/iris/predict"
        assert shop.post(path, json=body).status_code == 200
        assert shop.get("/api/v1/datasets").status_code == 403
        server.client.keys.revoke(made.id)
        until(lambda: shop.post(path, json=body).status_code == 401, 1.0)
