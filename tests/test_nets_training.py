"""The loop of all nets: it learns, goes on after a crash as if there had been none, and says what went wrong."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Stopping
from modelworks.ml import graph
from modelworks.ml.nets import loop as loops
from modelworks.ml.nets.examples import MemoryExamples, StreamedExamples
from modelworks.ml.nets.mlp import Mlp
from modelworks.ml.nets.optimise import factor
from modelworks.ml.nets.params import MlpParams
from modelworks.ml.nets.trainer import NetTrainer
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity
from modelworks.ml.train.algorithms import TRAINERS
from modelworks.testing import check_trainer
from tests import learning


def digits(rows: int = 400) -> learning.Table:
    import pyarrow as pa
    from sklearn.datasets import load_digits

    from modelworks.core.types import Column

    data, target = load_digits(return_X_y=True)
    names = [f"pixel {i:02d}" for i in range(64)]
    table = pa.table(
        {name: data[:rows, i] for i, name in enumerate(names)} | {"target": [str(v) for v in target[:rows]]}
    )
    return table, [*(Column(name=name, type="number") for name in names), Column(name="target", type="category")]


def blobs(rows: int = 300, classes: int | None = 3) -> MemoryExamples:
    random = np.random.default_rng(0)
    features = random.normal(size=(rows, 6)).astype(np.float32)
    score = features[:, 0] + features[:, 1] ** 2
    if classes is None:
        return MemoryExamples(features, score.astype(np.float64))
    return MemoryExamples(
        features, np.digitize(score, np.quantile(score, [1 / 3, 2 / 3][: classes - 1])), classes=classes
    )


def learned(examples: Any, ctx: learning.Context, stopping: Stopping | None = None, **params: Any) -> Any:
    return Mlp().learn(examples, MlpParams.model_validate({"hidden": [16], "epochs": 20} | params), ctx, stopping)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_graph_answers_as_the_net_whatever_it_was_computed_in(tmp_path: Path, precision: str) -> None:
    """Weights stay float32: what training computed in is no part of the model."""
    from modelworks.ml.nets.cnn import Cnn
    from modelworks.ml.nets.params import CnnParams

    data, _ = digits(600)
    features = np.stack([data.column(i).to_numpy() for i in range(64)], axis=1).astype(np.float32).reshape(-1, 1, 8, 8) / 16
    examples = MemoryExamples(features, np.array([int(v) for v in data.column("target").to_pylist()]), classes=10)
    params = CnnParams.model_validate({"channels": [8, 16], "head": [32], "epochs": 8, "learning_rate": 3e-3, "precision": precision})
    made = Cnn().learn(examples, params, learning.Context(tmp_path), None)
    assert (made.predict(features)["probabilities"].argmax(axis=1) == examples.target).mean() > 0.9


FAMILIES: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [32], "dropout": 0.1},
    "cnn": {"shape": [1, 8, 8], "channels": [8], "residual": 1, "shift": 1, "head": [32], "epochs": 4},
    "rnn": {"steps": 8, "hidden": 24},
    "transformer": {"steps": 8, "width": 24, "layers": 1},
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_learns_and_its_package_answers_as_training_did(name: str, tmp_path: Path) -> None:
    given = {"epochs": 12, "learning_rate": 0.01, "schedule": "one-cycle"} | FAMILIES[name]
    trained = learning.run(digits(), tmp_path, algorithm=name, hyperparameters=given)
    assert trained.report["metrics"]["accuracy"]["mean"] > 0.6
    package = learning.packaged(trained, tmp_path)
    runtime = OnnxRuntime()
    runtime.load(package, 1)
    assert replay_parity(package, runtime) == 32
    trainer: Any = TRAINERS.get(name)
    assert trained.manifest.signature.outputs[1].shape == [-1, 10]
    assert issubclass(trainer, NetTrainer)


def test_a_net_of_a_user_keeps_the_contract_through_torchs_exporter() -> None:
    check_trainer(Gated, hyperparameters={"epochs": 2})


@pytest.mark.parametrize("params", [{"cell": "gru", "layers": 2, "bidirectional": True}, {"cell": "lstm"}])
def test_recurrent_nets_keep_the_contract(params: dict[str, Any]) -> None:
    check_trainer(TRAINERS.get("rnn"), hyperparameters=params | {"epochs": 1, "hidden": 8})


class Gated(NetTrainer):
    """A net with an operation that the house's emitter does not know."""

    shaped = False

    def net(self, examples: Any, outputs: int, params: Any) -> Any:
        from torch import nn

        class Gate(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Linear(examples.shape[0], outputs), nn.Linear(examples.shape[0], outputs)

            def forward(self, x: Any) -> Any:
                return self.left(x) * self.right(x).sigmoid()

        return Gate()


@pytest.mark.parametrize("stopping", [None, Stopping(patience=50, metric="accuracy")])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_that_is_broken_ends_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: Stopping | None, streamed: bool
) -> None:
    monkeypatch.setattr(loops, "_CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(loops, "_CHECKPOINT_SHARE", 0)
    whole = blobs()
    examples: Any = whole
    if streamed:
        examples = StreamedExamples(lambda: whole.batches(32), len(whole), (6,), classes=3, buffer=64)
    given = {"dropout": 0.3, "momentum": 0.8, "schedule": "cosine", "batch_size": 16, "accumulate": 2, "epochs": 8}
    unbroken = learned(examples, learning.Context(tmp_path), stopping, **given)
    kept: dict[str, bytes] = {}
    ctx = learning.Dying(tmp_path, kept, after=27)
    with pytest.raises(learning.Crash):
        learned(examples, ctx, stopping, **given)
    again = learning.Context(tmp_path, kept)
    resumed = learned(examples, again, stopping, **given)
    assert any("goes on in epoch" in message for _, message, _ in again.events)
    assert graph.to_bytes(resumed.model) == graph.to_bytes(unbroken.model)
    assert resumed.history == unbroken.history


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "mse", "mae", "huber", "binary-cross-entropy"])
def test_every_loss_is_made_small(loss: str, tmp_path: Path) -> None:
    classes = None if loss in ("mse", "mae", "huber") else 2 if loss.startswith("binary") else 3
    fitted = learned(blobs(classes=classes), learning.Context(tmp_path), loss=loss, learning_rate=0.01)
    assert fitted.history[-1]["loss"] < 0.6 * fitted.history[0]["loss"]


