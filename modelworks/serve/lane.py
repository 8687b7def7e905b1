"""One deployment in a gateway: its replicas, which of them a call goes to, and the calls that wait for one."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from hashlib import blake2b

from modelworks.core.types import Call
from modelworks.serve.channel import Deliver
from modelworks.serve.fairness import FairQueue
from modelworks.serve.hedging import Hedges
from modelworks.serve.metering import Meter
from modelworks.serve.peer import Peer
from modelworks.serve.routes import Route

_UNLIMITED = 2**62
_RELIEF = 60.0  # seconds after which a refused call is told to come again at the latest
_SPILL_FACTOR, _SPILL_SLACK = 2, 4  # a sticky call leaves its replica when that has more than 2 x the least + 4 calls


class Seat:
    """A second place of a call, aboard another replica."""

    __slots__ = ("number", "peer")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.number = 0


class Pending:
    """A call on its way, from `submit` until its last part or its error was delivered."""

    # what most calls never change stands here, once for all of them
    peer: Peer | None = None  # where it is aboard
    number = 0  # its id there
    hedge: Seat | None = None  # a second place
    doubted: Peer | None = None  # whose model failed on it, while another is asked for its opinion
    begun = False  # a part of its answer was delivered: it cannot be retried
    done = False
    retries = 0
    deaths = 0  # replicas that died with it aboard
    fair = False  # whether it waits, or last waited, in `Lane.waiting`
    since = 0.0
    meter: Meter | None = None  # what counts its tokens, where the dialect does not
    manual = False  # its reader says what it has consumed, by `Router.took`
    lane: Lane
    call: Call
    deliver: Deliver
    deadline: float

    def __init__(self, lane: Lane, call: Call, deliver: Deliver) -> None:
        self.lane = lane
        self.call = call
        self.deliver = deliver
        self.deadline = call.deadline


class Lane:
    """A deployment's replicas and the calls that wait for one of them."""

    def __init__(self, route: Route) -> None:
        self.peers: list[Peer] = []
        self.waiting: FairQueue[Pending] = FairQueue()
        self.again: deque[Pending] = deque()  # sent before, and come back: they go first
        self.suspects: deque[Pending] = deque()  # a replica died with them: one by one, so that few share a fate
        self.queued = 0  # calls in the three queues that are not done
        self.aboard = 0
        self.concurrency = _UNLIMITED
        self.hedges: Hedges[Pending] | None = None
        self._went = 0.0  # when the last call ended while others waited
        self._pace = 0.0  # seconds between such ends
        self.follow(route)

    def follow(self, route: Route) -> None:
        self.route = route
        limits = route.limits
        self.concurrency = limits.concurrency or _UNLIMITED
        if limits.hedge_seconds is None:
            self.hedges = None
        elif self.hedges is None or self.hedges.after != limits.hedge_seconds:
            self.hedges = Hedges(limits.hedge_seconds)

    # the queues

    def wait(self, pending: Pending, now: float) -> None:
        pending.fair = True
        self.waiting.push(pending, now)
        self.queued += 1

    def wait_again(self, pending: Pending) -> None:
        pending.fair = False
        (self.suspects if pending.deaths else self.again).append(pending)
        self.queued += 1

    def forget(self, pending: Pending) -> None:
        """A queued call is done. It is skipped when its turn comes; many such are swept out before."""
        self.queued -= 1
        if pending.fair:
            self.waiting.forget(pending)
        elif len(self.again) + len(self.suspects) > 2 * self.queued + 64:
            self.again = deque(one for one in self.again if not one.done)
            self.suspects = deque(one for one in self.suspects if not one.done)

    def next(self, now: float) -> Pending | None:
        """Take the call whose turn it is, suspects aside; None when none waits."""
        while self.again:
            pending = self.again.popleft()
            if not pending.done:
                self.queued -= 1
                return pending
        found = self.waiting.pop(now)
        if found is not None:
            self.queued -= 1
        return found

    def next_suspect(self) -> Pending | None:
        while self.suspects:
            pending = self.suspects.popleft()
            if not pending.done:
                self.queued -= 1
                return pending
        return None

    def __iter__(self) -> Iterator[Pending]:
        """All that wait."""
        for queue in (self.suspects, self.again):
            yield from (pending for pending in queue if not pending.done)
        yield from self.waiting

    def goes(self, now: float) -> None:
        """A call has ended while others wait."""
        apart = now - self._went
        self._went = now
        if apart < _RELIEF:  # else nobody waited in between
            self._pace += (apart - self._pace) * (0.1 if self._pace else 1.0)

    @property
    def relief(self) -> float:
        """Seconds in which a tenth of the queue is likely to go."""
        return min(max(self._pace * max(self.queued // 10, 1), 1.0), _RELIEF)

    # the replicas

    @property
    def usable(self) -> bool:
        return any(peer.usable for peer in self.peers)

    def pick(self, *, suspect: bool = False, other_than: Peer | None = None) -> Peer | None:
        """The usable replica with the fewest calls outstanding; None when all are away or full."""
        best: Peer | None = None
        fewest = self.route.limits.in_flight
        for peer in self.peers:
            count = peer.load()
            if count < 0 or count > fewest or (suspect and peer.suspect) or peer is other_than:
                continue
            if count < fewest or (best is not None and random.random() < 0.5):
                best, fewest = peer, count
        return best

    def opinion(self, accused: Peer) -> Peer | None:
        """Who is asked whether an input is bad on which the model of `accused` failed: also one that is kept busy."""
        others = [peer for peer in self.peers if peer is not accused and peer.usable]
        return min(others, key=lambda peer: peer.outstanding, default=None)

    def share(self, count: int) -> list[tuple[Peer, int]] | None:
        """How many of `count` calls each replica would get from `pick` one by one; None unless all find a place at once."""
        most = self.route.limits.in_flight
        if len(self.peers) == 1:
            peer = self.peers[0]
            load = peer.load()
            most = 1 if peer.breaker.trial else most
            return [(peer, count)] if load >= 0 and load + count <= min(most, peer.window) else None
        loads = {peer: load for peer in self.peers if (load := peer.load()) >= 0}
        shares = dict.fromkeys(loads, 0)
        for _ in range(count):
            free = [
                peer
                for peer, load in loads.items()
                if load < most and load < peer.window and not (load and peer.breaker.trial)
            ]
            if not free:
                return None
            peer = min(free, key=loads.__getitem__)
            loads[peer] += 1
            shares[peer] += 1
        return [(peer, share) for peer, share in shares.items() if share]

    def pick_sticky(self, sticky: str) -> Peer | None:
        """Of the replicas that are not much busier than others, the one that rendezvous hashing ranks first; None as in `pick`."""
        most = self.route.limits.in_flight
        loads = [(count, peer) for peer in self.peers if 0 <= (count := peer.load()) < most]
        if not loads:
            return None
        bound = _SPILL_FACTOR * min(count for count, _ in loads) + _SPILL_SLACK
        near = [peer for count, peer in loads if count <= bound]
        return max(near, key=lambda peer: _rank(sticky, peer.target.replica_id))


def _rank(sticky: str, replica_id: str) -> bytes:
    return blake2b(f"{replica_id}\0{sticky}".encode("utf-8", "replace"), digest_size=8).digest()
