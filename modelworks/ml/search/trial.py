"""One trial: hyperparameters scored by folds within the rows that may choose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelworks.core.specs import Method, SearchSpec, TrainingSpec
from modelworks.core.types import Column
from modelworks.ml.base import JobContext, Relay
from modelworks.ml.evaluate import metrics as m
from modelworks.ml.evaluate.folds import predict_folds
from modelworks.ml.evaluate.intervals import over_folds
from modelworks.ml.evaluate.splits import Plan
from modelworks.ml.search.sampler import Pruner, Tried
from modelworks.ml.train.problem import Problem, divide, pose

if TYPE_CHECKING:
    import pyarrow as pa

WHOLE = "whole"  # the scope of a search over all training rows; else "part-3": those of the validation's third part
_FOLDS = 3


class _Behind(Exception):
    """The pruner gave the trial up."""


def outer_plan(spec: TrainingSpec, problem: Problem, table: pa.Table, columns: Sequence[Column]) -> Plan | None:
    """How the report divides the rows; None when a test set of its own is the judge."""
    method = spec.validation or Method(holdout=0.2)
    if method.test:
        return None
    return divide(problem, method, table, columns, spec.seed)


def score(
    table: pa.Table,
    columns: Sequence[Column],
    spec: TrainingSpec,
    search: SearchSpec,
    scope: str,
    history: Sequence[Tried],
    ctx: JobContext,
) -> dict[str, Any]:
    """Run one trial. `spec` has its algorithm and hyperparameters; `history`: the trials that were known when it began.

    Answers {state, value, std, folds, steps, attributes}.
    """
    problem = pose(table, columns, spec.model_copy(update={"search": None}))
    made = _inner_plan(spec, search, problem, table, columns, scope)
    watch = _Watch(ctx, str(search.metric), Pruner(search, history), len(made.parts))
    try:
        parts = predict_folds(problem, made, [str(search.metric)], watch, (0.0, 1.0))
    except _Behind:
        return {"state": "pruned", "value": watch.last, "std": None, "folds": watch.folds, **watch.outcome()}
    folds = [m.score(problem.task, part, [str(search.metric)])[str(search.metric)] for part in parts]
    summary = over_folds(str(search.metric), folds)
    state = "failed" if summary["mean"] is None else "complete"
    return {"state": state, "value": summary["mean"], "std": summary["std"], "folds": folds, **watch.outcome()}


def _inner_plan(
    spec: TrainingSpec,
    search: SearchSpec,
    problem: Problem,
    table: pa.Table,
    columns: Sequence[Column],
    scope: str,
) -> Plan:
    outer = outer_plan(spec, problem, table, columns)
    honest = outer is not None and (search.nested or len(outer.parts) == 1)
    if outer is not None and not honest:
        return outer
    rows = problem.rows if outer is None or scope == WHOLE else outer.parts[int(scope.removeprefix("part-")) - 1][0]
    given = spec.validation or Method(holdout=0.2)
    method = search.validation or Method(
        kfold=_FOLDS, group=given.group, time=given.time, stratify=given.stratify, shuffle=given.shuffle
    )
    return divide(problem, method.model_copy(update={"parallel": 1}), table, columns, spec.seed, rows)


class _Watch(Relay):
    """The job's context; tells the pruner of folds, or of the first fold's epochs where the trainer reports `val_METRIC`."""

    def __init__(self, ctx: JobContext, metric: str, pruner: Pruner, total: int) -> None:
        super().__init__(ctx)
        self._metric, self._pruner, self._total = metric, pruner, total
        self.folds: list[float] = []
        self.steps: dict[int, float] = {}
        self._by_epoch = False

    @property
    def last(self) -> float | None:
        return sum(self.folds) / len(self.folds) if self.folds else next(reversed(self.steps.values()), None)

    def outcome(self) -> dict[str, Any]:
        return {"steps": self.steps, "attributes": self._pruner.attributes}

    def metric(self, step: int, values: Mapping[str, float], *, unit: str = "epoch", part: str = "") -> None:
        super().metric(step, values, unit=unit, part=part)
        if unit == "fold" and self._metric in values:
            self.folds.append(values[self._metric])
            if not self._by_epoch:
                self._tell(step, sum(self.folds) / len(self.folds), last=step >= self._total)
        elif not self.folds and f"val_{self._metric}" in values:
            self._by_epoch = True
            self._tell(step, values[f"val_{self._metric}"])

    def _tell(self, step: int, value: float, last: bool = False) -> None:
        self.steps[step] = value
        if self._pruner.behind(step, value) and not last:
            raise _Behind

    def spread(self, names: Sequence[str], parallel: int | None, seconds: float) -> None:
        """A trial is a part itself."""
