"""A training job from table to package: pose the problem, evaluate it, hold the gates, fit on all rows, package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Gate, Method, TrainingSpec
from modelworks.core.types import Column
from modelworks.ml.base import JobContext, Relay
from modelworks.ml.evaluate.calibration import choose_threshold
from modelworks.ml.evaluate.catalogue import check_metrics, failed_gate, gate_results
from modelworks.ml.evaluate.folds import kept, predict_folds, summarise
from modelworks.ml.evaluate.metrics import score
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.slices import measure
from modelworks.ml.evaluate.splits import Plan, describe_method
from modelworks.ml.package import Manifest
from modelworks.ml.train.advise import fits_of, scoring_seconds
from modelworks.ml.train.course import Course
from modelworks.ml.train.fit import Span, fit
from modelworks.ml.train.packaging import lineage_of, package
from modelworks.ml.train.problem import Problem, class_text, divide, pose, pose_test
from modelworks.ml.train.rows import split_leading

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable

DEFAULT_METHOD = Method(holdout=0.2)


@dataclass(frozen=True)
class Trained:
    """`report`: metrics, details, method and predictions (bytes, `folds.kept`) of the evaluation.

    `warnings`: what the job warned of, each once."""

    manifest: Manifest
    files: dict[str, bytes]
    report: dict[str, Any]
    warnings: list[str]


def train(
    table: pa.Table | StoredTable,
    columns: Sequence[Column],
    spec: TrainingSpec,
    ctx: JobContext,
    *,
    test_table: pa.Table | None = None,
    dataset_ref: str = "",
    dataset_digest: str,
    code_version: str,
    searched: dict[str, Any] | None = None,
) -> Trained:
    """Train `spec` on `table` (canonical; a stored one is streamed, see `memory.open_table`). `test_table`: the rows of
    `spec.validation.test`, when that is the method. `searched`: what the search for the hyperparameters found.

    InvalidInput for what cannot be learned; with code gate_failed when a gate fails: its detail has gate, value and
    report.
    """
    ctx.progress(0.0, "checking")
    problem = pose(table, columns, spec)
    listening = _Listening(ctx, problem)
    spec = problem.spec
    wanted = check_metrics(problem.task, spec.metrics, spec.gates, classes=len(problem.classes or ()) or None)
    method = spec.validation or (problem.default if isinstance(problem, Course) else DEFAULT_METHOD)
    report = _validate(problem, method, wanted, table, columns, test_table, listening)
    if searched:
        report["details"] |= {"search": searched, "notes": [searched["note"], *report["details"]["notes"]]}
    check_gates(spec.gates, report)
    final = Span(listening, 0.8, 0.95, spec.seed, "final fit")
    lineage = lineage_of(spec, dataset_ref, dataset_digest, code_version, ctx.model)
    if searched:
        lineage["search"] = {
            name: searched[name] for name in ("metric", "trials", "parallel", "space", "best", "reported")
        }
    if isinstance(problem, Course):
        learnt = problem.learn(problem.rows, final)
        made = problem.package(learnt, report["metrics"], lineage, ctx.workdir, ctx.threads)
        return Trained(*made, report, list(listening.warnings))
    model = fit(problem, problem.rows, final)
    if chosen := report["details"].get("threshold"):
        model = replace(model, threshold=chosen["value"])
        lineage["threshold"] = chosen
    if problem.classes is not None and len(model.seen) < len(problem.classes):
        lost = next(name for index, name in enumerate(problem.classes) if index not in set(model.seen.tolist()))
        raise InvalidInput(
            f"the row ops drop every row of the class {class_text(lost)[:80]!r}; correct the transforms",
            param="transforms",
        )
    ctx.progress(0.95, "packaging")
    manifest, files = package(problem, model, report["metrics"], lineage, ctx.workdir, ctx.threads)
    ctx.progress(1.0, "packaged")
    return Trained(manifest, files, report, list(listening.warnings))


def _validate(
    problem: Problem,
    method: Method,
    wanted: list[str],
    table: pa.Table | StoredTable,
    columns: Sequence[Column],
    test_table: pa.Table | None,
    ctx: JobContext,
) -> dict[str, Any]:
    if method.test:
        if test_table is None:
            raise InvalidInput(f"the test dataset {method.test!r} was not given", param="validation.test")
        found, made = [_on_test(problem, test_table, ctx)], Plan([], {"name": "test", "dataset": method.test})
        shown = {name: value for name, value in score(problem.task, found[0], wanted).items() if value is not None}
        ctx.progress(0.8, "tested", **shown)
    else:
        made = divide(problem, method, table, columns, problem.spec.seed)
        found = predict_folds(problem, made, wanted, ctx, (0.0, 0.8))
    for note in made.notes:
        ctx.event("warning", note)
    found, chosen = choose_threshold(problem.spec.threshold, found, problem.classes)
    metrics, details = summarise(problem.task, found, wanted, problem.classes, problem.spec.seed)
    if isinstance(problem, Course):
        details |= problem.details(made.parts, found, wanted)
    details |= {"splitter": made.splitter, "notes": [*made.notes, *details["notes"]]}
    if chosen:
        details["threshold"] = chosen
        details["notes"].append(chosen["note"])
    if problem.spec.slices:
        tested = test_table if test_table is not None else table
        whole = Predictions.join(found)
        details["slices"] = measure(problem.task, problem.spec.slices, whole, tested, columns, wanted, problem.spec.seed)
    if problem.spec.gates:
        details["gates"] = gate_results(problem.spec.gates, metrics)
    predictions = kept(found, problem.spec.seed)
    return {"metrics": metrics, "details": details, "method": describe_method(method), "predictions": predictions}


def _on_test(problem: Problem, test_table: pa.Table, ctx: JobContext) -> Predictions:
    if isinstance(problem, Course):
        other = problem.again(test_table)
        return other.judge(problem.learn(problem.rows, Span(ctx, 0.0, 0.8, problem.spec.seed, "test")), other.rows)
    leading, _ = split_leading(problem.spec.transforms)
    test = pose_test(test_table, problem.columns, problem.spec.target, problem.classes, leading)
    model = fit(problem, problem.rows, Span(ctx, 0.0, 0.8, problem.spec.seed, "test"))
    rows = test.rows[model.preparation.rows(test.part(test.rows), test.target[test.rows])]
    if not len(rows):
        raise InvalidInput("the row ops leave no row of the test set", code="too_few_rows", param="transforms")
    return Predictions(rows, test.target[rows], model.predict(test.part(rows)))


def check_gates(gates: Sequence[Gate], report: dict[str, Any]) -> None:
    """InvalidInput with code gate_failed for the first gate that the report does not pass."""
    failed = failed_gate(gates, report["metrics"])
    if failed is None:
        return
    gate, value = failed
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", gate.at_least), ("at most", gate.at_most))
        if bound is not None
    ]
    raise InvalidInput(
        f"the gate failed: {gate.metric} is {'undefined' if value is None else f'{value:.4g}'} and must be "
        f"{' and '.join(bounds)}; "
        "nothing was registered",
        code="gate_failed",
        param="gates",
        detail={"gate": gate.model_dump(mode="json", exclude_none=True), "value": value, "report": report},
    )


class _Listening(Relay):
    """The job's context, remembering the warnings that pass through; what one fit will take becomes what all of the job will."""

    def __init__(self, ctx: JobContext, problem: Problem) -> None:
        super().__init__(ctx)
        self.warnings: dict[str, None] = {}
        self._problem = problem
        self._shares = fits_of(problem)
        self._scoring: float | None = None

    def advise(self, found: dict[str, Any]) -> None:
        one = found["seconds"]
        found = {name: value for name, value in found.items() if name != "more"}
        if self._scoring is None:
            self._scoring = round(scoring_seconds(self._problem, len(self._problem.rows)), 3)
        whole = round(one / self._shares[0] * sum(self._shares) + self._scoring, 3)
        more = {"seconds": whole, "fit_seconds": one, "fits": len(self._shares), "evaluation_seconds": self._scoring}
        super().advise({**found, **more})

    def event(self, kind: str, message: str, **data: Any) -> None:
        if kind == "warning":
            self.warnings[message] = None
        super().event(kind, message, **data)
