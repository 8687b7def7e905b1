"""`jobs`: what runs, what ran, and how it went."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from modelworks.cli.session import Session, command, group
from modelworks.cli.text import lines, plain, when

if TYPE_CHECKING:
    from modelworks.core.types import Job

app = group("Look at jobs, follow and stop them.")
JobId = Annotated[str, typer.Argument(help="Id of the job.")]


@command(app, "list")
def list_(
    session: Session,
    kind: Annotated[str | None, typer.Option(help="ingest, train, evaluate or import.")] = None,
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed, cancelled...")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this id.")] = None,
) -> None:
    """List jobs, newest first."""
    found = session.client.jobs.list(kind=kind, status=status, limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("job", "kind", "for", "status", "progress", "attempt", "created", "finished"),
        (
            (
                one.id,
                one.kind,
                _subject(one),
                one.status,
                f"{one.progress:.0%}",
                one.attempt,
                when(one.created_at),
                when(one.finished_at),
            )
            for one in found.items
        ),
    )


def _subject(job: Job) -> str:
    return str(job.model_version or job.spec.get("model") or job.spec.get("name") or "-")


@command(app, "show")
def show(session: Session, job: JobId) -> None:
    """Show a job: its state, its request and its result."""
    found = session.client.jobs.get(job)
    if session.json:
        session.emit(found)
        return
    session.facts(
        [
            ("job", found.id),
            ("kind", found.kind),
            ("status", found.status + (f", {found.stage}" if found.stage else "")),
            ("progress", f"{found.progress:.0%}"),
            ("attempt", found.attempt),
            ("created", when(found.created_at)),
            ("started", when(found.started_at)),
            ("finished", when(found.finished_at)),
            ("request", json.dumps(found.spec, ensure_ascii=False)),
            ("result", json.dumps(found.result, ensure_ascii=False) if found.result else "-"),
            ("error", found.error.get("message", "-") if found.error else "-"),
        ]
    )


@command(app, "logs")
def logs(
    session: Session,
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print the job's events as they happen, to its end.")
    ] = False,
    kind: Annotated[
        list[str] | None, typer.Option(help="With -f: only events of this kind, such as fold or warning. Repeatable.")
    ] = None,
) -> None:
    """Show the log of a job's process, or with -f its events as they happen."""
    if follow:
        for event in session.client.jobs.stream(job, kind=kind or None):
            if session.json:
                print(json.dumps(event.model_dump(mode="json")), flush=True)
            else:
                text = event.message or json.dumps(event.data, ensure_ascii=False)
                print(f"{when(event.created_at)} {event.kind:<8} {plain(text)}", flush=True)
        return
    text = session.client.jobs.log(job)
    session.emit({"log": text}) if session.json else print(lines(text))


@command(app, "watch")
def watch(session: Session, job: JobId) -> None:
    """Follow a job to its end; the exit code says how it ended.

    On a terminal its curves of loss and metrics grow, with throughput and what is left.
    """
    from modelworks.cli.progress import watch as follow

    ended = follow(session, session.client.jobs.get(job))
    _tell(session, ended)


@command(app, "cancel")
def cancel(session: Session, job: JobId) -> None:
    """Cancel a job. One that has ended stays as it is."""
    _tell(session, session.client.jobs.cancel(job))


@command(app, "pause")
def pause(session: Session, job: JobId) -> None:
    """Pause a training job; it goes on from its last checkpoint when it is resumed."""
    _tell(session, session.client.training_jobs.pause(job))


@command(app, "resume")
def resume(session: Session, job: JobId) -> None:
    """Let a paused training job go on."""
    _tell(session, session.client.training_jobs.resume(job))


def _tell(session: Session, job: Job) -> None:
    session.emit(job) if session.json else session.say(f"{job.id} is {job.status}")
