"""`data`: upload tables and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelworks.cli.exits import SCHEMA_FLAGS, named
from modelworks.cli.session import Session, command, group
from modelworks.cli.text import bars, counted, deleted, number, plain, short, size, when

if TYPE_CHECKING:
    from modelworks.core.types import Dataset

app = group("Upload tables and look at them.")
SERVER_SOURCES = ("sklearn:", "package:", "https://", "http://")
_SHOWN = 60  # rows of text that the profile's longest value gets


@command(app, "upload")
def upload(
    session: Session,
    source: Annotated[str, typer.Argument(help="A file or folder, or sklearn:NAME, package:DIST/PATH, an https URL.")],
    name: Annotated[str | None, typer.Option(help="The dataset's name; by default the file's.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Correct a column's type: --column 'zip=category'. Repeatable.")
    ] = None,
    header: Annotated[
        str | None,
        typer.Option(help="Column names, comma-separated, of a file without a header; false: number them; true: the first row it is."),
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Of a CSV file; else told from the file.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of a text file.  [default: UTF-8]")] = None,
    missing: Annotated[list[str] | None, typer.Option(help="A text that means a missing value. Repeatable.")] = None,
    skip_corrupt: Annotated[bool, typer.Option(help="Leave out images and sounds that cannot be decoded.")] = False,
) -> None:
    """Upload a table (CSV, TSV, Parquet, JSONL, Arrow), or images, sounds or texts in one folder a class (a folder, zip
    or tar). The same content again gives the same version.
    """
    schema = _schema(column, header, delimiter, encoding, missing, skip_corrupt)
    with named(SCHEMA_FLAGS):
        dataset = _upload(session, source, name, schema)
    if session.json:
        session.emit(dataset)
        return
    about = f"{counted(dataset.rows, 'row')}, {counted(len(dataset.columns), 'column')}, digest {short(dataset.digest)}"
    session.say(f"{dataset.ref}: {about}{_older(session, dataset)}")
    for warning in dataset.warnings:
        session.note(f"warning: {warning}")


def _upload(session: Session, source: str, name: str | None, schema: dict[str, Any] | None) -> Dataset:
    if source.startswith(SERVER_SOURCES):
        return session.client.datasets.create(source, name=name or _name_from(source), schema=schema)
    from modelworks.cli.progress import transfer

    with transfer(session, f"uploading {Path(source).name}") as progress:
        return session.client.datasets.upload(source, name=name, schema=schema, progress=progress)


def _older(session: Session, dataset: Dataset) -> str:
    """What to know when the content is that of a version which is not the newest; else nothing."""
    newest = max(session.client.datasets.versions(dataset.name))
    if newest == dataset.version:
        return ""
    return f", as before; {dataset.name!r} means {dataset.name}:{newest}"


@command(app, "list")
def list_(
    session: Session,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 100,
    after: Annotated[str | None, typer.Option(help="Go on after this id.")] = None,
) -> None:
    """List datasets: the newest version of each."""
    found = session.client.datasets.list(limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("dataset", "rows", "columns", "size", "digest", "created"),
        (
            (one.ref, f"{one.rows:,}", len(one.columns), size(one.size), short(one.digest), when(one.created_at))
            for one in found.items
        ),
    )


@command(app, "show")
def show(session: Session, dataset: Annotated[str, typer.Argument(help="NAME or NAME:VERSION.")]) -> None:
    """Show a dataset's profile and warnings."""
    found = session.client.datasets.get(dataset)
    if session.json:
        session.emit(found)
        return
    session.facts(
        [
            ("dataset", found.ref),
            ("digest", found.digest),
            ("rows", f"{found.rows:,}"),
            ("size", size(found.size)),
            ("source", found.source or "-"),
            ("created", when(found.created_at)),
        ]
    )
    profile_table(session, found, spread=True)
    for warning in found.warnings:
        session.note(f"warning: {warning}")


@command(app, "diff")
def diff(
    session: Session,
    before: Annotated[str, typer.Argument(help="NAME:VERSION, the older version.")],
    after: Annotated[str, typer.Argument(help="NAME:VERSION or VERSION, the newer version.")],
    key: Annotated[str | None, typer.Option(help="The column that tells rows apart; else whole rows are compared.")] = None,
) -> None:
    """What changed between two versions: rows, columns, and how values are distributed."""
    from modelworks.core.errors import InvalidInput
    from modelworks.core.specs import Ref

    old = Ref.parse(before, "dataset")
    new = Ref.parse(f"{old.name}:{after}" if after.isdigit() else after, "dataset")
    if old.version is None or new.version is None or new.name != old.name:
        raise InvalidInput("give two versions of one dataset, as in: modelworks data diff iris:1 2", param="after")
    found = session.client.datasets.diff(old.name, old.version, new.version, key=key)
    if session.json:
        session.emit(found)
        return
    rows = found["rows"]
    words = ("added", "removed", "changed", "unchanged")
    counts = ", ".join(f"{number(rows[word])} {word}" for word in words if rows[word] is not None)
    session.say(f"rows: {number(rows['from'])} to {number(rows['to'])}: {counts}")
    for word in ("added", "removed"):
        if names := ", ".join(plain(one["name"]) for one in found["columns"][word]):
            session.say(f"columns {word}: {names}")
    for one in found["columns"]["changed"]:
        session.say(f"column {plain(one['name'])}: {one['from']} to {one['to']}")
    session.table(
        ("column", "type", "missing", "mean", "PSI", "KS", "moved"),
        (
            (
                one["name"], one["type"], *(f"{number(pair['from'])} to {number(pair['to'])}" if (pair := one.get(word))
                else "-" for word in ("missing", "mean")), number(one["psi"]), number(one["ks"]), "yes" if one["moved"] else "-",
            )
            for one in found["distributions"]
        ),
    )  # fmt: skip


