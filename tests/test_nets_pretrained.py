"""What is built on registered models: their graphs as nets, classifiers of texts and images, embeddings as features."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Column
from modelworks.ml import build, graph
from modelworks.ml.nets import loop as loops
from modelworks.ml.package import Package
from modelworks.ml.runtimes.onnx import MODEL_FILE, OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from tests import learning, media
from tests.test_encoder_import import WORDS, written


def registered(manifest: Any, files: dict[str, Path]) -> Package:
    return Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A small BERT of random weights, as it is registered."""
    folder = written(tmp_path_factory.mktemp("bert"), "BertModel")
    return registered(*build.import_folder(folder, tmp_path_factory.mktemp("work"), task="embedding"))


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A small convolutional net of random weights, exported by torch, as it is registered."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.SiLU(),
        nn.AvgPool2d(2),
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("eyes") / "eyes.onnx"
    torch.onnx.export(
        net, (torch.zeros(2, 3, 8, 8),), str(path), dynamo=False, opset_version=17, input_names=["image"],
        output_names=["maps"], dynamic_axes={"image": {0: "n"}, "maps": {0: "n"}},
    )  # fmt: skip
    return registered(*build.import_onnx(path, path.parent, task="image-embedding"))


def sentences(rows: int = 120) -> learning.Table:
    """A cat or a dog among other words, some of them many."""
    random = np.random.default_rng(0)
    texts, names = [], []
    for row in range(rows):
        words = [*random.choice(WORDS[6:11], int(random.integers(1, 9))), ("cat", "dog")[row % 2]]
        texts.append(" ".join(random.permutation(words)))
        names.append(("feline", "canine")[row % 2])
    return pa.table({"text": texts, "target": names}), [Column(name="text", type="text"), Column(name="target", type="category")]


def trained(data: learning.Table, backbone: Package, ctx: learning.Context, **spec: Any) -> Any:
    ctx.models["base:1"] = backbone
    return learning.run(data, ctx.workdir, ctx, **spec)


def check_package(found: Any, folder: Path) -> OnnxRuntime:
    package = learning.packaged(found, folder)
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 32
    return runtime


def test_a_foreign_graph_answers_as_a_net_and_learns(encoder: Package, eyes: Package) -> None:
    import torch

    from modelworks.ml.nets.backbone import image_backbone, text_backbone
    from modelworks.ml.nets.emit import write_vectors
    from modelworks.ml.nets.interpret import ImageFront, TextFront

    tokens = torch.zeros(3, 12)
    for row, length in enumerate((2, 9, 5)):
        tokens[row, :length] = torch.tensor([2, *range(4, 2 + length), 3][:length])
    read = text_backbone(encoder, "base:1", "")
    assert (read.width, read.end) == (16, [3])
    seen = image_backbone(eyes, "eyes:1", "")
    assert (seen.channels, seen.size) == (3, (8, 8))
    for front, given in ((TextFront(read), tokens), (ImageFront(seen), torch.rand(4, 3, 8, 8))):
        answer = front(given)
        written_down = graph.session(graph.to_bytes(write_vectors(front, tuple(given.shape[1:]))))
        np.testing.assert_allclose(written_down.run(None, {"features": given.numpy()})[0], answer.detach(), atol=1e-5)
        alone = torch.cat([front(given[row : row + 1]) for row in range(len(given))])
        np.testing.assert_allclose(alone.detach(), answer.detach(), atol=1e-5)
        answer.square().sum().backward()
        assert all(weight.grad is not None for weight in front.parameters())
    whole = OnnxRuntime()
    whole.load(eyes, 1)
    maps = whole.predict({"image": given.numpy()})["maps"]
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), answer.detach(), atol=1e-5)


def test_a_text_classifier_on_a_registered_encoder_is_packaged_with_it(encoder: Package, tmp_path: Path) -> None:
    ctx = learning.Context(tmp_path)
    given = {"backbone": "base:1", "epochs": 30, "learning_rate": 0.02}
    found = trained(sentences(), encoder, ctx, algorithm="text-classifier", hyperparameters=given)
    assert found.report["metrics"]["accuracy"]["mean"] > 0.9
    assert found.manifest.lineage["models"] == {"base:1": {"digest": encoder.manifest.digest, "licence": None}}
    assert set(found.manifest.files) == {MODEL_FILE}
    assert found.manifest.task == "text-classification"
    runtime = check_package(found, tmp_path)
    long = " ".join(["mat"] * 200 + ["cat"])
    answer = runtime.predict({"text": np.array(["a dog", "cat .", "", long], dtype=object)})
    assert answer["label"].tolist()[:2] == ["canine", "feline"]


