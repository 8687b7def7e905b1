"""Autoscaling with real processes: replicas come under load and go after it, and no call fails meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.server import RunningServer, until

pytestmark = pytest.mark.slow
ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}


def test_replicas_come_with_the_load_and_go_without_it(tmp_path: Path) -> None:
    server = RunningServer(tmp_path / "home")
    try:
        with server.client as client:
            client.datasets.create("sklearn:iris", name="iris")
            job = client.training_jobs.create(
                model="iris", dataset="iris", target="species", algorithm="logistic-regression"
            )
            client.training_jobs.wait(job)
            replicas = {"min": 1, "max": 2, "target": 1, "scale_down_s": 2}
            client.deployments.put("iris", model="iris", replicas=replicas)
            client.deployments.wait_ready("iris")
        stop, statuses = threading.Event(), []

        def flood() -> None:
            with server.http() as http:
                while not stop.is_set():
                    statuses.append(http.post("/api/v1/deployments/iris/predict", json={"inputs": [ROW]}).status_code)

        floods = [threading.Thread(target=flood) for _ in range(8)]
        for thread in floods:
            thread.start()
        with server.client as client:
            until(lambda: client.deployments.get("iris").ready_replicas == 2, 60)
            stop.set()
            for thread in floods:
                thread.join()
            until(lambda: client.deployments.get("iris").ready_replicas == 1, 30)
            until(lambda: len(server.processes("replica")) == 1, 15)
            assert client.deployments.get("iris").status == "ready"
        assert set(statuses) == {200}
    finally:
        server.stop()
