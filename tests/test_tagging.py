"""A tag for each element of a sequence: columns of sequences, what is learnt, how it is judged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sklearn.metrics import f1_score

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TableSchema
from modelworks.core.types import Column
from modelworks.ml.data.ingest import ingest
from modelworks.ml.data.profile import profile
from modelworks.ml.evaluate.metrics import score
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.tagging import is_prefixed, laid_out, spans
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from tests import learning, tagging
from tests.server import RunningServer
from tests.test_courses import crashed_and_resumed, often  # noqa: F401
from tests.test_reports import drawing

RNN: dict[str, Any] = {"hidden": 16, "embedding": 16, "epochs": 5, "learning_rate": 0.02, "batch_size": 32}
TRANSFORMER: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "epochs": 12, "learning_rate": 0.01}


# columns


def test_lists_are_one_content_in_every_format(tmp_path: Path) -> None:
    rows = [{"words": ["EU", "rejects"], "x": [1, 2.5]}, {"words": ["a"], "x": [3]}, {"words": [], "x": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('words,x\nEU rejects,"[1.0,2.5]"\n"[""a""]",[3.0]\n[],\n')
    schema = TableSchema(columns={"words": "sequence", "x": "sequence"})
    made = [
        ingest(tmp_path / name, filename=name, schema=given, out=tmp_path / "out.parquet")
        for name, given in (("a.jsonl", TableSchema()), ("a.parquet", TableSchema()), ("a.csv", schema))
    ]
    assert len({one.digest for one in made}) == 1
    assert [(one.type, one.nullable) for one in made[0].columns] == [("sequence", False), ("sequence", True)]
    told = profile(tmp_path / "out.parquet", made[0].columns)[0]["columns"][0]
    assert (told["length"], told["elements"]) == ({"min": 0, "mean": 1.0, "max": 2}, 3)


@pytest.mark.parametrize("lines", [[["a", 1]], [["a"], [1]], [[["a"]]], [[True]], [["a"], "b"], [{"a": 1}]])
def test_a_list_is_of_texts_or_of_numbers(lines: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"words": line}) for line in lines))
    with pytest.raises(InvalidInput, match=f"row {len(lines)} .*'words'"):
        ingest(path, filename="a.jsonl", schema=TableSchema(), out=tmp_path / "out.parquet")


# judging


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("I-PER B-PER I-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}),
        ("S-PER B-PER E-PER E-PER", {(0, 1, "PER"), (1, 3, "PER"), (3, 4, "PER")}),
        ("O O", set()),
        ("noun noun verb O", {(0, 2, "noun"), (2, 3, "verb")}),
    ],
)
def test_spans_are_read_from_tags(tags: str, found: set[Any]) -> None:
    assert spans(tags.split(), is_prefixed(tags.split())) == found


def test_elements_and_spans_are_counted_without_padding() -> None:
    random, names = np.random.default_rng(0), ["B-LOC", "B-PER", "I-PER", "O"]
    true, said = random.integers(0, 4, (2, 40, 7))
    behind = np.arange(7) >= random.integers(1, 8, (40, 1))
    true[behind] = said[behind] = -1
    found = Predictions(np.arange(40), true[:, 0], laid_out(true, said, names))
    wanted = score("token-classification", found, ["accuracy", "f1", "span_f1", "span_recall"])
    assert wanted["accuracy"] == pytest.approx((true == said)[~behind].mean())
    assert wanted["f1"] == pytest.approx(f1_score(true[~behind], said[~behind], average="macro"))
    sides = [[spans([names[tag] for tag in row if tag >= 0], True) for row in side] for side in (true, said)]
    right = sum(len(a & b) for a, b in zip(*sides, strict=True))
    assert wanted["span_recall"] == pytest.approx(right / sum(map(len, sides[0])))
    assert wanted["span_f1"] == pytest.approx(2 * right / sum(len(one) for side in sides for one in side))


# learning


@pytest.mark.parametrize(("algorithm", "given"), [("rnn", RNN), ("transformer", TRANSFORMER)])
def test_words_are_named_by_what_stands_around_them(algorithm: str, given: dict[str, Any], tmp_path: Path) -> None:
    ctx = learning.Context(tmp_path)
    trained = learning.run(
        tagging.table(300), tmp_path, ctx, target="tags", algorithm=algorithm, hyperparameters=given, validation={"kfold": 2}
    )
    metrics = {name: found["mean"] for name, found in trained.report["metrics"].items()}
    assert metrics["span_f1"] > 0.9
    assert metrics["accuracy"] > 0.95
    assert trained.report["details"]["per_class"]["B-LOC"]["f1"] > 0.8
    assert {name for name, _, _ in drawing(trained, ctx)} >= {"confusion-matrix", "folds", "learning-curve"}
    package = learning.packaged(trained, tmp_path)
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 24
    assert trained.manifest.classes == ["B-LOC", "B-PER", "I-PER", "O"]


def test_codes_and_quantities_are_read_beside_each_other(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows = []
    for _ in range(200):
        codes, x = random.integers(0, 5, random.integers(1, 9)), random.normal(0, 100, 9)
        tags = [int(code > 2) + 2 * int(value > 0) for code, value in zip(codes, x, strict=False)]
        rows.append((codes.tolist(), x[: len(codes)].round(2).tolist(), tags))
    columns = {name: [json.dumps(one) for one in values] for name, values in zip("cxy", zip(*rows, strict=True), strict=True)}
    data = pa.table(columns), [Column(name=name, type="sequence") for name in columns]
    trained = learning.run(data, tmp_path, target="y", algorithm="rnn", hyperparameters={**RNN, "cell": "gru", "epochs": 12})
    assert trained.report["metrics"]["f1"]["mean"] > 0.9
    assert trained.manifest.classes == [0, 1, 2, 3]


@pytest.mark.usefixtures("often")
def test_a_tagger_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    spec = {"target": "tags", "algorithm": "rnn", "hyperparameters": {**RNN, "epochs": 3}}
    whole, again = crashed_and_resumed(tagging.table(60), tmp_path, **spec)
    assert whole == again


@pytest.mark.parametrize(
    ("change", "spec", "code"),
    [
        ({"tags": ["O"]}, {}, "bad_shape"),
        ({"tags": None}, {}, "missing_target"),
        ({"tokens": None}, {}, "missing_values"),
        ({}, {"hyperparameters": {"steps": 3}}, "bad_hyperparameter"),
        ({}, {"hyperparameters": {"loss": "binary-cross-entropy"}}, "bad_hyperparameter"),
        ({}, {"algorithm": "ridge"}, "invalid_input"),
        ({}, {"algorithm": "ridge", "task": "token-classification"}, "invalid_input"),
        ({}, {"metrics": ["roc_auc"]}, "unknown_metric"),
        ({}, {"transforms": [{"op": "tokenise"}]}, "invalid_input"),
        ({}, {"target": "kind", "algorithm": "mlp"}, "wrong_features"),
        ({}, {"target": "kind", "task": "token-classification"}, "bad_target"),
        ({}, {"features": ["kind"]}, "wrong_features"),
    ],
)
def test_what_cannot_be_tagged_is_told(change: dict[str, Any], spec: dict[str, Any], code: str, tmp_path: Path) -> None:
    rows = [{**row, "kind": "ab"[i % 2]} for i, row in enumerate(tagging.sentences(20))]
    rows[7] |= change
    columns = {name: [row[name] if name == "kind" or row[name] is None else json.dumps(row[name]) for row in rows] for name in rows[0]}
    types = [Column(name=name, type="category" if name == "kind" else "sequence", nullable=True) for name in columns]
    with pytest.raises(InvalidInput) as refused:
        learning.run((pa.table(columns), types), tmp_path, **({"target": "tags", "algorithm": "rnn"} | spec))
    assert refused.value.code == code


# over HTTP


def test_sentences_from_a_file_to_an_endpoint(running: RunningServer, tmp_path: Path) -> None:
    client, rows = running.client, tagging.sentences(160)
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    client.datasets.upload(path, name="words")
    spec = {"model": "words", "dataset": "words", "target": "tags", "algorithm": "transformer", "hyperparameters": TRANSFORMER}
    job = client.training_jobs.wait(client.training_jobs.create(**spec))
    assert job.status == "succeeded", job.error
    assert job.metrics["span_f1"]["mean"] > 0.8
    client.deployments.put("words", model="words")
    client.deployments.wait_ready("words")
    report = client.evaluations.wait(client.evaluations.create(model="words:1", method={"test": "words"}))
    right = total = 0
    with running.http() as http:
        where = "/api/v1/deployments/words/predict"
        said = http.post(where, json={"inputs": [{"tokens": row["tokens"]} for row in rows]}).json()["outputs"]
        for one, row in zip(said, rows, strict=True):
            assert len(one["tags"]) == len(one["scores"]) == len(row["tokens"])
            right += sum(a == b for a, b in zip(one["tags"], row["tags"], strict=True))
            total += len(row["tags"])
        assert report.metrics["accuracy"]["mean"] == pytest.approx(right / total)
        alone = http.post(where, json={"inputs": [{"tokens": rows[0]["tokens"]}]}).json()["outputs"][0]
        assert alone["tags"] == said[0]["tags"]
        assert alone["scores"] == pytest.approx(said[0]["scores"], abs=1e-5)
        tensor = {"name": "tokens", "datatype": "BYTES", "shape": [1, 1], "data": [json.dumps(rows[0]["tokens"])]}
        tags = http.post("/v2/models/words/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"]
        assert [tag for tag in tags if tag] == said[0]["tags"]
        assert http.post(where, json={"inputs": [{"tokens": []}]}).json()["outputs"] == [{"tags": [], "scores": []}]
        for wrong in ("Anna met Bert", [1, 2], ["a", 1], [["a"]], None, ["a"] * 50):
            answer = http.post(where, json={"inputs": [{"tokens": wrong}]})
            assert (answer.status_code, answer.json()["param"]) == (400, "tokens"), wrong
