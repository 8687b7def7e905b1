"""Safetensors to answers: a small model of random weights, imported, run by the transformers engine, equal to generate()."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.tensors import Tensor
from modelworks.ml.build import export_package, import_folder, import_package
from modelworks.ml.measuring import candidates, measure
from modelworks.ml.package import Manifest
from modelworks.ml.runtimes.choice import choose
from modelworks.ml.runtimes.llm_sampling import Chooser, _nucleus
from modelworks.ml.runtimes.llm_transformers import CHUNK, TransformersRuntime
from tests.tiny_llama import WORDS, loaded, make_llama, packaged, prompt, run, tokens

NEEDED = ("torch", "transformers", "llguidance", "jinja2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, Path]]:
    return import_folder(folder, tmp_path_factory.mktemp("import"))


@pytest.fixture(scope="module")
def engine(imported: tuple[Manifest, dict[str, Path]]) -> Iterator[TransformersRuntime]:
    with loaded(imported) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """transformers' own greedy generation."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(ids: list[int], count: int) -> list[int]:
        made = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        return made[0, len(ids) :].tolist()

    return generate


def test_calls_that_run_together_say_what_generate_says_alone(engine: TransformersRuntime, reference: Any) -> None:
    prompts = [[5, 9, 20], list(range(1, 40)), [7], [3 + at % 90 for at in range(CHUNK + 60)]]
    counts = [12, 30, 4, 9]
    calls = [(tokens(*ids), {"max_tokens": count, "logprobs": 0, "ignore_eos": True})
             for ids, count in zip(prompts, counts, strict=True)]  # fmt: skip
    *made, cut = run(engine, *calls, (tokens(8, 9), {"max_tokens": 500, "ignore_eos": True}), abort=4)
    for ids, count, one in zip(prompts, counts, made, strict=True):
        said = reference(ids, count)
        assert one.ids[: len(said)] == said
        assert (one.usage[:2], one.reason) == ([len(ids), count], "length")
    assert cut.error is None
    assert cut.parts < 50
    assert engine._batch == []


def test_a_prompt_is_measured_as_the_model_itself_does(engine: TransformersRuntime, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    text = WORDS[0]
    (made,) = run(engine, (prompt(text), {"echo": True, "logprobs": 2, "max_tokens": 0}))
    assert (made.text, made.reason, made.logprobs[0]["logprob"]) == (text, "length", None)
    shares = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([made.ids])).logits[0].detach().log_softmax(-1)
    for at, one in enumerate(made.logprobs[1:]):
        assert one["logprob"] == pytest.approx(float(shares[at, one["id"]]), abs=1e-4)
        assert one["top_logprobs"][0]["id"] == int(shares[at].argmax())
    assert "".join(one["token"] for one in made.logprobs) == text


