"""`evaluate` and `reports`: measure a model version, or compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelworks.cli.exits import Failed
from modelworks.cli.session import Session, command, group
from modelworks.cli.text import counted, headline, interval, number, plain, when
from modelworks.core.errors import InvalidInput

if TYPE_CHECKING:
    from modelworks.core.types import Report

reports = group("Reports of evaluations and trainings.")


def register(app: typer.Typer) -> None:
    command(app, "evaluate")(evaluate)
    app.add_typer(reports, name="reports")


def evaluate(
    session: Session,
    model: Annotated[
        str | None, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS; with --predictions the name they go by.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="NAME or NAME:VERSION; by default what it was trained on.")
    ] = None,
    kfold: Annotated[int | None, typer.Option(help="Evaluate by K-fold.")] = None,
    repeats: Annotated[int, typer.Option(help="With --kfold: how many times.")] = 1,
    holdout: Annotated[float | None, typer.Option(help="Evaluate on this share of rows.")] = None,
    test: Annotated[str | None, typer.Option(help="Evaluate on this dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Evaluate by this column, which says train or test.")] = None,
    group: Annotated[str | None, typer.Option(help="Rows that share this column's value stay together.")] = None,
    time: Annotated[str | None, typer.Option(help="Split along this column: past and future.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric to compute; by default all. Repeatable.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Of a language model with --test: the column of texts to measure perplexity on.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Another model version, evaluated on the same rows; with --predictions the column of other predictions, "
            "or DATASET#COLUMN."
        ),
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(help="Score predictions that are there, of any model: a file (CSV, JSONL, Parquet) or a dataset."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="With --predictions: classification, regression, forecast, speech-to-text...")
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="The column of the truth.  [default: reference]  Repeatable for texts.")
    ] = None,
    prediction: Annotated[str | None, typer.Option(help="The column of predictions.  [default: prediction]")] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(help="Probabilities: --scores cat=p_cat, or --scores 'p_*' for a column a class. Repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of --predictions, by task: --set season=12 --set boxes=xywh... Repeatable."),
    ] = None,
    slice_: Annotated[
        list[str] | None, typer.Option("--slice", help="Measure these rows apart: --slice 'age > 60'. Repeatable.")
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="Fail unless it holds: --gate 'accuracy>=0.9'. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page with its figures.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch/--detach", help="Follow the job to its end, or return at once.")
    ] = True,
) -> None:
    """Evaluate a model version, or score predictions that are there.

    By default by 5-fold cross-validation on the data it was trained on. With --predictions what any model said is held
    against the truth beside it.
    """
    from modelworks.cli import values

    method = values.method(kfold=kfold, holdout=holdout, test=test, repeats=repeats, group=group, time=time, split=split)
    of_predictions: dict[str, Any] = {"task": task, "reference": reference, "prediction": prediction, "scores": scores, "set": set_}
    if predictions is not None:
        if method or dataset:
            raise InvalidInput("with --predictions there is no method and no other dataset; leave them out", param="predictions")
        what = values.predictions(**of_predictions, compare=compare)
        subject: dict[str, Any] = {"dataset": _uploaded(session, predictions), "predictions": what}
    else:
        if model is None:
            raise InvalidInput("name a model, or give --predictions", param="model")
        if extra := next((name for name, value in of_predictions.items() if value), None):
            raise InvalidInput(f"--{extra} goes with --predictions", param=extra)
        subject = {"dataset": dataset, "method": method or {"kfold": 5}, "compare": compare, "text": text}
    given: dict[str, Any] = {
        "model": model,
        **subject,
        "metrics": metric or None,
        "slices": slice_ or [],
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
    if html is not None:
        _write_page(session, report.id, html)
    if session.json:
        session.emit({"job": job, "report": report})
    else:
        show_report(session, report)
    if failed := [_gate(one) for one in report.details.get("gates") or [] if not one["passed"]]:
        raise Failed(f"the gate failed: {'; '.join(failed)}")


def _uploaded(session: Session, given: str) -> str:
    """A dataset's name; a file is uploaded as one that is called as it is."""
    file = Path(given)
    if not file.suffix or not file.is_file():
        return given
    return session.client.datasets.upload(file).ref


