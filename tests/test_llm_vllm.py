"""How our runtime drives vLLM. vLLM installs on none of the machines that run this: its part is played by fake_vllm.py, so
what passes here is our side of the interface - what is asked, what becomes of the outputs, aborts and errors - and no more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput, NotFound, Unavailable
from modelworks.ml.build import import_folder
from modelworks.ml.measuring import candidates
from modelworks.ml.package import Package
from modelworks.ml.runtimes import choice
from modelworks.ml.runtimes.llm_vllm import VllmRuntime
from tests import fake_vllm
from tests.tiny_llama import make_llama, packaged, prompt, run, tokens
from tests.tiny_lora import draw, save_peft

NEEDED = ("torch", "transformers", "llguidance", "jinja2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    work = tmp_path_factory.mktemp("vllm")
    (work / "llama").mkdir()
    model = make_llama(work / "llama")
    folders = {"base": work / "llama", "pirate": save_peft(work / "pirate", draw(model, 1), 8.0)}
    for name in folders:
        (work / f"{name}-in").mkdir()
    return {name: packaged(import_folder(folder, work / f"{name}-in")) for name, folder in folders.items()}


@pytest.fixture
def engine(packages: dict[str, Package], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VllmRuntime, Any]]:
    fake_vllm.install(monkeypatch)
    runtime = VllmRuntime()
    runtime.load(packages["base"], 1, slots=8, adapters={"pirate": packages["pirate"]}, tensor_parallel_size=2)
    theirs = fake_vllm.AsyncLLM.made[-1]
    yield runtime, theirs
    runtime.close()
    assert theirs.stopped


def test_what_the_engine_is_started_with(engine: tuple[VllmRuntime, Any]) -> None:
    _, theirs = engine
    args = theirs.args
    assert (args.tensor_parallel_size, args.max_num_seqs, args.max_model_len) == (2, 8, 1024)
    assert (args.enable_lora, args.max_loras, args.max_lora_rank, args.trust_remote_code) == (True, 1, 8, False)
    assert [(one.lora_name, one.lora_int_id) for one in theirs.adapters] == [("pirate", 1)]


def test_calls_run_together_each_with_its_own_adapter(engine: tuple[VllmRuntime, Any]) -> None:
    runtime, theirs = engine
    plain = {"max_tokens": 5, "logprobs": 1, "ignore_eos": True}
    one, other, cut = run(
        runtime,
        (tokens(5, 9), plain),
        (tokens(5, 9), {**plain, "adapter": "pirate", "seed": 3, "logit_bias": {"7": -1}, "min_p": 0.1}),
        (tokens(8), {"max_tokens": 900, "ignore_eos": True}),
        abort=2,
    )
    assert (one.ids, other.ids) == ([10, 11, 12, 13, 14], [11, 13, 15, 17, 19])
    assert (one.reason, one.usage, one.parts) == ("length", [2, 5, 1], 5)
    assert one.logprobs[0]["top_logprobs"][0]["logprob"] == one.logprobs[0]["logprob"] == -0.5
    assert (cut.error, len(theirs.aborted)) == (None, 1)
    assert cut.parts < 900
    by_adapter = {asked[3].lora_name if asked[3] else "": asked[1] for asked in theirs.asked}
    given = by_adapter["pirate"]
    assert (given.seed, given.logit_bias, given.min_p, given.temperature, given.stop_token_ids) == (3, {7: -1.0}, 0.1, 0.0, [])


def test_ends_stops_schemas_and_measured_prompts(engine: tuple[VllmRuntime, Any]) -> None:
    runtime, theirs = engine
    (ended,) = run(runtime, (tokens(theirs.size - 4), {"max_tokens": 50}))  # it counts up to the end, which is 0
    assert (ended.reason, ended.usage[1]) == ("stop", 4)
    assert theirs.asked[-1][1].stop_token_ids == [0]
    (whole,) = run(runtime, (tokens(40), {"max_tokens": 20, "ignore_eos": True}))
    (stopped,) = run(runtime, (tokens(40), {"max_tokens": 20, "ignore_eos": True, "stop": [whole.text[4:6]]}))
    assert (stopped.text, stopped.reason) == (whole.text[:4], "stop")
    assert theirs.aborted  # the engine does not go on for nobody
    (measured,) = run(runtime, (prompt("a ship"), {"max_tokens": 0, "echo": True, "logprobs": 0}))
    assert (measured.text, measured.reason, measured.usage[1]) == ("a ship", "length", 0)
    assert [one["logprob"] for one in measured.logprobs] == [None] + [-2.0] * (measured.usage[0] - 1)
    run(runtime, (prompt("a"), {"max_tokens": 1, "schema": {"type": "object"}}))
    assert theirs.asked[-1][1].structured_outputs.json == {"type": "object"}


def test_refusals_are_the_callers_and_a_dead_engine_ends_the_replica(engine: tuple[VllmRuntime, Any]) -> None:
    runtime, theirs = engine
    beyond, long, good = run(runtime, (tokens(9, 900), {}), (tokens(*[3] * 1024), {}), (tokens(3), {"max_tokens": 1}))
    assert (beyond.error.status, long.error.code, good.reason) == (400, "context_length_exceeded", "length")
    with pytest.raises(NotFound, match="pirate"):
        runtime.admit(9, [prompt("a")], {"adapter": "cook"}, False)
    theirs.dead = True
    with pytest.raises(Unavailable):
        runtime.step(0.0)


def test_an_engine_that_does_not_start_says_why(packages: dict[str, Package], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    with pytest.raises(InvalidInput, match="number of available GPUs"):
        VllmRuntime().load(packages["base"], 1, tensor_parallel_size=4)


def test_vllm_is_chosen_where_it_is_installed_and_there_is_a_gpu(
    packages: dict[str, Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_for = ("transformers", "llama", {})
    with pytest.raises(InvalidInput, match=r"pip install 'modelworks\[vllm\]'") as refused:
        choice.choose("vllm", *made_for)
    assert refused.value.param == "engine"
    assert choice.choose("auto", *made_for) == "transformers"
    fake_vllm.install(monkeypatch)
    assert choice.choose("vllm", *made_for) == "vllm"
    for gpus, found in ((False, "transformers"), (True, "vllm")):
        monkeypatch.setattr(choice, "_gpus", lambda gpus=gpus: gpus)
        assert choice.choose("auto", *made_for) == found
    assert candidates(packages["base"]) == ["transformers", "vllm"]
    with pytest.raises(InvalidInput, match="safetensors"):
        choice.choose("vllm", "llama", "llama", {})
