"""The forecaster: a linear forecast in closed form, and a small net that corrects it where that has been shown to help.

The last windows are held out first: they tell after how many epochs the correction is best (0: it is left out). Then both
learn from all windows, for as many epochs. How far forecasts from rolling origins are off makes the intervals
(forecast/intervals.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import ModelworksError
from modelworks.core.specs import Stopping
from modelworks.core.tasks import FORECAST
from modelworks.ml import graph as onnx_graph
from modelworks.ml.base import JobContext
from modelworks.ml.forecast.intervals import Calibration, calibrate, needed, rolling, together
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
    """A forecast of a series from its own past, `horizon` steps at once with intervals: linear, corrected by a small net.

    Of many series one model, each at its own level and scale.
    """

    tasks: ClassVar[tuple[str, ...]] = (FORECAST,)
    accepts_missing: ClassVar[bool] = False
    auto: ClassVar[bool] = False
    Params: ClassVar[type[ForecasterParams]] = ForecasterParams

    def follow(
        self, runs: Sequence[np.ndarray], names: Sequence[Any], params: ForecasterParams, ctx: JobContext, stopping: Stopping | None
    ) -> SeriesModel:
        """Learn from the series `runs`, [n] each, oldest first, and their `names`, none of a single one.

        InvalidInput when one is too short.
        """
        frame = Frame.of(params, runs, lambda number: f"the series {str(names[number])[:80]!r}" if names else "the series")
        cuts, scales = [], []
        for values in runs:
            seen, came = frame.cut(values)
            scales.append(float(seen.std()) or 1.0)
            cuts.append((seen / scales[-1], came / scales[-1]))
        held = _held([len(seen) for seen, _ in cuts], frame.horizon, stopping)
        whole = together(cuts)
        line = ridge(*whole)
        apart = rolling(frame, cuts, _FEW)
        epochs = 0
        if held and params.hidden:
            # no window to learn from reaches into what is held out of its series
            ends = [max(0, len(seen) - out - frame.horizon + 1) for (seen, _), out in zip(cuts, held, strict=True)]
            rest = together([(seen[:end], came[:end]) for (seen, came), end in zip(cuts, ends, strict=True)])
            last = together([(seen[-out:], came[-out:]) for (seen, came), out in zip(cuts, held, strict=True)])
            net, epochs = _correct(ridge(*rest), rest, params, ctx, stopping, last)
            if epochs:
                apart = [*(mine[:-out] for mine, out in zip(apart, held, strict=True)), last[1] - _said(net, last[0])]
        errors = np.concatenate(apart)
        measured = calibrate(errors if len(errors) else line.errors, params.level, "rolling" if len(errors) else "leave-one-out")
        if measured.reached < params.level:
            ctx.event(
                "warning",
                f"{measured.origins} forecasts to learn the intervals from can vouch for a level of {measured.reached:.3g}, not "
                f"{params.level:g}, which takes {needed(params.level)}; give more data, or lower level, horizon or window",
            )
        limit = Stopping(max_epochs=epochs) if epochs else None
        net = _correct(line, whole, params, ctx, limit, None)[0] if limit else _network(line, params)
        tails = np.stack([frame.wide(values)[-frame.window :] for values in runs])
        graph = _write(frame, net, np.array(scales), measured.half, tails, names)
        made = SeriesModel(graph, frame, epochs, measured, list(names), ctx.threads)
        for number in {0, len(runs) - 1}:
            _check(made, frame, net, scales[number], runs[number], number)
        return made


@dataclass(frozen=True)
class SeriesModel:
    """`model`: "history" FP32 [n, window] (a row of NaN: the end of what was learned from) -> forecast, low and high.

    Of many series it has the input "series" [n] beside it, one of `names`.
    """

    model: onnx.ModelProto
    frame: Frame
    epochs: int
    calibration: Calibration
    names: list[Any]
    threads: int = 1

    def __call__(self, windows: np.ndarray, number: int = 0) -> dict[str, np.ndarray]:
        """[n, window] -> by output [n, horizon] float32, of the series of this number."""
        data = np.ascontiguousarray(windows, dtype=np.float32)
        found = [
            self._session.run(list(OUTPUTS), {"history": part, **self._of(number, len(part))})
            for part in (data[start : start + _CHUNK] for start in range(0, max(len(data), 1), _CHUNK))
        ]
        return {name: np.concatenate([part[i] for part in found]) for i, name in enumerate(OUTPUTS)}

    def _of(self, number: int, rows: int) -> dict[str, np.ndarray]:
        return {"series": labels(self.names[number], rows)} if self.names else {}

    @cached_property
    def _session(self) -> Any:
        return onnx_graph.session(onnx_graph.to_bytes(self.model), self.threads)


def labels(name: Any, rows: int) -> np.ndarray:
    """The input "series" [rows] of so many rows of one."""
    return np.full(rows, name, dtype=np.int64 if isinstance(name, int) else object)


def _held(windows: Sequence[int], horizon: int, stopping: Stopping | None) -> list[int]:
    """How many of each series' last windows are held out; none of any when that leaves too few."""
    share = stopping.holdout if stopping and stopping.patience else _SHARE
    held = [max(1, round(share * count)) for count in windows]
    left = sum(max(0, count - out - horizon + 1) for count, out in zip(windows, held, strict=True))
    return held if left >= _FEW else []


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


