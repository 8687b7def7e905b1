"""Sends each call to a ready replica: the one with the fewest calls outstanding, as this gateway itself counts them.

One instance a gateway, all in the loop's thread. `apply` follows snapshots; `submit` never blocks: its answer, or one
error, comes to a callback. With no replica ready, calls wait in a bounded queue until their deadline. Which call is next
is fairness.py's to say, which replica lane.py's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from modelworks.core.errors import DeadlineExceeded, ModelworksError, NotFound, RateLimited, Unavailable
from modelworks.core.telemetry import logger
from modelworks.core.types import Call
from modelworks.serve.channel import Deliver, LinkLost, connect
from modelworks.serve.columns import Answers, Kind
from modelworks.serve.convoy import Rider
from modelworks.serve.hedging import Hedges
from modelworks.serve.lane import Lane, Pending, Seat
from modelworks.serve.peer import Connect, Peer, PeerState
from modelworks.serve.routes import Key, Route, Snapshot, Target
from modelworks.serve.wire import Part

__all__ = ["Pending", "Router"]

MAX_RETRIES = 2
POISON_DEATHS = 2
_TICK = 0.05  # seconds between looks at deadlines and health
RETIRE_SECONDS = 900.0  # beyond any call's deadline

log = logger("router")


class Router:
    """`secret`: what the replicas of this server run expect in a hello. `clock` is the one that deadlines are told by."""

    def __init__(self, secret: str, *, connect: Connect = connect, clock: Callable[[], float] = time.monotonic) -> None:
        self.number = -1
        self.retries: dict[Key, int] = {}  # deployment -> calls that were given to another replica
        self._secret = secret
        self._connect = connect
        self._clock = clock
        self._lanes: dict[Key, Lane] = {}
        self._peers: dict[Target, Peer] = {}
        self._aboard: set[Pending] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._last_tick = 0.0
        self.hedged = 0  # calls that were sent to a second replica
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
                self._peers[target] = Peer(
                    target, self._secret, self._changed, connect=self._connect, clock=self._clock
                )
            self._peers[target].open()
        for target, peer in self._peers.items():
            if target not in wanted:
                peer.retire(RETIRE_SECONDS)
        for key in [key for key in self._lanes if key not in snapshot.routes]:
            self._remove(self._lanes.pop(key))
        for key, route in snapshot.routes.items():
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = Lane(route)
            lane.follow(route)
            lane.peers = [self._peers[target] for target in route.replicas]
            self._pump(lane)
        if self._ticker is None:
            self._last_tick = self._clock()
            self._tick()

    def route(self, key: Key) -> Route | None:
        lane = self._lanes.get(key)
        return lane.route if lane else None

    def routes(self) -> list[Route]:
        return [lane.route for lane in self._lanes.values()]

    def ready(self, key: Key) -> bool:
        """Whether a replica of the deployment could be called now."""
        lane = self._lanes.get(key)
        return lane is not None and lane.usable

    def outstanding(self, key: Key) -> int:
        """Calls of a deployment that wait or are aboard."""
        lane = self._lanes.get(key)
        return lane.queued + sum(peer.outstanding for peer in lane.peers) if lane else 0

    def waiting(self, key: Key) -> int:
        """Calls of a deployment that no replica has yet."""
        lane = self._lanes.get(key)
        return lane.queued if lane else 0

    def ahead(self, key: Key) -> int:
        """Calls of a deployment that wait, here or for room in a replica, as its last sign of life told."""
        lane = self._lanes.get(key)
        return lane.queued + sum(peer.waiting for peer in lane.peers) if lane else 0

    def states(self) -> list[PeerState]:
        """All replicas as this gateway sees them, hung ones marked."""
        now = self._clock()
        return [peer.state(now) for peer in self._peers.values()]

    def _remove(self, lane: Lane) -> None:
        for pending in list(lane):
            self._leave(pending)
            self._fail(pending, NotFound(f"the deployment {lane.route.name!r} was deleted", param="deployment"))

    # calls

    def submit(self, key: Key, call: Call, deliver: Deliver, *, manual: bool = False) -> Pending:
        """Send a call, or queue it. `deliver` gets its parts or one error, always after this returned.

        `manual`: a stream whose reader tells by `took` what it has consumed; the replica waits for it when it is behind.
        NotFound for an unknown deployment, RateLimited or Unavailable at once when its queue is full.
        """
        lane = self._lanes.get(key)
        if lane is None:
            raise NotFound(f"there is no deployment {key[1]!r}", code="deployment_not_found", param="deployment")
        if self._closed:
            raise Unavailable("the server is stopping", code="stopping", retry_after=2.0)
        pending = Pending(lane, call, deliver)
        pending.manual = manual
        if not lane.queued and lane.aboard < lane.concurrency:
            peer = lane.pick_sticky(call.sticky) if call.sticky else lane.pick()
            if peer is not None:
                self._send(pending, peer)
                return pending
        if lane.route.failed:
            raise Unavailable(f"deployment {key[1]!r} serves nothing: {lane.route.failed}", code="deployment_failed")
        self._enqueue(lane, pending)
        return pending

    def submit_many(self, key: Key, kind: Kind, riders: list[Rider], remaining: float) -> bool:
        """Send calls of one kind at once, if none waits and there is room for all. False: submit them one by one."""
        lane = self._lanes.get(key)
        count = len(riders)
        if lane is None or self._closed or lane.queued or lane.hedges is not None:
            return False
        places = lane.share(count) if lane.aboard + count <= lane.concurrency else None
        if places is None:
            return False
        begun = 0
        for peer, given in places:
            group = riders if given == count else riders[begun : begun + given]
            begun += given
            for rider in group:
                rider.lane, rider.router, rider.peer = lane, self, peer
            self._send_many(lane, peer, kind, group, remaining)
        return True

    def _send_many(self, lane: Lane, peer: Peer, kind: Kind, riders: list[Rider], remaining: float) -> None:
        link = peer.link
        assert link is not None
        try:
            left = link.start_many(kind, riders, remaining)
        except LinkLost:
            left = False
        if left:
            lane.aboard += len(riders)
            self._aboard.update(riders)
            link.flush()
            return
        for rider in riders:
            rider.peer = None
            self._release(rider, peer) if peer.link is not None else self._queue_again(rider)

    def arrived_many(self, riders: list[Rider], answers: Answers) -> None:
        """The whole answers of calls that left by `submit_many`, all of one deployment, from one replica."""
        peer, lane = riders[0].peer, riders[0].lane
        assert peer is not None
        for rider in riders:
            rider.done, rider.peer = True, None
        lane.aboard -= len(riders)
        self._aboard.difference_update(riders)
        if peer.breaker.failures:
            peer.succeed()
        try:
            riders[0].convoy.finish(riders, answers)
        finally:
            if lane.queued:
                queued, run = answers.times[0] * 1e-6, answers.run_us * 1e-6
                peer.adapt(self._clock(), queued, run, lane.route.limits.wait_seconds)
                self._pump(lane)

    def abort(self, pending: Pending) -> None:
        """Nobody waits for the answer any more."""
        if not pending.done:
            self._leave(pending)
            if pending.lane.queued:
                asyncio.get_running_loop().call_soon(self._pump, pending.lane)

    def took(self, pending: Pending, parts: int = 1) -> None:
        """So many more parts of a stream were consumed."""
        if pending.peer is not None and pending.peer.link is not None:
            pending.peer.link.took(pending.number, parts)

    def _enqueue(self, lane: Lane, pending: Pending) -> None:
        """Let a call wait; in a full queue only in the place of one whose key has more waiting, or is less urgent."""
        displaced: Pending | None = None
        if lane.queued >= lane.route.limits.queue:
            displaced = lane.waiting.displaced_by(pending.call)
            if displaced is None:
                raise self._full(lane)
            self._leave(displaced)
        lane.wait(pending, self._clock())
        if displaced is not None:
            self._fail(displaced, self._full(lane, "; others have their turn"))

    def _full(self, lane: Lane, reason: str = "") -> ModelworksError:
        name, queued = lane.route.name, lane.queued
        if lane.usable:
            return RateLimited(
                f"{queued} calls wait for {name!r} already{reason}; try again in a moment",
                code="queue_full",
                retry_after=lane.relief,
                detail={"queued": queued},
            )
        return Unavailable(
            f"no replica of {name!r} is ready and {queued} calls wait already{reason}",
            code="queue_full",
            retry_after=2.0,
            detail={"queued": queued},
        )

    def _send(self, pending: Pending, peer: Peer) -> None:
        """Put a call aboard; its link may have gone since it was picked, or its tensors may be too large."""
        assert peer.link is not None
        try:
            pending.number = peer.link.start(pending.call, partial(self.arrived, pending), manual=pending.manual)
        except LinkLost:
            self._queue_again(pending)
            return
        lane = pending.lane
        pending.peer = peer
        lane.aboard += 1
        self._aboard.add(pending)
        if pending.deaths:
            peer.suspect = True
        if lane.hedges is not None and pending.call.idempotent and not pending.call.stream:
            self._note_hedge(lane, pending)

    def arrived(self, pending: Pending, item: Part | ModelworksError) -> None:
        """What the link brings for a call that is aboard."""
        if pending.done:
            return
        peer = pending.peer
        assert peer is not None
        last = True
        if isinstance(item, Part):
            last = item.done
            if peer.breaker.failures:
                peer.succeed()
        elif isinstance(item, LinkLost):
            self._lost(pending, died=not item.expected)
            return
        elif item.code in ("draining", "replica_full"):
            self._lost(pending, died=False)  # refused before it ran
            return
        elif item.status == 500:
            if item.code != "model_error":
                self._blame(peer, pending.lane, item.code)
            elif pending.doubted is None and self._ask_another(pending, peer):
                if pending.lane.queued:
                    self._pump(pending.lane)
                return
        if pending.doubted is not None:
            if peer is not pending.doubted:  # else nobody else could be asked
                self._judge(pending, item)
            pending.doubted = None
        pending.begun = True
        if pending.hedge is not None:
            self._drop_hedge(pending)
        if not last:
            pending.deliver(item)
            return
        lane = pending.lane
        pending.done = True  # as in _leave, but the link has let go of it already
        pending.peer = None
        lane.aboard -= 1
        self._aboard.discard(pending)
        if pending.deaths:
            peer.suspect = False
        try:
            pending.deliver(item)
        finally:
            if lane.queued:
                now = self._clock()
                lane.goes(now)
                if isinstance(item, Part):
                    peer.adapt(now, item.queue_us * 1e-6, item.run_us * 1e-6, lane.route.limits.wait_seconds)
                self._pump(lane)

    def _blame(self, peer: Peer, lane: Lane, reason: str) -> None:
        """A failure of the replica's own; its breaker opens only while another one can stand in."""
        others = any(other.usable for other in lane.peers if other is not peer)
        peer.fail(self._clock(), reason, may_open=others)

    def _ask_another(self, pending: Pending, accused: Peer) -> bool:
        """A model failed on an input: whose fault is it? Send the call to another replica, which will tell; False: it is
        the input's, as far as anybody knows."""
        call = pending.call
        if pending.begun or call.stream or not call.idempotent or self._clock() < accused.believed_until:
            return False
        hedge = pending.hedge
        other = pending.lane.opinion(accused) if hedge is None else hedge.peer
        if other is None:
            return False
        pending.hedge = None
        self._leave(pending)
        pending.done = False
        pending.doubted = accused
        if hedge is not None:  # another is at work on it already
            self._promote(pending, hedge)
        else:
            self._release(pending, other)
        return True

    def _judge(self, pending: Pending, item: Part | ModelworksError) -> None:
        """By what the second replica made of the call."""
        accused = pending.doubted
        assert accused is not None
        if isinstance(item, Part):
            accused.judge(self._clock(), bad_input=False)
            self._blame(accused, pending.lane, "its model fails on what another answers")
        elif item.code == "model_error":
            accused.judge(self._clock(), bad_input=True)

    def _lost(self, pending: Pending, *, died: bool) -> None:
        """Its replica is gone, hangs or refused it: send it elsewhere if that is safe."""
        call = pending.call
        hedge, pending.hedge = pending.hedge, None
        self._leave(pending)
        pending.done = False
        pending.deaths += died
        if hedge is not None and pending.deaths < POISON_DEATHS:
            self._promote(pending, hedge)
            return
        if hedge is not None:
            _abort(hedge.peer, hedge.number)
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
            self.retries[pending.lane.route.key] = self.retries.get(pending.lane.route.key, 0) + 1
            self._queue_again(pending)

    def _queue_again(self, pending: Pending) -> None:
        """To the head of the queue, or to the suspects; pumped from the loop, as links may be in the middle of failing their calls."""
        lane = pending.lane
        if lane is not self._lanes.get(lane.route.key):
            self._fail(pending, NotFound(f"the deployment {lane.route.name!r} was deleted", param="deployment"))
            return
        lane.wait_again(pending)
        asyncio.get_running_loop().call_soon(self._pump, lane)

    def _leave(self, pending: Pending) -> None:
        """Take a call out of wherever it is; it is done."""
        pending.done = True
        peer = pending.peer
        if peer is None:
            pending.lane.forget(pending)
            return
        pending.peer = None
        pending.lane.aboard -= 1
        self._aboard.discard(pending)
        if pending.deaths:
            peer.suspect = False
        _abort(peer, pending.number)
        if pending.hedge is not None:
            self._drop_hedge(pending)

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
        while lane.suspects and lane.aboard < lane.concurrency:
            peer = lane.pick(suspect=True)
            if peer is None:
                break
            pending = lane.next_suspect()
            if pending is not None:
                self._release(pending, peer)
        while lane.queued and lane.aboard < lane.concurrency:
            peer = lane.pick()
            if peer is None:
                return
            pending = lane.next(self._clock())
            if pending is None:
                return
            if pending.call.sticky:
                peer = lane.pick_sticky(pending.call.sticky) or peer
            self._release(pending, peer)

    def _release(self, pending: Pending, peer: Peer) -> None:
        try:
            self._send(pending, peer)
        except ModelworksError as error:  # it cannot travel
            self._fail(pending, error)

    # hedging: a second seat for a call that takes long; the first answer wins

    def _note_hedge(self, lane: Lane, pending: Pending) -> None:
        assert lane.hedges is not None
        if lane.hedges.note(pending, self._clock()):
            asyncio.get_running_loop().call_later(lane.hedges.after, self._hedge_due, lane, lane.hedges)

    def _hedge_due(self, lane: Lane, hedges: Hedges[Pending]) -> None:
        if self._closed or lane.hedges is not hedges:
            return
        now = self._clock()
        for pending in hedges.take(now):
            self._hedge(lane, hedges, pending)
        due = hedges.next_due()
        if due is not None:
            asyncio.get_running_loop().call_later(max(0.001, due - now), self._hedge_due, lane, hedges)

    def _hedge(self, lane: Lane, hedges: Hedges[Pending], pending: Pending) -> None:
        """Give a call a second seat if it has none, a replica is free, nobody waits for it, and the allowance holds."""
        if pending.peer is None or pending.begun or pending.hedge is not None or pending.deaths or lane.queued:
            return
        peer = lane.pick(other_than=pending.peer)
        if peer is None or peer.link is None or not hedges.pay():
            return
        seat = Seat(peer)
        try:
            seat.number = peer.link.start(pending.call, lambda item: self._hedge_arrived(pending, seat, item))
        except ModelworksError:
            return
        pending.hedge = seat
        self.hedged += 1

    def _hedge_arrived(self, pending: Pending, seat: Seat, item: Part | ModelworksError) -> None:
        if pending.done:
            return
        if pending.hedge is seat:
            if not isinstance(item, Part):  # the first seat's answer is still to come
                pending.hedge = None
                pending.deaths += isinstance(item, LinkLost) and not item.expected
                return
            first, number = pending.peer, pending.number
            assert first is not None
            self._promote(pending, seat)
            _abort(first, number)
        self.arrived(pending, item)

    def _promote(self, pending: Pending, seat: Seat) -> None:
        """The second seat becomes the only one."""
        if pending.peer is None:
            pending.lane.aboard += 1
            self._aboard.add(pending)
        pending.hedge = None
        pending.peer, pending.number = seat.peer, seat.number
        if pending.deaths:
            seat.peer.suspect = True

    def _drop_hedge(self, pending: Pending) -> None:
        seat, pending.hedge = pending.hedge, None
        assert seat is not None
        _abort(seat.peer, seat.number)

    # health and deadlines

    def _changed(self, peer: Peer) -> None:
        if peer.usable:
            for lane in self._lanes.values():
                if lane.queued and peer in lane.peers:
                    self._pump(lane)

    def _tick(self) -> None:
        now = self._clock()
        lateness = max(0.0, now - self._last_tick - 2 * _TICK)
        self._last_tick = now
        self._ticker = asyncio.get_running_loop().call_later(_TICK, self._tick)
        for target, peer in list(self._peers.items()):
            if peer.check(now, lateness):
                peer.fail(now, "hung", may_open=False)
                self._evacuate(peer)
            if peer.retiring_until is not None and (not peer.outstanding or now >= peer.retiring_until):
                del self._peers[target]
                peer.close()
        late = [pending for pending in self._aboard if pending.deadline <= now]
        for peer, lane in {pending.peer: pending.lane for pending in late if pending.peer is not None}.items():
            self._blame(peer, lane, "deadlines")
        for pending in late:
            if pending.done:
                continue
            self._leave(pending)
            self._fail(pending, DeadlineExceeded("the deadline passed before the model answered"))
        for lane in self._lanes.values():
            if lane.queued:
                self._expire(lane, now)
                self._pump(lane)

    def _expire(self, lane: Lane, now: float) -> None:
        usable = lane.usable
        for pending in [pending for pending in lane if pending.call.deadline <= now]:
            if not pending.done:
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
        until = self._clock() + seconds
        while self._clock() < until:
            if not self._aboard and not any(lane.queued for lane in self._lanes.values()):
                return True
            await asyncio.sleep(0.01)
        return False

    def close(self) -> None:
        """Fail what is left and close all links."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
        left = [*self._aboard, *(pending for lane in self._lanes.values() for pending in lane)]
        for pending in left:
            if not pending.done:
                self._leave(pending)
                self._fail(pending, Unavailable("the server is stopping", code="stopping", retry_after=2.0))
        for peer in self._peers.values():
            peer.retiring_until = 0.0
            peer.close()


def _abort(peer: Peer, number: int) -> None:
    if peer.link is not None:
        peer.link.abort(number)


def _late(lane: Lane, usable: bool) -> ModelworksError:
    if usable:
        return DeadlineExceeded(f"the deadline passed while the call waited for a free replica of {lane.route.name!r}")
    return Unavailable(
        f"no replica of {lane.route.name!r} became ready before the deadline; try again",
        code="no_ready_replica",
        retry_after=1.0,
    )
