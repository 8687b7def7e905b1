"""A language model small enough to be made in a test, and what asks an engine for text. Not a test module."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.ml.package import Manifest, Package
from modelworks.ml.runtimes.llm_transformers import TransformersRuntime

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
WORDS = ["the capital of France is Paris", "a ship and its crew at sea, far away", '{"city": "Paris", "big": true}', "你好 😀"]


def make_llama(folder: Path) -> Any:
    """Write a Llama of two layers with a byte-level tokenizer of 400 tokens to `folder`, as a hub has it; returns the model."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(5)
    model = LlamaForCausalLM(config_of(tokenizer)).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    return model


def config_of(tokenizer: Any) -> Any:
    """A Llama of two layers with this tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip


@contextmanager
def loaded(imported: tuple[Manifest, dict[str, Path]]) -> Iterator[TransformersRuntime]:
    """The engine with this model in it."""
    runtime = TransformersRuntime()
    runtime.load(packaged(imported), 1, slots=8)
    yield runtime
    runtime.close()


def packaged(imported: tuple[Manifest, dict[str, Path]]) -> Package:
    manifest, files = imported
    return Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__)


def make_tokenizer(folder: Path, *more: str) -> Any:
    """Write tokenizer.json to `folder`: byte-level, 400 tokens at most, the first of which are <end> and `more`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", *more]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


class Made:
    def __init__(self) -> None:
        self.text, self.reason, self.usage, self.parts = "", "", [0, 0, 0], 0
        self.logprobs: list[dict[str, Any]] = []
        self.error: Any = None

    @property
    def ids(self) -> list[int]:
        return [one["id"] for one in self.logprobs]


def run(runtime: Any, *calls: tuple[Tensor, dict[str, Any]], abort: int | None = None) -> list[Made]:
    """All together, as streams; `abort`: the call that leaves after its third part."""
    made = [Made() for _ in calls]
    for number, (prompt, params) in enumerate(calls):
        runtime.admit(number, [prompt], {"temperature": 0, **params}, True)
    while len(runtime):
        for number, item, _ in runtime.step(30.0):
            one = made[number]
            if isinstance(item, list):
                one.text += unpack_bytes(item[0].data)[0].decode()
                one.reason = unpack_bytes(item[1].data)[0].decode()
                one.usage = memoryview(item[2].data).cast("i").tolist()
                one.parts += 1
                one.logprobs += json.loads(unpack_bytes(item[3].data)[0]) if len(item) > 3 else []
            else:
                one.error = item
            if number == abort and one.parts == 3:
                runtime.abort(number)
    return made


def prompt(text: str) -> Tensor:
    return Tensor("prompt", "BYTES", [1], pack_bytes([text]))


def tokens(*ids: int) -> Tensor:
    return Tensor("tokens", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids))
