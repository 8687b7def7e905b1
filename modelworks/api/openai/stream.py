"""What a generation has made and its client has not taken yet. Parts are joined as they come: memory holds the text once."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec

from modelworks.core.errors import ModelworksError
from modelworks.core.generation import Logprob
from modelworks.core.tensors import unpack_bytes
from modelworks.serve.wire import Part

_logprobs = msgspec.json.Decoder(list[Logprob]).decode


class Generated:
    """One choice. `deliver` is what the gateway calls; `ready` and `take` are the reader's. All in the loop's thread.

    Choices of one request share `news`, so that their reader waits for all of them at once.
    """

    def __init__(self, index: int = 0, news: asyncio.Event | None = None) -> None:
        self.index = index
        self.pending: list[str] = []  # text that was not taken
        self.logprobs: list[Logprob] = []  # those of its tokens
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.delivered = 0  # completion tokens whose text was taken
        self.repeated = False  # out of the deployment's cache of answers
        self.reason = ""
        self.model_version = ""
        self.error: ModelworksError | None = None
        self.done = False
        self.gone = False  # the client went away
        self._news = news or asyncio.Event()

    def deliver(self, item: Part | ModelworksError) -> None:
        if isinstance(item, ModelworksError):
            self.error, self.done = item, True
        else:
            self._add(item)
        self._news.set()

    def _add(self, part: Part) -> None:
        found = {tensor.name: tensor.data for tensor in part.outputs}
        text = unpack_bytes(found["text"])[0].decode("utf-8", "replace")
        if text:
            self.pending.append(text)
            if len(self.pending) > 256:  # a slow reader: one text, not many
                self.pending = ["".join(self.pending)]
        if "logprobs" in found:
            self.logprobs += _logprobs(unpack_bytes(found["logprobs"])[0])
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = struct.unpack("<3i", found["usage"])
        if self.repeated:  # nothing of it was read again
            self.cached_tokens = self.prompt_tokens
        self.model_version = part.model_version
        self.done = part.done
        if part.done:
            self.reason = unpack_bytes(found["finish_reason"])[0].decode()

    def leave(self) -> None:
        """The client went away."""
        self.gone = True
        self._news.set()

    async def ready(self, *, whole: bool = False) -> None:
        """Wait until there is something to take, with `whole` until the end; or an error, or the client has left."""
        await ready([self], self._news, whole=whole)

    def take(self) -> str:
        """The text since the last take; its tokens count as delivered."""
        text = "".join(self.pending)
        self.pending.clear()
        self.delivered = self.completion_tokens
        return text

    def take_logprobs(self) -> list[Logprob]:
        found, self.logprobs = self.logprobs, []
        return found


async def ready(choices: list[Generated], news: asyncio.Event, *, whole: bool = False) -> None:
    """Wait until one of the choices has something to take, with `whole` until all have ended or one has failed."""

    def settled(one: Generated) -> bool:
        return one.gone or one.error is not None

    while not any(map(settled, choices)):
        if whole and all(one.done for one in choices):
            return
        if not whole and any(one.pending or (one.done and one.reason) for one in choices):
            return
        news.clear()
        await news.wait()


def usage(choices: list[Generated], prompts: int = 1) -> dict[str, Any]:
    """Of `prompts` prompts that have equally many choices each: a prompt is counted once."""
    firsts = choices[:: max(1, len(choices) // prompts)]
    prompt = sum(one.prompt_tokens for one in firsts)
    completion = sum(one.completion_tokens for one in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in firsts)},
    }
