"""The forecaster: a linear forecast in closed form, and a small net that corrects it where that has been shown to help.

The last windows are held out first: they tell after how many epochs the correction is best (0: it is left out). Then both
learn from all windows, for as many epochs. How far forecasts from rolling origins are off makes the intervals
(forecast/intervals.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import ModelworksError
from modelworks.core.specs import Stopping
from modelworks.core.tasks import FORECAST
from modelworks.ml import graph as onnx_graph
from modelworks.ml.base import JobContext
from modelworks.ml.forecast.intervals import Calibration, calibrate, needed, rolling
from modelworks.ml.forecast.windows import Frame, Ridge, ridge
from modelworks.ml.nets.params import ForecasterParams

if TYPE_CHECKING:
    import onnx
    import torch

OUTPUTS = ("forecast", "low", "high")
_SHARE = 0.2  # of the windows that are held out at first
_FEW = 20  # windows below which nothing is held out, and nothing corrected
_PATIENCE = 15
_CHUNK = 1024
_NEAR = 2e-4


class Forecaster:
    """A forecast of a series from its own past, `horizon` steps at once with intervals: linear, corrected by a small net."""

    tasks: ClassVar[tuple[str, ...]] = (FORECAST,)
    accepts_missing: ClassVar[bool] = False
    auto: ClassVar[bool] = False
    Params: ClassVar[type[ForecasterParams]] = ForecasterParams

    def follow(
        self, values: np.ndarray, params: ForecasterParams, ctx: JobContext, stopping: Stopping | None
    ) -> SeriesModel:
        """Learn from the series `values` [n], oldest first. InvalidInput when it is too short."""
        frame = Frame.of(params, values)
        seen, came = frame.cut(values)
        scale = float(seen.std()) or 1.0
        seen, came = seen / scale, came / scale
        held = _held(len(seen), frame.horizon, stopping)
        line = ridge(seen, came)
        epochs, errors = 0, rolling(frame, seen, came, _FEW)
        if held and params.hidden:
            early = len(seen) - held - frame.horizon + 1  # no window to learn from reaches into what is held out
            rest, last = (seen[:early], came[:early]), (seen[-held:], came[-held:])
            net, epochs = _correct(ridge(*rest), rest, params, ctx, stopping, last)
            if epochs:
                errors = np.concatenate([errors[:-held], last[1] - _said(net, last[0])])
        measured = calibrate(errors if len(errors) else line.errors, params.level, "rolling" if len(errors) else "leave-one-out")
        if measured.reached < params.level:
            ctx.event(
                "warning",
                f"{measured.origins} forecasts to learn the intervals from can vouch for a level of {measured.reached:.3g}, not "
                f"{params.level:g}, which takes {needed(params.level)}; give more data, or lower level, horizon or window",
            )
        whole = (seen, came)
        limit = Stopping(max_epochs=epochs) if epochs else None
        net = _correct(line, whole, params, ctx, limit, None)[0] if limit else _network(line, params)
        tail = frame.wide(values)[-frame.window :]
        made = SeriesModel(_write(frame, net, scale, measured.half, tail), frame, epochs, measured, ctx.threads)
        _check(made, frame, net, scale, values)
        return made


@dataclass(frozen=True)
class SeriesModel:
    """`model`: "history" FP32 [n, window] (a row of NaN: the end of what was learned from) -> forecast, low and high."""

    model: onnx.ModelProto
    frame: Frame
    epochs: int
    calibration: Calibration
    threads: int = 1

    def __call__(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """[n, window] -> by output [n, horizon] float32."""
        data = np.ascontiguousarray(windows, dtype=np.float32)
        found = [
            self._session.run(list(OUTPUTS), {"history": data[start : start + _CHUNK]})
            for start in range(0, max(len(data), 1), _CHUNK)
        ]
        return {name: np.concatenate([part[i] for part in found]) for i, name in enumerate(OUTPUTS)}

    @cached_property
    def _session(self) -> Any:
        return onnx_graph.session(onnx_graph.to_bytes(self.model), self.threads)


def _held(windows: int, horizon: int, stopping: Stopping | None) -> int:
    """How many of the last windows are held out; 0 when that leaves too few."""
    share = stopping.holdout if stopping and stopping.patience else _SHARE
    held = max(1, round(share * windows))
    return held if windows - held - horizon + 1 >= _FEW else 0


def _correct(
    line: Ridge,
    windows: tuple[np.ndarray, np.ndarray],
    params: ForecasterParams,
    ctx: JobContext,
    stopping: Stopping | None,
    held: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[torch.nn.Module, int]:
    """(the corrected net, the epochs that were best on `held`: 0 when the line alone is as good there)"""
    from modelworks.ml.nets.examples import MemoryExamples
    from modelworks.ml.nets.loop import Loop
    from modelworks.ml.nets.trainer import set_up

    torch = set_up(ctx)
    torch.manual_seed(ctx.seed)
    net = _network(line, params)
    examples, last = (
        None if pair is None else MemoryExamples(pair[0].astype(np.float32), pair[1].astype(np.float32))
        for pair in (windows, held)
    )
    assert examples is not None
    objective: Any = _Steps(params.loss, params.horizon)
    begun = None if last is None else objective.of(net, last)
    if last is not None:
        limits = stopping or Stopping()
        stopping = limits.model_copy(update={"patience": limits.patience or _PATIENCE, "metric": "loss"})
    history = Loop(net, examples, objective, params, ctx, stopping, last).run()
    if last is None or begun is None:
        return net, len(history)
    best = min(range(len(history)), key=lambda at: history[at]["val_loss"])
    if history[best]["val_loss"] >= begun:
        ctx.event("log", "the net does not improve on the linear forecast in the steps held out, so it stays linear")
        return net, 0
    return net, int(history[best]["epoch"])


def _network(line: Ridge, params: ForecasterParams) -> torch.nn.Module:
    """The line, which is not trained, and a net beside it that says nothing at first."""
    import torch
    from torch import nn

    from modelworks.ml.nets.layers import Corrected
    from modelworks.ml.nets.mlp import perceptron

    window, horizon = line.weights.shape
    straight = nn.Linear(window, horizon)
    with torch.no_grad():
        straight.weight.copy_(torch.from_numpy(line.weights.T))
        straight.bias.copy_(torch.from_numpy(line.bias))
    straight.requires_grad_(False)
    if not params.hidden:
        return straight
    bent = perceptron(window, params.hidden, horizon, _Plain(params.dropout))
    nn.init.zeros_(bent[-1].weight)
    nn.init.zeros_(bent[-1].bias)
    return Corrected(straight, bent)


@dataclass(frozen=True)
class _Plain:
    dropout: float
    activation: str = "relu"
    batch_norm: bool = False


@dataclass(frozen=True)
class _Steps:
    """The loss of a window: the mean over the steps ahead. What the loop asks of an objective (nets/objective.py)."""

    kind: str
    horizon: int | None

    def prepare(self, target: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(target)

    def losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional as f

        kinds: dict[str, Any] = {"mae": f.l1_loss, "huber": f.huber_loss}
        found: torch.Tensor = kinds.get(self.kind, f.mse_loss)(scores, target, reduction="none").mean(dim=1)
        return found

    def of(self, net: torch.nn.Module, examples: Any) -> float:
        import torch

        net.eval()
        with torch.no_grad():
            scores = net(torch.from_numpy(examples.features))
            return float(self.losses(scores, self.prepare(examples.target)).mean())


def _said(net: torch.nn.Module, seen: np.ndarray) -> np.ndarray:
    import torch

    net.eval()
    with torch.no_grad():
        found: np.ndarray = net(torch.from_numpy(seen.astype(np.float32))).double().numpy()
    return found


def _write(frame: Frame, net: torch.nn.Module, scale: float, half: np.ndarray, tail: np.ndarray) -> onnx.ModelProto:
    """One graph from the raw history to the three outputs."""
    from onnx import helper

    from modelworks.ml.nets.emit import FLOAT, Emitter

    e = Emitter()
    net.eval()
    wide = e.op("Log", "history") if frame.log else "history"
    # a row is missing when its first value is: one in the middle makes the answer missing as well
    first = e.op("Slice", "history", e.constant([0]), e.constant([1]), e.constant([1]))
    absent = e.op("IsNaN", first)
    wide = e.op("Where", absent, e.constant(tail.astype(np.float32)[None, :]), wide)
    ends = e.op("Slice", wide, e.constant([frame.window - frame.season]), e.constant([frame.window]), e.constant([1]))
    level = e.op("ReduceMean", ends, e.constant([1]), keepdims=1)
    again = e.constant(frame.window - frame.season + np.arange(frame.horizon, dtype=np.int64) % frame.season)
    base = e.op("Gather", wide, again, axis=1)
    inside = e.op("Div", e.op("Sub", wide, level), e.constant(np.float32(scale)))
    step = e.op("Mul", e.module(net, inside), e.constant(np.float32(scale)))
    middle = e.op("Add", base, step)
    width = e.constant((half * scale).astype(np.float32)[None, :])
    found = {"forecast": middle, "low": e.op("Sub", middle, width), "high": e.op("Add", middle, width)}
    for name, tensor in found.items():
        last = e.op("Exp", tensor) if frame.log else tensor
        e.nodes.append(helper.make_node("Identity", [last], [name], name=name))
    inputs = [helper.make_tensor_value_info("history", FLOAT, ["n", frame.window])]
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["n", frame.horizon]) for name in OUTPUTS]
    return onnx_graph.finish(helper.make_graph(e.nodes, "forecast", inputs, outputs, initializer=e.constants))


def _check(made: SeriesModel, frame: Frame, net: torch.nn.Module, scale: float, values: np.ndarray) -> None:
    """ModelworksError when the graph does not say what the net does of the last windows."""
    windows = np.lib.stride_tricks.sliding_window_view(values, frame.window)[-16:]
    wide = frame.wide(windows)
    level, base = frame.base(wide)
    want = level + base + _said(net, (wide - level) / scale) * scale
    want = np.exp(want) if frame.log else want
    got = made(windows)["forecast"].astype(np.float64)
    if not (np.abs(got - want) <= _NEAR * np.maximum(1.0, np.abs(want).max())).all():
        raise ModelworksError("the forecast's graph does not answer as its net does; please report this", code="export_mismatch")
