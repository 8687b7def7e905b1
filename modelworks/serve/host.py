"""The replica's end of the channel: sessions admit calls into one batcher, and its answers go back by them."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from modelworks.core.errors import InvalidInput, ModelworksError, Unavailable
from modelworks.core.telemetry import logger, resident
from modelworks.core.tensors import Tensor
from modelworks.serve import columns, wire
from modelworks.serve.batcher import Batch, Batcher, Ran, Step
from modelworks.serve.channel import TCP, WINDOW, Channel, tcp_address
from modelworks.serve.checks import Block, Shape
from modelworks.serve.columns import MAX_KINDS, Arrived, Kind, Layout
from modelworks.serve.continuous import Continuous
from modelworks.serve.wire import Part, WireError

INLINE_BELOW = 300e-6  # a batch expected to take less runs in the loop: a thread costs more than it frees
_HANDSHAKE = 5.0  # seconds for the secret to arrive
_MAX_SESSIONS = 256
_SMOOTHING, _FALLING = 0.2, 0.5  # weights of a longer and of a shorter time: the first runs are not what is to come
_FEW = 8  # parts of a stream that may always be on their way; as many as a gateway may owe us an acknowledgement for
_AHEAD = 4 * 1024 * 1024  # bytes of parts beyond those few that may
_BACKLOG = 1024  # parts kept for a reader that does not read, before its call fails
_BACKLOG_BYTES = 16 * 1024 * 1024

log = logger("replica")


class Host:
    """Serves one batcher on a Unix socket or TCP. Everything but the model itself runs in the loop's thread.

    A batcher that streams may have `hold(id)` and `resume(id)`: its reader is behind, or has caught up.
    """

    def __init__(
        self,
        batcher: Batcher | Continuous,
        *,
        secret: str,
        replica_id: str,
        model_version: str,
        queue_limit: int = 4096,
    ) -> None:
        if len(secret) < 32:
            raise ValueError("a replica needs a secret of at least 32 characters")
        self.replica_id = replica_id
        self.model_version = model_version
        self.draining = False
        self.sessions: set[Session] = set()
        self.batch_seconds = 0.0  # moving average; 0: not measured
        self._secret = secret
        self._batcher = cast(Batcher, batcher)
        self._continuous = batcher if isinstance(batcher, Continuous) else None
        self._queue_limit = queue_limit
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._server: asyncio.Server | Door | None = None
        self._busy = False
        self._slow = False  # the last batch took long
        self._turn_due = False
        self._timer: asyncio.TimerHandle | None = None
        if self._continuous is not None:
            self._continuous.start(self._send_from_thread)

    async def listen(self, endpoint: str, *, addresses: Collection[str] = ()) -> str:
        """Open `endpoint`, and tell under which name: a Unix socket (0600; a stale file is replaced), or tcp://HOST:PORT.

        InvalidInput for a TCP host that is neither a loopback address nor one of the configured `addresses`.
        """
        if not endpoint.startswith(TCP):
            self._server = Door(self, endpoint)
            return endpoint
        host, port = tcp_address(endpoint)
        if not _loopback(host) and host not in addresses:
            raise InvalidInput(
                f"{host!r} is no loopback address and not among the configured addresses; add it there to listen on it",
                param="endpoint",
            )
        server = self._server = await self._loop.create_server(lambda: Session(self), host, port)
        return f"{TCP}{f'[{host}]' if ':' in host else host}:{server.sockets[0].getsockname()[1]}"

    async def drain(self, seconds: float) -> bool:
        """Take no more calls, finish those aboard for up to `seconds`, then close. True when all were finished."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for session in self.sessions:
            session.send(wire.plain(wire.DRAIN))
        until = time.monotonic() + seconds
        while self._aboard and time.monotonic() < until:
            await asyncio.sleep(0.005)
        finished = not self._aboard
        for session in list(self.sessions):
            session.close()
        while self.sessions and time.monotonic() < until:
            await asyncio.sleep(0.005)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return finished

    @property
    def waiting(self) -> int:
        """Calls aboard that the model has not begun."""
        return self._batcher.waiting

    @property
    def _aboard(self) -> bool:
        return len(self._batcher) > 0 or any(session.behind for session in self.sessions)

    def proof(self, role: str, gateway_nonce: bytes, replica_nonce: bytes) -> bytes:
        return wire.proof(self._secret, role, gateway_nonce, replica_nonce)

    def admit(self, session: Session, number: int, frame: bytes, start: int, stop: int) -> None:
        head, tensors = wire.read_call(frame, start, stop, session.view)
        self._admit(session, number, tensors, head.remaining, head.params, head.stream, head.key, head.priority)

    def _admit(
        self,
        session: Session,
        number: int,
        tensors: list[Tensor],
        remaining: float,
        params: dict[str, Any],
        stream: bool,
        key: str = "",
        priority: int = 1,
    ) -> None:
        id = (session, number)
        try:
            self._refuse_more(1)
            deadline = time.monotonic() + remaining
            if self._continuous is not None:
                self._continuous.admit(id, tensors, deadline, params, stream, key, priority)
            else:
                self._batcher.admit(id, tensors, deadline)
        except ModelworksError as error:
            session.send(wire.error(number, error))
            return
        session.numbers.add(number)
        self._wake()  # nothing to do with a continuous one, whose thread runs by itself

    def _refuse_more(self, calls: int) -> None:
        if self.draining:
            raise Unavailable("the replica is about to stop; try again", code="draining", retry_after=0.1)
        if self._batcher.waiting + calls > self._queue_limit:
            raise Unavailable("the replica's queue is full; try again", code="replica_full", retry_after=1.0)

    def admit_many(self, session: Session, calls: Arrived, frame: bytes, *, alone: bool) -> None:
        """Calls of one kind that came together; `alone`: nothing else has come behind them."""
        layout, at = calls.layout, calls.at
        numbers, rows, remaining = calls.numbers, calls.rows, calls.times
        shape: Shape | None = None
        try:
            if isinstance(self._batcher, Batcher) and not layout.texts:
                self._refuse_more(len(numbers))
                shape = self._batcher.shape(layout.kind)
        except ModelworksError:  # told of each call below
            shape = None
        if shape is None or not all(map(shape.fits, set(rows))):
            texts, fixed = layout.texts, sum(width for width in layout.widths if width > 0)
            for index, number in enumerate(numbers):
                sizes = calls.sizes[index * texts : (index + 1) * texts]
                tensors = layout.cut(frame, at, rows[index], sizes)
                at += fixed * rows[index] + sum(sizes)
                self._admit(session, number, tensors, remaining[index], {}, False)
            return
        width = layout.fixed
        if alone and len(numbers) == 1 and remaining[0] > 0 and self._at_once:
            self._answer_at_once(session, numbers[0], shape, rows[0], frame[at : at + rows[0] * width])
            return
        admitted = []
        for number, count, seconds in zip(numbers, rows, remaining, strict=True):
            stop = at + count * width
            admitted.append(((session, number), count, frame[at:stop], seconds))
            at = stop
        session.numbers.update(numbers)
        self._batcher.admit_whole(shape, admitted)
        self._wake()

    @property
    def _at_once(self) -> bool:
        """Whether a call that is alone may run in the loop, without a queue."""
        return self._batcher.idle and not self._busy and 0 < self.batch_seconds < INLINE_BELOW

    def _answer_at_once(self, session: Session, number: int, shape: Shape, rows: int, data: bytes) -> None:
        begun = time.perf_counter()
        answer, run_us = self._batcher.at_once(shape, rows, data)
        self._measure(time.perf_counter() - begun)
        if isinstance(answer, Block):
            session.answer_single(number, rows, answer, run_us)
        else:
            session.answer(number, answer, True)

    def abort(self, session: Session, number: int) -> None:
        session.forget(number)
        self._batcher.abort((session, number))

    def hold(self, session: Session, number: int, behind: bool) -> None:
        """A stream's reader is behind, or caught up: tell the batcher, if it cares."""
        tell = getattr(self._batcher, "hold" if behind else "resume", None)
        if tell is not None:
            tell((session, number))
        if not behind:
            self._wake()

    # the model's turns: at the end of a loop's turn, so that all calls of one frame run together

    def _wake(self) -> None:
        if not self._busy and not self._turn_due and self._continuous is None:
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
            ran = self._batcher.run(batch)
            self._measure(time.perf_counter() - begun)
            self._settle(ran)
            if self._batcher.waiting:
                self._wake()
            return
        self._busy = True
        self._loop.run_in_executor(self._pool, _timed_run, self._batcher.run, batch).add_done_callback(self._ran)

    def _timed(self) -> None:
        self._timer = None
        self._wake()

    def _ran(self, future: asyncio.Future[tuple[Ran, float]]) -> None:
        self._busy = False
        if future.cancelled():
            return
        ran, seconds = future.result()
        self._measure(seconds)
        self._settle(ran)
        if self._batcher.waiting:
            self._wake()

    def _measure(self, seconds: float) -> None:
        if seconds >= INLINE_BELOW > self.batch_seconds > 0 and not self._slow:
            self._slow = True  # one pause of the machine is no trend
            return
        self._slow = seconds >= INLINE_BELOW
        weight = _SMOOTHING if seconds > self.batch_seconds else _FALLING
        self.batch_seconds += (seconds - self.batch_seconds) * (weight if self.batch_seconds else 1.0)

    def _settle(self, ran: Ran) -> None:
        if not (isinstance(ran, Ran) and self._settle_whole(ran)):
            self._send(self._batcher.settle(ran))

    def _settle_whole(self, ran: Ran) -> bool:
        """Send a batch's answers in one message, where they are uncut, all go to one gateway, and none of it streams."""
        if ran.block is None:
            return False
        items = ran.batch.items
        session = cast("tuple[Session, int]", items[0].id)[0]
        for item in items:
            if cast("tuple[Session, int]", item.id)[0] is not session:
                return False
        if session.streams or not self._batcher.settle_whole(ran):
            return False
        session.answer_block(ran, ran.block)
        return True

    def _send_from_thread(self, steps: list[Step]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is there to be told
            self._loop.call_soon_threadsafe(self._send, steps)

    def _send(self, steps: list[Step]) -> None:
        for id, item, done in steps:
            session, number = cast("tuple[Session, int]", id)
            if number not in session.numbers:
                continue
            session.answer(number, item, done)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _timed_run(run: Callable[[Batch], Ran], batch: Batch) -> tuple[Ran, float]:
    begun = time.perf_counter()
    return run(batch), time.perf_counter() - begun


class Door:
    """A listening Unix socket. It takes the first byte of each connection itself, as file descriptors come with that one."""

    def __init__(self, host: Host, endpoint: str) -> None:
        self._host = host
        self._loop = host._loop
        self._guests: dict[socket.socket, asyncio.TimerHandle] = {}  # have not sent their first byte
        self._tasks: set[asyncio.Task[Any]] = set()
        self._resting: asyncio.TimerHandle | None = None
        Path(endpoint).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._socket.bind(endpoint)
        finally:
            os.umask(mask)
        self._socket.listen(_MAX_SESSIONS)
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Let nobody else in; who is inside stays."""
        if self._socket.fileno() < 0:
            return
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for guest in list(self._guests):
            self._dismiss(guest)

    def _accept(self) -> None:
        while True:
            try:
                guest, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # no descriptors left: look again in a while, not in a busy loop
                log.warning("cannot_accept", reason=str(error))
                self._loop.remove_reader(self._socket)
                self._resting = self._loop.call_later(0.1, self._loop.add_reader, self._socket, self._accept)
                return
            if len(self._guests) + len(self._host.sessions) >= _MAX_SESSIONS:
                guest.close()
                continue
            guest.setblocking(False)
            self._guests[guest] = self._loop.call_later(_HANDSHAKE, self._dismiss, guest)
            self._loop.add_reader(guest, self._greet, guest)

    def _dismiss(self, guest: socket.socket) -> None:
        self._loop.remove_reader(guest)
        self._guests.pop(guest).cancel()
        guest.close()

    def _greet(self, guest: socket.socket) -> None:
        try:
            first, fds, _, _ = socket.recv_fds(guest, 1, 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._dismiss(guest)
            return
        side = _side(fds)
        if first != b"\0" or (fds and side is None):
            if side is not None:
                side.close()
            self._dismiss(guest)
            return
        self._loop.remove_reader(guest)
        self._guests.pop(guest).cancel()
        task = self._loop.create_task(self._adopt(guest, side))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _adopt(self, guest: socket.socket, side: socket.socket | None) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: Session(self._host, side), guest)
        except BaseException:
            guest.close()
            if side is not None:
                side.close()
            raise


def _side(fds: list[int]) -> socket.socket | None:
    """The socket for file descriptors that a gateway sent along; None when what it sent is not one."""
    if not fds:
        return None
    try:
        side = socket.socket(fileno=fds[0])
    except OSError:
        os.close(fds[0])
        return None
    if (side.family, side.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        side.close()
        return None
    return side


class Flow:
    """One stream's parts that its reader has not consumed: on their way (their sizes), and kept back here."""

    __slots__ = ("ahead", "backlog", "backlog_bytes", "held", "sizes")

    def __init__(self) -> None:
        self.sizes: deque[int] = deque()
        self.ahead = 0  # the sum of sizes
        self.backlog: deque[tuple[Part | ModelworksError, bool]] = deque()
        self.backlog_bytes = 0
        self.held = False  # the batcher was told

    @property
    def open(self) -> bool:
        return len(self.sizes) < _FEW or (len(self.sizes) < WINDOW and self.ahead < _AHEAD)


def _bytes_of(item: Part | ModelworksError) -> int:
    return sum(len(tensor.data) for tensor in item.outputs) if isinstance(item, Part) else 0


class Session(Channel):
    """One gateway's connection, as the replica sees it. Nothing is taken before it has proven to have the secret."""

    def __init__(self, host: Host, side: socket.socket | None = None) -> None:
        super().__init__(wire.MAX_HELLO, side)
        self.host = host
        self.numbers: set[int] = set()  # calls aboard
        self._flows: dict[int, Flow] = {}  # those of them that stream
        self._kinds: dict[int, Layout] = {}  # of calls, as the gateway numbers them
        self._forms: dict[Kind, int] = {}  # of answers
        self._trusted = False
        self._nonces: tuple[bytes, bytes] | None = None  # the gateway's and ours, once we have challenged it

    @property
    def behind(self) -> bool:
        """Whether parts are kept back for a reader."""
        return any(flow.backlog for flow in self._flows.values())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.host.sessions.add(self)
        if len(self.host.sessions) > _MAX_SESSIONS:
            transport.close()
        self.loop.call_later(_HANDSHAKE, self._expect_proof)

    def _expect_proof(self) -> None:
        if not self._trusted and self.transport is not None:
            self.transport.abort()

    def on_message(self, kind: int, number: int, frame: bytes, start: int, stop: int) -> None:
        if not self._trusted:
            self._greet(kind, frame[start:stop])
        elif kind == wire.CALL:
            if number in self.numbers:
                raise WireError(f"call id {number} is in use")
            self.host.admit(self, number, frame, start, stop)
        elif kind == wire.CALLS:
            self._calls(number, frame, start, stop)
        elif kind == wire.ABORT:
            self.host.abort(self, number)
        elif kind == wire.CREDIT:
            self._credit(number, wire.read_credit(frame[start:stop]))
        elif kind == wire.PING:
            self.send(wire.pong(number, wire.Stats(resident(), self.host.waiting)))
            self.tidy()
        elif kind == wire.KIND:
            if number >= MAX_KINDS:
                raise WireError(f"a kind of the number {number}")
            self._kinds[number] = columns.read_kind(frame[start:stop])
        else:
            self.on_shared(kind, number, frame[start:stop])

    def _calls(self, number: int, frame: bytes, start: int, stop: int) -> None:
        layout = self._kinds.get(number)
        if layout is None:
            raise WireError(f"calls of the kind {number}, which was not announced")
        calls = columns.read_calls(layout, frame, start, stop)
        distinct = set(calls.numbers)
        if len(distinct) != len(calls.numbers) or not self.numbers.isdisjoint(distinct):
            raise WireError("a call id is in use")
        self.host.admit_many(self, calls, frame, alone=stop == len(frame))

    def _greet(self, kind: int, payload: bytes) -> None:
        if self._nonces is None:
            if kind != wire.HELLO:
                raise WireError("the first message was no hello")
            hello = wire.read_hello(payload)
            if hello.version != wire.VERSION or len(hello.nonce) != wire.NONCE:
                raise WireError("a hello of another version")
            self._nonces = hello.nonce, os.urandom(wire.NONCE)
            self.send(wire.challenge(self._nonces[1], self.host.proof("replica", *self._nonces)))
            return
        if kind != wire.PROOF or not hmac.compare_digest(payload, self.host.proof("gateway", *self._nonces)):
            raise WireError("a gateway without the right secret")
        self._trusted = True
        self.allow(wire.MAX_FRAME)
        self.send(wire.ready(self.host.replica_id, self.host.model_version))
        if self.host.draining:
            self.send(wire.plain(wire.DRAIN))

    # answers

    def answer(self, number: int, item: Part | ModelworksError, done: bool) -> None:
        """Send a part or an error of a call aboard; a stream's, when its reader has consumed enough of those before."""
        flow = self._flows.get(number)
        if flow is None:
            if done:
                self.numbers.discard(number)
                self._write(number, item)
                return
            flow = self._flows[number] = Flow()
        flow.backlog.append((item, done))
        flow.backlog_bytes += _bytes_of(item)
        self._pour(number, flow)
        if len(flow.backlog) > _BACKLOG or (len(flow.backlog) > _FEW and flow.backlog_bytes > _BACKLOG_BYTES):
            self.host.abort(self, number)
            self._write(
                number,
                Unavailable("the answer's reader was too slow for it; read faster or ask for less", code="slow_reader"),
            )

    @property
    def streams(self) -> bool:
        return bool(self._flows)

    def answer_block(self, ran: Ran, block: Block) -> None:
        """Send the answers of a batch of which all calls are this gateway's."""
        items = ran.batch.items
        numbers = [cast("tuple[Session, int]", item.id)[1] for item in items]
        self.numbers.difference_update(numbers)
        form = self._form(block.kind)
        if form is None:
            for item, part in ran.cut(self.host.model_version):
                self._write(cast("tuple[Session, int]", item.id)[1], part)
            return
        rows = [item.reading.rows for item in items]
        sizes = [size for of_call in zip(*block.sizes, strict=True) for size in of_call]
        (message,) = columns.parts(form, numbers, rows, ran.queue_us(), sizes, ran.run_us, len(items), block.data)
        self.send_now(message)

    def answer_single(self, number: int, rows: int, block: Block, run_us: int) -> None:
        """Send the answer of a call that ran by itself, at once."""
        form = self._form(block.kind)
        if form is None:
            outputs = [
                Tensor(name, datatype, [rows, *(trailing or ())], data)
                for (name, datatype, trailing), data in zip(block.kind, block.data, strict=True)
            ]
            self._write(number, Part(outputs, self.host.model_version, True, 0, run_us))
            return
        sizes = [size for (size,) in block.sizes]
        self.send_now(columns.single(form, number, rows, sizes, run_us, block.data))

    def _form(self, kind: Kind) -> int | None:
        """The number by which the gateway knows answers of a kind; None: such answers travel by themselves."""
        form = self._forms.get(kind)
        if form is None and Layout.of(kind) is not None and len(self._forms) < MAX_KINDS:
            form = self._forms[kind] = len(self._forms)
            self.send(columns.form(form, self.host.model_version, kind))
        return form

    def forget(self, number: int) -> None:
        self.numbers.discard(number)
        self._flows.pop(number, None)

    def _pour(self, number: int, flow: Flow) -> None:
        while flow.backlog and flow.open:
            item, done = flow.backlog.popleft()
            size = _bytes_of(item)
            flow.backlog_bytes -= size
            flow.sizes.append(size)
            flow.ahead += size
            if done:
                self.forget(number)
            self._write(number, item)
            if done:
                return
        if flow.held == flow.open:
            flow.held = not flow.held
            self.host.hold(self, number, flow.held)

    def _credit(self, number: int, parts: int) -> None:
        flow = self._flows.get(number)
        if flow is None:
            return  # its last part went out before
        if parts > len(flow.sizes):
            raise WireError(f"{parts} parts consumed of {len(flow.sizes)} that were sent")
        for _ in range(parts):
            flow.ahead -= flow.sizes.popleft()
        self._pour(number, flow)

    def _write(self, number: int, item: Part | ModelworksError) -> None:
        if isinstance(item, Part):
            try:
                self.send(wire.part(number, item, self.share if self.sharing is not None else None))
                return
            except ModelworksError as error:  # too large to travel
                item = error
        self.send(wire.error(number, item))
        item.__traceback__ = item.__context__ = None  # its frames hold the call's tensors

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
