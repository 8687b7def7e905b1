"""Given predictions, before they are read: which task they are of, which columns they need, of which types. Light."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec, GivenPredictions
from modelworks.core.tasks import (
    CLASSIFICATION,
    CLUSTERING,
    DETECTION,
    FORECAST,
    GENERATION,
    REGRESSION,
    SPEECH,
    TEXTS,
    base_of,
)
from modelworks.core.types import Column, ColumnType
from modelworks.ml.evaluate.catalogue import OF_LANGUAGE, check_metrics

_TASKS = (CLASSIFICATION, REGRESSION, FORECAST, SPEECH, *TEXTS, DETECTION, CLUSTERING)
_SHORT = {"classification": CLASSIFICATION, "regression": REGRESSION, "automatic-speech-recognition": SPEECH}
_NUMBERS = ("number", "integer", "boolean")
_WRITTEN = ("text", "category")
_LABELS = ("category", "integer", "boolean", "text", "number")
# which of the fields that only some tasks have
_OF = {
    "scores": (CLASSIFICATION,),
    "features": (CLUSTERING,),
    "boxes": (DETECTION,),
    "normalise": (SPEECH, *TEXTS),
    "tokenize": TEXTS,
    **dict.fromkeys(("time", "series", "season", "low", "high"), (FORECAST,)),
}
_SHOWN = 30


def task_of(name: str) -> str:
    """A task by any of its names; InvalidInput lists those whose predictions can be scored."""
    found = base_of(_SHORT.get(name, name))
    if found not in _TASKS:
        known = ", ".join(["classification", "regression", *_TASKS[2:]])
        raise InvalidInput(
            f"predictions of {name[:80]!r} cannot be scored; the task is one of: {known}", code="unknown_task", param="predictions.task"
        )
    return found


def settled(given: GivenPredictions, columns: Sequence[Column]) -> GivenPredictions:
    """`given` with its task by its full name and its columns filled in. InvalidInput names the field to change."""
    task = task_of(given.task)
    for name, tasks in _OF.items():
        if task not in tasks and getattr(given, name) != GivenPredictions.model_fields[name].default:
            raise InvalidInput(f"{name} is not for {given.task}; leave it out", param=f"predictions.{name}")
    there = {column.name for column in columns}
    reference = given.reference or ("reference" if "reference" in there else None)
    if reference is None and task != CLUSTERING:
        raise InvalidInput(
            f"name the column that holds the truth in predictions.reference; there are: {_list(there)}", param="predictions.reference"
        )
    prediction = given.prediction
    if prediction is None and given.scores is None:
        prediction = "prediction"
    if isinstance(reference, list):
        if task not in TEXTS and len(reference) > 1:
            raise InvalidInput(f"{given.task} has one reference a row; name one column", param="predictions.reference")
        reference = reference if task in TEXTS else reference[0]
    if task == CLUSTERING and reference is None and given.features is None:
        raise InvalidInput(
            "give the features that were clustered, or a reference column of labels, or both", param="predictions.features"
        )
    found = given.model_copy(update={"task": task, "reference": reference, "prediction": prediction})
    types = {column.name: column.type for column in columns}
    for place, names, allowed in _needs(found, task, types):
        for name in names:
            _check(name, types, allowed, place)
    return found


def check_other(given: GivenPredictions, columns: Sequence[Column]) -> None:
    """The columns to compare with, which `columns` has."""
    other = given.compare
    if other is None:
        return
    if other.prediction is None and other.scores is None:
        raise InvalidInput("name the column of the other predictions", param="predictions.compare.prediction")
    if other.scores is not None and given.task != CLASSIFICATION:
        raise InvalidInput(f"scores is not for {given.task}; leave it out", param="predictions.compare.scores")
    if other.key and not other.dataset:
        raise InvalidInput("key matches the rows of another dataset; name that, or leave key out", param="predictions.compare.key")
    types = {column.name: column.type for column in columns}
    if other.prediction is not None:
        _check(other.prediction, types, _answers(given.task), "compare.prediction")
    for name in score_columns(other.scores, types):
        _check(name, types, _NUMBERS, "compare.scores")


def text_column(spec: EvaluationSpec, columns: Sequence[Column]) -> str:
    """The column that a language model is measured on."""
    written = [column.name for column in columns if column.type in _WRITTEN]
    if spec.text is not None:
        if spec.text not in written:
            raise InvalidInput(
                f"there is no column of texts {spec.text[:80]!r}; there are: {_list(written)}", code="unknown_column", param="text"
            )
        return spec.text
    texts = [column.name for column in columns if column.type == "text"] or written
    if len(texts) != 1:
        raise InvalidInput(f"name the column of texts in text; there are: {_list(texts) or 'none'}", param="text")
    return texts[0]


def check_language(spec: EvaluationSpec) -> None:
    """What is asked of a language model, whatever the dataset."""
    if not spec.how.test:
        raise InvalidInput('a language model is measured on texts; give method {"test": DATASET}', param="method")
    check_metrics(GENERATION, spec.metrics, spec.gates, among=OF_LANGUAGE)


def score_columns(scores: dict[str, str] | str | None, there: Iterable[str]) -> list[str]:
    return list(scores_by_class(scores, there).values())


def scores_by_class(scores: dict[str, str] | str | None, there: Iterable[str]) -> dict[str, str]:
    """Class -> column. A name with * stands for all columns of that form."""
    if scores is None:
        return {}
    if isinstance(scores, dict):
        return scores
    before, star, after = scores.partition("*")
    if not star:
        raise InvalidInput(
            f'{scores[:80]!r} says of no class; give scores as {{"class": "{scores[:40]}"}}, or a name in which * stands for '
            "the class",
            param="predictions.scores",
        )
    size = len(before) + len(after)
    found = {
        name[len(before) : len(name) - len(after)]: name
        for name in there
        if len(name) > size and name.startswith(before) and name.endswith(after)
    }
    if not found:
        raise InvalidInput(f"no column is named like {scores[:80]!r}; there are: {_list(there)}", param="predictions.scores")
    return found


def columns_of(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """What rows of a request have, as far as their values tell: lists and objects are texts, kept as JSON."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(str(name), set()).add(type(value))
    return [Column(name=name, type=_type(kinds - {type(None)})) for name, kinds in found.items()]


