"""A learning problem: a table and a training spec, checked and brought into the form that fits and splits work on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Method, TrainingSpec, TransformSpec
from modelworks.core.tasks import CLASSIFICATION, REGRESSION
from modelworks.core.types import Column
from modelworks.ml.data.stored import StoredTable
from modelworks.ml.data.transforms.rows import missing_mask
from modelworks.ml.data.types import to_batch
from modelworks.ml.evaluate.inputs import coerce
from modelworks.ml.evaluate.splits import ASIDE, TEST, TRAIN, Plan, plan
from modelworks.ml.train.algorithms import course_of
from modelworks.ml.train.checks import check_method, check_training, feature_columns, find, task_of
from modelworks.ml.train.rows import kept_rows, split_leading

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.base import Batch

MAX_CLASSES = 1000
_FEW = 20  # an integer target with at most this many values is taken for classes when nothing else decides


@dataclass(frozen=True)
class Problem:
    """`batch` and `target` hold all rows of the table; `rows` are those that count, after leading row ops.

    `target` [n]: class indices int64 (into `classes`) or values float64; what it holds outside `rows` means nothing.
    `transforms`: what the preparation is to fit; None is the default one.
    """

    spec: TrainingSpec
    task: str
    columns: list[Column]
    batch: Batch
    rows: np.ndarray
    target: np.ndarray
    classes: list[Any] | None
    transforms: list[TransformSpec] | None
    stored: StoredTable | None = None
    """The rows, where they are not in memory; `batch` is then empty."""

    def part(self, rows: np.ndarray) -> Batch:
        """The features of `rows`."""
        if self.stored is not None:
            return self.stored.batch(self.columns, rows)
        return {column.name: self.batch[column.name][rows] for column in self.columns}

    def split(self, method: Method, rows: np.ndarray, along: np.ndarray | None, seed: int) -> Plan:
        """Which of `rows` train and which test. `along`: what the method's column says of each (`split_values`)."""
        return plan(method, self.task, rows, self.target, along, seed, frugal=self.stored is not None)

    def portions(self, rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, Batch]]:
        """(some of `rows`, their features) until all were there; of stored data in the order in which they lie."""
        if self.stored is None:
            for start in range(0, len(rows), size):
                yield rows[start : start + size], self.part(rows[start : start + size])
            return
        wanted = np.zeros(self.stored.num_rows, dtype=bool)
        wanted[rows] = True
        for numbers, batch in self.stored.chunks(self.columns):
            mask = wanted[numbers]
            if mask.any():
                yield numbers[mask], {name: values[mask] for name, values in batch.items()}


def class_text(value: Any) -> str:
    """How a class is written in the output `label`."""
    return str(value)