def test_seeds_stops_schemas_and_bias(engine: TransformersRuntime) -> None:
    hot = {"temperature": 1.3, "max_tokens": 8, "top_p": 0.95, "ignore_eos": True}
    schema = {"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"], "additionalProperties": False}
    (alone,) = run(engine, (prompt("a ship"), {**hot, "seed": 3}))
    one, other, held, biased = run(
        engine,
        (prompt("a ship"), {**hot, "seed": 3}),
        (prompt("a ship"), {**hot, "seed": 4}),
        (prompt("{"), {"schema": schema, "max_tokens": 60}),
        (prompt("a"), {"logit_bias": {"70": 100}, "max_tokens": 3, "logprobs": 0}),
    )
    assert one.text == alone.text != other.text  # whatever runs beside it
    assert isinstance(json.loads(held.text)["big"], bool)
    assert biased.ids == [70] * 3
    (whole,) = run(engine, (prompt("a ship"), {"max_tokens": 30, "ignore_eos": True}))
    stop = whole.text[5:8]
    (stopped,) = run(engine, (prompt("a ship"), {"max_tokens": 30, "ignore_eos": True, "stop": [stop]}))
    assert (stopped.text, stopped.reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_a_nucleus_is_the_same_whether_few_tokens_or_all_were_put_in_order() -> None:
    import torch

    for peak, top_p in ((8.0, 0.9), (0.1, 0.5), (0.1, 0.9999), (30.0, 0.1)):
        shares = (torch.randn(3000, generator=torch.Generator().manual_seed(1)) * peak).softmax(-1)
        ordered, places = shares.sort(descending=True)
        wanted = shares.clone()
        wanted[places[ordered.cumsum(-1) - ordered >= top_p]] = 0
        assert torch.equal(_nucleus(shares, top_p), wanted)


def test_one_calls_parameters_do_not_end_the_others(engine: TransformersRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"max_tokens": 3, "ignore_eos": True, "logprobs": 0}
    cold, greedy = run(engine, (prompt("a ship"), {**plain, "temperature": 1e-40}), (prompt("a ship"), plain))
    assert cold.ids == greedy.ids != []
    edge = {**plain, "temperature": 1.1e-5, "repetition_penalty": 1e-40}
    assert run(engine, (prompt("a ship"), edge))[0].reason == "length"

    choose = Chooser.choose

    def failing(chooser: Chooser, logits: Any) -> int:
        if chooser._sampling.seed == sum(chooser._made.values()):
            raise RuntimeError("not this one")
        return choose(chooser, logits)

    monkeypatch.setattr(Chooser, "choose", failing)
    for seed in (0, 1):  # at the prompt's end, and in the batch
        lost, kept = run(engine, (prompt("a ship"), {**plain, "seed": seed}), (prompt("a ship"), plain))
        assert lost.error.code == "model_error"
        assert (kept.ids, kept.reason, engine._batch) == (greedy.ids, "length", [])


@pytest.mark.parametrize("at", ["_forward", "_join"])
def test_a_batch_that_fails_ends_its_calls_and_no_more(
    engine: TransformersRuntime, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    work, left = getattr(TransformersRuntime, at), [1]

    def failing(runtime: TransformersRuntime, rows: Any, *given: Any, **more: Any) -> Any:
        if len(runtime._batch) == 2 and left:
            left.clear()
            raise RuntimeError("out of memory")
        return work(runtime, rows, *given, **more)

    plain = {"max_tokens": 6, "ignore_eos": True}
    (alone,) = run(engine, (prompt("a ship"), plain))
    monkeypatch.setattr(TransformersRuntime, at, failing)
    made = run(engine, *[(prompt("a ship"), plain)] * 3)
    lost = [one for one in made if one.error is not None]
    assert [one.error.code for one in lost] == ["model_error"] * (2 if at == "_forward" else 1)
    assert [one.text for one in made if one.error is None] == [alone.text] * (3 - len(lost))
    assert run(engine, (prompt("a ship"), plain))[0].text == alone.text


def test_a_call_that_leaves_before_its_prompt_is_ready_is_waited_for(
    engine: TransformersRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, row = threading.Event(), TransformersRuntime._row
    monkeypatch.setattr(TransformersRuntime, "_row", lambda *given: ready.wait(30.0) and row(*given))
    engine.admit("slow", [prompt("a ship")], {}, True)
    engine.abort("slow")
    begun = time.monotonic()
    assert engine.step(0.05) == []
    assert time.monotonic() - begun >= 0.05  # it waits, rather than return at once again and again
    ready.set()
    assert engine.step(30.0) == [("slow", None, True)]
    assert len(engine) == 0


def test_folders_that_are_not_sound_are_refused_and_leave_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())

    def refused(name: str, data: str) -> InvalidInput:
        before = (other / name).read_bytes()
        (other / name).write_text(data)
        work = Path(tempfile.mkdtemp(prefix="work"))
        with pytest.raises(InvalidInput) as caught:
            import_folder(other, work)
        (other / name).write_bytes(before)
        return caught.value

    for data in ("[]", "{}", "{", '{"model": {"type": "BPE", "vocab": 7}}'):
        assert refused("tokenizer.json", data).code in ("bad_tokenizer", "bad_model")
    config = json.loads((other / "config.json").read_text())
    assert refused("config.json", json.dumps({**config, "num_attention_heads": 0})).code == "bad_model"
    assert list(tmp_path.glob("mw-*")) == []


def test_a_model_that_no_token_ends_holds_to_no_schema(folder: Path, tmp_path: Path) -> None:
    other, work = tmp_path / "other", tmp_path / "work"
    other.mkdir()
    work.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": 5000}))
    (other / "generation_config.json").unlink()
    (other / "tokenizer_config.json").unlink()
    runtime = TransformersRuntime()
    runtime.load(packaged(import_folder(other, work)), 1, slots=2)
    try:
        with pytest.raises(InvalidInput) as caught:
            runtime.admit(1, [prompt("{")], {"schema": {"type": "object"}}, False)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "response_format")
        assert run(runtime, (prompt("{"), {"max_tokens": 2}))[0].reason == "length"
    finally:
        runtime.close()


def test_what_is_not_sound_is_refused(engine: TransformersRuntime) -> None:
    long, beyond, good = run(engine, (tokens(*[3] * 1024), {}), (tokens(100_000), {}), (prompt("x"), {"max_tokens": 1}))
    assert (long.error.code, long.error.detail) == (
        "context_length_exceeded", {"prompt_tokens": 1024, "context": 1024}
    )  # fmt: skip
    assert "vocabulary" in beyond.error.message
    assert good.reason == "length"
    with pytest.raises(InvalidInput) as refused:
        choose("llama", "transformers", "llama", {})
    assert refused.value.param == "engine"


def test_the_package_travels_and_code_does_not(
    imported: tuple[Manifest, dict[str, Path]], folder: Path, tmp_path: Path
) -> None:
    manifest, files = imported
    assert (manifest.task, manifest.runtime, manifest.lineage["context_length"]) == ("text-generation", "transformers", 1024)
    export_package(manifest, packaged(imported)._locate, tmp_path / "a.mwpkg")
    (tmp_path / "in").mkdir()
    assert import_package(tmp_path / "a.mwpkg", tmp_path / "in")[0].digest == manifest.digest

    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    evil = {**config, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (other / "config.json").write_text(json.dumps(evil))
    (other / "evil.py").write_text("raise SystemExit(9)")
    (tmp_path / "work").mkdir()
    again, files = import_folder(other, tmp_path / "work")
    assert again.digest == manifest.digest
    assert not any(name.endswith(".py") for name in files)
    for change, said in (
        ({"model_type": "own"}, "cannot load"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
    ):
        (other / "config.json").write_text(json.dumps({**evil, **change}))
        work = tmp_path / f"work-{said[:3]}"
        work.mkdir()
        with pytest.raises(InvalidInput, match=said):
            import_folder(other, work)


def test_the_engines_of_a_model_are_measured(
    imported: tuple[Manifest, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    admit, prompts = TransformersRuntime.admit, []

    def noting(runtime: TransformersRuntime, call_id: Any, inputs: list[Tensor], *rest: Any) -> None:
        prompts.append(inputs[0].data)
        admit(runtime, call_id, inputs, *rest)

    monkeypatch.setattr(TransformersRuntime, "admit", noting)
    stages: list[tuple[float, str]] = []
    found = measure(packaged(imported), 1, lambda part, stage: stages.append((part, stage)))
    assert stages == [(0.0, "measuring transformers")]
    assert found["fastest"] == {"one": "transformers", "many": "transformers"}
    figures = found["engines"]["transformers"]
    assert all(figures[who][name] > 0 for who in ("one", "many") for name in ("tokens_per_second", "first_token_ms"))
    assert candidates(packaged(imported)) == ["transformers"]
    assert len(set(prompts)) == len(prompts) == 2 + found["calls"]  # none that the engine has read before

    def failing(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TransformersRuntime, "admit", failing)
    with pytest.raises(InvalidInput, match="transformers: RuntimeError: out of memory"):
        measure(packaged(imported), 1, lambda *_: None)
