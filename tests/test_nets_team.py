"""Data parallel training: processes that share each batch learn what one process learns, and none of them may die unseen."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.ml.nets import loop as loops
from modelworks.ml.nets import team
from modelworks.ml.nets.cnn import Cnn
from modelworks.ml.nets.mlp import Mlp
from modelworks.ml.nets.params import CnnParams, MlpParams
from tests import learning
from tests.test_nets_training import blobs

pytestmark = pytest.mark.slow


class Context(learning.Context):
    processes = 2


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def learned(ctx: learning.Context, **params: Any) -> Any:
    return Mlp().learn(blobs(), MlpParams.model_validate({"hidden": [16], "epochs": 4} | params), ctx, None)


def weights(fitted: Any) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {one.name: numpy_helper.to_array(one) for one in fitted.model.graph.initializer}


def peers() -> list[psutil.Process]:
    """This process may have other children, and some of those may have ended unseen."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "modelworks.ml.nets.peer" in child.cmdline()]


def apart(one: Any, other: Any) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max(initial=0.0)) for name in first)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes learn that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 3)
        return learned(Context(tmp_path_factory.mktemp("unbroken")), dropout=0.2)


@pytest.mark.parametrize(
    "params",
    [
        {"optimiser": "sgd", "l1": 1e-3, "l2": 1e-3, "batch_size": 50},
        {"optimiser": "adamw", "accumulate": 3, "clip_norm": 0.5, "schedule": "cosine", "class_weight": "balanced"},
    ],
    ids=["sgd", "adamw"],
)
def test_several_processes_learn_what_one_learns(tmp_path: Path, params: dict[str, Any]) -> None:
    alone = learned(learning.Context(tmp_path), **params)
    ctx = Context(tmp_path)
    together = learned(ctx, **params)
    assert any(data.get("processes") == 2 for _, _, data in ctx.events)
    assert apart(alone, together) < 1e-5, "sums differ in their last digits alone"
    for one, other in zip(alone.history, together.history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert not peers(), "the peers have ended"
    assert not list(tmp_path.glob("team-*"))


def test_three_processes_take_images_with_normalisation_and_dropout(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    from modelworks.ml.nets.examples import MemoryExamples

    data, target = load_digits(return_X_y=True)
    examples = MemoryExamples((data / 16).astype(np.float32).reshape(-1, 1, 8, 8)[:900], target[:900], classes=10)
    params = CnnParams.model_validate({"channels": [8, 16], "head": [32], "epochs": 8, "learning_rate": 3e-3, "precision": "bfloat16"})
    ctx = Context(tmp_path)
    ctx.processes = 3
    made = Cnn().learn(examples, params, ctx, None)
    right = made.predict(examples.features)["probabilities"].argmax(axis=1) == examples.target
    assert right.mean() > 0.9


def test_a_run_that_is_taken_up_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    monkeypatch.setattr(loops, "_CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(loops, "_CHECKPOINT_SHARE", 0)
    kept: dict[str, bytes] = {}

    class Dying(learning.Dying):
        processes = 2

    with pytest.raises(learning.Crash):
        learned(Dying(tmp_path, kept, 7), dropout=0.2)
    assert not peers()
    resumed = Context(tmp_path, kept)
    assert apart(unbroken, learned(resumed, dropout=0.2)) == 0.0
    assert any("goes on" in message for _, message, _ in resumed.events)


def test_a_peer_that_is_killed_is_replaced_and_the_step_done_anew(tmp_path: Path, unbroken: Any) -> None:

    class Killing(Context):
        left = 1

        def metric(self, step: int, *given: Any, **more: Any) -> None:
            super().metric(step, *given, **more)
            if self.left:
                self.left -= 1
                for child in peers():
                    os.kill(child.pid, signal.SIGKILL)
                    child.wait()

    ctx = Killing(tmp_path)
    assert apart(unbroken, learned(ctx, dropout=0.2)) == 0.0
    assert [kind for kind, message, _ in ctx.events if "done anew" in message] == ["warning"]


def test_peers_that_cannot_start_end_the_run_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: Real(["/bin/false"], **more))
    with pytest.raises(ModelworksError, match=r"ended 3 times in a row.*resources\.processes"):
        learned(Context(tmp_path))


Real = subprocess.Popen


def test_memory_that_runs_out_at_a_peer_halves_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real peer is asked for what it lacks: a batch that it says was too much for it is done anew in halves."""
    receive, failed = team._receive, [False]

    def hungry(peer: Any) -> Any:
        answer = receive(peer)
        if isinstance(answer, tuple) and not failed[0]:
            failed[0] = True
            return ("out of memory", True, *answer[2:])
        return answer

    alone = learned(learning.Context(tmp_path), optimiser="sgd")
    monkeypatch.setattr(team, "_receive", hungry)
    ctx = Context(tmp_path)
    assert apart(alone, learned(ctx, optimiser="sgd")) < 1e-5
    assert [data["micro_batch"] for kind, _, data in ctx.events if kind == "warning"] == [32]


def test_a_net_that_cannot_be_handed_on_is_refused(tmp_path: Path) -> None:
    from torch import nn

    class Local(Mlp):
        def net(self, examples: Any, outputs: int, params: Any) -> Any:
            class Inner(nn.Linear):
                pass

            return Inner(6, outputs)

    with pytest.raises(InvalidInput, match=r"resources\.processes") as refused:
        Local().learn(blobs(), MlpParams(epochs=1), Context(tmp_path), None)
    assert refused.value.param == "resources.processes"


def test_no_more_processes_than_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    ctx = Context(tmp_path)
    learned(ctx)
    assert any(kind == "warning" and data.get("processes") == 1 for kind, _, data in ctx.events)


def test_what_is_no_net_trains_in_one_process() -> None:
    from modelworks.core.specs import TrainingSpec
    from modelworks.ml.train.checks import check_training

    _, columns = learning.bundled("iris")
    spec = {"model": "m", "dataset": "d:1", "target": "target", "resources": {"processes": 2}}
    with pytest.raises(InvalidInput, match="choose a net") as refused:
        check_training(TrainingSpec.model_validate(spec | {"algorithm": "logistic-regression"}), columns)
    assert refused.value.param == "resources.processes"
    assert check_training(TrainingSpec.model_validate(spec | {"algorithm": "mlp"}), columns).resources.processes == 2
