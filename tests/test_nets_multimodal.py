"""Rows of numbers, categories, texts, images and sounds in one model: each part tells a bit of the answer, and all are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modelworks.core.types import Column
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from tests import learning, media

_TYPES: dict[str, Any] = {"weight": "number", "colour": "category", "note": "text", "photo": "image", "call": "audio", "target": "category"}


def animals(rows: int = 240) -> learning.Table:
    """The target is four bits: heavy or light, said to be wild or tame, dark on the left or right, a low or a high call."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (rows, 4))
    words = np.array(["it", "was", "seen", "near", "the", "river", "at", "noon"])
    notes, photos, calls = [], [], []
    for row, (_, wild, right, high) in enumerate(bits):
        said = [*random.choice(words, 4), ("tame", "wild")[wild]]
        notes.append(" ".join(random.permutation(said)))
        pixels = random.integers(0, 90, (8, 8)).astype(np.uint8)
        pixels[:, 4 * right : 4 * right + 4] += 120
        photos.append(media.picture(pixels))
        calls.append(media.tone((300, 1500)[high] + 5 * float(random.random()), 0.08, rate=8000, noise=0.02, seed=row))
    table = {
        "weight": 3.0 * bits[:, 0] + random.normal(0, 0.5, rows),
        "colour": random.choice(["red", "brown"], rows).tolist(),
        "note": notes,
        "photo": pa.array(photos, pa.binary()),
        "call": pa.array(calls, pa.binary()),
        "target": ["".join(map(str, row)) for row in bits],
    }
    return pa.table(table), [Column(name=name, type=kind) for name, kind in _TYPES.items()]


def test_every_part_of_a_row_is_needed_and_all_of_them_suffice(tmp_path: Path) -> None:
    given = {"epochs": 12, "learning_rate": 0.005, "schedule": "one-cycle", "batch_size": 32, "width": 24, "channels": [8]}
    steps = [
        {"op": "resample", "rate": 8000}, {"op": "mel-spectrogram", "window": 256, "hop": 80, "bands": 16},
        {"op": "normalise", "columns": "audio"}, {"op": "tokenise", "vocabulary": 64}, "one-hot", "standardise",
    ]  # fmt: skip
    spec: dict[str, Any] = {"algorithm": "multimodal", "hyperparameters": given, "transforms": steps}
    found = learning.run(animals(), tmp_path, **spec)
    assert found.report["metrics"]["accuracy"]["mean"] > 0.9
    assert found.manifest.task == "multimodal-classification"
    package = learning.packaged(found, tmp_path)
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 32
    for features in (["weight", "colour"], ["weight", "colour", "note", "photo"]):
        less = learning.run(animals(160), tmp_path, features=features, **spec)
        assert less.report["metrics"]["accuracy"]["mean"] < 0.8, features
