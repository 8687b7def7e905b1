"""Start to the first correct answer, memory at rest, and memory after 100,000 requests, also with the catalog locked.

    python -m bench.footprint [--requests 100000]

One server with one small ONNX model (iris). Memory is PSS of gateway and replica together, in MB.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import httpx2

from bench import load
from bench.graphs import IRIS, iris
from bench.stage import Stage, pss, stage

START, IDLE, GROWTH = 1.5, 200.0, 0.02  # the goals: seconds, MB, share
PATH = "/v2/models/iris/infer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mw-bench-") as name:
        folder = Path(name)
        with stage(folder) as server:
            server.deploy("iris", iris(folder / "iris.onnx"))
        seconds = [first_answer(folder) for _ in range(options.starts)]
        say("start to the first correct answer", statistics.median(seconds), "s", START)
        with stage(folder) as server:
            wait_answer(server)
            time.sleep(2.0)
            say("gateway and replica at rest", pss(server.serving()), "MB (PSS)", IDLE)
            send(server, options.requests // 5)  # pools and caches fill
            grown = growth(server, options.requests)
            say(f"growth over {options.requests:,} requests", grown * 100, "%", GROWTH * 100)
            lock = sqlite3.connect(server.home / "catalog.sqlite", isolation_level=None)
            lock.execute("BEGIN EXCLUSIVE")
            try:
                grown = growth(server, options.requests)
            finally:
                lock.execute("ROLLBACK")
            say("the same with the catalog locked", grown * 100, "%", GROWTH * 100)


def say(what: str, value: float, unit: str, goal: float) -> None:
    print(f"{what:40} {value:8.2f} {unit} (goal: below {goal:g}) {'met' if value < goal else 'MISSED'}", flush=True)


def first_answer(folder: Path) -> float:
    """Seconds from the command of a server that has the deployment already."""
    begun = time.perf_counter()
    with stage(folder) as server:
        wait_answer(server)
        return time.perf_counter() - begun


def wait_answer(server: Stage) -> None:
    url = f"http://127.0.0.1:{server.port}{PATH}"
    with httpx2.Client(headers=server.headers) as client:
        for _ in range(2000):
            response = client.post(url, json=IRIS)
            if response.is_success:
                outputs = {output["name"]: output["data"] for output in response.json()["outputs"]}
                assert outputs["label"] == [0], outputs
                return
            time.sleep(0.005)
    raise SystemExit(f"no answer: {response.text}")


def growth(server: Stage, requests: int) -> float:
    before = pss(server.serving())
    send(server, requests)
    return pss(server.serving()) / before - 1


def send(server: Stage, requests: int) -> None:
    """So many at 32 connections, all of which must be answered."""
    request = load.post(PATH, json.dumps(IRIS).encode(), server.headers)
    done = 0.0
    while done < requests:
        figures = load.measure("127.0.0.1", server.port, request, connections=32, seconds=2.0)
        if figures.failed:
            raise SystemExit(f"{figures.failed} requests failed")
        done += figures.rate * 2.0


if __name__ == "__main__":
    main()
