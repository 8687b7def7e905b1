"""The command tree. Each group is a file beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from modelworks.cli import access, chat, data, deploy, evaluate, jobs, models, recipes, serve, train

app = typer.Typer(
    name="modelworks",
    help="Make models and put them to work: data in, endpoint out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        from modelworks import __version__

        print(f"modelworks {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


serve.register(app)
recipes.register(app)
app.add_typer(data.app, name="data")
train.register(app)
evaluate.register(app)
app.add_typer(models.app, name="models")
deploy.register(app)
chat.register(app)
app.add_typer(deploy.app, name="deployments")
app.add_typer(jobs.app, name="jobs")
access.register(app)
