"""A server of our own for a benchmark: started in a fresh home, models deployed from files, its processes looked at."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from modelworks import Client


@dataclass
class Stage:
    home: Path
    url: str
    grpc_port: int
    key: str
    client: Client
    server: psutil.Process

    @classmethod
    def at(cls, home: Path) -> Stage:
        """That of a server that runs."""
        address = json.loads((home / "server.json").read_text())
        url, key = str(address["url"]), (home / "admin.key").read_text().strip()
        return cls(home, url, address["grpc_port"], key, Client(url=url, api_key=key), psutil.Process(address["pid"]))

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def deploy(self, name: str, file: Path, task: str = "custom", **spec: object) -> None:
        """Register a model file and have it served; returns when it is ready."""
        self.client.models.import_(name, file, task=task)
        self.client.deployments.put(name, model=name, **spec)  # type: ignore[arg-type]
        self.client.deployments.wait_ready(name)

    def learn_iris(self, **spec: Any) -> None:
        """Train a classifier of iris and have it served; returns when it is ready."""
        self.client.datasets.create(name="iris", source="sklearn:iris")
        asked = {"model": "iris", "dataset": "iris", "target": "species", "algorithm": "logistic-regression"}
        job = self.client.training_jobs.wait(self.client.training_jobs.create(**asked))
        self.client.deployments.put("iris", model=job.model_version, **spec)
        self.client.deployments.wait_ready("iris")

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those titled `modelworks KIND ...` that live, by their ids."""
        title, found = f"modelworks {kind} ", []
        for process in [self.server, *self.server.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended in the meantime
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return sorted(found, key=lambda one: one.pid)

    def serving(self) -> list[psutil.Process]:
        return [*self.processes("gateway"), *self.processes("replica")]


@contextlib.contextmanager
def stage(folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Stage]:
    home = folder / "home"
    command = [sys.executable, "-m", "modelworks.cli", "up", "--home", str(home), "--port", "0", "--grpc-port", "0"]
    server = subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
    )
    try:
        until(lambda: (home / "server.json").exists() or server.poll() is not None, 30)
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        yield Stage.at(home)
    finally:
        server.terminate()
        server.wait(30)


def until(condition: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("it took too long")
        time.sleep(0.01)


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


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    until(lambda: listens(port) or process.poll() is not None, seconds)
    if process.poll() is not None:
        raise SystemExit(f"{process.args!r} ended with code {process.returncode}")


@contextlib.contextmanager
def peer(module: str, graph: Path) -> Iterator[tuple[int, psutil.Process]]:
    """`python -m MODULE GRAPH PORT`, once it listens: its port and process."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", module, str(graph), str(port)])
    try:
        wait_port(port, process)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)
