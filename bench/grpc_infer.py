"""gRPC inferences a second: ours (keys, limits, counters, own process for the model) beside a bare grpcio aio handler.

    python -m bench.grpc_infer [--seconds 3] [--rounds 3]

One server, one gateway, one replica; iris, one row a call, ModelInfer with raw contents. Medians of rounds in turn.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import tempfile
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench.grpc_load import measure
from bench.load import Figures
from bench.predict import ROW, export_graph
from bench.stage import cpu, peer, stage

PATH = "/inference.GRPCInferenceService/ModelInfer"
GOAL = 0.85  # of the bare handler's rate at 32 streams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mw-bench-") as folder:
        run(Path(folder), options.seconds, options.rounds)


def run(folder: Path, seconds: float, rounds: int) -> None:
    with stage(folder) as server:
        server.learn_iris()
        with peer("bench.grpc_peer", export_graph(server.client, folder)) as (port, process):
            (gateway,) = server.processes("gateway")
            targets = {
                "grpcio aio, model inline": (port, {}, process),
                "ModelInfer": (server.grpc_port, server.headers, gateway),
            }
            Console().print(table(targets, seconds, rounds))


def request() -> bytes:
    from modelworks.api.grpc.messages import message

    found = message("inference.ModelInferRequest")(model_name="iris")
    for name, value in ROW.items():
        found.inputs.add(name=name, datatype="FP32", shape=[1, 1])
        found.raw_input_contents.append(struct.pack("<f", value))
    return bytes(found.SerializeToString())


def table(targets: dict[str, tuple[int, dict[str, str], psutil.Process]], seconds: float, rounds: int) -> Table:
    found: dict[tuple[str, int], list[Figures]] = {}
    spent: dict[tuple[str, int], list[float]] = {}
    message = request()
    for _ in range(rounds):
        for streams in (1, 32, 128):
            for name, (port, headers, process) in targets.items():
                before = cpu([process])
                figures = measure(port, PATH, headers, message, streams=streams, seconds=seconds)
                used = cpu([process]) - before
                found.setdefault((name, streams), []).append(figures)
                spent.setdefault((name, streams), []).append(used / max(1.0, figures.rate * seconds) * 1e6)
    shown = Table("", "streams", "calls/s", "ratio", "p50 ms", "p99 ms", "CPU us/call", "failed",
                  title=f"one iris row a call over gRPC (goal at 32 streams: {GOAL})")  # fmt: skip
    peer = next(iter(targets))
    for (name, streams), runs in sorted(found.items(), key=lambda item: item[0][1]):
        rate = statistics.median(run.rate for run in runs)
        base = statistics.median(run.rate for run in found[peer, streams])
        shown.add_row(
            name, str(streams), f"{rate:,.0f}", f"{rate / base:.2f}",
            f"{statistics.median(run.p50 for run in runs):.2f}", f"{statistics.median(run.p99 for run in runs):.2f}",
            f"{statistics.median(spent[name, streams]):.0f}", str(sum(run.failed for run in runs)),
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
