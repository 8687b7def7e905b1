"""One fit: a preparation and an estimator on some rows of a problem, and what they say about others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.ml.base import Fitted, JobContext, Part
from modelworks.ml.data.transforms.preparation import Preparation
from modelworks.ml.nets.examples import MemoryExamples
from modelworks.ml.train.algorithms import TRAINERS
from modelworks.ml.train.problem import Problem

if TYPE_CHECKING:
    from modelworks.ml.base import Batch

_EVERY = 0.25  # seconds between two reports of progress


class Span(Part):
    """A part of a job with a seed of its own, whose reports are thinned out."""

    def __init__(self, ctx: JobContext, start: float, end: float, seed: int, label: str = "") -> None:
        super().__init__(ctx, start, end, label)
        self.seed = seed
        self._last = 0.0

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        now = time.monotonic()
        if now - self._last >= _EVERY:
            self._last = now
            super().progress(fraction, stage, **metrics)

    def metric(self, step: int, values: Mapping[str, float], *, unit: str = "epoch", part: str = "") -> None:
        self.ctx.metric(step, values, unit=unit, part=part or self.label)


@dataclass(frozen=True)
class Model:
    """`seen`: the classes that the training rows had, as indices; the others get probability 0."""

    preparation: Preparation
    fitted: Fitted
    accepts_missing: bool
    classes: int
    seen: np.ndarray
    threshold: float | None = None
    """Of two classes: the probability of the second from which on the label says it."""

    def predict(self, batch: Batch) -> np.ndarray:
        """Probabilities [n, classes] or values [n], float64. InvalidInput for a missing value that it cannot take."""
        features = self.preparation.features(batch)
        if not self.accepts_missing and np.isnan(features).any():
            column = int(np.isnan(features.reshape(len(features), -1)).any(axis=0).argmax())
            raise InvalidInput(
                f"the feature {self.preparation.feature_names[column]!r} is missing in rows to predict but never "
                "in training; "
                "add the transform fill-missing",
                code="missing_values",
                param="transforms",
            )
        answer = self.fitted.predict(features)
        if not self.classes:
            return answer["value"]
        if len(self.seen) == self.classes:
            return answer["probabilities"]
        whole = np.zeros((len(features), self.classes))
        whole[:, self.seen] = answer["probabilities"]
        return whole


def fit(problem: Problem, rows: np.ndarray, ctx: JobContext) -> Model:
    """Fit preparation and estimator on `rows` alone."""
    if problem.stored is not None:
        from modelworks.ml.train.streaming import fit_stored

        return fit_stored(problem, rows, ctx)
    trainer: Any = TRAINERS.get(problem.spec.algorithm)()
    params = trainer.Params.model_validate(problem.spec.hyperparameters)
    batch = problem.part(rows)
    ctx.progress(0.0, "preparing")
    preparation = Preparation.fit(
        batch,
        problem.columns,
        transforms_of(problem, trainer, params, ctx),
        accepts_missing=trainer.accepts_missing,
        target=problem.target[rows],
        shaped=getattr(trainer, "shaped", False),
        tokens=getattr(trainer, "tokens", False),
        models=ctx.model,
    )
    features = preparation.fit_features(batch)
    target = problem.target[rows][preparation.keep]
    seen = np.empty(0, dtype=np.int64)
    if problem.classes is not None:
        seen, target = np.unique(target, return_inverse=True)
        target = target.ravel().astype(np.int64)
        if len(seen) < 2:
            raise InvalidInput(
                "the rows to train on have one class only; give more data, or drop fewer rows",
                code="too_few_rows",
                param="transforms",
            )
    ctx.progress(0.1, "fitting")
    if hasattr(trainer, "learn"):
        examples = MemoryExamples(
            features,
            target,
            blocks=tuple(preparation.blocks),
            classes=len(seen) if problem.classes is not None else None,
            augment=preparation.augment if preparation.augments else None,
        )
        fitted = trainer.learn(examples, params, ctx, problem.spec.stopping)
    else:
        if preparation.augments:
            ctx.event("warning", f"{problem.spec.algorithm} learns from the rows as they are: augment changes nothing")
        fitted = trainer.train(features, target, params, ctx)
    return Model(preparation, fitted, trainer.accepts_missing, len(problem.classes or ()), seen)


def transforms_of(problem: Problem, trainer: Any, params: Any, ctx: JobContext) -> list[TransformSpec] | None:
    """Those asked for, else the trainer's own where it has any; None: the default ones."""
    if problem.transforms is None and hasattr(trainer, "transforms"):
        return list(trainer.transforms(problem.columns, params, ctx.model))
    return problem.transforms
