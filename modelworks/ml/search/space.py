"""What a search may try: spaces checked against an algorithm's declared hyperparameters, or suggested by them. Light.

A trainer's `Params` may suggest a field's space by `json_schema_extra={"search": {"low": ..., "high": ..., "log": true}}`
(or `{"choices": [...]}`, or False for none); when no field does, spaces are derived from types, bounds and defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Choices, Range, SearchSpec, TrainingSpec
from modelworks.core.tasks import PRIMARY
from modelworks.ml.evaluate.catalogue import METRICS, check_metrics
from modelworks.ml.train.algorithms import AUTO, TRAINERS, check_hyperparameters

Space = dict[str, Range | Choices]
ALGORITHM = "algorithm"
_FIXED = frozenset({  # how long and how exactly to train is a budget, not a property of the model
    "tol", "max_iter", "epochs", "max_epochs", "n_iter_no_change", "patience", "max_bin", "device", "precision",
    "fit_intercept", "positive", "shuffle", "average", "seed",
})  # fmt: skip
_SPREAD = 100.0  # a positive number is tried from default / 100 to default * 100
_SPREAD_INT = 4


def check_search(spec: TrainingSpec, task: str | None) -> SearchSpec | None:
    """The search that `spec` asks for with its metric and space filled in; None when it asks for none.

    `task` None: it is told from the data later, and so is what depends on it. InvalidInput names the field to change.
    """
    search = spec.search or (SearchSpec() if spec.algorithm == AUTO else None)
    if search is None:
        return None
    if spec.algorithm == AUTO and spec.stopping and search.timeout_s is None:
        search = search.model_copy(update={"timeout_s": spec.stopping.max_seconds})
    metric = search.metric or (spec.metrics[0] if spec.metrics else PRIMARY[task] if task else None)
    if metric and task:
        _check_metric(task, metric)
    if search.nested and not (spec.validation and spec.validation.kfold):
        raise InvalidInput(
            "nested goes with validation kfold; with holdout or test the report is honest without it",
            param="search.nested",
        )
    if spec.algorithm == AUTO:
        families = _families(search, task)
        space: Space | None = {ALGORITHM: Choices(choices=families)} if families else search.space
    else:
        space = check_space(spec.algorithm, spec.hyperparameters, search.space)
    return search.model_copy(update={"metric": metric, "space": space})


def _check_metric(task: str, metric: str) -> None:
    try:
        check_metrics(task, [metric])
    except InvalidInput as error:
        raise InvalidInput(error.message, code=error.code, param="search.metric") from None


def greater_is_better(metric: str) -> bool:
    return METRICS[metric].greater_is_better


def _families(search: SearchSpec, task: str | None) -> list[str]:
    """The algorithms to choose among: those named, else all that fit the task."""
    if search.space is None:
        return families_of(task) if task else []
    named = search.space.get(ALGORITHM)
    if set(search.space) != {ALGORITHM} or not isinstance(named, Choices):
        raise InvalidInput(
            'with algorithm auto the space is {"algorithm": {"choices": [...]}}; hyperparameters are tried by themselves',
            param="search.space",
        )
    for name in named.choices:
        trainer = TRAINERS.get(str(name))
        if task and task not in trainer.tasks:
            raise InvalidInput(
                f"{name} does {' and '.join(trainer.tasks)}, not {task}; leave it out", param="search.space.algorithm"
            )
    return list(dict.fromkeys(map(str, named.choices)))


def families_of(task: str) -> list[str]:
    """Every algorithm of the task, but those that say `auto = False`."""
    return [
        name for name in TRAINERS if task in (one := TRAINERS.get(name)).tasks and getattr(one, "auto", True)
    ]  # fmt: skip


def check_space(algorithm: str, given: Mapping[str, Any], space: Space | None) -> Space:
    """`space`, or the algorithm's own; InvalidInput for a name it does not have and a value that it cannot take."""
    if space is None:
        found = default_space(algorithm)
        if not found:
            raise InvalidInput(
                f"{algorithm} has nothing to search for; name a space, or leave search out", param="search.space"
            )
        return found
    if not space:
        raise InvalidInput("the space is empty; leave it out for the algorithm's own", param="search.space")
    model = TRAINERS.get(algorithm).Params
    for name, values in space.items():
        if name not in model.model_fields:
            raise InvalidInput(
                f"{algorithm} has no hyperparameter {name[:80]!r}; it has: {', '.join(model.model_fields)}",
                code="unknown_hyperparameter",
                param=f"search.space.{name[:80]}",
            )
        if isinstance(values, Range) and not kinds(model.model_fields[name]) & {int, float}:
            raise InvalidInput(f"{name} of {algorithm} is not a number; give choices", param=f"search.space.{name}")
        whole = is_integer(model.model_fields[name])
        ends = [values.low, values.high] if isinstance(values, Range) else values.choices
        if isinstance(values, Range) and whole and any(end != int(end) for end in (*ends, values.step or 1)):
            raise InvalidInput(f"{name} of {algorithm} takes integers", param=f"search.space.{name}")
        for value in ends:
            _check_value(algorithm, given, name, int(value) if whole and isinstance(values, Range) else value)
    return dict(space)


