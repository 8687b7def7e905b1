"""Before a run: how long it will take and how much memory, measured with a few steps on this machine, and put back."""

from __future__ import annotations

import copy
import math
import statistics
import time
from typing import TYPE_CHECKING, Any

from modelworks.core.telemetry import resident
from modelworks.ml.machine import Peak, available
from modelworks.ml.nets.share import Share, starved

if TYPE_CHECKING:
    from modelworks.ml.nets.loop import Loop

_STEPS = 7
_SECONDS = 3.0  # a trial takes no longer than about this
MARGIN = 0.9  # of what is free that may be used without a warning


def give(loop: Loop, *, more: bool = False) -> None:
    """Measure, say what to expect as an event "log" with `estimate`, and warn when it will not fit. `more`: another loop
    of the same fit follows, which gives its own.
    """
    found = measure(loop)
    seconds, memory = found["seconds"], found["memory_mb"]
    loop.ctx.event(
        "log",
        f"expected: {words(seconds)} and {memory:.0f} MiB for {loop.epochs} epochs of {len(loop.examples)} rows "
        f"({found['parameters']:,} parameters)",
        estimate=found,
    )
    for warning in found["warnings"]:
        loop.ctx.event("warning", warning, estimate=found)
    loop.ctx.advise({**found, "more": more})


def measure(loop: Loop) -> dict[str, Any]:
    """What `loop` will take, by a few of its steps on a copy of the net; net and generators are left as they were.

    {"seconds", "memory_mb", "free_mb", "will_fit", "warnings", "rows", "epochs", "batch_size", "micro_batch", "step_ms",
    "parameters"}. `micro_batch`: how many rows may go through the net at once; less than the batch where memory runs out,
    as the loop will find as well.
    """
    import torch

    random = torch.get_rng_state()
    before = resident()
    free, micro = before + available(), loop.size
    step, memory = math.inf, 0
    try:
        while micro >= 1 and math.isinf(step):
            try:
                step, memory = _steps(loop, micro)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not starved(error):
                    raise
                micro //= 2
    finally:
        torch.set_rng_state(random)
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    # fewer rows at a time than a batch has: they were seen to go through where memory ends, and the loop halves on
    fits = 0 < memory <= MARGIN * free or 1 <= micro < loop.size
    seconds = 0.0 if math.isinf(step) else step * len(loop.examples) / loop.size * loop.epochs
    limit = loop.stopping.max_seconds
    return {
        "seconds": round(min(seconds, limit or seconds), 3),
        "memory_mb": round(memory / 2**20, 1),
        "free_mb": round(free / 2**20, 1),
        "will_fit": fits,
        "warnings": warnings_of(seconds, memory, free, loop.size, micro, limit),
        "rows": len(loop.examples),
        "epochs": loop.epochs,
        "batch_size": loop.size,
        "micro_batch": micro,
        "step_ms": 0.0 if math.isinf(step) else round(step * 1000, 3),
        "parameters": sum(weight.numel() for weight in loop.net.parameters()),
    }


def _steps(loop: Loop, micro: int) -> tuple[float, int]:
    """(seconds of one step, the most bytes in memory meanwhile), `micro` rows at a time. On the device that will train."""
    import torch

    from modelworks.ml.nets import optimise

    share = Share(copy.deepcopy(loop.net), loop.objective, loop.params)
    optimiser = optimise.optimiser_of(share.net, loop.params, 0.0)
    on_gpu = share.device.type == "cuda"
    times: list[float] = []
    peak, began = resident(), time.monotonic()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    share.net.train()
    for features, target in loop.examples.batches(loop.size, seed=(loop.ctx.seed, 0, 0)):
        if len(target) < 2 and times:
            break
        watch, start = Peak(), time.perf_counter()
        try:
            share.add(features, target, len(target), micro, scale=1.0)
            optimiser.step()
            optimiser.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
        finally:
            peak = max(peak, watch.stop())
        times.append(time.perf_counter() - start)
        if len(times) >= _STEPS or time.monotonic() - began > _SECONDS:
            break
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    return statistics.median(times[1:] or times), peak  # the first has much to set up


def warnings_of(seconds: float, memory: float, free: float, size: int, micro: int, limit: float | None) -> list[str]:
    """What to be warned of: memory in bytes, a batch of `size` rows of which `micro` fit at once, `limit` seconds."""
    found = []
    if micro < 1:
        found.append("memory runs out even with one row at a time; make the net smaller, or raise resources.memory_mb")
    elif micro < size:
        found.append(
            f"memory runs out with {size} rows at once: {micro} will go through the net at a time, and their gradients are "
            "added up; a smaller batch_size, or more resources.memory_mb, would be faster"
        )
    elif memory > MARGIN * free:
        found.append(
            f"this will hardly fit: about {memory / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB may be used; use "
            "fewer rows or features, lower batch_size or the size of the net, or raise resources.memory_mb"
        )
    if limit and seconds > limit:
        found.append(f"all epochs would take {words(seconds)}, and max_seconds stops it after {words(limit)}")
    return found


def words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
