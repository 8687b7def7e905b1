"""Evaluating a model that exists: its recorded spec trained again part by part, or its own graph on a test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec, TrainingSpec
from modelworks.core.tasks import CLASSIFICATION, GENERATION, REGRESSION, base_of
from modelworks.core.types import Column
from modelworks.ml.base import JobContext
from modelworks.ml.evaluate.catalogue import check_metrics, gate_results
from modelworks.ml.evaluate.compare import compare
from modelworks.ml.evaluate.folds import kept, predict_folds, summarise
from modelworks.ml.evaluate.inputs import coerce
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.slices import measure
from modelworks.ml.evaluate.splits import Plan, describe_method
from modelworks.ml.package import Manifest, Package
from modelworks.ml.runtimes.registry import RUNTIMES
from modelworks.ml.train.algorithms import COURSES
from modelworks.ml.train.course import Course
from modelworks.ml.train.problem import Problem, divide, pose, pose_test, target_column
from modelworks.ml.train.rows import split_leading

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK = 8192


@dataclass(frozen=True)
class Evaluated:
    """`metrics`: id -> {mean, std, low, high, folds}.

    `details`: splitter, interval, confusion matrix or residuals, comparison, gates.
    """

    metrics: dict[str, Any]
    details: dict[str, Any]
    method: dict[str, Any]
    predictions: bytes
    """Those of the model itself (`folds.kept`), for the report's figures."""


def evaluate(
    spec: EvaluationSpec,
    package: Package,
    table: pa.Table,
    columns: Sequence[Column],
    ctx: JobContext,
    *,
    other: Package | None = None,
) -> Evaluated:
    """Evaluate `package` by `spec.method` on `table` (canonical): with method test, `table` is the test dataset itself.

    `other` (for `spec.compare`) answers for the same rows; the comparison is in details. Gates are reported there, not
    enforced. InvalidInput when the model cannot be evaluated this way.
    """
    task = base_of(package.manifest.task)
    if task == GENERATION:
        from modelworks.ml.evaluate.language import evaluate_language

        return evaluate_language(spec, package, table, columns, ctx, other=other)
    if task not in (CLASSIFICATION, REGRESSION) and task not in COURSES:
        raise InvalidInput(
            f"a model of task {package.manifest.task!r} cannot be evaluated on a table yet; tabular ones can", param="model"
        )
    if other is not None:
        _check_pair(package.manifest, other.manifest)
    wanted = check_metrics(task, spec.metrics, spec.gates, classes=len(package.manifest.classes or ()) or None)
    ends = (1.0,) if other is None else (0.5, 1.0)
    problem = None
    if spec.how.test:
        made = Plan([], {"name": "test", "dataset": spec.how.test})
        sides = [
            [_answer(spec, side, table, columns, ctx, end)] for side, end in zip((package, other), ends, strict=False) if side
        ]
    else:
        problem, made, sides = _retrain(spec, [side for side in (package, other) if side], table, columns, wanted, ctx, ends)
    sides = [
        [_as_served(part, package) for part in parts] for parts, package in zip(sides, (package, other), strict=False) if package
    ]
    metrics, details = summarise(task, sides[0], wanted, package.manifest.classes, spec.seed)
    details |= {"splitter": made.splitter, "notes": [*made.notes, *details["notes"]]}
    if isinstance(problem, Course):
        details |= problem.details(made.parts, sides[0], wanted)
    if other is not None:
        details["comparison"] = {"with": spec.compare} | compare(
            task, sides[0], sides[1], wanted, spec.seed, [len(train) for train, _ in made.parts]
        )
    if spec.slices:
        whole = Predictions.join(sides[0])
        details["slices"] = measure(task, spec.slices, whole, table, columns, wanted, spec.seed)
    if spec.gates:
        details["gates"] = gate_results(spec.gates, metrics)
    return Evaluated(metrics, details, describe_method(spec.how), kept(sides[0], spec.seed))


def _as_served(part: Predictions, package: Package) -> Predictions:
    """Labels by the threshold that the package has. Of a foreign one the lineage may be anything."""
    chosen = package.manifest.lineage.get("threshold")
    return part.judged(float(chosen["value"])) if isinstance(chosen, dict) and "value" in chosen else part


def target_of(manifest: Manifest, columns: Sequence[Column]) -> str:
    """The column that holds the truth: the recorded target, else the one column that is no input of the model."""
    recorded = manifest.lineage.get("spec")
    if isinstance(recorded, dict) and isinstance(recorded.get("target"), str):
        return str(recorded["target"])
    inputs = {spec.name for spec in manifest.signature.inputs}
    rest = [column.name for column in columns if column.name not in inputs]
    if len(rest) != 1:
        raise InvalidInput(
            "the model does not record which column it predicts; give a dataset with just one column besides its "
            "inputs "
            f"({', '.join(sorted(inputs)[:20])})",
            code="unknown_target",
            param="dataset",
        )
    return rest[0]


