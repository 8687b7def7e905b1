"""Log probabilities against an independent computation: the same weights in transformers, in 32 bits."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.tensors import Tensor, unpack_bytes
from modelworks.ml.llm_import import import_gguf
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_llama import LlamaRuntime
from modelworks.ml.runtimes.llm_openvino import OpenVinoRuntime
from tests.tiny_gguf import make_qwen2

NEEDED = ("openvino_genai", "xllamacpp", "gguf", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]
IDS = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 257, 33, 0, 255, 10]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Any]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = make_qwen2(folder / "tiny.gguf")
    manifest, files = import_gguf(folder / "tiny.gguf", folder)
    return Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__), model


def expected(model: Any, ids: list[int]) -> Any:
    """[i, token]: its log probability after ids[: i + 1]."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def ask(runtime: Any, ids: list[int], **params: Any) -> list[dict[str, Any]]:
    runtime.admit(1, [Tensor("tokens", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids))], params, False)
    found: list[dict[str, Any]] = []
    while True:
        for _, part, done in runtime.step(30.0):
            assert isinstance(part, list), part
            outputs = {tensor.name: tensor for tensor in part}
            found += json.loads(unpack_bytes(outputs["logprobs"].data)[0])
            if done:
                return found


def test_a_prompts_log_probabilities_are_those_of_the_weights(made: tuple[Package, Any]) -> None:
    package, model = made
    runtime = LlamaRuntime()
    runtime.load(package, 1, slots=1, context=256)
    try:
        found = ask(runtime, IDS, echo=True, logprobs=3, max_tokens=0, temperature=0)
    finally:
        runtime.close()
    right = expected(model, IDS)
    assert [one["id"] for one in found] == IDS
    assert found[0]["logprob"] is None
    spread = []
    for place, one in enumerate(found[1:]):
        assert one["logprob"] == pytest.approx(float(right[place, one["id"]]), abs=0.02)
        best = right[place].topk(3)
        assert [other["id"] for other in one["top_logprobs"]] == best.indices.tolist()
        assert [other["logprob"] for other in one["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=0.02)
        spread.append(one["logprob"])
    assert max(spread) - min(spread) > 1  # the weights tell tokens apart: a wrong place would be seen


def test_characters_of_several_tokens_are_told_token_by_token(made: tuple[Package, Any]) -> None:
    ids = [*"a ▶─é".encode(), 257, *"学!".encode()]  # each byte is a token; 257 is `th`
    runtime = LlamaRuntime()
    runtime.load(made[0], 1, slots=1, context=256)
    try:
        found = ask(runtime, ids, echo=True, logprobs=1, max_tokens=0, temperature=0)
    finally:
        runtime.close()
    assert [one["id"] for one in found] == ids
    assert [one["bytes"] for one in found] == [[116, 104] if id == 257 else [id] for id in ids]
    right = expected(made[1], ids)
    said = [one["logprob"] for one in found[1:]]
    assert said == pytest.approx([float(right[at, id]) for at, id in enumerate(ids[1:])], abs=0.02)


def test_a_prompt_that_cannot_be_measured_is_refused_with_its_reason(
    made: tuple[Package, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = LlamaRuntime()
    runtime.load(made[0], 1, slots=1, context=256)
    measured = {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}

    def error(*ids: int) -> Any:
        runtime.admit(1, [Tensor("tokens", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids))], measured, False)
        ((_, answer, _),) = runtime.step(30.0)
        return answer

    try:
        beyond = error(72, 100_000)
        assert (beyond.status, beyond.param) == (400, "prompt")
        assert "token id 100000 is beyond the vocabulary" in beyond.message
        monkeypatch.setattr(runtime, "_known", lambda ids: ids)  # as when the engine itself refuses
        assert error(100_000).status == 400
    finally:
        runtime.close()


@pytest.mark.parametrize("kind", [LlamaRuntime, OpenVinoRuntime])
def test_generated_tokens_have_the_log_probabilities_of_the_weights(made: tuple[Package, Any], kind: Any) -> None:
    package, model = made
    runtime = kind()
    runtime.load(package, 1, slots=2, context=256)
    try:
        found = ask(runtime, IDS[:4], logprobs=1, max_tokens=12, temperature=0, ignore_eos=True)
    finally:
        runtime.close()
    ids = [one["id"] for one in found]
    assert len(ids) == 12
    right = expected(model, [*IDS[:4], *ids])
    for place, one in enumerate(found, 3):
        assert one["id"] == int(right[place].argmax())
        assert one["logprob"] == pytest.approx(float(right[place].max()), abs=0.05)
