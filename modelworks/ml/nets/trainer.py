"""What every net family is: a net for the examples at hand, trained by the one loop. Own nets subclass `NetTrainer`.

    class Mine(NetTrainer):
        \"\"\"One sentence that `GET /api/v1/algorithms` shows.\"\"\"

        def net(self, examples, outputs, params):
            from torch import nn
            return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(examples.shape), outputs))

A package of yours lists the class under the entry point group `modelworks.trainers`, and its tests call
`modelworks.testing.check_trainer(Mine)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput, MissingExtra
from modelworks.core.specs import Stopping
from modelworks.core.tasks import CLASSIFICATION, REGRESSION
from modelworks.ml.base import Examples, JobContext
from modelworks.ml.nets.params import NetParams

if TYPE_CHECKING:
    import torch

    from modelworks.ml.nets.fitted import NetFitted

_PROBE = 32


class NetTrainer:
    """Subclasses give `net`, and may narrow `tasks`, `Params`, `shaped` and `tokens` (see `ml/base.py`)."""

    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION, REGRESSION)
    accepts_missing: ClassVar[bool] = False
    shaped: ClassVar[bool] = True
    tokens: ClassVar[bool] = False
    Params: ClassVar[type[NetParams]] = NetParams

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        """A module from features [n, *examples.shape] to scores [n, outputs]. It may read examples, but need not."""
        raise NotImplementedError

    def objective(self, examples: Examples, params: Any) -> Any:
        """What is made small: an `Objective`, or what stands in its place."""
        from modelworks.ml.nets.objective import Objective

        return Objective(examples, params)

    def learn(self, examples: Examples, params: Any, ctx: JobContext, stopping: Stopping | None = None) -> NetFitted:
        """Train a net from scratch with the job's seed and threads. InvalidInput where `net`, the loss or the run
        refuses.
        """
        torch = set_up(ctx)
        from modelworks.ml.nets import advice
        from modelworks.ml.nets.fitted import fitted_of
        from modelworks.ml.nets.loop import Loop

        examples, held = set_aside(examples, stopping, ctx.seed)
        objective = self.objective(examples, params)
        torch.manual_seed(ctx.seed)
        net = self.net(examples, objective.outputs, params)
        loop = Loop(net, examples, objective, params, ctx, stopping, held)
        advice.give(loop)
        history = loop.run()
        probe = next(iter(examples.batches(_PROBE)))[0]
        return fitted_of(net, examples.shape, objective, probe, ctx.threads, history)


def set_up(ctx: JobContext) -> Any:
    """torch, with the job's threads. MissingExtra where it is not installed."""
    try:
        import accelerate  # noqa: F401
        import safetensors  # noqa: F401
        import torch
    except ImportError:
        raise MissingExtra("neural networks need torch; pip install 'modelworks[nets]'") from None
    torch.set_num_threads(ctx.threads)
    return torch


def set_aside(examples: Examples, stopping: Stopping | None, seed: int) -> tuple[Examples, Examples | None]:
    """(rows to train on, rows that tell when to stop)"""
    if stopping is None or stopping.patience is None:
        return examples, None
    if len(examples) < 10:
        raise InvalidInput(
            f"there are {len(examples)} rows to train on, too few to hold some out; leave patience out",
            code="too_few_rows",
            param="stopping.patience",
        )
    rest, held = examples.split(stopping.holdout, seed)
    if examples.classes and len(np.unique(np.concatenate(list(rest.targets())))) < examples.classes:
        raise InvalidInput(
            "with so few rows of a class none is left to train on; lower stopping.holdout",
            code="too_few_rows",
            param="stopping.holdout",
        )
    return rest, held
