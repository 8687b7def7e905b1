"""Before a run: how long it will take and how much memory, measured with a few steps on this machine, and put back."""

from __future__ import annotations

import copy
import resource
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelworks.ml.nets.loop import Loop

_STEPS = 3
_SECONDS = 5.0  # a trial takes no longer than about this
_MARGIN = 0.9  # of what is free that may be used without a warning


def give(loop: Loop) -> None:
    """Measure, and say what to expect as an event "log" with `estimate`; an event "warning" when it will not fit."""
    found = measure(loop)
    if found is None:
        return
    seconds, memory = found["seconds"], found["memory_mb"]
    loop.ctx.event(
        "log",
        f"expected: {_words(seconds)} and {memory:.0f} MiB for {loop.epochs} epochs of {len(loop.examples)} rows "
        f"({found['parameters']:,} parameters)",
        estimate=found,
    )
    if memory > _MARGIN * found["free_mb"]:
        loop.ctx.event(
            "warning",
            f"this will hardly fit: about {memory:.0f} MiB are needed and {found['free_mb']:.0f} MiB may be used; lower "
            "batch_size or the size of the net, or raise resources.memory_mb",
            estimate=found,
        )
    limit = loop.stopping.max_seconds
    if limit and seconds > limit:
        loop.ctx.event(
            "warning",
            f"all epochs would take {_words(seconds)}, and max_seconds stops it after {_words(limit)}",
            estimate=found,
        )


def measure(loop: Loop) -> dict[str, Any] | None:
    """{"seconds", "memory_mb", "free_mb", "parameters", "step_ms"}; None where the first step already runs out of memory
    (the loop will find the size that fits). Net and generators are left as they were.
    """
    import torch

    from modelworks.ml.nets import optimise
    from modelworks.ml.nets.loop import resident, starved

    net = copy.deepcopy(loop.net)
    random = torch.get_rng_state()
    optimiser = optimise.optimiser_of(net, loop.params, 0.0)
    parameters = sum(weight.numel() for weight in net.parameters())
    before = resident()
    peak, times = before, []
    net.train()
    began = time.monotonic()
    try:
        for features, target in loop.examples.batches(loop.size, seed=(loop.ctx.seed, 0, 0)):
            if len(target) < 2:
                break
            watch = _Peak()
            start = time.perf_counter()
            x, y = torch.from_numpy(features.copy()), loop.objective.prepare(target.copy())
            loop.objective.losses(net(x), y).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            times.append(time.perf_counter() - start)
            peak = max(peak, watch.stop())
            if len(times) >= _STEPS or time.monotonic() - began > _SECONDS:
                break
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not starved(error):
            raise
        return None
    finally:
        torch.set_rng_state(random)
    if not times:
        return None
    step = min(times)
    return {
        "seconds": round(step * loop.chunks * loop.epochs, 2),
        "memory_mb": round(peak / 2**20, 1),
        "free_mb": round((before + available()) / 2**20, 1),
        "parameters": parameters,
        "step_ms": round(step * 1000, 3),
    }


def available() -> int:
    """Bytes that this process may still take: by the machine, its control group and its own limit."""
    with open("/proc/meminfo") as file:
        figures = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.split()[1].isdigit()}
    free = figures.get("MemAvailable", 2**40)
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            limit = most.read().strip()
            if limit != "max":
                free = min(free, max(0, int(limit) - int(now.read())))
    except OSError:
        pass
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        free = min(free, max(0, soft - _data()))
    return free


def _data() -> int:
    """Bytes that count for RLIMIT_DATA."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmData")), 0)


def _words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Peak:
    """The most memory that is resident meanwhile, looked at every few milliseconds."""

    def __init__(self) -> None:
        from modelworks.ml.nets.loop import resident

        self._most, self._resident, self._done = resident(), resident, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, self._resident())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._most, self._resident())
