"""The channel over TCP, streams with credit, and a gateway facing a replica that sends rubbish."""

import asyncio
import contextlib
import time

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from modelworks.core.errors import InvalidInput, ModelworksError, Unavailable
from modelworks.core.tensors import pack, unpack
from modelworks.core.types import Call
from modelworks.serve import wire
from modelworks.serve.batcher import Batcher
from modelworks.serve.channel import WINDOW, LinkLost, connect, tcp_address
from modelworks.serve.gateway import Gateway
from modelworks.serve.host import Host
from modelworks.serve.router import Router
from modelworks.serve.routes import Snapshot
from modelworks.serve.wire import Part
from tests.serve_toys import PRINCIPAL, SECRET, SIGNATURE, toy_call, toy_predict, toy_route


async def soon(condition, seconds=3.0):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.005)
    return True


@contextlib.asynccontextmanager
async def hosted(endpoint, batcher=None):
    host = Host(
        Batcher(toy_predict, SIGNATURE, model_version="toy:1") if batcher is None else batcher,
        secret=SECRET,
        replica_id="r",
        model_version="toy:1",
    )
    name = await host.listen(endpoint)
    try:
        yield host, name
    finally:
        await host.drain(0.2)


# TCP


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://localhost:0"])
def test_the_same_frames_travel_over_tcp(address):
    async def story():
        async with hosted(address) as (_, endpoint):
            link = await connect(endpoint, SECRET)
            answers = await asyncio.gather(*[link.call(toy_call(x)) for x in range(30)])
            assert [unpack(answer.outputs[0]) for answer in answers] == [[2.0 * x] for x in range(30)]
            rows = 100_000
            large = Call("toy", [pack("x", "FP32", [rows, 1], [1.0] * rows)], time.monotonic() + 9)
            data = (await link.call(large)).outputs[0].data
            assert (type(data), len(data)) == (bytes, rows * 4)  # nothing is shared over TCP
            with pytest.raises(LinkLost):
                await connect(endpoint, "x" * 40)

    uvloop.run(story())


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.7:0", "tcp://example.org:0"])
def test_only_loopback_and_configured_addresses_are_listened_on(address):
    async def story():
        host = Host(Batcher(toy_predict, SIGNATURE), secret=SECRET, replica_id="r", model_version="m")
        with pytest.raises(InvalidInput, match="configured"):
            await host.listen(address, addresses=["10.0.0.1"])

    uvloop.run(story())


@pytest.mark.parametrize("endpoint", ["tcp://", "tcp://:80", "tcp://a:b", "tcp://a:99999", "tcp://a", "tcp://a:²"])
def test_malformed_endpoints_are_the_callers_error(endpoint):
    with pytest.raises(InvalidInput):
        tcp_address(endpoint)


def framed(*messages):
    body = b"".join(piece for message in messages for piece in message)
    return len(body).to_bytes(4, "little") + body


