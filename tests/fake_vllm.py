"""A stand-in for vLLM, which installs on no machine of the tests: modules, names and signatures as its v1 engine has them
(AsyncLLM.from_engine_args, generate, add_lora, shutdown; SamplingParams, DELTA outputs). It proves how our runtime drives
that interface, and nothing of vLLM itself. It counts on from a prompt's last token. Not a test module.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.machinery
import json
import sys
from collections.abc import AsyncGenerator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest


class VLLMValidationError(ValueError):
    pass


class EngineDeadError(Exception):
    pass


@dataclasses.dataclass
class AsyncEngineArgs:
    model: str
    load_format: str = "auto"
    trust_remote_code: bool = False
    generation_config: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    tensor_parallel_size: int = 1
    disable_log_stats: bool = False
    enable_log_requests: bool = False
    enable_lora: bool = False
    max_loras: int = 1
    max_cpu_loras: int | None = None
    max_lora_rank: int = 16


@dataclasses.dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass
class StructuredOutputsParams:
    json: str | dict[str, Any] | None = None


@dataclasses.dataclass
class SamplingParams:
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None


class AsyncLLM:
    """`made`: the engines so far. `asked`: the arguments of each request; `aborted`: those that were left early."""

    made: ClassVar[list[AsyncLLM]] = []

    def __init__(self, args: AsyncEngineArgs) -> None:
        self.args = args
        self.size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        self.asked: list[tuple[Any, SamplingParams, str, LoRARequest | None]] = []
        self.aborted: list[str] = []
        self.adapters: list[LoRARequest] = []
        self.stopped = self.dead = False
        AsyncLLM.made.append(self)

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> AsyncLLM:
        if engine_args.tensor_parallel_size > 2:
            raise RuntimeError("World size (4) is larger than the number of available GPUs (2)")
        assert json.loads((Path(engine_args.model) / "tokenizer_config.json").read_text())["eos_token"]
        return cls(engine_args)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        config = json.loads((Path(lora_request.lora_path) / "adapter_config.json").read_text())
        assert {"r", "lora_alpha", "target_modules"} <= config.keys()
        assert config["r"] <= self.args.max_lora_rank
        self.adapters.append(lora_request)
        return True

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, lora_request: LoRARequest | None = None
    ) -> AsyncGenerator[Any, None]:
        self.asked.append((prompt, sampling_params, request_id, lora_request))
        ids, given = prompt["prompt_token_ids"], sampling_params
        if max(ids) >= self.size:
            raise VLLMValidationError(f"Token id {max(ids)} is out of vocabulary")
        assert given.output_kind is RequestOutputKind.DELTA
        step = 1 if lora_request is None else 1 + lora_request.lora_int_id
        finished = False
        try:
            for at in range(1, (given.max_tokens or 16) + 1):
                await asyncio.sleep(0)
                if self.dead:
                    raise EngineDeadError
                id = (ids[-1] + step * at) % self.size
                ended = id in (given.stop_token_ids or ())
                finished = ended or at == given.max_tokens
                measured = None
                if given.prompt_logprobs is not None and at == 1:
                    measured = [None, *({one: SimpleNamespace(logprob=-2.0)} for one in ids[1:])]
                shares = {id: SimpleNamespace(logprob=-0.5), (id + 7) % self.size: SimpleNamespace(logprob=-1.5)}
                made = SimpleNamespace(
                    token_ids=[id], text="", logprobs=[shares] if given.logprobs is not None else None,
                    finish_reason=("stop" if ended else "length") if finished else None,
                )  # fmt: skip
                yield SimpleNamespace(outputs=[made], finished=finished, prompt_logprobs=measured, num_cached_tokens=1)
                if finished:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    @property
    def errored(self) -> bool:
        return self.dead

    def shutdown(self) -> None:
        self.stopped = True


def install(patch: pytest.MonkeyPatch) -> None:
    """As if it were installed, until `patch` is undone."""
    names = {
        "vllm": {},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.sampling_params": {
            one.__name__: one for one in (SamplingParams, RequestOutputKind, StructuredOutputsParams)
        },
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
