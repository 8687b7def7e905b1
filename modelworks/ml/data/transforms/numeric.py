"""Transforms of numbers: fitted column by column in float64, emitted for a block [N, k] of float32. NaN = missing.

A fit gets one column's values (float32 [n], NaN where missing) and returns its constants; an emission gets the block's
tensor and the constants of its k columns. Every emission lets NaN through, but for filling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.ml.data.transforms import catalogue as ops
from modelworks.ml.graph import BOOL, DOUBLE, FLOAT, Graph

Constants = tuple[float, ...]
_TINY = 10 * float(np.finfo(np.float64).eps)


def fit_fill(values: np.ndarray, params: ops.FillMissing, name: str, type_: str) -> Constants:
    """(fill,). A column with no value at all is filled with 0."""
    if params.value is not None:
        return (_number(params.value, name),)
    known = _known(values, name)
    strategy = params.strategy or ("most-frequent" if type_ == "boolean" else "mean")
    if known.size == 0:
        return (0.0,)
    if strategy == "mean":
        return (float(known.mean()),)
    if strategy == "median":
        return (float(np.median(known)),)
    distinct, counts = np.unique(known, return_counts=True)
    return (float(distinct[counts.argmax()]),)  # of equally frequent ones the smallest


def emit_fill(graph: Graph, block: str, constants: Sequence[Constants]) -> str:
    width = len(constants)
    missing = graph.node("IsNaN", [block], kind=BOOL, width=width)
    return graph.node("Where", [missing, _row(graph, constants, 0), block], width=width)


def fit_standardise(values: np.ndarray, params: ops.NoParams, name: str, type_: str) -> Constants:
    """(mean, deviation); as in scikit-learn's StandardScaler, a constant column has the deviation 1."""
    known = _known(values, name)
    if known.size == 0:
        return (0.0, 1.0)
    mean, deviation = float(known.mean()), float(known.std())
    return (mean, 1.0 if deviation <= _TINY * abs(mean) else deviation)


def emit_standardise(graph: Graph, block: str, constants: Sequence[Constants]) -> str:
    width = len(constants)
    centred = graph.node("Sub", [block, _row(graph, constants, 0)], width=width)
    # a mean such as 2023.6 beside a deviation of 0.5 loses too much in float32: subtract what rounding left, too
    rests = [(mean - float(np.float32(mean)),) for mean, _ in constants]
    if any(abs(rest) > 1e-6 * deviation for (rest,), (_, deviation) in zip(rests, constants, strict=True)):
        centred = graph.node("Sub", [centred, _row(graph, rests, 0)], width=width)
    return graph.node("Div", [centred, _row(graph, constants, 1)], width=width)


def fit_min_max(values: np.ndarray, params: ops.MinMax, name: str, type_: str) -> Constants:
    """(minimum, scale, low); a constant column becomes low."""
    known = _known(values, name)
    low, high = params.range
    if known.size == 0:
        return (0.0, 1.0, low)
    smallest, largest = float(known.min()), float(known.max())
    return (smallest, (high - low) / ((largest - smallest) or 1.0), low)


def emit_min_max(graph: Graph, block: str, constants: Sequence[Constants]) -> str:
    width = len(constants)
    from_zero = graph.node("Sub", [block, _row(graph, constants, 0)], width=width)
    scaled = graph.node("Mul", [from_zero, _row(graph, constants, 1)], width=width)
    return graph.node("Add", [scaled, _row(graph, constants, 2)], width=width)


def fit_clip(values: np.ndarray, params: ops.Clip, name: str, type_: str) -> Constants:
    """(low, high), infinite where a side is open."""
    low, high = -np.inf, np.inf
    if params.low is not None or params.high is not None:
        return (low if params.low is None else params.low, high if params.high is None else params.high)
    known = values[~np.isnan(values)].astype(np.float64)
    if known.size == 0:
        return (low, high)
    if params.zscore is not None:
        known = _known(values, name)
        mean, reach = float(known.mean()), params.zscore * float(known.std())
        return (mean - reach, mean + reach)
    if params.low_quantile is not None or params.high_quantile is not None:
        return (
            low if params.low_quantile is None else float(np.quantile(known, params.low_quantile)),
            high if params.high_quantile is None else float(np.quantile(known, params.high_quantile)),
        )
    first, third = (float(np.quantile(known, share)) for share in (0.25, 0.75))
    reach = (1.5 if params.iqr is None else params.iqr) * (third - first)
    return (first - reach, third + reach)


