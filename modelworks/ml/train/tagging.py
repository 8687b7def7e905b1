"""Tagging: a name for each element of a sequence, such as what a word of a sentence is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core import sequences
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TrainingSpec
from modelworks.core.tasks import TAGGING
from modelworks.core.types import Column, Signature, TensorSpec
from modelworks.ml.base import JobContext
from modelworks.ml.data.transforms.elements import compile_elements, fit, sizes
from modelworks.ml.data.types import batch_to_rows, signature_inputs
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.tagging import elements, laid_out
from modelworks.ml.nets.tagging import NONE, Tagger
from modelworks.ml.package import Manifest, ParitySamples
from modelworks.ml.runtimes.parity import difference
from modelworks.ml.train.checks import find
from modelworks.ml.train.course import Course, mismatch
from modelworks.ml.train.problem import MAX_CLASSES, class_text

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable

_SAMPLES = 24
_CHUNK = 1024
_SHOWN_TAGS = 50


@dataclass(frozen=True)
class Tags:
    """What was learnt: `fitted` of what `state`, a host transform, makes of the columns."""

    fitted: Any
    state: dict[str, Any]


@dataclass(frozen=True)
class Tagging(Course):
    """`batch` holds sequences as JSON; `tags` [n, length] each element's, as a number into `names`, -1 behind the end."""

    kind: ClassVar[str] = TAGGING
    names: list[Any] = field(default_factory=list)
    tags: np.ndarray = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))

    @classmethod
    def check(cls, spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
        target = find(columns, spec.target, "target") if spec.target else None
        if target is None or target.type != "sequence":
            raise InvalidInput(
                "to name each element, the target must be a column of sequences: lists of tags, as long as those they name",
                code="bad_target",
                param="target",
            )
        chosen = spec.features
        if chosen is None:
            chosen = [column.name for column in columns if column.type == "sequence" and column.name != target.name]
        for name in chosen:
            if (column := find(columns, name, "features")).type != "sequence":
                raise InvalidInput(
                    f"the feature {name!r} is of type {column.type}; tags are learnt from sequences alone",
                    code="wrong_features",
                    param="features",
                )
        if spec.transforms:
            raise InvalidInput("sequences are read element by element as they are; leave transforms out", param="transforms")
        return super().check(spec.model_copy(update={"features": chosen, "task": TAGGING}), columns)

    @classmethod
    def pose(cls, table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Tagging:
        features = [find(columns, name, "features") for name in spec.features or []]
        if not table.num_rows:
            raise InvalidInput("the dataset has no rows", param="dataset")
        batch = {column.name: _texts(table, column.name, "features") for column in features}
        wanted = [sequences.load(text) for text in _texts(table, spec.target, "target")]
        lengths = np.array([len(row) for row in wanted], dtype=np.int64)
        for name, texts in batch.items():
            found = np.array([len(sequences.load(text)) for text in texts], dtype=np.int64)
            if (found != lengths).any():
                row = int((found != lengths).argmax())
                raise InvalidInput(
                    f"row {row + 1}: {name!r} has {found[row]} elements and {spec.target!r} has {lengths[row]}; there must be a "
                    "tag for each",
                    code="bad_shape",
                    param="target",
                )
        most = spec.hyperparameters.get("steps") or int(lengths.max())
        if most < lengths.max():
            raise InvalidInput(
                f"row {int(lengths.argmax()) + 1} has {int(lengths.max())} elements, and steps allows {most}; raise it, or cut "
                "the sequence",
                code="bad_hyperparameter",
                param="hyperparameters.steps",
            )
        names = sorted({tag for row in wanted for tag in row}, key=lambda tag: (str(type(tag)), tag))
        if len(names) < 2 or len(names) > MAX_CLASSES or any(isinstance(name, float) or name == "" for name in names):
            raise InvalidInput(
                f"the target {spec.target!r} has {len(names)} different tags; there must be 2 to {MAX_CLASSES}, texts that are "
                "not empty or integers",
                code="bad_target",
                param="target",
            )
        places = {name: place for place, name in enumerate(names)}
        tags = np.full((len(wanted), max(1, most)), NONE, dtype=np.int64)
        for row, given in enumerate(wanted):
            tags[row, : len(given)] = [places[tag] for tag in given]
        rows = np.flatnonzero(lengths > 0)
        return cls(spec, TAGGING, features, batch, rows, lengths, None, None, given=tuple(columns), names=names, tags=tags)

    def again(self, table: pa.Table) -> Tagging:
        """With tags by the numbers that they have here, those that are new behind, and as wide."""
        given = {**self.spec.hyperparameters, "steps": self.tags.shape[1]}
        other = replace(self, spec=self.spec.model_copy(update={"hyperparameters": given}))._again(table)
        places = {name: place for place, name in enumerate(self.names)}
        here = np.array([*(places.setdefault(name, len(places)) for name in other.names), NONE])
        return replace(other, names=list(places), tags=here[other.tags])  # -1 is the last

    def _again(self, table: pa.Table) -> Tagging:
        other = super().again(table)
        assert isinstance(other, Tagging)
        return other

    def learn(self, rows: np.ndarray, ctx: JobContext) -> Tags:
        from modelworks.ml.nets.examples import MemoryExamples
        from modelworks.ml.train.algorithms import TRAINERS

        ctx.progress(0.0, "preparing")
        length = self.tags.shape[1]
        columns = [fit(name, [sequences.load(text) for text in texts], length) for name, texts in self.part(rows).items()]
        names = [column.name for column in self.columns]
        state = {
            "kind": "elements", "inputs": names, "column": names[0], "output": "features", "length": length, "columns": columns
        }
        features = compile_elements(state)(*self.part(rows).values())
        examples = MemoryExamples(features, self.tags[rows])
        family: Any = TRAINERS.get(self.spec.algorithm)()
        tagger = Tagger(family, sizes(columns), len(self.names))
        ctx.progress(0.1, "fitting")
        return Tags(tagger.learn(examples, self.params, ctx, self.spec.stopping), state)

    def judge(self, model: Tags, rows: np.ndarray) -> Predictions:
        return self._judged(rows, self._said(model, rows)[0])

    def _said(self, model: Tags, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the tag of each element of `rows`, its probability), each [k, length], -1 and NaN behind the end."""
        prepare = compile_elements(model.state)
        tags, chances = np.full((len(rows), self.tags.shape[1]), NONE), np.full((len(rows), self.tags.shape[1]), np.nan)
        for start in range(0, len(rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            features = prepare(*self.part(rows[part]).values())
            wide = model.fitted.predict(features)["probabilities"].reshape(*features.shape[:2], -1).astype(np.float32)
            there = features[:, :, 0] > 0
            tags[part], chances[part] = np.where(there, wide.argmax(axis=2), NONE), np.where(there, wide.max(axis=2), np.nan)
        return tags, chances

    def _judged(self, rows: np.ndarray, said: np.ndarray) -> Predictions:
        output = laid_out(self.tags[rows], said, [class_text(name) for name in self.names])
        return Predictions(rows, self.target[rows], output)

    def read(self, outputs: dict[str, np.ndarray], rows: np.ndarray) -> Predictions:
        """A tag that this data has not is one of its own."""
        places = {class_text(name): place for place, name in enumerate(self.names)} | {"": NONE}
        said = np.full(self.tags[rows].shape, NONE)
        found = np.array([places.get(_text(tag), len(self.names)) for tag in outputs["tags"].ravel().tolist()])
        width = min(said.shape[1], outputs["tags"].shape[1])
        said[:, :width] = found.reshape(outputs["tags"].shape)[:, :width]
        return self._judged(rows, said)

    def details(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
    ) -> dict[str, Any]:
        """Each tag's figures, `rows` being elements; which is taken for which."""
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        _, true, said = elements(Predictions.join(found))
        places = np.arange(len(self.names))
        columns = precision_recall_fscore_support(true, said, labels=places, zero_division=0)
        made: dict[str, Any] = {
            "sequences": len(self.rows), "elements": int(self.target.sum()), "longest": int(self.target.max()),
            "per_class": {
                class_text(name): {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
                for name, p, r, f, n in zip(self.names, *columns, strict=True)
            },
        }  # fmt: skip
        if len(self.names) <= _SHOWN_TAGS:
            counts = confusion_matrix(true, said, labels=places).tolist()
            made["confusion_matrix"] = {"classes": self.names, "rows": "true", "columns": "predicted", "counts": counts}
        return made

    def package(
        self, model: Tags, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
    ) -> tuple[Manifest, dict[str, bytes]]:
        from modelworks.ml.train.seal import seal

        length = self.tags.shape[1]
        signature = Signature(
            inputs=signature_inputs([column.model_copy(update={"nullable": False}) for column in self.columns]),
            outputs=[
                TensorSpec(name="tags", datatype="BYTES", shape=[-1, length]),
                TensorSpec(name="scores", datatype="FP32", shape=[-1, length]),
            ],
        )
        return seal(
            self._graph(model), lambda runtime, manifest: self._samples(model, manifest, runtime), workdir, threads,
            signature=signature, host_transforms=[model.state], classes=self.names, lineage=lineage, metrics=metrics,
            **self.named(),
        )  # fmt: skip

    def _graph(self, model: Tags) -> bytes:
        """The net's graph, with the names of the likeliest tags and how likely they are; "" and NaN behind the end."""
        from onnx import TensorProto, helper, numpy_helper

        from modelworks.ml.graph import finish, to_bytes

        graph, length, count = model.fitted.model.graph, self.tags.shape[1], len(self.names)
        texts: Any = [*(class_text(name).encode() for name in self.names), b""]
        constants = [
            numpy_helper.from_array(np.array(values), name)
            for name, values in (
                ("tags/shape", np.array([0, length, count])), ("tags/first", np.array(0)), ("tags/none", np.array(count)),
                ("tags/last", np.array([2])), ("tags/nan", np.array(np.nan, dtype=np.float32)),
            )
        ]  # fmt: skip
        constants.append(helper.make_tensor("tags/names", TensorProto.STRING, [count + 1], texts))
        steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
            ("Reshape", ["probabilities", "tags/shape"], "tags/chances", {}),
            ("ArgMax", ["tags/chances"], "tags/best", {"axis": 2, "keepdims": 0}),
            ("ReduceMax", ["tags/chances", "tags/last"], "tags/high", {"keepdims": 0}),
            ("Gather", ["features", "tags/first"], "tags/mask", {"axis": 2}),
            ("Cast", ["tags/mask"], "tags/there", {"to": TensorProto.BOOL}),
            ("Where", ["tags/there", "tags/best", "tags/none"], "tags/shown", {}),
            ("Gather", ["tags/names", "tags/shown"], "tags", {"axis": 0}),
            ("Where", ["tags/there", "tags/high", "tags/nan"], "scores", {}),
        ]
        nodes = [helper.make_node(kind, inputs, [name], name=name, **more) for kind, inputs, name, more in steps]
        made = [
            helper.make_tensor_value_info("tags", TensorProto.STRING, ["n", length]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", length]),
        ]
        whole = [*graph.initializer, *constants]
        return to_bytes(finish(helper.make_graph([*graph.node, *nodes], "tagger", list(graph.input), made, initializer=whole)))

    def _samples(self, model: Tags, manifest: Manifest, runtime: Any) -> ParitySamples:
        """Every row is answered as training answers it; some are kept."""
        texts = np.array([*map(class_text, self.names), ""], dtype=object)

        def said(rows: np.ndarray) -> dict[str, np.ndarray]:
            tags, chances = self._said(model, rows)
            return {"tags": texts[tags], "scores": chances.astype(np.float32)}  # -1 is the last, which is empty

        for start in range(0, len(self.rows), _CHUNK):
            rows = self.rows[start : start + _CHUNK]
            if found := difference(said(rows), runtime.predict(self.part(rows)), manifest.parity.tolerance):
                raise mismatch(f"{found}, counted from row {rows[0] + 1} of the data")
        kept = self.rows[np.unique(np.linspace(0, len(self.rows) - 1, min(_SAMPLES, len(self.rows))).round().astype(np.int64))]
        return ParitySamples(
            inputs=batch_to_rows(self.part(kept), manifest.signature.inputs),
            outputs={name: values.tolist() for name, values in said(kept).items()},
        )


def _texts(table: pa.Table | StoredTable, name: str, param: str) -> np.ndarray:
    """A column of sequences, as JSON."""
    values = table.column(name)
    if values.null_count:
        first = next(i for i, valid in enumerate(values.is_valid().to_pylist()) if not valid)
        raise InvalidInput(
            f"{name!r} is missing in {values.null_count} rows, first in row {first + 1}; give a list there, or drop the rows",
            code="missing_target" if param == "target" else "missing_values",
            param=param,
        )
    out = np.empty(len(values), dtype=object)
    out[:] = values.to_pylist()
    return out


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
