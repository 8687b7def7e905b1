"""Many calls through one replica, a fifth of them aborted and links cut all the time: is anything left over afterwards?

python -m bench.channel_churn [--calls 100000] [--seed 0]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil
import uvloop
from rich.console import Console

from tests.test_serve_shm import CLEAN, churn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console, process = Console(), psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(churn(Path(folder), 2000, seed=options.seed))  # warm: what stays stays from here on
        before, begun = process.memory_info().rss, time.perf_counter()
        left = uvloop.run(churn(Path(folder), options.calls, seed=options.seed))
    grown = (process.memory_info().rss - before) / 2**20
    console.print(
        f"{options.calls} calls in {time.perf_counter() - begun:.0f} s; left over: {left}; memory {grown:+.1f} MiB"
    )
    raise SystemExit(left != CLEAN)


if __name__ == "__main__":
    main()