async def eavesdropped(endpoint):
    """All bytes of a handshake and a call: (from the gateway, from the replica)."""
    host, port = tcp_address(endpoint)
    up, down = bytearray(), bytearray()

    async def pump(reader, writer, heard):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                heard.extend(data)
                writer.write(data)
        writer.close()

    async def relay(reader, writer):
        there_reader, there_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, there_writer, up), pump(there_reader, writer, down))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    link = await connect(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", SECRET)
    await link.call(toy_call(1.0))
    link.close()
    await asyncio.sleep(0.05)
    server.close()
    return bytes(up), bytes(down)


def kinds(heard):
    """The payloads of each kind of message."""
    found = {}
    for frame, start, stop in wire.FrameReader(wire.MAX_FRAME).feed(heard):
        for kind, _, first, last in wire.messages(frame, start, stop):
            found.setdefault(kind, []).append(frame[first:last])
    return found


def test_the_secret_does_not_travel_and_a_proof_serves_once():
    async def story():
        async with hosted("tcp://127.0.0.1:0") as (host, endpoint):
            (up, down), (again, _) = await eavesdropped(endpoint), await eavesdropped(endpoint)
            for heard in (up, down):
                assert SECRET.encode() not in heard
                assert bytes.fromhex(SECRET) not in heard
            assert wire.READY in kinds(down)
            assert kinds(up)[wire.PROOF] != kinds(again)[wire.PROOF]
            reader, writer = await asyncio.open_connection(*tcp_address(endpoint))
            writer.write(up)  # the gateway's half of the talk, once more
            answer = b""
            with contextlib.suppress(ConnectionError):
                while data := await asyncio.wait_for(reader.read(65536), 2):
                    answer += data
            assert set(kinds(answer)) <= {wire.CHALLENGE}
            writer.close()
            assert await soon(lambda: not host.sessions)

    uvloop.run(story())


# streams


class Counter:
    """A batcher that streams the numbers 0, 1, 2, ... to each call, as many as its first value says; -1: no end."""

    def __init__(self):
        self.streams = {}  # id -> [next, end]
        self.held = set()
        self.made = 0
        self.waiting = 0

    def __len__(self):
        return len(self.streams)

    def admit(self, id, tensors, deadline):
        self.streams[id] = [0, unpack(tensors[0])[0]]
        self._count()

    def abort(self, id):
        self.streams.pop(id, None)
        self.held.discard(id)
        self._count()

    def hold(self, id):
        self.held.add(id)
        self._count()

    def resume(self, id):
        self.held.discard(id)
        self._count()

    def _count(self):
        self.waiting = len(self.streams.keys() - self.held)

    def delay(self):
        return 0.0

    def take(self):
        return list(self.streams.keys() - self.held), []

    def run(self, ids):
        return ids

    def settle(self, ids):
        steps = []
        for id in ids:
            if id in self.streams and id not in self.held:
                number, end = self.streams[id]
                self.streams[id][0] += 1
                self.made += 1
                done = number + 1 == end
                if done:
                    del self.streams[id]
                steps.append((id, Part([pack("n", "INT64", [1], [number])], "toy:1", done), done))
        self._count()
        return steps


class Deaf(Counter):
    """One that does not listen when it is told to wait."""

    def hold(self, id):
        pass


def test_a_stream_comes_whole_and_in_order(tmp_path):
    async def story():
        async with hosted(str(tmp_path / "s"), Counter()) as (host, endpoint):
            link = await connect(endpoint, SECRET)

            async def read(count):
                return [unpack(part.outputs[0])[0] async for part in link.stream(toy_call(count))]

            for got, count in zip(
                await asyncio.gather(*[read(c) for c in (1, 7, 500, 64, 65)]), (1, 7, 500, 64, 65), strict=True
            ):
                assert got == list(range(count))
            assert (link.calls, link._owed, link._manual) == ({}, {}, set())
            (session,) = host.sessions
            assert (session.numbers, session._flows) == (set(), {})

    uvloop.run(story())


def test_callbacks_without_credit_get_the_whole_stream(tmp_path):
    async def story():
        async with hosted(str(tmp_path / "s"), Counter()) as (_, endpoint):
            link = await connect(endpoint, SECRET)
            got = []
            link.start(toy_call(1000), got.append)
            assert await soon(lambda: len(got) == 1000)
            assert got[-1].done

    uvloop.run(story())


def test_a_slow_reader_pauses_its_own_stream_only(tmp_path):
    async def story():
        counter = Counter()
        async with hosted(str(tmp_path / "s"), counter) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            slow = link.stream(toy_call(-1))
            assert unpack((await anext(slow)).outputs[0]) == [0]
            await asyncio.sleep(0.1)
            made = counter.made
            await asyncio.sleep(0.05)
            assert counter.made == made <= WINDOW + 2
            assert len([part async for part in link.stream(toy_call(300))]) == 300
            assert [unpack((await anext(slow)).outputs[0])[0] for _ in range(500)] == list(range(1, 501))
            await slow.aclose()
            assert await soon(lambda: len(counter) == 0)
            (session,) = host.sessions
            assert session._flows == {}

    uvloop.run(story())


def test_a_producer_that_does_not_pause_is_cut_off_in_bounds(tmp_path):
    async def story():
        async with hosted(str(tmp_path / "s"), Deaf()) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            stream = link.stream(toy_call(-1))
            await anext(stream)
            assert await soon(lambda: len(host._batcher) == 0)
            with pytest.raises(Unavailable) as info:
                async for _ in stream:
                    pass
            assert info.value.code == "slow_reader"
            assert await soon(lambda: not link.calls)

    uvloop.run(story())


# a replica that is none


async def impostor(path, talk):
    """A server on a Unix socket that gets (reader, writer) after the first byte."""

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readexactly(1)
            await talk(reader, writer)
        writer.close()

    return await asyncio.start_unix_server(serve, str(path))


async def prove(reader, writer):
    size = int.from_bytes(await reader.readexactly(4), "little")
    hello = wire.read_hello((await reader.readexactly(size))[9:])
    nonce = b"r" * wire.NONCE
    writer.write(framed(wire.challenge(nonce, wire.proof(SECRET, "replica", hello.nonce, nonce))))
    writer.write(framed(wire.ready("r", "m")))


@pytest.mark.parametrize(
    "first",
    [
        framed(wire.ready("r", "m")),
        framed(wire.challenge(b"r" * 32, b"p" * 32)),
        framed(wire.plain(wire.PART, 1)),
        b"\xff" * 9,
    ],
)
def test_a_replica_that_cannot_prove_itself_gets_no_call(tmp_path, first):
    heard = []

    async def talk(reader, writer):
        writer.write(first)
        heard.append(await reader.read(65536))
        heard.append(await reader.read(65536))

    async def story():
        server = await impostor(tmp_path / "s", talk)
        with pytest.raises(LinkLost):
            await connect(str(tmp_path / "s"), SECRET, timeout=2)
        server.close()

    uvloop.run(story())
    assert set(kinds(b"".join(heard))) == {wire.HELLO}


REPLY = Part([pack("y", "FP32", [1], [1.0])], "m")
NOISE = st.one_of(
    st.binary(max_size=120),
    st.builds(lambda kind, number, payload: framed(wire.plain(kind, number, payload)),
              st.integers(0, 20), st.integers(0, 3), st.binary(max_size=40)),
    st.builds(lambda number, cut: framed(wire.part(number, REPLY))[:cut], st.integers(0, 3), st.integers(1, 60)),
)  # fmt: skip


@given(st.lists(NOISE, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_gateway_survives_whatever_a_replica_sends(tmp_path_factory, noise):
    async def talk(reader, writer):
        await prove(reader, writer)
        await reader.read(100)
        for piece in noise:
            writer.write(piece)
        await writer.drain()
        writer.close()

    async def story():
        path = tmp_path_factory.mktemp("i") / "s"
        server = await impostor(path, talk)
        link = await connect(str(path), SECRET)
        results = await asyncio.gather(*[link.call(toy_call()) for _ in range(3)], return_exceptions=True)
        assert all(not isinstance(r, BaseException) or isinstance(r, ModelworksError) for r in results), results
        assert await soon(lambda: link.lost)
        assert (link.calls, link._owed, link._manual) == ({}, {}, set())
        assert link.sharing.pool.used == 0
        server.close()

    uvloop.run(story())


def test_a_slow_reader_of_the_gateway_pauses_the_replica(tmp_path):
    async def story():
        counter = Counter()
        async with hosted(str(tmp_path / "s"), counter) as (_, endpoint):
            router = Router(SECRET)
            router.apply(Snapshot(1, {("p", "toy"): toy_route(("r", endpoint))}))
            gateway = Gateway(router)
            assert await soon(lambda: router.ready(("p", "toy")))
            stream = gateway.stream(PRINCIPAL, toy_call(-1))
            assert unpack((await anext(stream)).outputs[0]) == [0]
            await asyncio.sleep(0.1)
            assert counter.made <= WINDOW + 2
            assert [unpack((await anext(stream)).outputs[0])[0] for _ in range(300)] == list(range(1, 301))
            await stream.aclose()
            assert await soon(lambda: len(counter) == 0)
            router.close()

    uvloop.run(story())
