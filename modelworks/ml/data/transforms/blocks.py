"""Transforms of blocks: images [c, h, w], waveforms [samples] and spectrograms [1, bands, frames], a tensor each.

An op has a fit (constants from some training rows) and an emission into the graph, which returns the new tensor. What
augments is applied to training features alone, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.ml.data.transforms import media_params as ops
from modelworks.ml.graph import BOOL, FLOAT, INT64, Graph

if TYPE_CHECKING:
    from modelworks.ml.nets.backbone import TextBackbone

Shape = tuple[int, ...]
Chunks = Callable[[], Iterator[np.ndarray]]  # the block's values in some training rows, a few at a time
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_FLOOR = 1e-6  # added before a logarithm


def _fit_crop(params: ops.Crop, shape: Shape, chunks: Chunks, name: str) -> dict[str, Any]:
    _, height, width = _image(shape, "crop", name)
    rows, columns = params.size
    top = (height - rows) // 2 if params.top is None else params.top
    left = (width - columns) // 2 if params.left is None else params.left
    if min(top, left) < 0 or top + rows > height or left + columns > width:
        raise InvalidInput(
            f"crop: {rows} x {columns} does not lie inside the {height} x {width} of {name!r}; make size smaller, or "
            "resize to something larger first",
            param=name,
            code="bad_transform",
        )
    return {"top": top, "left": left, "size": [rows, columns]}


def emit_embedding(graph: Graph, tokens: str, backbone: TextBackbone) -> str:
    """The vectors [N, width] of token sequences [N, length]."""
    from modelworks.ml.nets.backbone import write_encoder

    def add(op: str, inputs: list[str], outputs: int, domain: str, attributes: dict[str, Any]) -> list[str]:
        if outputs > 1:
            raise InvalidInput(f"the embedding model's operator {op} has several results, which embed does not take", code="bad_graph")
        return [graph.node(op, inputs, domain=domain, width=backbone.width, **attributes)]

    def constant(values: Any) -> str:
        return graph.constant(values, {"f": FLOAT, "b": BOOL}.get(values.dtype.kind, INT64))

    return write_encoder(add, constant, backbone, tokens)


def _emit_crop(graph: Graph, tensor: str, fitted: dict[str, Any]) -> str:
    top, left, (rows, columns) = fitted["top"], fitted["left"], fitted["size"]
    starts, ends = graph.constant([top, left], INT64), graph.constant([top + rows, left + columns], INT64)
    shape = (graph.shape(tensor)[0], rows, columns)
    return graph.node("Slice", [tensor, starts, ends, graph.constant([2, 3], INT64)], shape=shape)


def _fit_normalise(params: ops.Normalise, shape: Shape, chunks: Chunks, name: str) -> dict[str, Any]:
    channels = shape[0] if len(shape) == 3 else 1
    if params.preset or params.mean:
        means, deviations = IMAGENET if params.preset else (params.mean or [], params.std or [])
        if len(means) not in (1, channels) or len(deviations) not in (1, channels):
            raise InvalidInput(
                f"normalise: {name!r} has {channels} channels; give that many figures, or one",
                param=name,
                code="bad_transform",
            )
        return {"mean": list(means), "std": list(deviations)}
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for values in chunks():
        wide = values.reshape(len(values), channels, -1).astype(np.float64)
        count += wide.shape[0] * wide.shape[2]
        total += wide.sum(axis=(0, 2))
        squares += (wide**2).sum(axis=(0, 2))
    mean = total / max(1, count)
    deviation = np.sqrt(np.maximum(squares / max(1, count) - mean**2, 0))
    return {"mean": mean.tolist(), "std": [float(value) if value > 1e-8 else 1.0 for value in deviation]}


def _emit_normalise(graph: Graph, tensor: str, fitted: dict[str, Any]) -> str:
    shape = graph.shape(tensor)
    tail = [-1, *([1] * (len(shape) - 1))] if len(shape) == 3 else [-1]
    mean, std = (np.array(fitted[key], dtype=np.float32).reshape(tail).tolist() for key in ("mean", "std"))
    centred = graph.node("Sub", [tensor, graph.constant(mean)], shape=shape)
    return graph.node("Div", [centred, graph.constant(std)], shape=shape)


def _fit_mel(params: ops.MelSpectrogram, shape: Shape, chunks: Chunks, name: str, rate: int = 16_000) -> dict[str, Any]:
    if len(shape) != 1:
        raise InvalidInput(
            f"{name!r} is no waveform any more; put mel-spectrogram or mfcc right after resample",
            param=name,
            code="bad_transform",
        )
    high = params.high or rate / 2
    if not params.low < high <= rate / 2:
        raise InvalidInput(
            f"mel-spectrogram: low {params.low:g} and high {high:g} must be in order and at most half the rate of "
            f"{rate} Hz",
            param=name,
            code="bad_transform",
        )
    if shape[0] < params.window:
        raise InvalidInput(
            f"mel-spectrogram: a window of {params.window} samples is longer than the sounds ({shape[0]}); make it "
            "smaller",
            param=name,
            code="bad_transform",
        )
    fitted = {"window": params.window, "hop": params.hop, "bands": params.bands, "low": params.low, "high": high}
    fitted |= {"rate": rate, "log": params.log}
    return fitted | ({"coefficients": params.coefficients} if isinstance(params, ops.Mfcc) else {})


def _emit_mel(graph: Graph, tensor: str, fitted: dict[str, Any]) -> str:
    """Frames under a Hann window, their power spectrum, triangular mel bands (HTK's scale), a logarithm, a cosine
    transform. A Fourier transform as a convolution: every runtime has one.
    """
    window, hop, bands = fitted["window"], fitted["hop"], fitted["bands"]
    (samples,) = graph.shape(tensor)
    frames, bins = 1 + (samples - window) // hop, window // 2 + 1
    time = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * time / window)
    angles = 2 * np.pi * np.arange(bins)[:, None] * time[None, :] / window
    kernels = np.concatenate([np.cos(angles) * hann, -np.sin(angles) * hann])[:, None, :]
    line = graph.node("Unsqueeze", [tensor, graph.constant([1], INT64)], shape=(1, samples))
    waves = graph.node("Conv", [line, graph.constant(kernels)], shape=(2 * bins, frames), strides=[hop])
    squared = graph.node("Mul", [waves, waves], shape=(2 * bins, frames))
    # power = real part squared + imaginary part squared, so both halves share a band's weights
    weights = np.tile(mel_bands(fitted["rate"], window, bands, fitted["low"], fitted["high"]), (1, 2))
    out = graph.node("MatMul", [graph.constant(weights), squared], shape=(bands, frames))
    height = bands
    if fitted["log"]:
        lifted = graph.node("Add", [out, graph.constant([_FLOOR])], shape=(bands, frames))
        out = graph.node("Log", [lifted], shape=(bands, frames))
    if height_of := fitted.get("coefficients"):
        height = int(height_of)
        out = graph.node("MatMul", [graph.constant(cosines(height, bands)), out], shape=(height, frames))
    return graph.node("Unsqueeze", [out, graph.constant([1], INT64)], shape=(1, height, frames))


def mel_bands(rate: int, window: int, bands: int, low: float, high: float) -> np.ndarray:
    """[bands, window // 2 + 1]: triangles of height 1, evenly spread over the mel scale, 2595 lg(1 + f / 700)."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    edges = 700.0 * (10.0 ** (np.linspace(mel(low), mel(high), bands + 2) / 2595.0) - 1.0)
    bins = np.arange(window // 2 + 1) * rate / window
    rising = (bins[None, :] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins[None, :]) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0.0, np.minimum(rising, falling))


def cosines(coefficients: int, bands: int) -> np.ndarray:
    """[coefficients, bands]: the orthonormal DCT-II."""
    angles = np.pi * np.arange(coefficients)[:, None] * (np.arange(bands)[None, :] + 0.5) / bands
    out = np.sqrt(2.0 / bands) * np.cos(angles)
    out[0] /= np.sqrt(2.0)
    return out


def _fit_pool(params: ops.Pool, shape: Shape, chunks: Chunks, name: str) -> dict[str, Any]:
    frames = shape[-1]
    if len(shape) != 3 or params.segments > frames:
        raise InvalidInput(
            f"pool: {name!r} is no spectrogram of at least {params.segments} frames; put it behind mel-spectrogram or "
            "mfcc, with fewer segments",
            param=name,
            code="bad_transform",
        )
    return {"segments": params.segments}


def _emit_pool(graph: Graph, tensor: str, fitted: dict[str, Any]) -> str:
    """A product with a matrix of means: parts may differ by a frame."""
    channels, height, frames = graph.shape(tensor)
    parts = np.array_split(np.arange(frames), fitted["segments"])
    means = np.zeros((frames, len(parts)))
    for index, part in enumerate(parts):
        means[part, index] = 1.0 / len(part)
    return graph.node("MatMul", [tensor, graph.constant(means)], shape=(channels, height, len(parts)))


def _image(shape: Shape, op: str, name: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InvalidInput(f"{op}: {name!r} is no image at this step", param=name, code="bad_transform")
    return shape[0], shape[1], shape[2]


BLOCKS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Graph, str, dict[str, Any]], str]]] = {
    "crop": (_fit_crop, _emit_crop),
    "normalise": (_fit_normalise, _emit_normalise),
    "mel-spectrogram": (_fit_mel, _emit_mel),
    "mfcc": (_fit_mel, _emit_mel),
    "pool": (_fit_pool, _emit_pool),
}


