"""A real server in a home of its own, as a user starts it, for tests that look at the whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil

from modelworks import Client


class RunningServer:
    """`modelworks up --port 0 --home HOME`. `restart` starts another on the same home."""

    def __init__(self, home: Path, *arguments: str, workers: int = 1) -> None:
        self.home = home
        self.arguments = arguments
        self.workers = workers
        self.start()

    def start(self) -> None:
        self.address.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelworks.cli", "up", "--home", str(self.home), "--port", "0", "--grpc-port", "0",
             *self.arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "MODELWORKS_WORKERS": str(self.workers)},
        )  # fmt: skip
        try:
            until(lambda: self.address.exists() or self.process.poll() is not None, 60)
        except AssertionError:
            self.process.kill()  # a server that is left over would slow all that follow
            raise
        if not self.address.exists():
            raise AssertionError(f"the server did not start: {self.process.communicate()[0]}")
        address = json.loads(self.address.read_text())
        self.url, self.grpc_port = address["url"], address["grpc_port"]

    @property
    def address(self) -> Path:
        return self.home / "server.json"

    @property
    def key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    @property
    def client(self) -> Client:
        return Client(url=self.url, api_key=self.key)

    def http(self, key: str | None = None, **options: Any) -> httpx2.Client:
        token = self.key if key is None else key
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30, **options)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Processes of this home by their title: gateway, worker, job, replica."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if line.startswith(f"modelworks {kind} ") and str(self.home) in line:
                found.append(process)
        return found

    def left_behind(self) -> list[psutil.Process]:
        return [
            process for kind in ("server", "gateway", "worker", "job", "replica") for process in self.processes(kind)
        ]

    def kill(self) -> None:
        """kill -9 of the server itself."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=10)

    def restart(self) -> None:
        self.start()

    def stop(self) -> str:
        """SIGTERM; returns what it printed. Fails when it does not end cleanly."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            output, _ = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return output


def until(condition: Callable[[], Any], seconds: float, step: float = 0.05) -> Any:
    """Wait until `condition` is true; AssertionError after `seconds`. Returns what it returned."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {condition}")
        time.sleep(step)
