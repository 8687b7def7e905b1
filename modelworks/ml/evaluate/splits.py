"""Which rows train and which test: scikit-learn's splitters, chosen by method and task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Method
from modelworks.core.tasks import CLASSIFICATION


@dataclass(frozen=True)
class Plan:
    """`parts`: (training rows, test rows) as numbers of the table's rows.

    `splitter`: what made them, for the report. `parallel`: how many parts at a time, as jobs; None: as is best.
    """

    parts: list[tuple[np.ndarray, np.ndarray]]
    splitter: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    parallel: int | None = None


def describe_method(method: Method) -> dict[str, Any]:
    """The method as a report shows it: what was given, without the defaults."""
    return method.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude={"parallel"})


def plan(
    method: Method,
    task: str,
    rows: np.ndarray,
    target: np.ndarray,
    along: np.ndarray | None,
    seed: int,
    *,
    ahead: int | None = None,
    frugal: bool = False,
) -> Plan:
    """Split `rows` by `method` (holdout or kfold).

    rows [m]: the rows that count. target [n], along [n] (group or time of each row): for all rows of the table.
    ahead: with kfold along time, how many rows each fold tests; by default all folds have about as many.
    frugal: in little memory, where there are millions of rows; others are drawn than without it.
    InvalidInput when there are too few rows, groups or rows of a class.
    """
    if method.last:
        raise InvalidInput("last is for recommenders: each user's last rows; give holdout or kfold", param="validation.last")
    if method.split:
        made = _given(method, rows, _needed(along))
    elif method.kfold:
        made = _folds(method, task, rows, target, along, seed, ahead)
    else:
        made = _holdout(method, task, rows, target, along, seed, frugal)
    if task == CLASSIFICATION:
        for number, (train, _) in enumerate(made.parts, start=1):
            if len(np.unique(target[train])) < 2:
                where, mend = (f"fold {number}", "fewer folds") if method.kfold else ("the hold-out", "a smaller one")
                raise InvalidInput(
                    f"the training part of {where} has rows of one class only; give more data, or use {mend}",
                    code="too_few_rows",
                    param="validation",
                )
    return replace(made, parallel=method.parallel)


TRAIN, TEST, ASIDE = 1, 2, 0


def _given(method: Method, rows: np.ndarray, along: np.ndarray) -> Plan:
    """What a column says of each row (`along` [n]: TRAIN, TEST or ASIDE)."""
    train, test = (rows[along[rows] == part] for part in (TRAIN, TEST))
    if not len(train) or not len(test):
        lacking = "test" if len(train) else "train"
        raise InvalidInput(
            f"no row says {lacking} in the column {method.split!r}; it must say train or test",
            code="empty_split",
            param="validation.split",
        )
    notes = [f"{left} rows are neither train nor test and were left out"] if (left := len(rows) - len(train) - len(test)) else []
    return Plan([(train, test)], {"name": "column", "column": method.split}, notes)


def _folds(
    method: Method,
    task: str,
    rows: np.ndarray,
    target: np.ndarray,
    along: np.ndarray | None,
    seed: int,
    ahead: int | None,
) -> Plan:
    from sklearn import model_selection as ms

    k = int(method.kfold or 0)
    y = target[rows]
    notes: list[str] = []
    if method.time:
        order = rows[np.argsort(_needed(along)[rows], kind="stable")]
        _enough(len(rows), k * (ahead or 1) + 1, f"{k} folds along time")
        described = {"name": "TimeSeriesSplit", "folds": k} | ({"test_rows": ahead} if ahead else {})
        return _plan(ms.TimeSeriesSplit(k, test_size=ahead), order, y, None, described, notes)
    if method.group:
        groups = _needed(along)[rows]
        _enough(len(np.unique(groups)), k, f"{k} folds by {method.group!r}", "groups")
        stratify = _stratify(method, task, y, k, notes)
        name = "StratifiedGroupKFold" if stratify else "GroupKFold"
        mixed = method.shuffle and (stratify or method.repeats > 1)
        parts: list[Any] = []
        for repeat in range(method.repeats):
            splitter = getattr(ms, name)(k, shuffle=mixed, random_state=seed + repeat if mixed else None)
            parts += _plan(splitter, rows, y, groups, {}, notes).parts
        return Plan(parts, {"name": name, "folds": k, "repeats": method.repeats, "shuffle": mixed, "seed": seed}, notes)
    _enough(len(rows), k, f"{k} folds")
    stratify = _stratify(method, task, y, k, notes)
    name = "StratifiedKFold" if stratify else "KFold"
    described = {"name": name, "folds": k, "repeats": method.repeats, "shuffle": method.shuffle, "seed": seed}
    if method.repeats > 1:
        splitter = getattr(ms, "Repeated" + name)(n_splits=k, n_repeats=method.repeats, random_state=seed)
        return _plan(splitter, rows, y, None, described | {"name": "Repeated" + name, "shuffle": True}, notes)
    splitter = getattr(ms, name)(k, shuffle=method.shuffle, random_state=seed if method.shuffle else None)
    return _plan(splitter, rows, y, None, described, notes)


def _holdout(
    method: Method, task: str, rows: np.ndarray, target: np.ndarray, along: np.ndarray | None, seed: int, frugal: bool
) -> Plan:
    from sklearn import model_selection as ms

    share = float(method.holdout or 0)
    test = int(np.ceil(share * len(rows)))
    if test < 1 or test >= len(rows):
        raise InvalidInput(
            f"a hold-out of {share:g} of {len(rows)} rows leaves nothing on one side",
            code="too_few_rows",
            param="validation",
        )
    y = target[rows]
    notes: list[str] = []
    if method.time:
        order = rows[np.argsort(_needed(along)[rows], kind="stable")]
        return Plan([(order[:-test], order[-test:])], {"name": "tail", "holdout": share, "along": method.time})
    if method.group:
        groups = _needed(along)[rows]
        _enough(len(np.unique(groups)), 2, f"a hold-out by {method.group!r}", "groups")
        splitter = ms.GroupShuffleSplit(1, test_size=share, random_state=seed)
        return _plan(splitter, rows, y, groups, {"name": "GroupShuffleSplit", "holdout": share, "seed": seed}, notes)
    if not method.shuffle:
        return Plan([(rows[:-test], rows[-test:])], {"name": "tail", "holdout": share})
    stratify = _stratify_holdout(method, task, y, test, notes)
    if frugal:
        train, held = _drawn(rows, y if stratify else None, test, seed)
        return Plan([(train, held)], {"name": "drawn", "holdout": share, "stratified": stratify, "seed": seed}, notes)
    train, held = ms.train_test_split(rows, test_size=share, random_state=seed, stratify=y if stratify else None)
    return Plan(
        [(train, held)], {"name": "train_test_split", "holdout": share, "stratified": stratify, "seed": seed}, notes
    )


def _drawn(rows: np.ndarray, classes: np.ndarray | None, test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the rest, about `test` rows), both in the rows' order; of each class its share."""
    keys = np.random.default_rng(seed).random(len(rows), dtype=np.float32)
    held = np.zeros(len(rows), dtype=bool)
    for one in [None] if classes is None else np.flatnonzero(np.bincount(classes)):
        mine = np.ones(len(rows), dtype=bool) if one is None else classes == one
        own = keys[mine]
        count = min(len(own) - 1, max(1, round(test * len(own) / len(rows))))
        own.partition(count)
        held |= mine & (keys < own[count])
    return rows[~held], rows[held]


