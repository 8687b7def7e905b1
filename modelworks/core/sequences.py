"""A sequence as a column's value: a list of texts, or of numbers. It is kept and sent as its JSON text."""

from __future__ import annotations

import math
from typing import Any

import msgspec

WORDS = "a list of texts, or of numbers"
MAX_ELEMENTS = 100_000


def dump(values: Any, *, floats: bool = False) -> str:
    """The JSON text of a list of texts or of numbers; `floats`: integers are written as floats. ValueError for any other."""
    if type(values) is not list or len(values) > MAX_ELEMENTS:
        raise ValueError(WORDS)
    kinds = set(map(type, values))
    if not (kinds <= {str} or kinds <= {int, float}):
        raise ValueError(WORDS)
    try:
        if float in kinds or floats:
            values = [float(value) for value in values]
            if not all(map(math.isfinite, values)):
                raise ValueError(WORDS)
        return msgspec.json.encode(values).decode()
    except (OverflowError, UnicodeEncodeError):
        raise ValueError(WORDS) from None


def load(text: str) -> list[Any]:
    """The list that `text` is: JSON, or words with blanks between them. ValueError where it holds anything else."""
    if not text.lstrip().startswith("["):
        return text.split()
    try:
        values = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise ValueError(WORDS) from None
    dump(values)
    found: list[Any] = values
    return found
