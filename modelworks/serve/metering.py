"""Tokens of language and embedding models that are asked by another dialect than OpenAI's, which counts what it delivers.

No way into the data plane is free: the gateway puts a `Meter` around what such a call delivers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from modelworks.core.errors import ModelworksError, RateLimited
from modelworks.core.types import Principal
from modelworks.serve.observe import Observer
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

TASKS = frozenset({"text-generation", "embedding", "rerank"})

Deliver = Callable[["Part | ModelworksError"], None]


class Limiter(Protocol):
    """As security/quota.py has it."""

    def reserve(self, key_id: str, per_minute: int, tokens: int) -> tuple[bool, int, float]: ...

    def give(self, key_id: str, per_minute: int, tokens: int) -> None: ...


class Meter:
    """One call, in the place of its `deliver`. RateLimited when its key has used up its tokens of this minute."""

    def __init__(
        self, observer: Observer, limiter: Limiter | None, principal: Principal, route: Route, deliver: Deliver
    ) -> None:
        self._observer = observer
        self._limiter = limiter
        self._limit = principal.tokens_per_minute
        self._key = principal.key_id
        self._place = route.key
        self._deliver = deliver
        self._used = (0, 0, 0)  # of the prompt, generated, of the prompt found in a cache
        if limiter is not None and self._limit is not None:
            allowed, _, seconds = limiter.reserve(self._key, self._limit, 1)
            if not allowed:
                raise RateLimited(
                    f"this key may use {self._limit} tokens a minute, and none are left; try again in {seconds:.0f} s",
                    retry_after=seconds,
                    detail={"limit": "tokens"},
                )

    def __call__(self, item: Part | ModelworksError) -> None:
        if isinstance(item, Part):
            for tensor in item.outputs:
                if tensor.name == "usage" and len(tensor.data) == 12:
                    self._used = struct.unpack("<3i", tensor.data)
                elif tensor.name == "tokens" and tensor.datatype == "INT32":
                    self._used = (sum(memoryview(tensor.data).cast("i")), 0, 0)
        if not isinstance(item, Part) or item.done:
            self.settle()
        self._deliver(item)

    def settle(self) -> None:
        """The end, also of a call that nobody waits for any more; after it, nothing is counted."""
        prompt, made, cached = self._used
        self._observer.tokens(self._place, self._key, prompt, made, cached)
        if self._limiter is not None and self._limit is not None:
            self._limiter.give(self._key, self._limit, 1 - prompt - made)
        self._used, self._limit = (0, 0, 0), None
