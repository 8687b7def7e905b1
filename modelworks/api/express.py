"""The fast lane's bulk: requests of one turn of the loop for one deployment are read, sent and answered together.

Only what is usual goes this way (`Bulk.read` takes it, nobody waits, no rule sends it elsewhere); everything else starts
by itself. A client cannot tell the difference, nor can the counters, limits and logs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from modelworks.api.calls import Read, Reply
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Answer, Call, Principal
from modelworks.serve.channel import Deliver
from modelworks.serve.columns import Answers, Kind
from modelworks.serve.convoy import Convoy, Rider
from modelworks.serve.gateway import Gateway
from modelworks.serve.observe import Watch
from modelworks.serve.requestlog import Line
from modelworks.serve.routes import Route

if TYPE_CHECKING:
    from modelworks.api.fastlane import Exchange, Target

log = logger("api.express")

_LARGEST = 64 * 1024  # bytes of a body


class Bulk(Protocol):
    """What a dialect has for a route: it reads bodies, and writes answers' bodies."""

    route: Route

    def read(self, data: bytes) -> Read | None: ...

    def reply(self, answer: Answer, request_id: str, id: str | None) -> Reply: ...

    def write(self, answers: Answers, request_ids: Sequence[str], ids: Sequence[str | None]) -> list[bytes]: ...


class Express:
    """One a gateway. `add` takes a request whose body is there."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._waiting: list[Exchange] = []

    def add(self, exchange: Exchange) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._depart)
        self._waiting.append(exchange)

    def _depart(self) -> None:
        """The end of the turn."""
        waiting, self._waiting = self._waiting, []
        groups: dict[int, list[Exchange]] = {}
        for exchange in waiting:
            groups.setdefault(id(exchange.target), []).append(exchange)
        for group in groups.values():
            self._send(group[0].target, group)

    def _send(self, target: Target, exchanges: list[Exchange]) -> None:
        bulks: dict[int, Bulk | None] = {}  # by principal
        convoys: dict[tuple[int, Kind], tuple[_Convoy, list[Rider]]] = {}
        begun = monotonic()
        for exchange in exchanges:
            if exchange.response_complete:
                continue  # its client has gone
            who = id(exchange.principal)
            bulk = bulks[who] if who in bulks else bulks.setdefault(who, self._bulk(target, exchange.principal))
            read = _read(bulk, exchange.body) if bulk is not None else None
            if bulk is None or read is None:
                exchange.start()
                continue
            kind, rows, data, exchange.id = read
            found = convoys.get((id(bulk), kind))
            if found is None:
                found = convoys[id(bulk), kind] = _Convoy(self, bulk, kind, begun), []
            convoy, riders = found
            exchange.rows = rows
            riders.append(Rider(convoy, exchange, data, rows))
        for _, riders in convoys.values():
            self._board(riders)

    def _board(self, riders: list[Rider]) -> None:
        try:
            left = self.gateway.submit_many(riders)
        except Exception as error:  # the same edge as that of one call
            for rider in riders:
                rider.caller.unexpected(error)
            return
        if not left:
            for rider in riders:
                convoy: Any = rider.convoy
                rider.caller.start_with(partial(getattr, rider, "call"), convoy.reply(rider))
            return
        place, count = riders[0].convoy.route.key, self.gateway.observer.call
        for rider in riders:
            exchange: Exchange = rider.caller
            count(place, exchange.principal.key_id)
            exchange.body = b""
            if not exchange.response_complete:
                exchange._pending = rider

    def _bulk(self, target: Target, principal: Principal) -> Bulk | None:
        """What reads the requests of this principal; None: each says for itself what is wrong, or goes by a rule."""
        try:
            route = self.gateway.route(principal, target.deployment, target.version)
            if not self.gateway.together(route):
                return None
            found: Bulk | None = route.memo.get(target.operation)
            if found is None:
                found = route.memo[target.operation] = target.bulk(route)
            return found
        except Exception:  # each meets it by itself, where there is an edge for it
            return None


def _read(bulk: Bulk, body: bytes) -> Read | None:
    if len(body) > _LARGEST:  # what is refused would be read twice, and large ones gain nothing
        return None
    try:
        return bulk.read(body)
    except Exception:  # as in _bulk
        return None


class _Convoy(Convoy):
    """Its purpose is the `Bulk`: one a route and dialect."""

    def __init__(self, express: Express, bulk: Bulk, kind: Kind, begun: float) -> None:
        super().__init__(bulk, bulk.route, kind, begun, express.gateway.deadline())
        self._express = express
        self._bulk = bulk

    def call(self, rider: Rider, tensors: list[Tensor]) -> Call:
        exchange: Exchange = rider.caller
        return Call(
            self.route.name,
            tensors,
            self.deadline,
            exchange.request_id,
            version=exchange.target.version,
            key_id=exchange.principal.key_id,
            kind=self.kind,
        )

    def deliver(self, rider: Rider) -> Deliver:
        exchange: Exchange = rider.caller
        exchange.answer_by(self.reply(rider))
        return Watch(self._express.gateway.observer, self.route, exchange.deliver, self.begun)

    def reply(self, rider: Rider) -> Callable[[Answer], Reply]:
        """What encodes the answer of one rider that comes alone."""
        exchange: Exchange = rider.caller
        return partial(self._bulk.reply, request_id=exchange.request_id, id=exchange.id)

    def finish(self, riders: list[Rider], answers: Answers) -> None:
        exchanges: list[Exchange] = [rider.caller for rider in riders]
        observer = self._express.gateway.observer
        observer.answered(self.route, answers, [rider.convoy.begun for rider in riders])
        try:
            request_ids = [exchange.request_id for exchange in exchanges]
            bodies = self._bulk.write(answers, request_ids, [exchange.id for exchange in exchanges])
        except Exception:  # one of them cannot be written; the others need not share its fate
            for rider, part in zip(riders, answers.parts(), strict=True):
                rider.caller.answer_by(self.reply(rider))
                rider.caller.deliver(part)
            return
        told: list[tuple[Exchange, bytes]] = []
        for exchange, body in zip(exchanges, bodies, strict=True):
            if exchange.response_complete:
                continue
            try:
                exchange.good(body)
            except Exception as error:  # the same edge as that of one answer
                log.error("an answer could not be sent", request_id=exchange.request_id, exc_info=error)
            told.append((exchange, body))
        if told:
            observer.requests_answered(told[0][0].target.operation, _lines(told, answers.version), len(told))


def _lines(told: list[tuple[Exchange, bytes]], version: str) -> Iterator[Line]:
    """For the request log."""
    now = monotonic()
    for exchange, body in told:
        principal, target = exchange.principal, exchange.target
        yield (
            exchange.request_id, principal.key_id, principal.project_id, target.operation, target.deployment, version,
            200, now - exchange.began, exchange.length, len(body), exchange.rows,
        )  # fmt: skip
