"""Sequences as numbers, element by element: the same code in training and in the replica. Imports numpy alone.

Of a text there are four numbers: itself in lower case, its first character, its last three, and its shape (`Xxxx`, `dd`), so
that one which training never met is still like others (as spaCy's MultiHashEmbed does). 0 is padding, 1 not known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from modelworks.core import sequences
from modelworks.core.errors import InvalidInput

PAD, UNKNOWN = 0, 1
MOST = 50_000  # entries of a vocabulary
_CODES = 1000  # different integers that are names; of more, they are quantities
_RUN = re.compile(r"(.)\1{3,}")


def views(text: str) -> tuple[str, str, str, str]:
    low = text.lower()
    shape = "".join("d" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c for c in text[:40])
    return low, low[:1], low[-3:], _RUN.sub(r"\1\1\1\1", shape)


def fit(name: str, rows: Sequence[list[Any]], length: int) -> dict[str, Any]:
    """How one column's elements become numbers, told from training rows."""
    elements = [value for row in rows for value in row[:length]]
    if all(isinstance(value, str) for value in elements):
        counts = [Counter(parts) for parts in zip(*map(views, elements), strict=True)] if elements else [Counter() for _ in range(4)]
        return {"name": name, "kind": "texts", "vocabularies": [_kept(one) for one in counts]}
    if all(isinstance(value, int) for value in elements) and len(set(elements)) <= _CODES:
        return {"name": name, "kind": "codes", "vocabularies": [_kept(Counter(map(str, elements)))]}
    numbers = np.array(elements, dtype=np.float64)
    scale = float(numbers.std())
    return {"name": name, "kind": "numbers", "mean": float(numbers.mean()), "scale": scale if scale > 0 else 1.0}


def _kept(counts: Counter[str]) -> list[str]:
    """The most frequent, none that came but once: from those is learnt what an unknown one is."""
    return [text for text, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])) if count > 1][:MOST]


def sizes(columns: Iterable[dict[str, Any]]) -> list[int | None]:
    """Of each channel behind the mask: how many different numbers there are; None of a quantity."""
    found: list[int | None] = []
    for column in columns:
        found += [None] if column["kind"] == "numbers" else [len(one) + 2 for one in column["vocabularies"]]
    return found


def compile_elements(state: dict[str, Any]) -> Callable[..., np.ndarray]:
    """What turns columns of sequences (JSON) into float32 [n, length, 1 + channels]; the first tells where there is one."""
    length, columns = int(state["length"]), state["columns"]
    readers = [_reader(column) for column in columns]
    width = 1 + len(sizes(columns))

    def apply(*given: np.ndarray) -> np.ndarray:
        out = np.zeros((len(given[0]), length, width), dtype=np.float32)
        for row, texts in enumerate(zip(*given, strict=True)):
            at, count = 1, -1
            for column, text, read in zip(columns, texts, readers, strict=True):
                values = _list(text, column["name"], row)
                if count not in (-1, len(values)):
                    raise _wrong(f"has {len(values)} elements, and {columns[0]['name']!r} has {count}", column["name"], row)
                count = len(values)
                if count > length:
                    raise _wrong(f"has {count} elements, and the model reads at most {length}; cut it", column["name"], row)
                try:
                    made = read(values)
                except (TypeError, ValueError, AttributeError, OverflowError):
                    of = "texts" if column["kind"] == "texts" else "numbers"
                    raise _wrong(f"is not a list of {of}, as in training", column["name"], row) from None
                out[row, :count, at : at + made.shape[1]] = made
                at += made.shape[1]
            out[row, :count, 0] = 1.0
        return out

    return apply


def _reader(column: dict[str, Any]) -> Callable[[list[Any]], np.ndarray]:
    """[elements] -> float32 [elements, channels]"""
    if column["kind"] == "numbers":
        mean, scale = column["mean"], column["scale"]
        return lambda values: ((_numbers(values) - mean) / scale).astype(np.float32)[:, None]
    places = [{text: place for place, text in enumerate(known, start=2)} for known in column["vocabularies"]]
    if column["kind"] == "codes":
        return lambda values: np.array(
            [[places[0].get(str(int(value)), UNKNOWN)] for value in _numbers(values).tolist()], dtype=np.float32
        ).reshape(-1, 1)

    def texts(values: list[Any]) -> np.ndarray:
        found = [[known.get(part, UNKNOWN) for known, part in zip(places, views(value), strict=True)] for value in values]
        return np.array(found, dtype=np.float32).reshape(-1, 4)

    return texts


def _numbers(values: list[Any]) -> np.ndarray:
    if any(isinstance(value, str) for value in values):
        raise ValueError
    return np.array(values, dtype=np.float64)


def _list(text: Any, name: str, row: int) -> list[Any]:
    try:
        return sequences.load(text)
    except (ValueError, AttributeError):
        raise _wrong(f"is not {sequences.WORDS}, as JSON", name, row) from None


def _wrong(what: str, name: str, row: int) -> InvalidInput:
    return InvalidInput(
        f"inputs[{row}]: the feature {name!r} {what}", code="bad_value", param=name, detail={"row": row, "feature": name}
    )
