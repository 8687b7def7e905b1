"""Forecasts: better than the last season again, on a real series; refusals; and a package that goes on from any history."""

from __future__ import annotations

import csv
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec
from modelworks.core.types import Column
from modelworks.ml.data.types import rows_to_batch
from modelworks.ml.evaluate.evaluate import evaluate
from modelworks.ml.forecast.intervals import calibrate, needed, rolling
from modelworks.ml.forecast.windows import Frame, ridge
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from modelworks.ml.train.train import Trained
from modelworks.serve.features import encode_features
from tests.learning import Context, Table, packaged, run

COLUMNS = [Column(name="month", type="time"), Column(name="passengers", type="integer")]


def passengers(shuffled: bool = False) -> Table:
    """AirPassengers, the rows in any order."""
    file = Path(__file__).parents[1] / "recipes" / "air-passengers.csv"
    rows = [(datetime.strptime(month, "%Y-%m"), int(count)) for month, count in list(csv.reader(file.open()))[1:]]
    if shuffled:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    months, counts = zip(*rows, strict=True)
    return pa.table({"month": pa.array(months, pa.timestamp("us")), "passengers": pa.array(counts, pa.int64())}), COLUMNS


def learn(data: Table, workdir: Path, **more: Any) -> Trained:
    given = {"target": "passengers", "time": "month", "algorithm": "forecaster", "hyperparameters": {"season": 12}, **more}
    return run(data, workdir, **given)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forecast")


@pytest.fixture(scope="module")
def trained(workdir: Path) -> Trained:
    return learn(passengers(shuffled=True), workdir)


def test_it_is_better_than_the_seasonal_naive_forecast_beside_it(trained: Trained) -> None:
    metrics, details = trained.report["metrics"], trained.report["details"]
    naive = details["baselines"]["seasonal-naive"]
    assert metrics["mase"]["mean"] < 0.7 < 1.3 < naive["mase"]["mean"]
    assert metrics["smape"]["mean"] < naive["smape"]["mean"] / 2
    assert set(details["baselines"]) == {"seasonal-naive", "linear"}


def test_mase_and_smape_are_what_their_definitions_say(trained: Trained) -> None:
    counts = np.array(passengers()[0].column("passengers").to_pylist(), dtype=float)
    past, tail = counts[:115], counts[115:]
    said = np.array([past[115 - 12 + step % 12] for step in range(12)])
    first = tail[:12]
    assert details_of(trained)["test_rows"] == [29]
    scale = np.abs(past[12:] - past[:-12]).mean()
    every = np.concatenate([said, first, tail[12:17]])  # each year forecast by the one before
    naive = details_of(trained)["baselines"]["seasonal-naive"]
    assert naive["mase"]["mean"] == pytest.approx(np.abs(tail - every).mean() / scale)
    assert naive["smape"]["mean"] == pytest.approx((2 * np.abs(tail - every) / (tail + every)).mean())


