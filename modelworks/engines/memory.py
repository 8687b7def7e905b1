"""A process's memory limit (RLIMIT_DATA): what it is, and telling from an error or a log that a process ran into it."""

from __future__ import annotations

import errno
import re
import resource

from modelworks.core.settings import MIB

# how Python, C++, OpenBLAS, the loader, onnxruntime and duckdb say that there was no memory
_MARKS = re.compile(
    r"\bMemoryError\b|bad[_ ]alloc|memory allocation (still )?failed|cannot allocate memory|failed to allocate"
    r"|out of memory|failed to map segment|can't start new thread|insufficient memory",
    re.IGNORECASE,
)
_PATH = re.compile(r"(?:/[^\s/'\":,()]+)+/(?=[^\s/'\":,()]*)")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z?\s+")


def limit(megabytes: int) -> None:
    """Limit this process's memory from now on."""
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes * MIB, megabytes * MIB))


def limited_to() -> int | None:
    """This process's limit in MiB; None without one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft // MIB


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
