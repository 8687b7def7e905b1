"""The ONNX graphs that the benchmarks serve: the same for us and for every peer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

IRIS = {"inputs": [{"name": "X", "shape": [1, 4], "datatype": "FP32", "data": [5.1, 3.5, 1.4, 0.2]}]}


def iris(path: Path) -> Path:
    """W1: logistic regression on four floats, `X` [n, 4] to `label` [n] and `probabilities` [n, 3]."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    data: Any = load_iris(return_X_y=True)
    rows, labels = data[0].astype("float32"), data[1]
    model = LogisticRegression(max_iter=1000).fit(rows, labels)
    graph = to_onnx(model, rows[:1], options={"zipmap": False}, target_opset={"": 18, "ai.onnx.ml": 3})
    path.write_bytes(graph.SerializeToString())
    return path


def identity(elements: int) -> bytes:
    """W3: `x` [n, elements] FP32 to `y`, the same."""
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", elements]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def heavy(layers: int = 24, width: int = 1024) -> bytes:
    """`x` [n, 4] FP32 to `y` [n, 1] by as many dense layers: milliseconds a call on one core."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)
    sizes = [4, *[width] * layers, 1]
    nodes, weights, last = [], [], "x"
    for number, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        kernel = (chance.normal(size=(rows, columns)) / rows**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"m{number}"]))
        nodes.append(helper.make_node("Tanh", [f"m{number}"], [f"t{number}"]))
        last = f"t{number}"
    nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(*end) for end in (("x", TensorProto.FLOAT, ["n", 4]), ("y", TensorProto.FLOAT, ["n", 1]))]
    graph = helper.make_graph(nodes, "heavy", ends[:1], ends[1:], weights)
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
