"""Predictions a second: ours (keys, limits, counters, own process for the model) beside FastAPI with the model inline.

    python -m bench.predict [--seconds 3] [--rounds 3]

One server, one gateway, one replica; iris, one row a request. Each round measures all in turn; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.load import Figures, measure, post
from bench.stage import Stage, family, peer, pss, stage
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
    begun = time.perf_counter()
    with stage(folder) as server:
        started = time.perf_counter() - begun
        idle = pss(family(server.server.pid))
        server.learn_iris()
        with peer("bench.inline_peer", export_graph(server.client, folder)) as (port, _):
            console = Console()
            console.print(
                f"start to /health {started:.2f} s; idle server {idle:.0f} MB (PSS); "
                f"with a replica {pss(family(server.server.pid)):.0f} MB"
            )
            console.print(table(requests(server, port), seconds, rounds))


def export_graph(client: Client, folder: Path) -> Path:
    """The very graph that the replica runs, out of the exported package."""
    import zipfile

    package = folder / "iris.zip"
    client.models.export("iris:1", package)
    with zipfile.ZipFile(package) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".onnx"))
        archive.extract(name, folder)
    return folder / name


def requests(server: Stage, peer_port: int) -> dict[str, tuple[int, bytes]]:
    native = json.dumps({"inputs": [ROW]}).encode()
    tensors = [{"name": name, "shape": [1, 1], "datatype": "FP32", "data": [value]} for name, value in ROW.items()]
    oip = json.dumps({"inputs": tensors}).encode()
    return {
        "FastAPI, model inline": (peer_port, post("/predict", native, {})),
        "predict": (server.port, post("/api/v1/deployments/iris/predict", native, server.headers)),
        "/v2 infer": (server.port, post("/v2/models/iris/infer", oip, server.headers)),
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


if __name__ == "__main__":
    main()