def emit_pixels(graph: Graph, tensor: str) -> str:
    """uint8 0..255 as floats 0..1."""
    shape = graph.shape(tensor)
    wide = graph.node("Cast", [tensor], shape=shape, to=FLOAT)
    return graph.node("Mul", [wide, graph.constant([1.0 / 255.0])], shape=shape)


# augmentation


def augment(values: np.ndarray, params: dict[str, Any], random: np.random.Generator) -> np.ndarray:
    """A changed copy of a batch of blocks [n, ...]: float32, the same shape. Each row by its own dice."""
    out = values.copy()
    if values.ndim == 4:
        flip = params.get("flip")
        for word, axis in (("horizontal", -1), ("vertical", -2)):
            if flip in (word, "both"):
                chosen = random.random(len(out)) < 0.5
                out[chosen] = np.flip(out[chosen], axis=axis)
    if params.get("rotate") and values.ndim == 4:
        angles = np.deg2rad(random.uniform(-params["rotate"], params["rotate"], len(out)))
        out = _rotate(out, angles)
    if share := params.get("shift"):
        for axis in range(2, values.ndim) if values.ndim == 4 else [1]:
            size = values.shape[axis]
            most = int(share * size)
            out = _shift(out, random.integers(-most, most + 1, len(out)), axis)
    if params.get("noise"):
        out += random.normal(0.0, params["noise"], out.shape).astype(np.float32)
    return out


