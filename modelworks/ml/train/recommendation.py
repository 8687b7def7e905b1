"""Recommendation: who likes what, from ratings or clicks; the package answers with a rating, and with the best items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Method, TrainingSpec
from modelworks.core.tasks import RECOMMENDATION
from modelworks.core.tensors import INT64_MISSING
from modelworks.core.types import Column, Signature, TensorSpec
from modelworks.ml.base import JobContext
from modelworks.ml.data.stored import StoredTable
from modelworks.ml.data.types import batch_to_rows
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.splits import Plan
from modelworks.ml.nets.recommender import Factors, Recommender
from modelworks.ml.package import Manifest, ParitySamples
from modelworks.ml.train.algorithms import check_hyperparameters
from modelworks.ml.train.checks import find
from modelworks.ml.train.course import Course, mismatch

if TYPE_CHECKING:
    import pyarrow as pa

_USERS = ("user", "user_id", "userid", "user id", "customer", "customer_id", "customer id")
_ITEMS = ("item", "item_id", "itemid", "item id", "product", "product_id", "product id", "movie", "movie_id", "book_id")
_KEYS = ("category", "text", "integer")
_CELLS = 4_000_000  # scores at a time
_SAMPLES = 24


@dataclass(frozen=True)
class Taste:
    """What was learnt: `factors` of the users and items that training rows had (by the problem's numbers; -1: not seen),
    what each user had, and the range of ratings.
    """

    factors: Factors
    users: np.ndarray
    items: np.ndarray
    had: list[np.ndarray]
    low: float
    high: float


@dataclass(frozen=True)
class Recommendation(Course):
    """`batch` holds `user` and `item` as numbers into `names`; `target` the ratings, NaN of clicks."""

    kind: ClassVar[str] = RECOMMENDATION
    default: ClassVar[Method] = Method(last=1)
    names: dict[str, list[Any]] = field(default_factory=dict)
    order: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """[n]: when each row happened, as a number to sort by."""

    @classmethod
    def check(cls, spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
        user, item = _told(spec.user, "user", _USERS, columns), _told(spec.item, "item", _ITEMS, columns)
        if user.name == item.name or spec.target in (user.name, item.name):
            raise InvalidInput("user, item and target must be different columns", code="target_among_features", param="item")
        if spec.target and (rating := find(columns, spec.target, "target")).type not in ("number", "integer"):
            raise InvalidInput(
                f"the target {rating.name!r} is of type {rating.type}; give a column of ratings, or no target for clicks",
                code="bad_target",
                param="target",
            )
        if spec.transforms:
            raise InvalidInput("a recommender learns from user, item and rating alone; leave transforms out", param="transforms")
        if spec.features not in (None, [user.name, item.name]):
            raise InvalidInput("a recommender learns from user and item; leave features out", param="features")
        if spec.time is not None:
            find(columns, spec.time, "time")
        checked = super().check(spec.model_copy(update={"features": [user.name, item.name]}), columns)
        given = check_hyperparameters(spec.algorithm, spec.hyperparameters)
        return checked.model_copy(
            update={"user": user.name, "item": item.name, "features": [user.name, item.name], "hyperparameters": given}
        )

    @classmethod
    def pose(cls, table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Recommendation:
        import pyarrow as pa

        names: dict[str, list[Any]] = {}
        batch: dict[str, np.ndarray] = {}
        chosen = [find(columns, str(name), "features") for name in (spec.user, spec.item)]
        if not table.num_rows:
            raise InvalidInput("the dataset has no rows", param="dataset")
        for param, column in zip(("user", "item"), chosen, strict=True):
            values = table.column(column.name)
            if values.null_count:
                first = next(i for i, valid in enumerate(values.is_valid().to_pylist()) if not valid)
                raise InvalidInput(
                    f"the {param} {column.name!r} is missing in {values.null_count} rows, first in row {first + 1}; correct "
                    "or drop them",
                    code="missing_values",
                    param=param,
                )
            coded = values.combine_chunks().dictionary_encode()
            coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
            names[param] = coded.dictionary.to_pylist()
            batch[column.name] = coded.indices.to_numpy().astype(np.int64)
        if len(names["item"]) < 2:
            raise InvalidInput("there is one item only, and nothing to choose among", code="too_few_items", param="item")
        if max(map(len, names.values())) >= 2**24:
            raise InvalidInput("there are more than 16 million users or items; group them first", code="too_large", param="user")
        target = np.full(table.num_rows, np.nan)
        if spec.target:
            values = table.column(spec.target)
            if values.null_count:
                raise InvalidInput(
                    f"the target {spec.target!r} is missing in {values.null_count} rows; correct or drop them",
                    code="missing_target",
                    param="target",
                )
            target = values.cast(pa.float64()).to_numpy()
            if not np.isfinite(target).all():
                raise InvalidInput(f"the target {spec.target!r} has infinite values", code="bad_target", param="target")
        order = np.arange(table.num_rows)
        if spec.time is not None:
            order = np.argsort(np.argsort(table.column(spec.time).to_numpy(), kind="stable"), kind="stable")
        rows = np.arange(table.num_rows)
        return cls(
            spec, RECOMMENDATION, chosen, batch, rows, target, None, None, given=tuple(columns), names=names, order=order
        )

    def again(self, table: pa.Table) -> Recommendation:
        """Users and items have the numbers that they have here; those that are new come behind."""
        other = super().again(table)
        assert isinstance(other, Recommendation)
        names, batch = {}, {}
        for param, column in zip(("user", "item"), self.columns, strict=True):
            places = {name: place for place, name in enumerate(self.names[param])}
            here = np.array([places.setdefault(name, len(places)) for name in other.names[param]], dtype=np.int64)
            names[param], batch[column.name] = list(places), here[other.batch[column.name]]
        return replace(other, names=names, batch=batch)

    @property
    def clicks(self) -> bool:
        return not self.spec.target

    def split(self, method: Method, rows: np.ndarray, along: np.ndarray | None, seed: int) -> Plan:
        if not method.last:
            return super().split(method, rows, along, seed)
        ordered = rows[np.lexsort((self.order[rows], self._of("user")[rows]))]
        users = self._of("user")[ordered]
        counts = np.bincount(users)[users]
        ends = np.flatnonzero(np.r_[users[1:] != users[:-1], True])
        left = ends[np.searchsorted(ends, np.arange(len(users)))] - np.arange(len(users))  # rows of the user that follow
        test = (left < method.last) & (counts > method.last)
        if not test.any():
            raise InvalidInput(
                f"no user has more than {method.last} rows, so none can be held out; validate by holdout",
                code="too_few_rows",
                param="validation.last",
            )
        alone = int(len(np.unique(users)) - len(np.unique(users[test])))
        notes = [f"{alone} users have too few rows to hold any out"] if alone else []
        return Plan([(np.sort(ordered[~test]), np.sort(ordered[test]))], {"name": "last of each user", "last": method.last}, notes)

    def learn(self, rows: np.ndarray, ctx: JobContext) -> Taste:
        from modelworks.ml.nets.examples import MemoryExamples

        users, mine = np.unique(self._of("user")[rows], return_inverse=True)
        items, theirs = np.unique(self._of("item")[rows], return_inverse=True)
        params, count = self.params, len(items)
        if count < 2:
            raise InvalidInput("the rows to learn from have one item only", code="too_few_items", param="item")
        pairs = np.column_stack([mine.ravel(), theirs.ravel()]).astype(np.float32)
        values = self.target[rows] if not self.clicks else np.zeros(len(rows))

        def drawn(batch: np.ndarray, random: np.random.Generator) -> np.ndarray:
            others = random.integers(0, count, size=(len(batch), params.negatives)).astype(np.float32)
            return np.concatenate([batch, others], axis=1)

        examples = MemoryExamples(pairs, values, augment=drawn if self.clicks else None)
        made = Recommender().factors(examples, len(users), count, self.clicks, params, ctx, self.spec.stopping)
        places = np.full(len(self.names["user"]), -1), np.full(len(self.names["item"]), -1)
        places[0][users], places[1][items] = np.arange(len(users)), np.arange(count)
        order = np.argsort(mine.ravel(), kind="stable")
        bounds = np.cumsum(np.bincount(mine.ravel(), minlength=len(users)))[:-1]
        had = [np.unique(one) for one in np.split(theirs.ravel()[order], bounds)]
        low, high = (-np.inf, np.inf) if self.clicks else (float(values.min()), float(values.max()))
        return Taste(made, places[0], places[1], had, low, high)

    def judge(self, model: Taste, rows: np.ndarray) -> Predictions:
        user, item = _known(model.users, self._of("user")[rows]), _known(model.items, self._of("item")[rows])
        output = np.zeros((len(rows), 4))
        output[:, 2], output[:, 3] = self._of("user")[rows], min(self.params.top_k, len(model.factors.items))
        size = max(1, _CELLS // len(model.factors.items))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            scores = model.factors.scores(user[part])
            output[part, 0], output[part, 1] = self._placed(model, scores, user[part], item[part])
        wish = self.params.relevant
        if wish is not None and not self.clicks:
            output[self.target[rows] < wish, 1] = -1
        return Predictions(rows, self.target[rows], output)

    def _placed(self, model: Taste, scores: np.ndarray, user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the rating said, the place of the item among those recommended)"""
        known = item >= 0
        lines = np.arange(len(item))
        own = np.where(known, scores[lines, np.where(known, item, 0)], 0.0)
        bias = np.where(user >= 0, model.factors.user_bias[np.maximum(user, 0)], 0.0)
        said = np.where(known, own, model.factors.mean + bias)
        if self.params.exclude_seen:
            for line, one in enumerate(user):
                if one >= 0:
                    scores[line, model.had[one]] = -np.inf
        better = (scores > own[:, None]).sum(axis=1)
        return np.clip(said, model.low, model.high), np.where(known, better, scores.shape[1])

    def read(self, outputs: dict[str, np.ndarray], rows: np.ndarray) -> Predictions:
        """The package recommends `top_k` to a user, among which the row's item is looked for."""
        wanted = np.array([str(self.names["item"][one]) for one in self._of("item")[rows]], dtype=object)
        shown = outputs["items"].astype(object)
        hit = shown == wanted[:, None]
        k = shown.shape[1]
        output = np.zeros((len(rows), 4))
        output[:, 0], output[:, 1] = outputs["value"], np.where(hit.any(axis=1), hit.argmax(axis=1), k)
        output[:, 2], output[:, 3] = self._of("user")[rows], k
        wish = self.params.relevant
        if wish is not None and not self.clicks:
            output[self.target[rows] < wish, 1] = -1
        return Predictions(rows, self.target[rows], output)

    def part(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """As a package takes them: names, not numbers."""
        found = {}
        for param, column in zip(("user", "item"), self.columns, strict=True):
            known = self.names[param]
            values = [known[one] for one in self.batch[column.name][rows]]
            found[column.name] = np.array(values, dtype=np.int64 if column.type == "integer" else object)
        return found

    def details(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "users": len(self.names["user"]), "items": len(self.names["item"]), "rows": len(self.rows),
            "top_k": int(found[0].output[0, 3]), "feedback": "clicks" if self.clicks else "ratings",
        }  # fmt: skip

    def package(
        self, model: Taste, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
    ) -> tuple[Manifest, dict[str, bytes]]:
        from modelworks.ml.train.recommending import graph_of
        from modelworks.ml.train.seal import seal

        return seal(
            graph_of(self, model), lambda runtime, manifest: self._samples(model, manifest, runtime), workdir, threads,
            signature=self._signature(model), lineage=lineage, metrics=metrics, **self.named(),
        )  # fmt: skip

    def _signature(self, model: Taste) -> Signature:
        inputs = [
            TensorSpec(
                name=column.name,
                datatype="INT64" if column.type == "integer" else "BYTES",
                shape=[-1, 1],
                column=column.type,
                nullable=param == "item",
            )
            for param, column in zip(("user", "item"), self.columns, strict=True)
        ]
        k = min(self.params.top_k, len(model.factors.items))
        return Signature(
            inputs=inputs,
            outputs=[
                TensorSpec(name="value", datatype="FP32", shape=[-1]),
                TensorSpec(name="basis", datatype="BYTES", shape=[-1]),
                TensorSpec(name="items", datatype="BYTES", shape=[-1, k]),
                TensorSpec(name="scores", datatype="FP32", shape=[-1, k]),
            ],
        )

    def _samples(self, model: Taste, manifest: Manifest, runtime: Any) -> ParitySamples:
        """The graph's answers to rows of the data, which must be those that was learnt; some without an item."""
        rows = np.unique(np.linspace(0, len(self.rows) - 1, min(_SAMPLES, len(self.rows))).round().astype(np.int64))
        batch = self.part(rows)
        item = self.columns[1]
        batch[item.name] = batch[item.name].copy()
        batch[item.name][::3] = INT64_MISSING if item.type == "integer" else ""
        said = runtime.predict(batch)
        want = self.judge(model, rows).output[:, 0]
        asked = np.arange(len(rows)) % 3 != 0
        bound = 1e-4 * max(1.0, float(np.abs(want).max()))
        if np.abs(said["value"][asked] - want[asked]).max(initial=0.0) > bound or not np.isnan(said["value"][~asked]).all():
            raise mismatch("ratings differ")
        inputs = batch_to_rows(batch, manifest.signature.inputs)
        return ParitySamples(
            inputs=inputs,
            outputs={
                name: [[None if v != v else v for v in np.ravel(one).tolist()] for one in values]
                if values.ndim > 1 and values.dtype.kind == "f"
                else values.tolist()
                for name, values in said.items()
                if name in ("basis", "items")
            }
            | {"value": [float(v) for v in said["value"]]},
        )

    def _of(self, param: str) -> np.ndarray:
        return self.batch[self.columns[0 if param == "user" else 1].name]


def _known(places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`places` of `numbers`, -1 of those that the model's problem had not."""
    return np.append(places, -1)[np.minimum(numbers, len(places))]


def _told(given: str | None, param: str, usual: tuple[str, ...], columns: Sequence[Column]) -> Column:
    """The column of users or items: named, or told by what such columns are called."""
    if given is None:
        given = next((column.name for column in columns if column.name.lower() in usual), None)
        if given is None:
            raise InvalidInput(
                f"name the column that says {'who' if param == 'user' else 'what'} in {param}; the dataset has: "
                f"{', '.join(column.name for column in columns[:30])}",
                code="no_" + param,
                param=param,
            )
    column = find(columns, given, param)
    if column.type not in _KEYS:
        raise InvalidInput(
            f"the {param} {column.name!r} is of type {column.type}; give a column of names or whole numbers",
            code="wrong_column_type",
            param=param,
        )
    return column