@pytest.mark.parametrize("optimiser", ["adam", "sgd", "momentum", "nesterov", "gradient-descent"])
def test_every_optimiser_goes_downhill(optimiser: str, tmp_path: Path) -> None:
    rate = {"adam": 0.01, "gradient-descent": 0.5}.get(optimiser, 0.1)
    fitted = learned(
        blobs(), learning.Context(tmp_path), optimiser=optimiser, learning_rate=rate, l1=1e-4, l2=1e-4, epochs=40
    )
    assert fitted.history[-1]["loss"] < 0.85 * fitted.history[0]["loss"]


def test_full_gradient_descent_is_one_step_an_epoch_along_the_whole_gradient(tmp_path: Path) -> None:
    import torch
    from torch import nn

    examples = blobs(classes=None)
    fitted = learned(
        examples, learning.Context(tmp_path), hidden=[], optimiser="gradient-descent", learning_rate=0.1, epochs=30
    )
    torch.manual_seed(0)
    net = nn.Linear(6, 1)
    x, y = torch.from_numpy(examples.features), torch.from_numpy(examples.target).float()
    mean, scale = float(examples.target.mean()), float(examples.target.std())
    for _ in range(30):
        net.zero_grad()
        ((net(x).reshape(-1) - (y - mean) / scale) ** 2).mean().backward()
        with torch.no_grad():
            for weight in net.parameters():
                assert weight.grad is not None
                weight -= 0.1 * weight.grad
    expected = net(x).detach().double().numpy().reshape(-1) * scale + mean
    assert np.allclose(fitted.predict(examples.features)["value"], expected, atol=1e-4)


