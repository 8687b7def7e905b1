"""What the tests of learning share: real tables, and a job context that keeps what it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modelworks.core.specs import TrainingSpec
from modelworks.core.types import Column
from modelworks.ml.package import Manifest, Package
from modelworks.ml.train.train import Trained, train


class Context:
    """A JobContext in memory. `fail_after`: raise Crash once this many checkpoints were kept."""

    seed, threads, processes = 0, 1, 1
    only: str | None = None

    def __init__(self, workdir: Path, kept: dict[str, bytes] | None = None, fail_after: int | None = None) -> None:
        self.workdir = workdir
        self.kept = {} if kept is None else kept
        self.fail_after = fail_after
        self.models: dict[str, Package] = {}
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.points: list[tuple[str, str, int, dict[str, float]]] = []
        self.advice: list[dict[str, Any]] = []
        self.reports: list[tuple[float, str, dict[str, Any]]] = []

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        self.reports.append((fraction, stage, metrics))

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.events.append((kind, message, data))

    def metric(self, step: int, values: Mapping[str, float], *, unit: str = "epoch", part: str = "") -> None:
        self.points.append((part, unit, step, dict(values)))

    def advise(self, found: dict[str, Any]) -> None:
        self.advice.append(found)

    def spread(self, names: Sequence[str], parallel: int | None, seconds: float) -> None:
        pass

    def checkpoint(self, name: str, data: bytes) -> None:
        self.kept[name] = data
        if self.fail_after is not None and len(self.kept) >= self.fail_after:
            raise Crash

    def restore(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def model(self, ref: str) -> Package:
        return self.models[ref]


class Crash(BaseException):
    """Stands for kill -9."""


class Dying(Context):
    """Dies after so many checkpoints."""

    def __init__(self, workdir: Path, kept: dict[str, bytes], after: int) -> None:
        super().__init__(workdir, kept)
        self.left = after

    def checkpoint(self, name: str, data: bytes) -> None:
        super().checkpoint(name, data)
        self.left -= 1
        if not self.left:
            raise Crash


Table = tuple[pa.Table, list[Column]]


def bundled(name: str, target: str = "target") -> Table:
    """One of scikit-learn's bundled sets as a canonical table; classes by their names."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    columns = {str(feature): data.data[:, i].astype(float) for i, feature in enumerate(data.feature_names)}
    types = [Column(name=feature, type="number") for feature in columns]
    if "target_names" in data:
        columns[target] = [str(data.target_names[k]) for k in data.target]
        return pa.table(columns), [*types, Column(name=target, type="category")]
    columns[target] = data.target.astype(float)
    return pa.table(columns), [*types, Column(name=target, type="number")]


def mixed(rows: int = 200, seed: int = 0) -> Table:
    """Numbers, integers, booleans and categories with gaps; targets of every type; a group and a time."""
    random = np.random.default_rng(seed)
    age = random.normal(40, 12, rows)
    city = random.choice(["oslo", "rome", "北京"], rows)
    visits = random.integers(0, 9, rows)
    member = random.random(rows) < 0.5
    score = age / 10 + visits + 3 * (city == "rome") + random.normal(0, 1, rows)
    gap = random.random(rows) < 0.1
    table = pa.table(
        {
            "age": pa.array([None if g else v for g, v in zip(gap, age, strict=True)], pa.float64()),
            "visits": pa.array(
                [None if g else int(v) for g, v in zip(np.roll(gap, 3), visits, strict=True)], pa.int64()
            ),
            "member": pa.array([None if g else bool(v) for g, v in zip(np.roll(gap, 5), member, strict=True)]),
            "city": pa.array([None if g else v for g, v in zip(np.roll(gap, 7), city, strict=True)]),
            "clinic": pa.array([f"clinic {i // 10}" for i in range(rows)]),
            "day": pa.array(np.datetime64("2024-01-01", "us") + np.arange(rows)[::-1] * np.timedelta64(1, "D")),
            "score": score,
            "ill": score > np.median(score),
            "grade": (score // 4).astype(np.int64).clip(0, 3),
        }
    )
    types = ["number", "integer", "boolean", "category", "category", "time", "number", "boolean", "integer"]
    return table, [
        Column(name=name, type=kind, nullable=table.column(name).null_count > 0)
        for name, kind in zip(table.column_names, types, strict=True)
    ]


def run(data: Table, workdir: Path, ctx: Context | None = None, test: pa.Table | None = None, **spec: Any) -> Trained:
    whole = TrainingSpec.model_validate({"model": "m", "dataset": "d:1", "target": "target"} | spec)
    return train(
        data[0],
        data[1],
        whole,
        ctx or Context(workdir),
        test_table=test,
        dataset_ref="d:1",
        dataset_digest="0" * 64,
        code_version="1",
    )


def packaged(trained: Trained, workdir: Path) -> Package:
    return stored(trained.manifest, trained.files, workdir)


def stored(manifest: Manifest, files: dict[str, bytes], workdir: Path) -> Package:
    for name, data in files.items():
        (workdir / manifest.files[name].digest).write_bytes(data)
    return Package(manifest, lambda digest: workdir / digest)
