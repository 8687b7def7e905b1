"""Parity: a runtime must answer a package's samples as training did. Imports numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import ModelworksError
from modelworks.ml.base import Runtime
from modelworks.ml.data.types import rows_to_batch
from modelworks.ml.package import Package

if TYPE_CHECKING:
    from modelworks.ml.base import Batch


class ParityMismatch(ModelworksError):
    """The model answers otherwise than at training: it must not be served."""

    default_code = "parity_mismatch"


def replay_parity(package: Package, runtime: Runtime) -> int:
    """Run the package's samples through a loaded runtime; the number of rows.

    ParityMismatch names the first difference.
    """
    samples = package.manifest.parity
    if not samples.inputs:
        return 0
    manifest = package.manifest
    batch: Batch = rows_to_batch(samples.inputs, manifest.signature.inputs, manifest.task)
    outputs = runtime.predict(batch)
    found = difference(samples.outputs, outputs, samples.tolerance)
    if found:
        raise ParityMismatch(
            f"the model does not answer its parity samples as training did: {found}; train or import it again"
        )
    return len(samples.inputs)


def difference(expected: dict[str, Any], got: dict[str, np.ndarray], tolerance: float) -> str | None:
    """The first difference in words, or None.

    Texts and integers must be equal; floats within tolerance * max(1, |expected|).
    """
    for name, values in expected.items():
        if name not in got:
            return f"the output {name!r} is missing"
        want, have = np.asarray(values), np.asarray(got[name])
        if want.dtype.kind == "O" and have.dtype.kind == "f":
            want = want.astype(np.float64)  # JSON has no NaN: it was kept as null
        if want.shape != have.shape:
            return f"{name!r} has shape {list(have.shape)}, not {list(want.shape)}"
        if want.dtype.kind in "fiub" and have.dtype.kind in "fiub":
            want, have = want.astype(np.float64), have.astype(np.float64)
            exact = np.asarray(got[name]).dtype.kind != "f"
            with np.errstate(invalid="ignore"):
                near = np.abs(want - have) <= (0.0 if exact else tolerance * np.maximum(1.0, np.abs(want)))
            equal = near | (want == have) | (np.isnan(want) & np.isnan(have))
        else:
            equal = np.array([_text(a) == _text(b) for a, b in zip(want.ravel(), have.ravel(), strict=True)]).reshape(
                want.shape
            )
        if not equal.all():
            place = tuple(int(i) for i in np.argwhere(~equal)[0])
            return f"{name!r}, row {place[0] if place else 0}: {have[place]!s:.80} instead of {want[place]!s:.80}"
    return None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
