"""From a file to an endpoint through the real server: what a user does in the first hour."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modelworks.core.errors import InvalidInput, NotFound
from tests.server import RunningServer

ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}


def houses(rows: int = 200) -> bytes:
    """A mixed table: numbers with gaps, integers, booleans, categories with gaps, a time, and a price that follows them."""
    random = np.random.default_rng(7)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["area", "rooms", "garden", "district", "built", "price"])
    for number in range(rows):
        area, rooms, garden = random.uniform(30, 200), int(random.integers(1, 8)), bool(random.integers(0, 2))
        district, year = random.choice(["north", "süd", "east", ""]), int(random.integers(1950, 2020))
        price = 3000 * area + 10_000 * rooms + (20_000 if garden else 0) + (50_000 if district == "north" else 0)
        shown = "" if number % 17 == 3 else f"{area:.2f}"
        writer.writerow(
            [shown, rooms, str(garden).lower(), district, f"{year}-06-01", f"{price + random.normal(0, 9e3):.2f}"]
        )
    return out.getvalue().encode()


def test_kfold_figures_are_scikit_learns_own(iris: RunningServer) -> None:
    report = iris.client.models.version("iris:1").metrics["accuracy"]
    data = load_iris()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = cross_val_score(pipeline, data.data, data.target, cv=StratifiedKFold(5, shuffle=True, random_state=0))
    assert report["folds"] == pytest.approx(folds.tolist())
    assert report["mean"] == pytest.approx(folds.mean())
    assert report["low"] < report["mean"] < report["high"]


def test_the_wire_equals_training_on_every_row(iris: RunningServer) -> None:
    """Labels equal, probabilities within 1e-5, against scikit-learn fitted on the same rows."""
    data = load_iris()
    rows = [dict(zip(data.feature_names, map(float, row), strict=True)) for row in data.data]
    answer = iris.client.deployments.predict("iris", rows)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(data.data, data.target)
    expected = model.predict_proba(data.data)
    names = [str(name) for name in data.target_names]
    assert [out.label for out in answer.outputs] == [names[index] for index in expected.argmax(axis=1)]
    found = np.array([[out.probabilities[name] for name in names] for out in answer.outputs])
    assert np.abs(found - expected).max() < 1e-4  # the solver stops within its own tolerance
    assert answer.model == "iris:1"
    assert answer.request_id


def test_both_protocols_answer_the_same(iris: RunningServer) -> None:
    native = iris.client.deployments.predict("iris", [ROW]).outputs[0]
    tensors = [{"name": name, "shape": [1, 1], "datatype": "FP32", "data": [value]} for name, value in ROW.items()]
    with iris.http() as http:
        metadata = http.get("/v2/models/iris").json()
        assert {item["name"] for item in metadata["inputs"]} == set(ROW)
        answer = http.post("/v2/models/iris/infer", json={"inputs": tensors})
        assert answer.status_code == 200, answer.text
    outputs = {item["name"]: item for item in answer.json()["outputs"]}
    assert outputs["label"]["data"] == [native.label]
    assert outputs["probabilities"]["data"] == pytest.approx(list(native.probabilities.values()))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**ROW, "petal width (cm)": "wide"}, ["petal width (cm)", "number", "wide"]),
        ({key: value for key, value in ROW.items() if key != "petal width (cm)"}, ["petal width (cm)"]),
        ({**ROW, "petal widht (cm)": 1.0}, ["petal widht (cm)"]),
    ],
)
def test_a_wrong_feature_is_named(iris: RunningServer, row: dict, words: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        iris.client.deployments.predict("iris", [row])
    for word in words:
        assert word in caught.value.message
    assert "sepal" not in (caught.value.param or "")


def test_a_mixed_table_from_upload_to_prediction(iris: RunningServer, tmp_path) -> None:
    path = tmp_path / "houses.csv"
    path.write_bytes(houses())
    client = iris.client
    dataset = client.datasets.upload(path, name="houses")
    types = {column.name: column.type for column in dataset.columns}
    assert types == {
        "area": "number", "rooms": "integer", "garden": "boolean", "district": "category", "built": "time", "price": "number",
    }  # fmt: skip
    again = client.datasets.upload(path, name="houses")
    assert (again.version, again.digest) == (dataset.version, dataset.digest)
    path.write_bytes(houses().replace(b"north", b"Nord", 1))
    changed = client.datasets.upload(path, name="houses")
    assert (changed.version, changed.digest != dataset.digest) == (2, True)

    for algorithm in ("ridge", "gradient-boosted-trees"):
        job = client.training_jobs.create(
            model=f"houses-{algorithm}",
            dataset="houses:1",
            target="price",
            algorithm=algorithm,
            validation={"kfold": 3},
        )
        job = client.training_jobs.wait(job)
        assert job.status == "succeeded", job.error
        assert job.metrics["r2"]["mean"] > 0.8
        name = f"houses-{algorithm}"
        client.deployments.put(name, model=name)
        client.deployments.wait_ready(name)
        row = {"area": None, "rooms": 3, "garden": True, "district": "never seen", "built": "1999-06-01"}
        assert client.deployments.predict(name, [row]).outputs[0].value > 10_000
        client.deployments.delete(name)


def test_the_same_training_again_makes_no_new_version(iris: RunningServer) -> None:
    client = iris.client
    job = client.training_jobs.wait(
        client.training_jobs.create(
            model="iris", dataset="iris", target="species", algorithm="logistic-regression", validation={"kfold": 5}
        )
    )
    assert job.model_version == "iris:1"


def test_a_gate_blocks_registration_and_says_so(iris: RunningServer) -> None:
    client = iris.client
    job = client.training_jobs.create(
        model="gated", dataset="iris", target="species", algorithm="logistic-regression",
        gates=[{"metric": "accuracy", "at_least": 0.999}],
    )  # fmt: skip
    with pytest.raises(InvalidInput, match=r"must be at least 0\.999; nothing was registered") as caught:
        client.training_jobs.wait(job)
    assert caught.value.code == "gate_failed"
    assert client.training_jobs.get(job.id).status == "failed"
    with pytest.raises(NotFound):
        client.models.version("gated")


def test_a_column_that_gives_the_target_away_is_warned_of(iris: RunningServer, tmp_path) -> None:
    path = tmp_path / "leaky.csv"
    rows = [f"{number % 7},{number % 2},{'yes' if number % 2 else 'no'}" for number in range(200)]
    path.write_text("\n".join(["weekday,paid_back,good", *rows]))
    client = iris.client
    client.datasets.upload(path, name="leaky")
    job = client.training_jobs.create(model="leaky", dataset="leaky", target="good", algorithm="logistic-regression")
    job = client.training_jobs.wait(job)
    warned = [event.message for event in client.training_jobs.events(job.id) if event.kind == "warning"]
    assert any("paid_back" in message and "leak" in message for message in warned), warned
    assert not any("weekday" in message for message in warned)


def test_export_and_import_elsewhere(iris: RunningServer, tmp_path) -> None:
    client = iris.client
    path = tmp_path / "iris.zip"
    client.models.export("iris:1", path)
    imported = client.models.import_("elsewhere", path)
    assert imported.digest == client.models.version("iris:1").digest
    client.deployments.put("elsewhere", model="elsewhere")
    client.deployments.wait_ready("elsewhere")
    assert client.deployments.predict("elsewhere", [ROW]).outputs == client.deployments.predict("iris", [ROW]).outputs
    client.deployments.delete("elsewhere")


def test_evaluation_and_comparison_on_the_same_rows(iris: RunningServer) -> None:
    client = iris.client
    job = client.training_jobs.wait(
        client.training_jobs.create(
            model="iris-trees", dataset="iris", target="species", algorithm="gradient-boosted-trees"
        )
    )
    assert job.status == "succeeded", job.error
    evaluation = client.evaluations.create(model="iris-trees", method={"kfold": 5}, compare="iris:1")
    evaluation = client.evaluations.wait(evaluation)
    assert evaluation.status == "succeeded", evaluation.error
    assert len(evaluation.metrics["accuracy"]["folds"]) == 5
    report = client.reports.get(evaluation.result["report_id"])
    comparison = report.details["comparison"]
    assert "accuracy" in str(comparison)
