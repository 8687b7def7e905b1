"""Progress on stderr: bars on a terminal, lines of text elsewhere, nothing with --json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelworks.cli.exits import Failed
from modelworks.cli.session import Session
from modelworks.cli.text import plain

if TYPE_CHECKING:
    from modelworks.core.types import Job, JobEvent

_TOLD = frozenset({"fold", "warning"})  # an error is what the command ends with


@contextmanager
def transfer(session: Session, what: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A bar of bytes; yields the callback, None where there is no terminal."""
    if session.json or not session.notes.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=session.notes, transient=True) as bar:
        task = bar.add_task(plain(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def job_bar(session: Session, what: str, tell: Callable[[str], None] | None = None) -> Iterator[tuple]:
    """A bar of one job; yields the callbacks (progress, on_event) for `wait`. Folds and warnings are told as lines."""
    say = tell or session.note
    if session.json or not session.notes.is_terminal:
        yield lambda job: None, lambda event: None if session.json else _tell(event, say)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=session.notes, transient=True) as bar:
        task = bar.add_task(plain(what), total=1.0)

        def progress(job: Job) -> None:
            stage = job.stage or job.status
            bar.update(task, completed=job.progress, description=plain(f"{what}: {stage}"))

        def on_event(event: JobEvent) -> None:
            _tell(event, tell or (lambda text: bar.console.print(plain(text))))

        yield progress, on_event


def _tell(event: JobEvent, say: Callable[[str], None]) -> None:
    if event.kind in _TOLD and event.message:
        say(f"warning: {event.message}" if event.kind == "warning" else event.message)


def watch(session: Session, job: Job) -> Job:
    """Follow a job to its end; one that did not succeed is `Failed`. Ctrl-C leaves it running and says how to go on."""
    from modelworks.client import error_of_job

    try:
        if session.notes.is_terminal and not session.json:
            from modelworks.cli.curves import show

            ended = show(session, job)
        else:
            with job_bar(session, f"{job.kind} {job.id}") as (progress, on_event):
                ended = session.client.jobs.wait(job, progress=progress, on_event=on_event, check=False)
    except KeyboardInterrupt:
        session.note(
            f"the job goes on; `modelworks jobs watch {job.id}` follows it, `modelworks jobs cancel {job.id}` stops it"
        )
        raise
    error = error_of_job(ended)
    if error is not None:
        if session.json:
            session.emit(ended)
        raise Failed(error.message, code=error.code, param=error.param)
    return ended
