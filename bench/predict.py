"""Predictions a second: ours (keys, limits, counters, own process for the model) beside FastAPI with the model inline.

    python -m bench.predict [--seconds 3] [--rounds 3]

One server, one gateway, one replica; iris, one row a request. Each round measures all in turn; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench.load import Figures, measure, post
from modelworks import Client

ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mw-bench-") as folder:
        run(Path(folder), options.seconds, options.rounds)


def run(folder: Path, seconds: float, rounds: int) -> None:
    home = folder / "home"
    begun = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "modelworks.cli", "up", "--home", str(home), "--port", "0"],
                              stdout=subprocess.DEVNULL)  # fmt: skip
    peer = None
    try:
        url = wait_for(home / "server.json")
        started = time.perf_counter() - begun
        client = Client(url=url, api_key=(home / "admin.key").read_text().strip())
        idle = memory(server.pid)
        prepare(client)
        graph = export_graph(client, folder)
        peer_port = free_port()
        peer = subprocess.Popen([sys.executable, "-m", "bench.inline_peer", str(graph), str(peer_port)])
        wait_port(peer_port)
        targets = requests(client, url, home, peer_port)
        console = Console()
        console.print(
            f"start to /health {started:.2f} s; idle server {idle:.0f} MB (PSS); with a replica {memory(server.pid):.0f} MB"
        )
        console.print(table(targets, seconds, rounds))
    finally:
        server.terminate()
        if peer:
            peer.terminate()
        server.wait(20)


def prepare(client: Client) -> None:
    client.datasets.create(name="iris", source="sklearn:iris")
    job = client.training_jobs.create(model="iris", dataset="iris", target="species", algorithm="logistic-regression")
    job = client.training_jobs.wait(job)
    client.deployments.put("iris", model=job.model_version)
    client.deployments.wait_ready("iris")


def export_graph(client: Client, folder: Path) -> Path:
    """The very graph that the replica runs, out of the exported package."""
    import zipfile

    package = folder / "iris.zip"
    client.models.export("iris:1", package)
    with zipfile.ZipFile(package) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".onnx"))
        archive.extract(name, folder)
    return folder / name


def requests(client: Client, url: str, home: Path, peer_port: int) -> dict[str, tuple[int, bytes]]:
    port = int(url.rsplit(":", 1)[1])
    key = {"authorization": f"Bearer {(home / 'admin.key').read_text().strip()}"}
    native = json.dumps({"inputs": [ROW]}).encode()
    tensors = [{"name": name, "shape": [1, 1], "datatype": "FP32", "data": [value]} for name, value in ROW.items()]
    oip = json.dumps({"inputs": tensors}).encode()
    return {
        "FastAPI, model inline": (peer_port, post("/predict", native, {})),
        "predict": (port, post("/api/v1/deployments/iris/predict", native, key)),
        "/v2 infer": (port, post("/v2/models/iris/infer", oip, key)),
    }


def table(targets: dict[str, tuple[int, bytes]], seconds: float, rounds: int) -> Table:
    found: dict[tuple[str, int], list[Figures]] = {}
    for _ in range(rounds):
        for connections in (1, 32):
            for name, (port, request) in targets.items():
                figures = measure("127.0.0.1", port, request, connections=connections, seconds=seconds)
                found.setdefault((name, connections), []).append(figures)
    shown = Table(
        "", "connections", "requests/s", "ratio", "p50 ms", "p99 ms", "failed", title="one iris row a request"
    )
    peer = next(iter(targets))
    for (name, connections), runs in sorted(found.items(), key=lambda item: item[0][1]):
        rate = statistics.median(run.rate for run in runs)
        base = statistics.median(run.rate for run in found[peer, connections])
        shown.add_row(
            name, str(connections), f"{rate:,.0f}", f"{rate / base:.2f}",
            f"{statistics.median(run.p50 for run in runs):.2f}", f"{statistics.median(run.p99 for run in runs):.2f}",
            str(sum(run.failed for run in runs)),
        )  # fmt: skip
    return shown


def memory(pid: int) -> float:
    """MB of the process and all below it, shared pages counted once (PSS)."""
    root = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)]) / 1e6


def wait_for(path: Path) -> str:
    for _ in range(1000):
        if path.exists():
            return str(json.loads(path.read_text())["url"])
        time.sleep(0.02)
    raise SystemExit("the server did not start")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_port(port: int) -> None:
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit(f"nothing answers on port {port}")


if __name__ == "__main__":
    main()
