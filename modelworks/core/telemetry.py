"""One structured log line an event, as JSON on stderr. Never a key, never a request's content."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

_absent = sys.modules.setdefault("rich", None) is None  # type: ignore[arg-type]
import structlog  # noqa: E402 - it would import rich, which takes longer than itself, for consoles that nobody looks at

if _absent:
    del sys.modules["rich"]


def configure(level: str = "info", process: str = "") -> None:
    """Set up logging for this process; `process` ("gateway", "worker"...) stands in each line."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper(), logging.INFO)),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    if process:
        structlog.contextvars.bind_contextvars(process=process)


def logger(name: str) -> Any:
    return structlog.get_logger(source=name)  # lazy: `configure` may come after it


def resident(pid: int | str = "self") -> int:
    """Bytes of memory that a process has resident; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