def pose(table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Problem:
    """The problem that `spec` poses over `table` (canonical), in memory or not.

    InvalidInput for what cannot be learned, before any fit.
    """
    spec = check_training(spec, columns)
    if (course := course_of(spec.algorithm, spec.task)) is not None:
        posed: Problem = course.pose(table, columns, spec)
        return posed
    if isinstance(table, StoredTable):
        return _pose_stored(table, columns, spec)
    target = find(columns, spec.target, "target")
    features = feature_columns(spec, columns)
    leading, rest = split_leading(spec.transforms)
    raw = to_batch(table, features) | {target.name: target_values(table, target)}
    if not table.num_rows:
        raise InvalidInput("the dataset has no rows", param="dataset")
    keep = kept_rows(leading, raw, features, target)
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise InvalidInput(
            "no row is left after the row ops; fill missing values instead of dropping rows", param="transforms"
        )
    _check_target(raw[target.name], rows, target.name)
    features = [_as_kept(column, raw[column.name][rows]) for column in features]
    _check_features(features, raw, rows, spec)
    task = task_of(spec, target) or _task_of_integers(raw[target.name][rows])
    if task == CLASSIFICATION:
        classes, encoded = encode(raw[target.name], rows, target)
    else:
        classes, encoded = None, raw[target.name].astype(np.float64)
    batch = to_batch(table, features)
    return Problem(spec, task, features, batch, rows, encoded, classes, rest)


def divide(
    problem: Problem,
    method: Method,
    table: pa.Table | StoredTable,
    columns: Sequence[Column],
    seed: int,
    rows: np.ndarray | None = None,
) -> Plan:
    """How `method` divides the problem's rows, or some of them."""
    along = split_values(table, columns, method, problem.spec.target)
    return problem.split(method, problem.rows if rows is None else rows, along, seed)


def _pose_stored(table: StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Problem:
    """As `pose`; only the target is held. What needs all rows at once is refused."""
    import pyarrow as pa

    target = find(columns, spec.target, "target")
    features = feature_columns(spec, columns)
    leading, rest = split_leading(spec.transforms)
    column = table.column(target.name)
    codes: np.ndarray | None = None
    if pa.types.is_string(column.type):  # each class once: a million texts take a hundred megabytes
        coded = column.dictionary_encode().combine_chunks()
        names = np.array(["", *coded.dictionary.to_pylist()], dtype=object)  # 0 for what is missing
        codes = coded.indices.fill_null(-1).to_numpy() + np.int32(1)
        del coded
        values = names[codes] if leading else codes
    else:
        values = target_values(pa.table({target.name: column}), target)
    del column
    keep = np.ones(table.num_rows, dtype=bool)
    if any(op.op != "drop-missing" for op in leading):
        raise InvalidInput(
            "the data is larger than the memory for it, and drop-duplicates needs all rows at once; drop them before the "
            "upload, or raise resources.memory_mb",
            code="too_large",
            param="transforms",
        )
    if leading:
        for numbers, batch in table.chunks(features):
            keep[numbers] = kept_rows(leading, batch | {target.name: values[numbers]}, features, target)
    rows = np.flatnonzero(keep).astype(np.int32 if table.num_rows < 2**31 else np.int64)
    if not len(rows):
        raise InvalidInput(
            "no row is left after the row ops; fill missing values instead of dropping rows", param="transforms"
        )
    task = task_of(spec, target)
    if codes is not None and task == CLASSIFICATION:
        counts = np.bincount(codes if keep.all() else codes[rows], minlength=len(names))
        if counts[0] or "" in names[1:]:
            _check_target(names[codes], rows, target.name)
        classes, places = encode(names, np.flatnonzero(counts), target)
        return Problem(spec, task, features, {}, rows, places.astype(np.int32)[codes], classes, rest, table)
    if codes is not None:
        values = names[codes]
    _check_target(values, rows, target.name)
    task = task or _task_of_integers(values[rows])
    if task != CLASSIFICATION:
        return Problem(spec, task, features, {}, rows, values.astype(np.float64), None, rest, table)
    classes, encoded = encode(values, rows, target)
    return Problem(spec, task, features, {}, rows, encoded.astype(np.int32), classes, rest, table)


def target_values(table: pa.Table, target: Column) -> np.ndarray:
    """float64 with NaN, int64 with INT64_MISSING (float64 if beyond), uint8 with BOOL_MISSING, or texts with ""."""
    import pyarrow as pa

    values = table.column(target.name)
    if target.type == "number":
        return values.cast(pa.float64()).to_numpy().astype(np.float64)
    return to_batch(table, [target.model_copy(update={"nullable": False})])[target.name]


def _check_target(values: np.ndarray, rows: np.ndarray, name: str) -> None:
    missing = missing_mask(values[rows])
    if missing.any():
        raise InvalidInput(
            f"the target {name!r} is missing in {int(missing.sum())} of {len(rows)} rows, first in row "
            f"{int(rows[missing.argmax()]) + 1}; "
            "put the transform drop-missing first to leave them out",
            code="missing_target",
            param="target",
            detail={"count": int(missing.sum()), "first_row": int(rows[missing.argmax()]) + 1},
        )
    if values.dtype.kind == "f" and not np.isfinite(values[rows]).all():
        raise InvalidInput(
            f"the target {name!r} has infinite values; correct or drop those rows", code="bad_target", param="target"
        )


def _as_kept(column: Column, values: np.ndarray) -> Column:
    return column.model_copy(update={"nullable": bool(missing_mask(values).any())})


def _check_features(features: Sequence[Column], batch: Batch, rows: np.ndarray, spec: TrainingSpec) -> None:
    dropped = {
        name
        for step in spec.transforms or []
        if step.op == "drop" and isinstance(step.columns, list)
        for name in step.columns
    }
    for column in features:
        if column.name not in dropped and missing_mask(batch[column.name][rows]).all():
            raise InvalidInput(
                f"the feature {column.name!r} has no value in any row; leave it out of features, or add the "
                "transform drop for it",
                code="empty_feature",
                param="features",
            )


def _task_of_integers(values: np.ndarray) -> str:
    """Few integers, each often: classes. Else numbers."""
    distinct = len(np.unique(values))
    return CLASSIFICATION if distinct <= _FEW and distinct * 5 <= len(values) else REGRESSION


def encode(values: np.ndarray, rows: np.ndarray, target: Column) -> tuple[list[Any], np.ndarray]:
    """The sorted classes as JSON values, and each row's index into them (0 outside `rows`)."""
    whole = values[rows]
    if whole.dtype.kind == "f":
        if (whole != np.floor(whole)).any():
            raise _continuous(target, len(np.unique(whole)))
        whole = whole.astype(np.int64)
    found, codes = np.unique(whole, return_inverse=True)
    if target.type in ("number", "integer") and len(found) > max(_FEW, len(rows) // 10):
        raise _continuous(target, len(found))
    if len(found) > MAX_CLASSES:
        raise InvalidInput(
            f"the target {target.name!r} has {len(found)} different values, more than {MAX_CLASSES} classes; "
            "choose another target",
            code="bad_target",
            param="target",
        )
    if len(found) < 2:
        raise InvalidInput(
            f"the target {target.name!r} has only one class, {str(found[0])[:80]!r}; there is nothing to tell apart",
            code="one_class",
            param="target",
        )
    read = bool if target.type == "boolean" else int if target.type in ("number", "integer") else str
    encoded = np.zeros(len(values), dtype=np.int64)
    encoded[rows] = codes.ravel()
    return [read(value) for value in found.tolist()], encoded


def _continuous(target: Column, distinct: int) -> InvalidInput:
    return InvalidInput(
        f"the target {target.name!r} is continuous ({distinct} different numbers), not classes; "
        "choose a regression algorithm such as ridge, or give the column the type category",
        code="continuous_target",
        param="algorithm",
    )


@dataclass(frozen=True)
class TestSet:
    """Labelled rows that a finished model is tested on: `rows` are those that leading row ops keep, `target` is
    encoded.
    """

    batch: Batch
    rows: np.ndarray
    target: np.ndarray

    def part(self, rows: np.ndarray) -> Batch:
        return {name: values[rows] for name, values in self.batch.items()}


def pose_test(
    table: pa.Table,
    columns: Sequence[Column],
    target: str,
    classes: list[Any] | None,
    leading: Sequence[TransformSpec] = (),
) -> TestSet:
    """`table` as a test set for a model of these feature `columns` and `classes` (None: a number). InvalidInput as in
    `pose`.
    """
    label = target_column(target, classes)
    table = coerce(table, [*columns, label])
    values = target_values(table, label)
    batch = to_batch(table, columns)
    rows = np.flatnonzero(kept_rows(leading, batch | {target: values}, columns, label))
    if not len(rows):
        raise InvalidInput("the test set has no rows, or its row ops leave none", code="too_few_rows", param="dataset")
    _check_target(values, rows, target)
    return TestSet(batch, rows, _encode_as(classes, values, rows))


def target_column(name: str, classes: list[Any] | None) -> Column:
    """The target as a column, its type told from the model's classes."""
    kinds: dict[type, Any] = {bool: "boolean", int: "integer", str: "category"}
    return Column(name=name, type=kinds.get(type(classes[0]), "category") if classes else "number", nullable=True)


def _encode_as(classes: list[Any] | None, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`values` of a target as indices into `classes` (or float64). InvalidInput for a class that is not among them."""
    if classes is None:
        return values.astype(np.float64)
    places = {value: index for index, value in enumerate(classes)}
    encoded = np.zeros(len(values), dtype=np.int64)
    for row, value in zip(rows.tolist(), values[rows].tolist(), strict=True):
        if value not in places:
            raise InvalidInput(
                f"row {row + 1} has the class {str(value)[:80]!r}, which the model does not know; "
                f"it knows: {', '.join(class_text(known) for known in classes[:20])}",
                code="unknown_class",
                param="dataset",
            )
        encoded[row] = places[value]
    return encoded


def split_values(table: pa.Table | StoredTable, columns: Sequence[Column], method: Method, target: str) -> np.ndarray | None:
    """[n]: the group of each row, its time as a sortable number, or its part; None when the method has none of these.

    Missing ones are refused.
    """
    import pyarrow as pa

    check_method(method, columns, target)
    if method.split:
        said = np.asarray(table.column(method.split).cast(pa.string()).to_pylist(), dtype=object)
        return np.where(said == "train", TRAIN, np.where(said == "test", TEST, ASIDE))
    name = method.group or method.time
    if name is None:
        return None
    values = table.column(name)
    if values.null_count:
        first = next(i for i, valid in enumerate(values.is_valid().to_pylist()) if not valid)
        raise InvalidInput(
            f"the column {name!r} is missing in {values.null_count} rows, first in row {first + 1}; the split "
            "needs it in every row",
            code="missing_values",
            param="group" if method.group else "time",
        )
    if method.group:
        return np.unique(np.asarray(values.cast(pa.string()).to_pylist(), dtype=object), return_inverse=True)[1].ravel()
    if pa.types.is_timestamp(values.type):
        return values.cast(pa.timestamp("us", values.type.tz)).cast(pa.int64()).to_numpy()
    return values.cast(pa.float64()).to_numpy()
