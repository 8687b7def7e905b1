"""Fixtures that several files share: one real server a worker of the test run, with iris trained and deployed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres
from tests.server import RunningServer


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that tests share: they must not kill it, and name their objects after themselves."""
    server = RunningServer(tmp_path_factory.mktemp("shared") / "home", workers=2)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def iris(running: RunningServer) -> RunningServer:
    """The shared server with dataset `iris`, model `iris:1` and a ready deployment `iris`."""
    client = running.client
    client.datasets.create(name="iris", source="sklearn:iris")
    job = client.training_jobs.create(
        model="iris", dataset="iris", target="species", algorithm="logistic-regression", validation={"kfold": 5}
    )
    job = client.training_jobs.wait(job)
    assert job.status == "succeeded", job.error
    client.deployments.put("iris", model="iris")
    client.deployments.wait_ready("iris")
    return running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server of one's own, to be killed at will."""
    own = RunningServer(tmp_path / "home")
    yield own
    own.stop()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed on this machine")
    with postgres.server() as url:
        yield url
