"""What a training will take, told before it begins: by every kind of algorithm, and nothing is trained for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TrainingSpec
from modelworks.ml.data.stored import StoredTable
from modelworks.ml.train import advise as advising
from modelworks.ml.train.memory import estimate
from modelworks.ml.train.problem import pose
from tests import learning
from tests.test_forecast import passengers
from tests.test_train_streaming import write

PLENTY = 1 << 40


def advised(data: learning.Table, folder: Path, room: int = PLENTY, **spec: Any) -> dict[str, Any]:
    pq.write_table(data[0], folder / "t.parquet", row_group_size=1024)
    return of_file(folder / "t.parquet", data[1], folder, room, **spec)


def of_file(path: Path, columns: Any, folder: Path, room: int = PLENTY, **spec: Any) -> dict[str, Any]:
    whole = TrainingSpec.model_validate({"model": "m", "dataset": "d:1", "target": "target"} | spec)
    return advising.advise(StoredTable(path), columns, {}, whole, learning.Context(folder), room)


CASES: dict[str, tuple[learning.Table, dict[str, Any]]] = {
    "ridge": (learning.bundled("diabetes"), {"validation": {"kfold": 3, "repeats": 2}}),
    "gradient-boosted-trees": (learning.bundled("iris"), {"hyperparameters": {"n_estimators": 5}}),
    "mlp": (learning.bundled("iris"), {"hyperparameters": {"epochs": 400}, "validation": {"kfold": 3, "repeats": 2}}),
    "autoencoder": (learning.bundled("iris"), {"hyperparameters": {"epochs": 400, "positive": "setosa", "bottleneck": 2}}),
    "forecaster": (passengers(), {"target": "passengers", "time": "month", "hyperparameters": {"season": 12}}),
}


@pytest.mark.parametrize("algorithm", sorted(CASES))
def test_every_kind_of_algorithm_tells_what_it_takes(algorithm: str, tmp_path: Path) -> None:
    data, more = CASES[algorithm]
    found = advised(data, tmp_path, algorithm=algorithm, **more)
    assert found["fits"] == (7 if "validation" in more else 2)
    fits = found["seconds"] - found["evaluation_seconds"] - found["packaging_seconds"]
    assert 0 < found["fit_seconds"] <= fits + 0.01 <= found["fits"] * found["fit_seconds"] + 0.02
    course = algorithm in ("autoencoder", "forecaster")
    assert (found["evaluation_seconds"] > 0) == (not course)
    assert (found["packaging_seconds"] > 0) == (not course and algorithm != "mlp")
    assert 50 < found["memory_mb"] < found["free_mb"]
    assert found["will_fit"]
    assert found["measured_rows"] == found["rows"] == data[0].num_rows
    assert ("step_ms" in found) == (algorithm in ("mlp", "autoencoder"))
    assert found["warnings"] == []
    assert set(tmp_path.iterdir()) == {tmp_path / "t.parquet"}


def test_a_net_is_not_trained_for_it_and_its_time_follows_epochs_and_rows(tmp_path: Path) -> None:
    columns = write(tmp_path / "big.parquet", 40_000, 12)
    given = {"target": "kind", "algorithm": "mlp", "hyperparameters": {"epochs": 5000, "batch_size": 100, "hidden": [8]}}
    found = of_file(tmp_path / "big.parquet", columns, tmp_path, **given)
    assert 15_000 < found["measured_rows"] <= 20_000
    steps = found["step_ms"] / 1000 * 400 * 5000
    assert steps <= found["fit_seconds"] < steps + 60  # and some seconds to prepare
    limited = of_file(tmp_path / "big.parquet", columns, tmp_path, stopping={"max_seconds": 30}, **given)
    assert 30 <= limited["fit_seconds"] < 90
    assert any("max_seconds stops it after 30 s" in warning for warning in limited["warnings"])


def test_it_warns_of_what_will_not_fit_and_says_what_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = learning.bundled("iris")
    refused = advised(data, tmp_path, 1000, algorithm="logistic-regression")
    assert not refused["will_fit"]
    assert "it will be refused" in refused["warnings"][0]
    streamed = advised(data, tmp_path, 1000, algorithm="sgd-classifier")
    assert streamed["will_fit"]
    assert streamed["streamed"]
    assert streamed["warnings"] == []
    monkeypatch.setattr(advising, "available", lambda: 0)
    tight = advised(data, tmp_path, algorithm="logistic-regression")
    assert not tight["will_fit"]
    assert "hardly fit" in tight["warnings"][0]


def test_memory_is_scaled_to_the_rows_that_were_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = write(tmp_path / "big.parquet", 60_000, 12)
    monkeypatch.setattr(advising, "ROWS", 2000)
    monkeypatch.setattr(advising, "_SECONDS", 0.0)
    found = of_file(tmp_path / "big.parquet", columns, tmp_path, target="kind", algorithm="logistic-regression")
    spec = TrainingSpec(model="m", dataset="d:1", target="kind", algorithm="logistic-regression")
    more = estimate(StoredTable(tmp_path / "big.parquet"), columns, {}, spec) / 2**20
    assert found["measured_rows"] <= 2100
    assert found["memory_mb"] > 0.9 * more + 50


def test_what_cannot_be_learned_is_refused_as_in_training(tmp_path: Path) -> None:
    table, columns = learning.bundled("iris")
    same = table.set_column(4, "target", pa.array(["one"] * 150))
    with pytest.raises(InvalidInput, match="only one class"):
        advised((same, columns), tmp_path, algorithm="logistic-regression")


def test_the_time_to_evaluate_follows_the_rows_that_are_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by what is drawn: seconds would tell of the machine."""
    clock = [0.0]
    monkeypatch.setattr(advising.time, "monotonic", lambda: clock[0])

    def scored(task: str, folds: Any, wanted: Any, classes: Any, seed: int, resamples: int) -> None:
        rows = sum(len(one.rows) for one in folds)
        clock[0] += rows * (resamples if len(folds) == 1 else 1) * 1e-6

    monkeypatch.setattr(advising, "summarise", scored)
    columns = write(tmp_path / "big.parquet", 20_000, 4)
    table = pq.read_table(tmp_path / "big.parquet")

    def seconds(rows: int, **more: Any) -> float:
        spec = {"model": "m", "dataset": "d:1", "target": "kind", "algorithm": "logistic-regression", **more}
        problem = pose(table, columns, TrainingSpec.model_validate(spec))
        return advising.scoring_seconds(problem, rows)

    assert seconds(20_000) == pytest.approx(4.0)  # 4,000 rows drawn 1,000 times
    assert seconds(300_000) == pytest.approx(60.0)
    assert seconds(3_000_000) == pytest.approx(600_000 * 333e-6), "more rows are drawn less often"
    assert seconds(300_000, validation={"kfold": 3}) == pytest.approx(0.3)
    assert seconds(300_000, validation={"kfold": 3, "repeats": 2}) == pytest.approx(0.6)
    assert seconds(300_000, validation={"test": "other"}) == 0


def test_a_search_counts_its_trials(tmp_path: Path) -> None:
    data = learning.bundled("iris")
    more = {"search": {"trials": 4, "metric": "accuracy"}, "validation": {"holdout": 0.25}}
    found = advised(data, tmp_path, algorithm="logistic-regression", **more)
    assert found["fits"] == 4 * 3 + 2
