"""Images and sounds: what they are, within bounds, and as arrays. The same code at ingest, in training and in a replica.

Light at import: pillow and soundfile come in with the first file. Decoders run in the processes of jobs and replicas
alone: what breaks one of them does not reach the server.
"""

from __future__ import annotations

import io
import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelworks.core.errors import MissingExtra
from modelworks.core.tensors import decode_base64

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FILE = 64 << 20  # bytes of one image or sound
MAX_PIXELS = 64_000_000
MAX_SECONDS = 3600.0
MAX_CHANNELS = 16
MAX_SAMPLES = 400_000_000
IMAGES = ("PNG", "JPEG", "WEBP", "BMP")
SOUNDS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG", "MPEG", "RF64")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
FORMATS = {"image": "a PNG, JPEG, WebP or BMP image", "audio": "a WAV, FLAC, MP3 or Ogg sound"}
_BASE64 = re.compile(rb"(?:data:[\w./+;=-]{0,100};base64,)?[A-Za-z0-9+/\s_-]*={0,2}\s*")
_TAPS = 16  # zero crossings of the resampling filter on each side


class Unreadable(ValueError):
    """The bytes are no image or sound that is taken; says why, in words that follow "the file"."""


def kind_of(name: str) -> Literal["image", "audio"] | None:
    """What a file's name says it is."""
    low = name.lower()
    return "image" if low.endswith(IMAGE_SUFFIXES) else "audio" if low.endswith(AUDIO_SUFFIXES) else None


