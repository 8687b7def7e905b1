"""The loop that trains every net beside a bare torch loop on the same net, rows, optimiser and order.

    python -m bench.train_loop [--rounds 5] [--profile]

One thread. CPU seconds of this process (other processes do not count), the least of the rounds, which take turns. The
bare loop shuffles, steps and adds up its loss as a tutorial would; ours reports, clips when asked, watches for NaN,
checkpoints and can be broken off at each step.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from modelworks.ml.nets.examples import MemoryExamples
from modelworks.ml.nets.loop import Loop
from modelworks.ml.nets.objective import Objective
from modelworks.ml.nets.params import NetParams
from modelworks.testing import QuietContext

GOAL = 1.05


def nets() -> dict[str, tuple[Callable[[], Any], tuple[int, ...], int]]:
    """name -> (the net, the shape of a row, rows)"""
    from torch import nn

    def mlp() -> Any:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def wide() -> Any:
        return nn.Sequential(nn.Linear(1000, 512), nn.ReLU(), nn.Linear(512, 10))

    def cnn() -> Any:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
        )  # fmt: skip

    return {"64-128-64-10": (mlp, (64,), 20_000), "1000-512-10": (wide, (1000,), 4_000), "28x28 two-conv": (cnn, (1, 28, 28), 1_500)}


def bare(net: Any, features: np.ndarray, target: np.ndarray, epochs: int) -> float:
    import torch

    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    x, y = torch.from_numpy(features), torch.from_numpy(target)
    net.train()
    total = 0.0
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(x)))
        total = 0.0
        for start in range(0, len(x), 64):
            rows = order[start : start + 64]
            loss = torch.nn.functional.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            total += loss.item() * len(rows)
    return total / len(x)


def ours(net: Any, features: np.ndarray, target: np.ndarray, epochs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        examples = MemoryExamples(features, target, classes=10)
        params = NetParams(epochs=epochs, batch_size=64, optimiser="adamw", learning_rate=1e-3)
        loop = Loop(net, examples, Objective(examples, params), params, QuietContext(Path(folder)))
        return float(loop.run()[-1]["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where our loop spends its time")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for name, (make, shape, rows) in nets().items():
        random = np.random.default_rng(0)
        features = random.normal(size=(rows, *shape)).astype(np.float32)
        target = random.integers(0, 10, rows)
        ours(make(), features[:128], target[:128], 1)
        best: dict[Any, float] = {}
        for _ in range(options.rounds):
            for run in (bare, ours):
                torch.manual_seed(0)
                net, start = make(), time.process_time()
                run(net, features, target, 2)
                best[run] = min(best.get(run, 1e9), time.process_time() - start)
        ratio = best[ours] / best[bare]
        verdict = "met" if ratio <= GOAL else "MISSED"
        print(f"{name:16} bare {best[bare]:6.3f} s, ours {best[ours]:6.3f} s: {ratio:.3f} (goal {GOAL}) {verdict}", flush=True)
        if options.profile:
            with cProfile.Profile() as profile:
                ours(make(), features, target, 2)
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
