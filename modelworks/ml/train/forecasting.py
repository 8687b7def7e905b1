"""Forecasts: one series or many, learnt from their own past, judged on rolling origins with baselines beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ValidationError

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit, Method, TrainingSpec
from modelworks.core.tasks import FORECAST
from modelworks.core.types import Column, Signature, TensorSpec
from modelworks.ml.base import JobContext
from modelworks.ml.evaluate.catalogue import METRICS, check_metrics
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
_LISTED = 1000  # series in a report
_NAMED = ("category", "text", "integer")  # types of a column that tells series apart


@dataclass(frozen=True)
class Forecast(Course):
    """`rows` are in order of time, and there are no features. `target` [n]: by row, not by time."""

    kind: ClassVar[str] = FORECAST
    series: Series | None = None

    @classmethod
    def check(cls, spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
        """A series is its time and its target, and nothing else is learned from but other series."""
        if not spec.target:
            raise InvalidInput("name the column to predict in 'target'", code="no_target", param="target")
        task_of(spec, find(columns, spec.target, "target"))
        time = spec.time or (spec.validation.time if spec.validation else None)
        if time is None:
            raise InvalidInput("a forecast needs time: the column that the series runs along", code="missing_time", param="time")
        check_method(Method(holdout=0.5, time=time), columns, spec.target)
        if spec.series is not None:
            label = find(columns, spec.series, "series")
            if label.type not in _NAMED or spec.series in (spec.target, time):
                raise InvalidInput(
                    f"series {spec.series!r} must name another column than target and time, of type category, text or integer",
                    param="series",
                )
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
                DatasetEdit(op="resample", time=time, group=spec.series, **step.params)
            except (ValidationError, TypeError) as error:
                why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                raise InvalidInput(f"resample: {why}", param=f"transforms[{index}]") from None
        given = check_hyperparameters(spec.algorithm, spec.hyperparameters)
        return spec.model_copy(update={"hyperparameters": given, "task": FORECAST, "features": [], "time": time})

    @classmethod
    def pose(cls, table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Forecast:
        time, target = find(columns, str(spec.time), "time"), find(columns, spec.target, "target")
        label = find(columns, spec.series, "series") if spec.series is not None else None
        series = read_series(table, time, target, spec.transforms, label)
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
        """Along the time of each series: the tail, or as folds the last horizons, each forecast from all before it."""
        method = method.model_copy(update={"time": self.run.time})
        ahead, made = horizon_of(self.spec.hyperparameters), []
        for number, mine in enumerate(self.run.each(rows)):
            try:
                made.append(plan(method, self.task, mine, self.target, self.run.along, seed, ahead=ahead))
            except InvalidInput as error:
                if not self.run.names:
                    raise
                said = f"{self.run.called(number)}: {error.message}; or leave that series out"
                raise InvalidInput(said, code=error.code, param=error.param) from None
        parts = []
        for several in zip(*(one.parts for one in made), strict=True):
            train, test = (np.concatenate(side) for side in zip(*several, strict=True))
            parts.append((train, test))
        return replace(made[0], parts=parts)

    def learn(self, rows: np.ndarray, ctx: JobContext) -> Followed:
        """The trainer's model (`nets/forecaster.py`) of the `rows` of each series, oldest first."""
        trainer: Any = TRAINERS.get(self.spec.algorithm)()
        ctx.progress(0.0, "fitting")
        runs = [self.target[mine] for mine in self.run.each(rows)]
        return Followed(trainer.follow(runs, self.run.names, self.params, ctx, self.spec.stopping), rows)

    def judge(self, model: Followed, rows: np.ndarray) -> Predictions:
        """Forecasts from rolling origins of each series: every `horizon` steps, knowing all before."""
        return self._rolled(model.model.frame, model.rows, rows, lambda number: lambda windows: model.model(windows, number))

    def _rolled(
        self, frame: Frame, train: np.ndarray, test: np.ndarray, of: Callable[[int], Callable[[np.ndarray], dict[str, np.ndarray]]]
    ) -> Predictions:
        """What the model `of` each series, by its number, says of the rows `test`, which follow its rows `train`."""
        sides = zip(self.run.each(train), self.run.each(test), strict=True)
        return joined([roll(of(at), frame, self.target, past, ahead) for at, (past, ahead) in enumerate(sides)])

    def details(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
    ) -> dict[str, Any]:
        """`baselines` (seasonal naive and linear) on the same steps, how often the truth lay within the intervals (also by
        steps ahead), and how wide they are."""
        params = self.params
        said: dict[str, list[Predictions]] = {"seasonal-naive" if params.season else "naive": [], "linear": []}
        frame = None
        ahead = []
        for train, test in parts:
            runs = [self.target[mine] for mine in self.run.each(train)]
            frame = Frame.of(params, runs, self.run.called)
            both = [baselines(frame, values) for values in runs]
            for at, name in enumerate(said):
                said[name].append(self._rolled(frame, train, test, lambda number, at=at, both=both: both[number][at]))  # type: ignore[misc]
            ahead += [np.arange(len(mine)) % frame.horizon for mine in self.run.each(test)]
        whole = Predictions.join(found)
        within = inside(whole)
        about = {
            "level": params.level, "coverage": float(within.mean()), "origins": "rolling",
            "interval_width": float((whole.beside["high"] - whole.beside["low"]).mean()),
        }  # fmt: skip
        if frame is not None:
            steps = np.concatenate(ahead)
            about |= {"season": frame.season, "horizon": frame.horizon, "window": frame.window}
            about["coverage_by_step"] = [float(within[steps == step].mean()) for step in range(steps.max() + 1)]
        if self.run.names:
            about["series"] = len(self.run.names)
            return {"baselines": self._lines(said, wanted), "forecast": about, "per_series": self._per_series(whole, wanted)}
        return {"baselines": self._lines(said, wanted), "forecast": about}

    def _lines(self, said: dict[str, list[Predictions]], wanted: Sequence[str]) -> dict[str, Any]:
        return {name: _line(side, wanted, self.spec.seed) for name, side in said.items() if side}

    def _per_series(self, found: Predictions, wanted: Sequence[str]) -> list[dict[str, Any]]:
        """The metrics of each series by itself, the worst first by the first of them that is wanted; so many at most."""
        which, lines = self.run.which[found.rows], []
        ends = np.cumsum(np.bincount(which, minlength=len(self.run.names)))
        for name, places in zip(self.run.names, np.split(np.argsort(which, kind="stable"), ends[:-1]), strict=True):
            lines.append({"series": name, "steps": len(places), **score(FORECAST, found.take(places), wanted)})
        first = METRICS[wanted[0]]
        sign = 1 if first.greater_is_better else -1
        return sorted(lines, key=lambda line: sign * (np.inf if line[first.id] is None else line[first.id]))[:_LISTED]

    def package(
        self, model: Followed, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
    ) -> tuple[Manifest, dict[str, bytes]]:
        """The manifest and its file. Without a history the model forecasts what follows the last step of the training."""
        from modelworks.ml.graph import to_bytes
        from modelworks.ml.train.seal import seal

        frame, names = model.model.frame, self.run.names
        runs = [self.target[mine] for mine in self.run.each(self.rows)]
        errors = [naive_error(values, frame.season) for values in runs]
        about = {
            "season": frame.season, "horizon": frame.horizon, "window": frame.window, "step": self.run.step,
            "last": self.run.last if names else self.run.last[0], "naive_error": errors if names else errors[0],
            "intervals": {"method": "split-conformal", "level": self.params.level, **model.model.calibration.described()},
        }  # fmt: skip
        kind = "INT64" if names and isinstance(names[0], int) else "BYTES"
        label = [TensorSpec(name="series", datatype=kind, shape=[-1], known=names)] if names else []
        shape = [-1, frame.horizon]
        signature = Signature(
            inputs=[TensorSpec(name="history", datatype="FP32", shape=[-1, frame.window], nullable=True), *label],
            outputs=[TensorSpec(name=name, datatype="FP32", shape=shape) for name in ("forecast", "low", "high")],
        )
        return seal(
            to_bytes(model.model.model), lambda runtime, manifest: _samples(model.model, frame, runs), workdir, threads,
            signature=signature, lineage=lineage | {"forecast": about}, metrics=metrics, **self.named(),
        )  # fmt: skip

    def answered(self, package: Package, ctx: JobContext, end: float) -> Predictions:
        """Of other series, or others' future: the first window of each is history, the rest is forecast."""
        found = on_series(package, self.run, ctx.threads)
        ctx.progress(end, "testing")
        return found


