"""Clusters: how well they are apart (silhouette), and how they agree with labels. `Predictions.true` [n]: the label's
number, -1 not known; `output` [n, 2]: the cluster's number, and the row's silhouette (NaN where it was not computed).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from modelworks.ml.evaluate.predictions import Predictions

Weighed = Callable[[np.ndarray], float]
MOST = 10_000  # rows whose silhouettes are computed: each is held against all others


def silhouettes(features: np.ndarray, clusters: np.ndarray, seed: int) -> np.ndarray:
    """[n], of at most MOST rows drawn at random; NaN for the others, and for all where there is one cluster alone."""
    from sklearn.metrics import silhouette_samples

    found = np.full(len(clusters), math.nan)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(clusters))[:MOST])
    different = len(np.unique(clusters[chosen]))
    if 1 < different < len(chosen):
        found[chosen] = silhouette_samples(features[chosen], clusters[chosen])
    return found


def silhouette(p: Predictions) -> Weighed:
    known = np.isfinite(p.output[:, 1])
    values = p.output[known, 1]

    def weighed(w: np.ndarray) -> float:
        total = w[known].sum()
        return float(w[known] @ values / total) if total else math.nan

    return weighed


def agreement(which: str) -> Callable[[Predictions], Weighed]:
    """`rand`: Hubert and Arabie's adjusted index; `mutual`, `homogeneity`, `completeness`: Rosenberg and Hirschberg's."""

    def measure(p: Predictions) -> Weighed:
        known = p.true >= 0
        label, cluster = (np.unique(x[known], return_inverse=True)[1].ravel() for x in (p.true, p.output[:, 0]))
        if not known.any():
            return lambda w: math.nan
        shape = (int(label.max()) + 1, int(cluster.max()) + 1)
        cells = label * shape[1] + cluster

        def weighed(w: np.ndarray) -> float:
            table = np.bincount(cells, w[known], shape[0] * shape[1]).reshape(shape)
            return _rand(table) if which == "rand" else _shared(table, which)

        return weighed

    return measure


def _rand(table: np.ndarray) -> float:
    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    together, rows, columns, all_ = (pairs(x) for x in (table, table.sum(axis=1), table.sum(axis=0), table.sum()))
    if not all_:
        return math.nan
    chance, most = rows * columns / all_, (rows + columns) / 2
    return 1.0 if most == chance else (together - chance) / (most - chance)


def _shared(table: np.ndarray, which: str) -> float:
    total = table.sum()
    if not total:
        return math.nan

    def entropy(counts: np.ndarray) -> float:
        shares = counts[counts > 0] / total
        return float(-(shares * np.log(shares)).sum())

    labels, clusters, both = entropy(table.sum(axis=1)), entropy(table.sum(axis=0)), entropy(table.ravel())
    shared = max(0.0, labels + clusters - both)
    base = {"homogeneity": labels, "completeness": clusters, "mutual": (labels + clusters) / 2}[which]
    return min(1.0, shared / base) if base > 1e-15 else 1.0
