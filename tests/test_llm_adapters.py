"""LoRA adapters: each call of a batch has its own, and says what the model would say with the adapter in its weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput, NotFound
from modelworks.ml.build import export_package, import_folder, import_gguf, import_package, sniff
from modelworks.ml.package import Package
from modelworks.ml.runtimes.choice import check_adapter
from modelworks.ml.runtimes.llm_llama import LlamaRuntime
from modelworks.ml.runtimes.llm_openvino import OpenVinoRuntime
from modelworks.ml.runtimes.llm_standby import StandbyRuntime
from modelworks.ml.runtimes.llm_transformers import TransformersRuntime
from tests.tiny_gguf import make_gguf, make_qwen2
from tests.tiny_llama import make_llama, packaged, prompt, run, tokens
from tests.tiny_lora import RANK, draw, merge, save_gguf, save_peft

NEEDED = ("torch", "transformers", "llguidance", "jinja2", "xllamacpp", "gguf", "openvino_genai")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]

ALPHA = 8.0
IDS = [5, 9, 20, 31]


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    import torch

    made = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return made[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return make_llama(folder), folder


class Peft:
    """An engine that carries two adapters, and the models with each in its weights."""

    def __init__(self, model: Any, folder: Path, work: Path) -> None:
        self.models = {"": model}
        self.packages: dict[str, Package] = {}
        for seed, name in enumerate(("pirate", "poet")):
            matrices, more = draw(model, seed), {"use_rslora": True} if name == "poet" else {}
            scale = ALPHA / (RANK**0.5 if more else RANK)
            self.models[name] = merge(model, matrices, scale)
            saved = save_peft(work / name, matrices, ALPHA, **more)
            (work / f"{name}-in").mkdir()
            self.packages[name] = packaged(import_folder(saved, work / f"{name}-in"))
        (work / "base").mkdir()
        self.base = packaged(import_folder(folder, work / "base"))
        self.engine = TransformersRuntime()
        self.engine.load(self.base, 1, slots=8, adapters=self.packages)


@pytest.fixture(scope="module")
def peft(base: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peft]:
    found = Peft(*base, tmp_path_factory.mktemp("peft"))
    yield found
    found.engine.close()


def test_calls_of_one_batch_have_each_their_own_adapter(peft: Peft) -> None:
    said = {name: greedy(model, IDS, 12) for name, model in peft.models.items()}
    assert len({tuple(ids) for ids in said.values()}) == 3
    names = ["pirate", "", "poet", "pirate"]
    plain = {"max_tokens": 12, "logprobs": 0, "ignore_eos": True}
    made = run(peft.engine, *((tokens(*IDS), {**plain, "adapter": name}) for name in names))
    assert [one.ids for one in made] == [said[name] for name in names]
    (alone,) = run(peft.engine, (tokens(*IDS), {**plain, "adapter": "poet"}))
    assert alone.ids == said["poet"]


def test_an_adapter_that_is_not_there_is_named(peft: Peft) -> None:
    with pytest.raises(NotFound) as refused:
        peft.engine.admit(1, [prompt("a")], {"adapter": "cook"}, False)
    assert (refused.value.code, refused.value.param) == ("adapter_not_found", "adapter")
    assert "pirate, poet" in refused.value.message
    assert len(peft.engine) == 0


def test_the_adapters_package_travels(peft: Peft, tmp_path: Path) -> None:
    package = peft.packages["pirate"]
    manifest = package.manifest
    assert (manifest.task, manifest.lineage["rank"], manifest.lineage["base_model"]) == ("lora-adapter", RANK, "tiny/llama")
    export_package(manifest, package._locate, tmp_path / "a.mwpkg")
    (tmp_path / "in").mkdir()
    assert import_package(tmp_path / "a.mwpkg", tmp_path / "in")[0].digest == manifest.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "LORA"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 9}, "rank 9"),
        ({"alpha_pattern": {".*(a+)+$": 4}}, "regular expressions"),
    ],
)
def test_more_than_plain_lora_is_refused(base: tuple[Any, Path], tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = save_peft(tmp_path / "a", draw(base[0], 1), ALPHA, **change)
    (tmp_path / "in").mkdir()
    with pytest.raises(InvalidInput, match=said) as refused:
        import_folder(folder, tmp_path / "in")
    assert refused.value.code == "bad_adapter"


def test_layers_have_their_own_alpha(base: tuple[Any, Path], peft: Peft, tmp_path: Path) -> None:
    matrices = draw(base[0], 7)
    folder = save_peft(tmp_path / "a", matrices, 4.0, alpha_pattern={"v_proj": 12})
    (tmp_path / "in").mkdir()
    adapter = packaged(import_folder(folder, tmp_path / "in"))
    values = {name: pair for name, pair in matrices.items() if name.endswith("v_proj")}
    model = merge(merge(base[0], values, 12 / RANK), {name: matrices[name] for name in matrices.keys() - values.keys()}, 1.0)
    engine = TransformersRuntime()
    engine.load(peft.base, 1, slots=2, adapters={"it": adapter})
    try:
        (made,) = run(engine, (tokens(*IDS), {"max_tokens": 9, "logprobs": 0, "ignore_eos": True, "adapter": "it"}))
    finally:
        engine.close()
    assert made.ids == greedy(model, IDS, 9)


def test_an_adapter_of_another_model_is_refused(base: tuple[Any, Path], peft: Peft, tmp_path: Path) -> None:
    matrices = draw(base[0], 1)
    name, (down, up) = next(iter(matrices.items()))
    for what, wrong in (("wide", {name: (down, up.repeat(2, 1))}), ("lost", {"model.layers.9.mlp.up_proj": (down, up)})):
        folder = save_peft(tmp_path / what, wrong, ALPHA)
        (tmp_path / f"{what}-in").mkdir()
        adapter = packaged(import_folder(folder, tmp_path / f"{what}-in"))
        with pytest.raises(InvalidInput, match="does not fit") as refused:
            TransformersRuntime().load(peft.base, 1, slots=1, adapters={"it": adapter})
        assert refused.value.param == "adapters.it"


def test_llama_takes_gguf_adapters_a_call_and_openvino_hands_them_over(tmp_path: Path) -> None:
    model = make_qwen2(tmp_path / "tiny.gguf")
    matrices = draw(model, 3)
    path = save_gguf(tmp_path / "pirate.gguf", matrices, ALPHA)
    assert sniff(path) == "gguf"
    with pytest.raises(InvalidInput, match="lora-adapter"):
        import_gguf(path, tmp_path, task="text-generation")
    adapter = packaged(import_gguf(path, tmp_path))
    assert (adapter.manifest.task, adapter.manifest.lineage["architecture"]) == ("lora-adapter", "qwen2")
    for work in ("base", "again"):
        (tmp_path / work).mkdir()
    package = packaged(import_gguf(tmp_path / "tiny.gguf", tmp_path / "base"))
    said = {"": greedy(model, IDS, 8), "pirate": greedy(merge(model, matrices, ALPHA / RANK), IDS, 8)}
    assert said[""] != said["pirate"]
    names = ["pirate", "", "pirate"]
    for runtime, used in ((LlamaRuntime(), LlamaRuntime), (StandbyRuntime(), StandbyRuntime)):
        runtime.load(package, 1, slots=4, context=256, adapters={"pirate": adapter})
        try:
            params = {"max_tokens": 8, "logprobs": 0, "ignore_eos": True}
            made = [one for name in names for one in run(runtime, (tokens(*IDS), {**params, "adapter": name}))]  # in one slot
            made += run(runtime, *((tokens(*IDS), {**params, "adapter": name}) for name in names))
            with pytest.raises(NotFound, match="cook"):
                runtime.admit(9, [prompt("a")], {"adapter": "cook"}, False)
        finally:
            runtime.close()
        assert [one.ids for one in made] == [said[name] for name in names] * 2, used

    with pytest.raises(InvalidInput, match="takes no adapter"):
        OpenVinoRuntime().load(package, 1, adapters={"pirate": adapter})
    foreign = {name: (down[:, :-32], up) for name, (down, up) in matrices.items()}
    other = packaged(import_gguf(save_gguf(tmp_path / "other.gguf", foreign, ALPHA), tmp_path / "again"))
    with pytest.raises(InvalidInput, match="adapters"):
        LlamaRuntime().load(package, 1, slots=1, adapters={"other": other})


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_pefts_adapters_are_written_for_gguf_models(tmp_path: Path, architecture: str, kind: str) -> None:
    import torch

    model = make_gguf(tmp_path / "tiny.gguf", architecture)
    dtype = getattr(torch, kind)
    pairs = {name: tuple(one.to(dtype) for one in pair) for name, pair in draw(model, 3).items()}
    saved = save_peft(tmp_path / "pirate", pairs, ALPHA, use_rslora=True)
    for work in ("base", "in"):
        (tmp_path / work).mkdir()
    adapter = packaged(import_folder(saved, tmp_path / "in"))
    package = packaged(import_gguf(tmp_path / "tiny.gguf", tmp_path / "base"))
    matrices = {name: tuple(one.float() for one in pair) for name, pair in pairs.items()}
    said = {"": greedy(model, IDS, 8), "pirate": greedy(merge(model, matrices, ALPHA / RANK**0.5), IDS, 8)}
    assert said[""] != said["pirate"]
    runtime = LlamaRuntime()
    runtime.load(package, 1, slots=2, context=256, adapters={"pirate": adapter})
    try:
        params = {"max_tokens": 8, "logprobs": 0, "ignore_eos": True}
        made = run(runtime, *((tokens(*IDS), {**params, "adapter": name}) for name in said))
    finally:
        runtime.close()
    assert [one.ids for one in made] == list(said.values())


def test_what_fits_no_engine_is_refused_before_it_is_loaded() -> None:
    peft, gguf = {"format": "peft"}, {"format": "gguf-lora", "architecture": "llama"}
    for engine, runtime, adapter, said in (
        ("auto", "llama", peft, "convert_lora_to_gguf"),
        ("auto", "transformers", gguf, "PEFT"),
        ("openvino", "llama", {**gguf, "architecture": "gpt2"}, "llama.cpp"),
        ("auto", "llama", gguf, "trained on"),
    ):
        with pytest.raises(InvalidInput, match=said):
            check_adapter(engine, runtime, "gpt2", adapter, "adapters.it")
    check_adapter("auto", "llama", "llama", gguf, "adapters.it")
    check_adapter("auto", "llama", "llama", peft, "adapters.it")
