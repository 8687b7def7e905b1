"""Sends each call to a ready replica: the one with the fewest calls outstanding, as this gateway itself counts them.

One instance a gateway, all in the loop's thread. `apply` follows snapshots; `submit` never blocks: its answer, or one
error, comes to a callback. With no replica ready, calls wait in a bounded queue until their deadline.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque

from modelworks.core.errors import DeadlineExceeded, ModelworksError, NotFound, RateLimited, Unavailable
from modelworks.core.telemetry import logger
from modelworks.core.types import Call
from modelworks.serve.channel import Deliver, LinkLost
from modelworks.serve.peer import Peer, PeerState
from modelworks.serve.routes import Key, Route, Snapshot, Target
from modelworks.serve.wire import Part

MAX_RETRIES = 2
POISON_DEATHS = 2
_TICK = 0.05  # seconds between looks at deadlines and health
_RETIRE_SECONDS = 30.0

log = logger("router")


class Pending:
    """A call on its way, from `submit` until its last part or its error was delivered."""

    __slots__ = ("begun", "call", "deaths", "deliver", "done", "lane", "number", "peer", "retries")

    def __init__(self, lane: Lane, call: Call, deliver: Deliver) -> None:
        self.lane = lane
        self.call = call
        self.deliver = deliver
        self.peer: Peer | None = None  # where it is aboard
        self.number = 0  # its id there
        self.begun = False  # a part of its answer was delivered: it cannot be retried
        self.done = False
        self.retries = 0
        self.deaths = 0  # replicas that died with it aboard


class Lane:
    """A deployment's replicas and the calls that wait for one of them."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.peers: list[Peer] = []
        self.waiting: deque[Pending] = deque()
        self.suspects: deque[Pending] = (
            deque()
        )  # a replica died with them: they go one by one, so that few share a fate
        self.queued = 0  # calls in the two queues that are not done

    def forget(self) -> None:
        """One queued call is done. It is skipped when its turn comes; many such are swept out before."""
        self.queued -= 1
        if len(self.waiting) > 2 * self.queued + 64:
            self.waiting = deque(pending for pending in self.waiting if not pending.done)

    def pick(self, *, suspect: bool = False) -> Peer | None:
        """The usable replica with the fewest calls outstanding; None when all are away or full."""
        best: Peer | None = None
        fewest = self.route.limits.in_flight
        for peer in self.peers:
            if peer.usable and not (suspect and peer.suspect):
                count = peer.outstanding
                if count < fewest or (count == fewest and best is not None and random.random() < 0.5):
                    best, fewest = peer, count
        return best


