"""`models`: the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelworks.cli.session import Session, command, group
from modelworks.cli.text import deleted, headline, interval, short, size, when

app = group("Look at models, move their aliases, take packages in and out.")


@command(app, "list")
def list_(
    session: Session,
    name: Annotated[str | None, typer.Argument(help="Show all versions of this model.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 100,
    after: Annotated[str | None, typer.Option(help="Go on after this id.")] = None,
) -> None:
    """List models by their newest version, or all versions of one."""
    if name is not None:
        model = session.client.models.get(name)
        if session.json:
            session.emit(model)
            return
        versions, aliases = model.versions, model.aliases
    else:
        found = session.client.models.list(limit=limit, after=after)
        if session.json:
            session.emit(found)
            return
        versions, aliases = found.items, {}
    columns = ("model", "algorithm", "metric", "package", "digest", "created") + (("aliases",) if name else ())
    rows = []
    for one in versions:
        first = headline(one.metrics, one.task)
        metric = f"{first[0]} {interval(first[1])}" if first else "-"
        row = (one.ref, one.algorithm or "-", metric, size(one.size), short(one.digest), when(one.created_at))
        named = ", ".join(alias for alias, version in aliases.items() if version == one.version)
        rows.append((*row, named) if name else row)
    session.table(columns, rows)


@command(app, "show")
def show(session: Session, model: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")]) -> None:
    """Show a version: its metrics, inputs and outputs, and where it came from."""
    from modelworks.cli.train import show_version

    version = session.client.models.version(model)
    if session.json:
        session.emit(version)
        return
    aliases = session.client.models.get(version.name).aliases
    named = [alias for alias, number in aliases.items() if number == version.version]
    show_version(session, version, aliases=named)
    session.table(
        ("input", "type", "tensor", "may be missing"),
        (
            (one.name, one.column or "-", f"{one.datatype} {one.shape}", "yes" if one.nullable else "no")
            for one in version.signature.inputs
        ),
    )
    session.table(
        ("output", "tensor"), ((one.name, f"{one.datatype} {one.shape}") for one in version.signature.outputs)
    )


@command(app, "import")
def import_(
    session: Session,
    name: Annotated[str, typer.Argument(help="Name of the model to add a version to.")],
    file: Annotated[Path, typer.Argument(help="A package that `models export` wrote, or an ONNX model.")],
    task: Annotated[str | None, typer.Option(help="tabular-classification or tabular-regression, for ONNX.")] = None,
    classes: Annotated[str | None, typer.Option(help="The labels in order, comma-separated, for ONNX.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the model.")] = None,
) -> None:
    """Register a package or an ONNX model as a new version."""
    from modelworks.cli.progress import transfer

    labels = [label.strip() for label in classes.split(",")] if classes else None
    with transfer(session, f"uploading {file.name}") as progress:
        version = session.client.models.import_(
            name, file, task=task, classes=labels, licence=licence, progress=progress
        )
    if session.json:
        session.emit(version)
    else:
        session.say(f"{version.ref}: {version.task}, {size(version.size)}, digest {short(version.digest)}")


@command(app, "add")
def add(
    session: Session,
    name: Annotated[str, typer.Argument(help="Name of the model to add a version to.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF or ONNX file, a model's or LoRA adapter's folder, package:DIST/PATH, https://..., or hub:OWNER/NAME."
        ),
    ],
    task: Annotated[str | None, typer.Option(help="Such as embedding; by default told from the files.")] = None,
    licence: Annotated[str | None, typer.Option(help="By default what the files say.")] = None,
    convert: Annotated[
        str | None, typer.Option(help="q8_0: write a GGUF model of fewer bits anew in 8, for the faster engines.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of one call, to tell what it takes to serve it.")] = 2048,
) -> None:
    """Take in a model that is there already, and tell its licence and what it takes to serve it."""
    from modelworks.cli.adding import taken_in, takes

    with taken_in(session, source) as (file, server_source):
        if file is None:
            version = session.client.models.import_(
                name, source=server_source, task=task, licence=licence, convert=convert
            )
        else:
            from modelworks.cli.progress import transfer

            with transfer(session, f"uploading {file.name}") as progress:
                version = session.client.models.import_(
                    name, file, task=task, licence=licence, convert=convert, progress=progress
                )
    if session.json:
        session.emit(version)
        return
    session.say(f"{version.ref}: {version.task}, {size(version.size)}, digest {short(version.digest)}")
    session.say(f"licence: {version.licence or 'the files name none; look it up before you offer the model to others'}")
    if needs := takes(version, context):
        session.say(needs)


@command(app, "measure")
def measure(session: Session, model: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")]) -> None:
    """Measure which engine runs a language model fastest here, for one user and for many; `engine: auto` goes by it."""
    from modelworks.cli.progress import job_bar

    with job_bar(session, f"measuring {model}") as (progress, _):
        found = session.client.models.measure(model, on_job=progress)
    if session.json:
        session.emit(found)
        return
    rows = []
    for engine, figures in found["engines"].items():
        if "error" in figures:
            rows.append((engine, "-", "-", "-", "-", figures["error"]))
            continue
        best = [who for who in ("one", "many") if found["fastest"][who] == engine]
        pair = [f"{figures[who][name]:g}" for who in ("one", "many") for name in ("tokens_per_second", "first_token_ms")]
        rows.append((engine, *pair, f"fastest for {' and '.join(best)}" if best else ""))
    many = f"{found['calls']} calls"
    session.table(("engine", "1 call: tokens/s", "first ms", f"{many}: tokens/s", "first ms", ""), rows)
    session.say(f"measured on {found['machine']} with {found['threads']} threads, answers of {found['tokens']} tokens")


@command(app, "export")
def export(
    session: Session,
    model: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File or folder to write to.")] = Path(),
) -> None:
    """Write a version's package as one file."""
    from modelworks.cli.progress import transfer

    with transfer(session, f"downloading {model}") as progress:
        written = session.client.models.export(model, out, progress=progress)
    if session.json:
        session.emit({"file": str(written), "bytes": written.stat().st_size})
    else:
        session.say(f"{written} ({size(written.stat().st_size)})")


