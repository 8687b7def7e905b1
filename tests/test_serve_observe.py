"""What a gateway counts is what happened; figures of several gateways sum and never go backwards; the log is bounded."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading

import msgspec
import pytest
import uvloop

from modelworks.core.errors import DeadlineExceeded, ModelworksError, RateLimited
from modelworks.core.telemetry import resident
from modelworks.serve.batcher import Batcher
from modelworks.serve.figures import MAX_SERIES, OTHER
from modelworks.serve.gateway import Gateway
from modelworks.serve.gather import Shelf, alone
from modelworks.serve.host import Host
from modelworks.serve.observe import CANCELLED, Observer, rows_of
from modelworks.serve.requestlog import RequestLog
from modelworks.serve.router import Router
from modelworks.serve.routes import Snapshot
from modelworks.serve.wire import Part
from tests.serve_toys import FAULTY, PRINCIPAL, SECRET, SIGNATURE, toy_call, toy_predict, toy_route

TOY = ("p", "toy", "toy:1")


@contextlib.asynccontextmanager
async def gateway_of(folder, *names, predict=toy_predict, observer=None, **limits):
    """A gateway with hosts of the toy in this process. Yields (gateway, hosts)."""
    hosts = {}
    for name in names:
        batcher = Batcher(predict, SIGNATURE, model_version="toy:1")
        hosts[name] = Host(batcher, secret=SECRET, replica_id=name, model_version="toy:1")
        await hosts[name].listen(str(folder / name))
    router = Router(SECRET)
    gateway = Gateway(router, observer=observer)
    route = toy_route(*[(name, str(folder / name)) for name in names], **limits)
    router.apply(Snapshot(1, {route.key: route}))
    try:
        await until(lambda: sum(state.connected for state in router.states()) == len(names))
        yield gateway, hosts
    finally:
        router.close()
        for host in hosts.values():
            await host.drain(0.2)


async def until(condition, seconds=5.0):
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


def blocked(opened):
    def predict(inputs):
        opened.wait(10)
        return toy_predict(inputs)

    return predict


# -- counting ----------------------------------------------------------------------------------------------------------


def test_counters_equal_what_was_sent(tmp_path):
    async def story():
        async with gateway_of(tmp_path, "a") as (gateway, _):
            for _ in range(20):
                await gateway.infer(PRINCIPAL, toy_call())
            for _ in range(3):
                with pytest.raises(ModelworksError):
                    await gateway.infer(PRINCIPAL, toy_call(FAULTY))
            await asyncio.gather(*(gateway.infer(PRINCIPAL, toy_call()) for _ in range(30)))
            return gateway.observer.tallies

    tallies = uvloop.run(story())
    tally = tallies[TOY]
    assert list(tallies) == [TOY]
    assert tally.outcomes == {200: 50, 500: 3}
    assert sum(tally.duration) == 53
    assert sum(tally.queue) == sum(tally.model) == sum(tally.batch) == 50
    duration, _, model, batch = tally.histograms()
    assert 0 < model.total < duration.total
    assert batch.total > 50  # the thirty that came together ran together


def test_refused_cancelled_and_late_calls_are_counted_too(tmp_path):
    opened = threading.Event()

    async def story():
        async with gateway_of(tmp_path, "a", predict=blocked(opened), queue=1, in_flight=2) as (gateway, _):
            tasks = [asyncio.create_task(gateway.infer(PRINCIPAL, toy_call())) for _ in range(3)]
            await until(lambda: gateway.router.waiting(("p", "toy")) == 1)
            with pytest.raises(RateLimited):
                await gateway.infer(PRINCIPAL, toy_call())
            assert gateway.router.outstanding(("p", "toy")) == 3
            tasks[0].cancel()  # aboard
            tasks[2].cancel()  # waiting
            await asyncio.gather(*tasks[::2], return_exceptions=True)
            with pytest.raises(DeadlineExceeded):
                await gateway.infer(PRINCIPAL, toy_call(seconds=0.1))
            opened.set()
            await tasks[1]
            return gateway.observer.tallies[TOY].outcomes

    assert uvloop.run(story()) == {200: 1, CANCELLED: 2, 429: 1, 504: 1}


def test_retries_are_counted_and_the_call_once(tmp_path):
    opened = threading.Event()

    async def story():
        async with gateway_of(tmp_path, "a", "b", predict=blocked(opened)) as (gateway, hosts):
            tasks = [asyncio.create_task(gateway.infer(PRINCIPAL, toy_call())) for _ in range(4)]
            await until(lambda: all(host.sessions and len(host._batcher) for host in hosts.values()))
            lost = sum(len(session.numbers) for session in hosts["a"].sessions)
            for session in list(hosts["a"].sessions):
                session.transport.abort()
            opened.set()
            await asyncio.gather(*tasks)
            return gateway.observer.tallies[TOY].outcomes, gateway.router.retries, lost

    outcomes, retries, lost = uvloop.run(story())
    assert outcomes == {200: 4}
    assert lost > 0
    assert retries == {("p", "toy"): lost}


def test_a_stream_counts_when_its_last_part_comes():
    observer = Observer()
    seen = []
    watch = observer.watch(toy_route(("a", "/a")), seen.append)
    for number in range(3):
        watch(Part([], "toy:2", done=number == 2))
        assert TOY not in observer.tallies
        assert bool(observer.tallies) == (number == 2)
    assert len(seen) == 3
    assert observer.tallies["p", "toy", "toy:2"].outcomes == {200: 1}  # the version that answered, not the route's


def test_series_are_bounded():
    observer = Observer()
    for number in range(MAX_SERIES + 500):
        observer.tally(("p", "toy", f"toy:{number}")).answered += 1
    assert len(observer.tallies) == MAX_SERIES + 1
    assert OTHER in observer.tallies


def test_rows_of():
    assert rows_of(toy_call()) == 1


def test_memory_is_flat_over_20000_calls(tmp_path):
    """With everything on: counters, published figures, the request log."""

    async def story():
        observer = Observer(log=RequestLog(tmp_path / "requests.log"))
        async with gateway_of(tmp_path, "a", observer=observer) as (gateway, _):
            observer.start(gateway.router, tmp_path)

            async def some(count):
                for _ in range(count // 50):
                    await asyncio.gather(*(gateway.infer(PRINCIPAL, toy_call()) for _ in range(50)))
                    for _ in range(50):
                        observer.request("oip.infer", 200, request_id="r" * 24, deployment="toy", rows=1)
                gc.collect()

            await some(5000)
            before = resident()
            await some(20000)
            after = resident()
            observer.stop()
            return before, after, observer.tallies[TOY].outcomes

    before, after, outcomes = uvloop.run(story())
    assert outcomes == {200: 25000}
    assert after < before * 1.02


def test_what_is_published(tmp_path):
    async def story():
        observer = Observer()
        async with gateway_of(tmp_path, "a", "b", observer=observer) as (gateway, _):
            observer.start(gateway.router, tmp_path)
            for _ in range(5):
                await gateway.infer(PRINCIPAL, toy_call())
            await until(lambda: all(state.memory for state in gateway.router.states()))
            await until(lambda: sum(observer.lag.counts) >= 2)
            observer._sample(10.0)
            for _ in range(20):
                await gateway.infer(PRINCIPAL, toy_call())
            observer._sample(20.0)
            totals = alone(observer.snapshot())
            observer.stop()
            return totals

    totals = uvloop.run(story())
    load = totals.loads["p", "toy"]
    assert (load.per_second, load.errors_per_second, load.aboard, load.waiting) == (2.0, 0.0, 0, 0)
    assert set(totals.replicas) == {"a", "b"}
    assert all(replica.connected and replica.memory > 1e6 for replica in totals.replicas.values())
    assert totals.memory > 1e6
    assert totals.gateways == 1


# -- several gateways --------------------------------------------------------------------------------------------------


def counted(observer, calls):
    for _ in range(calls):
        observer.watch(toy_route(("a", "/a")), lambda item: None)(Part([], "toy:1"))
        observer.call(("p", "toy"), "key_1")
    observer.request("oip.infer", 200)
    return observer.snapshot()


def total_calls(totals):
    return sum(tally.outcomes[200] for tally in totals.tallies.values())


def test_two_gateways_sum_and_what_one_counted_outlives_it(tmp_path):
    first, second = Observer(), Observer()
    one, two = Shelf(tmp_path, first.token), Shelf(tmp_path, second.token)
    one.put(counted(first, 3))
    two.put(counted(second, 4))
    for shelf in (one, two):  # whoever is asked
        totals = shelf.total()
        assert total_calls(totals) == 7
        assert totals.gateways == 2
        assert totals.requests == {("oip.infer", 200): 2}
        assert totals.calls == {("p", "toy", "key_1"): 7}
    one.close()
    for _ in range(2):
        totals = two.total()
        assert total_calls(totals) == 7
        assert totals.gateways == 1
    assert not list(tmp_path.glob(f"metrics-{first.token}*"))
    two.put(counted(second, 1))
    two.close()
    third = Shelf(tmp_path, "third")  # after a restart of everything
    assert total_calls(third.total()) == 8
    assert third.total().calls == {("p", "toy", "key_1"): 8}
    third.close()


def test_a_crash_between_merging_and_removing_counts_nothing_twice(tmp_path):
    dead = Observer()
    shelf = Shelf(tmp_path, dead.token)
    shelf.put(counted(dead, 5))
    shelf.close()
    kept = {path: path.read_bytes() for path in tmp_path.glob(f"metrics-{dead.token}*")}
    living = Shelf(tmp_path, "living")
    assert total_calls(living.total()) == 5
    for path, data in kept.items():
        path.write_bytes(data)
    assert total_calls(living.total()) == 5
    assert not any(path.exists() for path in kept)
    living.close()


def test_a_killed_gateways_figures_stay(tmp_path):
    program = """
