"""Shared memory: only its owner writes, slots come back exactly when the last view is gone, and nothing the peer says is trusted."""

import asyncio
import contextlib
import ctypes
import gc
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.tensors import Tensor, pack_bytes, to_numpy, unpack_bytes
from modelworks.core.types import Call, Signature, TensorSpec
from modelworks.serve import shm
from modelworks.serve.batcher import Batcher
from modelworks.serve.channel import LinkLost, connect
from modelworks.serve.host import Host
from modelworks.serve.shm import SHARED_FROM, Pool, SharingError, Slot, Window
from tests.serve_toys import SECRET

MIB = 1024 * 1024
WIDTH = SHARED_FROM // 4
LARGE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1, WIDTH])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[-1, WIDTH])],
)


def ends(**limits):
    """A pool and the window that reads it, without a socket between them."""
    released = []
    window = Window(released.append)
    pool = Pool(lambda key, size, fd: offers.append((key, window.attach(key, size, fd))), **limits)
    offers = []
    assert pool.put(bytes(SHARED_FROM)) is None  # it grows first
    for key, done in offers:
        pool.mapped(key, done)
    return pool, window


def test_a_slot_is_free_when_its_last_view_is_gone_and_not_before():
    pool, window = ends()
    slot = pool.put(b"ab" * SHARED_FROM)
    view = window.view(slot)
    array = np.frombuffer(view, np.uint8)[5:].reshape(-1, 1)
    assert bytes(view) == b"ab" * SHARED_FROM
    del view
    assert not window.released
    assert window.held == 1
    keeper = memoryview(array)[3:]
    del array
    assert not window.released
    del keeper
    assert list(window.released) == [slot.number]
    pool.free(slot.number)
    assert (pool.used, window.held) == (0, 0)


def test_views_outlive_the_link_and_are_not_written_again():
    pool, window = ends()
    view = window.view(pool.put(b"a" * SHARED_FROM))
    window.close()
    pool.close()
    other, _ = ends()
    other.put(b"z" * SHARED_FROM)
    assert bytes(view) == b"a" * SHARED_FROM
    assert pool.put(b"z" * SHARED_FROM) is None
    del view
    assert not window.released


def test_the_reader_cannot_write_and_nobody_can_shrink():
    taken = []

    def offer(key, size, fd):
        taken.append(os.dup(fd))

    pool = Pool(offer)
    pool.put(bytes(SHARED_FROM))
    (fd,) = taken
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, MIB)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 10)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1 << 30)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        window = Window(print)
        window.attach(0, shm.STEP, fd)
        view = window.view(Slot(0, 0, 0, SHARED_FROM))
        assert view.readonly
        assert not np.frombuffer(view, np.uint8).flags.writeable
        with pytest.raises((TypeError, ValueError)):
            (ctypes.c_ubyte * 10).from_buffer(view)
    finally:
        os.close(fd)


def test_memory_that_may_shrink_or_is_too_small_is_refused():
    window = Window(print)
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    with pytest.raises(SharingError):
        window.attach(0, MIB, fd)
    os.close(fd)
    segment = shm.Segment(MIB)
    for size in (2 * MIB, 0, 2**63, 2**64):
        with pytest.raises(SharingError):
            window.attach(0, size, segment.fd)
    window.attach(0, MIB, segment.fd)
    with pytest.raises(SharingError):
        window.attach(0, MIB, segment.fd)
    for slot in [(0, 1, 0, 9), (0, 0, -1, 9), (0, 0, 0, 0), (0, 0, 0, MIB + 1), (0, 0, MIB, 1), (0, 0, 2**62, 2**62)]:
        with pytest.raises(SharingError):
            window.view(Slot(*slot))
    kept = window.view(Slot(7, 0, MIB - 9, 9))
    with pytest.raises(SharingError):
        window.view(Slot(7, 0, 0, 9))
    assert len(kept) == 9


def test_a_pool_is_bounded_grows_and_gives_back(monkeypatch):
    pool, window = ends(step=MIB, limit=2 * MIB)
    slots = [pool.put(bytes(SHARED_FROM)) for _ in range(5)]
    assert slots[4] is None  # the fifth asked for a second segment
    pool.mapped(1, True)
    slots = slots[:4] + [pool.put(bytes(SHARED_FROM)) for _ in range(4)]
    assert all(slots)
    assert pool.put(bytes(SHARED_FROM)) is None
    assert pool.put(bytes(3 * MIB)) is None
    assert pool.size == 2 * MIB
    for slot in slots:
        pool.free(slot.number)
    with pytest.raises(SharingError):
        pool.free(slots[0].number)
    assert pool.idle(time.monotonic()) == []
    assert pool.idle(time.monotonic() + shm.IDLE_SECONDS) == [0, 1]
    assert pool.size == 0
    window.detach(0)
    with pytest.raises(SharingError):
        window.detach(0)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 10)), max_size=80))
