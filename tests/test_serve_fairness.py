"""The waiting queue, the breaker and the hints by themselves; the router with them: test_serve_policies.py."""

from dataclasses import dataclass, field

import pytest

from modelworks.control.routing import limits_of, platform_of
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import InvalidInput
from modelworks.core.tensors import Tensor
from modelworks.core.types import Call, Deployment, ModelVersion, Principal, Signature
from modelworks.serve.breaker import THRESHOLD, Breaker
from modelworks.serve.fairness import FairQueue
from modelworks.serve.hints import hint
from modelworks.serve.lane import Lane
from modelworks.serve.routes import Limits, Route


@dataclass
class Item:
    key: str
    rows: int = 1
    priority: int = 1
    done: bool = False
    since: float = 0.0
    call: Call = field(init=False)

    def __post_init__(self):
        tensors = [Tensor("x", "FP32", [self.rows, 1], b"")]
        self.call = Call("toy", tensors, 1e9, key_id=self.key, priority=self.priority)


def drain(queue, now=0.0):
    found = []
    while (item := queue.pop(now)) is not None:
        found.append(item)
    return found


def test_keys_take_turns_and_each_keeps_its_order():
    queue = FairQueue()
    items = [Item("a") for _ in range(5)] + [Item("b") for _ in range(2)] + [Item("c")]
    for item in items:
        queue.push(item, 0.0)
    found = drain(queue)
    assert "".join(item.key for item in found) == "abcabaaa"
    assert [item for item in found if item.key == "a"] == items[:5]
    assert len(queue) == queue.size() == 0


def test_a_key_that_sends_one_dear_call_at_a_time_pays_for_it():
    queue = FairQueue()
    for _ in range(300):
        queue.push(Item("small"), 0.0)
    queue.push(Item("dear", rows=100), 0.0)
    order = []
    for _ in range(300):
        item = queue.pop(0.0)
        order.append(item.key)
        if item.key == "dear":
            queue.push(Item("dear", rows=100), 0.0)  # at once again, when its queue had become empty
    assert order.count("dear") == 3


def test_aborted_calls_are_skipped_and_swept_out():
    queue = FairQueue()
    kept = []
    for turn in range(2000):
        item = Item(f"k{turn % 3}", priority=turn % 3)
        queue.push(item, 0.0)
        if turn % 100 == 0:
            kept.append(item)
            continue
        item.done = True
        queue.forget(item)
    assert len(queue) == len(kept) == len(list(queue))
    assert queue.size() < 400
    assert sorted(map(id, drain(queue))) == sorted(map(id, kept))


def test_the_breaker_opens_for_ever_longer():
    breaker = Breaker()
    for _ in range(THRESHOLD - 1):
        assert not breaker.failed(0.0)
    breaker.succeeded()
    assert not any(breaker.failed(0.0) for _ in range(THRESHOLD - 1)), "failures in a row count, not all"
    assert breaker.failed(10.0)
    pauses = []
    now = 10.0
    for _ in range(9):
        pauses.append(breaker.until - now)
        assert not breaker.look(breaker.until - 0.001)
        now = breaker.until
        assert breaker.look(now)
        assert breaker.failed(now), "the trial failed"
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert pauses[-1] == 30.0
    assert breaker.look(1e6)
    breaker.succeeded()
    assert (breaker.open, breaker.trial, breaker.failures) == (False, False, 0)


class Free:
    """A replica with no call aboard."""

    window = 100.0

    def __init__(self):
        self.breaker = Breaker()

    def load(self):
        return 0


def test_a_replica_on_trial_gets_one_call_of_many():
    lane = Lane(Route("p", "toy", "toy:1", Signature(inputs=[], outputs=[]), "custom", limits=Limits()))
    sound, tried = lane.peers = [Free(), Free()]
    tried.breaker.trial = True
    assert dict(lane.share(50)) == {sound: 49, tried: 1}
    lane.peers = [tried]
    assert lane.share(1) == [(tried, 1)]
    assert lane.share(2) is None


def who(role):
    return Principal("k", "k", "p", role, frozenset())


def test_hints_raise_a_call_for_administrators_only():
    call = Item("a").call
    for role, word, priority in [
        ("admin", "high", 0),
        ("developer", "high", 1),
        ("developer", "low", 2),
        ("admin", "low", 2),
    ]:
        hint(call, who(role), word, None)
        assert call.priority == priority
    hint(call, who("developer"), None, "session-1")
    assert call.sticky == "p/session-1"
    with pytest.raises(InvalidInput, match="high or normal or low"):
        hint(call, who("admin"), "urgent", None)
    with pytest.raises(InvalidInput):
        hint(call, who("admin"), None, "x" * 300)


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        ({}, Limits(queue=99)),
        ({"limits": {"concurrency": 4, "queue": 7}}, Limits(queue=7, concurrency=4)),
        ({"hedge_ms": 50, "batching": {"wait_ms": 5}}, Limits(queue=99, hedge_seconds=0.05, wait_seconds=0.005)),
        ({"batching": "auto"}, Limits(queue=99, in_flight=2048)),
    ],
)
def test_a_deployments_spec_sets_its_limits(spec, limits):
    kept = DeploymentSpec.model_validate({"model": "iris", **spec}).model_dump(mode="json")
    deployment = Deployment(
        project_id="p", name="iris", spec=kept, model_version="iris:1", model_version_id="m", digest="d", task="t",
        signature=Signature(inputs=[], outputs=[]),
    )  # fmt: skip
    assert limits_of(deployment, Limits(queue=99)) == limits


@pytest.mark.parametrize(
    ("task", "form", "engine", "platform"),
    [
        ("tabular-classification", None, "auto", "onnxruntime_onnx"),
        ("embedding", "safetensors", "auto", "onnxruntime_onnx"),  # exported at import
        ("text-generation", "gguf", "llama", "llama.cpp_gguf"),
        ("text-generation", "gguf", "transformers", "llama.cpp_gguf"),  # which no replica of it can run by
        ("text-generation", "safetensors", "transformers", "transformers_safetensors"),
    ],
)
def test_the_platform_is_what_runs_the_model(task, form, engine, platform):
    nothing = Signature(inputs=[], outputs=[])
    lineage = {"format": form} if form else {}
    model = ModelVersion(
        project_id="p", name="m", version=1, digest="d", task=task, signature=nothing, size=1, lineage=lineage
    )
    spec = DeploymentSpec(model="m", engine=engine).model_dump(mode="json")
    deployment = Deployment(
        project_id="p", name="m", spec=spec, model_version="m:1", model_version_id=model.id, digest="d", task=task,
        signature=nothing,
    )  # fmt: skip
    assert platform_of(deployment, model) == platform
