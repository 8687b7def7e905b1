"""Tokens a minute, as OpenAI tells them: in headers of each answer."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from modelworks.api.guard import token_headers
from modelworks.api.services import Services
from modelworks.core.tensors import Tensor
from modelworks.core.types import Caller
from modelworks.serve.metering import Reservation, estimate


class Allowance(Reservation):
    """Of one request. `settle` must follow, whatever becomes of the request."""

    def __init__(self, services: Services, caller: Caller, request: Request) -> None:
        super().__init__(services.limiter, caller.principal)
        self._headers: list[tuple[bytes, bytes]] = request.scope["state"]["limits"]

    def take(self, inputs: Sequence[Tensor], answer: int = 0) -> None:
        """Reserve what `inputs` and an answer of `answer` tokens may use; RateLimited when the key has not as much now."""
        try:
            self.reserve(estimate(inputs) + answer)
        finally:
            if self.limit is not None:
                told = token_headers(self.limit, self.left, self.seconds)
                self._headers[:] = [pair for pair in self._headers if not pair[0].endswith(b"-tokens")] + told
