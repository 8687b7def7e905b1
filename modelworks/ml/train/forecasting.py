"""Forecasts: a series learnt from its own past, judged on rolling origins with its baselines beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ValidationError

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit, Method, TrainingSpec
from modelworks.core.tasks import FORECAST
from modelworks.core.types import Column, Signature, TensorSpec
from modelworks.ml.base import JobContext
from modelworks.ml.evaluate.catalogue import check_metrics
from modelworks.ml.evaluate.intervals import over_folds, over_rows
from modelworks.ml.evaluate.metrics import inside, score
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.splits import Plan, plan
from modelworks.ml.forecast.series import Series, read_series
from modelworks.ml.forecast.windows import Frame, histories, horizon_of, naive, naive_error, origins, ridge
from modelworks.ml.package import Manifest, Package, ParitySamples
from modelworks.ml.train.algorithms import TRAINERS, check_hyperparameters
from modelworks.ml.train.checks import check_method, find, task_of
from modelworks.ml.train.course import Course

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable

_SAMPLES = 8


@dataclass(frozen=True)
class Forecast(Course):
    """`rows` are in order of time, and there are no features. `target` [n]: by row, not by time."""

    kind: ClassVar[str] = FORECAST
    series: Series | None = None

    @classmethod
    def check(cls, spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
        """A series is its time and its target, and nothing else is learned from."""
        if not spec.target:
            raise InvalidInput("name the column to predict in 'target'", code="no_target", param="target")
        task_of(spec, find(columns, spec.target, "target"))
        time = spec.time or (spec.validation.time if spec.validation else None)
        if time is None:
            raise InvalidInput("a forecast needs time: the column that the series runs along", code="missing_time", param="time")
        check_method(Method(holdout=0.5, time=time), columns, spec.target)
        if spec.features:
            raise InvalidInput(f"{spec.algorithm} learns from the target's own past; leave features out", param="features")
        method = spec.validation
        if method and (method.group or method.split or method.stratify or method.repeats > 1 or method.time not in (None, time)):
            raise InvalidInput("a forecast is validated along its time: give holdout or kfold alone", param="validation")
        if spec.slices and spec.transforms:
            raise _no_slices()
        check_metrics(FORECAST, spec.metrics, spec.gates)
        if spec.stopping and spec.stopping.metric != "loss":
            raise InvalidInput("a forecaster stops by its loss; leave metric out", param="stopping.metric")
        for index, step in enumerate(spec.transforms or []):
            if step.op != "resample" or index:
                raise InvalidInput(
                    'a forecast takes one transform, {"op": "resample", "every": "1 day", "how": "mean", "fill": "previous"}',
                    param=f"transforms[{index}]",
                )
            try:
                DatasetEdit(op="resample", time=time, **step.params)
            except (ValidationError, TypeError) as error:
                why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                raise InvalidInput(f"resample: {why}", param=f"transforms[{index}]") from None
        given = check_hyperparameters(spec.algorithm, spec.hyperparameters)
        return spec.model_copy(update={"hyperparameters": given, "task": FORECAST, "features": [], "time": time})

    @classmethod
    def pose(cls, table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Forecast:
        time, target = find(columns, str(spec.time), "time"), find(columns, spec.target, "target")
        series = read_series(table, time, target, spec.transforms)
        return cls(spec, FORECAST, [], {}, series.order, series.values, None, None, given=tuple(columns), series=series)

    def again(self, table: pa.Table) -> Course:
        raise InvalidInput(
            "a forecast is validated on the tail of its own series: give holdout or kfold; evaluate the model on another "
            "series with POST /api/v1/evaluations",
            param="validation.test",
        )

    def check_slices(self) -> None:
        if self.run.resampled:
            raise _no_slices()

    @property
    def run(self) -> Series:
        assert self.series is not None
        return self.series

    def split(self, method: Method, rows: np.ndarray, along: np.ndarray | None, seed: int) -> Plan:
        """Along the time: the tail, or as folds the last horizons, each forecast from all before it."""
        method = method.model_copy(update={"time": self.run.time})
        return plan(
            method, self.task, rows, self.target, self.run.along, seed, ahead=horizon_of(self.spec.hyperparameters)
        )

    def learn(self, rows: np.ndarray, ctx: JobContext) -> Followed:
        """The trainer's model (`nets/forecaster.py`) of the series' `rows`, oldest first."""
        trainer: Any = TRAINERS.get(self.spec.algorithm)()
        ctx.progress(0.0, "fitting")
        return Followed(trainer.follow(self.target[rows], self.params, ctx, self.spec.stopping), rows)

    def judge(self, model: Followed, rows: np.ndarray) -> Predictions:
        """Forecasts from rolling origins: every `horizon` steps, knowing all before."""
        return roll(model.model, model.model.frame, self.target, model.rows, rows)

    def details(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
    ) -> dict[str, Any]:
        """`baselines` (seasonal naive and linear) on the same steps, how often the truth lay within the intervals (also by
        steps ahead), and how wide they are."""
        params = self.params
        said: dict[str, list[Predictions]] = {"seasonal-naive" if params.season else "naive": [], "linear": []}
        frame = None
        for train, test in parts:
            frame = Frame.of(params, self.target[train])
            for name, model in zip(said, baselines(frame, self.target[train]), strict=True):
                said[name].append(roll(model, frame, self.target, train, test))
        whole = Predictions.join(found)
        within = inside(whole)
        about = {
            "level": params.level, "coverage": float(within.mean()), "origins": "rolling",
            "interval_width": float((whole.beside["high"] - whole.beside["low"]).mean()),
        }  # fmt: skip
        if frame is not None:
            ahead = np.concatenate([np.arange(len(part.rows)) % frame.horizon for part in found])
            about |= {"season": frame.season, "horizon": frame.horizon, "window": frame.window}
            about["coverage_by_step"] = [float(within[ahead == step].mean()) for step in range(ahead.max() + 1)]
        lines = {name: _line(side, wanted, self.spec.seed) for name, side in said.items() if side}
        return {"baselines": lines, "forecast": about}

    def package(
        self, model: Followed, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
    ) -> tuple[Manifest, dict[str, bytes]]:
        """The manifest and its file. Without a history the model forecasts what follows the last step of the training."""
        from modelworks.ml.graph import to_bytes
        from modelworks.ml.train.seal import seal

        frame, values = model.model.frame, self.target[self.rows]
        about = {
            "season": frame.season, "horizon": frame.horizon, "window": frame.window, "step": self.run.step,
            "last": self.run.last, "naive_error": naive_error(values, frame.season),
            "intervals": {"method": "split-conformal", "level": self.params.level, **model.model.calibration.described()},
        }  # fmt: skip
        shape = [-1, frame.horizon]
        signature = Signature(
            inputs=[TensorSpec(name="history", datatype="FP32", shape=[-1, frame.window], nullable=True)],
            outputs=[TensorSpec(name=name, datatype="FP32", shape=shape) for name in ("forecast", "low", "high")],
        )
        return seal(
            to_bytes(model.model.model), lambda runtime, manifest: _samples(model.model, frame, values), workdir, threads,
            signature=signature, lineage=lineage | {"forecast": about}, metrics=metrics, **self.named(),
        )  # fmt: skip

    def answered(self, package: Package, ctx: JobContext, end: float) -> Predictions:
        """Of another series: its first window is history, the rest is forecast."""
        found = on_series(package, self.run.values, self.run.order, ctx.threads)
        ctx.progress(end, "testing")
        return found


def _no_slices() -> InvalidInput:
    return InvalidInput("the steps of a resampled series are no rows of the dataset; leave slices out", param="slices")


@dataclass(frozen=True)
class Followed:
    """`model` of the series' `rows`, oldest first."""

    model: Any
    rows: np.ndarray


