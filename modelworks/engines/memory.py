"""A process's memory limit (RLIMIT_DATA): what it is, and telling from an error, a log or its use that it was reached."""

from __future__ import annotations

import errno
import os
import re
import resource
from pathlib import Path

from modelworks.core.settings import MIB

# how Python, C++, OpenBLAS, the loader, onnxruntime and duckdb say that there was no memory
_MARKS = re.compile(
    r"\bMemoryError\b|bad[_ ]alloc|memory allocation (still )?failed|cannot allocate memory|failed to allocate"
    r"|out of memory|failed to map segment|can't start new thread|insufficient memory|failed to launch worker thread"
    r"|libgcc_s\.so\S* must be installed",
    re.IGNORECASE,
)
NEAR = 2 / 3  # of the limit: who dies above it died of it, since what broke it was one allocation more
BRIM = 0.95  # of the limit: who hangs above it, hangs for lack of memory
STILL = 10.0  # seconds of hanging
IDLE = 0.1  # of them, at most, in the program's own code: allocators that get nothing sleep, or spin in the kernel
_HZ = os.sysconf("SC_CLK_TCK")
_PATH = re.compile(r"(?:/[^\s/'\":,()]+)+/(?=[^\s/'\":,()]*)")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z?\s+")


def limit(megabytes: int) -> None:
    """Limit this process's memory from now on."""
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes * MIB, megabytes * MIB))


def limited_to() -> int | None:
    """This process's limit in MiB; None without one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft // MIB


class Gauge:
    """What a process with a limit was seen to take, for when it dies or hangs without a word of it."""

    def __init__(self, pid: int, megabytes: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        self._limit = megabytes * 1024
        self._peak = 0  # KiB
        self._since: float | None = None  # when it was found at the brim, doing nothing of its own
        self._used = 0.0  # seconds in its own code until then
        self.stuck = False

    def look(self, now: float) -> None:
        """Look again; a process that has ended leaves the gauge as it was."""
        try:
            found = re.search(r"^VmData:\s+(\d+)", (self._proc / "status").read_text(), re.MULTILINE)
            used = int((self._proc / "stat").read_text().rpartition(")")[2].split()[11]) / _HZ
        except OSError:
            return
        if not found:
            return
        taken = int(found[1])
        self._peak = max(self._peak, taken)
        if taken < self._limit * BRIM:
            self._since = None
        elif self._since is None or used - self._used > STILL * IDLE:
            self._since, self._used = now, used
        else:
            self.stuck = now - self._since >= STILL

    @property
    def near(self) -> bool:
        """Whether it ever came near its limit."""
        return self._peak >= self._limit * NEAR


def starved(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, is a lack of memory."""
    for _ in range(10):
        if error is None:
            return False
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if not hasattr(error, "as_dict") and _MARKS.search(str(error)):  # our own words never tell it by chance
            return True
        error = error.__cause__ or error.__context__
    return False


def tells_of_starving(log: str) -> bool:
    """Whether the end of a log that a dead process left says that there was no memory."""
    return any(_MARKS.search(line) for line in log.splitlines()[-20:])


def last_words(log: str) -> str:
    """The last line of a log that says something, without its time and without folders; "" for an empty one."""
    for line in reversed(log.splitlines()):
        words = without_folders(_STAMP.sub("", line.strip()))
        if any(letter.isalpha() for letter in words):
            return words[:300]
    return ""


def without_folders(text: str) -> str:
    """Files by their names only: where they lie is for the operator to know."""
    return _PATH.sub("", text)
