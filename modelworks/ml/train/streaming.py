"""A fit on rows that are not in memory: the preparation is fitted on a sample, the estimator reads batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.ml.base import JobContext
from modelworks.ml.data.transforms.media_fit import spread
from modelworks.ml.data.transforms.preparation import Preparation
from modelworks.ml.nets.examples import StreamedExamples
from modelworks.ml.train.algorithms import TRAINERS
from modelworks.ml.train.problem import Problem

SAMPLE_ROWS = 20_000  # that the preparation is fitted on
SAMPLE_BYTES = 4 << 20
BUFFER_BYTES = 4 << 20  # of features that are shuffled together
BUFFER_SHARE = 0.05  # ... and at most this share of the rows


def fit_stored(problem: Problem, rows: np.ndarray, ctx: JobContext) -> Any:
    """As `fit`. The rows are mixed once on disk, then shuffled in a buffer in each epoch."""
    from modelworks.ml.train.fit import Model, transforms_of

    stored = problem.stored
    assert stored is not None
    trainer: Any = TRAINERS.get(problem.spec.algorithm)()
    ctx.progress(0.0, "preparing from a sample")
    params = trainer.Params.model_validate(problem.spec.hyperparameters)
    preparation = _prepare(problem, rows, trainer, transforms_of(problem, trainer, params, ctx), ctx)
    classes, seen, target = None, np.empty(0, dtype=np.int64), problem.target
    if problem.classes is not None:
        seen = np.flatnonzero(np.bincount(target[rows], minlength=len(problem.classes)))
        if len(seen) < 2:
            raise InvalidInput(
                "the rows to train on have one class only; give more data", code="too_few_rows", param="transforms"
            )
        places = np.zeros(len(problem.classes), dtype=target.dtype)
        places[seen] = np.arange(len(seen))
        classes = len(seen)
        if classes < len(problem.classes):
            target = places[target]
    chosen = np.zeros(stored.num_rows, dtype=bool)
    chosen[rows] = True
    used = [column for column in problem.columns if column.name in set(preparation.inputs)]
    ctx.progress(0.02, "mixing the rows on disk")
    mixed = stored.mixed(used, ctx.workdir, problem.spec.seed)

    def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for numbers, batch in mixed.chunks():
            mask = chosen[numbers]
            if mask.any():
                wanted = target[numbers[mask]]
                yield (
                    preparation.features({name: values[mask] for name, values in batch.items()}),
                    wanted if classes is None else wanted.astype(np.int64),
                )

    width = max(1, len(preparation.feature_names))
    examples = StreamedExamples(
        read,
        len(rows),
        preparation.shape,
        blocks=tuple(preparation.blocks),
        classes=classes,
        augment=preparation.augment if preparation.augments else None,
        buffer=int(max(64, min(BUFFER_BYTES // (4 * width), BUFFER_SHARE * len(rows)))),
    )
    ctx.event(
        "log",
        f"the data is larger than the memory for it: {len(rows):,} rows are streamed, {examples.buffer:,} of them are "
        "shuffled at a time",
        buffer=examples.buffer,
    )
    ctx.progress(0.1, "fitting")
    learn = trainer.learn if hasattr(trainer, "learn") else trainer.stream
    fitted = learn(examples, params, ctx, problem.spec.stopping)
    return Model(preparation, fitted, trainer.accepts_missing, len(problem.classes or ()), seen)


def _prepare(
    problem: Problem, rows: np.ndarray, trainer: Any, transforms: list[TransformSpec] | None, ctx: JobContext
) -> Preparation:
    assert problem.stored is not None
    width = problem.stored.width([column.name for column in problem.columns])
    sample = spread(rows, int(max(256, min(SAMPLE_ROWS, SAMPLE_BYTES // max(1.0, width)))))
    preparation = Preparation.fit(
        problem.part(sample),
        problem.columns,
        transforms,
        accepts_missing=trainer.accepts_missing,
        target=problem.target[sample],
        shaped=getattr(trainer, "shaped", False),
        tokens=getattr(trainer, "tokens", False),
        models=ctx.model,
    )
    if preparation.drops_rows:
        raise InvalidInput(
            "the data is larger than the memory for it, and row ops behind other transforms need all rows at once; put "
            "drop-missing first",
            code="too_large",
            param="transforms",
        )
    return preparation


def predict_stored(problem: Problem, model: Any, rows: np.ndarray) -> np.ndarray:
    """What the model says of `rows`, a portion at a time."""
    order = np.argsort(rows, kind="stable")
    answers = np.concatenate([model.predict(part) for _, part in problem.portions(rows, 0)])
    out = np.empty_like(answers)
    out[order] = answers
    return out