def roll(model: Any, frame: Frame, values: np.ndarray, train: np.ndarray, test: np.ndarray) -> Predictions:
    """What `model` says of the rows `test`, which follow the rows `train`; `values` by row."""
    past, whole = values[train], values[np.concatenate([train, test])]
    starts = origins(frame, past, len(test))
    said = model(histories(frame, whole, starts))
    flat = {name: found.astype(np.float64).ravel()[: len(test)] for name, found in said.items()}
    scale = np.full(len(test), naive_error(past, frame.season))
    beside = {name: flat[name] for name in ("low", "high") if name in flat} | ({"scale": scale} if (scale > 0).all() else {})
    return Predictions(test, values[test], flat["forecast"], beside)


def baselines(frame: Frame, past: np.ndarray) -> tuple[Any, Any]:
    """(the last season again, a ridge regression of each step ahead), as models are called."""
    seen, came = frame.cut(past)
    line = ridge(seen, came)

    def said(values: np.ndarray) -> dict[str, np.ndarray]:
        return {"forecast": np.exp(values) if frame.log else values}

    def repeated(windows: np.ndarray) -> dict[str, np.ndarray]:
        return said(naive(frame, frame.wide(windows)))

    def straight(windows: np.ndarray) -> dict[str, np.ndarray]:
        wide = frame.wide(windows)
        level, base = frame.base(wide)
        return said(level + base + line(wide - level))

    return repeated, straight


def _line(side: list[Predictions], wanted: Sequence[str], seed: int) -> dict[str, Any]:
    scores = [score(FORECAST, part, wanted) for part in side]
    if len(side) == 1:
        return over_rows(FORECAST, side[0], scores[0], seed)[0]
    return {name: over_folds(name, [one[name] for one in scores]) for name in wanted}


def _samples(model: Any, frame: Frame, values: np.ndarray) -> ParitySamples:
    starts = np.unique(np.linspace(frame.window, len(values), _SAMPLES).round().astype(np.int64))
    windows = histories(frame, values, starts)
    inputs: list[dict[str, Any]] = [{"history": None}, *({"history": row.tolist()} for row in windows)]
    said = model(np.concatenate([windows[-1:], windows]))  # without a history it is the last one's
    return ParitySamples(inputs=inputs, outputs={name: found.tolist() for name, found in said.items()})


def on_series(package: Package, values: np.ndarray, rows: np.ndarray, threads: int) -> Predictions:
    """What a packaged forecaster says of another series: its first window is history, the rest is forecast."""
    from modelworks.ml.runtimes.registry import RUNTIMES

    about = package.manifest.lineage.get("forecast") or {}
    window, horizon = package.manifest.signature.inputs[0].shape[1], package.manifest.signature.outputs[0].shape[1]
    if len(rows) <= window:
        raise InvalidInput(
            f"the series has {len(rows)} steps, and the model looks back on {window}; give at least {window + 1}",
            code="too_few_rows",
            param="dataset",
        )
    frame = Frame(int(about.get("season", 1)), horizon, window, False)
    runtime = RUNTIMES.get(package.manifest.runtime)()
    runtime.load(package, threads)
    found = roll(lambda windows: runtime.predict({"history": windows.astype(np.float32)}), frame, values, rows[:window], rows[window:])
    runtime.close()
    scale = float(about.get("naive_error") or np.nan)
    kept = {"scale": np.full(len(found.rows), scale)} if scale > 0 else {}
    return Predictions(found.rows, found.true, found.output, {"low": found.beside["low"], "high": found.beside["high"], **kept})
