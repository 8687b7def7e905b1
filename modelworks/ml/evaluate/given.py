"""Predictions that are there already, of any model: read out of a table, then measured as a model's own are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec, GivenPredictions, OtherPredictions
from modelworks.core.tasks import CLASSIFICATION, CLUSTERING, DETECTION, FORECAST, REGRESSION, SPEECH, SUMMARY
from modelworks.core.types import Column
from modelworks.ml.evaluate import boxes, clusters, texts
from modelworks.ml.evaluate.asked import check_other, scores_by_class, settled
from modelworks.ml.evaluate.catalogue import check_metrics, gate_results, offered
from modelworks.ml.evaluate.compare import compare
from modelworks.ml.evaluate.evaluate import Evaluated
from modelworks.ml.evaluate.folds import kept, summarise
from modelworks.ml.evaluate.metrics import inside
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.slices import measure

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.base import JobContext

_UNEVEN = 0.01  # how far the probabilities of a row may be from 1 together; they are made even
_MAX_CLASSES = 1000
_CURVES = 10


@dataclass
class Read:
    """Predictions of one side, with what the report says of them."""

    found: Predictions
    classes: list[str] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate_given(
    spec: EvaluationSpec,
    table: pa.Table,
    columns: Sequence[Column],
    ctx: JobContext,
    *,
    other: tuple[pa.Table, Sequence[Column]] | None = None,
) -> Evaluated:
    """Score `spec.predictions` in `table`. `other`: the dataset of `predictions.compare`, where it names one."""
    assert spec.predictions is not None
    given = settled(spec.predictions, columns)
    task = given.task
    ctx.progress(0.05, "reading")
    rows = _counted(given, table)
    classes = _classes(given, table, rows, other[0] if other else table) if task == CLASSIFICATION else None
    read = _read(given, table, rows, classes, spec.seed)
    wanted = check_metrics(task, spec.metrics, spec.gates, classes=len(classes) if classes else None, among=offered(given))
    ctx.progress(0.3, "scoring")
    metrics, details = summarise(task, [read.found], wanted, read.classes, spec.seed)
    details |= read.details
    details["test_rows"] = [read.found.counted]
    details["notes"] = [*read.notes, *_left_out(table.num_rows - len(rows), task), *details["notes"]]
    if task == CLASSIFICATION and given.scores is None:  # there is nothing to be sure of
        details.pop("calibration", None)
        details.pop("thresholds", None)
    ctx.progress(0.6, "measuring slices")
    if spec.slices:
        details["slices"] = measure(task, spec.slices, read.found, table, columns, wanted, spec.seed)
    if given.compare is not None:
        ctx.progress(0.8, "comparing")
        second = _second(given, given.compare, table, columns, rows, other, classes, spec.seed)
        among = [name for name in wanted if name in offered(given.model_copy(update={"scores": given.compare.scores}))]
        if not among:
            raise InvalidInput("the other predictions have no scores, which the metrics need; name other metrics", param="metrics")
        details["comparison"] = {"with": given.compare.name} | compare(task, [read.found], [second], among, spec.seed)
    if spec.gates:
        details["gates"] = gate_results(spec.gates, metrics)
    return Evaluated(metrics, details, {"predictions": _named(given)}, kept([read.found], spec.seed))


def _named(given: GivenPredictions) -> str:
    return given.prediction or "scores"


def _left_out(count: int, task: str) -> list[str]:
    if not count:
        return []
    what = "without a prediction are the history that mase is measured by" if task == FORECAST else "without a reference are left out"
    return [f"{count} row{'s' if count > 1 else ''} {what}"]


def _counted(given: GivenPredictions, table: pa.Table) -> np.ndarray:
    """The rows with a reference; of a forecast, those that were forecast."""
    import pyarrow.compute as pc

    keep = np.ones(table.num_rows, dtype=bool)
    references = [given.reference] if isinstance(given.reference, str) else given.reference or []
    if given.task != CLUSTERING:
        for name in references:
            keep &= pc.is_valid(table.column(name)).to_numpy()
    if given.task == FORECAST:
        keep &= pc.is_valid(table.column(given.prediction)).to_numpy()
    if not keep.any():
        raise InvalidInput(
            f"no row has a value in {', '.join(map(repr, references)) or 'the table'}"
            + (f" and in {given.prediction!r}" if given.task == FORECAST else ""),
            code="no_reference",
            param="predictions.reference",
        )
    return np.flatnonzero(keep)


def _read(given: GivenPredictions, table: pa.Table, rows: np.ndarray, classes: list[str] | None, seed: int) -> Read:
    if given.task == CLASSIFICATION:
        assert classes is not None
        return _of_classes(given, table, rows, classes)
    if given.task in (REGRESSION, FORECAST):
        return _of_numbers(given, table, rows)
    if given.task == CLUSTERING:
        return _of_clusters(given, table, rows, seed)
    return _of_boxes(given, table, rows) if given.task == DETECTION else _of_texts(given, table, rows)


def _second(
    given: GivenPredictions,
    said: OtherPredictions,
    table: pa.Table,
    columns: Sequence[Column],
    rows: np.ndarray,
    other: tuple[pa.Table, Sequence[Column]] | None,
    classes: list[str] | None,
    seed: int,
) -> Predictions:
    """The other side's predictions, by the numbers of this side's rows."""
    asked = given.model_copy(update={"prediction": said.prediction, "scores": said.scores, "low": None, "high": None})
    if other is None:
        check_other(given, columns)
    else:
        check_other(given, other[1])
        there, rows = _beside(said, table, other[0], rows)
        columns_there = {name: there.column(name) for name in _own(asked, there)}
        for name, values in columns_there.items():
            fresh = f"\0{name}"  # no column of a dataset is called so
            table = table.append_column(fresh, values)
        asked = _renamed(asked, columns_there)
    if given.task == FORECAST:  # what is forecast is what both forecast
        rows = rows[_valid(table, str(asked.prediction))[rows]]
    return _read(asked, table, rows, classes, seed).found


def _own(asked: GivenPredictions, there: pa.Table) -> list[str]:
    names = [asked.prediction] if asked.prediction else []
    return [*names, *scores_by_class(asked.scores, there.column_names).values()]


def _renamed(asked: GivenPredictions, fresh: dict[str, Any]) -> GivenPredictions:
    prediction = f"\0{asked.prediction}" if asked.prediction else None
    scores = {one: f"\0{name}" for one, name in scores_by_class(asked.scores, fresh).items()} if asked.scores else None
    return asked.model_copy(update={"prediction": prediction, "scores": scores})


def _beside(said: OtherPredictions, table: pa.Table, there: pa.Table, rows: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """The other dataset's rows in the order of `table`, and those of `rows` that both have."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if said.key is None:
        if there.num_rows != table.num_rows:
            raise InvalidInput(
                f"{said.dataset} has {there.num_rows} rows and not {table.num_rows}; name the column that names a row in key",
                param="predictions.compare.key",
            )
        return there, rows
    for one, where in ((table, "dataset"), (there, "predictions.compare.dataset")):
        if said.key not in one.column_names:
            raise InvalidInput(f"there is no column {said.key[:80]!r} in it", code="unknown_column", param=where)
    keys = [one.column(said.key).cast(pa.string()) for one in (table, there)]
    for values, where in zip(keys, ("dataset", "predictions.compare.dataset"), strict=True):
        if len(pc.unique(values)) != len(values):
            raise InvalidInput(f"the column {said.key!r} names some rows twice", code="key_not_unique", param=where)
    places = pc.index_in(keys[0], value_set=keys[1].combine_chunks())
    rows = rows[pc.is_valid(places).to_numpy()[rows]]
    if not len(rows):
        raise InvalidInput(f"the two datasets have no {said.key!r} in common", param="predictions.compare.key")
    return there.take(places), rows


