"""Text generation by vLLM: safetensors on GPUs, by its AsyncLLM, whose engine core is a process of its own.

Prompts go in as token ids and tokens come out; chat template, text, stop texts and log probabilities are ours, so that
answers read as those of the transformers engine do. Written against vLLM 0.20 and newer (v1 engine, structured outputs).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from modelworks.core.errors import InvalidInput, ModelworksError, Unavailable
from modelworks.core.generation import (
    TEXT_GENERATION,
    Ask,
    Logprob,
    check_adapter,
    context_exceeded,
    part,
    read_ask,
)
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.ml.adapter_import import WEIGHTS_FILE, read_scales
from modelworks.ml.folder import ADAPTER_CONFIG
from modelworks.ml.package import Package
from modelworks.ml.runtimes.choice import check_vllm
from modelworks.ml.runtimes.llm_sampling import Vocabulary
from modelworks.ml.runtimes.llm_schema import compile_schema
from modelworks.ml.runtimes.llm_template import CHATML, ChatTemplate, reasoning_prefix
from modelworks.ml.runtimes.llm_text import Text

CHAT_FILE = "chat.json"  # as the transformers engine has it
TOKENIZER_FILE = "tokenizer.json"
MAX_SLOTS = 1024
CONTEXT = 8192  # tokens of one call, or fewer when the model was trained on fewer
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
_TOGETHER = 8  # adapters in one batch; more take turns
_LEAST = -9999.0  # in place of minus infinity, which JSON does not have

log = logger("vllm")
Step = tuple[Hashable, "list[Tensor] | ModelworksError | None", bool]


class Run:
    """One call aboard. `texts` and `logprobs` are held back when the answer is wanted whole."""

    def __init__(self, id: Hashable, ask: Ask, stream: bool) -> None:
        self.id = id
        self.ask = ask
        self.stream = stream
        self.task: asyncio.Task[None] | None = None
        self.ids: list[int] = []
        self.text = Text(ask.sampling.stop)
        self.logprobs: list[Logprob] = []
        self.decode: Any = None
        self.made = self.cached = 0
        self.end: list[Tensor] | ModelworksError | None = None

    def part(self, reason: str) -> list[Tensor]:
        text = self.text.ready(all=bool(reason))
        logprobs, self.logprobs = self.logprobs, []
        asked = logprobs if self.ask.sampling.logprobs is not None else None
        return part(text, reason, len(self.ids), self.made, self.cached, asked)


class VllmRuntime:
    """`admit` and `abort` never wait; `step` waits for what the engine's own thread has made."""

    lacks: frozenset[str] = frozenset({"images"})

    def __init__(self) -> None:
        self.slots = 1
        self._events: SimpleQueue[Step] = SimpleQueue()
        self._aboard: dict[Hashable, Run] = {}
        self._number = 0
        self._engine: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)

    def load(
        self,
        package: Package,
        threads: int,
        *,
        slots: int = MAX_SLOTS,
        context: int | None = None,
        adapters: Mapping[str, Package] | None = None,
        tensor_parallel_size: int = 1,
    ) -> Signature:
        """InvalidInput for a model or adapters that vLLM does not load, and where it is not installed.

        `context`: tokens a call. `tensor_parallel_size`: GPUs over which the model is split.
        """
        check_vllm()
        self.slots = max(1, min(slots, MAX_SLOTS))
        self._folder = Path(tempfile.mkdtemp(prefix="mw-"))
        try:
            model = _link(package, self._folder / "model")
            chat = json.loads((model / CHAT_FILE).read_bytes())
            _write_settings(model, chat)
            config = json.loads((model / "config.json").read_bytes())
            self._vocabulary = Vocabulary(model / TOKENIZER_FILE, chat["ends"], int(config.get("vocab_size") or 2**31))
            if not self._vocabulary.ends:
                self.lacks |= {"schema"}  # a grammar ends with an end token
            self._template = ChatTemplate(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
            self._context = min(context or CONTEXT, int(chat.get("context_length") or CONTEXT))
            self._adapters = self._requests(adapters or {})
            self._thread.start()
            self._engine = self._started(model, adapters or {}, tensor_parallel_size)
        except BaseException:
            self.close()
            raise
        return TEXT_GENERATION

    def _requests(self, adapters: Mapping[str, Package]) -> dict[str, Any]:
        from vllm.lora.request import LoRARequest

        folders = {name: _link(one, self._folder / f"adapter-{at}") for at, (name, one) in enumerate(adapters.items())}
        return {
            name: LoRARequest(lora_name=name, lora_int_id=at, lora_path=str(folder))
            for at, (name, folder) in enumerate(folders.items(), 1)
        }

    def _started(self, model: Path, adapters: Mapping[str, Package], tensor_parallel_size: int) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        lora: dict[str, Any] = {}
        if adapters:
            lora = {"enable_lora": True, "max_loras": min(len(adapters), _TOGETHER), "max_cpu_loras": len(adapters)}
            lora["max_lora_rank"] = _rank(adapters)
        settings = AsyncEngineArgs(
            model=str(model),
            load_format="safetensors",
            trust_remote_code=False,
            generation_config="vllm",  # our defaults, not the folder's
            max_model_len=self._context,
            max_num_seqs=self.slots,
            tensor_parallel_size=tensor_parallel_size,
            disable_log_stats=True,
            enable_log_requests=False,
            **lora,
        )

        async def start() -> Any:
            with _shielded():
                self._engine = engine = AsyncLLM.from_engine_args(settings)
            for request in self._adapters.values():
                await engine.add_lora(request)
            return engine

        try:
            return asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        except Exception as error:  # whatever its many parts raise on what they cannot do
            said = " ".join(f"{error}".split())[:300]
            raise InvalidInput(f"vLLM cannot load this model: {said}", code="bad_model") from None

    def admit(self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool) -> None:
        """Begin a call. InvalidInput when its prompt or parameters are not sound; then it was not admitted."""
        ask = read_ask(inputs, params, self.lacks)
        check_adapter(ask, self._adapters)
        if ask.sampling.schema is not None:
            compile_schema(ask.sampling.schema)  # refuses what cannot be enforced
        call = self._aboard[call_id] = Run(call_id, ask, stream)
        self._number += 1
        self._loop.call_soon_threadsafe(self._begin, call, str(self._number))

    def step(self, timeout: float) -> list[Step]:
        """What has come since the last step, waiting up to `timeout` seconds for the first; Unavailable without engine."""
        if self._engine.errored:
            raise _ended()
        steps: list[Step] = []
        with contextlib.suppress(Empty):
            found = self._events.get(timeout=timeout)
            while True:
                steps.append(found)
                if found[2]:
                    self._aboard.pop(found[0], None)
                found = self._events.get_nowait()
        return steps

    def abort(self, call_id: Hashable) -> None:
        """The call leaves the engine's batch at its next step; `step` tells when it has."""
        call = self._aboard.get(call_id)
        if call is not None:
            self._loop.call_soon_threadsafe(lambda: call.task and call.task.cancel())

    def __len__(self) -> int:
        return len(self._aboard)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)
        if template := getattr(self, "_template", None):
            template.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # the engine's thread

    def _begin(self, call: Run, name: str) -> None:
        call.task = self._loop.create_task(self._answer(call, name))
        call.task.add_done_callback(lambda task: self._finish(call, task))

    def _finish(self, call: Run, task: asyncio.Task[None]) -> None:
        """Also of a call that was cancelled before its task ran."""
        if task.cancelled():
            self._events.put((call.id, None, True))
            return
        if error := task.exception():
            call.end = _failure(error)
        self._events.put((call.id, call.end or _failure(RuntimeError("an answer without an end")), True))

    async def _answer(self, call: Run, name: str) -> None:
        call.ids, prefix = await asyncio.to_thread(self._prompt, call.ask)
        call.text = Text(call.ask.sampling.stop, prefix)
        call.decode = self._vocabulary.stream(call.ids)
        outputs = self._engine.generate(
            {"prompt_token_ids": call.ids},
            self._settings(call.ask, len(call.ids)),
            name,
            lora_request=self._adapters.get(call.ask.sampling.adapter),
        )
        async with contextlib.aclosing(outputs):  # leaving it early aborts the request in the engine
            async for output in outputs:
                reason = self._take(call, output)
                if reason:
                    call.end = call.part(reason)
                    if not output.finished:
                        return
                elif call.stream:
                    self._events.put((call.id, call.part(""), False))

    def _prompt(self, ask: Ask) -> tuple[list[int], str]:
        """The prompt's tokens, and what the answer's text begins with."""
        prefix = ""
        if ask.messages is not None:
            text = self._template.render(ask.messages, ask.sampling.tools)
            prefix, ids = reasoning_prefix(text), self._vocabulary.ids(text, special=False)
        elif ask.prompt is not None:
            ids = self._vocabulary.ids(ask.prompt, special=True)
        else:
            ids = list(ask.tokens or [])
        if max(ids, default=0) >= self._vocabulary.size:
            raise InvalidInput(f"token id {max(ids)} is beyond the vocabulary of {self._vocabulary.size}", param="prompt")
        if not ids or len(ids) >= self._context:
            raise context_exceeded(len(ids), self._context, "messages" if ask.messages is not None else "prompt")
        if ask.sampling.echo:
            prefix = ask.prompt if ask.prompt is not None else self._vocabulary.text(ids)
        return ids, prefix

    def _settings(self, ask: Ask, count: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        given = ask.sampling
        room = self._context - count
        settings: dict[str, Any] = {
            "max_tokens": max(1, room if given.max_tokens is None else min(given.max_tokens, room)),
            "temperature": given.temperature,
            "top_p": given.top_p,
            "top_k": given.top_k,
            "min_p": given.min_p,
            "presence_penalty": given.presence_penalty,
            "frequency_penalty": given.frequency_penalty,
            "repetition_penalty": given.repetition_penalty,
            "seed": given.seed,
            "ignore_eos": given.ignore_eos,
            "stop_token_ids": [] if given.ignore_eos else sorted(self._vocabulary.ends),
            "logprobs": given.logprobs,
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA,
        }
        if given.echo and given.logprobs is not None:
            settings["prompt_logprobs"] = given.logprobs
        if given.logit_bias:
            settings["logit_bias"] = {int(id): bias for id, bias in given.logit_bias.items()}
        if given.schema is not None:
            settings["structured_outputs"] = StructuredOutputsParams(json=given.schema)
        return SamplingParams(**settings)

    def _take(self, call: Run, output: Any) -> str:
        """Add one of the engine's outputs to the call; why the answer has ended, or ""."""
        given = call.ask.sampling
        call.cached = output.num_cached_tokens or call.cached
        if given.echo and given.logprobs is not None and output.prompt_logprobs:
            call.logprobs += [
                self._logprob(id, shares, given.logprobs)
                for id, shares in zip(call.ids, output.prompt_logprobs, strict=True)
            ]
        if given.max_tokens == 0:  # the engine makes one, which nobody asked for
            return "length" if output.finished else ""
        made = output.outputs[0]
        for at, id in enumerate(made.token_ids):
            call.made += 1
            if id in self._vocabulary.ends and not given.ignore_eos:
                return "stop"
            if given.logprobs is not None:
                call.logprobs.append(self._logprob(id, made.logprobs[at], given.logprobs))
            text = call.decode.step(self._vocabulary.tokenizer, id)
            if text and id not in self._vocabulary.silent:
                call.text.take(text)
            if call.text.stopped:
                return "stop"
        if made.finish_reason == "error":
            raise ModelworksError("the model failed on this input; the deployment's log has the cause", code="model_error")
        return "" if not output.finished else "length" if made.finish_reason == "length" else "stop"

    def _logprob(self, id: int, shares: Mapping[int, Any] | None, count: int) -> Logprob:
        """Of a token, with the `count` likeliest. `shares`: id -> vLLM's Logprob; None for a prompt's first token."""

        def one(id: int, value: float | None) -> Logprob:
            data = self._vocabulary.piece(id)
            return Logprob(data.decode("utf-8", "replace"), value, list(data), [], id)

        if shares is None:
            return one(id, None)
        found = one(id, max(shares[id].logprob, _LEAST))
        ordered = sorted(shares.items(), key=lambda pair: -pair[1].logprob)[:count]
        found.top_logprobs = [one(other, max(it.logprob, _LEAST)) for other, it in ordered]
        return found


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """The processes that are started meanwhile get no SIGTERM, which goes to the group: streams are to finish first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ended() -> Unavailable:
    return Unavailable("the model's engine has ended; the deployment's log has the cause")


def _failure(error: BaseException) -> ModelworksError:
    """What a call's end tells; the log has what is none of ours, nor the caller's."""
    if isinstance(error, ModelworksError):
        return error
    if type(error).__name__ == "EngineDeadError":
        return _ended()
    # vLLM's refusals of a request are ValueErrors in some releases, VLLMClientErrors in others
    if isinstance(error, ValueError) or any(kind.__name__ == "VLLMClientError" for kind in type(error).__mro__):
        return InvalidInput(f"the engine refuses this call: {' '.join(str(error).split())[:300]}")
    log.error("model_failed", exc_info=error)
    return ModelworksError("the model failed on this input; the deployment's log has the cause", code="model_error")


def _rank(adapters: Mapping[str, Package]) -> int:
    """The least of vLLM's ranks that holds all adapters."""
    files: Sequence[str] = (ADAPTER_CONFIG, WEIGHTS_FILE)
    most = max(rank for one in adapters.values() for _, rank in read_scales({it: one.path(it) for it in files}).values())
    found = next((rank for rank in _RANKS if rank >= most), None)
    if found is None:
        raise InvalidInput(f"an adapter has rank {most}; vLLM takes at most {_RANKS[-1]}", param="adapters")
    return found


def _link(package: Package, folder: Path) -> Path:
    folder.mkdir()
    for name in package.manifest.files:
        (folder / name).symlink_to(package.path(name).resolve())
    return folder


def _write_settings(folder: Path, chat: dict[str, Any]) -> None:
    """What a tokenizer of transformers is told; vLLM compiles grammars by it."""
    named = {f"{name}_token": chat[name] for name in ("bos", "eos") if chat[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
