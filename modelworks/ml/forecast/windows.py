"""A series as windows to learn from, and what can be said without learning: the last season again, a ridge regression.

Everything happens in the units of a window: its values (or their logarithms) less their level, the mean of its last
season, divided by one scale for all windows of a series; what is learned is how the next `horizon` steps differ from the last season.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput

_LEAST = 8  # windows to learn from
_TYPICAL = 24  # steps that are looked back on where there is no season
_ALPHAS = np.logspace(-4, 4, 33)


@dataclass(frozen=True)
class Frame:
    """season: steps after which the series repeats, 1: not.  horizon: steps ahead.  window: steps looked back on."""

    season: int
    horizon: int
    window: int
    log: bool

    @classmethod
    def of(cls, params: Any, runs: Sequence[np.ndarray], called: Callable[[int], str] = lambda _: "the series") -> Frame:
        """What `params` (ForecasterParams) and the series `runs` decide. InvalidInput when one is too short, by what it is `called`."""
        season = params.season or 1
        horizon = horizon_of({"season": params.season, "horizon": params.horizon})
        window = params.window or (2 * season if season > 1 else max(_TYPICAL, min(2 * horizon, min(map(len, runs)) // 3)))
        if window < season:
            raise InvalidInput(
                f"the window of {window} steps must hold a season of {season}; raise it",
                code="bad_hyperparameter",
                param="hyperparameters.window",
            )
        need = window + horizon + (_LEAST - 1 if len(runs) == 1 else 0)
        windows = sum(max(0, len(values) - window - horizon + 1) for values in runs)
        for number, values in enumerate(runs):
            if len(values) < need or windows < _LEAST:
                raise InvalidInput(
                    f"{called(number)} has {len(values)} steps to learn from, which are too few: a window of {window} and a horizon "
                    f"of {horizon} take at least {max(need, window + horizon - 1 + -(-_LEAST // len(runs)))}; give more data"
                    f"{', leave that series out' if len(runs) > 1 else ''}, or lower season, window or horizon",
                    code="too_few_rows",
                    param="hyperparameters.horizon",
                )
            if params.log and (values <= 0).any():
                raise InvalidInput(
                    f"log needs {called(number)} to be above 0 everywhere; leave log out, or set it to false",
                    code="bad_hyperparameter",
                    param="hyperparameters.log",
                )
        if params.log is not None:
            return cls(season, horizon, window, params.log)
        grows = all((values > 0).all() for values in runs) and 2 * sum(_grows(values, season) for values in runs) > len(runs)
        return cls(season, horizon, window, grows)

    def wide(self, values: np.ndarray) -> np.ndarray:
        """The series in the units that differences are taken in."""
        return np.log(values) if self.log else values.astype(np.float64)

    def base(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """windows [n, window] -> (level [n, 1], the last season again, less the level [n, horizon])."""
        level = windows[:, -self.season :].mean(axis=1, keepdims=True)
        again = self.window - self.season + np.arange(self.horizon) % self.season
        return level, windows[:, again] - level

    def cut(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All windows of a series: what was seen [n, window] and what came [n, horizon] in the units above, not scaled."""
        whole = np.lib.stride_tricks.sliding_window_view(self.wide(values), self.window + self.horizon)
        seen, came = whole[:, : self.window], whole[:, self.window :]
        level, base = self.base(seen)
        return seen - level, came - level - base


def horizon_of(given: dict[str, Any]) -> int:
    """The steps ahead that the hyperparameters `given` ask for."""
    return int(given.get("horizon") or given.get("season") or 12)


def _grows(values: np.ndarray, season: int) -> bool:
    """Whether the swings of a positive series grow with its level: then its logarithm is easier to learn."""
    if (values <= 0).any():
        return False
    size = max(season, 8)
    count = len(values) // size
    if count < 3:
        return False
    parts = values[len(values) - count * size :].reshape(count, size)
    means, spreads = parts.mean(axis=1), parts.std(axis=1)
    if means.std() == 0 or spreads.std() == 0:
        return False
    return bool(np.corrcoef(means, spreads)[0, 1] > 0.5 and means.max() > 1.5 * means.min())


@dataclass(frozen=True)
class Ridge:
    """`weights` [window, horizon] and `bias` [horizon]; `alpha` was best when each window in turn is left out.

    `errors` [n, horizon]: of each window when it is left out.
    """

    weights: np.ndarray
    bias: np.ndarray
    alpha: float
    errors: np.ndarray

    def __call__(self, seen: np.ndarray) -> np.ndarray:
        found: np.ndarray = seen @ self.weights + self.bias
        return found


def ridge(seen: np.ndarray, came: np.ndarray) -> Ridge:
    """A ridge regression for all steps ahead; its penalty by leave-one-out, in closed form."""
    means, ends = seen.mean(axis=0), came.mean(axis=0)
    x, y = seen - means, came - ends
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    turned = u.T @ y
    scale = max(float((s**2).mean()), 1e-12)
    best, error, errors = float(_ALPHAS[-1]) * scale, np.inf, y
    for alpha in _ALPHAS * scale:
        kept = s**2 / (s**2 + alpha)
        left = np.maximum(1 - (u**2) @ kept - 1 / len(x), 1e-6)
        off = (y - u @ (kept[:, None] * turned)) / left[:, None]
        found = float((off**2).mean())
        if found < error:
            best, error, errors = float(alpha), found, off
    weights = vt.T @ ((s / (s**2 + best))[:, None] * turned)
    return Ridge(weights, ends - means @ weights, best, errors)


def naive_error(values: np.ndarray, season: int) -> float:
    """The mean absolute error of saying the value of a season (1: a step) before: what MASE is measured in."""
    if len(values) <= season:
        return float("nan")
    return float(np.abs(values[season:] - values[:-season]).mean())


def origins(frame: Frame, past: np.ndarray, ahead: int) -> np.ndarray:
    """Where forecasts of `ahead` steps after `past` begin: each ends where the next begins, and knows all before it."""
    return len(past) + np.arange(0, ahead, frame.horizon)


def histories(frame: Frame, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[len(starts), window]: the values before each start."""
    return np.stack([values[start - frame.window : start] for start in starts])


def naive(frame: Frame, windows: np.ndarray) -> np.ndarray:
    """[n, window] raw -> [n, horizon]: the last season again."""
    level, base = frame.base(windows)
    return level + base
