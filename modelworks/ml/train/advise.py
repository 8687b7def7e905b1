"""What a training will take, told before it begins: measured on this machine with some of the rows, and scaled to all.

Nets tell by a few steps of their loop (`ml/nets/advice.py`). All others are fitted on ever more rows for some seconds.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Method, TrainingSpec
from modelworks.core.telemetry import resident
from modelworks.core.types import Column
from modelworks.ml.base import JobContext, Relay
from modelworks.ml.evaluate.catalogue import check_metrics
from modelworks.ml.evaluate.folds import summarise
from modelworks.ml.evaluate.intervals import resamples_of
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.machine import Peak, available
from modelworks.ml.nets.advice import MARGIN, warnings_of, words
from modelworks.ml.train.algorithms import TRAINERS, course_of
from modelworks.ml.train.course import Course
from modelworks.ml.train.fit import Model, fit
from modelworks.ml.train.memory import MIB, estimate, streams
from modelworks.ml.train.packaging import package
from modelworks.ml.train.problem import Problem, pose

if TYPE_CHECKING:
    from modelworks.ml.data.stored import StoredTable

ROWS, BYTES = 20_000, 16 << 20  # of the table that is measured with
_IN_ORDER = 200_000  # ... where its rows belong together: series, ratings
_BACKBONE = 128  # rows that a registered model reads
_FIRST, _GROWTH, _SECONDS = 1000, 4, 3.0
_FEWEST = 64
_TRIAL_FOLDS = 3
_SCORED = 100_000  # made-up rows at most that are scored to see what that takes
_DRAWN = 20  # ... with so many resamples, and five times as many
_OF_NETS = ("epochs", "batch_size", "micro_batch", "step_ms", "parameters")


def advise(
    stored: StoredTable,
    columns: Sequence[Column],
    profile: dict[str, Any],
    spec: TrainingSpec,
    ctx: JobContext,
    room: int,
) -> dict[str, Any]:
    """{"seconds", "fits", "fit_seconds", "memory_mb", "free_mb", "will_fit", "warnings", "rows", "measured_rows",
    "streamed", "evaluation_seconds", "packaging_seconds", ...}; of nets also what `advice.measure` tells. `seconds` is of all
    fits, one after the other, and of evaluating and packaging, as far as they can be measured: what is not trained for the
    advice (nets) cannot predict or be packaged yet, so of nets scoring alone is counted, and of courses neither.
    `room`: bytes that data may take.

    InvalidInput for what cannot be learned, as training would say.
    """
    free = resident() + available()
    trainer = TRAINERS.get(spec.algorithm)
    table = stored.sample(_most(stored, trainer, course_of(spec.algorithm) is not None))
    ctx.progress(0.1, "measuring")
    problem = pose(table, columns, spec)
    share = table.num_rows / stored.num_rows
    rows = len(problem.rows) / share
    seconds, last_run, loops = _measure(problem, trainer, ctx, rows)
    peak, measured = last_run.peak, last_run.rows
    if hasattr(trainer, "learn") and loops:
        free = min(free, *(one["free_mb"] * MIB for one in loops))
    need = estimate(stored, columns, profile, problem.spec)
    streamed = need > room and streams(spec.algorithm)
    memory = max([peak, *(one["memory_mb"] * MIB for one in loops)]) + (0 if streamed else need * (1 - share))
    limit = problem.spec.stopping.max_seconds if problem.spec.stopping else None
    steps = sum(one["step_ms"] / 1000 * rows * one["rows"] / measured / one["batch_size"] * one["epochs"] for one in loops)
    size, micro = max(((one["batch_size"], one["micro_batch"]) for one in loops), default=(1, 1))
    warnings = warnings_of(steps, memory, free, size, micro, limit)
    if need > room and not streamed:
        warnings.append(
            f"{spec.algorithm} needs all {stored.num_rows:,} rows in memory, some {need // MIB:,} MiB, and there are "
            f"{room // MIB:,} MiB for them: it will be refused; raise resources.memory_mb, or choose an algorithm that streams"
        )
    shares, fit_seconds = fits_of(problem), seconds + min(steps, limit or steps)
    evaluating, packaging = _after(problem, last_run, rows, ctx)
    total = fit_seconds * sum(shares) + evaluating + packaging
    ctx.event("log", f"expected: {words(total)} for {len(shares)} fits, and {memory / MIB:,.0f} MiB")
    last = loops[-1] if loops else {}
    return {
        "seconds": round(total, 3),
        "fits": len(shares),
        "fit_seconds": round(fit_seconds, 3),
        "evaluation_seconds": round(evaluating, 3),
        "packaging_seconds": round(packaging, 3),
        "memory_mb": round(memory / MIB, 1),
        "free_mb": round(free / MIB, 1),
        "will_fit": memory <= MARGIN * free and (streamed or need <= room) and micro > 0,
        "streamed": streamed,
        "rows": stored.num_rows,
        "measured_rows": measured,
        "warnings": warnings,
        **{name: last[name] for name in _OF_NETS if name in last},
    }


def scoring_seconds(problem: Problem, rows: float) -> float:
    """What it takes to score the tested ones of `rows` rows, with intervals: measured on this machine with made-up answers.

    0 for courses, which are judged in their own ways, and where another dataset is the test.
    """
    parts, tested = _tests(problem, rows)
    count = min(_SCORED, round(tested))
    if isinstance(problem, Course) or count < 2 * parts:
        return 0.0
    spec, random = problem.spec, np.random.default_rng(problem.spec.seed)
    classes = len(problem.classes) if problem.classes is not None else None
    wanted = check_metrics(problem.task, spec.metrics, spec.gates, classes=classes)
    true = problem.target[random.choice(problem.rows, count)]
    said = random.permutation(true) if classes is None else random.dirichlet(np.ones(classes), count)

    def measured(count: int, drawn: int) -> float:
        folds = [Predictions(one, true[one], said[one]) for one in np.array_split(np.arange(count), parts)]
        began = time.monotonic()
        summarise(problem.task, folds, wanted, problem.classes, spec.seed, drawn)
        return time.monotonic() - began

    measured(min(count, 100 * parts), 2)  # loads what there is to load
    once = measured(count, _DRAWN)
    if parts == 1:
        each = max(0.0, measured(count, 5 * _DRAWN) - once) / (4 * _DRAWN)
        once += each * (resamples_of(round(tested)) - _DRAWN)
    return once * tested / count


def _tests(problem: Problem, rows: float) -> tuple[int, float]:
    """(how many parts are tested, how many rows all of them have together)"""
    method = problem.spec.validation or Method(holdout=0.2)
    if method.kfold:
        return method.kfold * method.repeats, rows * method.repeats
    return 1, rows * (method.holdout or 0.0)


def _after(problem: Problem, once: _Run, rows: float, ctx: JobContext) -> tuple[float, float]:
    """Seconds to evaluate and to package what is fitted on `rows` rows."""
    scoring = scoring_seconds(problem, rows)
    if once.model is None:
        return scoring, 0.0
    began = time.monotonic()
    once.model.predict(problem.part(problem.rows))
    predicting = time.monotonic() - began
    with tempfile.TemporaryDirectory(dir=ctx.workdir) as folder:
        began = time.monotonic()
        package(problem, once.model, {}, {}, Path(folder), ctx.threads)
        packaging = time.monotonic() - began
    each = predicting / len(problem.rows)  # the package is held against the model on all rows
    grown = max(0.0, rows - len(problem.rows))
    return scoring + each * _tests(problem, rows)[1], packaging + 2 * each * grown


def fits_of(problem: Problem) -> list[float]:
    """For each fit of the job the share of the rows that it learns from: those of the validation and the last; before them
    the trials of a search.
    """
    spec = problem.spec
    method = spec.validation or (problem.default if isinstance(problem, Course) else Method(holdout=0.2))
    outer = _shares(method)
    if spec.search is None:
        return [*outer, 1.0]
    inner = _shares(spec.search.validation or Method(kfold=_TRIAL_FOLDS))
    trials = [part * outer[0] for part in inner] * spec.search.trials
    return [*(trials * (len(outer) + 1 if spec.search.nested else 1)), *outer, 1.0]


def _shares(method: Method) -> list[float]:
    if method.kfold:
        return [1 - 1 / method.kfold] * (method.kfold * method.repeats)
    return [1 - (method.holdout or 0.0)]


def _most(stored: StoredTable, trainer: Any, in_order: bool) -> int:
    """Rows to measure with."""
    if in_order:
        return _IN_ORDER
    if hasattr(trainer, "backbone"):
        return _BACKBONE
    return int(max(256, min(ROWS, BYTES / max(1.0, stored.width(stored.column_names)))))


def _measure(
    problem: Problem, trainer: Any, ctx: JobContext, whole: float
) -> tuple[float, _Run, list[dict[str, Any]]]:
    """(seconds of one fit of `whole` rows, without what its nets tell; the last run; what the nets tell)"""
    order = np.random.default_rng(problem.spec.seed).permutation(problem.rows)
    count = len(order)
    if isinstance(problem, Course):
        _run(problem, problem.rows, ctx)  # loads what there is to load
        once = _run(problem, problem.rows, ctx)
        return once.seconds * whole / count, once, once.loops
    net = hasattr(trainer, "learn")
    size = min(count, count if net else _FIRST)
    before: _Run | None = None
    _run(problem, order[: max(size // _GROWTH, min(size, _FEWEST))], ctx, patient=True)  # loads what there is to load
    began = time.monotonic()
    if net and count < whole:
        before = _run(problem, order[: size // _GROWTH], ctx, patient=True)
    while True:
        once = _run(problem, order[:size], ctx, patient=size < count)
        if size == count or time.monotonic() - began > _SECONDS:
            return _extrapolated(before, once, whole, net), once, once.loops
        before, size = before or once, min(count, size * _GROWTH)


def _extrapolated(before: _Run | None, once: _Run, whole: float, linear: bool) -> float:
    """Seconds for `whole` rows, as they grew between two runs: on a line, or by a power between 1 and 2."""
    if once.rows >= whole or before is None or before.rows >= once.rows:
        return once.seconds * max(1.0, whole / once.rows)
    if linear:
        slope = max(0.0, once.seconds - before.seconds) / (once.rows - before.rows)
        return once.seconds + slope * (whole - once.rows)
    grown = math.log(max(once.seconds, 1e-9) / max(before.seconds, 1e-9)) / math.log(once.rows / before.rows)
    return float(once.seconds * (whole / once.rows) ** min(2.0, max(1.0, grown)))


@dataclass(frozen=True)
class _Run:
    """One fit of `rows` rows, to its end or until its nets had told what they take (`loops`). `model`: where it came to an end."""

    rows: int
    seconds: float
    peak: int
    loops: list[dict[str, Any]]
    model: Model | None = None


def _run(problem: Problem, rows: np.ndarray, ctx: JobContext, *, patient: bool = False) -> _Run:
    """`patient`: that the rows are too few, as a class is not among them, is no error."""
    asking, watch = _Asking(ctx), Peak()
    model = None
    try:
        if isinstance(problem, Course):
            problem.learn(rows, asking)
        else:
            model = fit(problem, np.sort(rows), asking)
    except _Told:
        pass
    except InvalidInput as error:
        if not patient or error.code != "too_few_rows":
            raise
    finally:
        peak = watch.stop()
    seconds = asking.before if asking.loops else time.monotonic() - watch.began
    return _Run(len(rows), seconds, peak, asking.loops, model)


class _Told(Exception):
    """The net has said what its fit takes."""


class _Asking(Relay):
    """The job's context for one fit, which ends once the last of its loops has told what it takes."""

    def __init__(self, ctx: JobContext) -> None:
        super().__init__(ctx)
        self.loops: list[dict[str, Any]] = []
        self.before = 0.0
        self._began = time.monotonic()

    def advise(self, found: dict[str, Any]) -> None:
        if not self.loops:
            self.before = time.monotonic() - self._began
        self.loops.append(found)
        if not found["more"]:
            raise _Told

    def event(self, kind: str, message: str, **data: Any) -> None:
        """What a fit says of itself is not said of the job."""

    def metric(self, step: int, values: Any, *, unit: str = "epoch", part: str = "") -> None:
        pass

    def checkpoint(self, name: str, data: bytes) -> None:
        pass

    def restore(self, name: str) -> bytes | None:
        return None
