"""Tokens of language and embedding models: what a key may use in a minute, and what its calls did use.

No way into the data plane is free: OpenAI's dialect reserves and counts by itself, since it delivers by the choice; around
the calls of all others the gateway puts a `Meter`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from modelworks.core.embedding import EMBEDDING, RERANK
from modelworks.core.errors import ModelworksError, RateLimited
from modelworks.core.tasks import GENERATION
from modelworks.core.tensors import Tensor
from modelworks.core.types import Call, Principal
from modelworks.serve.observe import Observer
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

TASKS = frozenset({GENERATION, EMBEDDING, RERANK})
ANSWER = 512  # tokens reserved for an answer whose request bounds it by nothing
_BYTES = 4  # of a text, for one token: what is not known before the model has read it
_SEEN = 1024  # tokens of an image, as little known
_IMAGE = re.compile(rb'"url"\s*:\s*"data:image/[^"]*')

Deliver = Callable[["Part | ModelworksError"], None]


class Limiter(Protocol):
    """As security/quota.py has it."""

    def reserve(self, key_id: str, per_minute: int, tokens: int) -> tuple[bool, int, float]: ...

    def give(self, key_id: str, per_minute: int, tokens: int) -> None: ...


def estimate(inputs: Sequence[Tensor]) -> int:
    """How many tokens these may be."""
    return sum(map(_tokens, inputs))


def _tokens(tensor: Tensor) -> int:
    size = len(tensor.data)
    images = [found.end() - found.start() for found in _IMAGE.finditer(tensor.data)] if tensor.name == "messages" else []
    return (size - sum(images)) // _BYTES + _SEEN * len(images)


class Reservation:
    """Tokens of one request, taken before it runs and settled at its end. Without a limit of its key it does nothing.

    `left` and `seconds`: of the key's bucket, once `reserve` was called.
    """

    def __init__(self, limiter: Limiter | None, principal: Principal) -> None:
        self.limit = principal.tokens_per_minute if limiter is not None else None
        self._limiter = limiter
        self._key = principal.key_id
        self._taken = 0
        self.left, self.seconds = 0, 0.0

    def reserve(self, tokens: int) -> None:
        """Take as many, or all that the key may ever use in a minute; RateLimited when there are not as many now."""
        if self.limit is None or self._limiter is None:
            return
        want = max(1, min(tokens, self.limit))
        allowed, self.left, self.seconds = self._limiter.reserve(self._key, self.limit, want)
        if not allowed:
            raise RateLimited(
                f"this key may use {self.limit} tokens a minute, {self.left} are left, and this request may need {want}; try "
                f"again in {math.ceil(self.seconds)} s, or ask for a shorter answer",
                retry_after=self.seconds,
                detail={"limit": "tokens"},
            )
        self._taken = want

    def settle(self, used: int) -> None:
        """Give back what was reserved and not used, or take what was used beyond it."""
        if self.limit is not None and self._limiter is not None and self._taken != used:
            self._limiter.give(self._key, self.limit, self._taken - used)
        self._taken = used


class Meter:
    """One call, in the place of its `deliver`. RateLimited when its key has not the tokens that it may use.

    `repeated`: its answer comes out of a cache, and costs nothing.
    """

    repeated = False

    def __init__(
        self, observer: Observer, limiter: Limiter | None, principal: Principal, route: Route, call: Call, deliver: Deliver
    ) -> None:
        self._observer = observer
        self._key = principal.key_id
        self._place = route.key
        self._deliver = deliver
        self._read = estimate(call.inputs)
        self._used = (0, 0, 0)  # of the prompt, generated, of the prompt found in a cache
        self._reservation = Reservation(limiter, principal)
        self._reservation.reserve(self._read + (_wanted(call) if route.task == GENERATION else 0))
        self._settled = False

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

    def settle(self, *, left: bool = False) -> None:
        """The end; after it, nothing is counted. `left`: nobody waits for the answer any more, but a replica was at work:
        where it has not said what it read, the prompt costs what it was taken for.
        """
        if self._settled:
            return
        self._settled = True
        prompt, made, cached = self._used
        if self.repeated:
            self._observer.tokens(self._place, self._key, prompt, made, prompt, made)
            self._reservation.settle(0)
            return
        self._observer.tokens(self._place, self._key, prompt, made, cached)
        self._reservation.settle((prompt or (self._read if left else 0)) + made)


def _wanted(call: Call) -> int:
    """The longest answer that the call asks for."""
    asked = call.params.get("max_tokens")
    return asked if isinstance(asked, int) and asked >= 0 else ANSWER
