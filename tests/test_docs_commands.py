"""The documentation's commands: each is one that the command line takes, and README and tutorial run as they stand."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from modelworks import Client
from modelworks.cli.app import app
from tests.server import RunningServer

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/tutorial.md")
OTHERS = ("docs/tutorial.md", "docs/cli.md", "docs/architecture.md")  # runs whole; is generated; names processes, not commands
REFERENCES = tuple(page for path in sorted((ROOT / "docs").glob("*.md")) if (page := f"docs/{path.name}") not in OTHERS)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(modelworks [^`\n]+)`")
_SHELL = ("", "sh", "bash")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return _FENCE.findall((ROOT / page).read_text())


def commands(page: str) -> Iterator[str]:
    """Every `modelworks ...` of a page: lines of its shell blocks, and what stands inline."""
    for language, text in blocks(page):
        if language in _SHELL:
            yield from (line for line in text.replace("\\\n", " ").splitlines() if line.startswith("modelworks "))
    yield from _INLINE.findall(_FENCE.sub("", (ROOT / page).read_text()))


def check(command: str) -> None:
    """Parse a command as the command line does, without running it."""
    here: Any = get_command(app)
    rest = shlex.split(command, comments=True)[1:]
    while hasattr(here, "commands"):
        name = rest.pop(0)
        assert name in here.commands, f"{command}: there is no command {name}"
        here = here.commands[name]
    try:
        here.make_context(here.name, rest)
    except Exception as error:
        raise AssertionError(f"{command}: {error}") from error


CASES = [(page, command) for page in (*PAGES, *REFERENCES) for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{page}: {command[:60]}" for page, command in CASES])
def test_every_command_is_one_that_there_is(page: str, command: str) -> None:
    check(command)


def test_the_check_finds_what_is_wrong() -> None:
    assert len(CASES) > 70
    assert len({page for page, _ in CASES}) >= 10
    for wrong in ("train --model iris --dataset iris --target t --algorithm a", "deploy iris --rollback", "nonsense"):
        with pytest.raises(AssertionError):
            check(f"modelworks {wrong}")


def test_python_examples_are_python() -> None:
    found = [text for page in (*PAGES, *REFERENCES) for language, text in blocks(page) if language == "python"]
    assert found
    for text in found:
        ast.parse(text)


class Stranger:
    """Somebody with a project, a key and an empty folder, who copies what the pages say."""

    def __init__(self, server: RunningServer, folder: Path, project: str) -> None:
        self._url, self._folder = server.url, folder
        server.client.projects.create(project)
        owner = Client(url=server.url, api_key=server.key, project=project)
        key = owner.keys.create(name=project, role="admin").key
        (folder / ".modelworks").mkdir(parents=True)
        (folder / ".modelworks" / "admin.key").write_text(key + "\n")
        self._environment = {
            **os.environ,
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MODELWORKS_URL": server.url,
            "MODELWORKS_API_KEY": key,
        }

    def runs(self, *arguments: str) -> str:
        done = subprocess.run(
            arguments, cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{arguments[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def copies(self, page: str) -> dict[str, str]:
        """Do what the blocks of a page say, in order; what each printed. The server runs already."""
        printed = {}
        for language, text in blocks(page):
            if language == "toml":
                (self._folder / text.splitlines()[0].removeprefix("# ")).write_text(text)
            elif language == "python":
                printed[text] = self.runs(sys.executable, "-c", text)
            elif language in _SHELL and re.search(r"^modelworks (?!up\b)", text, re.MULTILINE):
                printed[text] = self.runs("bash", "-ec", text.replace("http://127.0.0.1:8000", self._url))
        return printed


@pytest.mark.slow
def test_the_readme_runs_as_it_stands(running: RunningServer, tmp_path: Path) -> None:
    printed = Stranger(running, tmp_path / "home", "docs-readme").copies("README.md")
    (python,) = [out for text, out in printed.items() if "import Client" in text]
    assert "label='setosa'" in python
    assert "'folds'" in python
    assert any("setosa" in out for text, out in printed.items() if "modelworks predict" in text)


@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(running: RunningServer, tmp_path: Path) -> None:
    printed = Stranger(running, tmp_path / "home", "docs-tutorial").copies("docs/tutorial.md")
    said = "".join(printed.values())
    assert "houses:2: 400 rows, 6 columns" in said
    assert "iris:2 against iris:1 on 150 rows" in said
    assert "true - predicted" in said
    assert "iris: iris:1, ready, revision 3" in said
    assert '"label":"setosa"' in said
    assert "mw_" in said