def test_fine_tuning_goes_on_after_a_crash_as_if_there_had_been_none(
    encoder: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(loops, "_CHECKPOINT_SHARE", 0)
    given = {"backbone": "base:1", "epochs": 3, "fine_tune": 4, "fine_tune_rate": 0.002, "learning_rate": 0.01}
    spec = {"algorithm": "text-classifier", "hyperparameters": given, "validation": {"holdout": 0.3}}
    data = sentences(80)
    unbroken = trained(data, encoder, learning.Context(tmp_path), **spec)
    ctx = Dying(tmp_path)
    with pytest.raises(learning.Crash):
        trained(data, encoder, ctx, **spec)
    again = learning.Context(tmp_path, ctx.kept)
    resumed = trained(data, encoder, again, **spec)
    assert any("backbone: goes on in epoch" in message for _, message, _ in again.events)
    assert resumed.manifest.digest == unbroken.manifest.digest
    check_package(resumed, tmp_path)
    curve = [step for part, unit, step, _ in again.points if unit == "epoch" and part == "final fit"]
    assert curve[-1] == 7


class Dying(learning.Context):
    """Dies in the second epoch of fine-tuning in the final fit."""

    def checkpoint(self, name: str, data: bytes) -> None:
        super().checkpoint(name, data)
        self.left = getattr(self, "left", 5) - (name == "final fit: backbone: net")
        if not self.left:
            raise learning.Crash


def test_embeddings_are_features_of_any_algorithm(encoder: Package, tmp_path: Path) -> None:
    table, columns = sentences()
    table = table.append_column("size", pa.array(np.arange(120.0) % 7))
    columns = [*columns, Column(name="size", type="number")]
    steps = [{"op": "embed", "model": "base:1", "length": 12}, "standardise"]
    spec = {"algorithm": "logistic-regression", "transforms": steps}
    found = trained((table, columns), encoder, learning.Context(tmp_path), **spec)
    assert found.report["metrics"]["accuracy"]["mean"] > 0.9
    assert found.manifest.lineage["models"]["base:1"]["digest"] == encoder.manifest.digest
    runtime = check_package(found, tmp_path)
    some = {"text": np.array(["dog a", "the cat"], dtype=object), "size": np.ones(2, dtype=np.float32)}
    assert runtime.predict(some)["label"].tolist() == ["canine", "feline"]


def test_an_image_classifier_on_a_registered_model(eyes: Package, tmp_path: Path) -> None:
    files = media.digits(200)
    labels = [name.split("/")[1] for name in files]
    table = pa.table({"image": pa.array(list(files.values()), pa.binary()), "target": labels})
    data = table, [Column(name="image", type="image"), Column(name="target", type="category")]
    given = {"backbone": "base:1", "fine_tune": 6, "fine_tune_rate": 0.01, "hidden": [32], "learning_rate": 0.01}
    plain = trained(data, eyes, learning.Context(tmp_path), algorithm="image-classifier", hyperparameters=given)
    assert plain.report["metrics"]["accuracy"]["mean"] > 0.5
    check_package(plain, tmp_path)
    steps = [{"op": "resize", "size": 8, "colour": "rgb"}, {"op": "augment", "shift": 0.15}]
    given = {"backbone": "base:1", "epochs": 10, "learning_rate": 0.01, "copies": 2}
    spec = {"algorithm": "image-classifier", "hyperparameters": given, "transforms": steps}
    changed = trained(data, eyes, learning.Context(tmp_path), **spec)
    assert hashlib.sha256(changed.files[MODEL_FILE]).hexdigest() == changed.manifest.files[MODEL_FILE].digest
    check_package(changed, tmp_path)


def test_operators_answer_as_onnxruntime_does() -> None:
    """And where they would not, they say so."""
    import torch
    from onnx import helper

    from modelworks.ml.imported import read_graph
    from modelworks.ml.nets.interpret import Imported

    def both(op: str, shape: tuple[int, ...], count: int = 1, **attributes: Any) -> tuple[np.ndarray, np.ndarray]:
        node = helper.make_node(op, ["x"] * count, ["y"], **attributes)
        ports = [[helper.make_tensor_value_info(name, 1, sizes)] for name, sizes in (("x", shape), ("y", None))]
        model = helper.make_model(
            helper.make_graph([node], "one", *ports), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
        )
        data, given = model.SerializeToString(), np.random.default_rng(1).normal(size=shape).astype(np.float32)
        answer = Imported(read_graph(data, 18))(torch.from_numpy(given)).numpy()
        return answer, graph.session(data).run(None, {"x": given})[0]

    windows = {"kernel_shape": [2], "strides": [2], "ceil_mode": 1}
    for op, shape, more in (
        ("MaxPool", (2, 3, 9), {"kernel_shape": [3], "dilations": [2]}),
        ("MaxPool", (2, 3, 5), {**windows, "pads": [1, 1]}),
        ("AveragePool", (2, 3, 6), {**windows, "pads": [0, 1], "count_include_pad": 1}),
        ("AveragePool", (1, 2, 4, 5, 6), {"kernel_shape": [2, 3, 1]}),
        ("Max", (2, 3), {"count": 3}),
        ("Min", (2, 3), {"count": 1}),
    ):
        np.testing.assert_allclose(*both(op, shape, **more), atol=1e-6)
    for op, more in (
        *((op, {"kernel_shape": [2], "auto_pad": "SAME_UPPER"}) for op in ("MaxPool", "AveragePool")),
        ("Cast", {"to": 10}),
    ):
        with pytest.raises(InvalidInput, match="leave fine_tune at 0"):
            both(op, (2, 3, 6), **more)


def test_an_output_without_a_name_is_nobodys_input() -> None:
    """A node's optional output that is left out, before one that leaves an input out."""
    from onnx import helper

    from modelworks.ml.imported import read_graph

    nodes = [
        helper.make_node("Dropout", ["x"], ["dropped", ""]),
        helper.make_node("Clip", ["dropped", "", "most"], ["y"]),
    ]
    ports = [[helper.make_tensor_value_info(name, 1, ["n", 3])] for name in "xy"]
    most = helper.make_tensor("most", 1, [], [0.5])
    found = read_graph(helper.make_model(helper.make_graph(nodes, "g", *ports, [most])).SerializeToString(), 18)
    wired: list[tuple[str, list[str]]] = []

    def node(one: Any, names: list[str]) -> list[str]:
        wired.append((one.op, names))
        return [f"{one.op}{at}" for at in range(len(one.outputs))]

    assert found.copy({"x": "X"}, node, str) == "Clip0"
    assert wired == [("Dropout", ["X"]), ("Clip", ["Dropout0", "", "most"])]


def test_a_backbone_that_stays_as_it_is_may_hold_any_operator(tmp_path: Path) -> None:
    """Split and quantised weights, which are not trained here."""
    import onnx
    from onnx import helper, numpy_helper

    weight = np.random.default_rng(0).integers(0, 255, (8, 3, 3, 3), dtype=np.uint8)
    constants = {"weight": weight, "scale": np.array(0.02, dtype=np.float32), "zero": np.array(128, dtype=np.uint8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["kernel"]),
        helper.make_node("Conv", ["image", "kernel"], ["maps"], strides=[2, 2]),
        helper.make_node("Split", ["maps"], ["one", "two"], axis=1, num_outputs=2),
        helper.make_node("Mul", ["one", "two"], ["product"]),
        helper.make_node("Concat", ["product", "maps"], ["both"], axis=1),
    ]
    made = helper.make_graph(
        nodes, "eyes", [helper.make_tensor_value_info("image", 1, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("both", 1, ["n", 12, 3, 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    path = tmp_path / "eyes.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    backbone = registered(*build.import_onnx(path, tmp_path, task="image-embedding"))
    files = media.digits(60)
    table = pa.table({"image": pa.array(list(files.values()), pa.binary()), "target": [n.split("/")[1] for n in files]})
    data = table, [Column(name="image", type="image"), Column(name="target", type="category")]
    spec: dict[str, Any] = {"algorithm": "image-classifier", "validation": {"holdout": 0.3}}
    given = {"backbone": "base:1", "epochs": 3, "hidden": [8]}
    found = trained(data, backbone, learning.Context(tmp_path), hyperparameters=given, **spec)
    check_package(found, tmp_path)
    with pytest.raises(InvalidInput, match="DequantizeLinear, Split, which cannot be trained here; leave fine_tune at 0"):
        trained(data, backbone, learning.Context(tmp_path), hyperparameters={**given, "fine_tune": 1}, **spec)


@pytest.mark.parametrize(
    ("algorithm", "transforms", "said"),
    [
        ("text-classifier", ["tokenise"], r"let tokenise have the model base:1"),
        ("text-classifier", ["tf-idf"], r"reads one text|several features|leave transforms out"),
        ("image-classifier", None, r"is no plain ONNX model of images"),
        ("logistic-regression", [{"op": "embed", "model": "base:1", "length": 49}], r"at most 48 tokens"),
        ("logistic-regression", ["embed"], r"name a registered embedding model"),
    ],
)
def test_what_does_not_fit_the_backbone_is_said(
    encoder: Package, tmp_path: Path, algorithm: str, transforms: Any, said: str
) -> None:
    spec: dict[str, Any] = {"algorithm": algorithm, "transforms": transforms}
    if algorithm != "logistic-regression":
        spec["hyperparameters"] = {"backbone": "base:1"}
    with pytest.raises(InvalidInput, match=said):
        trained(sentences(40), encoder, learning.Context(tmp_path), **spec)
