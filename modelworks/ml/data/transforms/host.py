"""Host transforms: what ONNX cannot hold runs here before the graph, the same code in training and in the replica.

A state is JSON: {"kind", "column" (the raw column, for errors), "input" (or "inputs"), "output", ...}.
Results are float32 [n, k], or blocks: uint8 [n, c, h, w] of images, float32 [n, samples] of sounds, int64 [n, length] of
tokens, float32 [n, length, k] of sequences. Imports numpy only, and what a kind needs when it is compiled.
Each row's result depends on that row alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput

Batch = dict[str, np.ndarray]
Step = Callable[..., np.ndarray]

# Scripts that are written without spaces: each character counts as a word (kana, Han; Hangul has spaces).
_SPACELESS = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SPACELESS}]|(?:(?![{_SPACELESS}])\w){{2,}}")
_SPACE = re.compile(r"\s+")
_PERIODS = {"month": 12.0, "day": 31.0, "weekday": 7.0, "hour": 24.0, "minute": 60.0, "dayofyear": 366.0}
TOKENS_AT_ONCE = 16_384  # padding included
_TRUE = frozenset({"true", "t", "yes", "y", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "0"})


def apply_host(states: list[dict[str, Any]], batch: Batch) -> Batch:
    """`batch` and what `states` make from it, in order. InvalidInput names the column of a value it cannot read."""
    return compile_host(states)(batch)


def compile_host(states: list[dict[str, Any]]) -> Callable[[Batch], Batch]:
    """`apply_host` with the states read once: for a replica, which applies them to every call."""
    steps = [(state.get("inputs") or [state["input"]], state["output"], _KINDS[state["kind"]](state)) for state in states]

    def apply(batch: Batch) -> Batch:
        out = dict(batch)
        for sources, target, step in steps:
            out[target] = step(*(np.ravel(out[source]) for source in sources))
        return out

    return apply


def block_of(state: dict[str, Any]) -> tuple[str, tuple[int, ...]] | None:
    """(numpy type, shape behind the rows) of a state that makes a block; None for one that makes columns."""
    if state["kind"] == "image":
        return "uint8", (state["channels"], *state["size"])
    if state["kind"] == "audio":
        return "float32", (state["samples"],)
    return ("int64", (state["length"],)) if state["kind"] == "tokens" else None


def rows_at_once(states: list[dict[str, Any]]) -> int | None:
    """How many rows of token sequences may run through a graph together; None: as many as one likes."""
    lengths = [state["length"] for state in states if state["kind"] in ("tokens", "elements")]
    return max(1, TOKENS_AT_ONCE // max(lengths)) if lengths else None


def output_names(state: dict[str, Any]) -> list[str]:
    """What to call the columns of a state's output, in order: `when:month`, `body:word`, `body:hash0`."""
    column = state["column"]
    if state["kind"] == "date-parts":
        return [f"{column}:{label}" for label in _part_labels(state)]
    if state["kind"] == "tf-idf":
        return [f"{column}:{term}" for term in state["vocabulary"]]
    if state["kind"] == "hashing":
        return [f"{column}:hash{index}" for index in range(state["n_features"])]
    return [column]


def tokens(text: str, state: dict[str, Any]) -> Iterable[str]:
    """The terms of `text`, with repetitions: n-grams of words (joined by a space) or of characters."""
    if state["lowercase"]:
        text = text.lower()
    shortest, longest = state["ngram"]
    if state["analyzer"] == "char":
        text = _SPACE.sub(" ", text)
        for size in range(shortest, longest + 1):
            for start in range(len(text) - size + 1):
                yield text[start : start + size]
        return
    words = _WORD.findall(text)
    for size in range(shortest, longest + 1):
        for start in range(len(words) - size + 1):
            yield words[start] if size == 1 else " ".join(words[start : start + size])


# kinds


def _fill(state: dict[str, Any]) -> Step:
    value = state["value"]

    def apply(values: np.ndarray) -> np.ndarray:
        out = np.empty(len(values), dtype=object)
        out[:] = [text or value for text in values.tolist()]
        return out

    return apply


