"""Sentences that are made up, whose words are to be tagged: people, places and the rest.

A surname and a place look the same, and few come twice: what stands before tells them apart.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from modelworks.core.types import Column
from tests.learning import Table

_FIRST = ("Anna", "Bert", "Carla", "Dmitri", "Eva", "Farid", "Grace", "Hugo", "Ines", "Jan")
_PARTS = ("ber", "gen", "holm", "stad", "ley", "mont", "ridge", "vik", "dorf", "ton")
_VERBS = ("met", "left", "likes", "visited", "called", "saw")
_REST = ("yesterday", "again", "in 1998", "with joy", "for three days", "and went home")


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """[{"tokens", "tags"}]: `Anna Vikley met Bert in Stadholm yesterday`, with BIO tags."""
    random = np.random.default_rng(seed)

    def word(*parts: str) -> str:
        return "".join(str(random.choice(part)) for part in parts).capitalize()

    def person() -> list[tuple[str, str]]:
        found = [(str(random.choice(_FIRST)), "B-PER")]
        return [*found, (word(_PARTS, _PARTS), "I-PER")] if random.random() < 0.6 else found

    made = []
    for _ in range(count):
        line = [*person(), (str(random.choice(_VERBS)), "O"), *person()]
        if random.random() < 0.7:
            line += [("in", "O"), (word(_PARTS, _PARTS), "B-LOC")]
        line += [(text, "O") for text in str(random.choice(_REST)).split()]
        made.append({"tokens": [text for text, _ in line], "tags": [tag for _, tag in line]})
    return made


def table(count: int, seed: int = 0) -> Table:
    rows = sentences(count, seed)
    columns = {name: [json.dumps(row[name], separators=(",", ":")) for row in rows] for name in ("tokens", "tags")}
    return pa.table(columns), [Column(name=name, type="sequence") for name in columns]
