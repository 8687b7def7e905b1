"""A call that may be answered elsewhere: from the deployment's cache of answers, or by another deployment, by its rules.

Only deployments that have rules or a cache come by here. A rule is looked at before the call is sent (the length of its
input), or when it failed before anything of its answer was delivered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from time import monotonic
from typing import Any

import msgspec

from modelworks.core.errors import ModelworksError
from modelworks.core.types import Call
from modelworks.serve.channel import Deliver
from modelworks.serve.metering import Meter
from modelworks.serve.router import Pending
from modelworks.serve.routes import Key, Route
from modelworks.serve.wire import Part

Submit = Callable[[str, Call, Deliver], Pending]  # to a deployment of the same project, by name


class Cache:
    """Whole answers of one deployment, the least recently used leaving first. `clock`: seconds, monotonic."""

    def __init__(self, seconds: float, size: int, clock: Callable[[], float] = monotonic) -> None:
        self.seconds = seconds
        self.size = size  # bytes
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, int, list[Part]]] = OrderedDict()
        self._held = 0

    def get(self, key: bytes) -> list[Part] | None:
        found = self._known.get(key)
        if found is None:
            return None
        if found[0] <= self._clock():
            self._drop(key)
            return None
        self._known.move_to_end(key)
        return found[2]

    def put(self, key: bytes, parts: list[Part]) -> None:
        size = sum(len(tensor.data) + 200 for part in parts for tensor in part.outputs) + 200
        if size > self.size // 4:
            return
        if key in self._known:
            self._drop(key)
        self._known[key] = (self._clock() + self.seconds, size, parts)
        self._held += size
        while self._held > self.size:
            self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        self._held -= self._known.pop(key)[1]


class Caches:
    """The caches of one gateway. A deployment's is new when its spec or the version that answers is."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[Any, Cache]] = {}

    def of(self, route: Route) -> Cache | None:
        if route.cache is None:
            return None
        state = (route.cache, route.model_version, route.detours, route.adapters)
        known = self._known.get(route.key)
        if known is None or known[0] != state:
            known = self._known[route.key] = (state, Cache(*route.cache))
        return known[1]


def digest(call: Call) -> bytes:
    """What names an answer in a cache: all that it depends on."""
    parts = [(tensor.name, tensor.datatype, tensor.shape, tensor.data) for tensor in call.inputs]
    return blake2b(msgspec.msgpack.encode((parts, call.params, call.stream), order="sorted"), digest_size=16).digest()


class Errand:
    """Such a call on its way, in the place of a Pending."""

    __slots__ = ("_cache", "_call", "_counted", "_key", "_parts", "_route", "_submit", "_tried",
                 "begun", "cached", "deliver", "done", "meter", "pending")  # fmt: skip

    def __init__(
        self,
        route: Route,
        call: Call,
        deliver: Deliver,
        cache: Cache | None,
        submit: Submit,
        counted: Callable[[Deliver], Deliver],
    ) -> None:
        """`counted`: makes of `deliver` one that counts what comes out of the cache."""
        self._route = route
        self._call = call
        self.deliver = deliver
        self._cache = cache
        self._submit = submit
        self._counted = counted
        self._key = digest(call) if cache is not None else b""
        self._parts: list[Part] = []
        self._tried: set[str] = set()
        self.pending: Pending | None = None  # where it is now
        self.meter: Meter | None = None  # as a Pending's
        self.cached = False  # its answer came out of the cache
        self.begun = False  # something of its answer was delivered
        self.done = False

    def start(self) -> None:
        """Raises what submitting raises, when no rule has a way out."""
        known = self._cache.get(self._key) if self._cache is not None else None
        if known is not None:
            self.cached = True
            self.deliver = self._counted(self.deliver)
            asyncio.get_running_loop().call_soon(self._replay, known)
            return
        size = sum(len(tensor.data) for tensor in self._call.inputs)
        longer = [rule.to for rule in self._route.detours if rule.longer_than is not None and size > rule.longer_than]
        self._go(longer[0] if longer else self._route.name)

    def _replay(self, parts: list[Part]) -> None:
        for part in parts:
            if not self.done:
                self.done = part.done
                self.deliver(part)

    def _go(self, name: str) -> None:
        while True:
            self._tried.add(name)
            try:
                self.pending = self._submit(name, self._call, self._arrived)
                return
            except ModelworksError as error:
                other = self._way_out(error)
                if other is None:
                    self.done = True
                    raise
                name = other

    def _way_out(self, error: ModelworksError) -> str | None:
        kind = failure(error)
        for rule in self._route.detours:
            if kind in rule.on and rule.to not in self._tried:
                return rule.to
        return None

    def _arrived(self, item: Part | ModelworksError) -> None:
        if self.done:
            return
        if isinstance(item, ModelworksError) and not self.begun:
            other = self._way_out(item)
            if other is not None:
                try:
                    self._go(other)
                    return
                except ModelworksError as error:
                    item = error
        if isinstance(item, Part):
            self.begun = True
            if self._cache is not None:
                self._parts.append(item)
                if item.done:
                    self._cache.put(self._key, self._parts)
        self.done = isinstance(item, ModelworksError) or item.done
        self.deliver(item)


def failure(error: ModelworksError) -> str:
    """What of the rules' `on` an error is: unsupported, context, overload or error; "" for what is the caller's own."""
    if error.code == "unsupported_parameter":
        return "unsupported"
    if error.code == "context_length_exceeded":
        return "context"
    if error.status == 429 or error.code in ("queue_full", "replica_full"):
        return "overload"
    return "error" if error.status >= 500 else ""
