"""What the SDK answers beside the nouns of core/types.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelworks.core.errors import InvalidInput, shown
from modelworks.core.specs import Method
from modelworks.core.types import Key, ModelVersion

B = TypeVar("B", bound=BaseModel)


class Answer(BaseModel):
    """Frozen, and keeps fields that a newer server adds."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Output(Answer):
    """One row's prediction: `label` and `probabilities`, or `value`; any other output of a model stands under its name.

    `probabilities` are by class where the model's classes are known, else in the order of the model. `value` is a
    number, or nested lists of a model that answers more than one for a row.
    """

    label: Any = None
    probabilities: dict[str, float | None] | list[Any] | float | None = None
    value: float | bool | str | list[Any] | None = None


class Prediction(Answer):
    """`outputs` in the order of the inputs; `model` is the version that made them, as name:version."""

    outputs: list[Output]
    model: str
    request_id: str = ""


class Usage(Answer):
    """What one key has used of one deployment; `key_id` or `deployment` is None where it is the sum over them.

    `prompt_tokens` includes `cached_tokens`, which the engine's cache had; `completion_tokens` includes `repeated_tokens`,
    which came out of the cache of answers.
    """

    project_id: str
    key_id: str | None = None
    key: str | None = None
    deployment: str | None = None
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    repeated_tokens: int = 0


class Algorithm(Answer):
    """A trainer that the server has; `hyperparameters` is a JSON Schema."""

    name: str
    task: str | None = None
    tasks: list[str] = []
    description: str = ""
    hyperparameters: dict[str, Any] = {}


class Model(Answer):
    """A model by name: its versions, oldest first, and the version that each alias points at."""

    name: str
    versions: list[ModelVersion]
    aliases: dict[str, int] = {}

    @property
    def latest(self) -> ModelVersion:
        """The version with the highest number: what the bare name means."""
        return max(self.versions, key=lambda one: one.version)


class NewKey(Key):
    """A key just made. `key` is the secret itself: the server shows it this once and keeps only its hash."""

    key: str = Field(repr=False)


class WhoAmI(Answer):
    """The key that the client calls with, and what it may do."""

    key_id: str
    key_name: str = ""
    project_id: str
    project_name: str = ""
    role: str
    scopes: list[str] = []


def build(model: type[B], given: B | Mapping[str, Any] | None, fields: Mapping[str, Any], what: str) -> B:
    """`given`, or a `model` of keyword arguments; raises InvalidInput that names the field."""
    if isinstance(given, model):
        if fields:
            given = model.model_validate({**given.model_dump(exclude_unset=True), **fields})
        return given
    if given is not None and not isinstance(given, Mapping):
        raise InvalidInput(f"{what}: give {model.__name__}(...), or its fields by name, not {shown(given)}")
    return parse(model, {**(given or {}), **fields}, what)


def shorthand(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """`fields` with those of an evaluation's method (kfold=, holdout=, test=...) moved to where the spec has them."""
    given = {name: value for name, value in fields.items() if name in Method.model_fields and value is not None}
    rest = {name: value for name, value in fields.items() if name not in Method.model_fields}
    if not given:
        return rest
    if set(given) == {"time"} and method == "validation":  # of a forecast
        return {**rest, **given}
    if rest.get(method) is not None:
        raise InvalidInput(f"give {method}={{...}} or {next(iter(given))}=..., not both", param=method)
    return {**rest, method: given}


def parse(model: type[B], value: Any, what: str) -> B:
    """Validate what a user declared. `what` starts the error's sentence: a file's name, "the training job"..."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{what}: {_sentence(first, param, model)}", param=param or None) from None


def _sentence(found: Any, param: str, model: type[BaseModel]) -> str:
    if found["type"] == "missing":
        return f"{param} is required"
    if found["type"] == "extra_forbidden":
        known = f"; known here: {', '.join(model.model_fields)}" if "." not in param else ""
        return f"there is no field {param}{known}"
    reason = str(found["msg"]).removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    got = found.get("input")
    shown = f", not {got!r:.80}" if isinstance(got, str | int | float | bool) else ""
    return f"{param}: {reason}{shown}" if param else reason