@command(app, "alias")
def alias(
    session: Session,
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    alias: Annotated[str, typer.Argument(help="The alias, such as champion.")],
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="The version it shall point at: 1, or iris:1.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the alias.")] = False,
) -> None:
    """Point an alias at a version, or delete it."""
    if delete == (version is not None):
        raise typer.BadParameter("give a version, or --delete")
    if version is None:
        session.client.models.delete_alias(name, alias)
        session.emit({"deleted": f"{name}@{alias}"}) if session.json else session.say(f"{name}@{alias} is deleted")
        return
    row = session.client.models.set_alias(name, alias, _number(session, name, version))
    session.emit(row) if session.json else session.say(f"{name}@{alias} is {name}:{row.version}")


@command(app, "delete")
def delete(
    session: Session,
    model: Annotated[str, typer.Argument(help="NAME:VERSION, or NAME for all versions.")],
) -> None:
    """Delete a version, or all; refused while an alias, a deployment or a job uses one."""
    gone = session.client.models.delete(model)
    if session.json:
        session.emit({"deleted": True, "versions": list(gone)})
        return
    session.say(deleted(model, gone))


def _number(session: Session, name: str, text: str) -> int:
    """`1`, or a reference to a version of the model `name`: `iris:1`, `iris@champion`."""
    from modelworks.core.errors import InvalidInput

    if text.isdecimal() and text.isascii() and 0 < int(text) < 10**9:
        return int(text)
    if text.startswith((f"{name}:", f"{name}@")):
        return session.client.models.version(text).version
    raise InvalidInput(
        f"{text[:100]!r} is not a version of {name}; give its number, as in: modelworks models alias {name} ALIAS 1",
        param="version",
    )