def emit_clip(graph: Graph, block: str, constants: Sequence[Constants]) -> str:
    width = len(constants)
    # Where, not Max and Min: those do not say what becomes of NaN
    for op, side in (("Less", 0), ("Greater", 1)):
        bound = _row(graph, constants, side)
        beyond = graph.node(op, [block, bound], kind=BOOL, width=width)
        block = graph.node("Where", [beyond, bound, block], width=width)
    return block


def fit_log(values: np.ndarray, params: ops.Log, name: str, type_: str) -> Constants:
    """(offset, the smallest value + offset, ln base). InvalidInput when value + offset is not above 0 in training."""
    known = _known(values, name)
    shifted = known + params.offset
    smallest = float(shifted.min()) if shifted.size else 1.0
    if smallest <= 0:
        raise InvalidInput(
            f"log: column {name!r} has the value {float(known.min()):g}, and value + offset must be above 0; "
            f"give an offset above {-float(known.min()):g} or clip the column first",
            param=name,
            code="bad_transform",
        )
    return (params.offset, smallest, 1.0 if params.base is None else float(np.log(params.base)))


def emit_log(graph: Graph, block: str, constants: Sequence[Constants]) -> str:
    """Served values at or below -offset count as the smallest of training: a logarithm of nothing has no answer."""
    width = len(constants)
    # in float64: onnxruntime's float32 Log differs in its last bit between a row alone and the same row in a batch
    wide = graph.node("Cast", [block], kind=DOUBLE, width=width, to=DOUBLE)
    shifted = graph.node("Add", [wide, _row(graph, constants, 0, DOUBLE)], kind=DOUBLE, width=width)
    below = graph.node("LessOrEqual", [shifted, graph.constant([[0.0]], DOUBLE)], kind=BOOL, width=width)
    smallest = _row(graph, constants, 1, DOUBLE)
    positive = graph.node("Where", [below, smallest, shifted], kind=DOUBLE, width=width)
    logarithm = graph.node("Log", [positive], kind=DOUBLE, width=width)
    if any(column[2] != 1.0 for column in constants):
        logarithm = graph.node("Div", [logarithm, _row(graph, constants, 2, DOUBLE)], kind=DOUBLE, width=width)
    return graph.node("Cast", [logarithm], width=width, to=FLOAT)


def emit_integer(graph: Graph, block: str, width: int) -> str:
    """Cut off fractions: towards zero."""
    size = graph.node("Floor", [graph.node("Abs", [block], width=width)], width=width)
    return graph.node("Mul", [size, graph.node("Sign", [block], width=width)], width=width)


def emit_boolean(graph: Graph, block: str, width: int) -> str:
    """0 stays 0, missing stays missing, all else is 1."""
    zero = graph.constant([[0.0]])
    known = graph.node(
        "Where",
        [graph.node("Equal", [block, zero], kind=BOOL, width=width), zero, graph.constant([[1.0]])],
        width=width,
    )
    return graph.node("Where", [graph.node("IsNaN", [block], kind=BOOL, width=width), block, known], width=width)


# op -> (fit, emission, the type of the result; None = as before)
NUMERIC: dict[str, tuple[Callable[..., Constants], Callable[[Graph, str, Sequence[Constants]], str], str | None]] = {
    "fill-missing": (fit_fill, emit_fill, None),
    "standardise": (fit_standardise, emit_standardise, "number"),
    "min-max": (fit_min_max, emit_min_max, "number"),
    "clip": (fit_clip, emit_clip, None),
    "log": (fit_log, emit_log, "number"),
}


def _row(graph: Graph, constants: Sequence[Constants], position: int, kind: int = FLOAT) -> str:
    return graph.constant([[column[position] for column in constants]], kind)


def _known(values: np.ndarray, name: str) -> np.ndarray:
    known = values[~np.isnan(values)].astype(np.float64)
    if np.isinf(known).any():
        raise InvalidInput(
            f"column {name!r} has infinite values; clip it first with low and high", param=name, code="infinite_value"
        )
    return known


def _number(value: Any, name: str) -> float:
    if isinstance(value, str):
        raise InvalidInput(
            f"fill-missing: column {name!r} holds numbers; value must be a number, not {value[:80]!r}", param=name
        )
    return float(value)
