"""A forecaster's part of a training and an evaluation: rolling origins, the baselines beside it, its package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Signature, TensorSpec
from modelworks.ml.base import JobContext
from modelworks.ml.evaluate.intervals import over_folds, over_rows
from modelworks.ml.evaluate.metrics import Predictions, score
from modelworks.ml.forecast.windows import Frame, histories, naive, naive_error, origins, ridge
from modelworks.ml.graph import to_bytes
from modelworks.ml.package import Manifest, Package, PackageFile, ParitySamples
from modelworks.ml.runtimes.onnx import MODEL_FILE, OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from modelworks.ml.train.algorithms import FORECAST, TRAINERS

if TYPE_CHECKING:
    from modelworks.ml.train.problem import Problem

_SAMPLES = 8


def learn(problem: Problem, rows: np.ndarray, ctx: JobContext) -> Any:
    """The trainer's model (`nets/forecaster.py`) of the series' `rows`, oldest first."""
    trainer: Any = TRAINERS.get(problem.spec.algorithm)()
    params = trainer.Params.model_validate(problem.spec.hyperparameters)
    ctx.progress(0.0, "fitting")
    return trainer.follow(problem.target[rows], params, ctx, problem.spec.stopping)


def forecast(problem: Problem, train: np.ndarray, test: np.ndarray, ctx: JobContext) -> Predictions:
    """Learn from `train`, then forecast `test` from rolling origins: every `horizon` steps, knowing all before."""
    model = learn(problem, train, ctx)
    return roll(model, model.frame, problem.target, train, test)


def roll(model: Any, frame: Frame, values: np.ndarray, train: np.ndarray, test: np.ndarray) -> Predictions:
    """What `model` says of the rows `test`, which follow the rows `train`; `values` by row."""
    past, whole = values[train], values[np.concatenate([train, test])]
    starts = origins(frame, past, len(test))
    said = model(histories(frame, whole, starts))
    flat = {name: found.astype(np.float64).ravel()[: len(test)] for name, found in said.items()}
    scale = np.full(len(test), naive_error(past, frame.season))
    beside = {"low": flat["low"], "high": flat["high"]} | ({"scale": scale} if (scale > 0).all() else {})
    return Predictions(test, values[test], flat["forecast"], beside)


def describe(
    problem: Problem, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
) -> dict[str, Any]:
    """For a report's details: `baselines` (seasonal naive and linear) on the same steps, and how often the truth lay
    within the intervals.
    """
    params: Any = TRAINERS.get(problem.spec.algorithm).Params.model_validate(problem.spec.hyperparameters)
    said: dict[str, list[Predictions]] = {"seasonal-naive" if params.season else "naive": [], "linear": []}
    frame = None
    for train, test in parts:
        frame = Frame.of(params, problem.target[train])
        for name, model in zip(said, baselines(frame, problem.target[train]), strict=True):
            said[name].append(roll(model, frame, problem.target, train, test))
    whole = Predictions.join(found)
    inside = (whole.true >= whole.beside["low"]) & (whole.true <= whole.beside["high"])
    about = {"level": params.level, "coverage": float(inside.mean()), "origins": "rolling"}
    if frame is not None:
        about |= {"season": frame.season, "horizon": frame.horizon, "window": frame.window}
    lines = {name: _line(side, wanted, problem.spec.seed) for name, side in said.items() if side}
    return {"baselines": lines, "forecast": about}


def baselines(frame: Frame, past: np.ndarray) -> tuple[Any, Any]:
    """(the last season again, a ridge regression of each step ahead), as models are called."""
    seen, came = frame.cut(past)
    line = ridge(seen, came)

    def said(values: np.ndarray) -> dict[str, np.ndarray]:
        values = np.exp(values) if frame.log else values
        return {"forecast": values, "low": values, "high": values}

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


def package(
    problem: Problem, model: Any, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and its file. Without a history the model forecasts what follows the last step of the training."""
    assert problem.series is not None
    frame, graph, series = model.frame, to_bytes(model.model), problem.series
    digest = hashlib.sha256(graph).hexdigest()
    values = problem.target[problem.rows]
    about = {
        "season": frame.season, "horizon": frame.horizon, "window": frame.window, "step": series.step, "last": series.last,
        "naive_error": naive_error(values, frame.season),
    }  # fmt: skip
    shape = [-1, frame.horizon]
    manifest = Manifest(
        task=FORECAST,
        algorithm=problem.spec.algorithm,
        signature=Signature(
            inputs=[TensorSpec(name="history", datatype="FP32", shape=[-1, frame.window], nullable=True)],
            outputs=[TensorSpec(name=name, datatype="FP32", shape=shape) for name in ("forecast", "low", "high")],
        ),
        files={MODEL_FILE: PackageFile(digest=digest, size=len(graph))},
        lineage=lineage | {"forecast": about},
        metrics=metrics,
        licence=problem.spec.licence,
        description=problem.spec.description,
        parity=_samples(model, frame, values),
    )
    path = workdir / f"{digest}.onnx"
    path.write_bytes(graph)
    try:
        runtime = OnnxRuntime()
        runtime.load(Package(manifest, lambda _: path), threads)
        replay_parity(Package(manifest, lambda _: path), runtime)
        runtime.close()
    finally:
        path.unlink()
    return manifest, {MODEL_FILE: graph}


def _samples(model: Any, frame: Frame, values: np.ndarray) -> ParitySamples:
    starts = np.unique(np.linspace(frame.window, len(values), _SAMPLES).round().astype(np.int64))
    windows = histories(frame, values, starts)
    inputs: list[dict[str, Any]] = [{"history": None}, *({"history": row.tolist()} for row in windows)]
    said = model(np.concatenate([windows[-1:], windows]))  # without a history it is the last one's
    return ParitySamples(inputs=inputs, outputs={name: found.tolist() for name, found in said.items()})


def on_series(package: Package, values: np.ndarray, rows: np.ndarray, threads: int) -> Predictions:
    """What a packaged forecaster says of another series: its first window is history, the rest is forecast."""
    about = package.manifest.lineage.get("forecast") or {}
    window, horizon = package.manifest.signature.inputs[0].shape[1], package.manifest.signature.outputs[0].shape[1]
    if len(rows) <= window:
        raise InvalidInput(
            f"the series has {len(rows)} steps, and the model looks back on {window}; give at least {window + 1}",
            code="too_few_rows",
            param="dataset",
        )
    frame = Frame(int(about.get("season", 1)), horizon, window, False)
    runtime = OnnxRuntime()
    runtime.load(package, threads)
    found = roll(lambda windows: runtime.predict({"history": windows.astype(np.float32)}), frame, values, rows[:window], rows[window:])
    runtime.close()
    scale = float(about.get("naive_error") or np.nan)
    kept = {"scale": np.full(len(found.rows), scale)} if scale > 0 else {}
    return Predictions(found.rows, found.true, found.output, {"low": found.beside["low"], "high": found.beside["high"], **kept})