@settings(max_examples=60, deadline=None)
def test_slots_never_overlap_and_all_come_back(story):
    segment = shm.Segment(64 * 65536)
    taken = {}
    for blocks, which in story:
        first = segment.take(blocks)
        if first is not None:
            assert first + blocks <= 64
            assert all(first + blocks <= a or a + n <= first for a, n in taken.items())
            taken[first] = blocks
        if taken and which < 7:
            key = sorted(taken)[which % len(taken)]
            segment.give(key, taken.pop(key))
    for first, blocks in taken.items():
        segment.give(first, blocks)
    assert segment.empty
    segment.close()


# through host and link


@contextlib.asynccontextmanager
async def hosted(folder, predict=lambda inputs: {"y": inputs["x"] * 2}, signature=LARGE, **limits):
    host = Host(
        Batcher(predict, signature, model_version="m:1", **limits), secret=SECRET, replica_id="r", model_version="m"
    )
    endpoint = str(folder / "s")
    await host.listen(endpoint)
    try:
        yield host, endpoint
    finally:
        await host.drain(0.2)


def large(value=1.0, rows=1, seconds=20.0):
    data = np.full((rows, WIDTH), value, np.float32)
    return Call("m", [Tensor("x", "FP32", [rows, WIDTH], data.tobytes())], time.monotonic() + seconds)


async def warm(link):
    """Both directions share memory from now on."""
    for _ in range(3):
        await link.call(large())


async def soon(condition, seconds=3.0):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.005)
    return True


def pools(host, *links):
    return [channel.sharing.pool for channel in (*links, *host.sessions)]


def test_large_tensors_go_through_shared_memory_both_ways(tmp_path):
    kinds = []

    def model(inputs):
        kinds.append(inputs["x"].flags.writeable)
        return {"y": inputs["x"] * 2}

    async def story():
        async with hosted(tmp_path, model, max_batch=8) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            await warm(link)
            answer = await link.call(large(3.0))
            assert isinstance(answer.outputs[0].data, memoryview)
            assert (to_numpy(answer.outputs[0]) == 6.0).all()
            assert [pool.used for pool in pools(host, link)] == [0, 1]  # ours is read until `answer` goes
            answers = await asyncio.gather(*[link.call(large(x, rows)) for x, rows in [(1, 1), (2, 3), (3, 2)]])
            assert [float(to_numpy(a.outputs[0]).mean()) for a in answers] == [2, 4, 6]
            del answer, answers
            assert await soon(lambda: not any(pool.used for pool in pools(host, link)))

    uvloop.run(story())
    assert not any(kinds)


def test_no_slot_is_written_while_an_answer_is_kept(tmp_path):
    async def story():
        async with hosted(tmp_path) as (_, endpoint):
            link = await connect(endpoint, SECRET)
            await warm(link)
            kept = [await link.call(large(x)) for x in range(20)]
            for x in range(20, 40):
                await link.call(large(x))
            assert [set(to_numpy(answer.outputs[0]).ravel()) for answer in kept] == [{2.0 * x} for x in range(20)]

    uvloop.run(story())


def test_an_aborted_calls_input_is_not_reused_while_the_model_reads_it(tmp_path):
    """The model looks at its input again after the gateway has given up, and after others were served memory."""
    begun, go, seen = threading.Event(), threading.Event(), []

    def model(inputs):
        if inputs["x"][0, 0] == 7.0:
            begun.set()
            go.wait(10)
            seen.append(set(inputs["x"].ravel()))
        return {"y": inputs["x"]}

    async def story():
        async with hosted(tmp_path, model, max_batch=1) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            await warm(link)
            host.batch_seconds = 1.0  # a slow model: it runs in its thread
            task = asyncio.create_task(link.call(large(7.0)))
            assert await soon(begun.is_set)
            task.cancel()
            others = [asyncio.create_task(link.call(large(8.0 + x))) for x in range(4)]
            await asyncio.sleep(0.05)
            assert link.sharing.pool.used == 5
            go.set()
            await asyncio.gather(*others)
            others.clear()
            assert await soon(lambda: not any(pool.used for pool in pools(host, link)))

    uvloop.run(story())
    assert seen == [{7.0}]


