"""`train` and `algorithms`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelworks.cli.session import Session, command
from modelworks.cli.text import counted, number, plain, short, size

if TYPE_CHECKING:
    from modelworks.core.types import ModelVersion

_CLASSES = 20  # shown of a model's


def register(app: typer.Typer) -> None:
    command(app, "train")(train)
    command(app, "algorithms")(algorithms)


def train(
    session: Session,
    model: Annotated[str, typer.Argument(help="Name of the model to make a version of.")],
    dataset: Annotated[str, typer.Option(help="NAME or NAME:VERSION.")],
    algorithm: Annotated[str, typer.Option(help="See `modelworks algorithms`.")],
    target: Annotated[str | None, typer.Option(help="The column to predict; some algorithms need none.")] = None,
    task: Annotated[
        str | None, typer.Option(help="By default told from algorithm, target and features; text-generation must be named.")
    ] = None,
    series: Annotated[str | None, typer.Option(help="Of a forecast of many series: the column that tells them apart.")] = None,
    user: Annotated[str | None, typer.Option(help="Of a recommender: the column that says who.")] = None,
    item: Annotated[str | None, typer.Option(help="Of a recommender: the column that says what.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A hyperparameter: --set C=0.5. Repeatable.")] = None,
    kfold: Annotated[int | None, typer.Option(help="Evaluate by K-fold.")] = None,
    repeats: Annotated[int, typer.Option(help="With --kfold: how many times.")] = 1,
    holdout: Annotated[float | None, typer.Option(help="Evaluate on this share of rows.  [default: 0.2]")] = None,
    test: Annotated[str | None, typer.Option(help="Evaluate on this dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Evaluate by this column, which says train or test.")] = None,
    group: Annotated[str | None, typer.Option(help="Rows that share this column's value stay together.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Split along this column: past and future. Of a forecast: its time.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric to compute; by default all. Repeatable.")] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="Register only if it holds: --gate 'accuracy>=0.9'. Repeatable.")
    ] = None,
    slice_: Annotated[
        list[str] | None, typer.Option("--slice", help="Measure these rows apart: --slice 'age > 60'. Repeatable.")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Of two classes: from which probability of the second on: a number, f1 or youden.")
    ] = None,
    transforms: Annotated[
        Path | None, typer.Option(help="TOML or JSON file with the steps; by default fill, standardise, one-hot.")
    ] = None,
    search: Annotated[int | None, typer.Option(help="Try so many hyperparameters and train the best.")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(help="What to try: --space C=0.01..100:log or --space penalty=l1,l2. Repeatable."),
    ] = None,
    search_metric: Annotated[str | None, typer.Option(help="What the search improves.")] = None,
    parallel: Annotated[int | None, typer.Option(help="Trials, or folds with --kfold, at a time.")] = None,
    pruner: Annotated[str | None, typer.Option(help="median, hyperband or none.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option("--search-seconds", help="No trial begins after so many seconds.")
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option(help="A column to learn from; by default all others. Repeatable.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to move to the new version.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the model, kept in its package.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Of nets: processes that share each batch, one a GPU where there are any, else one a core.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    advise: Annotated[
        bool, typer.Option("--advise", help="Only tell what it would take here: seconds and memory, measured on some rows.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch/--detach", help="Follow the job to its end, or return at once.")
    ] = True,
) -> None:
    """Train a model, evaluate it, and register it as a new version."""
    from modelworks.cli import values

    alone = time is not None and kfold is None and holdout is None and test is None  # of a forecast
    given: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "target": target,
        "time": time if alone else None,
        "algorithm": algorithm,
        "task": task,
        "series": series,
        "user": user,
        "item": item,
        "hyperparameters": values.settings(set_),
        "validation": values.method(
            kfold=kfold, holdout=holdout, test=test, repeats=repeats, group=group, time=None if alone else time, split=split
        ),
        "slices": slice_ or [],
        "threshold": values.threshold(threshold),
        "metrics": metric or None,
        "gates": values.gates(gate),
        "transforms": values.transforms(transforms),
        "features": feature or None,
        "search": values.search(
            search, space, metric=search_metric, parallel=parallel, pruner=pruner, timeout_s=max_seconds
        ),
        "alias": alias,
        "licence": licence,
        "resources": {name: value for name, value in (("threads", threads), ("processes", processes)) if value is not None} or None,
        "seed": seed,
    }
    if given["search"] is None and parallel and given["validation"]:
        given["validation"]["parallel"] = parallel
    asked = {name: value for name, value in given.items() if value not in (None, [])}
    if advise:
        show_advice(session, session.client.training_jobs.advise(asked))
        return
    job = session.client.training_jobs.create(asked)
    if not watch:
        session.emit(job) if session.json else session.say(job.id)
        return
    from modelworks.cli.progress import watch as follow

    job = follow(session, job)
    version = session.client.models.version(str(job.model_version))
    if session.json:
        session.emit({"job": job, "model_version": version})
        return
    show_version(session, version)
    leaderboard(session, job.result.get("leaderboard") or [])
    if version.report_id:
        from modelworks.cli.tables import baselines_table, details_tables

        report = session.client.reports.get(version.report_id)
        details_tables(session, report.details)
        baselines_table(session, report.metrics, report.details.get("baselines") or {})


def show_advice(session: Session, found: Mapping[str, Any]) -> None:
    """What a training would take, for people; warnings on stderr."""
    if session.json:
        session.emit(dict(found))
        return
    step = f"{found['step_ms']:.3g} ms a step of {found['batch_size']} rows, {found['epochs']} epochs" if "step_ms" in found else ""
    rest = found["evaluation_seconds"] + found["packaging_seconds"]
    fits = f"{counted(found['fits'], 'fit')}, {number(found['fit_seconds'])} s each"
    session.facts(
        [
            ("time", f"{number(found['seconds'])} s for {fits}, and {number(rest)} s to evaluate and package"),
            *([("steps", step), ("parameters", number(found["parameters"]))] if step else []),
            ("memory", f"{found['memory_mb']:,.0f} MiB, of {found['free_mb']:,.0f} MiB that may be used"),
            ("fits", "yes" if found["will_fit"] else "no"),
            *([("data", "streamed: it is larger than the memory for it")] if found["streamed"] else []),
            ("measured on", f"{found['measured_rows']:,} of {counted(found['rows'], 'row')}"),
        ]
    )
    for warning in found["warnings"]:
        session.note(f"warning: {warning}")


def show_version(session: Session, version: ModelVersion, aliases: Sequence[str] | None = None) -> None:
    """A model version with its metrics, for people."""
    from modelworks.cli.tables import metrics_table

    session.facts(
        [
            ("model", version.ref),
            *([] if aliases is None else [("aliases", ", ".join(aliases) or "-")]),
            ("algorithm", version.algorithm or "-"),
            ("task", version.task),
            *([] if not version.classes else [("classes", _few(version.classes))]),
            ("digest", version.digest),
            ("package", size(version.size)),
            ("data", f"{version.lineage.get('dataset', '-')} {short(str(version.lineage.get('dataset_digest', '')))}"),
            ("licence", version.licence or "-"),
        ]
    )
    metrics_table(session, version.metrics)


def leaderboard(session: Session, lines: Sequence[dict[str, Any]], most: int = 20) -> None:
    """The trials of a search, best first."""
    if lines:
        session.table(
            ("rank", "trial", "status", "value", "algorithm", "hyperparameters"),
            (
                (one["rank"], one["trial"] + 1, one["status"], number(one["value"]), one["algorithm"],
                 plain(", ".join(f"{name}={value}" for name, value in one["hyperparameters"].items())))
                for one in lines[:most]
            ),
        )  # fmt: skip


def _few(values: Sequence[Any]) -> str:
    more = f", … {len(values)} in all" if len(values) > _CLASSES else ""
    return ", ".join(str(value) for value in values[:_CLASSES]) + more


def algorithms(
    session: Session,
    name: Annotated[str | None, typer.Argument(help="Show one algorithm's hyperparameters.")] = None,
) -> None:
    """List the algorithms, or show one with its hyperparameters."""
    found = session.client.algorithms()
    if name is not None:
        from modelworks.core.errors import NotFound

        one = next((algorithm for algorithm in found if algorithm.name == name), None)
        if one is None:
            known = ", ".join(algorithm.name for algorithm in found)
            raise NotFound(f"there is no algorithm {name[:100]!r}; choose one of: {known}", param="algorithm")
        if session.json:
            session.emit(one)
            return
        session.facts([("algorithm", one.name), ("task", ", ".join(one.tasks) or one.task), ("about", one.description)])
        properties = one.hyperparameters.get("properties", {})
        session.table(
            ("hyperparameter", "default", "range", "description"),
            (
                (key, _json(about.get("default")), allowed(about), about.get("description", ""))
                for key, about in properties.items()
            ),
        )
        return
    if session.json:
        session.emit(list(found))
        return
    session.table(
        ("algorithm", "task", "description"),
        ((one.name, ", ".join(one.tasks) or one.task, one.description) for one in found),
    )


def allowed(schema: dict[str, Any]) -> str:
    """What a JSON Schema property takes, in few words."""
    options = schema.get("anyOf", [schema])
    return " or ".join(_allowed(option) for option in options)


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(plain(value) for value in schema.get("enum", [schema.get("const")]))
    low = f" from {number(schema['minimum'])}" if "minimum" in schema else ""
    low = f" above {number(schema['exclusiveMinimum'])}" if "exclusiveMinimum" in schema else low
    high = f" to {number(schema['maximum'])}" if "maximum" in schema else ""
    high = f" below {number(schema['exclusiveMaximum'])}" if "exclusiveMaximum" in schema else high
    return f"{schema.get('type', 'any')}{low}{high}"


def _json(value: Any) -> str:
    import json

    return json.dumps(value)
