"""The process in which OpenVINO GenAI runs: python -m modelworks.ml.runtimes.openvino_engine FD, started by llm_openvino.

It reads orders between steps, and writes after each step what all calls have made, in one frame. A call begins when the
cache has room for its prompt and a good part of its answer; whose turn it is, llm_line.py says.

The engine would read prompts to their ends in the order of their coming, so it is given them in pieces, a step's worth at a
time: a piece is a request for one token that nobody reads, after which the prefix cache has what the next one begins with.
"""

from __future__ import annotations

import codecs
import ctypes
import select
import signal
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import msgspec

from modelworks.core.generation import Logprob
from modelworks.ml.runtimes.llm_line import Line
from modelworks.ml.runtimes.llm_openvino import News, Order, _frame
from modelworks.ml.runtimes.llm_text import MARKS, Text

BLOCK = 32  # tokens of one block of the cache, on the CPU
CHUNK = 256  # tokens that one step computes: a long prompt is read in pieces between others' tokens
LEAST = 64  # of them for prompts, however many calls are making tokens
_PIECES = 2**62  # request ids of pieces begin here
RESERVED = 512  # tokens of an answer that room is kept for; beyond, the engine may have to set a call back
_ENDS = (b"<|im_end|>", b"<|eot_id|>", b"<|end|>", b"<end_of_turn>", b"<|endoftext|>", b"<|end_of_text|>")
_MARKS = tuple(mark.encode() for mark in MARKS)


class Call:
    """A call aboard, and the text that it has made: bytes of tokens to whole characters, cut at stop texts."""

    def __init__(self, order: Order, ids: list[int]) -> None:
        self.order = order
        self.key, self.priority = order.key, order.priority
        self.ids = ids  # of the prompt, then those made too
        self.count = self.unread = len(ids)
        self.since = 0
        self.handle: Any = None
        self.blocks = 0
        self.begun = False  # room is kept for it
        self.made = 0
        self.cached = 0
        self.logprobs: list[Logprob] = []
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.text = Text(order.stop, order.prefix)

    @property
    def stopped(self) -> bool:
        return self.text.stopped

    @property
    def computed(self) -> list[int]:
        """The tokens whose keys and values are in the cache: of all that were made but the last."""
        return self.ids[:-1] if self.made else []

    @property
    def cost(self) -> int:
        return self.blocks * BLOCK

    def take(self, data: bytes, *, final: bool = False) -> None:
        self.text.take(self._decode(data, final))

    def news(self, reason: str) -> News:
        done = bool(reason)
        text = self.text.ready(all=done)
        logprobs, self.logprobs = self.logprobs, []
        asked = logprobs if self.order.logprobs else None
        return News(self.order.number, text, reason, self.count, self.made, self.cached, asked, None, done)


