"""What a job's process uses of the machine, from /proc: processor time, memory and threads."""

from __future__ import annotations

import os
import time
from typing import Any

_EVERY = 2.0  # seconds between two samples
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage:
    """`sample(now)` every now and then: what was used since the last sample, or None when that is too short ago."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._cpu = time.process_time()

    def sample(self, now: float) -> dict[str, Any] | None:
        elapsed = now - self._at
        if elapsed < _EVERY:
            return None
        cpu = time.process_time()
        used, self._cpu, self._at = cpu - self._cpu, cpu, now
        return {"cpu_percent": round(100 * used / elapsed, 1), "memory_mb": _memory_mb(), "threads": _threads()}


def _memory_mb() -> float:
    """Resident memory in MiB."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return round(int(file.read().split()[1]) * _PAGE / 2**20, 1)
    except OSError:
        return 0.0


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0
