"""Text on its way to a terminal: what users named and models said stays text, whatever characters it holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from modelworks.core.tasks import primary

# C0 and C1 controls, line and paragraph separators, and the marks that reorder text
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_UNSAFE_IN_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))

_BARS = " ▁▂▃▄▅▆▇█"


def plain(value: object) -> str:
    """One line: control characters are shown as their escapes (`\\x1b`), so that a terminal does not obey them."""
    return _UNSAFE.sub(_escaped, str(value))


def lines(text: str) -> str:
    """As `plain`, but line ends and tabs stay."""
    return _UNSAFE_IN_LINES.sub(_escaped, text.replace("\r\n", "\n"))


def to_json(value: Any) -> str:
    """Indented JSON that is also safe to look at."""
    text = json.dumps(value, ensure_ascii=False, indent=2, default=str)
    return _UNSAFE_IN_LINES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escaped(match: re.Match[str]) -> str:
    number = ord(match[0])
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(number) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def size(count: float) -> str:
    """Bytes for people: 2841 -> `2.8 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: Any) -> str:
    """A figure for people; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def counted(count: int, noun: str) -> str:
    """`1 row`, `1,797 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def deleted(ref: str, versions: Sequence[int]) -> str:
    """`deleted iris: versions 1, 3`."""
    plural = "s" if len(versions) > 1 else ""
    return f"deleted {ref.partition(':')[0]}: version{plural} {', '.join(map(str, versions))}"


def bars(counts: Sequence[float]) -> str:
    """A histogram in one line, a character a bin; an empty bin is a blank."""
    most = max(counts, default=0)
    return "".join(_BARS[math.ceil(count * (len(_BARS) - 1) / most)] if count > 0 else " " for count in counts)


def headline(metrics: dict[str, Any], task: str | None) -> tuple[str, dict[str, Any]] | None:
    """The metric that stands for all: the task's primary one where it was computed, else the first."""
    found = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    name = primary(task, found)
    return None if name is None else (name, found[name])


def when(seconds: float | None) -> str:
    """A time of the server's clock, in the local time zone."""
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


def short(digest: str) -> str:
    return plain(digest.removeprefix("sha256:")[:12])


def decimal(value: Any) -> str:
    """A share with four decimals; `-` where there is none."""
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def interval(metric: dict[str, Any]) -> str:
    """`0.9600 [0.9283, 0.9917]`: the mean and its 95 % interval."""
    mean, low, high = (metric.get(name) for name in ("mean", "low", "high"))
    if not isinstance(mean, int | float):
        return "-"
    bounded = isinstance(low, int | float) and isinstance(high, int | float)
    return f"{mean:.4f}" + (f" [{low:.4f}, {high:.4f}]" if bounded else "")
