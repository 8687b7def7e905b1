"""One replica as a gateway's router sees it: keeps a link open, tells whether it is healthy, and lets it go gently."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

from modelworks.core.telemetry import logger
from modelworks.serve.breaker import Breaker
from modelworks.serve.channel import Link, LinkLost, connect
from modelworks.serve.routes import Target

PING_EVERY = 0.5
HUNG_AFTER = 2.5  # with the ping's interval, a replica that hangs is noticed within 3 seconds
_FIRST_RETRY, _LAST_RETRY = 0.02, 0.5
_FIRST_BELIEF, _LAST_BELIEF = 0.1, 5.0  # seconds that a replica is believed when it says that an input is bad
_MIN_WINDOW, _MAX_WINDOW = 2.0, 65536.0
_QUEUE_SECONDS = 0.005  # beside two runs of the model, what a call may queue in a replica that is kept busy

Connect = Callable[..., Awaitable[Link]]

log = logger("router")


class PeerState(msgspec.Struct, frozen=True):
    """What a gateway knows of a replica. `hung_seconds`: for how long it has not answered, once that is too long."""

    replica_id: str
    connected: bool
    outstanding: int
    hung_seconds: float
    draining: bool
    memory: int = 0  # resident bytes, as the replica last said; 0: not known
    broken: bool = False  # its circuit breaker is open


class Peer:
    """Connects, reconnects with back-off, and pings. `on_change(peer)`: its state changed."""

    def __init__(
        self,
        target: Target,
        secret: str,
        on_change: Callable[[Peer], None],
        *,
        connect: Connect = connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self.link: Link | None = None
        self.hung = False
        self.breaker = Breaker()
        self.window = (
            _MAX_WINDOW  # calls it is given while others wait: enough to keep it busy, few enough to stay fair
        )
        self.retiring_until: float | None = None  # set: no new calls; closed when those aboard are done, or then
        self.suspect = False  # a call that a replica died with is aboard, and no second one may join
        self.believed_until = 0.0
        self._belief = _FIRST_BELIEF
        self._secret = secret
        self._on_change = on_change
        self._connect_to = connect
        self._clock = clock
        self._narrowed = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        link = self.link
        if link is None or self.hung or self.retiring_until is not None or not link.usable:
            return False
        breaker = self.breaker
        return not breaker.failures or not (breaker.open or (breaker.trial and link.calls))

    @property
    def outstanding(self) -> int:
        link = self.link
        return len(link.calls) if link is not None else 0

    @property
    def waiting(self) -> int:
        """Calls that wait inside the replica, as its last pong told."""
        link = self.link
        return link.stats.waiting if link is not None else 0

    def load(self) -> int:
        """Calls outstanding, or -1 where a new one may not be sent: it is not usable, or kept busy. The hot path's one look."""
        link = self.link
        if link is None or self.hung or self.retiring_until is not None or not link.usable:
            return -1
        count = len(link.calls)
        if count >= self.window:
            return -1
        breaker = self.breaker
        return -1 if breaker.failures and (breaker.open or (breaker.trial and count)) else count

    def open(self) -> None:
        self.retiring_until = None
        if self._task is None and (self.link is None or self.link.lost):
            self._task = asyncio.get_running_loop().create_task(self._connect())

    def retire(self, seconds: float) -> None:
        """No new calls; close once those aboard are answered, at the latest in `seconds`."""
        if self.retiring_until is None:
            self.retiring_until = self._clock() + seconds

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self.link is not None:
            self.link.close()

    def check(self, now: float, lateness: float) -> bool:
        """Ping, and judge the last ping; `lateness`: seconds this loop itself stood still. True: just found hung."""
        if self.breaker.look(now):
            self._on_change(self)
        link = self.link
        if link is None or not link.ready or link.lost:
            return False
        if link.ping_sent is None:
            if self.hung:
                self.hung = False
                log.info("replica_answers_again", replica=self.target.replica_id)
                self._on_change(self)
            if now - link.last_ping >= PING_EVERY:
                link.ping(now)
            return False
        link.ping_sent += lateness
        if not self.hung and now - link.ping_sent >= HUNG_AFTER:
            self.hung = True
            log.warning("replica_hung", replica=self.target.replica_id, seconds=round(now - link.ping_sent, 1))
            return True
        return False

    def fail(self, now: float, reason: str, *, may_open: bool) -> None:
        """Note a failure that is the replica's own."""
        if self.breaker.failed(now, may_open=may_open):
            pause = round(self.breaker.until - now, 1)
            log.warning("replica_avoided", replica=self.target.replica_id, reason=reason, seconds=pause)

    def judge(self, now: float, *, bad_input: bool) -> None:
        """Another replica was asked about an input on which this one's model failed. Where it is the input's fault, this
        one is believed for a while, ever longer, as opinions cost runs of the model."""
        if bad_input:
            self.believed_until = now + self._belief
            self._belief = min(_LAST_BELIEF, self._belief * 2)
        else:
            self._belief = _FIRST_BELIEF

    def succeed(self) -> None:
        """It answered although it had failed before."""
        tried = self.breaker.trial
        self.breaker.succeeded()
        if tried:
            log.info("replica_trusted_again", replica=self.target.replica_id)
            self._on_change(self)

    def adapt(self, now: float, queued: float, run: float, wait: float) -> None:
        """Set `window` by an answer's own seconds in the replica's queue and in the model, while calls wait here.

        What queues in a replica is beyond the reach of fairness and priority: it should be about the next batch, no more.
        """
        if queued <= 2 * run + _QUEUE_SECONDS + wait:
            self.window = min(_MAX_WINDOW, self.window + 0.5)
        elif now >= self._narrowed:
            self.window = max(_MIN_WINDOW, min(self.window, self.outstanding + 1.0) * 0.8)
            self._narrowed = now + queued  # once a queue's length, as the effect is not seen before

    def state(self, now: float) -> PeerState:
        link = self.link
        sent = link.ping_sent if link is not None and self.hung else None
        return PeerState(
            self.target.replica_id,
            link is not None and link.ready and not link.lost,
            self.outstanding,
            now - sent if sent is not None else 0.0,
            self.retiring_until is not None or (link is not None and link.draining),
            link.stats.memory if link is not None else 0,
            self.breaker.open,
        )

    async def _connect(self) -> None:
        pause = _FIRST_RETRY
        told = False
        while True:
            try:
                self.link = await self._connect_to(self.target.endpoint, self._secret, on_change=self._changed)
            except (OSError, TimeoutError, LinkLost) as error:
                if pause >= _LAST_RETRY and not told:
                    told = True
                    log.warning("replica_unreachable", replica=self.target.replica_id, reason=type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(_LAST_RETRY, pause * 2)
                continue
            self._task = None
            self.hung = False
            self._changed(self.link)
            return

    def _changed(self, link: Link) -> None:
        if link is not self.link:
            return  # still in its handshake
        if link.lost:
            self.link = None
            self.hung = False
            self.suspect = False
            if self.retiring_until is None:
                self.open()
        self._on_change(self)