def _write(
    frame: Frame, net: torch.nn.Module, scales: np.ndarray, half: np.ndarray, tails: np.ndarray, names: Sequence[Any]
) -> onnx.ModelProto:
    """One graph from the raw history to the three outputs. scales [series], tails [series, window]."""
    from onnx import TensorProto, helper

    from modelworks.ml.graph import ML
    from modelworks.ml.nets.emit import FLOAT, Emitter

    e = Emitter()
    net.eval()
    wide = e.op("Log", "history") if frame.log else "history"
    # a row is missing when its first value is: one in the middle makes the answer missing as well
    first = e.op("Slice", "history", e.constant([0]), e.constant([1]), e.constant([1]))
    absent = e.op("IsNaN", first)
    inputs = [helper.make_tensor_value_info("history", FLOAT, ["n", frame.window])]
    if names:
        whole = isinstance(names[0], int)
        inputs.append(helper.make_tensor_value_info("series", TensorProto.INT64 if whole else TensorProto.STRING, ["n"]))
        keys: dict[str, Any] = {"keys_int64s" if whole else "keys_strings": list(names)}
        # one that is not known has no scale: the lookup refuses it, if the runtime has not
        number = e.op("LabelEncoder", "series", domain=ML, **keys, values_int64s=list(range(len(names))), default_int64=len(names))
        tail = e.op("Gather", e.constant(tails.astype(np.float32)), number)
        scale = e.op("Gather", e.constant(scales.astype(np.float32)[:, None]), number)
    else:
        tail, scale = e.constant(tails.astype(np.float32)), e.constant(np.float32(scales[0]))
    wide = e.op("Where", absent, tail, wide)
    ends = e.op("Slice", wide, e.constant([frame.window - frame.season]), e.constant([frame.window]), e.constant([1]))
    level = e.op("ReduceMean", ends, e.constant([1]), keepdims=1)
    again = e.constant(frame.window - frame.season + np.arange(frame.horizon, dtype=np.int64) % frame.season)
    base = e.op("Gather", wide, again, axis=1)
    inside = e.op("Div", e.op("Sub", wide, level), scale)
    step = e.op("Mul", e.module(net, inside), scale)
    middle = e.op("Add", base, step)
    width = e.op("Mul", e.constant(half.astype(np.float32)[None, :]), scale)
    found = {"forecast": middle, "low": e.op("Sub", middle, width), "high": e.op("Add", middle, width)}
    for name, tensor in found.items():
        last = e.op("Exp", tensor) if frame.log else tensor
        e.nodes.append(helper.make_node("Identity", [last], [name], name=name))
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["n", frame.horizon]) for name in OUTPUTS]
    return onnx_graph.finish(helper.make_graph(e.nodes, "forecast", inputs, outputs, initializer=e.constants))


def _check(made: SeriesModel, frame: Frame, net: torch.nn.Module, scale: float, values: np.ndarray, number: int) -> None:
    """ModelworksError when the graph does not say what the net does of the last windows."""
    windows = np.lib.stride_tricks.sliding_window_view(values, frame.window)[-16:]
    wide = frame.wide(windows)
    level, base = frame.base(wide)
    want = level + base + _said(net, (wide - level) / scale) * scale
    want = np.exp(want) if frame.log else want
    got = made(windows, number)["forecast"].astype(np.float64)
    if not (np.abs(got - want) <= _NEAR * np.maximum(1.0, np.abs(want).max())).all():
        raise ModelworksError("the forecast's graph does not answer as its net does; please report this", code="export_mismatch")
