"""Training and predicting fold by fold.

Each finished fold is a checkpoint, so a job that was killed goes on after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import CLASSIFICATION
from modelworks.ml.base import JobContext
from modelworks.ml.evaluate import metrics as m
from modelworks.ml.evaluate.calibration import calibration, thresholds
from modelworks.ml.evaluate.intervals import LEVEL, RESAMPLES, over_folds, over_rows
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.splits import Plan
from modelworks.ml.train.course import Course
from modelworks.ml.train.fit import Span, fit
from modelworks.ml.train.problem import Problem, class_text
from modelworks.ml.train.streaming import predict_stored

_KEPT_ROWS, _KEPT_NUMBERS = 20_000, 1_000_000
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def predict_folds(
    problem: Problem,
    plan: Plan,
    wanted: Sequence[str],
    ctx: JobContext,
    span: tuple[float, float],
    prefix: str = "fold",
) -> list[Predictions]:
    """For each part of `plan`: fit on its training rows, predict its test rows. Rows outside the problem's are left
    out.
    """
    start, end = span
    count = len(plan.parts)
    done: list[Predictions] = []
    names = [f"{prefix}-{number}" for number in range(1, count + 1)]
    if plan.parallel and count > 1:
        ctx.spread([name for name in names if not ctx.restore(name)], plan.parallel, 0.0)
    for index, (train, test) in enumerate(plan.parts):
        number, name = index + 1, names[index]
        if ctx.only not in (None, name):
            continue
        left, right = start + (end - start) * (index / count), start + (end - start) * (number / count)
        kept = ctx.restore(name)
        found = read_kept(kept) if kept else None
        label = f"fold {number} of {count}" if count > 1 else "hold-out"
        if found is None:
            part, began = Span(ctx, left, right, problem.spec.seed, label), time.monotonic()
            found = _predict(problem, train[np.isin(train, problem.rows)], test[np.isin(test, problem.rows)], part)
            ctx.checkpoint(name, _write(found))
            if plan.parallel is None:
                rest = [name for name in names[number:] if not ctx.restore(name)]
                ctx.spread(rest, None, time.monotonic() - began)
        scores = m.score(problem.task, found, wanted)
        first = next(iter(wanted))
        shown = "undefined" if scores[first] is None else f"{scores[first]:.4f}"
        ctx.event(
            "fold",
            f"{label}: {first} {shown}",
            fold=number,
            folds=count,
            metrics=scores,
            train_rows=len(train),
            test_rows=len(found.rows),
            resumed=kept is not None,
        )
        ctx.metric(number, {key: value for key, value in scores.items() if value is not None}, unit=prefix)
        ctx.progress(right, label, **{name: value for name, value in scores.items() if value is not None})
        done.append(found)
    return done


def _predict(problem: Problem, train: np.ndarray, test: np.ndarray, ctx: Span) -> Predictions:
    if isinstance(problem, Course):
        return problem.judge(problem.learn(train, ctx), test)
    model = fit(problem, train, ctx)
    if problem.stored is not None:
        return Predictions(test, problem.target[test], predict_stored(problem, model, test))
    batch = problem.part(test)
    keep = model.preparation.rows(batch, problem.target[test])
    test = test[keep]
    if not len(test):
        raise InvalidInput(
            "the row ops leave no row to test on; give more data or use fewer folds",
            code="too_few_rows",
            param="transforms",
        )
    return Predictions(test, problem.target[test], model.predict(problem.part(test)))


def summarise(
    task: str,
    parts: Sequence[Predictions],
    wanted: Sequence[str],
    classes: list[Any] | None,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, details) of a report: means with intervals, and confusion matrix or residual quantiles over all parts."""
    scores = [m.score(task, part, wanted) for part in parts]
    if len(parts) == 1:
        found, drawn = over_rows(task, parts[0], scores[0], seed, resamples)
        interval: dict[str, Any] = {
            "method": "bootstrap over rows, percentiles",
            "level": LEVEL,
            "resamples": drawn,
            "seed": seed,
        }
    else:
        found = {name: over_folds(name, [score[name] for score in scores]) for name in wanted}
        interval = {"method": "Student's t over folds", "level": LEVEL}
    lacking: dict[int, list[str]] = {}
    for name in wanted:
        if missing := sum(score[name] is None for score in scores):
            lacking.setdefault(missing, []).append(name)
    undefined = [
        f"{', '.join(names)}: undefined in {missing} of {len(parts)} parts (a class, label, rating or spread is missing there)"
        for missing, names in lacking.items()
    ]
    whole = Predictions.join(parts)
    details: dict[str, Any] = {
        "task": task,
        "interval": interval,
        "notes": undefined,
        "test_rows": [len(part.rows) for part in parts],
    }
    if task == CLASSIFICATION:
        details |= _confusion(whole, classes or [])
        details["calibration"] = calibration(whole)
        if (found_thresholds := thresholds(whole, classes or [])) is not None:
            details["thresholds"] = found_thresholds
    elif whole.output.ndim == 1:
        residuals = np.quantile(whole.true - whole.output, _QUANTILES)
        details["residual_quantiles"] = {f"{q:g}": float(value) for q, value in zip(_QUANTILES, residuals, strict=True)}
    return found, details


def _confusion(whole: Predictions, classes: list[Any]) -> dict[str, Any]:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    places = np.arange(len(classes))
    matrix = confusion_matrix(whole.true, whole.labels, labels=places)
    columns = precision_recall_fscore_support(whole.true, whole.labels, labels=places, zero_division=0)
    per_class = {
        class_text(name): {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for name, p, r, f, n in zip(classes, *columns, strict=True)
    }
    return {
        "confusion_matrix": {"classes": classes, "rows": "true", "columns": "predicted", "counts": matrix.tolist()},
        "per_class": per_class,
    }


def kept(parts: Sequence[Predictions], seed: int) -> bytes:
    """What a report keeps of its predictions for its figures: all, or as many as stay small, drawn at random."""
    whole = Predictions.join(parts)
    width = whole.output.shape[1] if whole.output.ndim == 2 else 1
    most = max(1, min(_KEPT_ROWS, _KEPT_NUMBERS // width))
    if len(whole.rows) > most:
        whole = whole.take(np.sort(np.random.default_rng(seed).permutation(len(whole.rows))[:most]))
    return _write(whole)


def _write(predictions: Predictions) -> bytes:
    """Predictions as an Arrow stream: exact to the last bit."""
    output = predictions.output
    width = output.shape[1] if output.ndim == 2 else 0
    table = pa.table(
        {
            "row": predictions.rows,
            "true": predictions.true,
            "output": output.ravel() if not width else pa.FixedSizeListArray.from_arrays(output.ravel(), width),
            **{f"beside:{name}": values for name, values in predictions.beside.items()},
        }
    ).replace_schema_metadata({"modelworks": json.dumps({"width": width})})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def read_kept(data: bytes) -> Predictions:
    table = pa.ipc.open_stream(data).read_all()
    width = json.loads(table.schema.metadata[b"modelworks"])["width"]
    output = table.column("output").combine_chunks()
    values = output.flatten().to_numpy().reshape(-1, width) if width else output.to_numpy()
    beside = {
        name.removeprefix("beside:"): table.column(name).to_numpy()
        for name in table.column_names
        if name.startswith("beside:")
    }
    return Predictions(table.column("row").to_numpy(), table.column("true").to_numpy(), values, beside)
