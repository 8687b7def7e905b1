"""A user's own ONNX model: read, tried out and packaged; what is unsafe or cannot be served is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from modelworks.core.errors import InvalidInput
from modelworks.ml.build import export_package, import_onnx, import_package, sniff
from modelworks.ml.package import Package
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from tests.learning import bundled, packaged, run

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: Any = (), **more: Any) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=list(constants))
    model = helper.make_model(graph, opset_imports=[*OPSETS, *more.pop("opsets", [])], ir_version=9, **more)
    path.write_bytes(model.SerializeToString())
    return path


def tensor(name: str, kind: int, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def plain(path: Path) -> Path:
    weights = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    return save(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [tensor("x", T.FLOAT, "n", 4)],
        [tensor("y", T.FLOAT, "n", 3)],
        [weights],
    )


def test_a_plain_net_is_imported_and_served(tmp_path: Path) -> None:
    path = plain(tmp_path / "net.onnx")
    assert sniff(path) == "onnx"
    manifest, files = import_onnx(path, tmp_path, licence="MIT")
    assert (manifest.task, manifest.licence) == ("custom", "MIT")
    assert manifest.signature.inputs[0].shape == [-1, 4]
    assert files["model.onnx"].read_bytes() == path.read_bytes()
    assert manifest.digest == import_onnx(path, tmp_path, licence="MIT")[0].digest
    package = Package(manifest, lambda _: files["model.onnx"])
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 2
    x = np.ones((5, 4), np.float32)
    assert runtime.predict({"x": x})["y"].tolist() == [[18.0, 22.0, 26.0]] * 5
    with pytest.raises(InvalidInput, match="refuses this input"):
        runtime.predict({"x": np.ones((5, 3), np.float32)})
    export_package(manifest, lambda _: files["model.onnx"], tmp_path / "net.mwp")
    (tmp_path / "in").mkdir()
    assert import_package(tmp_path / "net.mwp", tmp_path / "in")[0] == manifest


def test_our_own_graph_comes_back_as_tabular(tmp_path: Path) -> None:
    trained = run(bundled("iris"), tmp_path, algorithm="logistic-regression")
    path = packaged(trained, tmp_path).path("model.onnx")
    classes = trained.manifest.classes
    manifest, _ = import_onnx(path, tmp_path, classes=classes)
    assert (manifest.task, manifest.classes) == ("tabular-classification", classes)
    assert [spec.column for spec in manifest.signature.inputs] == ["number"] * 4
    assert import_onnx(path, tmp_path)[0].task == "custom"
    with pytest.raises(InvalidInput, match="leave task out"):
        import_onnx(path, tmp_path, task="tabular-regression")
    with pytest.raises(InvalidInput, match="2 classes"):
        import_onnx(path, tmp_path, classes=["a", "b"])
    regression = run(bundled("diabetes"), tmp_path, algorithm="ridge")
    assert import_onnx(packaged(regression, tmp_path).path("model.onnx"), tmp_path)[0].task == "tabular-regression"


def test_skl2onnx_with_its_zipmap(tmp_path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    data = load_iris()
    model = LogisticRegression(max_iter=1000).fit(data.data, data.target)
    path = tmp_path / "skl.onnx"
    path.write_bytes(
        to_onnx(model, data.data[:1].astype(np.float32), target_opset={"": 18, "ai.onnx.ml": 3}).SerializeToString()
    )
    manifest, files = import_onnx(path, tmp_path)
    assert {spec.name: spec.datatype for spec in manifest.signature.outputs} == {
        "output_label": "INT64",
        "output_probability": "FP32",
    }
    runtime = OnnxRuntime()
    runtime.load(Package(manifest, lambda _: files["model.onnx"]), 1)
    got = runtime.predict({"X": data.data.astype(np.float32)})
    np.testing.assert_allclose(got["output_probability"], model.predict_proba(data.data), atol=1e-5)


def test_texts_booleans_scalars_and_free_dimensions(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["words"], ["same"]),
        helper.make_node("Not", ["flags"], ["opposite"]),
        helper.make_node("ReduceSum", ["image"], ["total"], keepdims=0),
    ]
    path = save(
        tmp_path / "many.onnx",
        nodes,
        [tensor("words", T.STRING, "n"), tensor("flags", T.BOOL, "n", 2), tensor("image", T.FLOAT, "b", 3, "h", "w")],
        [tensor("same", T.STRING, "n"), tensor("opposite", T.BOOL, "n", 2), tensor("total", T.FLOAT)],
    )
    manifest, files = import_onnx(path, tmp_path)
    package = Package(manifest, lambda _: files["model.onnx"])
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 2
    got = runtime.predict(
        {
            "words": np.array([b"a", b"\xe5\x8c\x97"], object),
            "flags": np.array([[1, 0]], np.uint8),
            "image": np.ones((1, 3, 2, 2), np.float32),
        }
    )
    assert got["same"].tolist() == ["a", "北"]
    assert got["opposite"].tolist() == [[False, True]]
    assert got["total"] == 12.0


def _external(path: Path) -> Path:
    weights = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = T.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"
    return save(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [tensor("x", T.FLOAT, "n", 4)],
        [tensor("y", T.FLOAT, "n", 3)],
        [weights],
    )


def _external_inside(path: Path) -> Path:
    """The same, hidden in a constant of a branch."""
    hidden = numpy_helper.from_array(np.ones(3, np.float32), "w")
    hidden.ClearField("raw_data")
    hidden.data_location = T.EXTERNAL
    entry = hidden.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["z"], value=hidden)], "b", [], [tensor("z", T.FLOAT, 3)]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return save(path, [node], [tensor("c", T.BOOL)], [tensor("y", T.FLOAT, 3)])


def _operator(domain: str, kind: str) -> Any:
    def build(path: Path) -> Path:
        node = helper.make_node(kind, ["x"], ["y"], domain=domain)
        return save(
            path,
            [node],
            [tensor("x", T.FLOAT, "n")],
            [tensor("y", T.FLOAT, "n")],
            opsets=[helper.make_opsetid(domain, 1)],
        )

    return build


def _cut(path: Path) -> Path:
    plain(path)
    path.write_bytes(path.read_bytes()[:-7])
    return path


def _no_shape(path: Path) -> Path:
    plain(path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    path.write_bytes(model.SerializeToString())
    return path


def _sequence(path: Path) -> Path:
    value = helper.make_tensor_sequence_value_info("y", T.FLOAT, None)
    return save(path, [helper.make_node("SequenceConstruct", ["x"], ["y"])], [tensor("x", T.FLOAT, "n")], [value])


def _huge(path: Path) -> Path:
    return save(
        path,
        [helper.make_node("Neg", ["x"], ["y"])],
        [tensor("x", T.FLOAT, 100_000, 100_000)],
        [tensor("y", T.FLOAT, 100_000, 100_000)],
    )


def _never_runs(path: Path) -> Path:
    shape = numpy_helper.from_array(np.array([7, 7], np.int64), "s")
    return save(
        path,
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [tensor("x", T.FLOAT, "n", 5)],
        [tensor("y", T.FLOAT, 7, 7)],
        [shape],
    )


def _bytes(data: bytes) -> Any:
    def build(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return build


@pytest.mark.parametrize(
    ("build", "code", "said"),
    [
        (_external, "external_data", "in another file"),
        (_external_inside, "external_data", "in another file"),
        (_operator("evil.domain", "PyOp"), "unknown_operator", "evil.domain.PyOp"),
        (_operator("com.microsoft", "EPContext"), "unknown_operator", "compiled context"),
        (_operator("com.microsoft", "NoSuchOperator"), "bad_model", "cannot load"),
        (_cut, "bad_model", "parsed"),
        (_no_shape, "bad_model", "shape"),
        (_sequence, "bad_model", "not a tensor"),
        (_huge, "bad_model", "too many to try out"),
        (_never_runs, "bad_model", "does not run"),
        (_bytes(b"\x08\x07"), "bad_model", "no operator"),
        (_bytes(b"\x08\x07" + b"\xff" * 100), "bad_model", "parsed"),
    ],
)
def test_what_is_unsafe_or_broken_is_refused(build: Any, code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        import_onnx(build(tmp_path / "bad.onnx"), tmp_path)
    assert refused.value.code == code
    assert said in refused.value.message
    assert str(tmp_path) not in refused.value.message
    assert len(refused.value.message) < 700


def test_random_answers_leave_no_parity_samples(tmp_path: Path) -> None:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])]
    path = save(tmp_path / "random.onnx", nodes, [tensor("x", T.FLOAT, "n", 2)], [tensor("y", T.FLOAT, "n", 2)])
    assert import_onnx(path, tmp_path)[0].parity.inputs == []
