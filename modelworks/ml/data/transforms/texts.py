"""Fits of the host transforms: the JSON states that `host` applies."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.ml.base import Models
from modelworks.ml.data.transforms import catalogue as ops
from modelworks.ml.data.transforms import media_params
from modelworks.ml.data.transforms.host import tokens
from modelworks.ml.data.transforms.media_fit import fit_media


def fit_host(params: Any, values: np.ndarray, name: str, models: Models | None = None) -> dict[str, Any]:
    """The state of a host op without its wiring. values [n]: strings of the rows that training keeps."""
    if isinstance(params, ops.DateParts):
        return {"kind": "date-parts", "parts": list(params.parts), "cyclic": params.cyclic}
    if isinstance(params, ops.Cast):
        return {"kind": "parse", "to": params.to}
    if isinstance(params, ops.Hashing):
        return {"kind": "hashing", **_analysis(params), "n_features": params.n_features}
    if isinstance(params, media_params.Resize | media_params.Resample | media_params.Tokenise | media_params.Embed):
        return fit_media(params, values, name, models)
    assert isinstance(params, ops.TfIdf)
    return {"kind": "tf-idf", **_analysis(params), "sublinear": params.sublinear, **_vocabulary(params, values, name)}


def _analysis(params: ops.Tokens) -> dict[str, Any]:
    ngram = params.ngram or ((1, 1) if params.analyzer == "word" else (1, 2))
    return {"analyzer": params.analyzer, "ngram": list(ngram), "lowercase": params.lowercase}


def _vocabulary(params: ops.TfIdf, values: np.ndarray, name: str) -> dict[str, Any]:
    """The most frequent terms, sorted, and ln((1 + rows) / (1 + rows with the term)) + 1 (as in scikit-learn)."""
    analysis = _analysis(params)
    total: Counter[str] = Counter()
    rows_with: Counter[str] = Counter()
    for text in values.tolist():
        counts = Counter(tokens(text, analysis))
        total.update(counts)
        rows_with.update(counts.keys())
    terms = [term for term in total if rows_with[term] >= params.min_df]
    if not terms:
        raise InvalidInput(
            f"tf-idf: column {name!r} has no term in at least {params.min_df} of its {len(values)} rows; "
            "drop the column or use the analyzer char",
            param=name,
            code="bad_transform",
        )
    vocabulary = sorted(sorted(terms, key=lambda term: (-total[term], term))[: params.max_features])
    return {
        "vocabulary": vocabulary,
        "idf": [math.log((1 + len(values)) / (1 + rows_with[term])) + 1 for term in vocabulary],
    }
