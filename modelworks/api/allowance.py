"""Tokens a minute: what a request may use is reserved before it runs, and what it did use is counted at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from starlette.requests import Request

from modelworks.api.guard import token_headers
from modelworks.api.services import Services
from modelworks.core.errors import RateLimited
from modelworks.core.tensors import Tensor
from modelworks.core.types import Caller

ANSWER = 512  # tokens reserved for an answer whose request bounds it by nothing
_BYTES = 4  # of a text, for one token: what is not known before the model has read it


class Allowance:
    """Of one request. Without a limit of its key it does nothing. `settle` must follow, whatever becomes of the request."""

    def __init__(self, services: Services, caller: Caller, request: Request) -> None:
        self._limit = caller.principal.tokens_per_minute
        self._key = caller.principal.key_id
        self._limiter = services.limiter
        self._headers: list[tuple[bytes, bytes]] = request.scope["state"]["limits"]
        self._reserved = 0

    def reserve(self, inputs: Sequence[Tensor], answer: int = 0) -> None:
        """Take what `inputs` and an answer of `answer` tokens may use; RateLimited when the key has not as much now."""
        limit = self._limit
        if limit is None:
            return
        read = sum(len(tensor.data) // _BYTES for tensor in inputs)
        want = max(1, min(read + answer, limit))
        allowed, left, seconds = self._limiter.reserve(self._key, limit, want)
        told = token_headers(limit, left, seconds)
        self._headers[:] = [pair for pair in self._headers if not pair[0].endswith(b"-tokens")] + told
        if not allowed:
            raise RateLimited(
                f"this key may use {limit} tokens a minute, {left} are left, and this request may need {want}; try again in "
                f"{math.ceil(seconds)} s, or ask for a shorter answer",
                retry_after=seconds,
                detail={"limit": "tokens"},
            )
        self._reserved = want

    def settle(self, used: int) -> None:
        """Give back what was reserved and not used, or take what was used beyond it."""
        if self._limit is not None and self._reserved != used:
            self._limiter.give(self._key, self._limit, self._reserved - used)
        self._reserved = used
