"""`evaluate`: measure a model version, or compare two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelworks.cli.session import Session, command
from modelworks.cli.text import number, plain

if TYPE_CHECKING:
    from modelworks.core.types import Report


def register(app: typer.Typer) -> None:
    command(app, "evaluate")(evaluate)


def evaluate(
    session: Session,
    model: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")],
    dataset: Annotated[
        str | None, typer.Option(help="NAME or NAME:VERSION; by default what it was trained on.")
    ] = None,
    kfold: Annotated[int | None, typer.Option(help="Evaluate by K-fold.")] = None,
    repeats: Annotated[int, typer.Option(help="With --kfold: how many times.")] = 1,
    holdout: Annotated[float | None, typer.Option(help="Evaluate on this share of rows.")] = None,
    test: Annotated[str | None, typer.Option(help="Evaluate on this dataset.")] = None,
    group: Annotated[str | None, typer.Option(help="Rows that share this column's value stay together.")] = None,
    time: Annotated[str | None, typer.Option(help="Split along this column: past and future.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric to compute; by default all. Repeatable.")] = None,
    compare: Annotated[str | None, typer.Option(help="Another model version, evaluated on the same rows.")] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="Fail unless it holds: --gate 'accuracy>=0.9'. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    watch: Annotated[
        bool, typer.Option("--watch/--detach", help="Follow the job to its end, or return at once.")
    ] = True,
) -> None:
    """Evaluate a model version.

    By default by 5-fold cross-validation on the data it was trained on.
    """
    from modelworks.cli import values

    method = values.method(kfold=kfold, holdout=holdout, test=test, repeats=repeats, group=group, time=time)
    given: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "method": method or {"kfold": 5},
        "metrics": metric or None,
        "compare": compare,
        "gates": values.gates(gate),
        "seed": seed,
    }
    job = session.client.evaluations.create({name: value for name, value in given.items() if value not in (None, [])})
    if not watch:
        session.emit(job) if session.json else session.say(job.id)
        return
    from modelworks.cli.progress import watch as follow

    job = follow(session, job)
    report = session.client.reports.get(str(job.result["report_id"]))
    if session.json:
        session.emit({"job": job, "report": report})
        return
    show_report(session, report)


def show_report(session: Session, report: Report) -> None:
    from modelworks.cli.train import metrics_table

    method = ", ".join(
        f"{name} {value}" for name, value in report.method.items() if value not in (None, 1, True, False)
    )
    session.facts([("report", report.id), ("model", report.model), ("data", report.dataset), ("method", method)])
    metrics_table(session, report.metrics)
    comparison = report.details.get("comparison")
    if isinstance(comparison, dict):
        session.facts((f"comparison: {name}", _shown(value)) for name, value in comparison.items())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    return number(value) if not isinstance(value, list) else " ".join(plain(number(item)) for item in value)