import sys, time
from pathlib import Path
from modelworks.serve.gather import Shelf
from tests.test_serve_observe import Observer, counted
observer = Observer()
shelf = Shelf(Path(sys.argv[1]), observer.token)
shelf.put(counted(observer, 6))
print("ready", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    living = Shelf(tmp_path, "living")
    try:
        assert child.stdout.readline() == "ready\n"
        totals = living.total()
        assert (total_calls(totals), totals.gateways) == (6, 1)  # the living one has published nothing
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        totals = living.total()
        assert (total_calls(totals), totals.gateways) == (6, 0)
    finally:
        child.kill()
        child.communicate()
        living.close()


def test_files_that_cannot_be_read_are_ignored(tmp_path):
    living = Shelf(tmp_path, "living")
    living.put(counted(Observer(), 2))
    (tmp_path / "metrics-broken.live").touch()
    (tmp_path / "metrics-broken.data").write_bytes(b"\x00nonsense")
    (tmp_path / "metrics-old.live").touch()
    (tmp_path / "metrics-old.data").write_bytes(msgspec.msgpack.encode([0, "old"]))
    assert total_calls(living.total()) == 2
    living.close()


# -- the request log ---------------------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_request(tmp_path):
    observer = Observer(log=RequestLog(tmp_path / "requests.log"))
    observer.request(
        "oip.infer", 200, request_id="req_1", key_id="key_1", project_id="p", deployment="toy", model_version="toy:1",
        seconds=0.0123, bytes_in=10, bytes_out=20, rows=3,
    )  # fmt: skip
    observer.request("deployments.predict", 429)
    observer.log.close()
    first, second = lines_of(tmp_path / "requests.log")
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "request_id": "req_1", "key_id": "key_1", "project_id": "p", "operation": "oip.infer", "deployment": "toy",
        "model_version": "toy:1", "status": 200, "duration_ms": 12.3, "bytes_in": 10, "bytes_out": 20, "rows": 3,
    }  # fmt: skip
    assert second["status"] == 429
    assert oct((tmp_path / "requests.log").stat().st_mode & 0o777) == "0o600"


