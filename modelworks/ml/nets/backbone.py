"""Registered models as what others are built on: a text encoder with its tokenizer, or an image model. Light: numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from modelworks.core.embedding import EMBEDDING
from modelworks.core.errors import InvalidInput
from modelworks.ml.graph import INT64, OPSET
from modelworks.ml.imported import ImportedGraph, Node, attributes_of, read_graph
from modelworks.ml.package import Package
from modelworks.ml.runtimes.encoder import MODEL_FILE, SETTINGS_FILE, TOKENIZER_FILE, Settings

_SIDE = 224  # where the graph leaves it free
_KEPT: dict[str, Any] = {}  # digest -> backbone


@dataclass(frozen=True)
class TextBackbone:
    """Token numbers and their mask [n, l] to vectors [n, width]. `end`: tokens that stay at the end of a text that is cut."""

    graph: ImportedGraph
    tokenizer: dict[str, Any]
    settings: Settings
    end: list[int]

    @property
    def width(self) -> int:
        return int(self.graph.shape[-1] or 0)


@dataclass(frozen=True)
class ImageBackbone:
    """Images [n, channels, height, width] to vectors [n, k], or maps [n, k, h, w]. `size`: None where it is free."""

    graph: ImportedGraph
    channels: int
    size: tuple[int, int] | None

    @property
    def default_size(self) -> tuple[int, int]:
        return self.size or (_SIDE, _SIDE)


def text_backbone(package: Package, ref: str, param: str) -> TextBackbone:
    """InvalidInput when `package` is no embedding model of texts."""
    manifest = package.manifest
    if manifest.task != EMBEDDING or manifest.runtime != "encoder":
        raise InvalidInput(
            f"{ref} does {manifest.task}, and this takes an embedding model of texts; register one, for example by "
            "`modelworks run recipes/embed.toml`",
            code="wrong_task",
            param=param,
        )
    kept = _KEPT.get(manifest.digest)
    if not isinstance(kept, TextBackbone):
        settings = msgspec.json.decode(package.path(SETTINGS_FILE).read_bytes(), type=Settings)
        tokenizer = json.loads(package.path(TOKENIZER_FILE).read_bytes())
        graph = read_graph(package.path(MODEL_FILE).read_bytes(), OPSET[""])
        graph = _width_known(graph, manifest.signature.outputs[0].shape)
        kept = _keep(manifest.digest, TextBackbone(graph, tokenizer, settings, _end(tokenizer)))
    return kept


def image_backbone(package: Package, ref: str, param: str) -> ImageBackbone:
    """InvalidInput when `package` is no ONNX model with one input of images."""
    manifest = package.manifest
    if manifest.runtime != "onnx" or manifest.host_transforms or MODEL_FILE not in manifest.files:
        raise InvalidInput(
            f"{ref} is no plain ONNX model of images; register one whose input is [-1, channels, height, width]",
            code="wrong_task",
            param=param,
        )
    kept = _KEPT.get(manifest.digest)
    if isinstance(kept, ImageBackbone):
        return kept
    graph = read_graph(package.path(MODEL_FILE).read_bytes(), OPSET[""])
    shape = graph.inputs[0][1] if len(graph.inputs) == 1 else ()
    if len(shape) != 3 or shape[0] not in (1, 3) or len(graph.shape) not in (1, 3):
        raise InvalidInput(
            f"{ref} has the inputs {[[None, *sizes] for _, sizes in graph.inputs]}; a backbone of images has one, "
            "[-1, 1 or 3, height, width], and gives [-1, k] or [-1, k, h, w]",
            code="wrong_task",
            param=param,
        )
    channels, height, width = shape[0], *shape[1:]
    return _keep(manifest.digest, ImageBackbone(graph, channels, (height, width) if height and width else None))


def _keep(digest: str, backbone: Any) -> Any:
    """Of the last one: each fold and the final fit ask for it again."""
    _KEPT.clear()
    _KEPT[digest] = backbone
    return backbone


def _width_known(graph: ImportedGraph, declared: list[int]) -> ImportedGraph:
    """The signature tells the width where the file leaves it free."""
    return replace(graph, shape=(*graph.shape[:-1], declared[-1]))


def _end(tokenizer: dict[str, Any]) -> list[int]:
    """The tokens that the tokenizer puts behind a text."""
    from modelworks.ml.data.tokens import load

    found = load(tokenizer)
    whole, bare = found.encode("a").ids, found.encode("a", add_special_tokens=False).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[start + len(bare) :])
    return []


Add = Callable[[str, list[str], int, str, dict[str, Any]], list[str]]
"""Adds a node to a graph: operator, inputs, number of outputs, domain, attributes -> the names of its outputs."""
Constant = Callable[[Any], str]


def write_encoder(
    add: Add, constant: Constant, backbone: TextBackbone, tokens: str, trained: dict[str, np.ndarray] | None = None
) -> str:
    """The vectors [n, width] of `tokens`, float [n, l], in a graph. What is padding in all rows is cut off before."""

    def one(op: str, *inputs: str, **attributes: Any) -> str:
        return add(op, list(inputs), 1, "", attributes)[0]

    first, along = constant(np.array([0])), constant(np.array([1]))
    ids = one("Cast", tokens, to=INT64)
    mask = one("Cast", one("Not", one("Equal", ids, constant(np.array(backbone.settings.pad_id)))), to=INT64)
    counts = one("ReduceSum", mask, along, keepdims=0)
    longest = one("ReduceMax", one("Concat", counts, along, axis=0), first, keepdims=1)
    given = [one("Slice", each, first, longest, along) for each in (ids, mask)]
    return write_graph(add, constant, backbone.graph, given, trained)


def write_images(
    add: Add, constant: Constant, backbone: ImageBackbone, images: str, trained: dict[str, np.ndarray] | None = None
) -> str:
    """The vectors [n, k] of images [n, c, h, w] in a graph; maps become their means."""
    found = write_graph(add, constant, backbone.graph, [images], trained)
    if len(backbone.graph.shape) == 3:
        found = add("ReduceMean", [found, constant(np.array([2, 3]))], 1, "", {"keepdims": 0})[0]
    return found


def write_graph(
    add: Add, constant: Constant, graph: ImportedGraph, inputs: list[str], trained: dict[str, np.ndarray] | None = None
) -> str:
    """The graph in another, with `trained` in place of its own weights."""
    values = graph.constants | (trained or {})

    def node(one: Node, names: list[str]) -> list[str]:
        return add(one.op, names, len(one.outputs), one.domain, attributes_of(one))

    given = {name: tensor for (name, _), tensor in zip(graph.inputs, inputs, strict=True)}
    return graph.copy(given, node, lambda name: constant(values[name]))