class Prefixes:
    """Which blocks the engine still has: the same rule as its own, least recently used first out."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._known: OrderedDict[int, None] = OrderedDict()

    def find(self, ids: list[int]) -> int:
        """Tokens at the beginning of `ids` that are in the cache; the last one is never."""
        found = 0
        for value in _chain(ids):
            if value not in self._known:
                break
            found += BLOCK
        return min(found, len(ids) - 1)

    def add(self, ids: list[int]) -> None:
        """They were computed: all of their whole blocks are in the cache."""
        for value in _chain(ids):
            self._known[value] = None
            self._known.move_to_end(value)
        while len(self._known) > self._blocks:
            self._known.popitem(last=False)


def _chain(ids: list[int]) -> Iterator[int]:
    """What names each whole block, with all before it."""
    value = 0
    for start in range(0, len(ids) - len(ids) % BLOCK, BLOCK):
        value = hash((value, tuple(ids[start : start + BLOCK])))
        yield value


class Engine:
    def __init__(self, config: dict[str, Any]) -> None:
        import openvino_genai as genai

        self._genai = genai
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        self._free = self._blocks = -(-int(config["cache"]) // BLOCK) + 1
        scheduler.num_kv_blocks = self._blocks
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_batched_tokens = CHUNK + int(config["slots"])
        scheduler.max_num_seqs = int(config["slots"]) + 1  # a piece beside them
        self._context = int(config["context"])
        # where the processor knows bfloat16, OpenVINO would compute in it unasked, and give other texts than elsewhere
        options = {"INFERENCE_NUM_THREADS": int(config["threads"]), "INFERENCE_PRECISION_HINT": "f32"}
        self._pipeline = genai.ContinuousBatchingPipeline(config["model"], scheduler, "CPU", options)
        self._tokenizer = self._pipeline.get_tokenizer()
        vocabulary = self._tokenizer.get_vocab()
        self._bytes = [b""] * (max(vocabulary.values()) + 1)
        for text, id in vocabulary.items():
            self._bytes[id] = text if isinstance(text, bytes) else text.encode()
        self._ends = {vocabulary[text] for text in _ENDS if text in vocabulary} | {self._tokenizer.get_eos_token_id()}
        odd = [id for id, text in enumerate(self._bytes) if text[:1] in (b"<", b"[") and text not in _MARKS]
        for id in odd:
            if not self._tokenizer.decode([id], skip_special_tokens=True):
                self._bytes[id] = b""
        self._prefixes = Prefixes(self._blocks)
        self.calls: dict[int, Call] = {}
        self._line: Line[Call] = Line()
        self._piece: Any = None  # of a prompt, that is being read
        self._pieces = _PIECES

    def order(self, order: Order) -> News | None:
        """Begin or abort; what there is to tell at once."""
        if order.prompt is None:
            call = self.calls.pop(order.number, None)
            if call is None:
                return None
            if call.handle is not None:
                call.handle.stop()
                self._prefixes.add(call.computed)
            if call.handle is not None or self._line.remove(call):
                self._free += call.blocks
            return News(order.number, done=True)
        return self._begin(order, order.prompt)

    def _begin(self, order: Order, prompt: str | list[int]) -> News | None:
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_special_tokens=False).input_ids.data[0].tolist()
            bos = self._tokenizer.get_bos_token_id()
            if order.bos and bos >= 0 and ids[:1] != [bos]:
                ids.insert(0, bos)
        else:
            ids = prompt
            if max(ids, default=0) >= len(self._bytes):
                said = f"token id {max(ids)} is beyond the vocabulary of {len(self._bytes)}"
                return News(order.number, error=("invalid", said, 0, 0), done=True)
        if not ids or len(ids) >= self._context:
            return News(order.number, error=("context_length_exceeded", "", len(ids), self._context), done=True)
        call = Call(order, ids)
        call.unread -= self._prefixes.find(ids)
        room = self._context - len(ids)
        order.settings["max_new_tokens"] = min(order.settings.get("max_new_tokens", room), room)
        call.blocks = -(-(len(ids) + min(order.settings["max_new_tokens"], RESERVED)) // BLOCK)
        self.calls[order.number] = call
        self._line.push(call)
        return None

    def step(self) -> list[News]:
        news: list[News] = []
        read = self._read_on(news)
        self._pipeline.step()
        for call, upto in read:
            self._prefixes.add(call.ids[:upto])
        if self._piece is not None and self._piece.get_status() != self._genai.GenerationStatus.RUNNING:
            self._piece = None
        for call in [call for call in self.calls.values() if call.handle is not None]:
            news += self._collect(call)
        return news

    def _read_on(self, news: list[News]) -> list[tuple[Call, int]]:
        """Give the engine a step's worth of prompts: (call, tokens of its prompt that are read after it)."""
        self._line.turn()
        read: list[tuple[Call, int]] = []
        left = max(LEAST, CHUNK - sum(call.handle is not None for call in self.calls.values()))
        while left > 0 and self._piece is None and (call := self._line.next(self._fits)) is not None:
            if not call.begun:
                call.begun = True
                self._free -= call.blocks
                call.cached = self._prefixes.find(call.ids)  # by now, others may have read the same
                call.unread = call.count - call.cached
                news.append(News(call.order.number, begun=True))
            done = call.count - call.unread
            if call.unread <= left:
                upto = call.count
                self._line.remove(call)
                if (error := self._enter(call)) is not None:
                    news.append(error)
                    continue
            else:
                upto = (done + left) // BLOCK * BLOCK
                if upto <= done:
                    break
                self._pieces += 1
                self._piece = self._add(self._pieces, call.ids[:upto], self._config({"max_new_tokens": 1}))
            left -= upto - done
            call.unread = call.count - upto
            read.append((call, upto))
        return read

    def _fits(self, call: Call) -> bool:
        return call.blocks <= self._free or self._free == self._blocks

    def _enter(self, call: Call) -> News | None:
        """The engine reads what is left of its prompt and makes its tokens; what is to be told when it refuses."""
        try:
            call.handle = self._add(call.order.number, call.ids, self._config(call.order.settings))
        except RuntimeError as error:
            print("refused:", error, file=sys.stderr, flush=True)
            del self.calls[call.order.number]
            self._free += call.blocks
            said = "the engine refuses these parameters; the deployment's log has the cause"
            return News(call.order.number, error=("invalid", said, 0, 0), done=True)
        return None

    def _add(self, number: int, ids: list[int], config: Any) -> Any:
        import numpy as np
        import openvino as ov

        return self._pipeline.add_request(number, ov.Tensor(np.array([ids], dtype=np.int64)), config)

    def _config(self, settings: dict[str, Any]) -> Any:
        chosen = {name: value for name, value in settings.items() if name not in ("schema", "alternatives")}
        config = self._genai.GenerationConfig(**chosen)
        config.stop_token_ids = self._ends
        config.set_eos_token_id(self._tokenizer.get_eos_token_id())
        config.apply_chat_template = False
        if "schema" in settings:
            config.structured_output_config = self._genai.StructuredOutputConfig(json_schema=settings["schema"])
        return config

    def _collect(self, call: Call) -> list[News]:
        reason = ""
        before = call.made
        while not reason and call.handle.can_read():
            for output in call.handle.read().values():
                for id, logprob in zip(output.generated_ids, output.generated_log_probs, strict=True):
                    reason = self._token(call, id, logprob) or reason
                if not reason and output.finish_reason != self._genai.GenerationFinishReason.NONE:
                    ends = output.finish_reason == self._genai.GenerationFinishReason.STOP
                    reason = "stop" if ends else "length"
        if not reason and call.handle.get_status() == self._genai.GenerationStatus.IGNORED:
            reason = "length"  # the cache cannot hold it
        if reason:
            if call.stopped:
                call.handle.stop()
            call.take(b"", final=True)
            self._prefixes.add(call.computed)
            del self.calls[call.order.number]
            self._free += call.blocks
            return [call.news("stop" if call.stopped else reason)]
        return [call.news("")] if call.made > before and call.order.stream else []

    def _token(self, call: Call, id: int, logprob: float) -> str:
        """Note one token; why the call ends with it, or ""."""
        call.made += 1
        call.ids.append(id)
        if id in self._ends and not call.order.settings.get("ignore_eos"):
            return "stop"
        data = self._bytes[id] if id < len(self._bytes) else b""
        if call.order.logprobs and data:
            one = Logprob(data.decode("utf-8", "replace"), max(logprob, -9999.0), list(data), [], id)
            if call.order.settings.get("alternatives"):
                one.top_logprobs = [Logprob(one.token, one.logprob, one.bytes, [], id)]
            call.logprobs.append(one)
        call.take(data)
        return "stop" if call.stopped else ""


def main() -> None:
    stream = socket.socket(fileno=int(sys.argv[1]))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    for number in (signal.SIGTERM, signal.SIGINT):  # the parent drains; it ends this process when it is done
        signal.signal(number, signal.SIG_IGN)
    config = msgspec.msgpack.decode(_frame(stream))
    try:
        engine = Engine(config)
    except Exception as error:  # the process's edge
        _send(stream, " ".join(str(error).split())[-300:])
        return
    _send(stream, None)
    serve(stream, engine)


def serve(stream: socket.socket, engine: Engine) -> None:
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    decode = msgspec.msgpack.Decoder(Order).decode
    while True:
        news: list[News] = []
        while poll.poll(0 if engine.calls or news else None):
            frame = _frame(stream)
            if not frame:
                return
            told = engine.order(decode(frame))
            if told is not None:
                news.append(told)
        if engine.calls:
            news += engine.step()
        if news:
            _send(stream, news)


def _send(stream: socket.socket, message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    stream.sendall(struct.pack("<I", len(data)) + data)


if __name__ == "__main__":
    main()
