"""Optimisers, how the learning rate goes, and the range test that finds one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from modelworks.ml.nets.params import NetParams

if TYPE_CHECKING:
    import torch

_MOMENTUM = ("momentum", "nesterov")
_BEGIN = 0.04  # of one-cycle, as a share of the highest rate
_END = 1e-4


def optimiser_of(net: torch.nn.Module, params: NetParams, rate: float) -> torch.optim.Optimizer:
    """L2 acts on weights alone, not on biases and the scales of normalisation."""
    from torch import optim

    learned = [weight for weight in net.parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [{"params": learned}]  # each group costs time in each step
    if params.l2:
        groups = [
            {"params": [weight for weight in learned if weight.ndim > 1], "weight_decay": params.l2},
            {"params": [weight for weight in learned if weight.ndim <= 1]},
        ]
    groups = [group for group in groups if group["params"]]
    if params.optimiser in ("adam", "adamw"):
        kind = optim.Adam if params.optimiser == "adam" else optim.AdamW
        return kind(groups, lr=rate, weight_decay=0.0)
    momentum = params.momentum if params.optimiser in _MOMENTUM else 0.0
    return optim.SGD(groups, lr=rate, momentum=momentum, nesterov=params.optimiser == "nesterov" and momentum > 0)


def factor(params: NetParams, step: int, steps: int) -> float:
    """What the learning rate is multiplied with in step `step` (from 0) of `steps`."""
    done = step / max(steps, 1)
    if params.schedule == "one-cycle":  # Smith 2018: up by a cosine in 30 % of the steps, down in the rest
        if done < 0.3:
            return _between(_BEGIN, 1.0, done / 0.3)
        return _between(1.0, _END, (done - 0.3) / 0.7)
    if done < params.warmup:
        return (step + 1) / (math.ceil(params.warmup * steps) + 1)
    rest = (done - params.warmup) / (1 - params.warmup)
    if params.schedule == "cosine":
        return _between(1.0, 0.0, rest)
    if params.schedule == "linear":
        return 1.0 - rest
    if params.schedule == "step":
        return 1.0 if rest < 0.5 else 0.1 if rest < 0.75 else 0.01
    return 1.0


def _between(start: float, end: float, share: float) -> float:
    """From `start` to `end` by half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def suggest(rates: list[float], losses: list[float]) -> float:
    """A tenth of the rate at which the smoothed loss of the range test (Smith 2015) was lowest."""
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else 0.7 * smooth[-1] + 0.3 * loss)
    return rates[min(range(len(smooth)), key=smooth.__getitem__)] / 10
