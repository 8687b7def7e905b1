"""How wide a forecast's interval must be: split conformal prediction, for each step ahead by itself.

What was forecast from rolling origins, each by what was learnt before it, was off by so much; of m such errors the k-th
smallest, k = ceil((m + 1) level), is the half width (Vovk et al. 2005; Lei et al. 2018). No shape of the errors is taken
for granted. Were they exchangeable, the interval would hold what comes with a probability of `level` at least; errors of a
series are so only as far as its past is like what follows, which is why the coverage is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from modelworks.ml.forecast.windows import Frame, ridge

_PARTS = 5
Cut = tuple[np.ndarray, np.ndarray]  # what was seen [n, window], and what came [n, horizon]


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


def rolling(frame: Frame, cuts: Sequence[Cut], least: int) -> list[np.ndarray]:
    """Of each series the errors [m, horizon] of the later half of its windows, a fifth of it at a time, each by a line
    through all before, of all series.

    `cuts`: the windows of each series, scaled. `least`: windows that a line is drawn through at least. No window before
    reaches into what is forecast; m is 0 where there are too few of them.
    """
    total, reach = sum(len(seen) for seen, _ in cuts), frame.horizon - 1
    begins = [max(len(seen) // 2, reach + -(-least * len(seen) // total)) for seen, _ in cuts]
    sizes = [max(frame.horizon, -(-(len(seen) - begin) // _PARTS)) for (seen, _), begin in zip(cuts, begins, strict=True)]
    found: list[list[np.ndarray]] = [[came[:0]] for _, came in cuts]
    for part in range(_PARTS):
        starts = [min(begin + part * size, len(seen)) for (seen, _), begin, size in zip(cuts, begins, sizes, strict=True)]
        if all(start == len(seen) for (seen, _), start in zip(cuts, starts, strict=True)):
            break
        early = [max(0, start - reach) for start in starts]
        line = ridge(*together([(seen[:end], came[:end]) for (seen, came), end in zip(cuts, early, strict=True)]))
        for (seen, came), start, size, mine in zip(cuts, starts, sizes, found, strict=True):
            mine.append(came[start : start + size] - line(seen[start : start + size]))
    return [np.concatenate(mine) for mine in found]


def together(cuts: Sequence[Cut]) -> Cut:
    """The windows of several series as those of one."""
    return np.concatenate([seen for seen, _ in cuts]), np.concatenate([came for _, came in cuts])


def needed(level: float) -> int:
    """The least number of errors of which one is far enough out for `level`."""
    return math.ceil(level / (1 - level) - 1e-9)


def calibrate(errors: np.ndarray, level: float, kind: Literal["rolling", "leave-one-out"]) -> Calibration:
    """errors [m, horizon] -> the interval at `level`. With too few of them it is as wide as the largest."""
    m = len(errors)
    place = math.ceil((m + 1) * level - 1e-9)
    half = np.sort(np.abs(errors), axis=0)[min(place, m) - 1]
    return Calibration(half, level, min(level, m / (m + 1)), m, kind)