def test_gradients_that_are_added_up_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    given = {"optimiser": "sgd", "learning_rate": 0.1, "class_weight": "balanced"}
    whole = learned(blobs(256), learning.Context(tmp_path), batch_size=64, **given)
    parts = learned(blobs(256), learning.Context(tmp_path), batch_size=16, accumulate=4, **given)
    features = blobs(256).features
    assert np.allclose(whole.predict(features)["probabilities"], parts.predict(features)["probabilities"], atol=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    wild = MemoryExamples(blobs().features * 1e20, blobs().target, classes=3)
    with pytest.raises(InvalidInput, match=r"no number any more in epoch 1.*lower learning_rate") as refused:
        learned(wild, learning.Context(tmp_path), optimiser="sgd", learning_rate=100.0, loss="cross-entropy")
    assert refused.value.code == "nan_loss"


def test_it_stops_when_nothing_improves_and_keeps_the_best_weights(tmp_path: Path) -> None:
    ctx = learning.Context(tmp_path)
    noise = MemoryExamples(blobs(80).features, np.random.default_rng(1).integers(0, 2, 80), classes=2)
    stopping = Stopping(patience=5, holdout=0.25)
    fitted = learned(noise, ctx, stopping, hidden=[64], epochs=500, learning_rate=0.01)
    losses = [point["val_loss"] for point in fitted.history]
    assert len(losses) < 200
    assert int(np.argmin(losses)) == len(losses) - 6
    assert any("whose weights are kept" in message for _, message, _ in ctx.events)
    assert learned(noise, ctx, Stopping(max_epochs=3)).history[-1]["epoch"] == 3


def test_a_range_test_finds_a_rate_that_learns(tmp_path: Path) -> None:
    ctx = learning.Context(tmp_path)
    fitted = learned(blobs(), ctx, learning_rate="auto")
    assert any("the range test chose" in message for _, message, _ in ctx.events)
    assert fitted.history[-1]["loss"] < 0.8 * fitted.history[0]["loss"]


def test_schedules_begin_and_end_where_they_should() -> None:
    def rates(**given: Any) -> list[float]:
        return [factor(MlpParams.model_validate(given), step, 100) for step in range(100)]

    assert set(rates()) == {1.0}
    assert rates(schedule="step")[49] == 1.0
    assert rates(schedule="step")[99] == 0.01
    cycle = rates(schedule="one-cycle")
    assert (round(cycle[0], 2), cycle[30], round(cycle[99], 2)) == (0.04, 1.0, 0.0)
    assert rates(schedule="cosine")[0] == 1.0
    assert rates(schedule="cosine")[99] < 0.01
    warm = rates(schedule="linear", warmup=0.1)
    assert warm[0] < 0.1
    assert max(warm) == warm[10]


def test_it_says_beforehand_what_it_will_take_and_warns_when_it_will_not_fit(tmp_path: Path) -> None:
    from modelworks.ml.nets import advice

    ctx = learning.Context(tmp_path)
    learned(blobs(), ctx)
    (estimate,) = [data["estimate"] for _, _, data in ctx.events if "estimate" in data]
    assert estimate["seconds"] > 0
    assert 50 < estimate["memory_mb"] < estimate["free_mb"]
    assert estimate["parameters"] == 6 * 16 + 16 + 16 * 3 + 3
    ctx = learning.Context(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advice, "available", lambda: 0)
        patch.setattr("torch.cuda.is_available", lambda: False)  # it is this machine's memory that is short
        learned(blobs(), ctx, epochs=1)
    assert any(kind == "warning" and "hardly fit" in message for kind, message, _ in ctx.events)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_in_which_memory_runs_out_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Also when it runs out in the optimiser, or in what is told after a step: no step is left out, none is done twice."""
    from modelworks.ml.nets.loop import Loop

    unbroken = learned(blobs(), learning.Context(tmp_path / "a"), epochs=3, batch_size=64)
    update, calls = Loop._update, []

    def starved(loop: Any) -> None:
        calls.append(loop)
        if len(calls) == 2 and when == "before":
            raise MemoryError
        update(loop)

    def tell(loop: Any, now: float, **more: Any) -> None:
        calls.append(loop)
        if len(calls) == 3 and when == "after":
            raise MemoryError

    monkeypatch.setattr(Loop, "_update", starved if when == "before" else update)
    if when == "after":
        monkeypatch.setattr(Loop, "_tell", tell)
        monkeypatch.setattr("modelworks.ml.nets.loop._REPORT_EVERY", 0.0)
    ctx = learning.Context(tmp_path / "b")
    broken = learned(blobs(), ctx, epochs=3, batch_size=64)
    assert [data["micro_batch"] for _, _, data in ctx.events if "micro_batch" in data] == [32]
    assert [point["loss"] for point in broken.history] == pytest.approx([point["loss"] for point in unbroken.history])


def test_when_memory_runs_out_the_batch_is_halved_and_training_goes_on(tmp_path: Path) -> None:
    """In a process of its own, with a real limit."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import numpy as np
from pathlib import Path
from tests import learning
from tests.test_nets_training import Mlp, MlpParams
from modelworks.ml.nets.examples import MemoryExamples
random = np.random.default_rng(0)
features = random.normal(size=(8192, 4)).astype(np.float32)
examples = MemoryExamples(features, (features[:, 0] > 0).astype(np.int64), classes=2)
ctx = learning.Context(Path({str(tmp_path)!r}))
params = dict(hidden=[4096], epochs=2, learning_rate=0.001)
Mlp().learn(examples, MlpParams(**params, batch_size=64), ctx, None)  # all that torch loads is loaded
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
limit = used + (200 << 20)  # the batch needs more than 256 MiB
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
ctx = learning.Context(Path({str(tmp_path)!r}))
fitted = Mlp().learn(examples, MlpParams(**params, batch_size=8192), ctx, None)
print(*[data["micro_batch"] for kind, _, data in ctx.events if "micro_batch" in data])
print(ctx.advice[0]["micro_batch"], ctx.advice[0]["will_fit"], "memory runs out with 8192 rows" in ctx.advice[0]["warnings"][0])
print(fitted.history[-1]["loss"] < fitted.history[0]["loss"])
"""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # it is this machine's memory that runs out
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=hidden)
    assert done.returncode == 0, done.stderr[-2000:]
    halved, advised, learns = done.stdout.splitlines()
    found = [int(rows) for rows in halved.split()]
    assert found[0] == 4096
    rows, fits, warned = advised.split()
    assert int(rows) in found or int(rows) == found[-1] // 2  # the advisor had found the same, near enough to the limit
    assert (fits, warned) == ("True", "True")
    assert learns == "True"
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
