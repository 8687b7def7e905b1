"""The demo: a server of its own as a child process, a recipe told from data to prediction, and a clean end."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from modelworks.cli.exits import Failed
from modelworks.cli.recipe import load
from modelworks.cli.recipes import perform
from modelworks.cli.session import Session
from modelworks.core.errors import InvalidInput
from modelworks.core.settings import child_environment

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_LOG_TAIL = 2000


def run(recipe: Path | None, *, home: Path, port: int, stay: bool, as_json: bool) -> None:
    loaded = load(recipe or find_recipe("iris"))
    home = home.absolute()
    with server(home, port) as process:
        session = Session(as_json=as_json, home=home, url=None, api_key=None)
        url = session.client.connection.url
        session.say(f"A server of its own is up at {url}, home {home}")
        perform(session, loaded)
        if stay:
            session.note(f"The server stays up, see {url}/docs; stop it with Ctrl-C, or: kill {process.pid}")
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()


def find_recipe(name: str) -> Path:
    """A recipe that comes with Modelworks: in the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise InvalidInput(f"the recipe {name} did not come with this installation; name one with --recipe", param="recipe")


@contextlib.contextmanager
def server(home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`modelworks up` on `home`, ready to answer; stopped by SIGTERM at the end. It dies with us, too."""
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (logs / "server.log").open("wb") as log, _sigterm_interrupts():
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "modelworks.cli",
                "up",
                "--home",
                str(home),
                "--port",
                str(port),
                "--with-parent",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the first start prints the admin key there
            stderr=log,
            env=child_environment(),
            process_group=0,  # Ctrl-C is ours to hand on, once
        )
        try:
            _until_up(process, home, log)
            yield process
        finally:
            _stop(process)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does, so that the server is stopped in either case."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _until_up(process: subprocess.Popen[bytes], home: Path, log: IO[bytes]) -> None:
    """Wait for HOME/server.json, which our server writes once /health answers."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise Failed(f"the server did not start: {_last_words(home) or f'exit code {process.returncode}'}")
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((home / "server.json").read_text())["pid"] == process.pid:
                return
        time.sleep(0.02)
    raise Failed(f"the server did not answer within {_START_SECONDS:g} s; see {home}/logs")


def _last_words(home: Path) -> str:
    """The last line that the server wrote before it ended."""
    text = (home / "logs" / "server.log").read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
    return text.splitlines()[-1].removeprefix("error: ") if text else ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