def _parse(state: dict[str, Any]) -> Step:
    """Texts that are numbers or booleans -> float32 [n, 1], NaN = missing."""
    column, to = state["column"], state["to"]
    read = _read_boolean if to == "boolean" else _read_integer if to == "integer" else _read_number

    def apply(values: np.ndarray) -> np.ndarray:
        out = np.empty((len(values), 1), dtype=np.float32)
        for row, text in enumerate(values.tolist()):
            try:
                out[row, 0] = read(text.strip()) if text else math.nan
            except (ValueError, OverflowError):
                raise InvalidInput(
                    f"column {column!r} has the value {text[:80]!r}, which is not a {to}",
                    param=column,
                    code="bad_value",
                ) from None
        return out

    return apply


def _read_number(text: str) -> float:
    value = float(text)
    if not abs(value) <= 3.4028235e38 or "_" in text:
        raise ValueError(text)
    return value


def _read_integer(text: str) -> float:
    return float(math.trunc(_read_number(text)))


def _read_boolean(text: str) -> float:
    lowered = text.lower()
    if lowered not in _TRUE and lowered not in _FALSE:
        raise ValueError(text)
    return 1.0 if lowered in _TRUE else 0.0


def _date_parts(state: dict[str, Any]) -> Step:
    """ISO 8601 texts -> float32 [n, parts] in UTC (a time without a zone counts as UTC), NaN = missing."""
    column, parts, cyclic = state["column"], state["parts"], state["cyclic"]

    def apply(values: np.ndarray) -> np.ndarray:
        times = _times(values, column)
        columns: list[np.ndarray] = []
        for part in parts:
            value = _part(times, part)
            if cyclic and part in _PERIODS:
                angle = value * (2 * math.pi / _PERIODS[part])
                columns += [np.sin(angle), np.cos(angle)]
            else:
                columns.append(value)
        out = np.stack(columns, axis=1)
        out[np.isnat(times)] = np.nan
        return out.astype(np.float32)

    return apply


def _part_labels(state: dict[str, Any]) -> list[str]:
    labels: list[str] = []
    for part in state["parts"]:
        labels += [f"{part}_sin", f"{part}_cos"] if state["cyclic"] and part in _PERIODS else [part]
    return labels


def _times(values: np.ndarray, column: str) -> np.ndarray:
    """ISO 8601 texts -> datetime64[us] in UTC."""
    stamps: list[datetime | None] = []
    for text in values.tolist():
        if not text:
            stamps.append(None)
            continue
        try:
            stamp = datetime.fromisoformat(text)
            stamps.append(stamp if stamp.tzinfo is None else stamp.astimezone(UTC).replace(tzinfo=None))
        except (ValueError, OverflowError):
            raise InvalidInput(
                f"column {column!r} has the value {text[:80]!r}, "
                "which is not an ISO 8601 time such as 2024-05-31T08:30:00Z",
                param=column,
                code="bad_value",
            ) from None
    return np.array(stamps, dtype="datetime64[us]")


def _part(times: np.ndarray, part: str) -> np.ndarray:
    """float64 [n]; meaningless where the time is missing."""
    days = times.astype("datetime64[D]")
    months = times.astype("datetime64[M]")
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday; Monday is 0
    if part == "year":
        value = times.astype("datetime64[Y]").astype(np.int64) + 1970
    elif part == "month":
        value = months.astype(np.int64) % 12 + 1
    elif part == "day":
        value = (days - months).astype(np.int64) + 1
    elif part == "weekday":
        value = weekday
    elif part == "is_weekend":
        value = (weekday >= 5).astype(np.int64)
    elif part == "dayofyear":
        value = (days - times.astype("datetime64[Y]")).astype(np.int64) + 1
    elif part == "hour":
        value = times.astype("datetime64[h]").astype(np.int64) % 24
    else:
        value = times.astype("datetime64[m]").astype(np.int64) % 60
    return value.astype(np.float64)


