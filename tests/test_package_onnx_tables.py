"""A user's own export given a tabular task: its outputs are adapted, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from modelworks.core.errors import InvalidInput
from modelworks.ml.build import import_onnx
from modelworks.ml.package import Manifest, Package
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from tests.test_package_onnx import save, tensor

CLASSIFY, REGRESS = "tabular-classification", "tabular-regression"
NAMES = ["setosa", "versicolor", "virginica"]


def served(path: Path, folder: Path, **options: Any) -> tuple[Manifest, OnnxRuntime]:
    manifest, files = import_onnx(path, folder, **options)
    package = Package(manifest, lambda _: files["model.onnx"])
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) > 0
    return manifest, runtime


@pytest.fixture(scope="module")
def iris() -> Any:
    from sklearn.datasets import load_iris

    return load_iris()


def exported(model: Any, data: Any, path: Path, **options: Any) -> Path:
    from skl2onnx import to_onnx

    options = {id(model): options} if options else None  # type: ignore[assignment]
    path.write_bytes(to_onnx(model, data[:1].astype(np.float32), options=options).SerializeToString())
    return path


@pytest.mark.parametrize("zipmap", [False, True])
@pytest.mark.parametrize("offset", [0, 5])
def test_a_classifier_of_skl2onnx(iris: Any, tmp_path: Path, zipmap: bool, offset: int) -> None:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=1000).fit(iris.data, iris.target + offset)
    path = exported(model, iris.data, tmp_path / "skl.onnx", zipmap=zipmap)
    manifest, runtime = served(path, tmp_path, task=CLASSIFY, classes=NAMES)
    assert (manifest.task, manifest.classes) == (CLASSIFY, NAMES)
    shapes = {spec.name: (spec.datatype, spec.shape) for spec in manifest.signature.outputs}
    assert shapes == {"label": ("BYTES", [-1]), "probabilities": ("FP32", [-1, 3])}
    got = runtime.predict({"X": iris.data.astype(np.float32)})
    assert got["label"].tolist() == [NAMES[i - offset] for i in model.predict(iris.data)]
    np.testing.assert_allclose(got["probabilities"], model.predict_proba(iris.data), atol=1e-5)


def test_classes_that_are_the_labels_themselves(iris: Any, tmp_path: Path) -> None:
    from sklearn.neural_network import MLPClassifier

    data = iris.data / iris.data.max(axis=0)
    model = MLPClassifier((4,), max_iter=30, random_state=0).fit(data, iris.target + 5)
    path = exported(model, data, tmp_path / "skl.onnx", zipmap=False)
    _, runtime = served(path, tmp_path, task=CLASSIFY, classes=[5, 6, 7])
    assert runtime.predict({"X": data.astype(np.float32)})["label"].tolist() == [str(i) for i in model.predict(data)]
    _, runtime = served(path, tmp_path, task=CLASSIFY, classes=NAMES)
    named = runtime.predict({"X": data.astype(np.float32)})["label"].tolist()
    assert named == [NAMES[i - 5] for i in model.predict(data)]
    with pytest.raises(InvalidInput, match="its own labels are, in order, 5, 6, 7") as refused:
        import_onnx(path, tmp_path, task=CLASSIFY, classes=["1", "2", "3"])
    assert refused.value.param == "classes"


def test_string_labels_in_another_order_are_refused(iris: Any, tmp_path: Path) -> None:
    from sklearn.tree import DecisionTreeClassifier

    model = DecisionTreeClassifier(max_depth=3).fit(iris.data, np.array(NAMES)[iris.target])
    path = exported(model, iris.data, tmp_path / "skl.onnx", zipmap=False)
    _, runtime = served(path, tmp_path, task=CLASSIFY, classes=NAMES)
    got = runtime.predict({"X": iris.data.astype(np.float32)})["label"].tolist()
    assert got == model.predict(iris.data).tolist()
    with pytest.raises(InvalidInput, match="in order, setosa, versicolor, virginica"):
        import_onnx(path, tmp_path, task=CLASSIFY, classes=NAMES[::-1])


def test_a_regressor_of_skl2onnx(iris: Any, tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression

    model = LinearRegression().fit(iris.data, iris.target)
    path = exported(model, iris.data, tmp_path / "skl.onnx")
    manifest, runtime = served(path, tmp_path, task=REGRESS)
    assert manifest.task == REGRESS
    assert manifest.lineage["imported"]["outputs"] == {"value": "variable"}
    (x,) = manifest.signature.inputs
    assert (x.name, x.shape, x.column) == ("X", [-1, 4], None)
    got = runtime.predict({"X": iris.data.astype(np.float32)})["value"]
    np.testing.assert_allclose(got, model.predict(iris.data), atol=1e-4)
    assert import_onnx(path, tmp_path)[0].task == "custom"


def two_inputs(path: Path, output: Any, *nodes: Any) -> Path:
    nodes = nodes or (helper.make_node("Add", ["a", "b"], [output.name]),)
    return save(path, list(nodes), [tensor("a", T.FLOAT, "n", 1), tensor("b", T.FLOAT, "n", 1)], [output])


@pytest.mark.parametrize("name", ["value", "anything"])
def test_a_graph_of_two_columns(tmp_path: Path, name: str) -> None:
    path = two_inputs(tmp_path / "sum.onnx", tensor(name, T.FLOAT, "n", 1))
    manifest, runtime = served(path, tmp_path, task=REGRESS)
    assert [spec.column for spec in manifest.signature.inputs] == ["number", "number"]
    got = runtime.predict({"a": np.array([1, 2], np.float32), "b": np.array([10, 20], np.float32)})
    assert got["value"].tolist() == [11.0, 22.0]


def scores(path: Path, *, softmax: bool = True, width: int = 3, label: Any = None) -> Path:
    """A net from x [n, 4]: with `label` (element type, shape), its second output is `winner`."""
    weights = numpy_helper.from_array(np.arange(4 * width, dtype=np.float32).reshape(4, width), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"])]
    nodes.append(helper.make_node("Softmax" if softmax else "Identity", ["s"], ["label"]))
    outputs = [tensor("label", T.FLOAT, "n", width)]  # the probabilities, under the worst of names
    if label:
        nodes += [
            helper.make_node("ArgMax", ["s"], ["best"], axis=1),
            helper.make_node("Cast", ["best"], ["winner"], to=label[0]),
        ]
        outputs.append(tensor("winner", label[0], *label[1]))
    return save(path, nodes, [tensor("x", T.FLOAT, "n", 4)], outputs, [weights])


@pytest.mark.parametrize("label", [None, (T.INT64, ("n", 1)), (T.INT32, ("n", 1)), (T.FLOAT, ("n", 1))])
def test_a_net_with_and_without_labels(tmp_path: Path, label: Any) -> None:
    path = scores(tmp_path / "net.onnx", label=label)
    if label and label[0] == T.FLOAT:
        with pytest.raises(InvalidInput, match=r"the output 'winner' \(FP32 \[-1, 1\]\) is no label"):
            import_onnx(path, tmp_path, task=CLASSIFY, classes=NAMES)
        return
    _, runtime = served(path, tmp_path, task=CLASSIFY, classes=NAMES)
    got = runtime.predict({"x": np.array([[1, 1, 1, 1], [-1, -1, -1, -1]], np.float32)})
    assert got["label"].tolist() == ["virginica", "setosa"]
    assert got["probabilities"].shape == (2, 3)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def why(path: Path, task: str, classes: Any = None) -> str:
        with pytest.raises(InvalidInput) as refused:
            import_onnx(path, tmp_path, task=task, classes=classes)
        return str(refused.value.message)

    assert "the output 'label' (FP32 [-1, 3]) has 3 columns" in why(scores(tmp_path / "a"), CLASSIFY, ["a", "b"])
    assert "those of a row sum to" in why(scores(tmp_path / "b", softmax=False), CLASSIFY, NAMES)
    assert "the output 'label' (FP32 [-1, 3]) must be a float" in why(scores(tmp_path / "c"), REGRESS)
    assert "needs the classes" in why(scores(tmp_path / "d"), CLASSIFY)
    assert "it has 2 outputs" in why(scores(tmp_path / "e", label=(T.INT64, ("n", 1))), REGRESS)
    fixed = save(
        tmp_path / "f",
        [helper.make_node("Neg", ["x"], ["y"])],
        [tensor("x", T.FLOAT, 1, 4)],
        [tensor("y", T.FLOAT, 1, 4)],
    )
    assert "the input 'x' (FP32 [1, 4]) has no rows" in why(fixed, REGRESS)
    whole = two_inputs(
        tmp_path / "g",
        tensor("y", T.INT64, "n", 1),
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Cast", ["s"], ["y"], to=T.INT64),
    )
    assert "the output 'y' (INT64 [-1, 1]) must be a float" in why(whole, REGRESS)
