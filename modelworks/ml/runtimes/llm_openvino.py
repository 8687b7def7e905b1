"""Text generation by OpenVINO GenAI: continuous batching with a prefix cache, in a process of its own.

The engine's `step` holds its interpreter, for more than a second in a large prefill; so it runs in a child
(openvino_engine.py), and this object, which only passes frames, always answers.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import msgspec

from modelworks.core.errors import InvalidInput, MissingExtra, ModelworksError, Unavailable
from modelworks.core.generation import TEXT_GENERATION, Ask, Logprob, context_exceeded, part, read_ask
from modelworks.core.settings import child_environment
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.ml.gguf import check_exact, read_gguf, token_bytes
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_schema import compile_schema
from modelworks.ml.runtimes.llm_template import CHATML, ChatTemplate, reasoning_prefix

MODEL_FILE = "model.gguf"
CHAT_FILE = "chat.json"
MAX_SLOTS = 256
CONTEXT = 4096  # tokens of one call, or fewer when the model was trained on fewer
CACHE_BYTES = 1024**3  # of keys and values at most, unless one call's context needs more
CACHE_TOKENS = 65_536
_SEEDS = 2**32
_MODULE = "modelworks.ml.runtimes.openvino_engine"

Step = tuple[Hashable, "list[Tensor] | ModelworksError | None", bool]
Whose = tuple[str, int]  # key and priority (0 before 1 before 2) of a call
NOBODY: Whose = ("", 1)


class Order(msgspec.Struct, array_like=True):
    """To the child: begin a call, or (without a prompt) abort it."""

    number: int
    prompt: str | list[int] | None = None
    settings: dict[str, Any] = {}
    stop: list[str] = []
    logprobs: bool = False
    prefix: str = ""
    stream: bool = False
    bos: bool = False
    key: str = ""  # whose call it is
    priority: int = 1


class News(msgspec.Struct, array_like=True):
    """From the child, many in a frame. `error`: (code, message, prompt tokens, context)."""

    number: int
    text: str = ""
    reason: str = ""
    prompt: int = 0
    made: int = 0
    cached: int = 0
    logprobs: list[Logprob] | None = None
    error: tuple[str, str, int, int] | None = None
    done: bool = False
    begun: bool = False  # its prompt is being read from now on, and nothing else


class OpenVinoRuntime:
    """As LlamaRuntime: `admit` and `abort` never wait, `step` waits for what the child has made."""

    fair: ClassVar[bool] = True  # calls wait in here, and their keys have their turns
    lacks: ClassVar[frozenset[str]] = frozenset(
        {"images", "logit_bias", "top_logprobs", "sampled_alternatives", "echo", "adapter"}
    )

    def __init__(self) -> None:
        self.slots = 1
        self.events: SimpleQueue[Step | None] = SimpleQueue()
        self._numbers: dict[Hashable, int] = {}
        self._calls: dict[int, tuple[Hashable, str]] = {}  # by the child's number: the call, and its prompt's input
        self._number = 0
        self._begun: set[int] = set()  # those of them that wait no more
        self._child: subprocess.Popen[bytes] | None = None

    def load(
        self,
        package: Package,
        threads: int,
        *,
        slots: int = MAX_SLOTS,
        context: int | None = None,
        adapters: Mapping[str, Package] | None = None,
    ) -> Signature:
        """InvalidInput for a model that OpenVINO does not read well, and for adapters. `context`: tokens a call."""
        if adapters:
            raise InvalidInput(
                "OpenVINO takes no adapter a call; install llama.cpp beside it: pip install 'modelworks[llm]'",
                param="adapters",
            )
        if not installed():
            raise MissingExtra("this engine needs OpenVINO GenAI; pip install 'modelworks[llm]'")
        self.slots = max(1, min(slots, MAX_SLOTS))
        path = package.path(MODEL_FILE)
        found = read_gguf(path)
        check_exact(found.get("general.file_type"))
        chat = json.loads(package.path(CHAT_FILE).read_bytes())
        self._template = ChatTemplate(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
        self._bos = bool(found.get("tokenizer.ggml.add_bos_token", found.get("tokenizer.ggml.model") == "llama"))
        most = min(context or CONTEXT, int(chat.get("context_length") or CONTEXT))
        cache = max(most, min(CACHE_TOKENS, CACHE_BYTES // (token_bytes(found) or 65_536)))
        self._folder = Path(tempfile.mkdtemp(prefix="mw-"))
        (self._folder / MODEL_FILE).symlink_to(path.resolve())
        self._start(
            {
                "model": str(self._folder / MODEL_FILE),
                "threads": threads,
                "slots": self.slots,
                "context": most,
                "cache": cache,
            }
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        return TEXT_GENERATION

    def _start(self, config: dict[str, Any]) -> None:
        self._socket, theirs = socket.socketpair()
        self._send_lock = threading.Lock()
        with theirs:
            # in this process's group, so that whatever ends the group ends it too
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=child_environment(int(config["threads"])),
            )
        self._write(config)
        first = _frame(self._socket)
        said = msgspec.msgpack.decode(first) if first else "it ended while loading the model"
        if said is not None:
            self.close()
            raise InvalidInput(f"OpenVINO cannot load this model: {said}", code="bad_model")
        threading.Thread(target=self._read, name="engine-news", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Calls aboard that the engine has no room for yet, or whose turn it is not."""
        return len(self._calls) - len(self._begun)

    def admit(
        self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool, whose: Whose = NOBODY
    ) -> None:
        """Begin a call. InvalidInput when its prompt or parameters are not sound; then it was not admitted."""
        self.begin(call_id, read_ask(inputs, params, self.lacks), stream, whose)

    def begin(self, call_id: Hashable, ask: Ask, stream: bool, whose: Whose = NOBODY) -> None:
        """As `admit`, of a call that is read already and asks for nothing that is lacking here."""
        if ask.sampling.schema is not None:
            compile_schema(ask.sampling.schema)  # refuses what cannot be enforced
        self._number += 1
        self._numbers[call_id] = self._number
        self._calls[self._number] = call_id, "messages" if ask.messages is not None else "prompt"
        self._pool.submit(self._order, self._number, ask, stream, whose)

    def step(self, timeout: float) -> list[Step]:
        """What has come since the last step, waiting up to `timeout` seconds for the first; Unavailable without engine."""
        steps: list[Step] = []
        with contextlib.suppress(Empty):
            found = self.events.get(timeout=timeout)
            while True:
                if found is None:
                    raise Unavailable("the model's engine has ended; the deployment's log has the cause")
                steps.append(found)
                found = self.events.get_nowait()
        return steps

    def abort(self, call_id: Hashable) -> None:
        """The call leaves within a step; `step` tells when it has."""
        number = self._numbers.get(call_id)
        if number is not None:
            self._pool.submit(self._write, Order(number))  # behind the order that began it

    def __len__(self) -> int:
        return len(self._calls)

    def close(self) -> None:
        if pool := getattr(self, "_pool", None):
            pool.shutdown(wait=True)
        if self._child is not None:
            self._socket.close()
            self._child.kill()
            self._child.wait()
            self._child = None
        self._template.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _order(self, number: int, ask: Ask, stream: bool, whose: Whose) -> None:
        sampling = ask.sampling
        try:
            prefix = ""
            prompt: str | list[int]
            if ask.messages is not None:
                prompt = self._template.render(ask.messages, sampling.tools)
                prefix = reasoning_prefix(prompt)
            else:
                prompt = ask.prompt if ask.prompt is not None else ask.tokens or []
        except ModelworksError as error:
            self._end(number, error)
            return
        order = Order(number, prompt, _settings(ask), sampling.stop, sampling.logprobs is not None, prefix, stream)
        order.key, order.priority = whose
        order.bos = self._bos and isinstance(prompt, str)
        self._write(order)

    def _write(self, message: Any) -> None:
        data = msgspec.msgpack.encode(message)
        with self._send_lock, contextlib.suppress(OSError):  # the reader tells of a child that is gone
            self._socket.sendall(struct.pack("<I", len(data)) + data)

    def _read(self) -> None:
        decode = msgspec.msgpack.Decoder(list[News]).decode
        while frame := _frame(self._socket):
            for news in decode(frame):
                if news.error is not None:
                    self._end(news.number, self._error(news))
                elif news.done:
                    self._end(news.number, _part(news) if news.reason else None)
                elif news.begun and news.number in self._calls:
                    self._begun.add(news.number)
                elif news.number in self._calls:
                    self.events.put((self._calls[news.number][0], _part(news), False))
        self.events.put(None)

    def _error(self, news: News) -> ModelworksError:
        assert news.error is not None
        code, message, tokens, most = news.error
        where = self._calls.get(news.number, (None, "prompt"))[1]
        if code == "context_length_exceeded":
            return context_exceeded(tokens, most, where)
        return InvalidInput(message, param=where) if code == "invalid" else ModelworksError(message, code=code)

    def _end(self, number: int, end: list[Tensor] | ModelworksError | None) -> None:
        call_id, _ = self._calls.pop(number, (None, ""))
        self._numbers.pop(call_id, None)
        self._begun.discard(number)
        if call_id is not None:
            self.events.put((call_id, end, True))