def _check_value(algorithm: str, given: Mapping[str, Any], name: str, value: Any) -> None:
    try:
        check_hyperparameters(algorithm, {**given, name: value})
    except InvalidInput as error:
        raise InvalidInput(error.message, code=error.code, param=f"search.space.{name}") from None


def default_space(algorithm: str) -> Space:
    """What an algorithm suggests to try."""
    fields = TRAINERS.get(algorithm).Params.model_fields
    hinted = {name: hint for name, field in fields.items() if (hint := _hint(field)) is not None}
    if hinted:
        return {name: _parse(hint) for name, hint in hinted.items() if hint}
    found = {name: _derived(field) for name, field in fields.items() if name not in _FIXED}
    return {name: space for name, space in found.items() if space is not None}


def is_integer(field: FieldInfo) -> bool:
    return int in kinds(field) and float not in kinds(field)


def kinds(field: FieldInfo) -> set[Any]:
    """The plain types that a field takes, without None."""
    arms = get_args(field.annotation) or (field.annotation,)
    return {arm for arm in arms if arm is not type(None)}


def _hint(field: FieldInfo) -> Any:
    return field.json_schema_extra.get("search") if isinstance(field.json_schema_extra, dict) else None


def _parse(hint: Any) -> Range | Choices:
    return Choices.model_validate(hint) if "choices" in hint else Range.model_validate(hint)


def _derived(field: FieldInfo) -> Range | Choices | None:
    default, low, high = field.default, *_bounds(field)
    choices = [value for arm in get_args(field.annotation) for value in (get_args(arm) or ()) if isinstance(value, str)]
    choices += [arm for arm in get_args(field.annotation) if isinstance(arm, str)]
    if choices:
        return Choices(choices=list(dict.fromkeys(choices))) if len(set(choices)) > 1 else None
    if isinstance(default, bool) or not isinstance(default, int | float) or default <= 0:
        return None
    if is_integer(field):
        ends = max(low, default // _SPREAD_INT, 1), min(high, default * _SPREAD_INT)
        return Range(low=ends[0], high=ends[1], log=default >= 10) if ends[0] < ends[1] else None
    if float not in kinds(field):
        return None
    if high <= 1 and low >= 0 and default >= 0.01:
        return Range(low=max(low, 0.05), high=high) if max(low, 0.05) < high else None
    start, end = max(low, default / _SPREAD), min(high, default * _SPREAD)
    return Range(low=start, high=end, log=True) if 0 < start < end else None


def _bounds(field: FieldInfo) -> tuple[float, float]:
    low, high = -math.inf, math.inf
    for bound in field.metadata:
        if isinstance(bound, Ge | Gt):
            low = float(bound.ge if isinstance(bound, Ge) else bound.gt)  # type: ignore[arg-type]
        elif isinstance(bound, Le | Lt):
            high = float(bound.le if isinstance(bound, Le) else bound.lt)  # type: ignore[arg-type]
    return low, high


def params_of(algorithm: str) -> type[BaseModel]:
    return TRAINERS.get(algorithm).Params