class Router:
    """`secret`: what the replicas of this server run expect in a hello."""

    def __init__(self, secret: str) -> None:
        self.number = -1
        self._secret = secret
        self._lanes: dict[Key, Lane] = {}
        self._peers: dict[Target, Peer] = {}
        self._aboard: set[Pending] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._last_tick = 0.0
        self._closed = False

    # following the catalog

    def apply(self, snapshot: Snapshot) -> None:
        """Follow a newer snapshot: open links to new replicas, let calls aboard of the gone ones finish, then close."""
        if snapshot.number <= self.number or self._closed:
            return
        self.number = snapshot.number
        wanted = {target for route in snapshot.routes.values() for target in route.replicas}
        for target in wanted:
            if target not in self._peers:
                self._peers[target] = Peer(target, self._secret, self._changed)
            self._peers[target].open()
        for target, peer in self._peers.items():
            if target not in wanted:
                peer.retire(_RETIRE_SECONDS)
        for key in [key for key in self._lanes if key not in snapshot.routes]:
            self._remove(self._lanes.pop(key))
        for key, route in snapshot.routes.items():
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = Lane(route)
            lane.route = route
            lane.peers = [self._peers[target] for target in route.replicas]
            self._pump(lane)
        if self._ticker is None:
            self._last_tick = time.monotonic()
            self._tick()

    def route(self, key: Key) -> Route | None:
        lane = self._lanes.get(key)
        return lane.route if lane else None

    def routes(self) -> list[Route]:
        return [lane.route for lane in self._lanes.values()]

    def ready(self, key: Key) -> bool:
        """Whether a replica of the deployment could be called now."""
        lane = self._lanes.get(key)
        return lane is not None and any(peer.usable for peer in lane.peers)

    def outstanding(self, key: Key) -> int:
        """Calls of a deployment that wait or are aboard."""
        lane = self._lanes.get(key)
        return lane.queued + sum(peer.outstanding for peer in lane.peers) if lane else 0

    def states(self) -> list[PeerState]:
        """All replicas as this gateway sees them, hung ones marked."""
        now = time.monotonic()
        return [peer.state(now) for peer in self._peers.values()]

    def _remove(self, lane: Lane) -> None:
        for pending in (*lane.waiting, *lane.suspects):
            if not pending.done:
                self._fail(pending, NotFound(f"the deployment {lane.route.name!r} was deleted", param="deployment"))

    # calls

    def submit(self, key: Key, call: Call, deliver: Deliver) -> Pending:
        """Send a call, or queue it. `deliver` gets its parts or one error, always after this returned.

        NotFound for an unknown deployment, RateLimited or Unavailable at once when its queue is full.
        """
        lane = self._lanes.get(key)
        if lane is None:
            raise NotFound(f"there is no deployment {key[1]!r}", code="deployment_not_found", param="deployment")
        if self._closed:
            raise Unavailable("the server is stopping", code="stopping", retry_after=2.0)
        pending = Pending(lane, call, deliver)
        if not lane.queued:
            peer = lane.pick()
            if peer is not None:
                self._send(pending, peer)
                return pending
        if lane.queued >= lane.route.limits.queue:
            raise self._full(lane)
        lane.waiting.append(pending)
        lane.queued += 1
        return pending

    def abort(self, pending: Pending) -> None:
        """Nobody waits for the answer any more."""
        if not pending.done:
            self._leave(pending)

    def _full(self, lane: Lane) -> ModelworksError:
        name, queued = lane.route.name, lane.queued
        if any(peer.usable for peer in lane.peers):
            return RateLimited(
                f"{queued} calls wait for {name!r} already; try again in a moment", code="queue_full", retry_after=1.0
            )
        return Unavailable(
            f"no replica of {name!r} is ready and {queued} calls wait already", code="queue_full", retry_after=2.0
        )

    def _send(self, pending: Pending, peer: Peer) -> None:
        """Put a call aboard; its link may have gone since it was picked, or its tensors may be too large."""
        assert peer.link is not None
        try:
            pending.number = peer.link.start(pending.call, lambda item: self._arrived(pending, item))
        except LinkLost:
            self._queue_again(pending)
            return
        pending.peer = peer
        peer.suspect = peer.suspect or pending.deaths > 0
        self._aboard.add(pending)

    def _arrived(self, pending: Pending, item: Part | ModelworksError) -> None:
        """What the link brings for a call that is aboard."""
        if pending.done:
            return
        if isinstance(item, LinkLost):
            self._lost(pending, died=not item.expected)
            return
        if isinstance(item, ModelworksError) and item.code in ("draining", "replica_full"):
            self._lost(pending, died=False)  # refused before it ran
            return
        last = isinstance(item, ModelworksError) or item.done
        pending.begun = True
        lane = pending.lane
        if last:
            self._leave(pending)
        try:
            pending.deliver(item)
        finally:
            if last and lane.queued:
                self._pump(lane)

    def _lost(self, pending: Pending, *, died: bool) -> None:
        """Its replica is gone, hangs or refused it: send it elsewhere if that is safe."""
        call = pending.call
        self._leave(pending)
        pending.done = False
        pending.deaths += died
        if pending.begun or not call.idempotent:
            self._fail(
                pending,
                Unavailable(
                    "the replica went away while it worked on this call, which may have run; it was not repeated",
                    code="replica_lost",
                    retry_after=1.0,
                ),
            )
        elif pending.deaths >= POISON_DEATHS:
            log.error("poison_call", deployment=call.deployment, request_id=call.request_id)
            self._fail(
                pending,
                ModelworksError(
                    f"{pending.deaths} replicas died with this call aboard; it is not tried again", code="poison_call"
                ),
            )
        elif pending.retries >= MAX_RETRIES:
            self._fail(
                pending,
                Unavailable(
                    f"the call was given to {pending.retries + 1} replicas and none answered; try again",
                    code="replica_lost",
                    retry_after=1.0,
                ),
            )
        else:
            pending.retries += 1
            self._queue_again(pending)

    def _queue_again(self, pending: Pending) -> None:
        """To the head of the queue, or to the suspects; pumped from the loop, as links may be in the middle of failing their calls."""
        lane = pending.lane
        if lane is not self._lanes.get(lane.route.key):
            self._fail(pending, NotFound(f"the deployment {lane.route.name!r} was deleted", param="deployment"))
            return
        if pending.deaths:
            lane.suspects.append(pending)
        else:
            lane.waiting.appendleft(pending)
        lane.queued += 1
        asyncio.get_running_loop().call_soon(self._pump, lane)

    def _leave(self, pending: Pending) -> None:
        """Take a call out of wherever it is; it is done."""
        pending.done = True
        peer = pending.peer
        if peer is None:
            pending.lane.forget()
            return
        pending.peer = None
        self._aboard.discard(pending)
        if pending.deaths:
            peer.suspect = False
        if peer.link is not None:
            peer.link.abort(pending.number)

    def _fail(self, pending: Pending, error: ModelworksError) -> None:
        if pending.peer is not None:
            self._leave(pending)
        pending.done = True
        try:
            pending.deliver(error)
        except Exception:  # an edge: one caller's callback must not keep the others from theirs
            log.exception("callback_failed")

    def _pump(self, lane: Lane) -> None:
        """Send what waits to whoever is free."""
        while lane.suspects:
            if lane.suspects[0].done:
                lane.suspects.popleft()
                continue
            peer = lane.pick(suspect=True)
            if peer is None:
                break
            self._release(lane.suspects, peer)
        while lane.waiting:
            if lane.waiting[0].done:
                lane.waiting.popleft()
                continue
            peer = lane.pick()
            if peer is None:
                return
            self._release(lane.waiting, peer)

    def _release(self, queue: deque[Pending], peer: Peer) -> None:
        pending = queue.popleft()
        pending.lane.queued -= 1
        try:
            self._send(pending, peer)
        except ModelworksError as error:  # it cannot travel
            self._fail(pending, error)

    # health and deadlines

    def _changed(self, peer: Peer) -> None:
        if peer.usable:
            for lane in self._lanes.values():
                if lane.queued and peer in lane.peers:
                    self._pump(lane)

    def _tick(self) -> None:
        now = time.monotonic()
        lateness = max(0.0, now - self._last_tick - 2 * _TICK)
        self._last_tick = now
        self._ticker = asyncio.get_running_loop().call_later(_TICK, self._tick)
        for target, peer in list(self._peers.items()):
            if peer.check(now, lateness):
                self._evacuate(peer)
            if peer.retiring_until is not None and (not peer.outstanding or now >= peer.retiring_until):
                del self._peers[target]
                peer.close()
        for pending in [pending for pending in self._aboard if pending.call.deadline <= now]:
            self._leave(pending)
            self._fail(pending, DeadlineExceeded("the deadline passed before the model answered"))
        for lane in self._lanes.values():
            if lane.queued:
                self._expire(lane, now)
                self._pump(lane)

    def _expire(self, lane: Lane, now: float) -> None:
        usable = any(peer.usable for peer in lane.peers)
        for pending in [*lane.suspects, *lane.waiting]:
            if not pending.done and pending.call.deadline <= now:
                self._leave(pending)
                self._fail(pending, _late(lane, usable))

    def _evacuate(self, peer: Peer) -> None:
        """A hung replica's calls go elsewhere, where that is safe and there is an elsewhere; else they wait for it."""
        for pending in [pending for pending in self._aboard if pending.peer is peer]:
            others = any(other.usable for other in pending.lane.peers)
            if others and pending.call.idempotent and not pending.begun:
                self._lost(pending, died=False)

    async def drain(self, seconds: float) -> bool:
        """Take no more calls and wait for those outstanding; True when none is left."""
        self._closed = True
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self._aboard and not any(lane.queued for lane in self._lanes.values()):
                return True
            await asyncio.sleep(0.01)
        return False

    def close(self) -> None:
        """Fail what is left and close all links."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
        left = [
            *self._aboard,
            *(pending for lane in self._lanes.values() for pending in (*lane.waiting, *lane.suspects)),
        ]
        for pending in left:
            if not pending.done:
                self._leave(pending)
                self._fail(pending, Unavailable("the server is stopping", code="stopping", retry_after=2.0))
        for peer in self._peers.values():
            peer.retiring_until = 0.0
            peer.close()


def _late(lane: Lane, usable: bool) -> ModelworksError:
    if usable:
        return DeadlineExceeded(f"the deadline passed while the call waited for a free replica of {lane.route.name!r}")
    return Unavailable(
        f"no replica of {lane.route.name!r} became ready before the deadline; try again",
        code="no_ready_replica",
        retry_after=1.0,
    )