@command(app, "edit")
def edit(
    session: Session,
    dataset: Annotated[str, typer.Argument(help="NAME or NAME:VERSION to start from.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="--set 'label=cat' for the chosen rows; empty: missing. Repeatable.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Row numbers from 1: --rows 3,17,20-25.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Rows in which a column has a value: --where 'label=kat'.")] = None,
    drop: Annotated[bool, typer.Option(help="Drop the chosen rows.")] = False,
    rename: Annotated[list[str] | None, typer.Option(help="--rename 'old=new'. Repeatable.")] = None,
    split: Annotated[str | None, typer.Option(help="Put rows into splits: --split train=0.8,test=0.2.")] = None,
    stratify: Annotated[str | None, typer.Option(help="With --split: keep this column's shares.")] = None,
    seed: Annotated[int, typer.Option(help="With --split.")] = 0,
    file: Annotated[Path | None, typer.Option(help="A JSON file with a list of edits, in place of all others.")] = None,
) -> None:
    """Make a new version: set labels, drop rows, rename columns, draw splits. The old version stays as it is."""
    from modelworks.cli import values

    typed = values.edits(set_, rows, where, drop, rename, split, stratify, seed) if file is None else []
    edits = typed or values.edits_in(Path(str(file)))
    made = session.client.datasets.edit(dataset, edits)
    if session.json:
        session.emit(made)
        return
    session.say(f"{made.ref}: {counted(made.rows, 'row')}, {counted(len(made.columns), 'column')}{_older(session, made)}")


@command(app, "delete")
def delete(
    session: Session,
    dataset: Annotated[str, typer.Argument(help="NAME:VERSION, or NAME for all versions.")],
    force: Annotated[bool, typer.Option(help="Also when a model was trained on it.")] = False,
) -> None:
    """Delete a version, or all; refused while something uses it."""
    with named({"force=true": "--force"}):
        gone = session.client.datasets.delete(dataset, force=force)
    if session.json:
        session.emit({"deleted": True, "versions": list(gone)})
        return
    session.say(deleted(dataset, gone))


def profile_table(session: Session, dataset: Dataset, *, spread: bool = False) -> None:
    """The profile, one row a column; with `spread`, quantiles and histograms, too."""
    described = {str(one.get("name")): one for one in dataset.profile.get("columns", [])}
    session.table(
        ("column", "type", "missing", "distinct", "values", *(("p5  p50  p95", "histogram") if spread else ())),
        (
            (
                column.name, column.type, number(about.get("missing")), number(about.get("distinct")), _values(about),
                *(_spread(about) if spread else ()),
            )
            for column in dataset.columns
            for about in [described.get(column.name, {})]
        ),
    )  # fmt: skip


def _spread(about: dict[str, Any]) -> tuple[str, str]:
    """Three quantiles, and the histogram as a line of bars."""
    quantiles = about.get("quantiles") or {}
    shown = "  ".join(number(quantiles.get(name)) for name in ("p5", "p50", "p95")) if quantiles else "-"
    return shown, bars((about.get("histogram") or {}).get("counts") or ()) or "-"


def _values(about: dict[str, Any]) -> str:
    """`4.3 to 7.9, mean 5.843 ± 0.8281`, or the most frequent values with their counts."""
    if about.get("mean") is not None:
        deviation = f" ± {number(about['std'])}" if about.get("std") is not None else ""
        return f"{number(about.get('min'))} to {number(about.get('max'))}, mean {number(about['mean'])}{deviation}"
    if about.get("width"):
        sides = [f"{number(about[key]['min'])}-{number(about[key]['max'])}" for key in ("width", "height")]
        return f"{' x '.join(sides)} pixels, {', '.join(about['modes'])}, {', '.join(about['formats'])}"
    if about.get("seconds"):
        seconds = about["seconds"]
        return f"{number(seconds['min'])} to {number(seconds['max'])} s, {', '.join(about['rates'])} Hz"
    if about.get("top"):
        return _cut(", ".join(f"{one.get('value')} ({one.get('count')})" for one in about["top"][:3]))
    if about.get("min") is not None:
        return f"{_cut(about['min'])} to {_cut(about['max'])}"
    return "-"


def _cut(value: Any) -> str:
    text = number(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _schema(
    column: list[str] | None,
    header: str | None,
    delimiter: str | None,
    encoding: str | None,
    missing: list[str] | None,
    skip_corrupt: bool,
) -> dict[str, Any] | None:
    from modelworks.cli.values import pairs

    given: dict[str, Any] = {
        "columns": dict(pairs(column, "--column", "zip=category")),
        "header": _header(header),
        "delimiter": {"\\t": "\t"}.get(delimiter or "", delimiter),
        "encoding": encoding,
        "missing": missing or None,
        "on_corrupt": "skip" if skip_corrupt else None,
    }
    schema = {field: value for field, value in given.items() if value or value is False}
    return schema or None


def _header(text: str | None) -> list[str] | bool | None:
    if text in ("true", "false"):
        return text == "true"
    return [name.strip() for name in text.split(",")] if text else None


def _name_from(source: str) -> str:
    """`sklearn:iris` -> iris; an address or path -> its last part without what follows the first dot."""
    import re

    last = re.split(r"[:/]", source.split("?")[0].rstrip("/"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain(last).split(".")[0]).strip("-._") or "data"
