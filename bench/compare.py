"""W1 over HTTP beside other servers: one row of iris a request, the same ONNX graph, client and machine; ratios and goals.
Then W2 (embeddings.py) and W3 (large_tensors.py).

    python -m bench.compare [--seconds 2] [--rounds 3] [--only litserve,prototype] [--work w1,w2,w3]

Ours runs as it is installed: keys, rate limits, counters, request ids, the model in a process of its own. The peers run
from environments of their own (venvs.py). Each round measures all in turn, those not measured stand still; medians are
printed. The client is wrk where there is one, else bench/load.py: `client` says how much of one CPU it used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from bench import embeddings, large_tensors, load, venvs
from bench.graphs import IRIS, iris
from bench.stage import cpu, family, free_port, stage, wait_port

PEERS = Path(__file__).parent / "peers"
CONNECTIONS = (1, 32, 128)
OURS = "modelworks"
# name -> (path of a prediction, {connections: what ours must reach of its rate})
OTHERS = {
    "litserve": ("/predict", {32: 30.0}),
    "pytriton": ("/v2/models/iris/infer", {32: 10.0}),
    "mosec": ("/inference", {32: 2.5}),
    "raw_asgi": ("/", {1: 0.65}),
    "prototype": ("/", {32: 0.5}),
}


@dataclass
class Target:
    port: int
    path: str
    headers: dict[str, str]
    processes: list[psutil.Process]
    group: int | None = None  # a peer's process group, which stands still between its turns


@dataclass(frozen=True)
class Figures:
    """Requests a second, CPU of the server in microseconds a request, CPU of the client as a share of one."""

    rate: float
    cost: float
    client: float
    failed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(OTHERS), help="peers, by comma")
    parser.add_argument("--connections", default=",".join(map(str, CONNECTIONS)))
    parser.add_argument("--work", default="w1,w2,w3", help="which, by comma")
    options = parser.parse_args()
    work = options.work.split(",")
    console = Console(width=110)
    if "w1" in work:
        console.print(first(options))
    if "w2" in work:
        console.print(asyncio.run(embeddings.run(2 * options.seconds, options.rounds)))
    if "w3" in work:
        console.print(uvloop.run(large_tensors.measure(options.seconds, options.rounds)))


def first(options: argparse.Namespace) -> Table:
    """W1."""
    connections = [int(one) for one in options.connections.split(",")]
    with tempfile.TemporaryDirectory(prefix="mw-bench-") as folder:
        graph = iris(Path(folder) / "iris.onnx")
        peers: dict[str, subprocess.Popen[bytes]] = {}
        try:
            with stage(Path(folder)) as ours:
                ours.deploy("iris", graph)
                targets = {OURS: Target(ours.port, "/v2/models/iris/infer", ours.headers, ours.serving())}
                for name in options.only.split(","):
                    target = start(name, graph, peers)
                    if target is not None:
                        targets[name] = target
                found = measure(targets, connections, options.seconds, options.rounds)
                return table(found, connections)
        finally:
            for peer in peers.values():
                os.killpg(peer.pid, signal.SIGKILL)
                peer.wait()


def start(name: str, graph: Path, peers: dict[str, subprocess.Popen[bytes]]) -> Target | None:
    """None where it cannot be installed or does not answer here, which is said."""
    own = PEERS / f"{name}_app.py"
    python = venvs.python(name) if own.exists() else Path(sys.executable)
    if python is None:
        return None
    port = free_port()
    port_arguments = ["--port", str(port), "--timeout", "30000"] if name == "mosec" else [str(port)]
    script = str(own if own.exists() else PEERS / f"{name}.py")
    log = open(graph.parent / f"{name}.log", "wb")  # noqa: SIM115 - the peer's, for its life
    # Triton's stub loads a libpython by name: it must be the one that the environment's standard library belongs to
    library = str(sysconfig.get_config_var("LIBDIR"))
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "LD_LIBRARY_PATH": library}
    command = [str(python), script, str(graph), *port_arguments]
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    peers[name] = process
    path, _ = OTHERS[name]
    target = Target(port, path, {}, [], process.pid)
    try:
        wait_port(port, process)
        until = time.perf_counter() + 30
        while not answers(target):
            if time.perf_counter() > until:
                raise SystemExit("it answers no request")
            time.sleep(0.2)
    except SystemExit as reason:
        lines = (graph.parent / f"{name}.log").read_text(errors="replace").strip().splitlines()
        print(f"{name} is left out: {reason}; its last line: {lines[-1][:200] if lines else ''}", file=sys.stderr)
        return None
    target.processes = family(process.pid)
    os.killpg(process.pid, signal.SIGSTOP)
    return target


def answers(target: Target) -> bool:
    import httpx2

    try:
        response = httpx2.post(f"http://127.0.0.1:{target.port}{target.path}", json=IRIS, timeout=5)
    except httpx2.TransportError:
        return False
    outputs = {output["name"]: output["data"] for output in response.json().get("outputs", [])} if response.is_success else {}
    return outputs.get("label") == [0]


def measure(
    targets: dict[str, Target], connections: list[int], seconds: float, rounds: int
) -> dict[tuple[str, int], list[Figures]]:
    found: dict[tuple[str, int], list[Figures]] = {}
    for _ in range(rounds):
        for count in connections:
            for name, target in targets.items():
                if target.group is not None:
                    os.killpg(target.group, signal.SIGCONT)
                try:
                    found.setdefault((name, count), []).append(run(target, count, seconds))
                finally:
                    if target.group is not None:
                        os.killpg(target.group, signal.SIGSTOP)
    return found


def run(target: Target, connections: int, seconds: float) -> Figures:
    body = json.dumps(IRIS)
    before = cpu(target.processes)
    mine, begun = _used(), time.perf_counter()
    if shutil.which("wrk"):
        done, failed = wrk(target, body, connections, seconds)
    else:
        request = load.post(target.path, body.encode(), target.headers)
        figures = load.measure("127.0.0.1", target.port, request, connections=connections, seconds=seconds)
        done, failed = int(figures.rate * seconds), figures.failed
    took = time.perf_counter() - begun
    used = cpu(target.processes) - before
    return Figures(done / seconds, used / max(1, done) * 1e6, (_used() - mine) / took, failed)


def _used() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def wrk(target: Target, body: str, connections: int, seconds: float) -> tuple[int, int]:
    headers = {"content-type": "application/json", **target.headers}
    lines = [f"wrk.method = 'POST'\nwrk.body = [==[{body}]==]"]
    lines += [f"wrk.headers['{name}'] = '{value}'" for name, value in headers.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write("\n".join(lines))
        script.flush()
        url = f"http://127.0.0.1:{target.port}{target.path}"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", script.name, url]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    done = re.search(r"(\d+) requests in", said)
    bad = sum(int(count) for count in re.findall(r"Non-2xx or 3xx responses: (\d+)", said))
    for errors in re.findall(r"Socket errors: (.*)", said):
        bad += sum(int(count) for count in re.findall(r"\d+", errors))
    return int(done[1]) if done else 0, bad


def table(found: dict[tuple[str, int], list[Figures]], connections: list[int]) -> Table:
    client = "wrk" if shutil.which("wrk") else "bench/load.py"
    shown = Table("", "connections", "requests/s", "server us/req", "client CPU", "failed", "ours / it", "goal",
                  title=f"W1: one iris row a request over HTTP, ONNX logistic regression; client {client}")  # fmt: skip
    names = dict.fromkeys(name for name, _ in found)

    def middle(name: str, count: int, field: str) -> float:
        return statistics.median(getattr(one, field) for one in found[name, count])

    for count in connections:
        for name in names:
            ratio = middle(OURS, count, "rate") / max(1.0, middle(name, count, "rate"))
            goal = OTHERS[name][1].get(count) if name in OTHERS else None
            verdict = "" if goal is None else f"{goal:g} {'met' if ratio >= goal else 'MISSED'}"
            shown.add_row(
                name, str(count), f"{middle(name, count, 'rate'):,.0f}", f"{middle(name, count, 'cost'):.0f}",
                f"{middle(name, count, 'client'):.0%}", str(sum(one.failed for one in found[name, count])),
                "" if name == OURS else f"{ratio:.2f}", verdict,
            )  # fmt: skip
        shown.add_section()
    return shown


if __name__ == "__main__":
    main()
