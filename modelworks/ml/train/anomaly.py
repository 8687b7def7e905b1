"""Anomaly detection: rows that are unlike those that were learnt from. Labels, where there are some, only judge.

A row known to be an anomaly is left out of what is learnt; without labels all rows are taken to be usual ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import TrainingSpec
from modelworks.core.tasks import ANOMALY
from modelworks.core.types import Column, TensorSpec
from modelworks.ml.base import JobContext
from modelworks.ml.data.stored import StoredTable
from modelworks.ml.data.transforms.rows import missing_mask
from modelworks.ml.data.types import to_batch
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.package import Manifest
from modelworks.ml.train.checks import find
from modelworks.ml.train.course import Course
from modelworks.ml.train.problem import target_values
from modelworks.ml.train.rows import kept_rows, split_leading

if TYPE_CHECKING:
    import onnx
    import pyarrow as pa

    from modelworks.ml.train.fit import Model

_NAMES = ("anomaly", "anomalous", "outlier", "abnormal", "fraud", "attack", "true", "yes", "1")
_LABELS = ("boolean", "integer", "category", "text")


@dataclass(frozen=True)
class Anomaly(Course):
    """`target` [n]: 1 an anomaly, 0 none, -1 not known."""

    kind: ClassVar[str] = ANOMALY

    @classmethod
    def check(cls, spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
        if spec.target and (label := find(columns, spec.target, "target")).type not in _LABELS:
            raise InvalidInput(
                f"the target {label.name!r} is of type {label.type} and cannot tell anomalies; give a column of true and "
                "false, 0 and 1, or classes, or no target at all",
                code="bad_target",
                param="target",
            )
        return super().check(spec, columns)

    @classmethod
    def pose(cls, table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Anomaly:
        import pyarrow as pa

        features = [find(columns, name, "features") for name in spec.features or []]
        leading, rest = split_leading(spec.transforms)
        labels = np.full(table.num_rows, -1, dtype=np.int64)
        if not table.num_rows:
            raise InvalidInput("the dataset has no rows", param="dataset")
        extra: dict[str, np.ndarray] = {}
        label = find(columns, spec.target, "target") if spec.target else features[0]
        if spec.target:
            extra[label.name] = target_values(pa.table({label.name: table.column(label.name)}), label)
            labels = _known(extra[label.name], label, spec.hyperparameters.get("positive"))
        keep = np.ones(table.num_rows, dtype=bool)
        stored = table if isinstance(table, StoredTable) else None
        batch = {} if isinstance(table, StoredTable) else to_batch(table, features)
        if leading and stored is not None:
            for numbers, part in stored.chunks(features):
                more = {name: values[numbers] for name, values in extra.items()}
                keep[numbers] = kept_rows(leading, part | more, features, label)
        elif leading:
            keep = kept_rows(leading, batch | extra, features, label)
        rows = np.flatnonzero(keep)
        if not (labels[rows] != 1).any():
            raise InvalidInput(
                "there is no row to learn what is usual from: the row ops drop all, or the target calls all of them "
                "anomalies",
                code="too_few_rows",
                param="target" if spec.target else "transforms",
            )
        return cls(spec, ANOMALY, features, batch, rows, labels, None, rest, stored=stored, given=tuple(columns))

    def learn(self, rows: np.ndarray, ctx: JobContext) -> Model:
        from modelworks.ml.train.fit import fit

        usual = rows[self.target[rows] != 1]
        if not len(usual):
            raise InvalidInput("the rows to learn from are all anomalies", code="too_few_rows", param="target")
        return fit(self, usual, ctx)

    def judge(self, model: Model, rows: np.ndarray) -> Predictions:
        from modelworks.ml.train.streaming import predict_stored

        score = model.predict(self.part(rows)) if self.stored is None else predict_stored(self, model, rows)
        return self._said(rows, score, flagged(model, score))

    def read(self, outputs: dict[str, np.ndarray], rows: np.ndarray) -> Predictions:
        return self._said(rows, outputs["score"].astype(np.float64), outputs["anomaly"])

    def _said(self, rows: np.ndarray, score: np.ndarray, flag: np.ndarray) -> Predictions:
        return Predictions(rows, self.target[rows], np.column_stack([score, flag.astype(np.float64)]))

    def details(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
    ) -> dict[str, Any]:
        whole = Predictions.join(found)
        made: dict[str, Any] = {
            "score_quantiles": {f"{q:g}": float(np.quantile(whole.output[:, 0], q)) for q in (0, 0.25, 0.5, 0.75, 0.95, 0.99, 1)}
        }
        known = whole.true >= 0
        if known.any():
            made["labelled"] = {"rows": int(known.sum()), "anomalies": int((whole.true == 1).sum())}
        return made

    def package(
        self, model: Model, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
    ) -> tuple[Manifest, dict[str, bytes]]:
        from modelworks.ml.train.packaging import package

        return package(self, model, metrics, lineage | {"anomaly_above": _threshold(model)}, workdir, threads)

    # what `packaging` asks

    def outputs(self) -> list[TensorSpec]:
        return [
            TensorSpec(name="score", datatype="FP32", shape=[-1]),
            TensorSpec(name="anomaly", datatype="BOOL", shape=[-1]),
        ]

    def finish(self, estimator: onnx.ModelProto, model: Model) -> onnx.ModelProto:
        """`estimator` with its value called score, and whether that is above the threshold."""
        from onnx import TensorProto, helper, numpy_helper

        from modelworks.ml.graph import finish

        graph = estimator.graph
        bound = numpy_helper.from_array(np.array(_threshold(model), dtype=np.float32), "threshold")
        nodes = [
            *graph.node,
            helper.make_node("Identity", ["value"], ["score"], name="score"),
            helper.make_node("Greater", ["value", "threshold"], ["anomaly"], name="anomaly"),
        ]
        made = [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("anomaly", TensorProto.BOOL, ["n"]),
        ]
        return finish(helper.make_graph(nodes, "net", list(graph.input), made, initializer=[*graph.initializer, bound]))

    def said(self, model: Model, score: np.ndarray) -> dict[str, np.ndarray]:
        return {"score": score.astype(np.float32), "anomaly": flagged(model, score)}


def flagged(model: Any, score: np.ndarray) -> np.ndarray:
    """bool [n], as the graph decides it: in float32."""
    return np.asarray(score.astype(np.float32) > np.float32(_threshold(model)))


def _threshold(model: Any) -> float:
    return float(model.fitted.threshold)


def _known(values: np.ndarray, label: Column, positive: str | None) -> np.ndarray:
    """1, 0 or -1 (missing) of each row. InvalidInput when nothing tells which label means an anomaly."""
    missing = missing_mask(values)
    texts = np.array([_text(value, label) for value in values.tolist()], dtype=object)
    there = sorted(set(texts[~missing].tolist()))
    name = positive
    if name is None:
        name = next((text for text in there if text.lower() in _NAMES), None)
        if name is None and label.type == "boolean":
            name = "true"
    if name is None or (positive is not None and positive not in there and len(there) > 1):
        raise InvalidInput(
            f"which value of {label.name!r} means an anomaly? Name it in the hyperparameter positive, one of: "
            f"{', '.join(there[:20])}",
            code="bad_hyperparameter",
            param="hyperparameters.positive",
        )
    found = (texts == name).astype(np.int64)
    found[missing] = -1
    return found


def _text(value: Any, label: Column) -> str:
    if label.type == "boolean":
        return "true" if value == 1 else "false"
    return str(int(value)) if label.type == "integer" and value == value else str(value)
