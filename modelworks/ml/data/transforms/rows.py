"""Row ops: which rows of a training or evaluation set are kept. At serving no row is ever dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modelworks.core.tensors import BOOL_MISSING, INT64_MISSING

if TYPE_CHECKING:
    from modelworks.ml.base import Batch
    from modelworks.ml.data.transforms.plan import Plan


def missing_mask(values: np.ndarray) -> np.ndarray:
    """bool, of the shape of `values`: where a wire-form array is missing."""
    if values.dtype == object:
        if values.size and isinstance(values.flat[0], bytes):  # images and sounds
            return np.array([not value for value in values.flat], dtype=bool).reshape(values.shape)
        return np.asarray(values == "", dtype=bool)
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype == np.int64:
        return np.asarray(values == INT64_MISSING)
    return np.asarray(values >= BOOL_MISSING)


@dataclass(frozen=True)
class RowFilter:
    """`op` over columns (tensor, position) of a plan as at its step. `with_target`: the target is compared too."""

    op: str
    columns: list[tuple[str, int]]
    with_target: bool

    def apply(self, plan: Plan, batch: Batch, keep: np.ndarray, target: np.ndarray | None) -> np.ndarray:
        """bool [n]: `keep` without the rows that this op drops."""
        tensors = list(dict.fromkeys(tensor for tensor, _ in self.columns))
        by_tensor = dict(zip(tensors, plan.values(tensors, batch), strict=True))
        columns = [by_tensor[tensor][:, index] for tensor, index in self.columns]
        if self.op == "drop-missing":
            missing = np.zeros(len(keep), dtype=bool)
            for column in columns:
                missing |= missing_mask(column)
            return keep & ~missing
        if self.with_target and target is not None:
            columns.append(np.asarray(target))
        kept = np.flatnonzero(keep)
        mask = np.zeros(len(keep), dtype=bool)
        if len(kept):
            codes = np.stack([np.unique(column[kept], return_inverse=True)[1].ravel() for column in columns], axis=1)
            mask[kept[np.unique(codes, axis=0, return_index=True)[1]]] = True
        return mask
