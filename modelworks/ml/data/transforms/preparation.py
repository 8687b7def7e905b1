"""Fits a recipe's transforms, one after another, on exactly what the graph of the earlier ones yields.

The features that training sees come out of that same graph, run by onnxruntime: there is no second implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TransformSpec
from modelworks.core.types import Column
from modelworks.ml import graph as onnx_graph
from modelworks.ml.base import Models
from modelworks.ml.data.transforms import blocks, catalogue, labels, numeric
from modelworks.ml.data.transforms.blocks import augment
from modelworks.ml.data.transforms.media_fit import spread, text_model
from modelworks.ml.data.transforms.plan import Current, Key, Plan, Step, needed, run
from modelworks.ml.data.transforms.rows import RowFilter, missing_mask
from modelworks.ml.data.transforms.texts import fit_host
from modelworks.ml.graph import STRING

if TYPE_CHECKING:
    import onnx

    from modelworks.ml.base import Batch

_FITTED_ON = 512  # rows that a block's mean and deviation are taken from
_CHUNK_CELLS = 8_000_000
MAX_ONE_HOT_FOR_TREES = 50  # a tree splits an ordinal of many categories better than many columns of one each
_NUMBER_OPS = "one-hot, ordinal, tf-idf, hashing or cast"


class Preparation:
    """Fitted transforms from raw columns to features. Make one with `Preparation.fit`; it does not change afterwards.

    keep: bool [rows of the fit batch], which of them row ops kept.  host: JSON states that run before the graph.
    feature_names: in the order of the features.  nullable: by raw column, whether serving accepts a missing value.
    inputs: the raw columns that the features depend on.  blocks: the parts of the (flattened) features.
    shape: of one row of features.
    """

    def __init__(
        self,
        plan: Plan,
        keep: np.ndarray,
        filters: list[RowFilter],
        fitting: Plan,
        nullable: dict[str, bool],
        *,
        shaped: bool,
        augmentations: dict[str, list[dict[str, Any]]],
    ) -> None:
        self.keep = keep
        self.nullable = nullable
        self._model, self.feature_names, self.blocks = plan.features(shaped)
        alone = shaped and len(self.blocks) == 1
        self.shape = self.blocks[0].shape if alone else (len(self.feature_names),)
        self._augmented = [
            (block, augmentations[block.name])
            for block in self.blocks
            if block.kind != "table" and block.name in augmentations
        ]
        wanted = {onnx_graph.column_of(value.name) for value in self._model.graph.input}
        self.host = needed(plan.host, wanted)
        made = {state["output"] for state in self.host}
        self.inputs = [name for name in nullable if name in (wanted - made) | {state["column"] for state in self.host}]
        self._filters = filters
        self._fitting = fitting

    @classmethod
    def fit(
        cls,
        batch: Batch,
        columns: list[Column],
        specs: list[TransformSpec] | None,
        *,
        accepts_missing: bool,
        target: np.ndarray | None = None,
        shaped: bool = False,
        tokens: bool = False,
        models: Models | None = None,
    ) -> Preparation:
        """Fit on `batch` (wire form, `columns` = the features). Without `specs` the default preparation is used.

        `shaped`: an estimator that takes images, sounds and sequences in their shape: where the features are one such
        block alone, they are [n, *shape]; else they are [n, f], and `blocks` tells what is where. `tokens`: by default
        texts become token sequences, not tf-idf. `models`: the packages of registered models that transforms name.
        `target` [n] only serves drop-duplicates: rows with different targets are not alike. InvalidInput names the
        column that is unknown, of a wrong type for its op, or in the end not a number or missing where it must not be.
        """
        if not columns:
            raise InvalidInput(
                "there is no feature to learn from; name at least one column besides the target", param="features"
            )
        steps = (
            default_transforms(batch, columns, accepts_missing, tokens)
            if specs is None
            else catalogue.check_transforms(specs)
        )
        fitting = _Fitting(batch, columns, target, models)
        for index, spec in enumerate(steps):
            fitting.step(spec, f"transforms[{index}]")
        return fitting.finish(accepts_missing, shaped)

    def graph(self) -> onnx.ModelProto:
        """Raw columns (and the host's outputs) -> "features" FP32 [-1, *shape]. A copy."""
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        return copy

    def features(self, batch: Batch) -> np.ndarray:
        """float32 [n, *shape] for all rows of `batch`, through host transforms and onnxruntime as at serving."""
        return run(self._session, self.host, batch)[0]

    @property
    def drops_rows(self) -> bool:
        """Whether there are row ops in it."""
        return bool(self._filters)

    @property
    def augments(self) -> bool:
        return bool(self._augmented)

    def augment(self, features: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Features of training rows, changed at random as the transforms ask for; a copy where anything changes."""
        if not self._augmented:
            return features
        out = features.reshape(len(features), -1).copy()
        for block, steps in self._augmented:
            part = out[:, block.start : block.stop].reshape(len(out), *block.shape)
            for params in steps:
                part = augment(part, params, random)
            out[:, block.start : block.stop] = part.reshape(len(out), -1)
        return out.reshape(features.shape)

    def fit_features(self, batch: Batch) -> np.ndarray:
        """`features` of the kept rows of the batch that was fitted on."""
        return self.features({name: batch[name][self.keep] for name in self.inputs})

    def rows(self, batch: Batch, target: np.ndarray | None = None) -> np.ndarray:
        """bool [n]: which rows of another batch, an evaluation set, the row ops keep."""
        mask = np.ones(_rows(batch), dtype=bool)
        for each in self._filters:
            mask = each.apply(self._fitting, batch, mask, target)
        return mask

    @cached_property
    def _session(self) -> Any:
        return onnx_graph.session(onnx_graph.to_bytes(self._model))


def default_transforms(
    batch: Batch, columns: list[Column], accepts_missing: bool, tokens: bool = False
) -> list[TransformSpec]:
    """What happens to a table without `transforms`.

    Images get one size and values from 0 to 1, sounds become log-mel spectrograms of 16 kHz. Times become date parts;
    numbers and date parts: mean, standardise; booleans: most frequent, kept as 0 and 1; categories: most frequent,
    one-hot with unknowns as zeros; texts: tf-idf, or with `tokens` token sequences. A trainer that accepts missing
    values (trees) gets numbers, date parts and booleans as they are, and categories of more than MAX_ONE_HOT_FOR_TREES
    values as ordinals.
    """
    times = TransformSpec(op="date-parts", columns="time")
    texts = TransformSpec(op="tokenise" if tokens else "tf-idf", columns="text")
    sounds = [TransformSpec(op="mel-spectrogram", columns="audio"), TransformSpec(op="normalise", columns="audio")]
    media = [TransformSpec(op="resize", columns="image"), *sounds]
    if accepts_missing:
        many = [
            column.name
            for column in columns
            if column.type == "category" and len(set(batch[column.name].tolist()) - {""}) > MAX_ONE_HOT_FOR_TREES
        ]
        ordinal = [TransformSpec(op="ordinal", columns=many)] if many else []
        return [times, *ordinal, TransformSpec(op="one-hot", columns="category"), texts, *media]
    return [
        times,
        TransformSpec.model_validate({"op": "fill-missing", "columns": "numeric", "strategy": "mean"}),
        TransformSpec(op="standardise", columns="numeric"),
        TransformSpec.model_validate({"op": "fill-missing", "columns": "boolean", "strategy": "most-frequent"}),
        TransformSpec.model_validate({"op": "fill-missing", "columns": "category", "strategy": "most-frequent"}),
        TransformSpec(op="one-hot", columns="category"),
        texts,
        *media,
    ]


class _Fitting:
    """The state of a fit: the plan so far and the rows that are still kept."""

    def __init__(
        self, batch: Batch, columns: list[Column], target: np.ndarray | None, models: Models | None = None
    ) -> None:
        self.batch = batch
        self.models = models
        self.raw = columns
        self.target = target
        self.plan = Plan(columns)
        self.keep = np.ones(_rows(batch), dtype=bool)
        self.filters: list[RowFilter] = []
        self.steps: list[Step] = []
        self.augmentations: dict[str, list[dict[str, Any]]] = {}
        self._where = ""
        self._need_rows()

    def step(self, spec: TransformSpec, where: str) -> None:
        self._where = where
        params = catalogue.params_of(spec, where)
        transform = catalogue.TRANSFORMS[spec.op]
        chosen = self._choose(spec, params)
        if not chosen:
            return
        if transform.kind == "rows":
            self._filter(spec, chosen)
        elif spec.op == "drop":
            self._do(Step("drop", {column.key: True for column in chosen}))
        elif transform.kind == "host":
            self._fit_host(spec.op, params, chosen)
        elif spec.op == "cast":
            self._fit_cast(params, chosen)
        elif transform.blocks:
            self._fit_blocks(spec.op, params, chosen)
        else:
            self._fit_graph(spec.op, params, chosen)

    def finish(self, accepts_missing: bool, shaped: bool) -> Preparation:
        self._decoded(self.plan.columns)
        columns = self.plan.columns
        if not columns:
            raise InvalidInput(
                "the transforms leave no feature to learn from; keep at least one column", param="transforms"
            )
        for column in columns:
            if self.plan.kind(column) == STRING:
                what = f"({column.type}) is still text after the transforms; make it numbers by {_NUMBER_OPS}"
                if column.type == "time":
                    what = "is a time, and algorithms take numbers; make numbers of it by the transform date-parts"
                raise InvalidInput(
                    f"column {column.name!r} {what}, or drop it",
                    param=column.name,
                    code="not_numeric",
                )
            if not accepts_missing and not column.complete and missing_mask(self.batch[column.raw])[self.keep].any():
                raise InvalidInput(
                    f"column {column.name!r} has missing values, which this algorithm does not take; "
                    "add fill-missing or drop-missing",
                    param=column.name,
                    code="missing_values",
                )
        used = {column.raw for column in columns}
        final = Plan(self.raw, only=used)
        for step in self.steps:
            final.apply(step)
        nullable = {
            raw.name: accepts_missing or all(column.complete for column in columns if column.raw == raw.name)
            for raw in self.raw
        }
        return Preparation(
            final, self.keep, self.filters, self.plan, nullable, shaped=shaped, augmentations=self.augmentations
        )

    # which columns

    def _choose(self, spec: TransformSpec, params: Any) -> list[Current]:
        transform = catalogue.TRANSFORMS[spec.op]
        if isinstance(spec.columns, list):
            chosen = self._named(spec.columns)
            for column in chosen:
                if column.type not in transform.types:
                    self._refuse(spec.op, column, f"{spec.op} works on {_or(transform.types)}")
                if not _applies(transform, column):
                    self._refuse(spec.op, column, f"it is decoded already; put {spec.op} before what decodes it")
            return chosen
        types = catalogue.selected_types(spec, params) if spec.columns is None else catalogue.SELECTORS[spec.columns]
        chosen = [column for column in self.plan.columns if column.type in types and _applies(transform, column)]
        if spec.columns is not None:
            # "all" means all that the op can work on; a word for one type must fit
            chosen = [column for column in chosen if spec.columns != "all" or column.type in transform.types]
            for column in chosen:
                if column.type not in transform.types:
                    self._refuse(spec.op, column, f"{spec.op} works on {_or(transform.types)}")
        return chosen

    def _named(self, names: list[str]) -> list[Current]:
        """By present name, else all that a raw column became (`species` after one-hot)."""
        chosen: dict[Key, Current] = {}
        unknown: list[str] = []
        for name in names:
            found = [c for c in self.plan.columns if c.name == name and c.raw == name]
            found = (
                found
                or [c for c in self.plan.columns if c.name == name]
                or [c for c in self.plan.columns if c.raw == name]
            )
            unknown += [] if found else [name]
            chosen |= {column.key: column for column in found}
        if unknown:
            there = ", ".join(repr(column.name) for column in self.plan.columns[:20])
            raise InvalidInput(
                f"{self._where}: no column {', '.join(repr(name) for name in unknown[:10])} at this step; "
                f"there are {there}",
                param=unknown[0],
                code="unknown_column",
            )
        return list(chosen.values())

    def _refuse(self, op: str, column: Current, wanted: str) -> None:
        raise InvalidInput(
            f"{self._where}: {op} cannot take column {column.name!r}, which is of type {column.type} at this step; "
            f"{wanted}",
            param=column.name,
            code="wrong_column_type",
        )

    # fits

    def _filter(self, spec: TransformSpec, chosen: list[Current]) -> None:
        looked_at = [(onnx_graph.input_name(c.raw), 0) if c.shape else (c.tensor, c.index) for c in chosen]
        each = RowFilter(spec.op, looked_at, with_target=spec.columns is None)
        self.keep = each.apply(self.plan, self.batch, self.keep, self.target)
        self.filters.append(each)
        self._need_rows()

    def _need_rows(self) -> None:
        if not self.keep.any():
            raise InvalidInput(
                "no row is left to train on; give more data, or fill missing values instead of dropping rows",
                param="transforms",
            )

    def _fit_graph(self, op: str, params: Any, chosen: list[Current]) -> None:
        if op == "fill-missing":
            chosen = [column for column in chosen if not column.complete]
        fitted: dict[Key, Any] = {}
        numbers = [c for c in chosen if op in numeric.NUMERIC and self.plan.kind(c) != STRING]
        if numbers:
            block, members = self.plan.block(self.plan.as_floats(numbers))
            values = self._values(block)
            for index, column in enumerate(members):
                if op == "fill-missing":
                    self._check_fill(params, column)
                fitted[column.key] = numeric.NUMERIC[op][0](values[:, index], params, column.name, column.type)
        for column in chosen:
            if column.key not in fitted:
                fitted[column.key] = self._fit_labels(op, params, column)
        if fitted:
            self._do(Step(op, fitted))

    def _fit_labels(self, op: str, params: Any, column: Current) -> Any:
        values = self._values(self.plan.as_labels(column).tensor)[:, 0]
        if op == "fill-missing":
            return labels.fit_fill(values, params, column.name, column.type)
        if op == "group-rare":
            return (labels.fit_group_rare(values, params), params.other)
        if op == "ordinal":
            return (labels.fit_ordinal(values, params, column.type), params.unknown)
        return labels.fit_one_hot(values, params, column.type)

    def _check_fill(self, params: catalogue.FillMissing, column: Current) -> None:
        if column.type == "boolean" and params.strategy in ("mean", "median"):
            self._refuse("fill-missing", column, "use most-frequent or constant for true and false")
        if column.type == "boolean" and params.value is not None and params.value not in (0, 1):
            self._refuse("fill-missing", column, "its value must be true or false")

    def _fit_cast(self, params: catalogue.Cast, chosen: list[Current]) -> None:
        texts = [c for c in chosen if self.plan.kind(c) == STRING and params.to != "category"]
        for column in texts:
            self._fit_host("cast", params, [column])
        others = [c for c in chosen if self.plan.kind(c) != STRING or params.to == "category"]
        if others:
            self._do(Step("cast", {column.key: True for column in others}, to=params.to))

    def _fit_host(self, op: str, params: Any, chosen: list[Current]) -> None:
        for column in chosen:
            if column.host_prior is None or column.raw != column.name:
                self._refuse(
                    op, column, f"{op} must be the first op on its column (only fill-missing may stand before it)"
                )
        fitted = {c.key: fit_host(params, self._texts(c), c.name, self.models) for c in chosen}
        self._do(Step("host", fitted))
        if op == "embed":
            self._do(Step("embed", dict.fromkeys(fitted, text_model(self.models, params.model))))

    def _decoded(self, columns: list[Current]) -> list[Current]:
        """The columns with images and sounds decoded, by the default where no transform did it."""
        for op, kind in (("resize", "image"), ("resample", "audio")):
            raw = [column for column in columns if column.type == kind and column.shape is None]
            if raw:
                self._fit_host(op, catalogue.TRANSFORMS[op].Params(), raw)
        keys = {column.key for column in columns}
        return [column for column in self.plan.columns if column.key in keys]

    def _fit_blocks(self, op: str, params: Any, chosen: list[Current]) -> None:
        chosen = self._decoded(chosen)
        if op == "augment":
            for column in chosen:
                self.augmentations.setdefault(column.name, []).append(params.model_dump())
            return
        if op == "pool" and (waves := [column for column in chosen if column.shape and len(column.shape) == 1]):
            self._fit_blocks("mel-spectrogram", catalogue.TRANSFORMS["mel-spectrogram"].Params(), waves)
            chosen = self._decoded(chosen)
        fitted = {}
        for column in chosen:
            more = {"rate": column.about["rate"]} if op in ("mel-spectrogram", "mfcc") else {}
            fitted[column.key] = blocks.BLOCKS[op][0](params, column.shape, self._chunks(column), column.name, **more)
        self._do(Step(op, fitted))

    def _chunks(self, column: Current) -> blocks.Chunks:
        """The column's values in some of the training rows, a few at a time."""
        rows = spread(np.flatnonzero(self.keep), _FITTED_ON)

        def chunks() -> Iterator[np.ndarray]:
            size = max(1, _CHUNK_CELLS // self.plan.graph.widths[column.tensor])
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                batch = {name: values[part] for name, values in self.batch.items()}
                yield self.plan.values([column.tensor], batch)[0]

        return chunks

    def _texts(self, column: Current) -> np.ndarray:
        return self._values(self.plan.as_labels(column).tensor)[:, 0]

    def _values(self, tensor: str) -> np.ndarray:
        """[kept rows, width]"""
        return self.plan.values([tensor], self.batch)[0][self.keep]

    def _do(self, step: Step) -> None:
        self.plan.apply(step)
        self.steps.append(step)


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values()))) if batch else 0


def _applies(transform: catalogue.Transform, column: Current) -> bool:
    """Blocks take the ops for blocks, and those that drop columns or rows; what is not decoded yet takes all."""
    return column.shape is None or transform.blocks or transform.kind == "rows" or transform.name == "drop"


def _or(types: tuple[str, ...]) -> str:
    return " or ".join((", ".join(types[:-1]), types[-1])) if len(types) > 1 else types[0]
