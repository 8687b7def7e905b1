"""Predictions of a model from elsewhere, scored through a real server: by the SDK, the plain API and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelworks.cli.app import app
from modelworks.core.errors import InvalidInput
from tests.server import RunningServer

ROWS = [{"truth": "yes" if at % 2 else "no", "said": "yes" if at % 3 else "no", "p": 0.8 if at % 3 else 0.3} for at in range(60)]


def test_rows_of_a_request_are_scored_and_reported(running: RunningServer) -> None:
    client = running.client
    asked = {"task": "classification", "reference": "truth", "prediction": "said", "scores": {"yes": "p"}, "rows": ROWS}
    gates = [{"metric": "accuracy", "at_least": 0.9}]
    job = client.evaluations.create(model="theirs", predictions=asked, slices=["p > 0.5"], gates=gates)
    job = client.evaluations.wait(job)
    assert "rows" not in json.dumps(job.spec["predictions"]).replace('"rows": null', "")
    right = sum(row["truth"] == row["said"] for row in ROWS) / len(ROWS)
    assert job.metrics["accuracy"]["mean"] == pytest.approx(right)
    report = client.reports.get(job.result["report_id"])
    assert (report.model, report.model_version, report.dataset) == ("theirs", None, "rows of the request")
    assert report.details["gates"] == [{**gates[0], "value": pytest.approx(right), "passed": False}]
    assert report.details["slices"][0]["rows"] == 40
    assert [one.id for one in client.reports.list(model="theirs").items] == [report.id]
    assert client.reports.page(report.id).count("<img ") == 5
    with pytest.raises(InvalidInput, match="no metric 'wer'"):
        client.evaluations.create(predictions=asked, metrics=["wer"])


def test_the_command_line_scores_a_file_and_the_api_a_dataset(running: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "heard.jsonl"
    heard = [
        {"reference": "the cat sat", "prediction": "the cat sad", "better": "the cat sat"},
        {"reference": "yes", "prediction": "", "better": "yes"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in heard * 10))
    command = ["evaluate", "listener", "--predictions", str(file), "--task", "speech-to-text", "--compare", "better"]
    connection = ["--url", running.url, "--api-key", running.key]
    done = CliRunner().invoke(app, [*command, "--gate", "wer<=0.2", *connection])
    assert done.exit_code == 1, done.output
    assert "0.5000" in done.stdout
    assert "worse, by wer" in done.stdout
    assert "wer is 0.5 and must be at most 0.2" in done.stderr
    with running.http() as http:
        body = {"dataset": "heard", "predictions": {"task": "speech-to-text", "reference": "nothing"}}
        refused = http.post("/api/v1/evaluations", json=body)
        assert (refused.status_code, refused.json()["param"]) == (400, "predictions.reference")
        for wrong in ({"predictions": body["predictions"]}, {"model": "m"}, {**body, "method": {"kfold": 2}}):
            assert http.post("/api/v1/evaluations", json=wrong).status_code == 400
        assert http.post("/api/v1/evaluations", json={**body, "dataset": "nowhere"}).status_code == 404
