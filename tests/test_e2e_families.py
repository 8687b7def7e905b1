"""Every algorithm that the server lists, from data over HTTP to an endpoint that answers as training did on rows held out.

A job judges what it learnt on a data set that it never learnt from (`validation.test`), and what it said there is kept for the
report's figures; the model that it registers is learnt from the same rows by the same seed. So what the deployment answers
to those rows must be what was kept.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper, numpy_helper
from pyarrow import parquet

from modelworks.core.tasks import REGRESSION, base_of
from modelworks.core.types import Artifact, Column, Job, ModelVersion, Report
from modelworks.ml.data import tokens
from modelworks.ml.evaluate.folds import read_kept
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.train.algorithms import TRAINERS
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog
from tests import media, tagging
from tests.learning import Table, mixed
from tests.server import RunningServer
from tests.test_courses import ratings
from tests.test_encoder_import import WORDS, written
from tests.test_forecast import passengers
from tests.test_nets_multimodal import animals

HELD = 24  # rows
SOUNDS: list[Any] = [
    {"op": "resample", "rate": 8000}, {"op": "mel-spectrogram", "window": 256, "hop": 80, "bands": 16},
    {"op": "normalise", "columns": "audio"},
]  # fmt: skip
TREES = {"n_estimators": 10}
CONVOLUTIONS = {"channels": [4], "head": [8]}
ENCODER = {"width": 8, "heads": 2, "layers": 1, "feed_forward": 8}


@dataclass(frozen=True)
class Case:
    """`data`: which of `TABLES`. `more`: of the training's spec. Nets learn for two epochs where nothing else is said."""

    algorithm: str
    task: str
    data: str
    target: str = "target"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.task}"


def sorted_out(algorithm: str, **given: Any) -> Case:
    return Case(algorithm, "tabular-classification", "table", "grade", given)


def valued(algorithm: str, **given: Any) -> Case:
    return Case(algorithm, "tabular-regression", "table", "score", given)


CASES = [
    valued("linear-regression"),
    valued("ridge"),
    valued("lasso", alpha=0.01),
    valued("elastic-net", alpha=0.01),
    valued("sgd-regressor"),
    valued("gradient-boosted-trees", **TREES),
    sorted_out("gradient-boosted-trees", **TREES),
    sorted_out("logistic-regression"),
    sorted_out("sgd-classifier"),
    sorted_out("mlp", hidden=[8]),
    sorted_out("transformer", **ENCODER),  # each column a step: a series
    Case("cnn", "image-classification", "animals", hyperparameters=CONVOLUTIONS, more={"features": ["photo"]}),
    Case("cnn", "audio-classification", "animals", hyperparameters=CONVOLUTIONS, more={"features": ["call"], "transforms": SOUNDS}),
    Case("rnn", "audio-regression", "animals", "weight", {"hidden": 4}, {"features": ["call"], "transforms": SOUNDS}),
    Case("rnn", "text-classification", "animals", hyperparameters={"hidden": 4}, more={"features": ["note"]}),
    Case("transformer", "text-regression", "animals", "weight", ENCODER, {"features": ["note"]}),
    Case("multimodal", "multimodal-classification", "animals", hyperparameters={"width": 8, "channels": [4]},
         more={"features": ["weight", "colour", "note", "photo", "call"],
               "transforms": [*SOUNDS, {"op": "tokenise", "vocabulary": 64}, "one-hot", "standardise"]}),
    Case("text-classifier", "text-classification", "animals", hyperparameters={"backbone": "family-bert"},
         more={"features": ["words"]}),
    Case("image-classifier", "image-classification", "animals", hyperparameters={"backbone": "family-eyes"},
         more={"features": ["photo"]}),
    Case("autoencoder", "anomaly-detection", "table", "ill", {"bottleneck": 2, "hidden": [4]}),
    Case("recommender", "recommendation", "ratings", "rating", {"factors": 3, "top_k": 3}),
    Case("rnn", "token-classification", "tags", "tags", {"hidden": 8, "embedding": 8}),
    Case("transformer", "token-classification", "tags", "tags", ENCODER),
    Case("transformer", "text-generation", "tags", "text",
         {"width": 32, "heads": 2, "layers": 1, "feed_forward": 64, "context": 64, "vocabulary": 300}),
    Case("forecaster", "forecast", "passengers", "passengers", {"season": 12, "hidden": [4]}, {"time": "month"}),
]  # fmt: skip


def beasts() -> Table:
    """With a cat or a dog among other words that the encoder knows."""
    table, columns = animals(100)
    random = np.random.default_rng(0)
    words = [" ".join([*random.choice(WORDS[6:11], 1 + row % 6), ("cat", "dog")[row % 2]]) for row in range(100)]
    return table.append_column("words", pa.array(words)), [*columns, Column(name="words", type="text")]


