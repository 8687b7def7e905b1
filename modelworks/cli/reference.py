"""The references generated from the code: `python -m modelworks.cli.reference` writes docs/cli.md and docs/recipes.md.

A test holds that they are current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modelworks.cli.exits import MEANINGS

DOCS = Path(__file__).resolve().parents[2] / "docs"
_SHARED = ("url", "api_key", "home", "project", "ca", "as_json")


def main() -> int:
    DOCS.mkdir(exist_ok=True)
    for name, render in PAGES.items():
        (DOCS / name).write_text(render())
        print(f"docs/{name}")
    return 0


def cli() -> str:
    """docs/cli.md"""
    from typer.main import get_command

    from modelworks.cli.app import app

    root = get_command(app)
    parts = [
        "# The command line",
        "_Generated from the code by `make docs`; do not edit._",
        "The server and the key come from flags, then MODELWORKS_URL and MODELWORKS_API_KEY, then the local home "
        "(`--home`, `MODELWORKS_HOME`, or `~/.modelworks`). A home's admin key is only sent to that home's own server.",
        "Results go to stdout, progress and remarks to stderr. `--json` prints JSON. An error is a sentence on stderr.",
        "## Exit codes",
        _table(("code", "meaning"), [(f"`{code}`", meaning) for code, meaning in MEANINGS.items()]),
        "## Options of every command that calls a server",
        _options(_shared(root)),
        "## Commands",
        *_commands(root, "modelworks"),
    ]
    return "\n\n".join(parts) + "\n"


def _shared(root: Any) -> list[Any]:
    return [option for option in root.commands["status"].params if option.name in _SHARED]


def _commands(command: Any, path: str) -> Iterator[str]:
    for name, child in getattr(command, "commands", {}).items():
        here = f"{path} {name}"
        if hasattr(child, "commands"):
            yield f"### {here}\n\n{_prose(child.help)}"
            yield from _commands(child, here)
        else:
            yield _command(child, here)


def _command(command: Any, path: str) -> str:
    calls_server = any(option.name == "api_key" for option in command.params)
    own = [one for one in command.params if not one.hidden and not (calls_server and one.name in _SHARED)]
    arguments = [one for one in own if one.param_type_name == "argument"]
    options = [one for one in own if one.param_type_name == "option" and one.name != "help"]
    usage = " ".join([path, *(_usage(one) for one in arguments), *(["[OPTIONS]"] if options or calls_server else [])])
    parts = [f"#### {path}", _prose(command.help), f"```\n{usage}\n```"]
    if arguments:
        rows = [(f"`{_label(one)}`", _cell(one.help or "")) for one in arguments]
        parts.append(_table(("argument", ""), rows))
    if options:
        parts.append(_options(options))
    return "\n\n".join(parts)


def _usage(argument: Any) -> str:
    return _label(argument) if argument.required else f"[{_label(argument)}]"


def _label(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper().replace("_", "-")


def _options(options: list[Any]) -> str:
    rows = []
    for one in options:
        names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
        rows.append((names, _cell(one.help or ""), _default(one)))
    return _table(("option", "", "default"), rows)


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    if value is None or value is False or callable(value) or isinstance(value, list | tuple):
        return ""
    return f"`{option.opts[0] if value is True else value}`"


def recipes() -> str:
    """docs/recipes.md"""
    from modelworks.core.deployment import DeploymentSpec
    from modelworks.core.recipe import Recipe
    from modelworks.core.specs import TrainingSpec
    from modelworks.ml.data.transforms.catalogue import describe

    training = TrainingSpec.model_json_schema()
    definitions = training.get("$defs", {})
    deployment = DeploymentSpec.model_json_schema()
    recipe = Recipe.model_json_schema()
    filled_in = ("model", "dataset", "seed")
    parts = [
        "# Recipes",
        "_Generated from the code by `make docs`; do not edit._",
        "A recipe is a whole lifecycle in one TOML file: data, training with its evaluation, deployment, and a sample "
        "prediction. `modelworks run FILE` carries it out; run again, it gives the same digests and metrics and makes "
        "nothing new. A key that is not listed here is an error that names the file and the key.",
        "```toml\n" + _example() + "```",
        "## The recipe",
        _fields(recipe),
        "## `[data]`",
        _fields(recipe["$defs"]["DataSource"]),
        "A file is named relative to the recipe and is uploaded; the other sources are fetched by the server.",
        "### `[data.schema]`",
        _fields(recipe["$defs"]["TableSchema"]),
        "## `[model]`",
        "In place of data and train: a model that is there already (`recipes/chat.toml`, `recipes/embed.toml`).",
        _fields(recipe["$defs"]["ModelSource"]),
        "## `[train]`",
        _fields({**training, "properties": _without(training["properties"], filled_in)}),
        "The algorithms and their hyperparameters: `modelworks algorithms [NAME]`, or `GET /api/v1/algorithms`.",
        "### `[train.validation]`",
        _fields(definitions["Method"]),
        "### `[[train.gates]]`",
        _fields(definitions["Gate"]),
        "### `[train.resources]`",
        _fields(definitions["JobResources"]),
        "### `[[train.transforms]]`",
        _prose(definitions["TransformSpec"]["description"]),
        _transforms(describe()),
        "## `[deploy]`",
        "`name` is the recipe's name by default. The section may be empty; without it nothing is deployed.",
        _fields({**deployment, "properties": _without(deployment["properties"], ("model",))}),
        "### `[deploy.replicas]`",
        _fields(deployment["$defs"]["Replicas"]),
        "### `[deploy.batching]`",
        _fields(deployment["$defs"]["Batching"]),
        "### `[deploy.limits]`",
        _fields(deployment["$defs"]["CallLimits"]),
        "### `[deploy.resources]`",
        _fields(deployment["$defs"]["Resources"]),
        "## `[predict]`",
        _table(
            ("key", "type", "default", ""),
            [
                (
                    "`inputs`",
                    "list of tables",
                    "required",
                    "rows of raw features by name, predicted once it is deployed",
                ),
                (
                    "`messages`",
                    "list of tables",
                    "",
                    "for a model that chats, in place of inputs; parameters beside it",
                ),
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _example() -> str:
    """The iris recipe; where there is no checkout, the installed one."""
    from modelworks.cli.demo import find_recipe

    return find_recipe("iris").read_text()


def _without(properties: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: schema for name, schema in properties.items() if name not in names}


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for name, about in schema["properties"].items():
        default = "required" if name in required else _default_of(about)
        rows.append((f"`{name}`", _cell(_type(about)), default, _cell(about.get("description", ""))))
    return _table(("key", "type", "default", ""), rows)


def _default_of(about: dict[str, Any]) -> str:
    import json

    value = about.get("default")
    return "" if value in (None, [], {}, "") or isinstance(value, dict) else f"`{json.dumps(value)}`"


def _type(about: dict[str, Any]) -> str:
    """A JSON Schema in few words: `integer from 2 to 100`, `list of text`."""
    if "anyOf" in about:
        return " or ".join(_type(one) for one in about["anyOf"] if one.get("type") != "null")
    if "$ref" in about:
        return "table" if not about["$ref"].endswith("TransformSpec") else "table or name of an op"
    if "enum" in about:
        return " or ".join(f"`{value}`" for value in about["enum"])
    kind = about.get("type", "any")
    if kind == "array":
        return f"list of {_type(about.get('items', {}))}"
    words = {"string": "text", "object": "table"}.get(kind, kind)
    for key, word in (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
    ):
        if key in about:
            words += f" {word} {about[key]:,}".replace(",", " ")
    return words


def _transforms(catalogue: list[dict[str, Any]]) -> str:
    rows = []
    for one in catalogue:
        properties = one["parameters"].get("properties", {})
        parameters = "<br>".join(
            f"`{name}`: {_cell(about.get('description') or _type(about))}" for name, about in properties.items()
        )
        default = one["default_columns"]
        columns = "must be given" if default is None else ", ".join(default)
        rows.append((f"`{one['name']}`", _cell(one["description"]), columns, parameters))
    return _table(("op", "", "columns by default", "parameters"), rows)


def _prose(text: str | None) -> str:
    """A docstring's paragraphs, unwrapped."""
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    return "\n\n".join(" ".join(one.split()) for one in paragraphs)


def _cell(text: str) -> str:
    """Text in a table's cell; defaults stand in a column of their own."""
    text = re.sub(r"\s*\[default: ([^\]]*)\]", r" Default: \1.", " ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;") if "<br>" not in text else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


PAGES = {"cli.md": cli, "recipes.md": recipes}

if __name__ == "__main__":
    sys.exit(main())
