"""A PostgreSQL server of the tests' own, over a Unix socket in a folder that goes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "postgres"  # who runs the server where the tests run as root, which it refuses


def programs() -> Path | None:
    """The folder with initdb and pg_ctl; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = str(found[-1]) if found else shutil.which("initdb")
    return Path(path).parent if path else None


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database `modelworks`, less the name of a schema."""
    folder = Path(tempfile.mkdtemp(prefix="mw-pg-"))  # short: a socket's path has 107 bytes at most
    root = os.geteuid() == 0
    if root:
        shutil.chown(folder, USER)
    bin = programs()
    assert bin is not None

    def run(program: str, *arguments: str) -> None:
        command = [str(bin / program), "-D", str(folder / "data"), *arguments]
        command = ["runuser", "-u", USER, "--", *command] if root else command
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")

    try:
        run("initdb", "-U", "modelworks", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions")
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-k {folder} -c listen_addresses='' -c fsync=off", "start")
        try:
            yield f"postgresql+psycopg://modelworks@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
