"""The terminal's view of a running job: what its events told, as curves; text stays text."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from modelworks import Client
from modelworks.cli import curves as module
from modelworks.cli.curves import Curves, duration, plot
from modelworks.core.types import Job, JobEvent
from tests.client_fake import KEY, FakeServer, page


def job(**more: Any) -> Job:
    given = {"id": "job_1", "project_id": "p", "kind": "train", "spec": {}, "status": "running", "progress": 0.4}
    return Job.model_validate({**given, **more})


def metric(seq: int, step: int, part: str = "", **values: float | None) -> JobEvent:
    data = {"step": step, "unit": "epoch", "part": part, "values": values, "seconds": 0.1}
    return JobEvent(job_id="job_1", seq=seq, kind="metric", data=data)


def shown(curves: Curves) -> str:
    out = StringIO()
    Console(file=out, width=100, force_terminal=False).print(curves)
    return out.getvalue()


def test_curves_grow_from_events_with_speed_and_what_is_left() -> None:
    curves = Curves(job(stage="epoch 9 of 20", metrics={"rows_per_s": 1234.4, "eta_s": 75.0}))
    for step in range(1, 10):
        curves.take(metric(step, step, loss=1 / step, val_loss=1.2 / step, val_accuracy=step / 10, lr=0.001))
    text = shown(curves)
    for said in ("train job_1", "40%", "epoch 9 of 20", "1,234 rows/s", "1 min 15 s left", "loss by epoch", "val_accuracy by epoch"):
        assert said in text
    assert "loss 0.1111" in text
    assert "val_loss 0.1333" in text
    assert any("\u2801" <= letter <= "\u28ff" for letter in text)


def test_the_part_that_told_last_is_drawn() -> None:
    curves = Curves(job())
    for step in (1, 2, 3):
        curves.take(metric(step, step, "fold 1 of 2", loss=0.5))
    for step in (1, 2, 3):
        curves.take(metric(3 + step, step, "fold 2 of 2", loss=0.5 / step))
    assert "loss by epoch, fold 2 of 2" in shown(curves)


def test_a_line_that_falls_is_drawn_falling_and_gaps_are_left_out() -> None:
    lines = [("loss", [(1.0, 4.0), (2.0, float("nan")), (3.0, 2.0), (4.0, 1.0)])]
    rows = [text.plain for text in plot(lines, width=20, height=4)]
    columns = [[at for at, letter in enumerate(row[11:]) if letter != "\u2800"] for row in rows[:4]]
    assert columns[0][0] == 0
    assert columns[3][-1] == 19
    assert rows[0].startswith("         4 ")
    assert rows[3].startswith("         1 ")
    assert plot([("loss", [(1.0, float("inf"))])]) == []


def test_what_a_job_says_cannot_command_the_terminal() -> None:
    curves = Curves(job(stage="\x1b[2J[bold]x[/bold]"))
    curves.take(JobEvent(job_id="job_1", seq=1, kind="warning", message="\x1b]0;title\x07 [red]"))
    for step in (1, 2):
        curves.take(metric(step + 1, step, "\x1b[31m", loss=float(step)))
    text = shown(curves)
    assert "\x1b" not in text
    assert "[bold]x[/bold]" in text
    assert "[red]" in text


def test_a_job_that_says_nothing_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, where = FakeServer(), "/api/v1/jobs/job_1"
    early, late = (job(progress=part, stage=stage).public() for part, stage in ((0.1, "reading"), (0.7, "final fit")))
    fake.on("GET", where, early, late, job(progress=1.0, status="succeeded").public())
    fake.on("GET", f"{where}/events", page())
    drawn: list[str] = []

    class Looking(Curves):
        def look(self, job: Job) -> None:
            super().look(job)
            drawn.append(shown(self))

    monkeypatch.setattr(module, "Curves", Looking)
    console = Console(file=StringIO(), force_terminal=True)
    with Client(fake.url, KEY) as client:
        session: Any = SimpleNamespace(client=client, notes=console)
        ended = module.show(session, job())
    fake.close()
    assert ended.status == "succeeded"
    assert [said in text for said, text in (("10%", drawn[0]), ("final fit", drawn[1]), ("70%", drawn[1]))] == [True] * 3


def test_durations() -> None:
    assert [duration(seconds) for seconds in (4.4, 75, 7260)] == ["4 s", "1 min 15 s", "2 h 1 min"]
