"""Judging tags: of elements, and of spans, as named entities are (CoNLL 2003).

With `B-`, `I-` (and `E-`, `S-`, `L-`, `U-`) a span is as those say; among other tags it is each run of one, but for `O`.
What is judged lies in `Predictions.output` [n, 3 + 2 l]: the row's spans that are true, said, and right; then its true tags,
and those said, -1 behind the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from modelworks.ml.evaluate.predictions import Predictions

_PREFIXED = re.compile(r"[BIESLU]-.+\Z")
_COUNTS = 3


def spans(tags: Sequence[str], prefixed: bool) -> set[tuple[int, int, str]]:
    """(first element, the one behind the last, what it is called)"""
    found: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, name = (tag[:1], tag[2:]) if prefixed and tag != "O" else ("I", "" if tag == "O" else tag)
        if kind and (mark in "BSU" or name != kind):
            found.add((start, place, kind))
            kind = ""
        if name and not kind:
            start, kind = place, name
        if kind and prefixed and mark in "ESLU":
            found.add((start, place + 1, kind))
            kind = ""
    return found


def is_prefixed(names: Sequence[str]) -> bool:
    return any(name.startswith("B-") for name in names) and all(name == "O" or _PREFIXED.match(name) for name in names)


def laid_out(true: np.ndarray, said: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
    """[n, 3 + 2 l] of tags [n, l] as indices into `names`, -1 behind the end; without names spans are not counted."""
    counts = np.full((len(true), _COUNTS), np.nan)
    if names is not None:
        known = [*names, "\0"]  # a tag that the data has not
        prefixed = is_prefixed(names)
        for row in range(len(true)):
            there = int((true[row] >= 0).sum())
            one, other = (
                spans([known[min(place, len(names))] for place in side[row, :there].tolist()], prefixed) for side in (true, said)
            )
            counts[row] = len(one), len(other), len(one & other)
    return np.concatenate([counts, true, said], axis=1).astype(np.float64)


def elements(p: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, true tag, tag said) of each element."""
    length = (p.output.shape[1] - _COUNTS) // 2
    true, said = p.output[:, _COUNTS : _COUNTS + length], p.output[:, _COUNTS + length :]
    rows, places = np.nonzero(true >= 0)
    return rows, true[rows, places].astype(np.int64), said[rows, places].astype(np.int64)


def right(p: Predictions) -> Callable[[np.ndarray], float]:
    """Share of the elements whose tag is right."""
    rows, true, said = elements(p)
    count = len(p.rows)
    there, hits = np.bincount(rows, minlength=count), np.bincount(rows, true == said, minlength=count)

    def weighed(w: np.ndarray) -> float:
        total = w @ there
        return float(w @ hits / total) if total else math.nan

    return weighed


def by_tag(which: str) -> Callable[[Predictions], Callable[[np.ndarray], float]]:
    """The mean over tags that occur."""

    def measure(p: Predictions) -> Callable[[np.ndarray], float]:
        from scipy.sparse import coo_matrix

        rows, true, said = elements(p)
        size = (int(max(true.max(initial=0), said.max(initial=0))) + 1, len(p.rows))

        def counts(tags: np.ndarray, mask: Any = slice(None)) -> Any:
            return coo_matrix((np.ones(len(tags[mask])), (tags[mask], rows[mask])), shape=size).tocsr()

        there, called, hits = counts(true), counts(said), counts(true, true == said)

        def weighed(w: np.ndarray) -> float:
            t, c, h = there @ w, called @ w, hits @ w
            over, under = {"precision": (h, c), "recall": (h, t), "f1": (2 * h, t + c)}[which]
            some = (t + c) > 0
            if not some.any():
                return math.nan
            return float(np.divide(over, under, out=np.zeros_like(h), where=under > 0)[some].mean())

        return weighed

    return measure


def of_spans(which: str) -> Callable[[Predictions], Callable[[np.ndarray], float]]:
    """Over all spans together."""

    def measure(p: Predictions) -> Callable[[np.ndarray], float]:
        def weighed(w: np.ndarray) -> float:
            true, said, hits = w @ p.output[:, :_COUNTS]
            over, under = {"precision": (hits, said), "recall": (hits, true), "f1": (2 * hits, true + said)}[which]
            return float(over / under) if under > 0 else math.nan if which == "f1" or not true else 0.0

        return weighed

    return measure
