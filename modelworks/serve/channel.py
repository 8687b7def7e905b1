"""Both ends of the gateway-replica connection: `Channel` moves frames, `Link` is the gateway's end of it.

Messages sent in one turn of the loop leave in one frame, with one system call. A reader that is slow pauses its writer.
No callback's failure reaches the others that share a link.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from modelworks.core.errors import ModelworksError, Unavailable
from modelworks.core.telemetry import logger
from modelworks.core.types import Answer, Call
from modelworks.serve import wire
from modelworks.serve.wire import Part, WireError

_HIGH_WATER = 4 * 1024 * 1024
_JOIN_UP_TO = 256 * 1024  # a frame up to this size is copied into one piece, a larger one is written piece by piece
_MAX_ID = 2**32 - 1

log = logger("channel")
Deliver = Callable[[Part | ModelworksError], None]


class LinkLost(Unavailable):
    """The connection to a replica broke while a call was aboard. `expected`: it was closed in good order."""

    default_code = "replica_lost"
    expected = False


class Channel(asyncio.Protocol):
    """Frames in, frames out. Subclasses implement `on_message` and `on_lost`."""

    def __init__(self, limit: int = wire.MAX_HELLO) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.congested = False
        self._reader = wire.FrameReader(limit)
        self._out: list[bytes] = []
        self._out_size = 0
        self._scheduled = False

    def on_message(self, kind: int, number: int, frame: bytes, start: int, stop: int) -> None:
        raise NotImplementedError

    def on_lost(self) -> None:
        raise NotImplementedError

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def allow(self, limit: int) -> None:
        """Accept frames up to `limit` bytes from now on."""
        self._reader.limit = limit

    def send(self, pieces: list[bytes]) -> None:
        """Put a message (as the `wire` functions make it) into this turn's frame."""
        size = 0
        for piece in pieces:
            size += len(piece)
        if self._out_size + size > wire.MAX_FRAME:
            self.flush()
        self._out += pieces
        self._out_size += size
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._flush_turn)

    def _flush_turn(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write what was sent, as one frame."""
        pieces, size = self._out, self._out_size
        if not pieces:
            return
        self._out, self._out_size = [], 0
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        pieces.insert(0, size.to_bytes(4, "little"))
        if size <= _JOIN_UP_TO:
            transport.write(b"".join(pieces))
        else:
            transport.writelines(pieces)

    def close(self) -> None:
        """Write what is buffered, then close."""
        if self.transport is not None:
            self.flush()
            self.transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self.transport.set_write_buffer_limits(high=_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        try:
            for frame, start, stop in self._reader.feed(data):
                for kind, number, first, last in wire.messages(frame, start, stop):
                    self.on_message(kind, number, frame, first, last)
                    if not self.open:
                        return
        except WireError as problem:
            self.on_malformed(problem)
            if self.transport is not None:
                self.transport.abort()

    def on_malformed(self, problem: WireError) -> None:
        log.warning("connection_refused", reason=str(problem))

    def pause_writing(self) -> None:
        self.congested = True

    def resume_writing(self) -> None:
        self.congested = False

    def connection_lost(self, error: Exception | None) -> None:
        self._out, self._out_size = [], 0
        self.on_lost()


class Link(Channel):
    """A gateway's connection to one replica, shared by all calls that go there.

    `on_change(link)` is called when it becomes ready, is drained by the replica, uncongested or lost.
    """

    def __init__(self, secret: str, on_change: Callable[[Link], None] | None = None) -> None:
        super().__init__(wire.MAX_FRAME)
        self.calls: dict[int, Deliver] = {}
        self.ready = False
        self.draining = False
        self.lost = False
        self.model_version = ""
        self.replica_id = ""
        self.ping_sent: float | None = None  # when the ping that is not answered yet was sent
        self.last_ping = 0.0
        self.opened: asyncio.Future[None] = self.loop.create_future()
        self._secret = secret
        self._on_change = on_change
        self._next = 0
        self._closing = False

    @property
    def usable(self) -> bool:
        """Whether a new call may be sent."""
        return self.ready and not self.draining and not self.congested and not self.lost

    # calls

    def start(self, call: Call, deliver: Deliver) -> int:
        """Send a call; `deliver` gets each part, or one error. Returns the id for `abort`."""
        if self.lost or not self.ready:
            raise self._loss()
        number = self._next = self._next + 1 if self._next < _MAX_ID else 1
        while number in self.calls:
            number = self._next = self._next + 1 if self._next < _MAX_ID else 1
        self.send(wire.call(number, call, call.deadline - time.monotonic()))
        self.calls[number] = deliver
        return number

    def abort(self, number: int) -> None:
        """Forget a call; the replica stops working on it. Unknown ids are ignored."""
        if self.calls.pop(number, None) is not None and not self.lost:
            self.send(wire.plain(wire.ABORT, number))

    async def call(self, call: Call) -> Answer:
        """The whole answer of a call. Cancelling the awaiting task aborts the call."""
        outputs: list[Any] = []
        version = ""
        async for part in self.stream(call):
            outputs.extend(part.outputs)
            version = part.model_version
        return Answer(outputs, version)

    async def stream(self, call: Call) -> AsyncIterator[Part]:
        """The parts of a call as they come. Leaving the loop early aborts it."""
        arrived: asyncio.Queue[Part | ModelworksError] = asyncio.Queue()
        number = self.start(call, arrived.put_nowait)
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, ModelworksError):
                    raise item
                yield item
                if item.done:
                    return
        finally:
            self.abort(number)

    def ping(self, now: float) -> None:
        self.last_ping = self.ping_sent = now
        self.send(wire.plain(wire.PING))

    def close(self) -> None:
        self._closing = True
        super().close()

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(wire.hello(self._secret))

    def on_message(self, kind: int, number: int, frame: bytes, start: int, stop: int) -> None:
        if kind == wire.PART:
            part = wire.read_part(frame, start, stop)
            deliver = self.calls.pop(number, None) if part.done else self.calls.get(number)
            if deliver is not None:
                self._deliver(deliver, part)
        elif kind == wire.ERROR:
            error = wire.read_error(frame[start:stop])
            deliver = self.calls.pop(number, None)
            if deliver is not None:
                self._deliver(deliver, error)
        elif kind == wire.PONG:
            self.ping_sent = None
        elif kind == wire.READY:
            greeting = wire.read_ready(frame[start:stop])
            self.replica_id, self.model_version = greeting.replica_id, greeting.model_version
            self.ready = True
            if not self.opened.done():
                self.opened.set_result(None)
            self._changed()
        elif kind == wire.DRAIN:
            self.draining = True
            self._changed()
        else:
            raise WireError(f"a message of kind {kind} from a replica")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._changed()

    def on_lost(self) -> None:
        self.lost = True
        if not self.opened.done():
            self.opened.set_exception(self._loss())
            self.opened.exception()  # looked at, so that nobody waiting is no warning
        calls, self.calls = self.calls, {}
        for deliver in calls.values():
            self._deliver(deliver, self._loss())
        self._changed()

    def _loss(self) -> LinkLost:
        loss = LinkLost("the replica went away before it answered; try again", retry_after=1.0)
        loss.expected = self._closing or self.draining
        return loss

    def _deliver(self, deliver: Deliver, item: Part | ModelworksError) -> None:
        try:
            deliver(item)
        except Exception:  # an edge: one caller's bug must not cut the link that all callers share
            log.exception("callback_failed")

    def _changed(self) -> None:
        if self._on_change is not None:
            try:
                self._on_change(self)
            except Exception:  # as above
                log.exception("callback_failed")


async def connect(
    endpoint: str, secret: str, *, timeout: float = 5.0, on_change: Callable[[Link], None] | None = None
) -> Link:
    """A ready link to the replica at the Unix socket `endpoint`; LinkLost, OSError or TimeoutError if there is none."""
    async with asyncio.timeout(timeout):
        _, link = await asyncio.get_running_loop().create_unix_connection(lambda: Link(secret, on_change), endpoint)
        try:
            await link.opened
        except BaseException:
            link.close()
            raise
    return link
