"""Row ops that lead the transforms run before any split, so that no duplicate stands on both sides of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.core.types import Column
from modelworks.ml.data.transforms.catalogue import SELECTORS, TRANSFORMS
from modelworks.ml.data.transforms.rows import missing_mask

if TYPE_CHECKING:
    from modelworks.ml.base import Batch


def split_leading(transforms: list[TransformSpec] | None) -> tuple[list[TransformSpec], list[TransformSpec] | None]:
    """The row ops at the front, and the rest; null when nothing was given or nothing else is left: the default
    preparation.
    """
    if not transforms:
        return [], transforms
    count = next((i for i, spec in enumerate(transforms) if TRANSFORMS[spec.op].kind != "rows"), len(transforms))
    return transforms[:count], transforms[count:] or None


def kept_rows(ops: Sequence[TransformSpec], batch: Batch, columns: Sequence[Column], target: Column) -> np.ndarray:
    """bool [n]: the rows that `ops` keep.

    Without columns, or with "all", the target counts too. `batch` holds target and features.
    """
    keep = np.ones(len(batch[target.name]), dtype=bool)
    for index, spec in enumerate(ops):
        names = _chosen(spec, [*columns, target], target, f"transforms[{index}]")
        if spec.op == "drop-missing":
            for name in names:
                keep &= ~missing_mask(batch[name])
        elif names:
            left = np.flatnonzero(keep)
            codes = np.stack([np.unique(batch[name][left], return_inverse=True)[1].ravel() for name in names], axis=1)
            keep = np.zeros_like(keep)
            keep[left[np.unique(codes, axis=0, return_index=True)[1]]] = True
    return keep


def _chosen(spec: TransformSpec, columns: Sequence[Column], target: Column, where: str) -> list[str]:
    if isinstance(spec.columns, list):
        names = [column.name for column in columns]
        for name in spec.columns:
            if name not in names:
                raise InvalidInput(
                    f"{where}: there is no column {name[:80]!r}; there are: {', '.join(names[:30])}",
                    code="unknown_column",
                    param=where,
                )
        return spec.columns
    if spec.columns in (None, "all"):
        return [column.name for column in columns]
    return [
        column.name for column in columns if column.type in SELECTORS[str(spec.columns)] and column.name != target.name
    ]
