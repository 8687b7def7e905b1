"""Data that is larger than the memory for it: streamed by those that can, refused with the estimate by all others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TrainingSpec
from modelworks.core.types import Column
from modelworks.ml.data.canonical import CanonicalFile
from modelworks.ml.data.infer import Inferred
from modelworks.ml.data.stored import StoredTable
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.train.memory import budget, estimate, open_table
from modelworks.ml.train.train import train
from tests.learning import Context, packaged

ROWS, WIDTH = (30_000, 150_000), 60


def write(path: Path, rows: int, width: int) -> list[Column]:
    """Numbers and a class that follows them, written as ingest does; sorted by class, the worst case for a buffer."""
    kinds = [Inferred(f"x{i}", "number") for i in range(width)] + [Inferred("kind", "category")]
    file = CanonicalFile(path, kinds)
    random = np.random.default_rng(0)
    weights = random.normal(size=width)
    for kind in ("a", "b"):
        left = rows // 2
        while left:
            values = random.normal(size=(8000, width)).round(2)
            chosen = values[(values @ weights > 0) == (kind == "b")][:left]
            left -= len(chosen)
            arrays = [pa.array(column) for column in chosen.T] + [pa.array([kind] * len(chosen))]
            file.write(pa.RecordBatch.from_arrays(arrays, names=[one.name for one in kinds]))
    file.close()
    return [Column(name=one.name, type=one.type) for one in kinds]


def spec(algorithm: str, **more: object) -> TrainingSpec:
    return TrainingSpec.model_validate({"model": "m", "dataset": "d:1", "target": "kind", "algorithm": algorithm} | more)


def learn(path: Path, columns: list[Column], workdir: Path, room: int, algorithm: str = "sgd-classifier", **more: object):
    asked = spec(algorithm, **more)
    table = open_table(path, columns, {}, asked, room)
    ctx = Context(workdir)
    made = train(table, columns, asked, ctx, dataset_ref="d:1", dataset_digest="0" * 64, code_version="1")
    return table, made, ctx


def test_rows_are_found_by_number_and_mixed_without_loss(tmp_path: Path) -> None:
    columns = write(tmp_path / "t.parquet", 5000, 4)
    stored = StoredTable(tmp_path / "t.parquet")
    whole = pq.read_table(tmp_path / "t.parquet")
    rows = np.array([4999, 0, 2500, 17, 2501])
    got = stored.batch(columns, rows)
    assert got["x1"] == pytest.approx(whole["x1"].to_numpy()[rows].astype(np.float32))
    assert got["kind"].tolist() == [whole["kind"][int(row)].as_py() for row in rows]
    numbers = np.concatenate([found for found, _ in stored.mixed(columns, tmp_path, 0).chunks()])
    assert sorted(numbers) == list(range(5000))
    assert 0.4 < np.mean(numbers[:500] < 2500) < 0.6
    for found, batch in stored.mixed(columns, tmp_path, 1).chunks():
        assert batch["x0"] == pytest.approx(whole["x0"].to_numpy()[found].astype(np.float32))


def test_a_streamed_model_is_as_good_and_its_package_answers_alike(tmp_path: Path) -> None:
    columns = write(tmp_path / "t.parquet", 6000, 8)
    table, streamed, ctx = learn(tmp_path / "t.parquet", columns, tmp_path, 1000)
    assert isinstance(table, StoredTable)
    assert any("streamed" in message for _, message, _ in ctx.events)
    in_memory = learn(tmp_path / "t.parquet", columns, tmp_path, 1 << 40)
    assert isinstance(in_memory[0], pa.Table)
    scores = [made.report["metrics"]["accuracy"]["mean"] for made in (streamed, in_memory[1])]
    assert min(scores) > 0.95
    runtime = OnnxRuntime()
    runtime.load(packaged(streamed, tmp_path), 1)
    assert streamed.manifest.parity.inputs
    again = learn(tmp_path / "t.parquet", columns, tmp_path, 1000)[1]
    assert again.manifest.digest == streamed.manifest.digest


def test_what_needs_all_of_it_says_so_with_the_estimate(tmp_path: Path) -> None:
    columns = write(tmp_path / "t.parquet", 4000, 8)
    path = tmp_path / "t.parquet"
    for algorithm in ("logistic-regression", "gradient-boosted-trees"):
        with pytest.raises(InvalidInput, match="needs all 4,000 rows in memory") as caught:
            open_table(path, columns, {}, spec(algorithm), 1000)
        assert caught.value.code == "too_large"
        assert "sgd-classifier" in caught.value.message
        assert caught.value.detail["estimated_mb"] == -(-estimate(StoredTable(path), columns, {}, spec(algorithm)) // (1 << 20))
    with pytest.raises(InvalidInput, match="drop-duplicates needs all rows"):
        learn(path, columns, tmp_path, 1000, transforms=["drop-duplicates"])
    with pytest.raises(InvalidInput, match="put drop-missing first"):
        learn(path, columns, tmp_path, 1000, transforms=["standardise", "drop-missing"])
    assert budget(1024) < 1024 << 20
    assert budget(None) > 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Resident memory of a process that trains on some rows, then on five times as many."""
    script = """
import json, re, sys
from pathlib import Path
from tests.test_train_streaming import WIDTH, learn
from modelworks.core.types import Column
columns = [Column(name=f"x{i}", type="number") for i in range(WIDTH)] + [Column(name="kind", type="category")]
folder = Path(sys.argv[1])
peaks = []
for name in ("small", "large"):
    made = learn(folder / f"{name}.parquet", columns, folder, 1000, hyperparameters={"max_iter": 2})[1]
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
print(json.dumps([peaks, made.report["metrics"]["accuracy"]["mean"]]))
"""
    for name, rows in zip(("small", "large"), ROWS, strict=True):
        write(tmp_path / f"{name}.parquet", rows, WIDTH)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (small, large), accuracy = json.loads(done.stdout)
    data = (ROWS[1] - ROWS[0]) * WIDTH * 8 / 2**20  # MiB of the numbers that the larger has more
    assert accuracy > 0.9
    assert large - small < data / 2, f"{large - small:.0f} MiB more for {data:.0f} MiB more of data"
