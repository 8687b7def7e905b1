"""What this process takes of the machine's memory, and what is left of it. Light."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import threading
import time

from modelworks.core.telemetry import resident

_M_MMAP_THRESHOLD, _LARGE = -3, 512 << 10


def give_back() -> None:
    """From here on large arrays return to the system as soon as they are freed. Else glibc keeps them once it has seen a
    few, and a process that streams looks as large as all that it ever held.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.malloc_trim(0)


def available() -> int:
    """Bytes that this process may still take: by the machine, its control group and its own limit."""
    with open("/proc/meminfo") as file:
        figures = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.split()[1].isdigit()}
    free = figures.get("MemAvailable", 2**40)
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            limit = most.read().strip()
            if limit != "max":
                free = min(free, max(0, int(limit) - int(now.read())))
    except OSError:
        pass
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        free = min(free, max(0, soft - _data()))
    return free


def _data() -> int:
    """Bytes that count for RLIMIT_DATA."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmData")), 0)


class Peak:
    """The most memory that is resident meanwhile, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._most, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, resident())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._most, resident())
