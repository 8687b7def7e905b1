"""Tokens of calls that other dialects than OpenAI's make: reserved before they run, settled by what they used."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from modelworks.core.errors import RateLimited, Unavailable
from modelworks.core.tasks import GENERATION
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.core.types import Call, Principal, Signature
from modelworks.security.quota import RateLimiter
from modelworks.serve.metering import Meter, estimate
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

ROUTE = Route("proj_1", "chat", "chat:1", Signature(inputs=[], outputs=[]), GENERATION)
TEXT = b"x" * 396  # with the length before it: 100 tokens, as far as anybody knows


class Counts:
    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []

    def tokens(self, place: Any, key: str, *counts: int) -> None:
        self.told.append(counts)


class Place:
    def __init__(self, per_minute: int) -> None:
        self.limiter = RateLimiter(clock=lambda: 0.0)
        self.counts = Counts()
        self.per_minute = per_minute
        self.principal = Principal(
            key_id="key_1", key_name="k", project_id="proj_1", role="invoke-only", scopes=frozenset(),
            tokens_per_minute=per_minute,
        )  # fmt: skip

    def meter(self, **params: Any) -> Meter:
        call = Call("chat", [Tensor("prompt", "BYTES", [1], pack_bytes([TEXT]))], 0.0, "req_1", params)
        return Meter(self.counts, self.limiter, self.principal, ROUTE, call, lambda item: None)  # type: ignore[arg-type]

    @property
    def left(self) -> int:
        return self.limiter.reserve("key_1", self.per_minute, 0)[1]


def used(prompt: int, made: int, done: bool = True) -> Part:
    return Part([Tensor("usage", "INT32", [3], struct.pack("<3i", prompt, made, 0))], "chat:1", done)


def test_two_at_once_cannot_use_what_is_there_for_one() -> None:
    place = Place(250)
    first = place.meter(max_tokens=50)
    assert place.left == 100
    with pytest.raises(RateLimited, match="ask for a shorter answer"):
        place.meter(max_tokens=50)
    first(used(90, 10))
    assert place.left == 150
    assert place.counts.told == [(90, 10, 0)]
    place.meter(max_tokens=50)


def test_who_leaves_while_a_replica_reads_pays_for_the_prompt() -> None:
    place = Place(1000)
    place.meter(max_tokens=50).settle(left=True)
    assert place.left == 900
    place.meter(max_tokens=50).settle()  # it had waited only
    assert place.left == 900
    told = place.meter(max_tokens=50)
    told(used(80, 3, done=False))
    told.settle(left=True)
    told.settle(left=True)
    assert place.left == 817


def test_an_answer_out_of_the_cache_and_an_error_cost_nothing() -> None:
    place = Place(1000)
    again = place.meter()
    again.repeated = True
    again(used(90, 10))
    place.meter()(Unavailable("away"))
    assert place.left == 1000
    assert place.counts.told[0] == (90, 10, 90, 10)


def test_an_image_is_taken_for_what_images_have_and_not_for_its_bytes() -> None:
    url = f"data:image/png;base64,{'A' * 400_000}"
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x" * 400}]}]
    asked = Tensor("messages", "BYTES", [1], pack_bytes([json.dumps(messages)]))
    assert 1024 + 100 < estimate([asked]) < 1024 + 200
    assert estimate([Tensor("prompt", "BYTES", [1], pack_bytes([json.dumps(messages)]))]) > 100_000
