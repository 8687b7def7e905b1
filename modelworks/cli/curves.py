"""A running job on a terminal: its bar, its curves as they grow, throughput and what is left. From the job's events, all of
which come again when it is looked at anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from modelworks.cli.session import Session
from modelworks.cli.text import number, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modelworks.core.types import Job, JobEvent

_WIDTH, _HEIGHT = 56, 9  # characters of a plot
_SPEED = ("rows_per_s", "lr", "learning_rate", "grad_norm", "eta_s", "memory_mb", "epoch")  # figures, not curves
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column
_COLOURS = ("cyan", "yellow", "green", "magenta")
_WIDE = 30.0  # times that the highest point is above the lowest: then a logarithmic scale shows more

Line = list[tuple[float, float]]


class Curves:
    """What is known of a job, drawn when it is asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.notes: list[str] = []
        self._lines: dict[tuple[str, str, str], Line] = {}  # (part, unit, metric) -> points
        self._newest: tuple[str, str] | None = None
        self._speed: dict[str, float] = {}

    def look(self, job: Job) -> None:
        self.job = job

    def take(self, event: JobEvent) -> None:
        if event.kind == "metric":
            part, unit = str(event.data.get("part") or ""), str(event.data.get("unit") or "epoch")
            for name, value in (event.data.get("values") or {}).items():
                if not isinstance(value, int | float):
                    continue
                if name in _SPEED:
                    self._speed[name] = float(value)
                else:
                    self._lines.setdefault((part, unit, name), []).append((float(event.data["step"]), float(value)))
                    self._newest = part, unit
        elif event.kind in ("fold", "warning", "log") and event.message:
            text = f"warning: {event.message}" if event.kind == "warning" else event.message
            self.notes = [*self.notes, plain(text)][-4:]

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        job = self.job
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=job.progress, width=30)
        head.add_row(Text(f"{job.kind} {job.id}"), bar, Text(f"{job.progress:.0%}"), Text(plain(job.stage or job.status)))
        parts: list[RenderableType] = [head]
        if figures := self._figures():
            parts.append(Text(figures, style="dim"))
        for title, lines in self._plots():
            parts += [Text(plain(title), style="bold"), *plot(lines)]
        return Group(*parts, *(Text(note, style="dim") for note in self.notes))

    def _figures(self) -> str:
        now = {**self._speed, **{name: value for name, value in self.job.metrics.items() if isinstance(value, int | float)}}
        said = []
        if speed := now.get("rows_per_s"):
            said.append(f"{number(round(speed))} rows/s")
        if (left := now.get("eta_s")) is not None and self.job.progress < 1:
            said.append(f"{duration(left)} left")
        for name, word in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm"), ("memory_mb", "MiB")):
            if name in now:
                said.append(f"{number(float(now[name]))} {word}" if word == "MiB" else f"{word} {number(float(now[name]))}")
        return " · ".join(said)

    def _plots(self) -> list[tuple[str, list[tuple[str, Line]]]]:
        """The losses together, and one other metric, of the part that told something last."""
        if self._newest is None:
            return []
        part, unit = self._newest
        mine = {name: line for (p, u, name), line in self._lines.items() if (p, u) == (part, unit) and len(line) > 1}
        losses = [(name, line) for name, line in mine.items() if "loss" in name]
        others = [(name, line) for name, line in mine.items() if "loss" not in name]
        suffix = f", {part}" if part else ""
        found = [(f"loss by {unit}{suffix}", losses)] if losses else []
        return found + ([(f"{others[0][0]} by {unit}{suffix}", others[:1])] if others else [])


def plot(lines: Sequence[tuple[str, Line]], width: int = _WIDTH, height: int = _HEIGHT) -> list[Any]:
    """Lines of points as braille, with their bounds beside and names below; a colour a line."""
    from rich.text import Text

    finite = [(name, [p for p in line if math.isfinite(p[1])]) for name, line in lines]
    points = [point for _, line in finite for point in line]
    if not points:
        return []
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    wide = low > 0 and high > _WIDE * low
    bottom, top = (math.log(low), math.log(high)) if wide else (low, high)
    dots = [[0] * width for _ in range(height)]
    owner = [[0] * width for _ in range(height)]
    for index, (_, line) in enumerate(finite):
        for x, y in _dense(line, left, right, 2 * width):
            place = math.log(y) if wide else y
            row = round((1 - (place - bottom) / ((top - bottom) or 1)) * (4 * height - 1))
            column = round((x - left) / ((right - left) or 1) * (2 * width - 1))
            dots[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
            owner[row // 4][column // 2] = index
    drawn = []
    for row in range(height):
        side = number(high) if row == 0 else number(low) if row == height - 1 else ""
        text = Text(f"{side:>10} ")
        for column in range(width):
            style = _COLOURS[owner[row][column] % len(_COLOURS)] if dots[row][column] else ""
            text.append(chr(0x2800 + dots[row][column]), style=style)
        drawn.append(text)
    foot = Text(" " * 11)
    for index, (name, line) in enumerate(finite):
        newest = number(line[-1][1]) if line else "-"
        foot.append(f"{plain(name)} {newest}  ", style=_COLOURS[index % len(_COLOURS)])
    foot.append(f"{number(left)} to {number(right)}{', logarithmic' if wide else ''}", style="dim")
    return [*drawn, foot]


def _dense(line: Line, left: float, right: float, most: int) -> Line:
    """The points, with as many between two as the plot has columns."""
    found: Line = list(line)
    for (x, y), (after, then) in pairwise(line):
        between = int((after - x) / ((right - left) or 1) * most)
        found += [(x + (after - x) * k / between, y + (then - y) * k / between) for k in range(1, between)]
    return found


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show(session: Session, job: Job) -> Job:
    """Draw the job until it is final, as each look at it and each event come; the job as it ended."""
    from rich.live import Live

    curves = Curves(job)
    with Live(curves, console=session.notes, refresh_per_second=4):
        return session.client.jobs.wait(job, progress=curves.look, on_event=curves.take, check=False)
