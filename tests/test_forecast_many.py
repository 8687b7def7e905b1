"""One model of many series: each at its own scale and judged on its own tail; refusals by name; the same over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import parquet

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec
from modelworks.core.types import Artifact, Column, Report
from modelworks.ml.data.types import rows_to_batch
from modelworks.ml.evaluate.evaluate import evaluate
from modelworks.ml.evaluate.folds import read_kept
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from modelworks.ml.train.train import Trained
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog
from tests.learning import Context, Table, packaged, run
from tests.server import RunningServer
from tests.test_forecast import steady

Runs = dict[Any, np.ndarray]
COLUMNS = [Column(name="store", type="category"), Column(name="t", type="integer"), Column(name="y", type="number")]
GIVEN: dict[str, Any] = {
    "target": "y", "time": "t", "series": "store", "algorithm": "forecaster",
    "hyperparameters": {"season": 12, "horizon": 6, "hidden": [4], "epochs": 3},
}  # fmt: skip


def stores(steps: int = 96, scale: float = 1.0) -> Runs:
    return {"oslo": 40 + steady(steps, 1), "rome": scale * (40 + steady(steps, 2)), "北京": 40 + steady(steps, 3)}


def table_of(runs: Runs, kind: Any = "category") -> Table:
    """The rows of all series, in any order."""
    rows = [(name, at, value) for name, values in runs.items() for at, value in enumerate(values.tolist())]
    rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
    names, times, values = zip(*rows, strict=True)
    columns = [COLUMNS[0].model_copy(update={"type": kind}), *COLUMNS[1:]]
    return pa.table({"store": names, "t": times, "y": values}), columns


def learn(runs: Runs, workdir: Path, **more: Any) -> Trained:
    return run(table_of(runs), workdir, **{**GIVEN, **more})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def trained(workdir: Path) -> Trained:
    return learn(stores(), workdir)


def test_each_series_is_judged_on_its_own_tail_in_its_own_units(trained: Trained) -> None:
    details, metrics = trained.report["details"], trained.report["metrics"]
    assert details["test_rows"] == [3 * 20]
    assert details["forecast"]["series"] == 3
    lines = details["per_series"]
    assert {line["series"]: line["steps"] for line in lines} == {"oslo": 20, "rome": 20, "北京": 20}
    assert [line["mase"] for line in lines] == sorted((line["mase"] for line in lines), reverse=True)
    for name in ("mase", "mae", "coverage"):
        assert metrics[name]["mean"] == pytest.approx(np.mean([line[name] for line in lines]))
    naive = []
    for values in stores().values():
        past = values[:76]
        said = np.concatenate([values[start - 12 : start - 6] for start in range(76, 96, 6)])[:20]
        naive.append(np.abs(values[76:] - said) / np.abs(past[12:] - past[:-12]).mean())
    assert details["baselines"]["seasonal-naive"]["mase"]["mean"] == pytest.approx(np.mean(naive))
    assert set(details["baselines"]) == {"seasonal-naive", "linear"}


def test_the_units_of_a_series_change_nothing_for_the_others(trained: Trained, workdir: Path) -> None:
    big = learn(stores(scale=1000.0), workdir)
    for name in ("mase", "smape", "coverage"):
        assert big.report["metrics"][name]["mean"] == pytest.approx(trained.report["metrics"][name]["mean"], rel=1e-3)
    said = [answers(one, [{"series": name} for name in stores()], workdir) for one in (trained, big)]
    for name in ("forecast", "low", "high"):
        assert np.allclose(said[1][name], said[0][name] * [[1.0], [1000.0], [1.0]], rtol=1e-3)


def answers(made: Trained, rows: list[dict[str, Any]], workdir: Path) -> dict[str, np.ndarray]:
    package, runtime = packaged(made, workdir), OnnxRuntime()
    runtime.load(package)
    assert replay_parity(package, runtime) > 6
    return runtime.predict(rows_to_batch(rows, package.manifest.signature.inputs, "forecast"))


def test_what_is_known_of_a_series_is_enough_to_go_on_from_its_end(trained: Trained, workdir: Path) -> None:
    runs = stores()
    bare = answers(trained, [{"series": name} for name in runs], workdir)
    whole = answers(trained, [{"series": name, "history": values.tolist()} for name, values in runs.items()], workdir)
    for name in ("forecast", "low", "high"):
        assert np.allclose(bare[name], whole[name], rtol=1e-5)
    assert (bare["low"] < bare["forecast"]).all()
    assert np.ptp(bare["forecast"][:, 0]) > 0.01
    with pytest.raises(InvalidInput, match=r"does not know the series 'roma'; did you mean 'rome'\? it knows oslo, rome") as refused:
        answers(trained, [{"series": "oslo"}, {"series": "roma"}], workdir)
    assert (refused.value.code, refused.value.param) == ("unknown_value", "series")
    for nameless in ({"history": runs["oslo"].tolist()}, {}, {"region": "oslo"}):
        with pytest.raises(InvalidInput, match="lacks the feature 'series'") as refused:
            answers(trained, [nameless], workdir)
        assert (refused.value.code, refused.value.param) == ("missing_feature", "series")


def test_series_may_be_numbered_and_of_unequal_length(workdir: Path) -> None:
    runs: Runs = {7: steady(60, 1), 12: 500 + 20 * steady(140, 2)}
    given = {**GIVEN, "validation": {"kfold": 2}}
    made = run(table_of(runs, "integer"), workdir, **given)
    assert made.report["details"]["test_rows"] == [12, 12]
    assert [(spec.name, spec.datatype, spec.known) for spec in made.manifest.signature.inputs][1] == ("series", "INT64", [7, 12])
    said = answers(made, [{"series": 12}, {"series": 7}], workdir)["forecast"]
    assert said[0].min() > 200
    assert abs(said[1]).max() < 100


def test_folds_and_other_data_of_the_same_series(trained: Trained, workdir: Path) -> None:
    package = packaged(trained, workdir)
    again = EvaluationSpec.model_validate({"model": "m", "method": {"kfold": 2}, "metrics": ["mase"]})
    found = evaluate(again, package, *table_of(stores()), Context(workdir))
    assert found.details["test_rows"] == [18, 18]
    later = EvaluationSpec.model_validate({"model": "m", "method": {"test": "later"}, "metrics": ["mase", "coverage"]})
    found = evaluate(later, package, *table_of({"rome": 40 + steady(60, 9)}), Context(workdir))
    assert found.details["test_rows"] == [36]
    assert 0 < found.metrics["mase"]["mean"] < 2
    for runs, what in (({"paris": steady(60, 1)}, "series 'paris'"), ({"rome": steady(20, 1)}, "series 'rome' has 20 steps")):
        with pytest.raises(InvalidInput, match=what):
            evaluate(later, package, *table_of(runs), Context(workdir))


def test_a_series_that_does_not_change_leaves_mase_undefined(workdir: Path) -> None:
    made = learn({**stores(), "flat": np.full(96, 5.0)}, workdir)
    assert made.report["metrics"]["mase"]["mean"] is None
    assert made.report["metrics"]["mae"]["mean"] > 0
    assert np.allclose(answers(made, [{"series": "flat"}], workdir)["forecast"], 5.0, atol=0.5)


def test_a_series_that_is_none_is_refused_by_name(workdir: Path) -> None:
    runs = stores()
    gap, slower = table_of(runs)[0], table_of(runs)[0]
    hole = pc.and_(pc.equal(gap["store"], "rome"), pc.equal(gap["t"], 40))
    gap = gap.filter(pc.invert(hole))
    doubled = pc.multiply(slower["t"], 2)
    slower = slower.set_column(1, "t", pc.if_else(pc.equal(slower["store"], "北京"), doubled, slower["t"]))
    for table, code, what in (
        (table_of({**runs, "new": steady(30, 5)})[0], "too_few_rows", "series 'new' has 24 steps to learn from"),
        (table_of({**runs, "new": steady(1, 5)})[0], "too_few_rows", "series 'new'.*leave that series out"),
        (gap, "irregular_steps", "'t' of the series 'rome' are irregular"),
        (slower, "irregular_steps", "1 in the series 'oslo' and 2 in '北京'"),
        (pa.concat_tables([gap, gap]), "repeated_time", "'t' of the series 'oslo' repeats"),
    ):
        with pytest.raises(InvalidInput, match=what) as refused:
            run((table, COLUMNS), workdir, **GIVEN)
        assert refused.value.code == code
    none = gap.set_column(0, "store", pa.array([None, *gap["store"].to_pylist()[1:]]))
    with pytest.raises(InvalidInput, match="'store' is missing in 1 rows"):
        run((none, COLUMNS), workdir, **GIVEN)
    with pytest.raises(InvalidInput, match="name the column that tells them apart in series"):
        run((gap, COLUMNS), workdir, **{**GIVEN, "series": None})


@pytest.mark.parametrize(
    "more",
    [{"series": "shop"}, {"series": "y"}, {"series": "t"}, {"algorithm": "ridge", "time": None, "hyperparameters": {}}],
)
def test_what_tells_no_series_apart_is_refused(workdir: Path, more: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as refused:
        learn(stores(), workdir, **more)
    assert refused.value.param == "series"


def test_each_series_is_resampled_by_itself(workdir: Path) -> None:
    times = np.datetime64("2024-01-01", "us") + np.arange(120) * np.timedelta64(1, "D")
    kept = np.arange(120) % 9 > 0
    names = np.repeat(["a", "b"], kept.sum())
    data = pa.table({"store": names, "t": np.tile(times[kept], 2), "y": np.concatenate([steady(120, 1)[kept], 900 + steady(120, 2)[kept]])})
    columns = [COLUMNS[0], Column(name="t", type="time"), COLUMNS[2]]
    made = run((data, columns), workdir, **GIVEN, transforms=[{"op": "resample", "every": "1 day"}])
    assert made.manifest.lineage["forecast"]["step"] == "1 day"
    said = answers(made, [{"series": "a"}, {"series": "b"}], workdir)["forecast"]
    assert abs(said[0]).max() < 100 < 800 < said[1].min()


def test_the_endpoint_says_of_each_series_what_was_judged_in_training(running: RunningServer, tmp_path: Path) -> None:
    """A model of the steps before says of the last twelve what the one said that was judged on them."""
    client, runs = running.client, stores()
    for name, part in (("whole", runs), ("past", {name: values[:-12] for name, values in runs.items()})):
        parquet.write_table(table_of(part)[0], tmp_path / f"{name}.parquet")
        client.datasets.upload(tmp_path / f"{name}.parquet", name=f"stores-{name}", columns={"store": "category"})
    judged = client.training_jobs.create(
        model="stores-whole", dataset="stores-whole", **GIVEN, validation={"holdout": 12 / 96}
    )
    served = client.training_jobs.create(model="stores", dataset="stores-past", **GIVEN)
    judged = client.training_jobs.wait(judged)
    client.training_jobs.wait(served)
    client.deployments.put("stores", model="stores")
    client.deployments.wait_ready("stores", timeout=120)
    catalog = Catalog(running.home / "catalog.sqlite")
    with catalog.read() as tx:
        report = tx.find(Report, job_id=judged.id)
        assert report is not None
        kept = tx.find(Artifact, owner_id=report.id, kind="predictions")
    catalog.close()
    assert kept is not None
    said = read_kept(Blobs(running.home / "blobs").get(kept.digest))
    names = sorted(runs)
    rows = [{"series": name, "history": runs[name][:start].tolist()} for name in names for start in (84, 90)]
    got = client.deployments.predict("stores", rows).outputs
    for name, wanted in {"forecast": said.output, "low": said.beside["low"], "high": said.beside["high"]}.items():
        assert np.allclose(np.concatenate([getattr(one, name) for one in got]), wanted, rtol=1e-4)
    bare = client.deployments.predict("stores", [{"series": name} for name in names]).outputs
    assert np.allclose([one.forecast for one in bare], [one.forecast for one in got[::2]], rtol=1e-5)
    with running.http() as http:
        for series, code in (("roma", "unknown_value"), (None, "missing_value")):
            refused = http.post("/api/v1/deployments/stores/predict", json={"inputs": [{"series": series}]})
            assert (refused.status_code, refused.json()["code"]) == (400, code)
            assert refused.json()["param"] == "series"
        infer = {"inputs": [
            {"name": "history", "datatype": "FP32", "shape": [1, 24], "data": runs["rome"][60:84].tolist()},
            {"name": "series", "datatype": "BYTES", "shape": [1], "data": ["rome"]},
        ]}  # fmt: skip
        outputs = {one["name"]: one["data"] for one in http.post("/v2/models/stores/infer", json=infer).json()["outputs"]}
        assert np.allclose(outputs["forecast"], got[2].forecast, rtol=1e-5)
        infer["inputs"][1]["data"] = ["roma"]
        assert http.post("/v2/models/stores/infer", json=infer).status_code == 400
    client.deployments.delete("stores")
