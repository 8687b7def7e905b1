"""Host and Link over a real Unix socket, in one loop: secrets, garbage, aborts, back-pressure, drain."""

import asyncio
import contextlib
import os
import stat
import threading
import time

import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from modelworks.core.errors import DeadlineExceeded, InvalidInput, ModelworksError, Unavailable
from modelworks.core.tensors import Tensor, pack, unpack
from modelworks.core.types import Call, Signature, TensorSpec
from modelworks.serve import wire
from modelworks.serve.batcher import Batcher
from modelworks.serve.channel import LinkLost, connect
from modelworks.serve.host import Host
from modelworks.serve.shm import Slot
from tests.serve_toys import FAULTY, SECRET, SIGNATURE, toy_call, toy_predict


@contextlib.asynccontextmanager
async def hosted(folder, predict=toy_predict, signature=SIGNATURE, **limits):
    batcher = Batcher(predict, signature, model_version="toy:1", **limits)
    host = Host(batcher, secret=SECRET, replica_id="rpl_1", model_version="toy:1")
    endpoint = str(folder / "s")
    await host.listen(endpoint)
    try:
        yield host, endpoint
    finally:
        await host.drain(0.5)


def value(answer):
    return unpack(answer.outputs[0])


async def soon(condition, seconds=2.0):
    """Whether a condition comes true in a while."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.005)
    return True


class Gate:
    """A model that runs when it is let."""

    def __init__(self):
        self.open = threading.Event()
        self.batches = []

    def __call__(self, inputs):
        self.open.wait(10)
        self.batches.append(len(inputs["x"]))
        return {"value": inputs["x"][:, 0] * 2}


def test_calls_of_one_turn_run_together_and_are_answered(tmp_path):
    sizes = []

    def model(inputs):
        sizes.append(len(inputs["x"]))
        return toy_predict(inputs)

    async def story():
        async with hosted(tmp_path, model) as (_, endpoint):
            assert stat.S_IMODE(os.stat(endpoint).st_mode) == 0o600
            link = await connect(endpoint, SECRET)
            assert (link.replica_id, link.model_version) == ("rpl_1", "toy:1")
            answers = await asyncio.gather(*[link.call(toy_call(x)) for x in range(20)])
            assert [value(answer) for answer in answers] == [[2.0 * x] for x in range(20)]
            assert {answer.model_version for answer in answers} == {"toy:1"}
            assert link.calls == {}
            link.close()

    uvloop.run(story())
    assert sizes == [20]


def test_a_call_that_is_alone_runs_at_once_and_answers_as_others_do(tmp_path):
    runs = []

    def rows_call(*values):
        data = np.array(values, dtype=np.float32)
        return Call("toy", [Tensor("x", "FP32", [len(values), 1], data.tobytes())], time.monotonic() + 10)

    def model(inputs):
        runs.append((len(inputs["x"]), threading.current_thread() is threading.main_thread()))
        if runs[-1][0] == 3:
            return {"value": inputs["x"][:2, 0]}  # not a value a row
        if runs[-1][0] == 4:
            return {"value": np.array(["a", "bb", "ccc", "dddd"], dtype=object)}
        return toy_predict(inputs)

    async def story():
        async with hosted(tmp_path, model) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            slow = await link.call(toy_call(1.0))
            assert runs == [(1, False)], "nothing is known of the model: it may take long"
            host.batch_seconds = 1e-5
            runs.clear()
            parts = []
            for call in (toy_call(1.0), rows_call(2.0, 5.0)):
                async for part in link.stream(call):
                    parts.append((unpack(part.outputs[0]), part.done, part.queue_us, part.batch, part.model_version))
            assert parts == [([2.0], True, 0, 1, "toy:1"), ([4.0, 10.0], True, 0, 1, "toy:1")]
            assert unpack(slow.outputs[0]) == [2.0]
            assert value(await link.call(rows_call(1.0, 2.0, 3.0))) == [1.0, 2.0]
            assert value(await link.call(rows_call(1.0, 2.0, 3.0, 4.0))) == [b"a", b"bb", b"ccc", b"dddd"]
            with pytest.raises(ModelworksError) as caught:
                await link.call(toy_call(FAULTY))
            assert caught.value.code == "model_error"
            assert [rows for rows, _ in runs] == [1, 2, 3, 4, 1], "each ran once, a failing one too"
            assert all(in_loop for _, in_loop in runs)
            runs.clear()
            for x in range(5):
                link.start(toy_call(float(x)), lambda item: None)
            link.flush()
            link.start(toy_call(9.0), lambda item: None)
            assert await soon(lambda: len(link.calls) == 0)
            assert sum(rows for rows, _ in runs) == 6
            assert len(runs) < 6, "what comes together still runs together"
            link.close()

    uvloop.run(story())


def test_one_pause_of_the_machine_makes_no_slow_model(tmp_path):
    async def story():
        async with hosted(tmp_path) as (host, _):
            host.batch_seconds = 1e-5
            host._measure(0.5)
            assert host.batch_seconds == 1e-5
            host._measure(2e-5)
            host._measure(0.5)
            assert host.batch_seconds < 1e-4
            host._measure(0.5)
            assert host.batch_seconds > 0.05, "two in a row are believed"

    uvloop.run(story())


def test_errors_come_back_as_themselves(tmp_path):
    async def story():
        async with hosted(tmp_path) as (_, endpoint):
            link = await connect(endpoint, SECRET)
            with pytest.raises(InvalidInput) as info:
                await link.call(Call("toy", [pack("y", "FP32", [1, 1], [1])], time.monotonic() + 5))
            assert info.value.param == "y"
            with pytest.raises(DeadlineExceeded):
                await link.call(toy_call(seconds=-1))
            with pytest.raises(ModelworksError) as found:
                await link.call(toy_call(FAULTY))
            assert (found.value.code, found.value.status) == ("model_error", 500)
            assert "deadbeef" not in found.value.message
            assert value(await link.call(toy_call(3.0))) == [6.0]

    uvloop.run(story())


@pytest.mark.parametrize("secret", ["", "wrong", SECRET[:-1] + "x", "x" * 3000])
def test_without_the_secret_the_door_stays_shut(tmp_path, secret):
    async def story():
        async with hosted(tmp_path) as (host, endpoint):
            with pytest.raises(LinkLost):
                await connect(endpoint, secret)
            assert await soon(lambda: not host.sessions)
            good = await connect(endpoint, SECRET)
            assert value(await good.call(toy_call(1.0))) == [2.0]

    uvloop.run(story())


def test_a_host_needs_a_real_secret(tmp_path):
    async def story():
        with pytest.raises(ValueError, match="secret"):
            Host(Batcher(toy_predict, SIGNATURE), secret="", replica_id="r", model_version="m")

    uvloop.run(story())


async def raw(endpoint, *, proven):
    """A connection of bare bytes; `proven`: with the secret shown."""
    reader, writer = await asyncio.open_unix_connection(endpoint)
    writer.write(b"\0")
    if proven:
        writer.write(HELLO)
        size = int.from_bytes(await reader.readexactly(4), "little")
        challenge = wire.read_challenge((await reader.readexactly(size))[9:])
        assert challenge.proof == wire.proof(SECRET, "replica", NONCE, challenge.nonce)
        writer.write(framed(wire.plain(wire.PROOF, 0, wire.proof(SECRET, "gateway", NONCE, challenge.nonce))))
    return reader, writer


async def closed(endpoint, data, *, proven=False):
    """Send raw bytes; True when the host closes the connection."""
    reader, writer = await raw(endpoint, proven=proven)
    writer.write(data)
    try:
        async with asyncio.timeout(1):
            while await reader.read(65536):
                pass
        return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    finally:
        writer.close()


def framed(*messages):
    body = b"".join(piece for message in messages for piece in message)
    return len(body).to_bytes(4, "little") + body


NONCE = b"n" * wire.NONCE
HELLO = framed(wire.hello(NONCE))
UNPROVEN = [
    b"GET / HTTP/1.1\r\n\r\n",
    (2**31).to_bytes(4, "little"),
    framed(wire.plain(wire.PING)),
    framed(wire.call(1, toy_call(), 1.0)),
    framed(wire.plain(wire.HELLO, 0, b"\x80\x04\x95\x00")),
    framed(wire.plain(wire.HELLO, 0, b"x" * 4000)),
    framed(wire.hello(b"short")),
    HELLO + HELLO,
    HELLO + framed(wire.call(1, toy_call(), 1.0)),
    HELLO + framed(wire.plain(wire.PROOF, 0, b"")),
    HELLO + framed(wire.plain(wire.PROOF, 0, b"x" * 32)),
]
MALFORMED = [
    framed(wire.plain(wire.HELLO)),
    framed(wire.plain(99)),
    framed(wire.plain(wire.CALL, 1, b"\xff\xff\xff\xff")),
    framed(wire.call(1, toy_call(888.0), 9.0)) + framed(wire.call(1, toy_call(), 9.0)),
    (2**32 - 1).to_bytes(4, "little"),
    framed(wire.call(1, toy_call(), 9.0))[:-3] + framed(wire.plain(wire.PING)) * 3,
    framed(wire.plain(wire.FREE, 0)),
    framed(wire.segment(0, 1 << 26)),
    framed(wire.plain(wire.CREDIT, 1, b"")),
    framed(
        wire.call(1, Call("t", [pack("x", "UINT8", [300_000], bytes(300_000))], 0.0), 1.0, lambda _: Slot(0, 0, 0, 9))
    ),
]


@pytest.mark.parametrize("data", UNPROVEN)
def test_nothing_is_taken_from_whom_has_not_shown_the_secret(tmp_path, data):
    async def story():
        async with hosted(tmp_path) as (host, endpoint):
            good = await connect(endpoint, SECRET)
            assert await closed(endpoint, data)
            assert value(await good.call(toy_call(1.0))) == [2.0]
            assert len(host.sessions) == 1

    uvloop.run(story())


@pytest.mark.parametrize("data", MALFORMED)
def test_what_is_malformed_closes_its_own_connection_only(tmp_path, data):
    async def story():
        async with hosted(tmp_path) as (host, endpoint):
            good = await connect(endpoint, SECRET)
            assert await closed(endpoint, data, proven=True)
            assert value(await good.call(toy_call(1.0))) == [2.0]
            assert len(host.sessions) == 1

    uvloop.run(story())


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=200)), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_fuzzed_bytes_neither_crash_nor_leak(tmp_path_factory, attempts):
    async def story():
        async with hosted(tmp_path_factory.mktemp("fuzz")) as (host, endpoint):
            good = await connect(endpoint, SECRET)
            for greeted, noise in attempts:
                _, writer = await raw(endpoint, proven=greeted)
                writer.write(framed([noise.rjust(9, b"\3")]) + noise)
                await asyncio.sleep(0)
                writer.close()
            assert value(await good.call(toy_call(1.0))) == [2.0]
            for _ in range(100):
                if len(host.sessions) == 1:
                    break
                await asyncio.sleep(0.01)
            assert len(host.sessions) == 1
            assert len(host._batcher) == 0

    uvloop.run(story())


def test_a_failing_callback_does_not_reach_the_others(tmp_path):
    async def story():
        async with hosted(tmp_path) as (_, endpoint):
            link = await connect(endpoint, SECRET)
            got = []

            def broken(item):
                raise RuntimeError("a client that is gone")

            for i in range(10):
                link.start(toy_call(i), broken if i % 2 else lambda part: got.append(unpack(part.outputs[0])[0]))
            assert value(await link.call(toy_call(50))) == [100.0]
            assert got == [0, 4, 8, 12, 16]
            link.transport.abort()  # failing all that are aboard must reach all of them, too
            link.calls = {1: broken, 2: got.append}
            for _ in range(50):
                if link.lost:
                    break
                await asyncio.sleep(0.01)
            assert isinstance(got[-1], LinkLost)

    uvloop.run(story())


def test_aborted_calls_do_not_run(tmp_path):
    gate = Gate()

    async def story():
        async with hosted(tmp_path, gate) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            first = asyncio.create_task(link.call(toy_call(1.0)))
            while not host._busy:
                await asyncio.sleep(0.001)
            others = [asyncio.create_task(link.call(toy_call(x))) for x in range(5)]
            await asyncio.sleep(0.02)
            for task in others[:4]:
                task.cancel()
            await asyncio.sleep(0.02)
            assert len(host._batcher) == 2
            gate.open.set()
            assert value(await first) == [2.0]
            assert value(await others[4]) == [8.0]
            assert link.calls == {}

    uvloop.run(story())
    assert gate.batches == [1, 1]


def test_calls_of_a_client_cut_in_flight_are_dropped(tmp_path):
    gate = Gate()

    async def story():
        async with hosted(tmp_path, gate) as (host, endpoint):
            good = await connect(endpoint, SECRET)
            kept = asyncio.create_task(good.call(toy_call(5.0)))
            for _ in range(20):
                link = await connect(endpoint, SECRET)
                for x in range(10):
                    link.start(toy_call(x), print)
                await asyncio.sleep(0)
                link.transport.abort()
            while len(host.sessions) > 1:
                await asyncio.sleep(0.005)
            assert len(host._batcher) == 1
            gate.open.set()
            assert value(await kept) == [10.0]

    uvloop.run(story())


def test_pings_are_answered_while_the_model_runs(tmp_path):
    gate = Gate()

    async def story():
        async with hosted(tmp_path, gate) as (_, endpoint):
            link = await connect(endpoint, SECRET)
            task = asyncio.create_task(link.call(toy_call()))
            await asyncio.sleep(0.02)
            link.ping(time.monotonic())
            for _ in range(100):
                if link.ping_sent is None:
                    break
                await asyncio.sleep(0.01)
            assert link.ping_sent is None
            assert not task.done()
            gate.open.set()
            await task

    uvloop.run(story())


def test_drain_finishes_what_is_aboard_and_refuses_the_rest(tmp_path):
    gate = Gate()

    async def story():
        async with hosted(tmp_path, gate) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            aboard = asyncio.create_task(link.call(toy_call(1.0)))
            await asyncio.sleep(0.02)
            draining = asyncio.create_task(host.drain(5))
            await asyncio.sleep(0.02)
            assert link.draining
            assert not link.usable
            with pytest.raises(Unavailable) as info:
                await link.call(toy_call(2.0))
            assert info.value.code == "draining"
            gate.open.set()
            assert value(await aboard) == [2.0]
            assert await draining is True
            with pytest.raises((OSError, LinkLost)):
                await connect(endpoint, SECRET, timeout=1)

    uvloop.run(story())


def test_large_tensors_and_a_slow_reader(tmp_path):
    """Answers that are not read stop the reading of calls; when they are read again, all of them come."""
    signature = Signature(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1, -1])],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=[-1, -1])],
    )
    size = 512 * 1024

    async def story():
        async with hosted(tmp_path, lambda inputs: {"y": inputs["x"] + 1}, signature, max_batch=1) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            call = Call("t", [pack("x", "FP32", [1, size], np.zeros(size).tolist())], time.monotonic() + 30)
            link.transport.pause_reading()
            tasks = [asyncio.create_task(link.call(call)) for _ in range(24)]
            (session,) = host.sessions
            for _ in range(500):
                if session.congested:
                    break
                await asyncio.sleep(0.01)
            assert session.congested
            assert not any(task.done() for task in tasks)
            link.transport.resume_reading()
            for answer in await asyncio.gather(*tasks):
                assert answer.outputs[0].shape == [1, size]
                assert answer.outputs[0].data[:4] == b"\0\0\x80?"
            assert not session.congested

    uvloop.run(story())
