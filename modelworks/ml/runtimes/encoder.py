"""Texts to vectors (task embedding), or pairs of texts to scores (task rerank): tokenizers, then an ONNX graph.

Imports numpy alone; tokenizers and onnxruntime come in with `load`. Rows of one batch run in groups of like length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from modelworks.core.embedding import EMBEDDING
from modelworks.core.errors import InvalidInput, MissingExtra, ModelworksError
from modelworks.core.types import Signature
from modelworks.ml import graph
from modelworks.ml.package import Package

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "encoder.json"  # Settings
WASTE = 1.25  # a group's padded size is at most so many times its tokens
GROUP = 8192  # tokens, padding included, that run at once


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """What the graph does not say. `types`: the tokenizer's type ids are an input of the graph."""

    max_tokens: int
    pad_id: int
    types: bool = False
    pooling: str = ""
    normalised: bool = False


class _Row(NamedTuple):
    ids: list[int]
    types: list[int]


class EncoderRuntime:
    """One graph [rows, length] -> [rows, dimensions] or [rows]."""

    def __init__(self) -> None:
        self._session: Any = None
        self._tokenizer: Any = None

    def load(self, package: Package, threads: int = 1) -> Signature:
        """InvalidInput when a part of the package is not sound."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtra("text models need tokenizers; pip install 'modelworks[llm]'") from None
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        self._task = package.manifest.task
        try:
            self._settings = msgspec.json.decode(package.path(SETTINGS_FILE).read_bytes(), type=Settings)
            self._tokenizer = Tokenizer.from_str(package.path(TOKENIZER_FILE).read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare exceptions
            raise InvalidInput(f"the tokenizer cannot be read: {str(error)[:200]}", code="bad_package") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._failures = (state.Fail, state.RuntimeException, state.EPFail, state.InvalidArgument)
        try:
            self._session = graph.session(package.path(MODEL_FILE).read_bytes(), threads)
        except (*self._failures, state.InvalidProtobuf, state.InvalidGraph, state.NotImplemented) as error:
            raise InvalidInput(f"onnxruntime cannot load the model: {str(error)[:300]}", code="bad_model") from None
        self._before, self._after = self._surroundings()
        self._vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return package.manifest.signature

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of the signature. InvalidInput names the row that is too long or has an unknown token."""
        rows = self._read(inputs)
        outputs = np.zeros((len(rows), *self._trailing), dtype=np.float32)
        for group in _groups([len(row.ids) for row in rows]):
            outputs[group] = self._run([rows[index] for index in group])
        name = "embedding" if self._task == EMBEDDING else "score"
        return {name: outputs, "tokens": np.array([len(row.ids) for row in rows], dtype=np.int32)}

    def close(self) -> None:
        self._session = self._tokenizer = None

    @property
    def _trailing(self) -> tuple[int, ...]:
        return tuple(self._session.get_outputs()[0].shape[1:])

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        whole, bare = self._tokenizer.encode("a").ids, self._tokenizer.encode("a", add_special_tokens=False).ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def _read(self, inputs: dict[str, np.ndarray]) -> list[_Row]:
        if self._task == EMBEDDING:
            ids = inputs.get("token_ids")
            if ids is not None:
                rows = [self._given(line, index) for index, line in enumerate(ids.tolist())]
            else:
                rows = self._encoded(inputs["text"].tolist())
        else:
            rows = self._encoded(list(zip(inputs["query"].tolist(), inputs["document"].tolist(), strict=True)))
        cut = inputs.get("truncate")
        flags = cut.tolist() if cut is not None else [False] * len(rows)
        return [
            self._fitting(row, bool(flag), index) for index, (row, flag) in enumerate(zip(rows, flags, strict=True))
        ]

    def _encoded(self, texts: Sequence[Any]) -> list[_Row]:
        found = self._tokenizer.encode_batch_fast(texts)
        return [_Row(one.ids, one.type_ids) for one in found]

    def _given(self, line: list[int], index: int) -> _Row:
        ids = [token for token in line if token >= 0]
        if not ids or any(not 0 <= token < self._vocabulary for token in ids):
            raise InvalidInput(
                f"token_ids[{index}] must hold at least one token, each from 0 to {self._vocabulary - 1}",
                code="bad_value",
                param="token_ids",
            )
        if self._before and ids[: len(self._before)] != self._before:
            ids = [*self._before, *ids, *self._after]
        return _Row(ids, [0] * len(ids))

    def _fitting(self, row: _Row, cut: bool, index: int) -> _Row:
        most = self._settings.max_tokens
        if len(row.ids) <= most:
            return row
        if not cut:
            raise InvalidInput(
                f"the text in row {index} has {len(row.ids)} tokens, and the model takes at most {most}; "
                "shorten it, or set truncate",
                code="context_length_exceeded",
                param="document" if self._task != EMBEDDING else "text",
                detail={"tokens": len(row.ids), "context": most},
            )
        keep = most - len(self._after)
        return _Row(
            [*row.ids[:keep], *self._after], [*row.types[:keep], *row.types[-len(self._after) or None :]][:most]
        )

    def _run(self, rows: list[_Row]) -> np.ndarray:
        length = max(len(row.ids) for row in rows)
        ids = np.full((len(rows), length), self._settings.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        types = np.zeros((len(rows), length), dtype=np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row.ids)] = row.ids
            mask[at, : len(row.ids)] = 1
            types[at, : len(row.ids)] = row.types
        feed = {"input_ids": ids, "attention_mask": mask}
        if self._settings.types:
            feed["token_type_ids"] = types
        try:
            return self._session.run(None, feed)[0]
        except self._failures as error:
            raise ModelworksError(
                "the model failed on this input; the replica's log has the reason", code="model_failed"
            ) from error


def _groups(lengths: list[int]) -> Iterator[list[int]]:
    """Rows of like length, by their places: little is padded, and no group is larger than GROUP."""
    group: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(group) + 1) * lengths[index]
        if group and (padded > GROUP or padded > WASTE * (tokens + lengths[index])):
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += lengths[index]
    if group:
        yield group


def settings_bytes(settings: Settings) -> bytes:
    return json.dumps(msgspec.to_builtins(settings), sort_keys=True).encode()
