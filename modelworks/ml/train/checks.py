"""What can be said about a training job before it is queued: from its spec and the dataset's columns alone. Light."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Method, TrainingSpec
from modelworks.core.tasks import CLASSIFICATION, FORECAST, REGRESSION, TAGGING, base_of, kind_of, named
from modelworks.core.types import Column
from modelworks.ml.data.transforms.catalogue import check_transforms
from modelworks.ml.evaluate.catalogue import check_metrics
from modelworks.ml.nets.params import NetParams
from modelworks.ml.train.algorithms import AUTO, TRAINERS, check_hyperparameters, course_of

_TASK_OF_TYPE = {"category": CLASSIFICATION, "boolean": CLASSIFICATION, "text": CLASSIFICATION, "number": REGRESSION}
_SHOWN = 30


def check_training(spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
    """`spec` with features, hyperparameters' defaults and canonical transforms filled in.

    InvalidInput names the field to change.
    """
    spec = _with_task(spec, columns)
    course = course_of(spec.algorithm, spec.task)
    if spec.series is not None and (course is None or course.kind != FORECAST):
        raise InvalidInput(f"{spec.algorithm} does not forecast; leave series out", param="series")
    if course is not None:
        checked: TrainingSpec = course.check(spec, columns)
        return checked
    if not spec.target:
        raise InvalidInput("name the column to predict in 'target'", code="no_target", param="target")
    target = find(columns, spec.target, "target")
    if spec.time is not None:
        raise InvalidInput(
            f"{spec.algorithm} does not forecast; leave time out, or give it in validation to split along it", param="time"
        )
    features = feature_columns(spec, columns)
    task = task_of(spec, target)
    if task:
        check_metrics(task, spec.metrics, spec.gates)
    if spec.validation:
        check_method(spec.validation, columns, spec.target)
    check_run(spec, task)
    _check_kind(spec, features)
    if spec.threshold is not None and task not in (None, CLASSIFICATION):
        raise InvalidInput("threshold is for two classes; leave it out for a numeric target", param="threshold")
    if not features:
        raise InvalidInput(
            "there is no feature to learn from; name at least one column besides the target", param="features"
        )
    return spec.model_copy(
        update={
            "features": [column.name for column in features],
            "hyperparameters": _hyperparameters(spec),
            "transforms": None if spec.transforms is None else check_transforms(spec.transforms),
        }
    )


def _with_task(spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
    """A target of sequences is one tag for each element."""
    if spec.task is None and any(column.name == spec.target and column.type == "sequence" for column in columns):
        return spec.model_copy(update={"task": TAGGING})
    return spec


def check_run(spec: TrainingSpec, task: str | None) -> None:
    """What nets alone have: an early end, and processes that share their batches."""
    if spec.algorithm != AUTO and spec.resources.processes > 1 and not issubclass(TRAINERS.get(spec.algorithm).Params, NetParams):
        raise InvalidInput(
            f"{spec.algorithm} trains in one process; leave processes out and set threads, or choose a net such as mlp",
            code="bad_resources",
            param="resources.processes",
        )
    if spec.stopping is None:
        return
    if spec.algorithm == AUTO:
        if spec.stopping.model_fields_set - {"max_seconds"}:
            raise InvalidInput("with algorithm auto, stopping takes max_seconds alone: the budget of the whole search", param="stopping")
        return
    if not hasattr(TRAINERS.get(spec.algorithm), "learn"):
        raise InvalidInput(
            f"{spec.algorithm} does not stop early; leave stopping out, or choose a net such as mlp", param="stopping"
        )
    if task and spec.stopping.metric != "loss":
        check_metrics(task, [spec.stopping.metric])


def _check_kind(spec: TrainingSpec, features: Sequence[Column]) -> None:
    """A task that names what it reads must be of the features; `tabular` says nothing of them."""
    if lists := [column.name for column in features if column.type == "sequence"]:
        raise InvalidInput(
            f"the feature {lists[0]!r} is a sequence, which is read where the target is one, too: a tag for each element, by rnn "
            "or transformer; name the other features",
            code="wrong_features",
            param="features",
        )
    if spec.task is None or not features or spec.task.startswith("tabular-"):
        return
    fitting = named(base_of(spec.task), kind_of(column.type for column in features))
    if spec.task != fitting:
        shown = ", ".join(f"{column.name} ({column.type})" for column in features[:10])
        raise InvalidInput(f"the features are {shown}, so the task is {fitting}, not {spec.task}", param="task", code="wrong_task")


def _hyperparameters(spec: TrainingSpec) -> dict[str, Any]:
    if spec.algorithm != AUTO:
        return check_hyperparameters(spec.algorithm, spec.hyperparameters)
    if spec.hyperparameters:
        raise InvalidInput(
            "algorithm auto chooses the hyperparameters; name an algorithm, or leave them out", param="hyperparameters"
        )
    return {}


def find(columns: Sequence[Column], name: str, param: str) -> Column:
    """The column `name`; InvalidInput that lists those there are."""
    for column in columns:
        if column.name == name:
            return column
    there = ", ".join(column.name for column in columns[:_SHOWN]) + (", ..." if len(columns) > _SHOWN else "")
    raise InvalidInput(
        f"the dataset has no column {name[:80]!r} for {param}; it has: {there}", code="unknown_column", param=param
    )


def feature_columns(spec: TrainingSpec, columns: Sequence[Column]) -> list[Column]:
    """The columns to learn from, in the dataset's order: those named, else all but target, group and time of the
    split.
    """
    if spec.features is None:
        method = spec.validation
        aside = {spec.target} | ({method.group, method.time, method.split} if method else set())
        if any(column.type in ("image", "audio", "text") for column in columns):
            aside.add("split")  # the folder above the classes of an archive: no feature of what is in it
        return [column for column in columns if column.name not in aside]
    if spec.target in spec.features:
        raise InvalidInput(
            f"the target {spec.target!r} is also among the features; take it out of features",
            code="target_among_features",
            param="features",
        )
    chosen = {find(columns, name, "features").name for name in spec.features}
    return [column for column in columns if column.name in chosen]


def task_in(spec: TrainingSpec, columns: Sequence[Column]) -> str | None:
    """As `task_of`, of a spec that was checked."""
    course = course_of(spec.algorithm, spec.task)
    return str(course.kind) if course is not None else task_of(spec, find(columns, spec.target, "target"))


def task_of(spec: TrainingSpec, target: Column) -> str | None:
    """The task, or None while only the values of an integer target can tell.

    InvalidInput when algorithm and target do not fit.
    """
    tasks = (CLASSIFICATION, REGRESSION) if spec.algorithm == AUTO else TRAINERS.get(spec.algorithm).tasks
    asked = base_of(spec.task) if spec.task else None
    if asked and asked not in tasks:
        raise InvalidInput(
            f"{spec.algorithm} does {' and '.join(tasks)}, not {spec.task}; choose another algorithm", param="task"
        )
    task = asked or (tasks[0] if len(tasks) == 1 else _TASK_OF_TYPE.get(target.type))
    if target.type == "time":
        raise InvalidInput(
            f"the target {target.name!r} is a time, which cannot be predicted; choose another column, or turn it "
            "into a number",
            code="bad_target",
            param="target",
        )
    if target.type in ("image", "audio", "sequence"):
        raise InvalidInput(
            f"the target {target.name!r} is of type {target.type}, which cannot be predicted; choose another column",
            code="bad_target",
            param="target",
        )
    if task in (REGRESSION, FORECAST) and target.type not in ("number", "integer"):
        raise InvalidInput(
            f"{spec.algorithm} predicts numbers but the target {target.name!r} is of type {target.type}; "
            "choose a classification algorithm such as logistic-regression, or correct the column's type",
            code="bad_target",
            param="algorithm",
        )
    return task


def check_method(method: Method, columns: Sequence[Column], target: str) -> None:
    """InvalidInput unless the columns that the method names are there and are not the target."""
    for param in ("group", "time", "split"):
        name = getattr(method, param)
        if name is None:
            continue
        column = find(columns, name, param)
        if name == target:
            raise InvalidInput(f"{param} must be another column than the target {target!r}", param=param)
        if param == "time" and column.type not in ("time", "number", "integer"):
            raise InvalidInput(
                f"the column {name!r} is of type {column.type}; time needs one of type time, number or integer",
                param="time",
            )