def _plan(
    splitter: Any,
    rows: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None,
    described: dict[str, Any],
    notes: list[str],
) -> Plan:
    def split() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for train, test in splitter.split(np.zeros(len(rows)), y, groups):
            if not len(train) or not len(test):
                raise InvalidInput("a fold has no rows; use fewer folds", code="too_few_rows", param="validation")
            yield rows[train], rows[test]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class with fewer rows than folds: noted in the report
        return Plan(list(split()), described, notes)


def _stratify(method: Method, task: str, y: np.ndarray, k: int, notes: list[str]) -> bool:
    """Whether to stratify k folds; a note where a class is too rare for all of them."""
    if method.stratify is False or not _is_classes(method, task):
        return False
    counts = np.bincount(y)
    counts = counts[counts > 0]
    if counts.max() < k:
        return _cannot(method, f"no class has {k} rows, so the folds are not stratified", notes)
    if counts.min() < k:
        notes.append(f"a class has only {counts.min()} rows, fewer than {k} folds: some folds lack it")
    return True


def _stratify_holdout(method: Method, task: str, y: np.ndarray, test: int, notes: list[str]) -> bool:
    if method.stratify is False or not _is_classes(method, task):
        return False
    counts = np.bincount(y)
    counts = counts[counts > 0]
    if counts.min() < 2:
        return _cannot(method, "a class has only one row, so the hold-out is not stratified", notes)
    if min(test, len(y) - test) < len(counts):
        return _cannot(
            method,
            f"one side of the hold-out has fewer rows than the {len(counts)} classes, so it is not stratified",
            notes,
        )
    return True


def _is_classes(method: Method, task: str) -> bool:
    if task != CLASSIFICATION and method.stratify:
        raise InvalidInput(
            "stratify goes with classification; leave it out for a numeric target", param="validation.stratify"
        )
    return task == CLASSIFICATION


def _cannot(method: Method, why: str, notes: list[str]) -> bool:
    if method.stratify:
        raise InvalidInput(
            f"{why}; leave stratify out, or give more rows", code="too_few_rows", param="validation.stratify"
        )
    notes.append(why)
    return False


def _enough(have: int, need: int, what: str, unit: str = "rows") -> None:
    if have < need:
        raise InvalidInput(
            f"{what} need at least {need} {unit}, but there are {have}; use fewer folds",
            code="too_few_rows",
            param="validation",
        )


def _needed(along: np.ndarray | None) -> np.ndarray:
    if along is None:
        raise InvalidInput("the split needs the values of its group or time column", param="validation")
    return along
