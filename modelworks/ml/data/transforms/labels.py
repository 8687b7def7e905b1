"""Transforms of labels (categories, short texts): fitted on strings, emitted as look-ups in the graph. "" = missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.ml.data.transforms import catalogue as ops
from modelworks.ml.graph import BOOL, FLOAT, INT64, ML, STRING, Graph

NO_LABEL = "missing"  # fills a column that has no value at all


def fit_fill(values: np.ndarray, params: ops.FillMissing, name: str, type_: str) -> str:
    """The text to fill in; of equally frequent ones the first in sorted order."""
    if params.strategy in ("mean", "median"):
        raise InvalidInput(
            f"fill-missing: column {name!r} holds texts, which have no {params.strategy}; use most-frequent",
            param=name,
            code="bad_transform",
        )
    if params.value is not None:
        if type_ == "time":
            _check_time(str(params.value), name)
        return str(params.value)
    counts = _counts(values)
    return min(counts, key=lambda label: (-counts[label], label)) if counts else _nothing(name, type_)


def emit_fill(graph: Graph, tensor: str, value: str) -> str:
    # Equal has no strings at opset 18; a look-up has
    code = graph.node(
        "LabelEncoder", [tensor], domain=ML, kind=INT64, keys_strings=[""], values_int64s=[1], default_int64=0
    )
    missing = graph.node("Cast", [code], kind=BOOL, to=BOOL)
    return graph.node("Where", [missing, graph.constant([[value]], STRING), tensor], kind=STRING)


def fit_group_rare(values: np.ndarray, params: ops.GroupRare) -> list[str]:
    """The labels that are kept, sorted."""
    counts = _counts(values)
    least = params.min_count or (params.min_share or 0.01) * counts.total()
    return sorted(label for label, count in counts.items() if count >= least)


def emit_group_rare(graph: Graph, tensor: str, kept: Sequence[str], other: str) -> str:
    known = [*kept, ""]
    return graph.node(
        "LabelEncoder", [tensor], domain=ML, kind=STRING, keys_strings=known, values_strings=known, default_string=other
    )


def fit_one_hot(values: np.ndarray, params: ops.OneHot, type_: str) -> list[str]:
    """The labels that get a column, sorted; the `max_categories` most frequent if there are more."""
    counts = _counts(values)
    frequent = sorted(counts, key=lambda label: (-counts[label], label))[: params.max_categories]
    return _sorted(frequent, type_)


def emit_one_hot(graph: Graph, tensor: str, labels: Sequence[str]) -> str:
    """[N, 1] strings -> [N, len(labels)]; unknown and missing ones are zeros."""
    wide = graph.node("OneHotEncoder", [tensor], domain=ML, width=len(labels), cats_strings=list(labels), zeros=1)
    return graph.node("Squeeze", [wide, graph.constant([1], INT64)], width=len(labels))


def fit_ordinal(values: np.ndarray, params: ops.Ordinal, type_: str) -> list[str]:
    """The labels from lowest to highest."""
    return list(params.order) if params.order else _sorted(list(_counts(values)), type_)


def emit_ordinal(graph: Graph, tensor: str, labels: Sequence[str], unknown: float) -> str:
    return graph.node(
        "LabelEncoder",
        [tensor],
        domain=ML,
        kind=FLOAT,
        keys_strings=list(labels),
        values_floats=[float(position) for position in range(len(labels))],
        default_float=unknown,
    )


def _check_time(text: str, name: str) -> None:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(
            f"fill-missing: column {name!r} holds times; value must be an ISO 8601 time, not {text[:80]!r}",
            param=name,
            code="bad_transform",
        ) from None


def _nothing(name: str, type_: str) -> str:
    if type_ == "time":
        raise InvalidInput(
            f"fill-missing: column {name!r} has no value at all; give a constant or drop it",
            param=name,
            code="bad_transform",
        )
    return NO_LABEL


def _counts(values: np.ndarray) -> Counter[str]:
    counts = Counter(values.tolist())
    counts.pop("", None)
    return counts


def _sorted(labels: list[str], type_: str) -> list[str]:
    return sorted(labels, key=int) if type_ == "integer" and all(_is_int(label) for label in labels) else sorted(labels)


def _is_int(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
