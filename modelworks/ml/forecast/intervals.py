"""How wide a forecast's interval must be: split conformal prediction, for each step ahead by itself.

What was forecast from rolling origins, each by what was learnt before it, was off by so much; of m such errors the k-th
smallest, k = ceil((m + 1) level), is the half width (Vovk et al. 2005; Lei et al. 2018). No shape of the errors is taken
for granted. Were they exchangeable, the interval would hold what comes with a probability of `level` at least; errors of a
series are so only as far as its past is like what follows, which is why the coverage is measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from modelworks.ml.forecast.windows import Frame, ridge

_PARTS = 5


@dataclass(frozen=True)
class Calibration:
    """`half` [horizon]: half the interval's width at each step ahead, in the units of the errors.

    `origins`: forecasts that it rests on. `reached`: the level that so many can vouch for, at most the one asked.
    `errors`: of rolling origins; or, where the series is too short for them, of each window when it is left out.
    """

    half: np.ndarray
    level: float
    reached: float
    origins: int
    errors: Literal["rolling", "leave-one-out"]

    def described(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("half", "level")}


def rolling(frame: Frame, seen: np.ndarray, came: np.ndarray, least: int) -> np.ndarray:
    """The errors [m, horizon] of the later half of the windows, a fifth of it at a time, each by a line through all before.

    `least`: windows that a line is drawn through. No window before reaches into what is forecast; m is 0 where there
    are too few of them.
    """
    begin = max(len(seen) // 2, least + frame.horizon - 1)
    size = max(frame.horizon, -(-(len(seen) - begin) // _PARTS))
    found = [
        came[start : start + size] - ridge(seen[:early], came[:early])(seen[start : start + size])
        for start in range(begin, len(seen), size)
        for early in (start - frame.horizon + 1,)
    ]
    return np.concatenate([came[:0], *found])


def needed(level: float) -> int:
    """The least number of errors of which one is far enough out for `level`."""
    return math.ceil(level / (1 - level) - 1e-9)


def calibrate(errors: np.ndarray, level: float, kind: Literal["rolling", "leave-one-out"]) -> Calibration:
    """errors [m, horizon] -> the interval at `level`. With too few of them it is as wide as the largest."""
    m = len(errors)
    place = math.ceil((m + 1) * level - 1e-9)
    half = np.sort(np.abs(errors), axis=0)[min(place, m) - 1]
    return Calibration(half, level, min(level, m / (m + 1)), m, kind)