def test_a_model_that_keeps_its_inputs_keeps_the_slots(tmp_path):
    kept = []

    def model(inputs):
        kept.append(inputs["x"])
        return {"y": inputs["x"]}

    async def story():
        async with hosted(tmp_path, model) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            await warm(link)
            kept.clear()
            for x in range(6):
                await link.call(large(x))
            assert [set(array.ravel()) for array in kept] == [{float(x)} for x in range(6)]
            assert link.sharing.pool.used == 6
            kept.clear()
            assert await soon(lambda: not any(pool.used for pool in pools(host, link)))

    uvloop.run(story())


def test_refused_and_failed_calls_give_their_slots_back(tmp_path):
    def model(inputs):
        if inputs["x"][0, 0] == 1.5:
            raise ValueError("bad")
        if inputs["x"][0, 0] == 2.5:
            raise InvalidInput("worse")
        return {"y": inputs["x"]}

    async def story():
        async with hosted(tmp_path, model) as (host, endpoint):
            link = await connect(endpoint, SECRET)
            await warm(link)
            with contextlib.suppress(ModelworksError):
                await link.call(large(1.5))
            gc.collect()  # the console's rendering of a stack, which replicas do not use, has cycles
            gc.disable()  # the rest comes back by reference counts alone
            try:
                with contextlib.suppress(ModelworksError):
                    await link.call(large(2.5))
                wrong = Call("m", [Tensor("z", "FP32", [1, WIDTH], bytes(SHARED_FROM))], time.monotonic() + 9)
                with contextlib.suppress(InvalidInput):
                    await link.call(wrong)
                with contextlib.suppress(InvalidInput):
                    await link.call(Call("m", large().inputs, time.monotonic() + 9, params={"a": 2**70}))
                with contextlib.suppress(ModelworksError):
                    await link.call(large(seconds=-1))
                assert await soon(lambda: not any(pool.used for pool in pools(host, link)))
            finally:
                gc.enable()

    uvloop.run(story())


def test_texts_are_copied_out_of_shared_memory(tmp_path):
    signature = Signature(
        inputs=[TensorSpec(name="t", datatype="BYTES", shape=[-1])],
        outputs=[TensorSpec(name="t", datatype="BYTES", shape=[-1])],
    )
    texts = ["ü" * 1000] * 300

    async def story():
        async with hosted(tmp_path, lambda inputs: inputs, signature) as (_, endpoint):
            link = await connect(endpoint, SECRET)
            for _ in range(4):
                answer = await link.call(
                    Call("m", [Tensor("t", "BYTES", [300], pack_bytes(texts))], time.monotonic() + 9)
                )
                assert type(answer.outputs[0].data) is bytes
                assert unpack_bytes(answer.outputs[0].data) == [text.encode() for text in texts]

    uvloop.run(story())


def test_without_a_side_socket_or_memory_it_goes_by_copying(tmp_path, monkeypatch):
    async def story():
        async with hosted(tmp_path) as (host, endpoint):
            plain = await connect(endpoint, SECRET, share=False)
            assert plain.sharing is None
            assert type((await plain.call(large(2.0))).outputs[0].data) is bytes
            plain.close()
            assert await soon(lambda: not host.sessions)

            def none(*_):
                raise OSError("no memory")

            monkeypatch.setattr(os, "memfd_create", none)
            link = await connect(endpoint, SECRET)
            for _ in range(3):
                assert type((await link.call(large(2.0))).outputs[0].data) is bytes
            link.close()
            monkeypatch.undo()
            monkeypatch.setattr(shm._libc, "mmap", lambda *_: shm._MAP_FAILED)
            link = await connect(endpoint, SECRET)
            for _ in range(3):
                assert type((await link.call(large(2.0))).outputs[0].data) is bytes
            assert link.sharing.pool.size == 0

    uvloop.run(story())


def descriptors():
    return len(os.listdir("/proc/self/fd"))


async def baseline(host, endpoint):
    """Descriptors that stay: the loop opens one of its own with the first connection."""
    (await connect(endpoint, SECRET)).close()
    assert await soon(lambda: not host.sessions)
    return descriptors()


def mappings():
    with open("/proc/self/maps") as lines:
        return sum("memfd:modelworks" in line for line in lines)


def test_links_cut_at_any_moment_leave_no_memory_and_no_descriptors(tmp_path):
    async def story():
        async with hosted(tmp_path) as (host, endpoint):
            before = await baseline(host, endpoint)
            for turn in range(12):
                link = await connect(endpoint, SECRET)
                await warm(link)
                tasks = [asyncio.create_task(link.call(large(x))) for x in range(3)]
                await asyncio.sleep(0.001 * (turn % 4))
                link.transport.abort()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert not isinstance(result, BaseException) or isinstance(result, LinkLost)
                del tasks, result
            assert await soon(lambda: not host.sessions)
            assert await soon(lambda: len(host._batcher) == 0)
            gc.collect()
            assert await soon(lambda: (mappings(), descriptors()) <= (0, before)), (mappings(), descriptors() - before)

    uvloop.run(story())