def strangers() -> Table:
    """The last users are held out, and an item that only they rate."""
    table, columns = ratings(40, 20, 0.6)
    table = table.sort_by("user")
    items = ["new" if row == table.num_rows - 1 else item for row, item in enumerate(table["item"].to_pylist())]
    return table.set_column(1, "item", pa.array(items)), columns


def tagged() -> Table:
    """Sentences as words with their tags, and as texts. What is held out has other words, a tag more, and none as long."""
    rows = sorted(tagging.sentences(90), key=lambda row: -len(row["tokens"]))
    rows[-1]["tags"] = ["B-SHIP" for _ in rows[-1]["tags"]]
    columns = {name: [json.dumps(row[name]) for row in rows] for name in ("tokens", "tags")}
    texts = [" ".join(row["tokens"]) + "." for row in rows]
    types = [*(Column(name=name, type="sequence") for name in columns), Column(name="text", type="text")]
    return pa.table({**columns, "text": texts}), types


TABLES = {
    "table": lambda: mixed(140),
    "animals": beasts,
    "ratings": strangers,
    "tags": tagged,
    "passengers": passengers,
}


@dataclass
class House:
    """A server with the tables of all cases, each in rows to learn from and rows held out, and their jobs."""

    running: RunningServer
    held: dict[str, Table] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        return self.running.client

    def said(self, job: Job) -> Predictions:
        """What a job's own process said of the rows that it was tested on."""
        catalog = Catalog(self.running.home / "catalog.sqlite")
        with catalog.read() as tx:
            report = tx.find(Report, job_id=job.id)
            assert report is not None
            kept = tx.find(Artifact, owner_id=report.id, kind="predictions")
        catalog.close()
        assert kept is not None
        return read_kept(Blobs(self.running.home / "blobs").get(kept.digest))


