"""Both ends of the gateway-replica connection: `Channel` moves frames, `Link` is the gateway's end of it.

Messages sent in one turn of the loop leave in one frame, with one system call. A reader that is slow pauses its writer.
No callback's failure reaches the others that share a link. Endpoints are a Unix socket's path or tcp://HOST:PORT.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

from modelworks.core.errors import InvalidInput, ModelworksError, Unavailable
from modelworks.core.telemetry import logger
from modelworks.core.types import Answer, Call
from modelworks.serve import columns, wire
from modelworks.serve.columns import MAX_KINDS, Answers, Calls, Kind, Layout, kind_of
from modelworks.serve.shm import Sharing, SharingError, Slot
from modelworks.serve.wire import Part, WireError

_HIGH_WATER = 4 * 1024 * 1024
_JOIN_UP_TO = 256 * 1024  # a frame up to this size is copied into one piece, a larger one is written piece by piece
_MAX_ID = 2**32 - 1
WINDOW = 64  # parts of one stream that may be on their way or not consumed yet
ACKNOWLEDGE = 8  # consumed parts are acknowledged so many at a time
TCP = "tcp://"

log = logger("channel")
Deliver = Callable[[Part | ModelworksError], None]


class LinkLost(Unavailable):
    """The connection to a replica broke while a call was aboard. `expected`: it was closed in good order."""

    default_code = "replica_lost"
    expected = False


class Fellow:
    """A `Deliver` of a call that left with others by `start_many`: answers that come together are told together.

    `data`: the bytes of all its tensors. A part or an error that comes alone is told by calling it.
    """

    number = 0
    rows: int
    data: bytes

    def together(self, others: list[Any]) -> bool:
        """Whether the answers of `others` (among them this) may be told by one `arrived`."""
        raise NotImplementedError

    def arrived(self, fellows: list[Any], answers: Answers) -> None:
        raise NotImplementedError

    def __call__(self, item: Part | ModelworksError) -> None:
        raise NotImplementedError


class Channel(asyncio.Protocol):
    """Frames in, frames out. Subclasses implement `on_message` and `on_lost`.

    `side`: the socket that carries file descriptors, where both ends are on one host; then large tensors are shared.
    """

    def __init__(self, limit: int = wire.MAX_HELLO, side: socket.socket | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.congested = False
        self._reader = wire.FrameReader(limit)
        self._out: list[bytes] = []
        self._out_size = 0
        self._scheduled = False
        self.sharing = Sharing(side, self.loop, self._announce, self.flush) if side is not None else None

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
            self.schedule()

    def send_now(self, message: bytes) -> None:
        """`send` and `flush` in one, where nothing else is about to leave."""
        transport = self.transport
        size = len(message)
        if self._out or self._scheduled or size > _JOIN_UP_TO or transport is None or transport.is_closing():
            self.send([message])
        else:
            transport.write(size.to_bytes(4, "little") + message)

    def schedule(self) -> None:
        """Flush at the end of this turn."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._flush_turn)

    def _flush_turn(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write what was sent, as one frame; acknowledgements of shared memory ride along."""
        if self.sharing is not None:
            for number in self.sharing.take_released():
                self.send(wire.plain(wire.FREE, number))
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

    # large tensors

    def share(self, data: bytes) -> Slot | None:
        """Put a tensor's bytes where the peer can read them; None: they go through the socket."""
        return self.sharing.pool.put(data) if self.sharing is not None else None

    def view(self, slot: Slot) -> memoryview:
        if self.sharing is None:
            raise SharingError("this connection shares no memory")
        return self.sharing.window.view(slot)

    def tidy(self) -> None:
        """Give shared memory back that was not used for a while."""
        if self.sharing is not None:
            for segment in self.sharing.pool.idle(time.monotonic()):
                self.send(wire.plain(wire.DROP, segment))

    def on_shared(self, kind: int, number: int, payload: bytes) -> None:
        """The messages about shared memory, the same in both directions. WireError for all others."""
        sharing = self.sharing
        if sharing is None or kind not in (wire.FREE, wire.SEGMENT, wire.MAPPED, wire.DROP):
            raise WireError(f"a message of kind {kind}, which has no place here")
        try:
            if kind == wire.FREE:
                sharing.pool.free(number)
            elif kind == wire.SEGMENT:
                done = sharing.accept(number, wire.read_segment(payload))
                self.send(wire.plain(wire.MAPPED, number, b"\1" if done else b"\0"))
            elif kind == wire.MAPPED:
                sharing.pool.mapped(number, payload == b"\1")
            else:
                sharing.window.detach(number)
        except SharingError as problem:
            raise WireError(str(problem)) from None

    def _announce(self, segment: int, size: int) -> None:
        self.send(wire.segment(segment, size))

    # what the transport calls

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
        if self.sharing is not None:
            self.sharing.close()
        self.on_lost()


class Link(Channel):
    """A gateway's connection to one replica, shared by all calls that go there.

    `on_change(link)` is called when it becomes ready, is drained by the replica, uncongested or lost.
    """

    def __init__(
        self, secret: str, on_change: Callable[[Link], None] | None = None, side: socket.socket | None = None
    ) -> None:
        super().__init__(wire.MAX_HELLO, side)
        self.calls: dict[int, Deliver] = {}
        self.ready = False
        self.draining = False
        self.lost = False
        self.model_version = ""
        self.replica_id = ""
        self.ping_sent: float | None = None  # when the ping that is not answered yet was sent
        self.last_ping = 0.0
        self.stats = wire.Stats()  # with the last pong
        self.opened: asyncio.Future[None] = self.loop.create_future()
        self._secret = secret
        self._nonce = os.urandom(wire.NONCE)
        self._proven = False  # the replica has shown that it has the secret
        self._on_change = on_change
        self._next = 0
        self._closing = False
        self._manual: set[int] = set()  # calls whose reader says itself what it has consumed
        self._owed: dict[int, int] = {}  # parts consumed and not acknowledged yet, by call
        self._kinds: dict[Kind, Calls | None] = {}  # that the replica knows; None: such calls travel by themselves
        self._filled: list[Calls] = []  # those that hold calls of this turn
        self._forms: dict[int, tuple[str, Layout]] = {}  # of answers: model version and layout

    @property
    def usable(self) -> bool:
        """Whether a new call may be sent."""
        return self.ready and not self.draining and not self.congested and not self.lost

    # calls

    def start(self, call: Call, deliver: Deliver, *, manual: bool = False) -> int:
        """Send a call; `deliver` gets each part, or one error. Returns the id for `abort`.

        `manual`: whoever reads the parts calls `took` for them; the replica pauses the stream when it is WINDOW ahead.
        Otherwise a part counts as consumed once `deliver` returned.
        """
        if self.lost or not self.ready:
            raise self._loss()
        number = self._next = self._next + 1 if self._next < _MAX_ID else 1
        while number in self.calls:
            number = self._next = self._next + 1 if self._next < _MAX_ID else 1
        if call.params or call.stream or not self._join(number, call):
            share = self.share if self.sharing is not None else None
            self.send(wire.call(number, call, call.deadline - time.monotonic(), share))
        self.calls[number] = deliver
        if manual:
            self._manual.add(number)
        return number

    def start_many(self, kind: Kind, riders: Sequence[Fellow], remaining: float) -> bool:
        """Send calls of one kind, whose tensors are of fixed size; False: they must travel one by one."""
        if self.lost or not self.ready:
            raise self._loss()
        calls = self._kinds[kind] if kind in self._kinds else self._meet(kind)
        numbers = range(self._next + 1, self._next + 1 + len(riders))
        if calls is None or calls.layout.texts or numbers.stop > _MAX_ID or not self.calls.keys().isdisjoint(numbers):
            return False
        self._next = numbers.stop - 1
        if not calls.numbers:
            self._filled.append(calls)
            self.schedule()
        calls.add_many(numbers, [rider.rows for rider in riders], [rider.data for rider in riders], remaining)
        self.calls.update(zip(numbers, riders, strict=True))
        for number, rider in zip(numbers, riders, strict=True):
            rider.number = number
        return True

    def _join(self, number: int, call: Call) -> bool:
        """Let a call leave together with the others of its kind; False: it must travel by itself."""
        tensors = call.inputs
        kind = call.kind or kind_of(tensors)
        try:
            calls = self._kinds[kind]
        except KeyError:
            calls = self._meet(kind)
        if calls is None:
            return False
        rows = calls.layout.rows(tensors)
        if rows < 0:
            return False
        if not calls.numbers:
            self._filled.append(calls)
            self.schedule()
        calls.add(number, tensors, rows, call.deadline - time.monotonic())
        return True

    def _meet(self, kind: Kind) -> Calls | None:
        if len(self._kinds) >= MAX_KINDS:
            return None
        calls: Calls | None = None
        try:
            layout = Layout.of(kind)
            if layout is not None:
                self.send(columns.kind(len(self._kinds), kind))
                calls = Calls(len(self._kinds), layout)
        except (WireError, ValueError, OverflowError):  # by itself it is refused in words
            calls = None
        self._kinds[kind] = calls
        return calls

    def send(self, pieces: list[bytes]) -> None:
        if self._filled:  # what was begun before leaves before
            self._gather()
        super().send(pieces)

    def flush(self) -> None:
        if self._filled:
            self._gather()
        super().flush()

    def _gather(self) -> None:
        filled, self._filled = self._filled, []
        for calls in filled:
            super().send([calls.message()])

    def abort(self, number: int) -> None:
        """Forget a call; the replica stops working on it. Unknown ids are ignored."""
        if self._forget(number) is not None and not self.lost:
            self.send(wire.plain(wire.ABORT, number))

    def took(self, number: int, parts: int = 1) -> None:
        """So many more parts of a call were consumed: its stream may go on. Unknown ids are ignored."""
        if number in self.calls and not self.lost:
            owed = self._owed.get(number, 0) + parts
            if owed >= ACKNOWLEDGE:
                self.send(wire.credit(number, owed))
                owed = 0
            self._owed[number] = owed

    def _forget(self, number: int) -> Deliver | None:
        self._manual.discard(number)
        self._owed.pop(number, None)
        return self.calls.pop(number, None)

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
        number = self.start(call, arrived.put_nowait, manual=True)
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, ModelworksError):
                    raise item
                yield item
                if item.done:
                    return
                self.took(number)
        finally:
            self.abort(number)

    def ping(self, now: float) -> None:
        self.last_ping = self.ping_sent = now
        self.send(wire.plain(wire.PING))
        self.tidy()

    def close(self) -> None:
        self._closing = True
        super().close()

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(wire.hello(self._nonce))

    def on_message(self, kind: int, number: int, frame: bytes, start: int, stop: int) -> None:
        if not self._proven:
            self._check(kind, frame[start:stop])
        elif kind == wire.PARTS:
            self._answered(number, frame, start, stop)
        elif kind == wire.PART:
            part = wire.read_part(frame, start, stop, self.view)
            deliver = self._forget(number) if part.done else self.calls.get(number)
            if deliver is not None:
                self._deliver(deliver, part)
                if not part.done and number not in self._manual:
                    self.took(number)
        elif kind == wire.ERROR:
            error = wire.read_error(frame[start:stop])
            deliver = self._forget(number)
            if deliver is not None:
                self._deliver(deliver, error)
        elif kind == wire.PONG:
            self.ping_sent = None
            self.stats = wire.read_pong(frame[start:stop])
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
        elif kind == wire.FORM:
            if number >= MAX_KINDS:
                raise WireError(f"a form of the number {number}")
            self._forms[number] = columns.read_form(frame[start:stop])
        else:
            self.on_shared(kind, number, frame[start:stop])

    def _answered(self, number: int, frame: bytes, start: int, stop: int) -> None:
        """Answers of one batch."""
        form = self._forms.get(number)
        if form is None:
            raise WireError(f"answers of the form {number}, which was not announced")
        answers = columns.read_answers(*form, frame, start, stop)
        pop, manual = self.calls.pop, self._manual
        delivers = [pop(number, None) for number in answers.numbers]
        first = delivers[0]
        if isinstance(first, Fellow) and first.together(delivers):
            try:
                first.arrived(delivers, answers)
            except Exception:  # as in _deliver
                log.exception("callback_failed")
            return
        for number, deliver, part in zip(answers.numbers, delivers, answers.parts(), strict=True):
            if deliver is not None:
                if manual:
                    manual.discard(number)
                self._deliver(deliver, part)

    def _check(self, kind: int, payload: bytes) -> None:
        """Nothing is taken from a replica, and no call given to it, before it has proven to have the secret."""
        if kind != wire.CHALLENGE:
            raise WireError("a replica that did not prove itself")
        challenge = wire.read_challenge(payload)
        expected = wire.proof(self._secret, "replica", self._nonce, challenge.nonce)
        if len(challenge.nonce) != wire.NONCE or not hmac.compare_digest(challenge.proof, expected):
            raise WireError("a replica without the right secret")
        self._proven = True
        self.allow(wire.MAX_FRAME)
        self.send(wire.plain(wire.PROOF, 0, wire.proof(self._secret, "gateway", self._nonce, challenge.nonce)))

    def resume_writing(self) -> None:
        super().resume_writing()
        self._changed()

    def on_lost(self) -> None:
        self.lost = True
        if not self.opened.done():
            self.opened.set_exception(self._loss())
            self.opened.exception()  # looked at, so that nobody waiting is no warning
        calls, self.calls = self.calls, {}
        self._manual.clear()
        self._owed.clear()
        self._filled.clear()
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
    endpoint: str,
    secret: str,
    *,
    timeout: float = 5.0,
    on_change: Callable[[Link], None] | None = None,
    share: bool = True,
) -> Link:
    """A ready link to the replica at `endpoint`; LinkLost, OSError or TimeoutError if there is none.

    `share`: use shared memory for large tensors, where the endpoint is on this host.
    """
    async with asyncio.timeout(timeout):
        loop = asyncio.get_running_loop()
        side = None
        if endpoint.startswith(TCP):
            carrier = await _dial_tcp(endpoint)
        else:
            carrier, side = await _dial_unix(endpoint, share)
        try:
            create: Any = loop.create_connection if endpoint.startswith(TCP) else loop.create_unix_connection
            _, link = await create(lambda: Link(secret, on_change, side), sock=carrier)
        except BaseException:
            carrier.close()
            if side is not None:
                side.close()
            raise
        try:
            await link.opened
        except BaseException:
            link.close()
            raise
    return cast(Link, link)


async def _dial_unix(endpoint: str, share: bool) -> tuple[socket.socket, socket.socket | None]:
    """A connected socket, and the socket for file descriptors, whose other end went over as the first byte's passenger."""
    carrier = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    side: socket.socket | None = None
    try:
        carrier.setblocking(False)
        await asyncio.get_running_loop().sock_connect(carrier, endpoint)
        if not share:
            carrier.send(b"\0")
            return carrier, None
        side, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(carrier, [b"\0"], [theirs.fileno()])
    except BaseException:
        carrier.close()
        if side is not None:
            side.close()
        raise
    return carrier, side


async def _dial_tcp(endpoint: str) -> socket.socket:
    host, port = tcp_address(endpoint)
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    carrier = socket.socket(family, kind, protocol)
    try:
        carrier.setblocking(False)
        carrier.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(carrier, address)
    except BaseException:
        carrier.close()
        raise
    return carrier


def tcp_address(endpoint: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT or tcp://[IPV6]:PORT; InvalidInput for anything else."""
    host, _, port = endpoint.removeprefix(TCP).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not endpoint.startswith(TCP) or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidInput(f"{endpoint[:100]!r} is no endpoint; write tcp://HOST:PORT", param="endpoint")
    return host, int(port)
