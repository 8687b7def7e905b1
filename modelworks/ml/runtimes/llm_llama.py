"""Text generation by llama.cpp (xllamacpp): calls join and leave its running batch, each in a slot of the cache."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from modelworks.core.errors import InvalidInput, MissingExtra, ModelworksError
from modelworks.core.generation import TEXT_GENERATION, Sampling, check_messages, read_sampling
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.core.types import Signature
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_template import CHATML, ChatTemplate

MODEL_FILE = "model.gguf"
CHAT_FILE = "chat.json"  # {"template", "bos", "eos"}: the chat template as data
MAX_SLOTS = 8
CONTEXT = 2048  # tokens of one slot, or fewer when the model was trained on fewer
_STEP_TOKENS = 128  # of a prompt that are read at a time: an abort waits for no more
_SEEDS = 2**31

log = logger("llama")
Step = tuple[Hashable, "list[Tensor] | ModelworksError | None", bool]


class Generation:
    """One call aboard."""

    __slots__ = ("gone", "id", "messages", "prompt_tokens", "sampling", "stream", "texts")

    def __init__(self, id: Hashable, messages: list[dict[str, str]], sampling: Sampling, stream: bool) -> None:
        self.id = id
        self.messages = messages
        self.sampling = sampling
        self.stream = stream
        self.texts: list[str] = []  # held back when the answer is wanted whole
        self.prompt_tokens = 0
        self.gone = False


class LlamaRuntime:
    """`admit` and `abort` never wait; `step` waits for what the engine's own thread has made. `slots` run at a time."""

    def __init__(self) -> None:
        self.slots = 1
        self._events: SimpleQueue[Step] = SimpleQueue()
        self._aboard: dict[Hashable, Generation] = {}
        self._server: Any = None

    def load(self, package: Package, threads: int, *, slots: int = MAX_SLOTS, context: int | None = None) -> Signature:
        """`context`: tokens a slot. The engine listens on a socket that is removed at once: only this object calls it."""
        try:
            import xllamacpp
        except ImportError:
            raise MissingExtra("language models need llama.cpp; pip install 'modelworks[llm]'") from None
        self.slots = max(1, min(slots, MAX_SLOTS))
        chat = json.loads(package.path(CHAT_FILE).read_bytes())
        self._template = ChatTemplate(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
        trained = int(chat.get("context_length") or CONTEXT)
        folder = Path(tempfile.mkdtemp(prefix="mw-"))  # 0700
        try:
            params = _engine_params(xllamacpp, package.path(MODEL_FILE), folder, threads)
            params.n_parallel = self.slots
            params.n_ctx = self.slots * min(context or CONTEXT, trained)
            self._server = xllamacpp.Server(params)
        except (RuntimeError, ValueError) as error:
            self._template.close()
            raise InvalidInput(f"llama.cpp cannot load this model: {error}", code="bad_model") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._pool = ThreadPoolExecutor(self.slots, thread_name_prefix="slot")
        return TEXT_GENERATION

    def admit(self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool) -> None:
        """Begin a call. InvalidInput when its messages or parameters are not sound; then it was not admitted."""
        call = Generation(call_id, _messages(inputs), read_sampling(params), stream)
        self._aboard[call_id] = call
        self._pool.submit(self._generate, call)

    def step(self, timeout: float) -> list[Step]:
        """What has come since the last step, waiting up to `timeout` seconds for the first: (call id, part, done).

        A part is the outputs of the signature, an error, or None when an aborted call has left its slot.
        """
        steps: list[Step] = []
        try:
            steps.append(self._events.get(timeout=timeout))
            while True:
                steps.append(self._events.get_nowait())
        except Empty:
            return steps

    def abort(self, call_id: Hashable) -> None:
        """The call leaves its slot at the engine's next step; `step` tells when it has."""
        call = self._aboard.get(call_id)
        if call is not None:
            call.gone = True

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._aboard)

    def close(self) -> None:
        for call in list(self._aboard.values()):
            call.gone = True
        if self._server is not None:
            self._pool.shutdown(wait=True)
            self._server = None  # ends the engine's thread
            self._template.close()

    # a call's own thread, which holds no lock while the engine works

    def _generate(self, call: Generation) -> None:
        end: list[Tensor] | ModelworksError | None = None
        try:
            if not call.gone:
                prompt = self._template.render(call.messages)
                ends: list[list[Tensor] | ModelworksError] = []
                self._server.handle_completions(
                    _request(prompt, call.sampling), lambda chunk: self._take(call, chunk, ends)
                )
                end = ends[0] if ends else None
                if end is None and not call.gone:
                    end = ModelworksError("the engine ended the call without an answer; try again", code="model_error")
        except ModelworksError as error:
            end = error
        except Exception as error:  # a plug's edge: what the engine throws belongs to the call
            log.error("engine_failed", exc_info=error)
            end = ModelworksError(
                "the model failed on this input; the deployment's log has the cause", code="model_error"
            )
        self._aboard.pop(call.id, None)
        self._events.put((call.id, None if call.gone else end, True))

    def _take(self, call: Generation, chunk: dict[str, Any], ends: list[list[Tensor] | ModelworksError]) -> bool:
        """One chunk of llama.cpp's stream; True stops the generation."""
        if call.gone:
            return True
        if "error" in chunk:
            ends.append(_refusal(chunk["error"]))
            return True
        choice = chunk["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
        if reason is not None:
            usage = chunk["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            call.texts.append(text)
            ends.append(_part("".join(call.texts), reason, usage["prompt_tokens"], usage["completion_tokens"], cached))
            return False  # llama.cpp releases the slot by itself
        if progress := chunk.get("prompt_progress"):
            call.prompt_tokens = progress["total"]
        elif call.stream:
            made = chunk["timings"]["predicted_n"]
            cached = chunk["timings"]["cache_n"]
            self._events.put((call.id, _part(text, "", call.prompt_tokens, made, cached), False))
        else:
            call.texts.append(text)
        return False


def _engine_params(xllamacpp: Any, model: Path, folder: Path, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads
        cpu.poll = 0  # waiting threads sleep: spinning ones starve the other processes of a small machine
    params.kv_unified = False
    params.n_batch = params.n_ubatch = _STEP_TOKENS
    params.fit_params = False
    params.cache_ram_mib = 0
    params.use_jinja = False  # templates are rendered in the sandbox, never by the engine
    params.enable_chat_template = False
    params.chat_template = "chatml"
    # the engine insists on a listener: one that nobody can reach
    params.hostnames = [str(folder / "engine.sock")]
    params.api_keys = [secrets.token_hex(32)]
    params.n_threads_http = 1
    params.ui = params.endpoint_slots = params.endpoint_metrics = False
    params.verbosity = 1 if os.isatty(2) else 0
    return params


def _request(prompt: str, sampling: Sampling) -> dict[str, Any]:
    request: dict[str, Any] = {
        "prompt": prompt,
        "stream": True,
        "return_progress": True,  # a chunk for each piece of the prompt, so that a call can leave meanwhile
        "timings_per_token": True,  # the exact count of tokens in each chunk
        "n_predict": sampling.max_tokens if sampling.max_tokens is not None else -1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": sampling.stop,
    }
    if sampling.seed is not None:
        request["seed"] = sampling.seed % _SEEDS
    return request


def _messages(inputs: list[Tensor]) -> list[dict[str, str]]:
    if len(inputs) != 1 or inputs[0].name != "messages" or inputs[0].datatype != "BYTES":
        raise InvalidInput("the one input is messages, BYTES of shape [1]: a JSON list of messages", param="messages")
    values = unpack_bytes(inputs[0].data, "messages")
    if len(values) != 1:
        raise InvalidInput(f"messages has {len(values)} elements; one conversation a call", param="messages")
    try:
        found = json.loads(values[0])
    except (ValueError, RecursionError):
        raise InvalidInput("messages must be a JSON list of messages", param="messages") from None
    return check_messages(found)


def _part(text: str, reason: str, prompt: int, made: int, cached: int) -> list[Tensor]:
    return [
        Tensor("text", "BYTES", [1], pack_bytes([text])),
        Tensor("finish_reason", "BYTES", [1], pack_bytes([reason])),
        Tensor("usage", "INT32", [3], struct.pack("<3i", prompt, made, cached)),
    ]


def _refusal(error: dict[str, Any]) -> ModelworksError:
    """llama.cpp's own error as ours, without what it says of files or addresses."""
    if error.get("type") == "exceed_context_size_error":
        asked, most = error.get("n_prompt_tokens"), error.get("n_ctx")
        return InvalidInput(
            f"the messages have {asked} tokens, and the model's context here holds {most}; shorten them",
            code="context_length_exceeded",
            param="messages",
            detail={"prompt_tokens": asked, "context": most},
        )
    if int(error.get("code") or 500) == 400:
        return InvalidInput(f"the engine refuses this call: {str(error.get('message'))[:300]}")
    log.error("engine_error", reason=str(error)[:500])
    return ModelworksError("the model failed on this input; the deployment's log has the cause", code="model_error")
