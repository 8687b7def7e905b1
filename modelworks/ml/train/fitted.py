"""What trainers return: linear models and trees that predict in float64 and write themselves down as ONNX.

The graphs are emitted here and not by skl2onnx or onnxmltools, because those compute in float32 and name
things at random: ours compute in float64, as training does, and round once at the end, so training and serving agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelworks.ml.graph import ML, finish

if TYPE_CHECKING:
    import lightgbm
    import onnx

Link = Literal["identity", "sigmoid", "softmax"]
Nodes = list["onnx.NodeProto"]


def activate(scores: np.ndarray, link: Link) -> dict[str, np.ndarray]:
    """Scores [n, k] float64 -> {"value": [n]} (identity) or {"probabilities": [n, classes]}; sigmoid takes k = 1."""
    from scipy.special import expit, softmax

    if link == "identity":
        return {"value": scores[:, 0]}
    if link == "sigmoid":
        return {"probabilities": np.column_stack([expit(-scores[:, 0]), expit(scores[:, 0])])}
    return {"probabilities": softmax(scores, axis=1)}


@dataclass(frozen=True)
class LinearFitted:
    """`coefficients` [k, f] and `intercept` [k] float64; k is 1 for identity and sigmoid, the number of classes for
    softmax.
    """

    coefficients: np.ndarray
    intercept: np.ndarray
    link: Link

    def predict(self, features: np.ndarray) -> dict[str, np.ndarray]:
        return activate(features.astype(np.float64) @ self.coefficients.T + self.intercept, self.link)

    def to_onnx(self, n_features: int) -> onnx.ModelProto:
        from onnx import TensorProto, helper, numpy_helper

        nodes = [
            helper.make_node("Cast", ["features"], ["wide"], to=TensorProto.DOUBLE),
            helper.make_node("Gemm", ["wide", "coefficients", "intercept"], ["scores"]),
        ]
        constants = [
            numpy_helper.from_array(np.ascontiguousarray(self.coefficients.T, dtype=np.float64), "coefficients"),
            numpy_helper.from_array(np.asarray(self.intercept, dtype=np.float64), "intercept"),
        ]
        return _model(nodes, constants, self.link, n_features, len(self.coefficients))


@dataclass(frozen=True)
class TreesFitted:
    """A LightGBM booster with `scores` raw scores a row."""

    booster: lightgbm.Booster
    link: Link
    scores: int

    def predict(self, features: np.ndarray) -> dict[str, np.ndarray]:
        raw: Any = self.booster.predict(features.astype(np.float64), raw_score=True)
        # rounded as ONNX's TreeEnsemble rounds its sums, so that classes which tie there tie here
        scores = np.asarray(raw).astype(np.float32).astype(np.float64)
        return activate(scores.reshape(len(features), self.scores), self.link)

    def to_onnx(self, n_features: int) -> onnx.ModelProto:
        """Thresholds and leaves stay float64, so every row takes the same branches as in LightGBM."""
        from onnx import TensorProto, helper

        trees = _flatten(self.booster.dump_model(), self.scores)
        values, weights = trees.pop("values"), trees.pop("weights")
        nodes = [
            helper.make_node("Cast", ["features"], ["wide"], to=TensorProto.DOUBLE),
            helper.make_node(
                "TreeEnsembleRegressor",
                ["wide"],
                ["narrow"],
                domain=ML,
                n_targets=self.scores,
                aggregate_function="SUM",
                post_transform="NONE",
                nodes_values_as_tensor=helper.make_tensor("thresholds", TensorProto.DOUBLE, [len(values)], values),
                target_weights_as_tensor=helper.make_tensor("leaves", TensorProto.DOUBLE, [len(weights)], weights),
                **trees,
            ),
            helper.make_node("Cast", ["narrow"], ["scores"], to=TensorProto.DOUBLE),
        ]
        return _model(nodes, [], self.link, n_features, self.scores)


def _flatten(dump: dict[str, Any], scores: int) -> dict[str, Any]:
    """LightGBM's nested trees as the parallel lists of ONNX's TreeEnsemble. Tree i adds to score i % scores."""
    lists: dict[str, list[Any]] = {
        f"nodes_{name}": []
        for name in (
            "treeids",
            "nodeids",
            "featureids",
            "modes",
            "truenodeids",
            "falsenodeids",
            "missing_value_tracks_true",
        )
    } | {"values": [], "weights": [], "target_treeids": [], "target_nodeids": [], "target_ids": []}

    def add(tree: int, node: int, feature: int, mode: str, threshold: float, yes: int, no: int, missing: bool) -> None:
        row = (tree, node, feature, mode, yes, no, int(missing))
        for key, value in zip(list(lists)[:7], row, strict=True):
            lists[key].append(value)
        lists["values"].append(threshold)

    for tree, info in enumerate(dump["tree_info"]):
        waiting = [(0, info["tree_structure"])]
        count = 1
        while waiting:
            node, structure = waiting.pop()
            if "split_feature" in structure:
                yes, no = count, count + 1
                count += 2
                threshold = float(structure["threshold"])
                # LightGBM reads NaN as 0 where training saw no missing value in the feature
                missing = structure["default_left"] if structure["missing_type"] == "NaN" else threshold >= 0
                add(tree, node, structure["split_feature"], "BRANCH_LEQ", threshold, yes, no, missing)
                waiting += [(no, structure["right_child"]), (yes, structure["left_child"])]
            else:
                add(tree, node, 0, "LEAF", 0.0, 0, 0, False)
                lists["target_treeids"].append(tree)
                lists["target_nodeids"].append(node)
                lists["target_ids"].append(tree % scores)
                lists["weights"].append(float(structure["leaf_value"]))
    return lists


def _model(nodes: Nodes, constants: list[Any], link: Link, n_features: int, scores: int) -> onnx.ModelProto:
    """`nodes` end in "scores" float64 [n, scores]; the link and the one rounding to float32 are added."""
    from onnx import TensorProto, helper, numpy_helper

    if link == "identity":
        output = helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n"])
        constants = [*constants, numpy_helper.from_array(np.array([-1], dtype=np.int64), "flat")]
        nodes = [*nodes, helper.make_node("Reshape", ["scores", "flat"], ["exact"])]
    else:
        classes = 2 if link == "sigmoid" else scores
        output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", classes])
        nodes = [*nodes, *_links(link)]
    nodes = [*nodes, helper.make_node("Cast", ["exact"], [output.name], to=TensorProto.FLOAT)]
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", n_features])
    return finish(helper.make_graph(nodes, "estimator", [features], [output], initializer=constants))


def _links(link: Link) -> Nodes:
    from onnx import helper

    if link == "softmax":
        return [helper.make_node("Softmax", ["scores"], ["exact"], axis=1)]
    return [
        helper.make_node("Neg", ["scores"], ["opposite"]),
        helper.make_node("Concat", ["opposite", "scores"], ["both"], axis=1),
        helper.make_node("Sigmoid", ["both"], ["exact"]),
    ]


def with_label(model: onnx.ModelProto, classes: list[str], threshold: float | None = None) -> onnx.ModelProto:
    """`model` with the output "label" (text, [n]) before "probabilities": the class of the largest, else the first; with a
    `threshold` the second of two from there on.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    constants: list[Any] = []
    winner = [helper.make_node("ArgMax", ["probabilities"], ["winner"], axis=1, keepdims=0)]
    if threshold is not None:
        constants = [
            numpy_helper.from_array(np.array(1, dtype=np.int64), "second"),
            numpy_helper.from_array(np.array(threshold, dtype=np.float32), "threshold"),
        ]
        winner = [
            helper.make_node("Gather", ["probabilities", "second"], ["chance"], axis=1),
            helper.make_node("GreaterOrEqual", ["chance", "threshold"], ["reached"]),
            helper.make_node("Cast", ["reached"], ["winner"], to=TensorProto.INT64),
        ]
    nodes = [*graph.node, *winner, helper.make_node("Gather", ["classes", "winner"], ["label"], axis=0)]
    names = helper.make_tensor("classes", TensorProto.STRING, [len(classes)], [name.encode() for name in classes])  # type: ignore[misc]
    label = helper.make_tensor_value_info("label", TensorProto.STRING, ["n"])
    return finish(
        helper.make_graph(
            nodes, "estimator", list(graph.input), [label, *graph.output], initializer=[*graph.initializer, *constants, names]
        )
    )
