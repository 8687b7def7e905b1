"""Fits of what decodes: the common size of images, the length of sounds, the tokenizer of texts."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.ml.base import Models
from modelworks.ml.data import media
from modelworks.ml.data.transforms import media_params as ops

if TYPE_CHECKING:
    from modelworks.ml.nets.backbone import TextBackbone

LOOKED_AT = 2000  # files whose headers are read
_SIDE = 64  # the greatest side that is chosen for images of different sizes
_SECONDS = 10.0
_COVERED = 0.98
_TOKENS = 256
_MAX_JSON = 16 << 20
_STEP = 8  # lengths of token sequences are multiples of it


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them, evenly spread."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]


def fit_media(params: Any, values: np.ndarray, name: str, models: Models | None = None) -> dict[str, Any]:
    """The state of a decoding op without its wiring. values [n]: files (bytes) or texts of the rows that training keeps."""
    if isinstance(params, ops.Resize):
        return _images(params, values, name)
    if isinstance(params, ops.Resample):
        return _sounds(params, values, name)
    if params.model is not None or isinstance(params, ops.Embed):
        return _texts_for(text_model(models, params.model), params, values)
    return _texts(params, values, name)


def _images(params: ops.Resize, values: np.ndarray, name: str) -> dict[str, Any]:
    sizes: Counter[tuple[int, int]] = Counter()
    grey = params.colour != "rgb"
    if params.size is None or params.colour == "auto":
        for data in spread(values, LOOKED_AT).tolist():
            if data:
                header = _header(media.image_header, data, name)
                sizes[header["height"], header["width"]] += 1
                grey = grey and (params.colour == "grey" or header["mode"] in ("1", "L", "I", "I;16", "I;16B", "F"))
    size = params.size or _common(sizes)
    return {"kind": "image", "size": list(size), "channels": 1 if grey else 3, "fit": params.fit}


def _common(sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    """The one size that there is, else the median height and width, made smaller together if need be."""
    if not sizes:
        return _SIDE, _SIDE
    if len(sizes) == 1 and max(next(iter(sizes))) <= ops.MAX_SIDE:
        return next(iter(sizes))
    height, width = (float(np.median([size[axis] for size in sizes.elements()])) for axis in (0, 1))
    scale = min(1.0, _SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _sounds(params: ops.Resample, values: np.ndarray, name: str) -> dict[str, Any]:
    seconds = params.seconds
    if seconds is None:
        known = [_header(media.sound_header, data, name)["seconds"] for data in spread(values, LOOKED_AT).tolist() if data]
        seconds = min(_SECONDS, max(known, default=1.0))
    samples = max(1, math.ceil(seconds * params.rate))
    return {"kind": "audio", "rate": params.rate, "samples": samples, "align": params.align}


def _texts(params: ops.Tokenise, values: np.ndarray, name: str) -> dict[str, Any]:
    from modelworks.ml.data import tokens

    if params.tokenizer is not None:
        made = _given(params.tokenizer, "transforms.tokenizer")
    else:
        made = tokens.learn([str(value) for value in values.tolist()], params.vocabulary, params.lowercase)
    vocabulary, pad = tokens.facts(made)
    length = params.length or _covering(made, values)
    return {"kind": "tokens", "tokenizer": made, "length": length, "vocabulary": vocabulary, "pad": pad}


def _covering(made: dict[str, Any], values: np.ndarray) -> int:
    """The length that most of the texts keep within."""
    from modelworks.ml.data import tokens

    some = [str(value) for value in spread(values, LOOKED_AT).tolist()]
    counts = sorted(map(len, tokens.encoder(made)(some)))
    covered = counts[math.ceil(_COVERED * len(counts)) - 1] if counts else 1
    return max(_STEP, min(_TOKENS, -(-covered // _STEP) * _STEP))


def text_model(models: Models | None, ref: str | None, param: str = "transforms") -> TextBackbone:
    """The registered embedding model `ref`."""
    from modelworks.ml.nets.backbone import text_backbone

    if models is None or not ref:
        raise InvalidInput("name a registered embedding model in model", param=param, code="model_not_found")
    return text_backbone(models(ref), ref, param)


def _texts_for(backbone: TextBackbone, params: ops.Tokenise | ops.Embed, values: np.ndarray) -> dict[str, Any]:
    """Tokens as an embedding model reads them. `end`: what stays at the end of a text that is cut."""
    from modelworks.ml.data import tokens

    made, most = backbone.tokenizer, backbone.settings.max_tokens
    if params.length and params.length > most:
        raise InvalidInput(f"{params.model} reads at most {most} tokens; lower length", param="transforms.length", code="bad_transform")
    return {
        "kind": "tokens", "tokenizer": made, "length": params.length or min(most, _covering(made, values)),
        "vocabulary": tokens.facts(made)[0], "pad": backbone.settings.pad_id, "end": backbone.end, "model": params.model,
    }  # fmt: skip


def _given(source: dict[str, Any] | str, where: str) -> dict[str, Any]:
    """A tokenizer that the user names: its JSON, or `package:DIST/PATH` of a tokenizer.json. InvalidInput."""
    from modelworks.ml.data import tokens

    if isinstance(source, str) and source.startswith("package:"):
        from modelworks.ml.data.sources import package_file

        path = package_file(source.removeprefix("package:"))
        if path.stat().st_size > _MAX_JSON:
            raise InvalidInput(f"the tokenizer has more than {_MAX_JSON} bytes", param=where, code="bad_tokenizer")
        source = path.read_text("utf-8")
    if isinstance(source, str):
        try:
            source = json.loads(source)
        except (ValueError, RecursionError):
            source = {}
    if not isinstance(source, dict) or "model" not in source:
        raise InvalidInput(
            "tokenizer must be the JSON of a tokenizer.json, or package:DIST/PATH of one", param=where, code="bad_tokenizer"
        )
    tokens.load(source, where)
    return source


def _header(read: Any, data: bytes, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read(media.raw(data))
        return found
    except media.Unreadable as error:
        raise InvalidInput(f"a file of the column {name!r} {error}", code="bad_media", param=name) from None
