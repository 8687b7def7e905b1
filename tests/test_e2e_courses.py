"""Tasks beyond classes and numbers through a real server: trained, deployed, asked, evaluated, as a stranger does it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import parquet

from modelworks.core.errors import InvalidInput
from tests.server import RunningServer
from tests.test_courses import ratings


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


def test_recommendations_from_ratings_to_an_endpoint(running: RunningServer, tmp_path: Path) -> None:
    client = running.client
    table, _ = ratings(40, 20, 0.6)
    parquet.write_table(table, tmp_path / "tastes.parquet")
    client.datasets.upload(tmp_path / "tastes.parquet", name="tastes")
    asked = {
        "model": "tastes", "dataset": "tastes", "target": "rating", "algorithm": "recommender",
        "hyperparameters": {"factors": 3, "epochs": 15, "learning_rate": 0.03, "batch_size": 64, "top_k": 3},
    }  # fmt: skip
    job = client.training_jobs.wait(client.training_jobs.create(**asked))
    assert job.metrics["hit_rate"]["mean"] > 0
    client.deployments.put("tastes", model="tastes")
    client.deployments.wait_ready("tastes")
    with running.http() as http:
        where = "/api/v1/deployments/tastes/predict"
        rows = [{"user": 3, "item": "i1"}, {"user": 3, "item": None}, {"user": 999, "item": None}]
        said = http.post(where, json={"inputs": rows}).json()["outputs"]
        assert [one["basis"] for one in said] == ["factors", "factors", "popularity"]
        assert isinstance(said[0]["value"], float)
        assert said[1]["value"] is None
        assert len(said[1]["items"]) == len(said[1]["scores"]) == 3
        wrong = http.post(where, json={"inputs": [{"user": "three", "item": None}]})
        assert (wrong.status_code, wrong.json()["param"]) == (400, "user")
    ended = client.evaluations.wait(client.evaluations.create(model="tastes:1", method={"kfold": 2}))
    assert 0 < ended.metrics["rmse"]["mean"] < 2