def sniff(data: bytes) -> Literal["image", "audio"] | None:
    """What the first bytes say it is."""
    head = data[:16]
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "image"
    if head.startswith((b"fLaC", b"OggS", b"ID3")) or (head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE"):
        return "audio"
    return "audio" if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 else None


def raw(data: bytes) -> bytes:
    """The file itself, when it came as base64 text (also as a data URL), as JSON carries it. No true file looks so."""
    if not _BASE64.fullmatch(data):
        return data
    try:
        return decode_base64(data)
    except ValueError:
        return data


# images


def pillow() -> Any:
    """The module PIL.Image. MissingExtra where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("images need pillow; pip install 'modelworks[media]'") from None
    Image.MAX_IMAGE_PIXELS = None  # the bound is MAX_PIXELS, held by the header before anything is decoded
    return Image


def open_image(data: bytes) -> Image:
    """The decoded image, upright. Unreadable for what is none, is broken, or has too many pixels."""
    Image = pillow()
    from PIL import ImageOps

    if len(data) > MAX_FILE:
        raise Unreadable(f"has {len(data)} bytes, more than {MAX_FILE}")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGES)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Unreadable(f"has {width} x {height} pixels, more than {MAX_PIXELS}")
        image.load()
        return ImageOps.exif_transpose(image)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable("is a broken image" if sniff(data) == "image" else f"is not {FORMATS['image']}") from None
    except Exception as error:  # decoders raise whatever they meet in a broken file
        raise Unreadable(f"is a broken image ({_brief(error)})") from None


def image_header(data: bytes) -> dict[str, Any]:
    """width, height, mode and format, told without decoding."""
    Image = pillow()
    try:
        with Image.open(io.BytesIO(data), formats=IMAGES) as image:
            return {"width": image.width, "height": image.height, "mode": image.mode, "format": image.format}
    except Exception as error:
        raise Unreadable(f"is a broken image ({_brief(error)})") from None


def plain_image(data: bytes, mode: Literal["L", "RGB"] = "RGB") -> Image:
    """As open_image, in 8 bits a channel: grey ("L") or colour."""
    from PIL import Image

    image = open_image(data)
    if image.mode.startswith(("I", "F")):  # 16 bits and floats: the greatest value is white
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0)))
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    return image.convert(mode)


def image_array(data: bytes, size: tuple[int, int], channels: int, fit: str) -> np.ndarray:
    """uint8 [channels, height, width] of `size` = (height, width). channels: 1 grey, 3 colour.

    fit: "stretch" to the size; "crop" the middle of what covers it; "pad" with black what fits into it.
    """
    from PIL import Image, ImageOps

    image = plain_image(data, "L" if channels == 1 else "RGB")
    shape = (size[1], size[0])
    if image.size != shape:
        if fit == "crop":
            image = ImageOps.fit(image, shape, Image.Resampling.BILINEAR)
        elif fit == "pad":
            image = ImageOps.pad(image, shape, Image.Resampling.BILINEAR)
        else:
            image = image.resize(shape, Image.Resampling.BILINEAR)
    values = np.asarray(image, dtype=np.uint8)
    return values[None] if channels == 1 else np.ascontiguousarray(values.transpose(2, 0, 1))


# sounds


def _sound(data: bytes) -> Any:
    try:
        import soundfile
    except ImportError:
        raise MissingExtra("sounds need soundfile; pip install 'modelworks[media]'") from None
    if len(data) > MAX_FILE:
        raise Unreadable(f"has {len(data)} bytes, more than {MAX_FILE}")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except Exception:
        broken = sniff(data) == "audio"
        raise Unreadable("is a broken sound" if broken else f"is not {FORMATS['audio']}") from None
    if file.format not in SOUNDS:
        raise Unreadable(f"is not {FORMATS['audio']}")
    if not 1 <= file.channels <= MAX_CHANNELS or not 100 <= file.samplerate <= 1_000_000:
        raise Unreadable(f"has {file.channels} channels of {file.samplerate} Hz, which is not taken")
    if file.frames > MAX_SECONDS * file.samplerate or file.frames * file.channels > MAX_SAMPLES:
        raise Unreadable(f"is longer than {MAX_SECONDS:.0f} seconds")
    return file


def sound_header(data: bytes) -> dict[str, Any]:
    """seconds, rate, channels and format, told without decoding."""
    with _sound(data) as file:
        seconds = file.frames / file.samplerate
        return {"seconds": seconds, "rate": file.samplerate, "channels": file.channels, "format": file.format}


def open_sound(data: bytes, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """(mono float32 [frames] in -1..1, rate), at most the first `seconds`. Unreadable for what is broken or empty."""
    with _sound(data) as file:
        count = file.frames if seconds is None else min(file.frames, math.ceil(seconds * file.samplerate))
        try:
            frames = file.read(count, dtype="float32", always_2d=True)
        except Exception as error:
            raise Unreadable(f"is a broken sound ({_brief(error)})") from None
        rate = int(file.samplerate)
    if not len(frames):
        raise Unreadable("is a sound without any samples")
    if len(frames) < count:
        raise Unreadable(f"is a broken sound (it holds {len(frames)} of its {count} frames)")
    if not np.isfinite(frames).all():
        raise Unreadable("is a sound with samples that are no numbers")
    return frames.mean(axis=1, dtype=np.float32), rate


def waveform(data: bytes, rate: int, samples: int, align: str) -> np.ndarray:
    """float32 [samples] at `rate`: longer sounds are cut, shorter ones padded with silence.

    align: "start" keeps the beginning, "centre" the middle.
    """
    frames, given = open_sound(data, samples / rate if align == "start" else None)
    values = resample(frames, given, rate)
    if len(values) > samples:
        start = (len(values) - samples) // 2 if align == "centre" else 0
        return values[start : start + samples]
    before = (samples - len(values)) // 2 if align == "centre" else 0
    out = np.zeros(samples, dtype=np.float32)
    out[before : before + len(values)] = values
    return out


def resample(values: np.ndarray, given: int, wanted: int) -> np.ndarray:
    """float32 [frames] at another rate, by a polyphase filter (a sinc under a Kaiser window)."""
    if given == wanted:
        return values
    common = math.gcd(given, wanted)
    up, down = wanted // common, given // common
    half, taps = _filter(up, down)
    count = -(-len(values) * up // down)
    padded = np.concatenate([np.zeros(half, np.float32), values, np.zeros(half + 1, np.float32)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    out = np.empty(count, dtype=np.float32)
    for start in range(0, count, 16_384):
        at = np.arange(start, min(start + 16_384, count), dtype=np.int64) * down
        out[start : start + len(at)] = np.einsum("ij,ij->i", windows[np.minimum(at // up, len(windows) - 1)], taps[at % up])
    return out


@cache
def _filter(up: int, down: int) -> tuple[int, np.ndarray]:
    """(half width in input samples, taps [phase, 2 * half + 1])."""
    cut = min(1.0, up / down)
    half = math.ceil(_TAPS / cut)
    offsets = np.arange(-half, half + 1)[None, :] - np.arange(up)[:, None] / up
    window = np.i0(8.0 * np.sqrt(np.clip(1 - (offsets / (half + 1)) ** 2, 0, 1))) / np.i0(8.0)
    taps = np.sinc(offsets * cut) * window
    return half, (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)


def check(kind: str, data: bytes) -> None:
    """Decode the whole file, as training will. Unreadable says what is wrong."""
    if kind == "image":
        open_image(data)
    else:
        open_sound(data)


def _brief(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
