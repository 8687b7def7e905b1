"""One command's run: its connection options, its client, and where its output goes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelworks.cli.exits import edge
from modelworks.cli.text import plain, to_json

if TYPE_CHECKING:
    from rich.console import Console

    from modelworks.client import Client

_WIDE = 200  # columns, where output goes to a file or a pipe
_OPTIONS: dict[str, Any] = {
    "url": Annotated[str | None, typer.Option(help="Server address; else MODELWORKS_URL, else the local server.")],
    "api_key": Annotated[str | None, typer.Option(help="API key; else MODELWORKS_API_KEY, else the local home's.")],
    "home": Annotated[Path | None, typer.Option(help="Home folder of the local server.")],
    "project": Annotated[str | None, typer.Option(help="Another project, for an administrator's key.")],
    "ca": Annotated[Path | None, typer.Option(help="PEM file of the authority to trust, for https.")],
    "as_json": Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")],
}


class Session:
    def __init__(self, *, as_json: bool = False, **connection: Any) -> None:
        self.json = as_json
        self._connection = connection

    @cached_property
    def client(self) -> Client:
        from modelworks.client import Client

        return Client(**self._connection)

    @cached_property
    def console(self) -> Console:
        """For results: stdout."""
        return _console(stderr=False)

    @cached_property
    def notes(self) -> Console:
        """For progress and remarks: stderr."""
        return _console(stderr=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
        """Print a table; cells are text, never markup."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left", pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
        self.console.print(table)

    def facts(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Print names and values, one pair a line."""
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(Text(plain(name)), value if isinstance(value, Text) else Text(plain(value)))
        self.console.print(grid)

    def say(self, text: str) -> None:
        """One line of result, or nothing with --json."""
        if not self.json:
            print(plain(text))

    def emit(self, value: Any) -> None:
        """Print JSON: a noun, a page, or plain values."""
        print(to_json(_jsonable(value)))

    def note(self, text: str) -> None:
        """A remark on stderr."""
        print(plain(text), file=sys.stderr)


def command(app: typer.Typer, name: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(session, ...)` as a command that also takes the options which all calls to a server have."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def run(**given: Any) -> None:
            session = Session(**{name: given.pop(name) for name in _OPTIONS})
            with edge():
                function(session, **given)

        update_wrapper(run, function)
        del run.__wrapped__  # type: ignore[attr-defined]
        shared = [
            inspect.Parameter(
                option, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=False if option == "as_json" else None
            )
            for option, hint in _OPTIONS.items()
        ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + shared
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, **options)(run)
        return function

    return register


def group(help: str) -> typer.Typer:
    return typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else _WIDE)


def _jsonable(value: Any) -> Any:
    from pydantic import BaseModel

    from modelworks.core.types import Noun, Page

    if isinstance(value, Noun):
        return value.public()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Page):
        return {"data": [_jsonable(item) for item in value.items], "has_more": value.has_more}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    return value