def test_a_flood_is_cut_errors_are_not_lost_in_it_and_the_log_says_so(tmp_path):
    log = RequestLog(tmp_path / "requests.log", lines=20)
    observer = Observer(log=log)
    for _ in range(1000):
        observer.request("oip.infer", 200)
    observer.request("oip.infer", 503)
    log.flush()
    lines = lines_of(tmp_path / "requests.log")
    assert [line.get("status") for line in lines].count(503) == 1
    assert lines[-1]["event"] == "lines_dropped"
    assert lines[-1]["count"] == log.dropped == 1001 - (len(lines) - 1)
    assert len(lines) == 12
    assert observer.requests == {("oip.infer", 200): 1000, ("oip.infer", 503): 1}  # counters miss nothing


def test_two_gateways_rotate_one_file(tmp_path):
    path = tmp_path / "requests.log"
    logs = [RequestLog(path, max_bytes=2000) for _ in range(2)]
    for number in range(100):
        logs[number % 2].add(200, (f"req_{number}", "", "", "x", "", "", 200, 0.0, 0, 0, 0))
        logs[number % 2].flush()
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2 * 2200
    found = [line["request_id"] for name in ("requests.log.1", "requests.log") for line in lines_of(tmp_path / name)]
    assert found == [f"req_{number}" for number in range(100 - len(found), 100)]
    assert len(found) > 10
    for log in logs:
        log.close()


def test_a_disk_that_is_away_loses_lines_and_nothing_else(tmp_path):
    folder = tmp_path / "logs"
    log = RequestLog(folder / "requests.log")
    log.add(200, ("req_1", "", "", "x", "", "", 200, 0.0, 0, 0, 0))
    log.flush()
    assert log.dropped == 1
    folder.mkdir()
    log.add(200, ("req_2", "", "", "x", "", "", 200, 0.0, 0, 0, 0))
    log.close()
    assert [line.get("request_id", line.get("count")) for line in lines_of(folder / "requests.log")] == ["req_2", 1]


def test_resident_memory():
    assert resident() > 1e6
    assert resident(os.getpid()) > 1e6
    assert resident(2**30) == 0