def _tf_idf(state: dict[str, Any]) -> Step:
    """Texts -> float32 [n, terms]: count (or 1 + ln count) x idf, each row of length 1, or all zeros."""
    index = {term: position for position, term in enumerate(state["vocabulary"])}
    idf, sublinear = state["idf"], state["sublinear"]

    def weigh(text: str) -> dict[int, float]:
        counts: dict[int, float] = {}
        for term in tokens(text, state):
            position = index.get(term)
            if position is not None:
                counts[position] = counts.get(position, 0.0) + 1.0
        return {p: (1.0 + math.log(count) if sublinear else count) * idf[p] for p, count in counts.items()}

    return _rows(weigh, len(index))


def _hashing(state: dict[str, Any]) -> Step:
    """Texts -> float32 [n, n_features]: signed counts by the xxh64 of each term, each row of length 1, or all zeros."""
    import xxhash

    width = state["n_features"]
    digest = xxhash.xxh64_intdigest

    def weigh(text: str) -> dict[int, float]:
        counts: dict[int, float] = {}
        for term in tokens(text, state):
            code = digest(term.encode("utf-8", "surrogatepass"))
            position = (code & 0x7FFFFFFFFFFFFFFF) % width
            counts[position] = counts.get(position, 0.0) + (1.0 if code >> 63 else -1.0)
        return counts

    return _rows(weigh, width)


def _rows(weigh: Callable[[str], dict[int, float]], width: int) -> Step:
    """A dense matrix from each text's weights by position, scaled to length 1."""

    def apply(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(values), width), dtype=np.float32)
        for row, text in enumerate(values.tolist()):
            weights = weigh(text)
            length = math.sqrt(math.fsum(weight * weight for weight in weights.values()))
            if length > 0:
                out[row, list(weights)] = [weight / length for weight in weights.values()]
        return out

    return apply


def _image(state: dict[str, Any]) -> Step:
    """Files -> uint8 [n, c, h, w]."""
    from modelworks.ml.data.media import image_array

    size, channels, fit = tuple(state["size"]), state["channels"], state["fit"]
    return _decoded(state, (channels, *size), np.uint8, lambda data: image_array(data, size, channels, fit))


def _audio(state: dict[str, Any]) -> Step:
    """Files -> float32 [n, samples]."""
    from modelworks.ml.data.media import waveform

    rate, samples, align = state["rate"], state["samples"], state["align"]
    return _decoded(state, (samples,), np.float32, lambda data: waveform(data, rate, samples, align))


def _decoded(state: dict[str, Any], shape: tuple[int, ...], dtype: Any, decode: Callable[[bytes], np.ndarray]) -> Step:
    """A missing file is all zeros."""
    from modelworks.ml.data.media import Unreadable, raw

    def apply(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(values), *shape), dtype=dtype)
        for row, value in enumerate(values.tolist()):
            data = value.encode() if isinstance(value, str) else value
            if not data:
                continue
            try:
                out[row] = decode(raw(data))
            except Unreadable as error:
                raise InvalidInput(
                    f"the {state['kind']} of the feature {state['column']!r} in row {row} {error}; send another file",
                    param=state["column"],
                    code="bad_media",
                    detail={"row": row, "feature": state["column"]},
                ) from None
        return out

    return apply


def _tokens(state: dict[str, Any]) -> Step:
    """Texts -> int64 [n, length]: token numbers, cut and padded."""
    from modelworks.ml.data.tokens import encoder

    encode, length, pad = encoder(state["tokenizer"]), state["length"], state["pad"]
    end = state.get("end", [])[-length:]

    def apply(values: np.ndarray) -> np.ndarray:
        out = np.full((len(values), length), pad, dtype=np.int64)
        for row, ids in enumerate(encode([str(value) for value in values.tolist()])):
            kept = ids if len(ids) <= length else [*ids[: length - len(end)], *end]
            out[row, : len(kept)] = kept
        return out

    return apply


def _elements(state: dict[str, Any]) -> Step:
    """Sequences -> float32 [n, length, channels]."""
    from modelworks.ml.data.transforms.elements import compile_elements

    return compile_elements(state)


_KINDS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "elements": _elements,
    "image": _image,
    "audio": _audio,
    "tokens": _tokens,
    "fill": _fill,
    "parse": _parse,
    "date-parts": _date_parts,
    "tf-idf": _tf_idf,
    "hashing": _hashing,
}
