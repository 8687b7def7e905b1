"""W3: a 1 MiB FP32 tensor in and out of a replica that runs a real onnxruntime Identity, by socket copy and by shared memory.

    python -m bench.large_tensors [--seconds 2] [--rounds 3]

Gateway end and replica are two processes, as in the product; each round measures all in turn, and medians are printed.
`inline` is the same graph called in the gateway's own process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from bench.graphs import identity
from modelworks.core.tensors import Tensor
from modelworks.core.types import Call, Signature, TensorSpec
from modelworks.serve.batcher import Batcher
from modelworks.serve.channel import Link, connect
from modelworks.serve.host import Host

SECRET = "0123456789abcdef" * 4
ELEMENTS = 262_144
CONCURRENCY = (1, 8)
GOAL = 3.0  # times the calls of the socket copy
Figures = dict[tuple[str, int], list[float]]
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1, ELEMENTS])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[-1, ELEMENTS])],
)


def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(identity(ELEMENTS), options, providers=["CPUExecutionProvider"])


async def replica(endpoint: str) -> None:
    run = session()
    batcher = Batcher(
        lambda inputs: {"y": run.run(None, inputs)[0]}, SIGNATURE, model_version="identity:1", max_batch=1
    )
    await Host(batcher, secret=SECRET, replica_id="r", model_version="identity:1").listen(endpoint)
    await asyncio.Event().wait()


async def linked(endpoint: str, *, share: bool) -> Link:
    for _ in range(500):
        try:
            return await connect(endpoint, SECRET, share=share)
        except OSError:
            await asyncio.sleep(0.02)
    raise SystemExit("the replica did not start")


async def rate(link: Link, data: bytes, concurrency: int, seconds: float) -> float:
    """Calls a second; each answer is checked for its size, and read at its two ends."""
    until = time.perf_counter() + seconds
    done = 0

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < until:
            call = Call("identity", [Tensor("x", "FP32", [1, ELEMENTS], data)], time.monotonic() + 30)
            answer = (await link.call(call)).outputs[0].data
            if len(answer) != len(data) or answer[:8] != data[:8] or answer[-8:] != data[-8:]:
                raise SystemExit("a wrong answer")
            done += 1

    begun = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(concurrency)])
    return done / (time.perf_counter() - begun)


def inline(data: bytes, seconds: float) -> float:
    run = session()
    until = time.perf_counter() + seconds
    done = 0
    while time.perf_counter() < until:
        run.run(None, {"x": np.frombuffer(data, np.float32).reshape(1, ELEMENTS)})[0].tobytes()
        done += 1
    return done / seconds


async def measure(seconds: float, rounds: int) -> Table:
    rng = np.random.default_rng(0)
    data = rng.random(ELEMENTS, dtype=np.float32).tobytes()
    rates: Figures = {}
    costs: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        endpoint = str(Path(folder) / "s")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.large_tensors", "--replica", endpoint
        )
        try:
            links = {
                "socket copy": await linked(endpoint, share=False),
                "shared memory": await linked(endpoint, share=True),
            }
            peer = psutil.Process(process.pid)
            for link in links.values():
                await rate(link, data, 8, 0.3)  # warm: pages, slots
            for _ in range(rounds):
                for name, link in links.items():
                    for concurrency in CONCURRENCY:
                        before = cpu(peer)
                        calls = await rate(link, data, concurrency, seconds)
                        rates.setdefault((name, concurrency), []).append(calls)
                        costs.setdefault((name, concurrency), []).append((cpu(peer) - before) / (calls * seconds) * 1e6)
                rates.setdefault(("inline", 1), []).append(inline(data, seconds / 2))
        finally:
            process.kill()
            await process.wait()
    return report(rates, costs)


def cpu(replica: psutil.Process) -> float:
    """Seconds of both processes; unlike the rates they hardly depend on what else the machine does."""
    times = replica.cpu_times()
    return time.process_time() + times.user + times.system


def report(rates: Figures, costs: Figures) -> Table:
    rate = {key: statistics.median(values) for key, values in rates.items()}
    cost = {key: statistics.median(values) for key, values in costs.items()}
    table = Table("", *[f"{c} concurrent" for c in CONCURRENCY], title="W3: 1 MiB in and out, Identity in onnxruntime")
    for name in ("socket copy", "shared memory", "inline"):
        table.add_row(f"{name}, calls/s", *[f"{rate[name, c]:.0f}" if (name, c) in rate else "" for c in CONCURRENCY])
    for name in ("socket copy", "shared memory"):
        table.add_row(f"{name}, CPU us/call", *[f"{cost[name, c]:.0f}" for c in CONCURRENCY])
    old, new = "socket copy", "shared memory"
    ratios = {c: rate[new, c] / rate[old, c] for c in CONCURRENCY}
    met = [f"{ratios[c]:.1f}x (goal {GOAL:g}x) {'met' if ratios[c] >= GOAL else 'MISSED'}" for c in CONCURRENCY]
    table.add_row("ratio of calls/s", *met)
    table.add_row("ratio of CPU", *[f"{cost[old, c] / cost[new, c]:.1f}x" for c in CONCURRENCY])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replica", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replica:
        uvloop.run(replica(options.replica))
    else:
        Console().print(uvloop.run(measure(options.seconds, options.rounds)))


if __name__ == "__main__":
    main()
