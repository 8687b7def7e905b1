"""The replica's end of the channel: sessions admit calls into one batcher, and its answers go back by them."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from modelworks.core.errors import ModelworksError, Unavailable
from modelworks.core.telemetry import logger
from modelworks.serve import wire
from modelworks.serve.batcher import Batch, Batcher, Item, Step
from modelworks.serve.channel import Channel
from modelworks.serve.wire import Part, WireError

INLINE_BELOW = 300e-6  # a batch expected to take less runs in the loop: a thread costs more than it frees
_HANDSHAKE = 5.0  # seconds for the secret to arrive
_MAX_SESSIONS = 256
_SMOOTHING = 0.2

log = logger("replica")
Results = list[tuple[Item, Part | ModelworksError]]


class Host:
    """Serves one batcher on a Unix socket. Everything but the model itself runs in the loop's thread."""

    def __init__(
        self, batcher: Batcher, *, secret: str, replica_id: str, model_version: str, queue_limit: int = 4096
    ) -> None:
        if len(secret) < 32:
            raise ValueError("a replica needs a secret of at least 32 characters")
        self.replica_id = replica_id
        self.model_version = model_version
        self.draining = False
        self.sessions: set[Session] = set()
        self.batch_seconds = 0.0  # moving average; 0: not measured
        self._secret = secret.encode()
        self._batcher = batcher
        self._queue_limit = queue_limit
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._server: asyncio.Server | None = None
        self._busy = False
        self._turn_due = False
        self._timer: asyncio.TimerHandle | None = None

    async def listen(self, endpoint: str) -> None:
        """Open the socket (0600); a stale file of that name is replaced."""
        Path(endpoint).unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = await self._loop.create_unix_server(lambda: Session(self), endpoint)
        finally:
            os.umask(mask)

    async def drain(self, seconds: float) -> bool:
        """Take no more calls, finish those aboard for up to `seconds`, then close. True when all were finished."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for session in self.sessions:
            session.send(wire.plain(wire.DRAIN))
        until = time.monotonic() + seconds
        while len(self._batcher) and time.monotonic() < until:
            await asyncio.sleep(0.005)
        finished = not len(self._batcher)
        for session in list(self.sessions):
            session.close()
        while self.sessions and time.monotonic() < until:
            await asyncio.sleep(0.005)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return finished

    def knows(self, secret: str) -> bool:
        return hmac.compare_digest(secret.encode(), self._secret)

    def admit(self, session: Session, number: int, frame: bytes, start: int, stop: int) -> None:
        head, tensors = wire.read_call(frame, start, stop)
        id = (session, number)
        try:
            if self.draining:
                raise Unavailable("the replica is about to stop; try again", code="draining", retry_after=0.1)
            if self._batcher.waiting >= self._queue_limit:
                raise Unavailable("the replica's queue is full; try again", code="replica_full", retry_after=1.0)
            self._batcher.admit(id, tensors, time.monotonic() + head.remaining)
        except ModelworksError as error:
            session.send(wire.error(number, error))
            return
        session.numbers.add(number)
        self._wake()

    def abort(self, session: Session, number: int) -> None:
        session.numbers.discard(number)
        self._batcher.abort((session, number))

    # the model's turns: at the end of a loop's turn, so that all calls of one frame run together

    def _wake(self) -> None:
        if not self._busy and not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._busy or not self._batcher.waiting:
            return
        delay = self._batcher.delay()
        if delay > 0:
            if self._timer is None:
                self._timer = self._loop.call_later(delay, self._timed)
            return
        batch, expired = self._batcher.take()
        self._send(expired)
        if batch is None:
            return
        if 0 < self.batch_seconds < INLINE_BELOW:
            begun = time.perf_counter()
            results = self._batcher.run(batch)
            self._measure(time.perf_counter() - begun)
            self._send(self._batcher.settle(results))
            if self._batcher.waiting:
                self._wake()
            return
        self._busy = True
        self._loop.run_in_executor(self._pool, _timed_run, self._batcher.run, batch).add_done_callback(self._ran)

    def _timed(self) -> None:
        self._timer = None
        self._wake()

    def _ran(self, future: asyncio.Future[tuple[Results, float]]) -> None:
        self._busy = False
        if future.cancelled():
            return
        results, seconds = future.result()
        self._measure(seconds)
        self._send(self._batcher.settle(results))
        if self._batcher.waiting:
            self._wake()

    def _measure(self, seconds: float) -> None:
        self.batch_seconds += (seconds - self.batch_seconds) * (_SMOOTHING if self.batch_seconds else 1.0)

    def _send(self, steps: list[Step]) -> None:
        for id, item, done in steps:
            session, number = cast("tuple[Session, int]", id)
            if number not in session.numbers:
                continue
            if done:
                session.numbers.discard(number)
            if isinstance(item, Part):
                try:
                    session.send(wire.part(number, item))
                    continue
                except ModelworksError as error:  # too large to travel
                    item = error
            session.send(wire.error(number, item))


def _timed_run(run: Callable[[Batch], Results], batch: Batch) -> tuple[Results, float]:
    begun = time.perf_counter()
    return run(batch), time.perf_counter() - begun


class Session(Channel):
    """One gateway's connection, as the replica sees it. Nothing is taken before the secret was shown."""

    def __init__(self, host: Host) -> None:
        super().__init__(wire.MAX_HELLO)
        self.host = host
        self.numbers: set[int] = set()  # calls aboard
        self._trusted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.host.sessions.add(self)
        if len(self.host.sessions) > _MAX_SESSIONS:
            transport.close()
        self.loop.call_later(_HANDSHAKE, self._expect_hello)

    def _expect_hello(self) -> None:
        if not self._trusted and self.transport is not None:
            self.transport.abort()

    def on_message(self, kind: int, number: int, frame: bytes, start: int, stop: int) -> None:
        if not self._trusted:
            self._greet(kind, frame[start:stop])
        elif kind == wire.CALL:
            if number in self.numbers:
                raise WireError(f"call id {number} is in use")
            self.host.admit(self, number, frame, start, stop)
        elif kind == wire.ABORT:
            self.host.abort(self, number)
        elif kind == wire.PING:
            self.send(wire.plain(wire.PONG, number))
        else:
            raise WireError(f"a message of kind {kind} from a gateway")

    def _greet(self, kind: int, payload: bytes) -> None:
        if kind != wire.HELLO:
            raise WireError("the first message was no hello")
        hello = wire.read_hello(payload)
        if hello.version != wire.VERSION or not self.host.knows(hello.secret):
            raise WireError("a hello of another version or without the right secret")
        self._trusted = True
        self.allow(wire.MAX_FRAME)
        self.send(wire.ready(self.host.replica_id, self.host.model_version))
        if self.host.draining:
            self.send(wire.plain(wire.DRAIN))

    def pause_writing(self) -> None:
        """The gateway does not read its answers: take nothing more from it until it does."""
        super().pause_writing()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def on_lost(self) -> None:
        self.host.sessions.discard(self)
        for number in list(self.numbers):
            self.host.abort(self, number)
