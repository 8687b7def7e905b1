"""Whether a training's data fits into memory, told before it starts; if not, it is streamed, or refused with the estimate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TrainingSpec
from modelworks.core.types import Column
from modelworks.ml.machine import give_back
from modelworks.ml.train.algorithms import TRAINERS
from modelworks.ml.train.checks import feature_columns

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable

MIB = 1 << 20
_LIBRARIES = 400 * MIB  # what a job's process takes before it reads a row
_COPIES = 3  # of the features, while they are prepared and fitted
_TERMS = 1000  # features of a text as tf-idf
_SPECTROGRAM = 40 * 100  # features of a second of sound


def streams(algorithm: str) -> bool:
    """Whether the algorithm can learn from data that is not in memory."""
    trainer = TRAINERS.get(algorithm)
    return hasattr(trainer, "learn") or hasattr(trainer, "stream")


def budget(limit_mb: int | None) -> int:
    """Bytes that data may take: the job's limit without its libraries, or half of what the machine has free."""
    if limit_mb is not None:
        return max(limit_mb * MIB - _LIBRARIES, limit_mb * MIB // 4)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30
    return free // 2


def open_table(
    path: Path, columns: Sequence[Column], profile: dict[str, Any], spec: TrainingSpec, room: int
) -> pa.Table | StoredTable:
    """The dataset in memory when training on it fits into `room` bytes, else as rows to stream.

    InvalidInput (too_large) with the estimate when `spec.algorithm` needs all of it.
    """
    from pyarrow import parquet

    from modelworks.ml.data.stored import StoredTable

    stored = StoredTable(path)
    need = estimate(stored, columns, profile, spec)
    if need <= room:
        return parquet.read_table(path)
    if streams(spec.algorithm):
        give_back()
        return stored
    ready = ", ".join(name for name in TRAINERS if streams(name)) or "none"
    raise InvalidInput(
        f"{spec.algorithm} needs all {stored.num_rows:,} rows in memory, some {-(-need // MIB):,} MiB, and there are "
        f"{room // MIB:,} MiB for them; raise resources.memory_mb, use fewer features, or choose an algorithm that "
        f"streams: {ready}",
        code="too_large",
        param="algorithm",
        detail={"estimated_mb": -(-need // MIB), "available_mb": room // MIB},
    )


def estimate(stored: StoredTable, columns: Sequence[Column], profile: dict[str, Any], spec: TrainingSpec) -> int:
    """Bytes that training in memory takes at its height: the rows as they are, and copies of their features."""
    features = feature_columns(spec, columns)
    entries = {entry["name"]: entry for entry in profile.get("columns", [])}
    width = sum(_features(column, entries.get(column.name, {})) for column in features)
    raw = stored.width([column.name for column in features]) + sum(50 for column in features if _is_object(column))
    return int(stored.num_rows * (2 * raw + _COPIES * 4 * width))


def _is_object(column: Column) -> bool:
    return column.type in ("category", "text", "time", "image", "audio", "sequence")


def _features(column: Column, entry: dict[str, Any]) -> float:
    """How many features the default preparation makes of a column, about."""
    if column.type == "category":
        return float(min(1000, entry.get("distinct", 10)))
    if column.type == "text":
        return float(min(_TERMS, 10 * entry.get("distinct", _TERMS)))
    if column.type == "image":
        sides = [min(64.0, entry.get(side, {}).get("median", 64.0)) for side in ("width", "height")]
        return sides[0] * sides[1] * (1 if set(entry.get("modes", {})) <= {"L", "1"} else 3)
    if column.type == "audio":
        return _SPECTROGRAM * min(10.0, entry.get("seconds", {}).get("max", 1.0))
    return 5.0 if column.type == "time" else 1.0
