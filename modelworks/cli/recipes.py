"""`run`: a whole lifecycle from one TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelworks.cli.session import Session, command

if TYPE_CHECKING:
    from modelworks.cli.recipe import Loaded


def register(app: typer.Typer) -> None:
    command(app, "run")(run)


def run(
    session: Session, recipe: Annotated[Path, typer.Argument(help="A recipe's TOML file; see docs/recipes.md.")]
) -> None:
    """Run a recipe, from data to a prediction.

    The steps: ingest, profile, train and evaluate, package, deploy, predict.
    Running it again gives the same digests and metrics, and makes nothing new.
    """
    from modelworks.cli.recipe import load

    perform(session, load(recipe))


def perform(session: Session, loaded: Loaded) -> None:
    """Carry a checked recipe out and tell the story, or with --json print the outcome."""
    from dataclasses import asdict

    from modelworks.cli.recipe import carry_out
    from modelworks.cli.story import Silence, Story

    outcome = carry_out(session.client, loaded, Silence() if session.json else Story(session))
    if session.json:
        session.emit(asdict(outcome))
