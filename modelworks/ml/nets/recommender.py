"""Recommenders: users and items as short vectors whose product, with the biases of both, tells how they suit each other.

Ratings are learnt as they are (Koren, Bell, Volinsky 2009); clicks against items drawn at random (sampled softmax).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from modelworks.core.specs import Stopping
from modelworks.core.tasks import RECOMMENDATION
from modelworks.ml.base import Examples, JobContext
from modelworks.ml.nets.params import RecommenderParams
from modelworks.ml.nets.trainer import NetTrainer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Factors:
    """float32: `users` [u, d], `items` [i, d] and their biases [u], [i]; a score is their product, biases and `mean`."""

    users: np.ndarray
    items: np.ndarray
    user_bias: np.ndarray
    item_bias: np.ndarray
    mean: float
    history: list[dict[str, Any]] = field(default_factory=list)

    def scores(self, user: np.ndarray) -> np.ndarray:
        """[n, i] of users by number; -1 is one who is not known."""
        known = user >= 0
        place = np.where(known, user, 0)
        mine = np.where(known[:, None], self.users[place], 0)
        bias = np.where(known, self.user_bias[place], 0)
        made: np.ndarray = mine @ self.items.T + self.item_bias + bias[:, None] + np.float32(self.mean)
        return made


class Recommender(NetTrainer):
    """Recommendations by matrix factorisation with biases: of ratings, or of clicks when there is no target."""

    tasks: ClassVar[tuple[str, ...]] = (RECOMMENDATION,)
    shaped: ClassVar[bool] = False
    Params: ClassVar[type[RecommenderParams]] = RecommenderParams

    def factors(
        self, examples: Examples, users: int, items: int, clicks: bool, params: Any, ctx: JobContext, stopping: Stopping | None
    ) -> Factors:
        """`examples`: rows [user, item], in training with items drawn at random behind them, and the rating."""
        from modelworks.ml.nets import advice
        from modelworks.ml.nets.layers import Factorisation
        from modelworks.ml.nets.loop import Loop
        from modelworks.ml.nets.trainer import set_aside, set_up

        torch = set_up(ctx)
        examples, held = set_aside(examples, stopping, ctx.seed)
        wish = Suiting(examples, clicks, params.regularisation)
        torch.manual_seed(ctx.seed)
        net = Factorisation(users, items, params.factors)
        loop = Loop(net, examples, cast(Any, wish), params, ctx, stopping, held)
        advice.give(loop)
        history = loop.run()
        tables = (net.users, net.items, net.user_bias, net.item_bias)
        scaled = [np.float32(wish.scale) * one.weight.detach().numpy() for one in tables]
        scaled[0] = scaled[0] / np.float32(wish.scale)
        return Factors(scaled[0], scaled[1], scaled[2][:, 0], scaled[3][:, 0], wish.mean, history)


class Suiting:
    """In place of an `Objective`: scores [m, 1 + drawn + 1], the last the size of what was used, against ratings or clicks."""

    outputs, link, classes = 1, "scale", None

    def __init__(self, examples: Examples, clicks: bool, regularisation: float) -> None:
        from modelworks.ml.nets.objective import spread_of

        self.clicks, self.regularisation = clicks, regularisation
        self.mean, self.scale = (0.0, 1.0) if clicks else spread_of(examples)

    def prepare(self, target: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(((target - self.mean) / self.scale).astype("float32"))

    def losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn import functional as f

        size, own = scores[:, -1], scores[:, :-1]
        if not self.clicks:
            return (own[:, 0] - target) ** 2 + self.regularisation * size
        if own.shape[1] == 1:
            return f.softplus(-own[:, 0])
        first = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        return f.cross_entropy(own, first, reduction="none") + self.regularisation * size

    def measure(self, metric: str, scores: np.ndarray, target: np.ndarray) -> float | None:
        away = scores[:, 0] * self.scale + self.mean - target
        if self.clicks or metric not in ("rmse", "mae"):
            return None
        return float(np.sqrt(np.mean(away**2)) if metric == "rmse" else np.mean(np.abs(away)))
