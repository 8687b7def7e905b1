"""What a generation has made and its client has not taken yet. Parts are joined as they come: memory holds the text once."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

from modelworks.core.errors import ModelworksError
from modelworks.core.tensors import unpack_bytes
from modelworks.serve.wire import Part


class Generated:
    """`deliver` is what the gateway calls; `ready` and `take` are the reader's. All in the loop's thread."""

    def __init__(self) -> None:
        self.pending: list[str] = []  # text that was not taken
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.delivered = 0  # completion tokens whose text was taken
        self.reason = ""
        self.model_version = ""
        self.error: ModelworksError | None = None
        self.done = False
        self.gone = False  # the client went away
        self._news = asyncio.Event()

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
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = struct.unpack("<3i", found["usage"])
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
        while not (self.gone or self.done or (self.pending and not whole)):
            self._news.clear()
            await self._news.wait()

    def take(self) -> str:
        """The text since the last take; its tokens count as delivered."""
        text = "".join(self.pending)
        self.pending.clear()
        self.delivered = self.completion_tokens
        return text

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