def _shift(values: np.ndarray, by: np.ndarray, axis: int) -> np.ndarray:
    """Each row moved along `axis`; what comes in is 0."""
    size = values.shape[axis]
    at = np.arange(size)[None, :] - by[:, None]
    shape = [len(values)] + [1] * (values.ndim - 1)
    shape[axis] = size
    moved = np.take_along_axis(values, np.clip(at, 0, size - 1).reshape(shape), axis)
    return np.where(((at >= 0) & (at < size)).reshape(shape), moved, np.float32(0))


def _rotate(values: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Each image turned about its middle, bilinear; what comes in is 0."""
    _, _, height, width = values.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    from_y = (sin * x + cos * y + (height - 1) / 2).astype(np.float32)
    from_x = (cos * x - sin * y + (width - 1) / 2).astype(np.float32)
    top, left = np.floor(from_y).astype(np.int64), np.floor(from_x).astype(np.int64)
    out = np.zeros_like(values)
    rows = np.arange(len(values))[:, None, None]
    for dy in (0, 1):
        for dx in (0, 1):
            yy, xx = top + dy, left + dx
            weight = (1 - np.abs(from_y - yy)) * (1 - np.abs(from_x - xx))
            inside = (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
            picked = values.transpose(0, 2, 3, 1)[rows, yy.clip(0, height - 1), xx.clip(0, width - 1)]
            out += (picked * (weight * inside)[..., None]).transpose(0, 3, 1, 2).astype(np.float32)
    return out