def test_half_the_interval_is_the_error_at_the_conformal_place() -> None:
    """The k-th smallest of m, k = ceil((m + 1) level), at each step ahead by itself; the largest when m is too few."""
    errors = np.random.default_rng(0).permuted([np.arange(1.0, 20.0), -10 * np.arange(1.0, 20.0)], axis=1).T
    assert calibrate(errors, 0.9, "rolling").half.tolist() == [18.0, 180.0]
    assert calibrate(errors, 0.5, "rolling").half.tolist() == [10.0, 100.0]
    few = calibrate(errors, 0.99, "rolling")
    assert (few.half.tolist(), few.reached, few.level) == ([19.0, 190.0], 0.95, 0.99)
    assert [needed(level) for level in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


def test_no_origin_knows_what_it_forecasts() -> None:
    """What comes after the windows that a part is forecast by changes nothing in its errors but the truth itself."""
    frame, random = Frame(1, 4, 6, False), np.random.default_rng(0)
    values = random.normal(size=90)
    seen, came = frame.cut(values)
    (found,) = rolling(frame, [(seen, came)], 20)
    begin = len(seen) - len(found)
    assert begin == len(seen) // 2
    line = ridge(*frame.cut(values[: begin + frame.window]))  # all that was known at the first origin
    assert np.allclose(found[0], came[begin] - line(seen[begin : begin + 1])[0])


def steady(steps: int, seed: int) -> np.ndarray:
    """An autoregression with a season of 12 and heavy tails."""
    random = np.random.default_rng(seed)
    shocks, values = random.standard_t(3, steps), np.zeros(steps)
    for at in range(1, steps):
        values[at] = 0.6 * values[at - 1] + shocks[at]
    return values + 10 * np.sin(np.arange(steps) * 2 * np.pi / 12)


def of_steps(values: np.ndarray) -> Table:
    table = pa.table({"month": np.arange(len(values)), "passengers": values})
    return table, [Column(name="month", type="integer"), Column(name="passengers", type="number")]


@pytest.mark.parametrize("level", [0.6, 0.9])
def test_intervals_hold_the_share_that_was_asked_for(workdir: Path, level: float) -> None:
    """Also of errors with tails far heavier than a normal's; measured on what was not learnt from, and again by the package."""
    held, again, widths = [], [], []
    for seed in range(6):
        data = of_steps(steady(400, seed))
        params = {"season": 12, "horizon": 6, "hidden": [], "level": level}
        made = learn(data, workdir, hyperparameters=params, validation={"holdout": 0.5})
        about = details_of(made)["forecast"]
        assert made.report["metrics"]["coverage"]["mean"] == about["coverage"]
        assert np.mean(about["coverage_by_step"]) == pytest.approx(about["coverage"], abs=0.02)
        assert len(about["coverage_by_step"]) == 6
        assert made.manifest.lineage["forecast"]["intervals"]["reached"] == level
        held.append(about["coverage"])
        widths.append(about["interval_width"])
        on_new = EvaluationSpec.model_validate({"model": "m", "method": {"test": "new"}, "metrics": ["coverage"]})
        new = of_steps(steady(400, seed + 100))
        again.append(evaluate(on_new, packaged(made, workdir), *new, Context(workdir)).metrics["coverage"]["mean"])
    assert level - 0.03 < np.mean(held) < level + 0.1  # a little more: the last model has learnt from more than those measured
    assert level - 0.03 < np.mean(again) < level + 0.1
    assert min(widths) > 0


def test_a_level_that_the_series_is_too_short_for_is_warned_of(workdir: Path) -> None:
    made = learn(passengers(), workdir, hyperparameters={"season": 12, "level": 0.99, "hidden": []})
    assert any("can vouch for a level of 0.98" in one and "takes 99" in one for one in made.warnings)
    said = made.manifest.lineage["forecast"]["intervals"]
    assert (said["method"], said["level"], said["errors"]) == ("split-conformal", 0.99, "rolling")
    assert said["reached"] == said["origins"] / (said["origins"] + 1) < 0.99
    short = learn(of_steps(steady(50, 0)), workdir, hyperparameters={"season": 12, "horizon": 4, "level": 0.8})
    assert short.manifest.lineage["forecast"]["intervals"]["errors"] == "leave-one-out"
    assert details_of(short)["forecast"]["interval_width"] > 0


def test_a_gate_on_coverage_holds(workdir: Path) -> None:
    gates = [{"metric": "coverage", "at_least": 0.99}]
    with pytest.raises(InvalidInput, match=r"coverage is 0\.") as refused:
        learn(passengers(), workdir, hyperparameters={"season": 12, "level": 0.5, "hidden": []}, gates=gates)
    assert refused.value.code == "gate_failed"


def details_of(trained: Trained) -> dict[str, Any]:
    found: dict[str, Any] = trained.report["details"]
    return found


def test_the_package_goes_on_from_any_history_and_from_the_end_of_training(trained: Trained, workdir: Path) -> None:
    package, runtime = packaged(trained, workdir), OnnxRuntime()
    signature = runtime.load(package)
    assert replay_parity(package, runtime) > 2
    counts = [float(count) for count in passengers()[0].column("passengers").to_pylist()]
    rows: list[Any] = [{}, {"history": None}, {"history": counts}, {"history": counts[-24:]}, {"history": counts[:60]}]
    said = runtime.predict(rows_to_batch(rows, signature.inputs, "forecast"))
    for name in ("forecast", "low", "high"):
        assert said[name].shape == (5, 12)
        assert np.allclose(said[name][0], said[name][1:4], rtol=1e-5)
    assert (said["low"] < said["forecast"]).all()
    assert (said["forecast"] < said["high"]).all()
    after = np.array(counts[60:72])
    assert np.abs(said["forecast"][4] / after - 1).mean() < 0.1
    tensor = encode_features(signature.inputs, "forecast", rows)[0]
    batch = rows_to_batch(rows, signature.inputs, "forecast")
    assert np.array_equal(np.frombuffer(tensor.data, np.float32), batch["history"].ravel(), True)


@pytest.mark.parametrize("history", [[1.0, 2.0], [None] * 24, "1,2,3", [[1.0]] * 24, [True] * 24])
def test_a_history_that_is_none_is_refused(trained: Trained, history: Any) -> None:
    for encode in (encode_features, lambda inputs, task, rows: rows_to_batch(rows, inputs, task)):
        with pytest.raises(InvalidInput) as refused:
            encode(trained.manifest.signature.inputs, "forecast", [{"history": history}])
        assert refused.value.param == "history"


def test_the_same_series_gives_the_same_package_whatever_the_order_of_its_rows(trained: Trained, workdir: Path) -> None:
    again = learn(passengers(), workdir)
    assert again.manifest.files == trained.manifest.files


def test_folds_are_rolling_origins_and_an_evaluation_repeats_them(trained: Trained, workdir: Path) -> None:
    data = passengers()
    spec = EvaluationSpec.model_validate({"model": "m", "method": {"kfold": 3}, "metrics": ["mase"]})
    found = evaluate(spec, packaged(trained, workdir), data[0], data[1], Context(workdir))
    assert found.details["test_rows"] == [12, 12, 12]
    assert found.details["splitter"] == {"name": "TimeSeriesSplit", "folds": 3, "test_rows": 12}
    assert len(found.metrics["mase"]["folds"]) == 3
    on_new = EvaluationSpec.model_validate({"model": "m", "method": {"test": "new"}, "metrics": ["smape"]})
    found = evaluate(on_new, packaged(trained, workdir), data[0].slice(0, 60), data[1], Context(workdir))
    assert found.details["test_rows"] == [36]
    assert found.metrics["smape"]["mean"] < 0.15


def test_an_irregular_series_is_refused_until_it_is_resampled(workdir: Path) -> None:
    days = [datetime(2024, 1, 1) + timedelta(days=day) for day in range(120) if day % 9]
    sales = [10 + day.day % 7 + 0.1 * at for at, day in enumerate(days)]
    table = pa.table({"month": pa.array(days, pa.timestamp("us")), "passengers": sales})
    data = table, [COLUMNS[0], Column(name="passengers", type="number")]
    given: dict[str, Any] = {"hyperparameters": {"season": 7, "hidden": []}}
    with pytest.raises(InvalidInput) as refused:
        learn(data, workdir, **given)
    assert (refused.value.code, refused.value.param) == ("irregular_steps", "time")
    assert "resample" in refused.value.message
    transforms = [{"op": "resample", "every": "1 day"}]
    made = learn(data, workdir, transforms=transforms, **given)
    assert made.manifest.lineage["forecast"]["step"] == "1 day"
    assert sum(details_of(made)["test_rows"]) == 24
    sliced: dict[str, Any] = {"slices": ["passengers > 12"]}  # of rows, which the steps are not
    with pytest.raises(InvalidInput) as refused:
        learn(data, workdir, transforms=transforms, **given, **sliced)
    assert refused.value.param == "slices"
    for method in ({"test": "d"}, {"holdout": 0.2}):
        ctx, spec = Context(workdir), EvaluationSpec.model_validate({"model": "m", "method": method, **sliced})
        with pytest.raises(InvalidInput) as refused:
            evaluate(spec, packaged(made, workdir), *data, ctx)
        assert (refused.value.param, ctx.reports) == ("slices", [])


def test_a_month_that_is_missing_is_told_of_months(workdir: Path) -> None:
    """Not of days, of which months have different numbers."""
    months = [datetime(2016 + at // 12, at % 12 + 1, 1) for at in range(60) if at != 41]
    table = pa.table({"month": pa.array(months, pa.timestamp("us")), "passengers": [10.0 + at % 12 for at in range(59)]})
    with pytest.raises(InvalidInput, match=r'1 of 58 are not 1 month; add the transform .*"every": "1 month"'):
        learn((table, [COLUMNS[0], Column(name="passengers", type="number")]), workdir, hyperparameters={"season": 12})


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"time": None}, "time"),
        ({"time": "passengers"}, "time"),
        ({"time": "year"}, "time"),
        ({"features": ["month"]}, "features"),
        ({"transforms": ["standardise"]}, "transforms[0]"),
        ({"transforms": [{"op": "resample", "every": "now"}]}, "transforms[0]"),
        ({"metrics": ["accuracy"]}, "metrics"),
        ({"validation": {"holdout": 0.2, "group": "month"}}, "validation"),
        ({"hyperparameters": {"season": 12, "window": 6}}, "hyperparameters.window"),
        ({"hyperparameters": {"season": 12, "horizon": 200}}, "hyperparameters.horizon"),
        ({"algorithm": "ridge", "hyperparameters": {}}, "time"),
    ],
)
def test_what_is_no_forecast_is_refused_by_name(workdir: Path, more: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        learn(passengers(), workdir, **more)
    assert refused.value.param == param


def test_a_second_series_in_the_table_is_refused(workdir: Path) -> None:
    data = passengers()
    with pytest.raises(InvalidInput) as refused:
        learn((pa.concat_tables([data[0], data[0]]), data[1]), workdir)
    assert refused.value.code == "repeated_time"
