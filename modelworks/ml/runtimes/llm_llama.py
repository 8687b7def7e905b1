"""Text generation by llama.cpp (xllamacpp): calls join and leave its running batch, each in a slot of the cache.

The prompt's own log probabilities (echo with logprobs), which llama.cpp does not tell, come from generating the prompt
under a grammar that allows its tokens alone, or where a token ends an answer, under a bias: one step a token.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from modelworks.core.errors import InvalidInput, MissingExtra, ModelworksError
from modelworks.core.generation import (
    TEXT_GENERATION,
    Ask,
    Logprob,
    Sampling,
    check_adapter,
    context_exceeded,
    part,
    read_ask,
)
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.ml.adapter_gguf import write_gguf
from modelworks.ml.adapter_import import GGUF_FILE
from modelworks.ml.gguf import TOKENS, read_gguf
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_schema import compile_schema
from modelworks.ml.runtimes.llm_template import CHATML, ChatTemplate, reasoning_prefix
from modelworks.ml.runtimes.llm_text import MARKS

MODEL_FILE = "model.gguf"
CHAT_FILE = "chat.json"  # {"template", "bos", "eos"}: the chat template as data
MAX_SLOTS = 8
CONTEXT = 2048  # tokens of one slot, or fewer when the model was trained on fewer
_STEP_TOKENS = 128  # of a prompt that are read at a time: an abort waits for no more
_SEEDS = 2**31
_FORCED = 1e9  # a bias that no logit outweighs
_SECONDS = 60.0  # that the engine may take to answer over its socket

log = logger("llama")
Step = tuple[Hashable, "list[Tensor] | ModelworksError | None", bool]


class Generation:
    """One call aboard. `texts` and `logprobs`: held back when the answer is wanted whole."""

    __slots__ = ("ask", "end", "gone", "grammar", "id", "logprobs", "prefix", "prompt_tokens", "stream", "texts")

    def __init__(self, id: Hashable, ask: Ask, grammar: str | None, stream: bool) -> None:
        self.id = id
        self.ask = ask
        self.grammar = grammar
        self.stream = stream
        self.prefix = ""  # what the first text begins with
        self.texts: list[str] = []
        self.logprobs: list[Logprob] = []
        self.prompt_tokens = 0
        self.gone = False
        self.end: list[Tensor] | ModelworksError | None = None

    def part(self, text: str, reason: str, made: int, cached: int) -> list[Tensor]:
        """A part with all that was held back."""
        texts, self.texts = [*self.texts, text], []
        logprobs, self.logprobs = self.logprobs, []
        asked = self.ask.sampling.logprobs is not None
        return part("".join(texts), reason, self.prompt_tokens, made, cached, logprobs if asked else None)


class LlamaRuntime:
    """`admit` and `abort` never wait; `step` waits for what the engine's own thread has made. `slots` run at a time."""

    lacks: ClassVar[frozenset[str]] = frozenset({"images"})  # of core/generation.py's FEATURES

    def __init__(self, events: SimpleQueue[Any] | None = None) -> None:
        """`events`: another runtime's queue, whose `step` then tells of both."""
        self.slots = 1
        self._events: SimpleQueue[Step] = SimpleQueue() if events is None else events
        self._aboard: dict[Hashable, Generation] = {}
        self._server: Any = None
        self._door = -1

    def load(
        self,
        package: Package,
        threads: int,
        *,
        slots: int = MAX_SLOTS,
        context: int | None = None,
        adapters: Mapping[str, Package] | None = None,
    ) -> Signature:
        """`context`: tokens a slot. The engine listens on a socket that is removed at once: only this process reaches it."""
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
            self._context = min(context or CONTEXT, trained)
            params.n_ctx = self.slots * self._context
            self._key = secrets.token_hex(32)
            params.api_keys = [self._key]
            self._adapters = {name: index for index, name in enumerate(adapters or {})}
            model = package.path(MODEL_FILE)
            params.lora_adapters = [
                xllamacpp.CommonAdapterLoraInfo(str(_adapter(one, model, folder / f"{index}.gguf")), 0.0)
                for index, one in enumerate((adapters or {}).values())  # 0: in calls that ask for it only
            ]
            self._server = xllamacpp.Server(params)
            self._door = os.open(folder / "engine.sock", os.O_PATH)  # stays a way to it once the name is gone
        except (RuntimeError, ValueError) as error:
            self._template.close()
            what = "this model with its adapters" if adapters else "this model"
            raise InvalidInput(f"llama.cpp cannot load {what}: {error}", code="bad_model") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._model = package.path(MODEL_FILE)
        self._pool = ThreadPoolExecutor(self.slots, thread_name_prefix="slot")
        return TEXT_GENERATION

    def admit(self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool) -> None:
        """Begin a call. InvalidInput when its messages or parameters are not sound; then it was not admitted."""
        self.begin(call_id, read_ask(inputs, params, self.lacks), stream)

    def begin(self, call_id: Hashable, ask: Ask, stream: bool) -> None:
        """As `admit`, of a call that is read already and asks for nothing that is lacking here."""
        check_adapter(ask, self._adapters)
        schema = ask.sampling.schema
        grammar = compile_schema(schema) if schema is not None else None
        call = Generation(call_id, ask, grammar, stream)
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
            os.close(self._door)
            self._template.close()

    # a call's own thread, which holds no lock while the engine works

    def _generate(self, call: Generation) -> None:
        try:
            if not call.gone:
                self._answer(call)
                if call.end is None and not call.gone:
                    call.end = ModelworksError(
                        "the engine ended the call without an answer; try again", code="model_error"
                    )
        except ModelworksError as error:
            call.end = error
        except Exception as error:  # a plug's edge: what the engine throws belongs to the call
            log.error("engine_failed", exc_info=error)
            call.end = ModelworksError(
                "the model failed on this input; the deployment's log has the cause", code="model_error"
            )
        self._aboard.pop(call.id, None)
        self._events.put((call.id, None if call.gone else call.end, True))

    def _answer(self, call: Generation) -> None:
        ask = call.ask
        prompt: str | list[int]
        if ask.messages is not None:
            prompt = self._template.render(ask.messages, ask.sampling.tools)
            call.prefix = reasoning_prefix(prompt)
        else:
            prompt = ask.prompt if ask.prompt is not None else ask.tokens or []
        if ask.sampling.echo:
            prompt = self._echo(call, prompt)
            if ask.sampling.max_tokens == 0 and not isinstance(call.end, ModelworksError):
                call.end = call.part("", "length", 0, 0)
                return
        if not call.gone and call.end is None:
            request = _request(prompt, ask.sampling, call.grammar) | self._lora(call)
            self._server.handle_completions(request, lambda chunk: self._take(call, chunk))

    def _echo(self, call: Generation, prompt: str | list[int]) -> list[int]:
        """Hold the prompt's text as the answer's beginning, with logprobs the probability of each token but the first."""
        ids = self._ids(prompt) if isinstance(prompt, str) else self._known(prompt)
        self._check_room(len(ids))
        call.prompt_tokens = len(ids)
        count = call.ask.sampling.logprobs
        if count is None:
            call.texts.append(prompt if isinstance(prompt, str) else self._text(ids))
            return ids
        found = [*self._forced(call, [], ids[:1], 1), *self._forced(call, ids[:1], ids[1:], count or 1)]
        if len(found) < len(ids):  # the call has ended, or is gone
            return ids
        first, *rest = found
        call.logprobs.append(Logprob(first.token, None, first.bytes, [], first.id))
        call.logprobs += [_most(one, count) for one in rest]
        text = b"".join(bytes(one.bytes) for one in found).decode("utf-8", "replace")
        call.texts.append(prompt if isinstance(prompt, str) else text)
        return ids

    def _ids(self, text: str) -> list[int]:
        """The text's tokens, as the engine itself takes a prompt."""
        found = self._ask_engine("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        if not found:
            raise InvalidInput("the prompt has no tokens", param="prompt")
        return [int(id) for id in found]

    def _known(self, ids: list[int]) -> list[int]:
        if max(ids) >= len(self._vocabulary):
            raise InvalidInput(f"token id {max(ids)} is beyond the vocabulary of {len(self._vocabulary)}", param="prompt")
        return ids

    def _text(self, ids: list[int]) -> str:
        return str(self._ask_engine("/detokenize", {"tokens": ids})["content"])

    @cached_property
    def _vocabulary(self) -> list[str]:
        return read_gguf(self._model).get(TOKENS) or []

    def _ask_engine(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("engine")
        with socket.socket(socket.AF_UNIX) as connection.sock:
            connection.sock.settimeout(_SECONDS)
            connection.sock.connect(f"/proc/self/fd/{self._door}")
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer

    def _forced(self, call: Generation, before: list[int], ids: list[int], count: int) -> list[Logprob]:
        """What the model thinks of `ids` after `before`; nothing more once the call has ended or is gone.

        A grammar holds no token that ends an answer: it breaks there, and that token is forced by a bias. One whose bytes
        begin a character that its successor ends is held back by the engine, in both: it is looked up among all tokens.
        """
        found: list[Logprob] = []
        while len(found) < len(ids) and not call.gone and call.end is None:
            prompt, left = [*before, *ids[: len(found)]], ids[len(found) :]
            more = self._generate_exactly(call, prompt or left[:1], left, count)
            if not more and call.end is None and not call.gone:
                more = self._generate_exactly(call, prompt or left[:1], left[:1], count, biased=True)
                if not more and call.end is None and not call.gone:
                    more = self._looked_up(call, prompt or left[:1], left[0], count)
                if not more and call.end is None:
                    raise ModelworksError("the engine does not tell what it thinks of this prompt", code="model_error")
            found += more
        return found

    def _looked_up(self, call: Generation, prompt: list[int], id: int, count: int) -> list[Logprob]:
        """Of one token, found in what the engine thinks of all of them when it is made to say a plain one."""
        plain = next((at for at, text in enumerate(self._vocabulary) if text.isascii() and text.isalpha()), id)
        said = self._generate_exactly(call, prompt, [plain], len(self._vocabulary), biased=True)
        return [
            Logprob(own.token, own.logprob, own.bytes, one.top_logprobs[:count], own.id)
            for one in said
            for own in one.top_logprobs
            if own.id == id
        ]

    def _generate_exactly(
        self, call: Generation, prompt: list[int], ids: list[int], count: int, *, biased: bool = False
    ) -> list[Logprob]:
        found: list[Logprob] = []

        def take(chunk: dict[str, Any]) -> bool:
            if "error" in chunk:
                if "grammar stack" not in str(chunk["error"].get("message")):
                    call.end = self._refusal(chunk["error"], call)
                return True
            for one in _logprobs(chunk["choices"][0]):
                if len(found) == len(ids) or one.id != ids[len(found)]:  # one was held back: this is a later one
                    return True
                found.append(self._named(one))
            return call.gone

        sampling = Sampling(max_tokens=len(ids), temperature=0.0, logprobs=count)
        if biased:
            sampling.logit_bias = {str(ids[0]): _FORCED}
        request = _request(prompt, sampling, None if biased else _exactly(ids)) | self._lora(call)
        self._server.handle_completions(request, take)
        return found

    def _lora(self, call: Generation) -> dict[str, Any]:
        """The scale of every adapter: a call that names none would get a cache that was read with another's."""
        asked = call.ask.sampling.adapter
        scales = [{"id": id, "scale": float(name == asked)} for name, id in self._adapters.items()]
        return {"lora": scales} if scales else {}

    def _named(self, one: Logprob) -> Logprob:
        """A special token, of which the engine tells no text, with its text."""
        if one.bytes or one.id is None:
            return one
        text = self._vocabulary[one.id] if one.id < len(self._vocabulary) else ""
        return Logprob(text, one.logprob, list(text.encode()), [self._named(it) for it in one.top_logprobs], one.id)

    def _check_room(self, tokens: int) -> None:
        if tokens >= self._context:
            raise context_exceeded(tokens, self._context, "prompt")

    def _take(self, call: Generation, chunk: dict[str, Any]) -> bool:
        """One chunk of llama.cpp's stream; True stops the generation."""
        if call.gone:
            return True
        if "error" in chunk:
            call.end = self._refusal(chunk["error"], call)
            return True
        choice = chunk["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
        if text and call.prefix:
            text, call.prefix = call.prefix + text, ""
        count = call.ask.sampling.logprobs
        if count is not None:
            call.logprobs += [_most(one, count) for one in _logprobs(choice) if one.bytes]  # not the end's
        if reason is not None:
            usage = chunk["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            call.prompt_tokens = usage["prompt_tokens"]
            call.end = call.part(text, reason, usage["completion_tokens"], cached)
            return False  # llama.cpp releases the slot by itself
        if progress := chunk.get("prompt_progress"):
            call.prompt_tokens = progress["total"]
        elif call.stream:
            timings = chunk["timings"]
            self._events.put((call.id, call.part(text, "", timings["predicted_n"], timings["cache_n"]), False))
        else:
            call.texts.append(text)
        return False

    def _refusal(self, error: dict[str, Any], call: Generation) -> ModelworksError:
        """llama.cpp's own error as ours, without what it says of files or addresses."""
        where = "messages" if call.ask.messages is not None else "prompt"
        if error.get("type") == "exceed_context_size_error":
            return context_exceeded(int(error.get("n_prompt_tokens") or 0), int(error.get("n_ctx") or 0), where)
        if int(error.get("code") or 500) == 400:
            return InvalidInput(f"the engine refuses this call: {str(error.get('message'))[:300]}", param=where)
        log.error("engine_error", reason=str(error)[:500])
        return ModelworksError("the model failed on this input; the deployment's log has the cause", code="model_error")


def _adapter(package: Package, model: Path, aside: Path) -> Path:
    return package.path(GGUF_FILE) if GGUF_FILE in package.manifest.files else write_gguf(package, model, aside)


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
    params.n_threads_http = 1
    params.ui = params.endpoint_slots = params.endpoint_metrics = False
    params.verbosity = 1 if os.isatty(2) else 0
    return params


def _request(prompt: str | list[int], sampling: Sampling, grammar: str | None) -> dict[str, Any]:
    request: dict[str, Any] = {
        "prompt": prompt,
        "stream": True,
        "return_progress": True,  # a chunk for each piece of the prompt, so that a call can leave meanwhile
        "timings_per_token": True,  # the exact count of tokens in each chunk
        "n_predict": sampling.max_tokens if sampling.max_tokens is not None else -1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
        "stop": sampling.stop,
        "ignore_eos": sampling.ignore_eos,
        "preserved_tokens": list(MARKS),
    }
    if sampling.seed is not None:
        request["seed"] = sampling.seed % _SEEDS
    if sampling.logit_bias:
        request["logit_bias"] = sampling.logit_bias
    if sampling.logprobs is not None:
        request["logprobs"] = max(1, sampling.logprobs)
    if grammar is not None:
        request["grammar"] = grammar
    return request


def _exactly(ids: list[int]) -> str:
    """A grammar of one sentence."""
    return "root ::= " + " ".join(f"<[{id}]>" for id in ids)


def _logprobs(choice: dict[str, Any]) -> list[Logprob]:
    found = (choice.get("logprobs") or {}).get("content") or []
    return [_logprob(one, [_logprob(other, []) for other in one.get("top_logprobs", ())]) for one in found]


def _logprob(found: dict[str, Any], others: list[Logprob]) -> Logprob:
    # llama.cpp writes -inf as the smallest float
    return Logprob(found["token"], max(found["logprob"], -9999.0), found["bytes"], others, found["id"])


def _most(one: Logprob, count: int) -> Logprob:
    return (
        one
        if len(one.top_logprobs) <= count
        else Logprob(one.token, one.logprob, one.bytes, one.top_logprobs[:count], one.id)
    )