def _check_pair(model: Manifest, other: Manifest) -> None:
    if model.task != other.task or model.classes != other.classes:
        raise InvalidInput(
            "the two models do not predict the same classes or numbers; compare versions that do", param="compare"
        )
    targets = [(manifest.lineage.get("spec") or {}).get("target") for manifest in (model, other)]
    if None not in targets and targets[0] != targets[1]:
        raise InvalidInput(
            f"the two models predict different columns, {targets[0]!r} and {targets[1]!r}", param="compare"
        )


def _answer(
    spec: EvaluationSpec, package: Package, table: pa.Table, columns: Sequence[Column], ctx: JobContext, end: float
) -> Predictions:
    """What the packaged graph itself says about a test set."""
    manifest = package.manifest
    if manifest.task in COURSES:
        posed = _pose(spec, package, table, columns)
        assert isinstance(posed, Course)
        return posed.answered(package, ctx, end)
    if wide := [spec for spec in manifest.signature.inputs if not spec.column]:
        raise InvalidInput(
            f"the model's input {wide[0].name[:80]!r} has shape {wide[0].shape}, which a dataset's columns do not fill; "
            "export it with one input [-1, 1] for each column to evaluate it here",
            code="wrong_task",
            param="model",
        )
    features = [
        Column(name=spec.name, type=spec.column, nullable=spec.datatype == "FP32")
        for spec in manifest.signature.inputs
        if spec.column
    ]
    leading, _ = split_leading(_recorded(manifest).transforms) if manifest.lineage.get("spec") else ([], None)
    named = {column.name for column in features}
    leading = [op for op in leading if not isinstance(op.columns, list) or named.issuperset(op.columns)]
    test = pose_test(table, features, target_of(manifest, columns), manifest.classes, leading)
    runtime = RUNTIMES.get(manifest.runtime)()
    runtime.load(package, ctx.threads)
    wanted = "value" if manifest.classes is None else "probabilities"
    outputs = []
    for start in range(0, len(test.rows), _CHUNK):
        outputs.append(runtime.predict(test.part(test.rows[start : start + _CHUNK]))[wanted])
        ctx.progress(end * min(1.0, (start + _CHUNK) / len(test.rows)), "testing")
    runtime.close()
    return Predictions(test.rows, test.target[test.rows], np.concatenate(outputs).astype(np.float64))


def _retrain(
    spec: EvaluationSpec,
    sides: Sequence[Package],
    table: pa.Table,
    columns: Sequence[Column],
    wanted: list[str],
    ctx: JobContext,
    ends: Sequence[float],
) -> tuple[Problem, Plan, list[list[Predictions]]]:
    """(the first side's problem, ...): each side's recorded spec, trained and tested on the same parts.

    The parts are made from the first side's rows.
    """
    problems = [_pose(spec, side, table, columns) for side in sides]
    first = problems[0]
    made = divide(first, spec.how, table, columns, spec.seed)
    for note in made.notes:
        ctx.event("warning", note)
    starts = (0.0, *ends)
    return first, made, [
        predict_folds(problem, made, wanted, ctx, (starts[index], ends[index]), "fold" if not index else "other-fold")
        for index, problem in enumerate(problems)
    ]


def _pose(spec: EvaluationSpec, package: Package, table: pa.Table, columns: Sequence[Column]) -> Problem:
    """The recorded problem over a dataset, whose columns are read in the types that the model was trained on.

    InvalidInput also for slices that `spec` asks for and the problem has not.
    """
    manifest = package.manifest
    recorded = _recorded(manifest).model_copy(update={"validation": None})
    known = {spec.name: spec.column for spec in manifest.signature.inputs if spec.column}
    if manifest.classes is not None and manifest.task not in COURSES:
        known[recorded.target] = target_column(recorded.target, manifest.classes).type
    typed = [
        column.model_copy(update={"type": known.get(column.name, column.type)})
        for column in columns
        if column.name in {*(recorded.features or known), recorded.target, recorded.time, recorded.series}
    ]
    problem = pose(coerce(table, typed), typed, recorded)
    if problem.classes != manifest.classes and not isinstance(problem, Course):
        raise InvalidInput(
            "the dataset has other classes than the model was trained on; evaluate it with the method test, or "
            "train anew",
            code="unknown_class",
            param="dataset",
        )
    if spec.slices and isinstance(problem, Course):
        problem.check_slices()
    return problem


def _recorded(manifest: Manifest) -> TrainingSpec:
    spec = manifest.lineage.get("spec")
    if not spec:
        raise InvalidInput(
            "the model was imported and does not record how it was trained, so it cannot be trained again on parts; "
            "use the method test with a labelled dataset",
            code="no_recorded_spec",
            param="method",
        )
    try:
        return TrainingSpec.model_validate(spec)
    except ValidationError:
        raise InvalidInput(
            "the model's recorded spec is not one that this version understands; use the method test", param="method"
        ) from None
