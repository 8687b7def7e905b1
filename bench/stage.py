"""A server of our own for a benchmark: started in a fresh home, models deployed from files, its processes looked at."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from modelworks import Client


@dataclass
class Stage:
    """`started`: seconds from the command to an answer of /health."""

    home: Path
    port: int
    key: str
    client: Client
    started: float
    server: psutil.Process

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def deploy(self, name: str, file: Path, task: str = "custom", **spec: object) -> None:
        """Register a model file and have it served; returns when it is ready."""
        self.client.models.import_(name, file, task=task)
        self.client.deployments.put(name, model=name, **spec)  # type: ignore[arg-type]
        self.client.deployments.wait_ready(name)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those titled `modelworks KIND ...`."""
        title = f"modelworks {kind} "
        found = [self.server, *self.server.children(recursive=True)]
        return [process for process in found if " ".join(process.cmdline()).startswith(title)]

    def serving(self) -> list[psutil.Process]:
        return [*self.processes("gateway"), *self.processes("replica")]


@contextlib.contextmanager
def stage(folder: Path, *options: str) -> Iterator[Stage]:
    home = folder / "home"
    begun = time.perf_counter()
    command = [sys.executable, "-m", "modelworks.cli", "up", "--home", str(home), "--port", "0", "--grpc-port", "0"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        address = home / "server.json"
        for _ in range(2000):
            if address.exists():
                break
            time.sleep(0.01)
        else:
            raise SystemExit("the server did not start")
        url = str(json.loads(address.read_text())["url"])
        key = (home / "admin.key").read_text().strip()
        started = time.perf_counter() - begun
        client = Client(url=url, api_key=key)
        yield Stage(home, int(url.rsplit(":", 1)[1]), key, client, started, psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait(20)


def cpu(processes: list[psutil.Process]) -> float:
    """Seconds of CPU that they have used: unlike rates, hardly touched by what else the machine does."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def pss(processes: list[psutil.Process]) -> float:
    """MB, shared pages counted once."""
    return float(sum(process.memory_full_info().pss for process in processes) / 1e6)


def family(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with code {process.returncode}")
        time.sleep(0.02)
    raise SystemExit(f"nothing answers on port {port}")