def _type(kinds: set[type]) -> ColumnType:
    if not kinds or kinds == {bool}:
        return "boolean" if kinds else "text"
    return "integer" if kinds <= {int} else "number" if kinds <= {int, float} else "text"


def _needs(given: GivenPredictions, task: str, there: Iterable[str]) -> list[tuple[str, list[str], tuple[str, ...]]]:
    """(field, its columns, the types they may have)."""
    truth = [given.reference] if isinstance(given.reference, str) else given.reference or []
    answers = _answers(task)
    needs = [("reference", truth, _LABELS if task == CLUSTERING else answers)]
    needs += [("prediction", [given.prediction] if given.prediction else [], answers)]
    needs += [("scores", score_columns(given.scores, there), _NUMBERS)]
    needs += [("features", given.features or [], _NUMBERS)]
    needs += [(name, [one], _NUMBERS) for name in ("low", "high") if (one := getattr(given, name))]
    needs += [("time", [given.time] if given.time else [], ("time", "number", "integer"))]
    needs += [("series", [given.series] if given.series else [], _LABELS)]
    return needs


def _answers(task: str) -> tuple[str, ...]:
    if task in (REGRESSION, FORECAST):
        return _NUMBERS
    return _WRITTEN if task in (SPEECH, DETECTION, *TEXTS) else _LABELS


def _check(name: str, types: dict[str, ColumnType], allowed: Sequence[str], place: str) -> None:
    if name not in types:
        raise InvalidInput(
            f"there is no column {name[:80]!r}; there are: {_list(types)}", code="unknown_column", param=f"predictions.{place}"
        )
    if types[name] not in allowed:
        raise InvalidInput(
            f"the column {name!r} is of type {types[name]}; {place} must be of type {' or '.join(allowed)}",
            code="wrong_column_type",
            param=f"predictions.{place}",
        )


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN])