# classes


def _classes(given: GivenPredictions, table: pa.Table, rows: np.ndarray, there: pa.Table) -> list[str]:
    """All that are in the truth, among the labels, or have scores, in order: numbers by size, else by name."""
    found = set(_labels(table, str(given.reference), rows))
    sides = [(given.prediction, given.scores, table, rows)]
    if given.compare is not None:
        sides += [(given.compare.prediction, given.compare.scores, there, np.arange(there.num_rows))]
    for prediction, scores, where, which in sides:
        if prediction and prediction in where.column_names:
            found |= set(_labels(where, prediction, which)) - {""}
        found |= set(scores_by_class(scores, where.column_names))
    if len(found) > _MAX_CLASSES:
        raise InvalidInput(
            f"there are {len(found)} different labels; at most {_MAX_CLASSES} are classes. Is this a regression?",
            param="predictions.task",
        )
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)


def _labels(table: pa.Table, name: str, rows: np.ndarray) -> list[str]:
    """As texts: 1, 1.0 and "1" are one class, and so are true and "True"; "" is a missing one."""
    return [_label(value) for value in table.column(name).take(rows).to_pylist()]


def _label(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text.lower() if text in ("True", "False") else text


def _of_classes(given: GivenPredictions, table: pa.Table, rows: np.ndarray, classes: list[str]) -> Read:
    number = {name: place for place, name in enumerate(classes)}
    true = np.array([number[one] for one in _labels(table, str(given.reference), rows)], dtype=np.int64)
    if len(classes) < 2:
        raise InvalidInput(
            f"all labels are {classes[0]!r}; a classification needs two classes", code="one_class", param="predictions.reference"
        )
    notes: list[str] = []
    beside: dict[str, np.ndarray] = {}
    if given.scores is not None:
        output = _probabilities(given, table, rows, classes, notes)
    if given.prediction is not None:
        said = np.array([number.get(one, -1) for one in _labels(table, given.prediction, rows)], dtype=np.int64)
        _no_gaps(said < 0, rows, given.prediction)
        beside = {"label": said.astype(np.float64)}
        if given.scores is None:
            output = np.eye(len(classes))[said]
            notes.append("labels alone were given: what is measured by probabilities is left out")
    return Read(Predictions(rows, true, output, beside), list(classes), {}, notes)


def _probabilities(
    given: GivenPredictions, table: pa.Table, rows: np.ndarray, classes: list[str], notes: list[str]
) -> np.ndarray:
    """[n, classes]; one column of two classes says of the other what is left to 1."""
    columns = {_label(one): name for one, name in scores_by_class(given.scores, table.column_names).items()}
    if len(columns) == 1 and len(classes) == 2:
        ((one, name),) = columns.items()
        own = _unit(table, name, rows)
        return np.column_stack([1 - own, own] if classes[1] == one else [own, 1 - own])
    if lacking := [one for one in classes if one not in columns]:
        raise InvalidInput(
            f"there are no scores of the class {lacking[0][:80]!r}; name a column of scores for each class, or leave scores out",
            code="missing_scores",
            param="predictions.scores",
        )
    found = np.column_stack([_unit(table, columns[one], rows) for one in classes])
    total = found.sum(axis=1)
    if (away := np.abs(total - 1) > _UNEVEN).any():
        row = int(away.argmax())
        raise InvalidInput(
            f"the scores of row {rows[row] + 1} are {total[row]:.4g} together; give probabilities, which are 1 together, or "
            "leave scores out",
            code="not_probabilities",
            param="predictions.scores",
        )
    if (np.abs(total - 1) > 1e-6).any():
        notes.append(f"scores were made even: their sums are 1 within {float(np.abs(total - 1).max()):.2g}")
    return found / total[:, None]


def _unit(table: pa.Table, name: str, rows: np.ndarray) -> np.ndarray:
    values = _numbers(table, name, rows)
    if (out := (values < 0) | (values > 1)).any():
        row = int(out.argmax())
        raise InvalidInput(
            f"{name!r} is {values[row]:.6g} in row {rows[row] + 1}; a probability is from 0 to 1",
            code="not_probabilities",
            param="predictions.scores",
        )
    return values


# numbers


def _of_numbers(given: GivenPredictions, table: pa.Table, rows: np.ndarray) -> Read:
    true, said = (_numbers(table, str(name), rows) for name in (given.reference, given.prediction))
    if given.task == REGRESSION:
        return Read(Predictions(rows, true, said))
    if given.low and given.high:
        low, high = (_numbers(table, name, rows) for name in (given.low, given.high))
    elif given.low or given.high:
        raise InvalidInput("give both ends of the interval, or neither", param="predictions.high" if given.low else "predictions.low")
    scale, notes, order = _scales(given, table, rows)
    beside = {"scale": scale[order]} if np.isfinite(scale).all() else {}
    details: dict[str, Any] = {"forecast": {"season": given.season, "series": len(np.unique(_series(given, table)))}}
    if given.low and given.high:
        beside |= {"low": low[order], "high": high[order]}
    found = Predictions(rows[order], true[order], said[order], beside)
    if "low" in beside:
        details["forecast"]["coverage"] = float(np.mean(inside(found)))
    return Read(found, None, details, notes)


def _scales(given: GivenPredictions, table: pa.Table, rows: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(the naive error in each row's history, notes, the order of `rows` along time, series by series)."""
    from modelworks.ml.forecast.windows import naive_error

    series = _series(given, table)
    along = _along(given, table)
    value = _floats(table.column(given.reference))
    forecast = np.zeros(table.num_rows, dtype=bool)
    forecast[rows] = True
    scale = np.full(table.num_rows, np.nan)
    order = np.lexsort((along, series))
    for number in np.unique(series):
        mine = order[series[order] == number]
        begins = np.flatnonzero(forecast[mine])
        if len(begins):
            past = value[mine[: begins[0]]]
            error = naive_error(past[np.isfinite(past)], given.season)
            scale[mine] = error if error > 0 else np.nan
    notes = []
    if not np.isfinite(scale[rows]).all():
        notes.append(
            f"mase needs the history: rows before the first forecast, more than {given.season}, with a {given.reference!r} that "
            "changes and no prediction"
        )
    place = np.full(table.num_rows, -1)
    place[rows] = np.arange(len(rows))
    return scale[rows], notes, place[order[forecast[order]]]


def _series(given: GivenPredictions, table: pa.Table) -> np.ndarray:
    if given.series is None:
        return np.zeros(table.num_rows, dtype=np.int64)
    found: np.ndarray = table.column(given.series).combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return found


def _along(given: GivenPredictions, table: pa.Table) -> np.ndarray:
    if given.time is None:
        return np.arange(table.num_rows)
    column = table.column(given.time)
    if column.null_count:
        raise InvalidInput(f"{given.time!r} is missing in some rows; fill it in", param="predictions.time")
    return np.asarray(column.to_numpy())


def _numbers(table: pa.Table, name: str, rows: np.ndarray) -> np.ndarray:
    """Finite ones; InvalidInput names the first row without."""
    found = _floats(table.column(name).take(rows))
    _no_gaps(~np.isfinite(found), rows, name)
    return found


def _floats(values: Any) -> np.ndarray:
    """NaN where one is missing."""
    import pyarrow as pa

    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    return np.asarray(values.cast(pa.float64(), safe=False).fill_null(float("nan")).to_numpy())


def _no_gaps(gaps: np.ndarray, rows: np.ndarray, name: str) -> None:
    if gaps.any():
        raise InvalidInput(
            f"{name!r} has no value in {int(gaps.sum())} of {len(rows)} rows that have a reference, first in row "
            f"{rows[int(gaps.argmax())] + 1}; fill them in, or take those rows out",
            code="missing_prediction",
            param="predictions.prediction",
        )


def _valid(table: pa.Table, name: str) -> np.ndarray:
    import pyarrow.compute as pc

    return np.asarray(pc.is_valid(table.column(name)).to_numpy())


# texts


def _of_texts(given: GivenPredictions, table: pa.Table, rows: np.ndarray) -> Read:
    change: Callable[[str], str] = texts.plain if given.normalise else str
    references = given.reference if isinstance(given.reference, list) else [str(given.reference)]
    said, *true = (
        [change(value or "") for value in table.column(name).take(rows).to_pylist()] for name in (str(given.prediction), *references)
    )
    notes = []
    if empty := sum(not text.strip() for text in said):
        notes.append(f"{empty} of {len(said)} predictions are empty: they count as nothing said")
    if given.task == SPEECH:
        counts = texts.spoken(said, true[0])
        found = Predictions(rows, np.zeros(len(rows), dtype=np.int64), counts)
        return Read(found, None, {"errors": texts.errors(found)}, notes)
    counts = texts.written(said, list(zip(*true, strict=True)), given.tokenize)
    details = {"signatures": texts.signatures(given.tokenize, len(references))} if given.task != SUMMARY else {}
    return Read(Predictions(rows, np.zeros(len(rows), dtype=np.int64), counts), None, details, notes)


# boxes


def _of_boxes(given: GivenPredictions, table: pa.Table, rows: np.ndarray) -> Read:
    names: dict[str, int] = {}
    entries: list[list[float]] = []
    columns = [table.column(str(name)).take(rows).to_pylist() for name in (given.reference, given.prediction)]
    for row, true, said in zip(rows.tolist(), *columns, strict=True):
        sides = [
            _boxes(text, given, column, row, names, scored=scored)
            for text, column, scored in ((true, given.reference, False), (said, given.prediction, True))
        ]
        entries += boxes.entries(row, *sides)
    classes = list(names)
    table_of = np.array(entries)
    found = Predictions(table_of[:, 0].astype(np.int64), np.zeros(len(entries), dtype=np.int64), table_of[:, 1:])
    details = {"per_class": boxes.per_class(found, classes), "curves": boxes.curves(found, classes, _CURVES)}
    return Read(found, None, details)


def _boxes(text: str | None, given: GivenPredictions, column: Any, row: int, names: dict[str, int], *, scored: bool) -> list[boxes.Box]:
    """`[{"box": [...], "label": ..., "score": ...}]` of one image; without a label all are one class."""

    def wrong(why: str) -> InvalidInput:
        form = '[{"box": [x1, y1, x2, y2], "label": "cat"' + (', "score": 0.9}]' if scored else "}]")
        form = form.replace("x2, y2", "width, height").replace("x1, y1", "x, y") if given.boxes == "xywh" else form
        return InvalidInput(f"{column!r} in row {row + 1}: {why}; write boxes as {form}", code="bad_boxes", param="predictions.boxes")

    try:
        listed = json.loads(text) if text else []
    except (ValueError, RecursionError):
        raise wrong("it is not JSON") from None
    if not isinstance(listed, list):
        raise wrong("it is no list")
    found = []
    for one in listed:
        if not isinstance(one, dict) or not _four(one.get("box")):
            raise wrong("a box has four finite numbers")
        left, top, right, bottom = map(float, one["box"])
        if given.boxes == "xywh":
            right, bottom = left + right, top + bottom
        if right < left or bottom < top:
            raise wrong('the second corner is before the first (with width and height, set boxes to "xywh")')
        score = one.get("score", 1.0 if not scored else None)
        if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
            raise wrong("a predicted box has a score, a finite number")
        place = names.setdefault(_label(one.get("label", "")), len(names))
        found.append(boxes.Box((left, top, right, bottom), place, float(score)))
    return found


def _four(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(x, int | float) and not isinstance(x, bool) and np.isfinite(x) for x in value)
    )


# clusters


def _of_clusters(given: GivenPredictions, table: pa.Table, rows: np.ndarray, seed: int) -> Read:
    said = _labels(table, str(given.prediction), rows)
    _no_gaps(np.array([not one for one in said]), rows, str(given.prediction))
    names, cluster = np.unique(said, return_inverse=True)
    cluster = cluster.ravel()
    notes: list[str] = []
    apart = np.full(len(rows), np.nan)
    if given.features:
        features = np.column_stack([_numbers(table, name, rows) for name in given.features])
        apart = clusters.silhouettes(features, cluster, seed)
        if len(rows) > clusters.MOST:
            notes.append(f"silhouette is of {clusters.MOST} rows drawn at random")
    true = np.full(len(rows), -1, dtype=np.int64)
    if given.reference:
        labels = _labels(table, str(given.reference), rows)
        known = {one: place for place, one in enumerate(sorted(set(labels) - {""}))}
        true = np.array([known.get(one, -1) for one in labels], dtype=np.int64)
    sizes = dict(zip(names.tolist(), np.bincount(cluster).tolist(), strict=True))
    found = Predictions(rows, true, np.column_stack([cluster.astype(np.float64), apart]))
    return Read(found, None, {"clusters": sizes if len(sizes) <= _MAX_CLASSES else len(sizes)}, notes)
