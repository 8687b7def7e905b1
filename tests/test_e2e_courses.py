"""Tasks beyond classes and numbers through a real server: trained, deployed, asked, evaluated, as a stranger does it."""

from __future__ import annotations

import pytest

from modelworks.core.errors import InvalidInput
from tests.server import RunningServer


def test_anomalies_from_a_bundled_set_to_an_endpoint(running: RunningServer) -> None:
    client = running.client
    client.datasets.create(name="cells", source="sklearn:breast_cancer")
    asked = {
        "model": "cells", "dataset": "cells", "target": "diagnosis", "algorithm": "autoencoder",
        "hyperparameters": {"positive": "malignant", "bottleneck": 6, "hidden": [16], "epochs": 12},
    }  # fmt: skip
    job = client.training_jobs.wait(client.training_jobs.create(**asked))
    assert job.status == "succeeded", job.error
    assert job.metrics["roc_auc"]["mean"] > 0.85
    version = client.models.version("cells:1")
    assert version.task == "anomaly-detection"
    client.deployments.put("cells", model="cells")
    client.deployments.wait_ready("cells")
    usual = {one.name: 0.0 for one in version.signature.inputs}
    with running.http() as http:
        where = "/api/v1/deployments/cells/predict"
        (said,) = http.post(where, json={"inputs": [usual]}).json()["outputs"]
        assert set(said) == {"score", "anomaly"}
        assert said["anomaly"] is True  # no cell has radius 0
        assert http.post(where, json={"inputs": [{**usual, "mean radius": "wide"}]}).status_code == 400
    report = client.evaluations.wait(client.evaluations.create(model="cells:1", method={"test": "cells"}))
    assert report.metrics["roc_auc"]["mean"] > 0.85
    with pytest.raises(InvalidInput, match="Name it in the hyperparameter positive"):
        client.training_jobs.wait(client.training_jobs.create(**{**asked, "hyperparameters": {}}))