def _write_page(session: Session, report: str, out: Path) -> None:
    out.write_text(session.client.reports.page(report), encoding="utf-8")
    session.note(f"the report is at {out}")


def show_report(session: Session, report: Report) -> None:
    """A report for people: what was measured and how, the metrics, and what the errors look like."""
    from modelworks.cli.tables import baselines_table, details_tables, metrics_table, slices_table

    method = ", ".join(
        f"{name} {value}" for name, value in report.method.items() if value not in (None, 1, True, False)
    )
    model = report.model_version or report.model
    session.facts([("report", report.id), ("model", model), ("data", report.dataset), ("method", method)])
    metrics_table(session, report.metrics)
    for note in report.details.get("notes") or []:
        session.note(f"note: {plain(note)}")
    details_tables(session, report.details)
    baselines_table(session, report.metrics, report.details.get("baselines") or {})
    slices_table(session, report.details.get("slices") or [])
    comparison = report.details.get("comparison")
    if isinstance(comparison, dict):
        _comparison(session, model, comparison)


def _gate(found: dict[str, Any]) -> str:
    """`accuracy is 0.66 and must be at least 0.99`."""
    bounds = [f"at {word} {found[f'at_{word}']:g}" for word in ("least", "most") if f"at_{word}" in found]
    value = "undefined" if found["value"] is None else f"{found['value']:.4g}"
    return f"{found['metric']} is {value} and must be {' and '.join(bounds)}"


def _comparison(session: Session, model: str, found: dict[str, Any]) -> None:
    """One line a metric; the verdict is on `model`."""
    other = str(found.get("with", "the other"))
    session.table(
        ("metric", model, other, "difference [95 % interval]", "p", "verdict"),
        (
            (
                name, number(one.get("model")), number(one.get("other")),
                interval({**one, "mean": one.get("difference")}), number(one.get("p_value")), one.get("verdict", "-"),
            )
            for name, one in (found.get("metrics") or {}).items()
        ),
    )  # fmt: skip
    rows = found.get("rows")
    on = f" on {counted(rows, 'row')}" if isinstance(rows, int) else ""
    by = f", by {found['decided_by']}" if found.get("decided_by") else ""
    test = (found.get("method") or {}).get("name")
    session.say(f"{model} against {other}{on}: {found.get('verdict', '-')}{by}" + (f"; {test}" if test else ""))


@command(reports, "list")
def list_reports(
    session: Session,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this id.")] = None,
) -> None:
    """List reports, newest first."""
    found = session.client.reports.list(model=model, limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("report", "model", "data", "metric", "created"),
        (
            (one.id, one.model_version or one.model, one.dataset, _headline(one), when(one.created_at))
            for one in found.items
        ),
    )


@command(reports, "show")
def show(
    session: Session,
    report: Annotated[str, typer.Argument(help="Id of the report.")],
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML page with its figures.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write its figures as PNG into this folder.")] = None,
) -> None:
    """Show a report: metrics with intervals, confusion matrix or residuals, and a comparison; or write it to files."""
    if html is not None:
        _write_page(session, report, html)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for one in session.client.reports.plots(report):
            file = plots / f"{Path(one['name']).name}.png"
            file.write_bytes(session.client.reports.plot(report, one["name"]))
            session.note(f"{file}: {one['title']}")
    if html is not None or plots is not None:
        return
    found = session.client.reports.get(report)
    session.emit(found) if session.json else show_report(session, found)


def _headline(report: Report) -> str:
    first = headline(report.metrics, report.details.get("task"))
    return f"{first[0]} {interval(first[1])}" if first else "-"