def _no_slices() -> InvalidInput:
    return InvalidInput("the steps of a resampled series are no rows of the dataset; leave slices out", param="slices")


@dataclass(frozen=True)
class Followed:
    """`model` of the `rows` of each series, oldest first."""

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


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Of several series as one, with their numbers; without the scales, where one does not change and so has none."""
    if len(parts) == 1:
        return parts[0]
    out = () if all("scale" in part.beside for part in parts) else ("scale",)
    told = []
    for number, part in enumerate(parts):
        kept = {name: values for name, values in part.beside.items() if name not in out}
        told.append(replace(part, beside={**kept, "series": np.full(len(part.rows), float(number))}))
    return Predictions.join(told)


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


def _samples(model: Any, frame: Frame, runs: Sequence[np.ndarray]) -> ParitySamples:
    """Of a few of the series, some windows and none."""
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, np.ndarray]] = []
    for number in np.unique(np.linspace(0, len(runs) - 1, _SAMPLES).round().astype(np.int64)).tolist():
        values, named = runs[number], {"series": model.names[number]} if model.names else {}
        starts = np.unique(np.linspace(frame.window, len(values), _SAMPLES).round().astype(np.int64))
        windows = histories(frame, values, starts)
        inputs += [{"history": None, **named}, *({"history": row.tolist(), **named} for row in windows)]
        outputs.append(model(np.concatenate([windows[-1:], windows]), number))  # without a history it is the last one's
    return ParitySamples(inputs=inputs, outputs={name: np.concatenate([one[name] for one in outputs]).tolist() for name in outputs[0]})


def on_series(package: Package, run: Series, threads: int) -> Predictions:
    """What a packaged forecaster says of a dataset's series: the first window of each is history, the rest is forecast."""
    from modelworks.ml.nets.forecaster import labels
    from modelworks.ml.runtimes.registry import RUNTIMES

    about = package.manifest.lineage.get("forecast") or {}
    window, horizon = package.manifest.signature.inputs[0].shape[1], package.manifest.signature.outputs[0].shape[1]
    apart = run.each(run.order)
    for number, rows in enumerate(apart):
        if len(rows) <= window:
            raise InvalidInput(
                f"{run.called(number)} has {len(rows)} steps, and the model looks back on {window}; give at least {window + 1}",
                code="too_few_rows",
                param="dataset",
            )
    frame = Frame(int(about.get("season", 1)), horizon, window, False)
    runtime = RUNTIMES.get(package.manifest.runtime)()
    runtime.load(package, threads)
    known = package.manifest.signature.inputs[1].known or [] if run.names else []
    errors = dict(zip(known, about.get("naive_error") or [], strict=False)) if run.names else {None: about.get("naive_error")}
    parts = []
    for number, rows in enumerate(apart):
        name = run.names[number] if run.names else None

        def said(windows: np.ndarray, name: Any = name) -> dict[str, np.ndarray]:
            given = {"history": windows.astype(np.float32)}
            return runtime.predict(given if name is None else given | {"series": labels(name, len(windows))})

        found = roll(said, frame, run.values, rows[:window], rows[window:])
        scale = float(errors.get(name) or np.nan)
        kept = {"scale": np.full(len(found.rows), scale)} if scale > 0 else {}
        parts.append(replace(found, beside={"low": found.beside["low"], "high": found.beside["high"], **kept}))
    runtime.close()
    return joined(parts)
