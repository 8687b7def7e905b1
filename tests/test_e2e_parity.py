"""What a deployment answers over HTTP is what training said, on every row, whatever else an algorithm does with tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelworks.core.types import Job
from modelworks.jobs import registering
from modelworks.ml.train import train as training
from modelworks.ml.train.algorithms import TRAINERS
from modelworks.ml.train.packaging import training_side
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog
from tests.learning import Context, mixed, run
from tests.server import RunningServer
from tests.test_e2e_families import CASES as FAMILIES

CASES = [  # the others are held in test_e2e_families
    (name, task)
    for name in TRAINERS
    for task in TRAINERS.get(name).tasks
    if task.startswith("tabular-")
    and "backbone" not in TRAINERS.get(name).Params.model_fields
    and not any((one.algorithm, one.task) == (name, task) for one in FAMILIES)
]
QUICK: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [8], "epochs": 2},
    "cnn": {"shape": [1, 1, 11], "channels": [4], "head": [8], "epochs": 2},  # 11: the features of mixed()
    "rnn": {"hidden": 4, "epochs": 2},
    "transformer": {"width": 8, "heads": 2, "layers": 1, "feed_forward": 8, "epochs": 2},
}
FEATURES = ["age", "visits", "member", "city", "day"]


@pytest.mark.parametrize(("algorithm", "task"), CASES)
def test_the_wire_equals_training(
    running: RunningServer, algorithm: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, np.ndarray] = {}

    def listening(problem: Any, model: Any, *rest: Any) -> Any:
        said.update(training_side(problem, model, problem.part(problem.rows)))
        return package(problem, model, *rest)

    package = training.package
    monkeypatch.setattr(training, "package", listening)
    table, columns = mixed(120)
    target = "score" if task == "tabular-regression" else "grade"
    trained = run(
        (table, columns), tmp_path, Context(tmp_path), algorithm=algorithm, target=target, features=FEATURES,
        hyperparameters=QUICK.get(algorithm, {}), validation={"holdout": 0.2},
    )  # fmt: skip
    name = f"parity-{algorithm}-{task}"
    register(running, name, trained)
    running.client.deployments.put(name, model=name)
    running.client.deployments.wait_ready(name)
    rows = [
        {key: value.isoformat() if hasattr(value, "isoformat") else value for key, value in row.items()}
        for row in table.select(FEATURES).to_pylist()
    ]
    got = running.client.deployments.predict(name, rows).outputs
    running.client.deployments.delete(name)
    assert len(got) == len(rows) == 120
    if task == "tabular-regression":
        close([one.value for one in got], said["value"])
        return
    assert [str(one.label) for one in got] == said["label"].tolist()
    assert {type(one.label) for one in got} == {int}
    close([[*one.probabilities.values()] for one in got], said["probabilities"])


def close(got: Any, expected: np.ndarray) -> None:
    assert np.shape(got) == expected.shape
    assert (np.abs(np.asarray(got) - expected) <= 1e-5 * np.maximum(1.0, np.abs(expected))).all()


def register(running: RunningServer, name: str, trained: Any) -> None:
    """As the job's last step does, without the start of a process for each."""
    catalog = Catalog(running.home / "catalog.sqlite")
    manifest = trained.manifest
    digest = registering.store(Blobs(running.home / "blobs"), manifest, trained.files)
    with catalog.write() as tx:
        job = Job(id="job_of_this_test", project_id=running.client.whoami().project_id, kind="train", spec={})
        registering.model(tx, job, name, manifest, digest)
    catalog.close()