DYING = """
import asyncio, sys, uvloop
from modelworks.serve.batcher import Batcher
from modelworks.serve.host import Host
from tests.test_serve_shm import LARGE, SECRET
async def main():
    host = Host(Batcher(lambda i: {"y": i["x"] + 1}, LARGE, max_batch=1), secret=SECRET, replica_id="r", model_version="m")
    await host.listen(sys.argv[1])
    print("up", flush=True)
    await asyncio.Event().wait()
uvloop.run(main())
"""


def test_a_killed_replica_takes_nothing_with_it(tmp_path):
    """kill -9 in mid-flight: what was answered stays readable (no SIGBUS), and all memory goes."""

    async def story():
        endpoint = str(tmp_path / "s")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DYING, endpoint, stdout=asyncio.subprocess.PIPE, cwd=os.getcwd()
        )
        await process.stdout.readline()
        link = await connect(endpoint, SECRET)
        await warm(link)
        kept = await link.call(large(41.0))
        tasks = [asyncio.create_task(link.call(large(x))) for x in range(20)]
        await asyncio.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(result, LinkLost) for result in results)
        assert (to_numpy(kept.outputs[0]) == 42.0).all()
        assert link.calls == {}
        assert link.sharing.pool.used == 0
        del kept, results, tasks
        gc.collect()
        assert await soon(lambda: mappings() == 0)

    uvloop.run(story())


def test_the_first_bytes_passenger_must_be_the_side_socket(tmp_path):
    async def story():
        async with hosted(tmp_path) as (host, endpoint):
            before = await baseline(host, endpoint)
            for passenger in (os.open("/dev/null", os.O_RDONLY), socket.socket().detach()):
                guest = socket.socket(socket.AF_UNIX)
                guest.connect(endpoint)
                socket.send_fds(guest, [b"\0"], [passenger])
                guest.setblocking(False)
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(guest, 1), 2) == b""
                guest.close()
                os.close(passenger)
            assert not host.sessions
            assert descriptors() == before

    uvloop.run(story())


async def churn(folder, calls, *, cut_every=200, seed=0):
    """Calls of mixed sizes with random aborts and link cuts; returns what is left over: pending, slots, descriptors."""
    rng = random.Random(seed)
    async with hosted(folder, max_batch=4) as (host, endpoint):
        before = await baseline(host, endpoint)
        link = await connect(endpoint, SECRET)
        tasks = set()
        wrong = []

        async def one(link, value, small):
            call = large(value)
            if small:
                call.inputs[0] = Tensor("x", "FP32", [0, WIDTH], b"")
            try:
                answer = await link.call(call)
            except LinkLost:
                return
            array = to_numpy(answer.outputs[0])
            if not (array == value * 2).all():
                wrong.append((value, array.ravel()[:3]))

        for number in range(calls):
            task = asyncio.create_task(one(link, float(number % 1000), rng.random() < 0.3))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_later(rng.random() * 0.004, task.cancel)
            if number % cut_every == cut_every - 1:
                (link.transport.abort if rng.random() < 0.5 else link.close)()
                link = await connect(endpoint, SECRET)
            if len(tasks) >= 16:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*tasks, return_exceptions=True)
        await soon(lambda: len(host._batcher) == 0 and len(host.sessions) == 1)
        await soon(lambda: not any(pool.used for pool in pools(host, link)))
        used = sum(pool.used for pool in pools(host, link))
        left = len(link.calls) + len(host._batcher) + sum(len(s.numbers) for s in host.sessions)
        link.close()
        await soon(lambda: not host.sessions)
        gc.collect()
        await soon(lambda: descriptors() <= before and mappings() == 0)
        return {
            "pending": left,
            "slots": used,
            "sessions": len(host.sessions),
            "descriptors": descriptors() - before,
            "mappings": mappings(),
            "wrong": wrong,
        }


CLEAN = {"pending": 0, "slots": 0, "sessions": 0, "descriptors": 0, "mappings": 0, "wrong": []}


def test_aborts_and_cuts_leak_nothing(tmp_path):
    assert uvloop.run(churn(tmp_path, 1500)) == CLEAN


@pytest.mark.slow
def test_many_aborts_and_cuts_leak_nothing(tmp_path):
    assert uvloop.run(churn(tmp_path, 20_000, seed=1)) == CLEAN