def installed() -> bool:
    from importlib.util import find_spec

    return find_spec("openvino_genai") is not None


def _settings(ask: Ask) -> dict[str, Any]:
    """The sampling as GenerationConfig has it; `max_new_tokens` is bounded by the child, which knows the prompt's size."""
    given = ask.sampling
    found: dict[str, Any] = {"ignore_eos": given.ignore_eos}
    if given.max_tokens is not None:
        found["max_new_tokens"] = given.max_tokens
    if given.temperature > 0:
        found |= {"do_sample": True, "temperature": given.temperature, "top_p": given.top_p}
        if given.top_k:
            found["top_k"] = given.top_k
        if given.min_p:
            found["min_p"] = given.min_p
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(given, name):
            found[name] = getattr(given, name)
    if given.repetition_penalty != 1.0:
        found["repetition_penalty"] = given.repetition_penalty
    if given.seed is not None:
        found["rng_seed"] = given.seed % _SEEDS
    if given.logprobs is not None:
        found["logprobs"] = 1
    if given.schema is not None:
        found["schema"] = json.dumps(given.schema)
    if given.logprobs:
        found["alternatives"] = True
    return found


def _part(news: News) -> list[Tensor]:
    return part(news.text, news.reason, news.prompt, news.made, news.cached, news.logprobs)


def _frame(stream: socket.socket) -> bytes:
    """The next frame; b"" once the other side is gone."""
    head = _exactly(stream, 4)
    return _exactly(stream, struct.unpack("<I", head)[0]) if head else b""


def _exactly(stream: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        try:
            more = stream.recv(min(count - len(data), 1024**2))
        except OSError:
            more = b""
        if not more:
            return b""
        data += more
    return bytes(data)