@pytest.fixture(scope="module")
def house(running: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> House:
    made, folder = House(running), tmp_path_factory.mktemp("families")
    client = running.client
    for name, build in TABLES.items():
        table, columns = build()
        made.held[name] = table.slice(table.num_rows - HELD), columns
        parquet.write_table(table.slice(0, table.num_rows - HELD), folder / f"{name}.parquet")
        parquet.write_table(made.held[name][0], folder / f"{name}-held.parquet")
        if name == "passengers":
            parquet.write_table(table, folder / f"{name}-whole.parquet")
    (folder / "bert.zip").write_bytes(media.zipped({one.name: one.read_bytes() for one in written(folder / "bert", "BertModel").iterdir()}))

    def upload(path: Path) -> None:
        if path.suffix == ".parquet":
            types = {column.name: column.type for column in made.held[path.stem.partition("-")[0]][1]}
            client.datasets.upload(path, name=f"family-{path.stem}", columns=types)
        else:
            client.models.import_(f"family-{path.stem}", path, task={".zip": "embedding", ".onnx": "image-embedding"}[path.suffix])

    eyes(folder / "eyes.onnx")
    with ThreadPoolExecutor(4) as several:
        list(several.map(upload, (path for path in folder.iterdir() if path.is_file())))
    for case in CASES:
        made.jobs[case.name] = client.training_jobs.create(model=case.name, **spec_of(case))
        if case.task == "forecast":  # which is judged on the end of its own series
            whole = spec_of(case) | {"dataset": "family-passengers-whole", "validation": {"holdout": HELD / 144}}
            made.jobs["whole"] = client.training_jobs.create(model="family-whole", **whole)
    return made


def spec_of(case: Case) -> dict[str, Any]:
    known = TRAINERS.get(case.algorithm).Params.model_fields
    few = {"epochs": 3, "learning_rate": 0.01} if "epochs" in known else {}
    return {
        "dataset": f"family-{case.data}",
        "target": case.target,
        "algorithm": case.algorithm,
        "task": case.task,
        "hyperparameters": few | case.hyperparameters,
        "validation": None if case.task == "forecast" else {"test": f"family-{case.data}-held"},
        **({"features": ["age", "visits", "member", "city"]} if case.data == "table" else {}),
        **case.more,
    }


def eyes(path: Path) -> None:
    """A convolution of random weights, whose maps are what an image is told by."""
    weights = np.random.default_rng(0).normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32)
    ports = [("image", ["n", 3, 8, 8]), ("maps", ["n", 8, 3, 3])]
    made = helper.make_graph(
        [helper.make_node("Conv", ["image", "weights"], ["maps"], strides=[2, 2])], "eyes",
        *([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in ports),
        initializer=[numpy_helper.from_array(weights, "weights")],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_every_algorithm_that_is_listed_has_a_case(running: RunningServer) -> None:
    """And each kind of thing that is learnt from, and what is learnt of it, has one of some algorithm."""
    with running.http() as http:
        listed = {one["name"]: one["tasks"] for one in http.get("/api/v1/algorithms").json()["data"]}
    assert {case.algorithm for case in CASES} == set(listed)
    tasks, covered = {task for some in listed.values() for task in some}, {case.task for case in CASES}
    assert {base_of(task) for task in covered} == {base_of(task) for task in tasks}
    assert {task.partition("-")[0] for task in covered} == {task.partition("-")[0] for task in tasks}
    assert not [case.name for case in CASES if case.task not in listed[case.algorithm]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_endpoint_answers_as_training_did(house: House, case: Case) -> None:
    client = house.client
    client.training_jobs.wait(house.jobs[case.name])
    said = house.said(client.training_jobs.wait(house.jobs["whole" if case.task == "forecast" else case.name]))
    assert len(said.rows) == HELD
    client.deployments.put(case.name, model=case.name)
    client.deployments.wait_ready(case.name, timeout=280)
    try:
        version = client.models.version(f"{case.name}:1")
        assert (version.task, version.algorithm) == (case.task, case.algorithm)
        CHECKS.get(case.task, check_answers)(house, case, said, version)
    finally:
        client.deployments.delete(case.name)


def asked(house: House, case: Case, version: ModelVersion) -> list[Any]:
    """What the endpoint says of the rows held out."""
    table, _ = house.held[case.data]
    rows = table.select([one.name for one in version.signature.inputs]).to_pylist()
    if case.task == "token-classification":
        rows = [{name: json.loads(value) for name, value in row.items()} for row in rows]
    outputs = house.client.deployments.predict(case.name, rows).outputs
    assert len(outputs) == HELD
    return list(outputs)


def check_answers(house: House, case: Case, said: Predictions, version: ModelVersion) -> None:
    """Classes and numbers."""
    got = asked(house, case, version)
    if base_of(case.task) == REGRESSION:
        close([one.value for one in got], said.output)
        return
    classes = version.classes or []
    close([[*one.probabilities.values()] for one in got], said.output)
    assert [one.label for one in got] == [classes[place] for place in said.labels]
    assert [[*one.probabilities] for one in got] == [[str(name) for name in classes]] * HELD


def check_anomalies(house: House, case: Case, said: Predictions, version: ModelVersion) -> None:
    got = asked(house, case, version)
    close([one.score for one in got], said.output[:, 0])
    assert [one.anomaly for one in got] == said.output[:, 1].astype(bool).tolist()


def check_ratings(house: House, case: Case, said: Predictions, version: ModelVersion) -> None:
    """And the place of each item among those recommended, as far as these go."""
    got = asked(house, case, version)
    close([one.value for one in got], said.output[:, 0])
    items = house.held[case.data][0]["item"].to_pylist()
    places = [[*one.items].index(item) if item in one.items else None for one, item in zip(got, items, strict=True)]
    assert places == [int(place) if place < 3 else None for place in said.output[:, 1]]


def check_tags(house: House, case: Case, said: Predictions, version: ModelVersion) -> None:
    names = [str(name) for name in version.classes or []]
    got = asked(house, case, version)
    length = (said.output.shape[1] - 3) // 2
    wanted = said.output[:, 3 + length :].astype(int)
    assert [[*one.tags] for one in got] == [[names[place] for place in row if place >= 0] for row in wanted]


def check_texts(house: House, case: Case, said: Predictions, version: ModelVersion) -> None:
    """How likely each text is, by the log probabilities of its own tokens."""
    texts = house.held[case.data][0]["text"].to_pylist()
    body = {"model": case.name, "prompt": [text + tokens.END for text in texts], "echo": True, "logprobs": 0, "max_tokens": 0}
    with house.running.http() as http:
        choices = http.post("/v1/completions", json=body, timeout=120).json()["choices"]
    close([-sum(one["logprobs"]["token_logprobs"][1:]) for one in choices], said.output[:, 0], 1e-4)


def check_forecasts(house: House, case: Case, said: Predictions, version: ModelVersion) -> None:
    """A model of the rows before says of the end what one said that was judged on it, each horizon from all before it."""
    window, horizon = version.signature.inputs[0].shape[1], version.signature.outputs[0].shape[1]
    counts = passengers()[0]["passengers"].to_pylist()
    starts = range(len(counts) - HELD, len(counts), horizon)
    rows = [{"history": counts[start - window : start]} for start in starts]
    got = house.client.deployments.predict(case.name, rows).outputs
    for name, wanted in {"forecast": said.output, "low": said.beside["low"], "high": said.beside["high"]}.items():
        close(np.concatenate([getattr(one, name) for one in got])[:HELD], wanted)


CHECKS = {
    "anomaly-detection": check_anomalies,
    "recommendation": check_ratings,
    "token-classification": check_tags,
    "text-generation": check_texts,
    "forecast": check_forecasts,
}


def close(got: Any, expected: np.ndarray, bound: float = 1e-5) -> None:
    assert np.shape(got) == expected.shape
    assert (np.abs(np.asarray(got) - expected) <= bound * np.maximum(1.0, np.abs(expected))).all()
