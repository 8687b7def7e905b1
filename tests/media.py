"""Images and sounds that tests make: real files, small and alike on every run."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping

import numpy as np


def picture(values: np.ndarray, format: str = "PNG") -> bytes:
    """An image file of uint8 [h, w] or [h, w, 3]."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(values).save(out, format)
    return out.getvalue()


def tone(hertz: float, seconds: float = 0.5, rate: int = 16_000, format: str = "WAV", noise: float = 0.0, seed: int = 0) -> bytes:
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    values = 0.5 * np.sin(2 * np.pi * hertz * time) + np.random.default_rng(seed).normal(0, noise, len(time))
    out = io.BytesIO()
    soundfile.write(out, values.astype(np.float32), rate, format=format)
    return out.getvalue()


def digits(count: int = 200) -> dict[str, bytes]:
    """scikit-learn's digits as `digits/3/0007.png`, their names sorted."""
    from sklearn.datasets import load_digits

    data = load_digits()
    found = {
        f"digits/{label}/{index:04}.png": picture((image * 15.9).astype(np.uint8))
        for index, (image, label) in enumerate(zip(data.images[:count], data.target[:count], strict=True))
    }
    return dict(sorted(found.items()))


def zipped(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def column(files: list[bytes]) -> np.ndarray:
    """Files as a column of a batch."""
    out = np.empty(len(files), dtype=object)
    out[:] = files
    return out
