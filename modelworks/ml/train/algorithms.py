"""The catalogue of algorithms: names, tasks and hyperparameters, and their check before a job is queued. Light: no
numpy, no scikit-learn.
"""

from __future__ import annotations

from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError

from modelworks.core.errors import InvalidInput
from modelworks.core.registry import Registry
from modelworks.core.tasks import ANOMALY, FORECAST, GENERATION, RECOMMENDATION, TAGGING, named
from modelworks.ml.base import Trainer

AUTO = "auto"  # in place of an algorithm: the best of those that fit the task

TRAINERS: Registry[type[Trainer]] = Registry(
    "modelworks.trainers",
    "algorithm",
    {
        "linear-regression": "modelworks.ml.train.linear:LinearRegression",
        "ridge": "modelworks.ml.train.linear:Ridge",
        "lasso": "modelworks.ml.train.linear:Lasso",
        "elastic-net": "modelworks.ml.train.linear:ElasticNet",
        "logistic-regression": "modelworks.ml.train.linear:LogisticRegression",
        "sgd-classifier": "modelworks.ml.train.sgd:SgdClassifier",
        "sgd-regressor": "modelworks.ml.train.sgd:SgdRegressor",
        "gradient-boosted-trees": "modelworks.ml.train.boosted:GradientBoostedTrees",
        "mlp": "modelworks.ml.nets.mlp:Mlp",
        "cnn": "modelworks.ml.nets.cnn:Cnn",
        "rnn": "modelworks.ml.nets.sequences:Rnn",
        "transformer": "modelworks.ml.nets.sequences:Transformer",
        "forecaster": "modelworks.ml.nets.forecaster:Forecaster",
        "multimodal": "modelworks.ml.nets.multimodal:Multimodal",
        "text-classifier": "modelworks.ml.nets.pretrained:TextClassifier",
        "image-classifier": "modelworks.ml.nets.pretrained:ImageClassifier",
        "autoencoder": "modelworks.ml.nets.autoencoder:Autoencoder",
        "recommender": "modelworks.ml.nets.recommender:Recommender",
    },
)
# tasks that are not features to one target, each with what it does in its own way
COURSES: Registry[Any] = Registry(
    "modelworks.courses",
    "task",
    {
        ANOMALY: "modelworks.ml.train.anomaly:Anomaly",
        FORECAST: "modelworks.ml.train.forecasting:Forecast",
        RECOMMENDATION: "modelworks.ml.train.recommendation:Recommendation",
        GENERATION: "modelworks.ml.train.generation:Generation",
        TAGGING: "modelworks.ml.train.tagging:Tagging",
    },
)


def course_of(algorithm: str, task: str | None = None) -> Any:
    """The course that the algorithm takes; None where it learns classes or numbers from features. `task`: the one asked
    for, of an algorithm that does several.
    """
    if algorithm == AUTO:
        return None
    tasks = TRAINERS.get(algorithm).tasks
    task = task if task in tasks else tasks[0]
    return COURSES.get(task) if task in COURSES else None


def describe() -> list[dict[str, Any]]:
    """Every algorithm with its tasks and its hyperparameters as JSON Schema, for `GET /api/v1/algorithms`."""
    return [_describe(name, TRAINERS.get(name)) for name in TRAINERS]


def _describe(name: str, trainer: type[Trainer]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(named(task, kind) for kind in reads(trainer) for task in trainer.tasks))
    return {
        "name": name,
        "task": tasks[0],
        "tasks": tasks,
        "description": " ".join((trainer.__doc__ or "").split()),
        "accepts_missing": trainer.accepts_missing,
        "hyperparameters": trainer.Params.model_json_schema(),
    }


def reads(trainer: type[Trainer]) -> tuple[str, ...]:
    """The kinds of features that it is made for, the usual one first (`core/tasks.py`)."""
    return getattr(trainer, "reads", ("tabular",))


def check_hyperparameters(algorithm: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the defaults filled in.

    InvalidInput for an unknown algorithm or name and for a value out of range.
    """
    model = TRAINERS.get(algorithm).Params
    unknown = next((name for name in given if name not in model.model_fields), None)
    if unknown is not None:
        allowed = ", ".join(model.model_fields)
        raise InvalidInput(
            f"{algorithm} has no hyperparameter {str(unknown)[:80]!r}; it has: {allowed}",
            code="unknown_hyperparameter",
            param=f"hyperparameters.{str(unknown)[:80]}",
        )
    try:
        return model.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise InvalidInput(
            f"the hyperparameter {name!r} of {algorithm} cannot be {str(given.get(name))[:80]!r}; give "
            f"{_allowed(model, name)}"
            if name
            else f"the hyperparameters of {algorithm} do not fit together: {first['msg']}",
            code="bad_hyperparameter",
            param=f"hyperparameters.{name}" if name else "hyperparameters",
        ) from None


def _allowed(model: type[BaseModel], name: str) -> str:
    """What a field takes, in words: `an integer from 1 to 100000`, `one of 'l1', 'l2'`."""
    field = model.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    choices = [choice for kind in kinds for choice in (get_args(kind) or ([kind] if isinstance(kind, str) else []))]
    if choices:
        words = "one of " + ", ".join(repr(choice) for choice in choices)
    elif bool in kinds:
        words = "true or false"
    else:
        words = ("an integer" if int in kinds else "a number") + _range(field.metadata)
    return words + (" or null" if type(None) in get_args(field.annotation) else "")


def _range(metadata: list[Any]) -> str:
    low = next(
        (
            f" from {bound.ge:g}" if isinstance(bound, Ge) else f" above {bound.gt:g}"
            for bound in metadata
            if isinstance(bound, Ge | Gt)
        ),
        "",
    )
    high = next(
        (
            f" to {bound.le:g}" if isinstance(bound, Le) else f" below {bound.lt:g}"
            for bound in metadata
            if isinstance(bound, Le | Lt)
        ),
        "",
    )
    return low + high
