"""Predictions that are given are scored as the field's own tools score them, whoever made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jiwer import cer, wer
from sacrebleu.metrics import BLEU, CHRF
from sklearn import metrics as skm

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec
from modelworks.ml.evaluate import boxes
from modelworks.ml.evaluate.asked import columns_of
from modelworks.ml.evaluate.evaluate import Evaluated
from modelworks.ml.evaluate.given import evaluate_given
from tests.learning import Context

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn a thousand times elsewhere."""
    monkeypatch.setattr("modelworks.ml.evaluate.intervals.RESAMPLES", 100)


def scored(workdir: Path, rows: Rows, *, other: Rows | None = None, **given: Any) -> Evaluated:
    """`given`: the fields of `predictions`, and those of the whole spec under `spec`."""
    import pyarrow as pa

    more = given.pop("spec", {})
    spec = EvaluationSpec.model_validate({"dataset": "d", "predictions": given, **more})
    tables = [(pa.Table.from_pylist(one), columns_of(one)) for one in (rows, other) if one is not None]
    return evaluate_given(spec, *tables[0], Context(workdir), other=tables[1] if other is not None else None)


def means(found: Evaluated) -> dict[str, float]:
    return {name: one["mean"] for name, one in found.metrics.items()}


def classified(rows: int = 200) -> tuple[Rows, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    true = random.integers(0, 6, rows)
    scores = np.exp(random.normal(size=(rows, 6)) + 2 * np.eye(6)[true])
    scores /= scores.sum(axis=1, keepdims=True)
    made = [
        {"id": at, "label": f"c{t}", "said": f"c{s.argmax()}", **{f"p_c{k}": float(v) for k, v in enumerate(s)}}
        for at, (t, s) in enumerate(zip(true, scores, strict=True))
    ]
    return made, true, scores


def test_scores_of_classes_give_what_scikit_learn_says(tmp_path: Path) -> None:
    rows, true, scores = classified()
    found = scored(tmp_path, rows, task="classification", reference="label", scores="p_*", spec={"slices": ["id < 50"]})
    said = means(found)
    assert "top_10_accuracy" not in said  # there are six classes
    expected = {
        "accuracy": skm.accuracy_score(true, scores.argmax(axis=1)),
        "top_3_accuracy": skm.top_k_accuracy_score(true, scores, k=3),
        "top_5_accuracy": skm.top_k_accuracy_score(true, scores, k=5),
        "log_loss": skm.log_loss(true, scores),
        "roc_auc": skm.roc_auc_score(true, scores, multi_class="ovr"),
    }
    assert {name: said[name] for name in expected} == pytest.approx(expected)
    top = found.metrics["top_3_accuracy"]
    assert 0 < top["low"] < top["mean"] < top["high"] <= 1
    assert set(found.details["per_class"]) == {f"c{k}" for k in range(6)}
    (part,) = found.details["slices"]
    assert (part["rows"], part["metrics"]["accuracy"]["mean"]) == (50, float(np.mean(scores.argmax(axis=1)[:50] == true[:50])))


def test_labels_alone_have_no_metrics_of_probabilities_and_a_given_label_wins(tmp_path: Path) -> None:
    rows, true, _ = classified()
    found = scored(tmp_path, rows, task="image-classification", reference="label", prediction="said")
    assert "roc_auc" not in found.metrics
    assert "calibration" not in found.details
    with pytest.raises(InvalidInput, match="without what it is computed of"):
        scored(tmp_path, rows, task="classification", reference="label", prediction="said", spec={"metrics": ["log_loss"]})
    always = [{**row, "said": "c1"} for row in rows]
    both = scored(tmp_path, always, task="classification", reference="label", prediction="said", scores="p_*")
    assert means(both)["accuracy"] == pytest.approx(float(np.mean(true == 1)))
    binary = [{"reference": i % 2 == 0, "p": 0.9 if i % 3 else 0.4} for i in range(30)]
    one = scored(tmp_path, binary, task="classification", scores={"true": "p"})
    assert means(one)["brier"] == pytest.approx(np.mean([(row["p"] - row["reference"]) ** 2 for row in binary]))


def test_two_sides_are_compared_on_the_rows_that_both_have(tmp_path: Path) -> None:
    rows, true, _ = classified()
    # of 150 rows, in another order; right in nine of ten, and with ids
    other = [{"id": at, "guess": f"c{true[at]}" if at % 10 else "c0"} for at in range(199, 49, -1)]
    compare = {"dataset": "e", "key": "id", "prediction": "guess", "name": "new"}
    given = {"task": "classification", "reference": "label", "prediction": "said", "compare": compare}
    found = scored(tmp_path, rows, other=other, **given).details["comparison"]
    assert (found["with"], found["rows"], found["decided_by"]) == ("new", 150, "accuracy")
    theirs = [bool(at % 10) or true[at] == 0 for at in range(50, 200)]
    right = np.mean([row["said"] == row["label"] for row in rows[50:]]), np.mean(theirs)
    assert (found["metrics"]["accuracy"]["model"], found["metrics"]["accuracy"]["other"]) == pytest.approx(right)
    assert found["metrics"]["accuracy"]["verdict"] == "worse"
    assert found["mcnemar"]["p_value"] < 0.05
    same = scored(tmp_path, rows, **{**given, "compare": {"prediction": "said"}}).details["comparison"]
    assert same["verdict"] == "no significant difference"
    with pytest.raises(InvalidInput, match="has 150 rows and not 200"):
        scored(tmp_path, rows, other=other, **{**given, "compare": {"dataset": "e", "prediction": "guess"}})
    with pytest.raises(InvalidInput, match="names some rows twice"):
        scored(tmp_path, rows, other=[*other, other[0]], **given)


def test_forecasts_are_measured_by_the_history_before_them(tmp_path: Path) -> None:
    def series(name: str, level: float) -> Rows:
        values = [level + 3 * (at % 4) + 0.5 * at for at in range(24)]
        return [
            {
                "s": name, "t": at, "y": value, "f": None if at < 16 else value + 1.0, "low": value - 1,
                "high": value + (2 if at % 2 else -0.5),
            }
            for at, value in enumerate(values)
        ]  # fmt: skip

    rows = [*series("a", 10), *series("b", 50)][::-1]
    given = {"task": "forecast", "reference": "y", "prediction": "f", "time": "t", "series": "s", "season": 4}
    found = scored(tmp_path, rows, **given, low="low", high="high")
    assert means(found)["mase"] == pytest.approx(1.0 / 2.0)  # a season before it was 2 less
    assert found.details["test_rows"] == [16]
    assert found.details["forecast"] == {"season": 4, "series": 2, "coverage": 0.5}
    assert means(found)["coverage"] == 0.5
    bare = scored(tmp_path, [row for row in rows if row["f"] is not None], **given)
    assert bare.metrics["mase"]["mean"] is None
    assert "coverage" not in bare.metrics
    assert any("mase needs the history" in note for note in bare.details["notes"])


SPOKEN = [("the cat sat on the mat", "the cat sad on mat"), ("hello there", ""), ("one two three", "one two two three"), ("yes", "yes")]


def test_transcripts_have_the_error_rates_of_jiwer(tmp_path: Path) -> None:
    true, said = map(list, zip(*SPOKEN, strict=True))
    rows = [{"reference": a, "prediction": b} for a, b in SPOKEN]
    found = scored(tmp_path, rows, task="speech-to-text")
    assert means(found) == pytest.approx({"wer": wer(true, said), "cer": cer(true, said), "exact_match": 0.25})
    assert found.details["errors"]["words"] == {"right": 8, "substituted": 1, "deleted": 3, "inserted": 1}
    loud = [{"reference": a, "prediction": a.upper() + "!"} for a, _ in SPOKEN]
    assert means(scored(tmp_path, loud, task="speech-to-text"))["wer"] == 1.0
    assert means(scored(tmp_path, loud, task="speech-to-text", normalise=True))["wer"] == 0.0


def test_texts_have_sacrebleus_figures_and_those_of_rouge_score(tmp_path: Path) -> None:
    pairs = [
        ("The cat_sat on the mat.", "A cat sat on the mats, today!"),
        ("police killed the gunman", "the gunman police killed"),
        ("the quick brown fox jumps", "the quick brown fox leaps over it"),
    ]
    rows = [{"prediction": said, "r1": true, "r2": "something else"} for said, true in pairs]
    found = means(scored(tmp_path, rows, task="translation", reference=["r1", "r2"]))
    streams = [[row[name] for row in rows] for name in ("r1", "r2")]
    said = [row["prediction"] for row in rows]
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(said, streams).score)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(said, streams).score)
    one = scored(tmp_path, rows[:2], task="summarization", reference="r1")
    # rouge-score 0.1.2, without stemming: (0.615384615385, 0.545454545455, 0.615384615385) and (1, 2/3, 1/2)
    expected = [(0.615384615385 + 1) / 2, (0.545454545455 + 2 / 3) / 2, (0.615384615385 + 0.5) / 2]
    assert [means(one)[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(expected)
    han = means(scored(tmp_path, [{"reference": "我喜欢学习", "prediction": "我喜欢学习"}], task="translation", tokenize="zh"))
    assert (han["bleu"], han["rougeL"]) == (pytest.approx(100.0), 1.0)


def photographs(seed: int, images: int = 40, classes: int = 3, ties: bool = True) -> Rows:
    """True boxes, and boxes near them, of other classes, and nowhere, as [x, y, width, height]."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(images):
        true: Rows = []
        said: Rows = []
        for _ in range(int(random.integers(0, 5))):
            box = [float(v) for v in np.round(random.uniform([0, 0, 20, 20], [200, 200, 120, 120]), 1)]
            label = int(random.integers(classes))
            true.append({"box": box, "label": str(label)})
            for _ in range(int(random.integers(0, 3))):
                near = np.round(np.array(box) + random.normal(0, 6, 4), 1)
                other = label if random.random() < 0.9 else int(random.integers(classes))
                size = [max(float(near[2]), 1.0), max(float(near[3]), 1.0)]
                said.append({"box": [*map(float, near[:2]), *size], "label": str(other), "score": float(np.round(random.random(), 2))})
        for _ in range(int(random.integers(0, 2))):
            box = [float(v) for v in np.round(random.uniform([0, 0, 20, 20], [200, 200, 120, 120]), 1)]
            said.append({"box": box, "label": str(int(random.integers(classes))), "score": float(np.round(random.random() * 0.7, 2))})
        for box in said if not ties else ():
            box["score"] += 1e-3 * np.random.default_rng(int(abs(box["box"][0]) * 1e4)).random()
        rows.append({"reference": json.dumps(true), "prediction": json.dumps(said)})
    return rows


# pycocotools 2.0.11, COCOeval on these boxes: AP, AP50, AP75, AR100, and AP of each class
COCO = {
    0: (
        0.17824884484858694, 0.4537340727054021, 0.11130576003758876, 0.29595832635048325,
        (0.24255492238784318, 0.172242001951888, 0.11994961020602969),
    ),
    1: (
        0.23769392628878044, 0.5105091756574822, 0.16171757009301865, 0.3960487225193107,
        (0.2867013874223867, 0.22735865813472103, 0.19902173330923353),
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", COCO)
def test_boxes_have_the_average_precision_of_coco(tmp_path: Path, seed: int) -> None:
    rows = photographs(seed)
    found = scored(tmp_path, rows, task="object-detection", boxes="xywh", spec={"metrics": ["map", "map_50", "map_75", "mar_100"]})
    *overall, classes = COCO[seed]
    assert list(means(found).values()) == pytest.approx(overall)
    assert [found.details["per_class"][str(k)]["average_precision"] for k in range(3)] == pytest.approx(classes)
    assert found.details["test_rows"] == [40]
    assert found.metrics["map"]["low"] < found.metrics["map"]["mean"] < found.metrics["map"]["high"]
    # drawing an image twice is having it twice (of equal scores the order would count)
    rows = photographs(seed, ties=False)
    twice = scored(tmp_path, rows + rows[:20], task="object-detection", boxes="xywh", spec={"metrics": ["map"]})
    entries = [entry for number, row in enumerate(rows) for entry in _entries(number, row)]
    weights = np.array([2.0 if entry[0] < 20 else 1.0 for entry in entries])
    assert boxes.precision_measure(slice(None))(_predictions(entries))(weights) == pytest.approx(means(twice)["map"])


def _entries(number: int, row: dict[str, Any]) -> list[list[float]]:
    def made(text: str) -> list[boxes.Box]:
        return [
            boxes.Box((x, y, x + w, y + h), int(one["label"]), one.get("score", 1.0))
            for one in json.loads(text)
            for x, y, w, h in [one["box"]]
        ]

    return boxes.entries(number, made(row["reference"]), made(row["prediction"]))


def _predictions(entries: list[list[float]]) -> Any:
    from modelworks.ml.evaluate.predictions import Predictions

    table = np.array(entries)
    return Predictions(table[:, 0].astype(int), np.zeros(len(table), dtype=int), table[:, 1:])


def test_boxes_of_two_models_are_compared_image_by_image(tmp_path: Path) -> None:
    rows = [{**row, "exact": json.dumps([{**box, "score": 1.0} for box in json.loads(row["reference"])])} for row in photographs(0)]
    found = scored(tmp_path, rows, task="object-detection", boxes="xywh", compare={"prediction": "exact"}, spec={"metrics": ["map_50"]})
    line = found.details["comparison"]["metrics"]["map_50"]
    assert (line["other"], line["verdict"]) == (pytest.approx(1.0), "worse")
    assert found.details["comparison"]["rows"] == 40


def test_clusters_have_scikit_learns_figures(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    label = random.integers(0, 3, 90)
    points = random.normal(size=(90, 2)) + 3 * np.eye(3, 2)[label]
    cluster = np.where(random.random(90) < 0.8, label, random.integers(0, 4, 90))
    rows = [{"x": x, "y": y, "cluster": int(c), "label": f"l{t}"} for (x, y), c, t in zip(points.tolist(), cluster, label, strict=True)]
    found = scored(tmp_path, rows, task="clustering", prediction="cluster", reference="label", features=["x", "y"])
    assert means(found) == pytest.approx(
        {
            "silhouette": skm.silhouette_score(points, cluster),
            "adjusted_rand": skm.adjusted_rand_score(label, cluster),
            "normalized_mutual_info": skm.normalized_mutual_info_score(label, cluster),
            "homogeneity": skm.homogeneity_score(label, cluster),
            "completeness": skm.completeness_score(label, cluster),
        }
    )
    alone = scored(tmp_path, rows, task="clustering", prediction="cluster", features=["x", "y"])
    assert list(alone.metrics) == ["silhouette"]


LABELS = [{"reference": one, "prediction": "a"} for one in ("a", "b")]
SCORES = [{"reference": one, "p_a": 0.9, "p_b": 0.9 if one == "a" else 0.1} for one in ("a", "b")]
OTHERS = [{"reference": one, "p_a": 0.9} for one in ("a", "b", "c")]
CLASSES, BOXES = {"task": "classification"}, {"task": "object-detection"}


def boxed(said: str) -> Rows:
    return [{"reference": "[]", "prediction": said}]


@pytest.mark.parametrize(
    ("rows", "given", "says"),
    [
        (LABELS, {"task": "poetry"}, "the task is one of: classification"),
        (LABELS, {**CLASSES, "reference": "truth"}, "there is no column 'truth'"),
        (LABELS, {**CLASSES, "boxes": "xywh"}, "boxes is not for classification"),
        (LABELS, {"task": "regression"}, "is of type text; reference must be of type number"),
        ([*LABELS, {"reference": "b", "prediction": None}], CLASSES, "no value in 1 of 3 rows .* first in row 3"),
        ([{"reference": None, "prediction": "a"}], CLASSES, "no row has a value in 'reference'"),
        ([{"reference": "a", "prediction": "a"}] * 3, CLASSES, "needs two classes"),
        ([{**row, "p": 1.5} for row in LABELS], {**CLASSES, "scores": {"a": "p"}}, "a probability is from 0 to 1"),
        (SCORES, {**CLASSES, "scores": "p_*"}, "row 1 are 1.8 together"),
        (OTHERS, {**CLASSES, "scores": "p_*"}, "no scores of the class 'b'"),
        (OTHERS, {**CLASSES, "scores": "q_*"}, "no column is named like 'q_"),
        (boxed("[1]"), BOXES, "'prediction' in row 1: a box has four finite numbers"),
        (boxed('[{"box": [9, 9, 2, 2], "score": 1}]'), BOXES, 'set boxes to "xywh"'),
        (boxed('[{"box": [1, 1, 2, 2]}]'), BOXES, "has a score"),
        (boxed("box"), BOXES, "it is not JSON"),
        ([{"prediction": 1}], {"task": "clustering"}, "give the features that were clustered"),
    ],
)
def test_what_cannot_be_scored_says_what_to_do(tmp_path: Path, rows: Rows, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        scored(tmp_path, rows, **given)
