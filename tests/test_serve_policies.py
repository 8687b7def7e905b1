"""The router's policies in simulated time: fairness, classes, limits, breaker, hedging, sticky calls."""

import asyncio
import statistics

import pytest

from modelworks.core.errors import DeadlineExceeded, InvalidInput, ModelworksError, RateLimited, Unavailable
from modelworks.serve.breaker import THRESHOLD
from modelworks.serve.wire import Part
from tests.turned import Replica, turned

CRASH = ModelworksError("the replica failed", code="internal")
BAD_INPUT = ModelworksError("the model failed on this input", code="model_error")


def answered(results):
    return sum(isinstance(item, Part) for item, _ in results)


def test_a_flood_by_one_key_leaves_the_others_alone():
    async def alone(bench, seconds):
        found = []
        for _ in range(100):
            item, took = await bench.call("quiet")
            assert isinstance(item, Part)
            found.append(took)
            await asyncio.sleep(seconds)
        return statistics.quantiles(found, n=100)[98]

    async def flood(bench, stop):
        refused = 0
        running = set()
        while not stop.is_set():
            while len(running) < 1000:
                try:
                    future = bench.call("flood")
                except RateLimited:
                    refused += 1
                    break
                running.add(future)
                future.add_done_callback(running.discard)
            await asyncio.sleep(0.001)
        return refused

    async def story(bench):
        await bench.start(Replica("a", base=0.005, each=0.001, most=16), Replica("b", base=0.005, each=0.001, most=16))
        calm = await alone(bench, 0.02)
        stop = asyncio.Event()
        flooding = asyncio.create_task(flood(bench, stop))
        await asyncio.sleep(1.0)
        p99 = await alone(bench, 0.02)
        stop.set()
        await flooding
        batch = 0.005 + 16 * 0.001
        assert calm < 0.007
        assert p99 < 5 * batch, "it waits for what is aboard, not for the thousand calls of the other key"
        whole = 1000 / 16 / 2 * batch
        assert p99 < whole / 5

    turned(story)


def test_a_busy_replica_stays_busy_while_its_queue_is_kept_short():
    async def story(bench):
        replica = Replica("a", base=0.010, each=0.0001, most=32)
        await bench.start(replica, queue=10_000)
        results = await asyncio.gather(*[bench.call(f"k{i % 4}") for i in range(1200)])
        begun = bench.loop.time()
        assert answered(results) == 1200
        more = [bench.call("k") for _ in range(1200)]
        await asyncio.gather(*more)
        full = 1200 / 32 * (0.010 + 32 * 0.0001)
        assert bench.loop.time() - begun < 1.15 * full, "batches go on being full"
        assert bench.peer("a").window < 256

    turned(story)


def test_the_dearer_calls_of_a_key_count_for_more():
    async def story(bench):
        replica = Replica("a", most=1)
        await bench.start(replica, in_flight=1)
        futures = [bench.call("first")]
        futures += [bench.call("large", rows=4) for _ in range(40)] + [bench.call("small") for _ in range(40)]
        await asyncio.gather(*futures)
        early = [call.key_id for call in replica.served[1:41]]
        assert 30 <= early.count("small") <= 34

    turned(story)


def test_classes_are_strict_but_the_lowest_does_not_starve():
    async def story(bench):
        replica = Replica("a", base=0.01, most=1)
        await bench.start(replica, in_flight=1, queue=10_000)
        futures = [bench.call("k", priority=2) for _ in range(3)]
        futures += [bench.call("k", priority=1) for _ in range(3)]
        futures += [bench.call("k", priority=0) for _ in range(3)]
        await asyncio.gather(*futures)
        assert [call.priority for call in replica.served] == [2, 0, 0, 0, 1, 1, 1, 2, 2], "the first was aboard already"
        replica.served.clear()
        low = [bench.call("low", priority=2) for _ in range(10)]
        high = [bench.call("high", priority=0) for _ in range(500)]
        await asyncio.gather(*low)
        order = [call.priority for call in replica.served]
        assert order[:90].count(2) == 1, "none of the lower class before it has aged"
        assert order[100:140].count(2) == 9, "then every fourth turn"
        await asyncio.gather(*high)

    turned(story)


def test_a_full_queue_is_shared_between_keys():
    async def story(bench):
        replica = Replica("a", base=1.0, most=1)
        await bench.start(replica, in_flight=1, queue=10)
        first = bench.call("flood")
        flood = [bench.call("flood") for _ in range(10)]
        with pytest.raises(RateLimited) as info:
            bench.call("flood")
        assert info.value.code == "queue_full"
        assert (info.value.retry_after, info.value.detail) == (1.0, {"queued": 10})
        others = [bench.call("other") for _ in range(5)]
        with pytest.raises(RateLimited):
            bench.call("other")
        with pytest.raises(RateLimited):
            bench.call("other", priority=2)
        urgent = bench.call("other", priority=0)
        await asyncio.sleep(0)
        assert [future.done() for future in flood] == [False] * 4 + [True] * 6, "the newest give way"
        refused = [future.result()[0] for future in [*flood, *others] if future.done()]
        assert len(refused) == 6
        assert {(type(item), item.code) for item in refused} == {(RateLimited, "queue_full")}
        results = await asyncio.gather(first, *flood, *others, urgent)
        assert answered(results) == 11
        assert 1.0 < bench.lane.relief * 1.01 < 1.1, "a call a second went"
        assert bench.lane.queued == bench.lane.aboard == 0
        assert isinstance((await urgent)[0], Part)

    turned(story)


def test_concurrency_is_limited_over_all_replicas():
    async def story(bench):
        replicas = [Replica(name, base=0.01, most=1) for name in "ab"]
        await bench.start(*replicas, concurrency=3)
        futures = [bench.call() for _ in range(12)]
        assert bench.lane.aboard == 3
        assert bench.lane.queued == 9
        bench.router.abort(bench.last)
        futures.pop()
        peak = 0
        while not all(future.done() for future in futures):
            peak = max(peak, sum(bench.peer(name).outstanding for name in "ab"))
            await asyncio.sleep(0.002)
        assert peak == 3
        assert bench.lane.aboard == bench.lane.queued == 0
        last = [bench.call() for _ in range(4)]
        for future in last:
            assert not future.done()
        bench.apply("a", "b", concurrency=100)
        assert bench.lane.aboard == 4, "a new limit holds at once"
        await asyncio.gather(*last)

    turned(story)


def test_a_failing_replica_is_avoided_and_tried_again():
    async def story(bench):
        good, bad = Replica("good"), Replica("bad")
        bad.mood = CRASH
        await bench.start(good, bad)
        results = []
        for _ in range(30):
            results.append(await bench.call())
        assert 30 - answered(results) == THRESHOLD, "after so many failures in a row it gets no more"
        assert bench.broken == ["bad"]
        await asyncio.sleep(0.6)
        pair = await asyncio.gather(bench.call(), bench.call(), bench.call())
        assert answered(pair) == 2, "one call tries it; it fails again"
        await asyncio.sleep(0.6)
        assert answered([await bench.call() for _ in range(20)]) == 20, "now it is avoided for longer"
        await asyncio.sleep(0.6)
        bad.mood = None
        assert answered(await asyncio.gather(*[bench.call() for _ in range(20)])) == 20
        assert len(bad.served) == THRESHOLD + 2, "one trial"
        assert answered(await asyncio.gather(*[bench.call() for _ in range(20)])) == 20
        assert len(bad.served) > THRESHOLD + 8, "it carries its half again"

    turned(story)


def test_a_callers_own_mistakes_open_no_breaker_and_the_last_replica_is_never_shut_out():
    async def story(bench):
        a, b = Replica("a"), Replica("b")
        a.mood = InvalidInput("no such feature")
        await bench.start(a, b)
        for _ in range(50):
            await bench.call()
        a.mood = b.mood = BAD_INPUT  # whoever sends it may send many: nobody else shall suffer for it
        a.served.clear()
        b.served.clear()
        for _ in range(50):
            assert (await bench.call())[0] is BAD_INPUT
        assert not bench.broken
        assert len(a.served) + len(b.served) < 65, "an input that is bad is not asked about again and again"
        a.mood = b.mood = None
        await asyncio.sleep(6.0)
        a.mood = b.mood = CRASH
        for _ in range(50):
            await bench.call()
        assert len(bench.broken) == 1
        a.mood = b.mood = None
        assert isinstance((await bench.call())[0], Part)

    turned(story)


def test_a_replica_that_fails_what_another_answers_is_avoided_and_its_callers_get_the_answer():
    async def story(bench):
        a, b = Replica("a"), Replica("b")
        await bench.start(a, b)
        a.mood = BAD_INPUT  # its weights are spoilt: it fails on every input
        results = [await bench.call() for _ in range(30)]
        assert answered(results) == 30, "nobody noticed"
        assert len(bench.broken) == 1
        assert len(a.served) < THRESHOLD + 3
        a.mood = None
        await asyncio.sleep(1.0)
        assert answered([await bench.call() for _ in range(4)]) == 4
        assert not bench.broken

    turned(story)


def test_with_a_single_replica_a_failing_model_is_told_at_once():
    async def story(bench):
        a = Replica("a")
        await bench.start(a)
        a.mood = BAD_INPUT
        assert [(await bench.call())[0] for _ in range(20)] == [BAD_INPUT] * 20
        assert len(a.served) == 20
        assert not bench.broken

    turned(story)


def test_a_model_that_hangs_behind_a_loop_that_answers_is_avoided():
    async def story(bench):
        a, b = Replica("a"), Replica("b")
        await bench.start(a, b)
        a.mood = "silent"
        bench.peer("a").link.ping = lambda now: None  # its loop goes on
        results = await asyncio.gather(*[bench.call(seconds=0.2) for _ in range(8)])
        assert answered(results) == 4
        for _ in range(10):
            results = await asyncio.gather(*[bench.call(seconds=0.2) for _ in range(2)])
            if answered(results) == 2:
                break
        assert answered(results) == 2
        assert {type(item) for item, _ in results} <= {Part, DeadlineExceeded}
        assert bench.broken == ["a"]

    turned(story)


def test_hedged_calls_take_the_first_answer():
    async def story(bench):
        slow, fast = Replica("slow", base=2.0), Replica("fast", base=0.01)
        await bench.start(slow, fast, hedge_seconds=0.1)
        for _ in range(50):  # earns the allowance
            bench.peer("slow").window = 0
            await bench.call()
        bench.peer("slow").window = 256
        fast.mood = None
        bench.peer("fast").window = 0
        hedged = bench.call()
        bench.peer("fast").window = 256
        item, took = await hedged
        assert item.model_version == "fast"
        assert took == pytest.approx(0.11, abs=0.01)
        assert slow.aborted == 1
        assert bench.router.hedged == 1
        assert bench.lane.aboard == 0
        bench.peer("fast").window = 0
        once = bench.call(idempotent=False)
        stream = bench.call(stream=True)
        bench.peer("fast").window = 256
        assert {item.model_version for item, _ in await asyncio.gather(once, stream)} == {"slow"}

    turned(story)


def test_hedges_are_at_most_five_in_a_hundred():
    async def story(bench):
        slow, other = Replica("a", base=0.5, most=1000), Replica("b", base=0.5, most=1000)
        await bench.start(slow, other, hedge_seconds=0.1, in_flight=100_000)
        for _ in range(20):
            await asyncio.gather(*[bench.call() for _ in range(100)])
        assert 0 < bench.router.hedged <= 100
        assert len(slow.served) + len(other.served) + slow.aborted + other.aborted == 2000 + bench.router.hedged
        assert bench.lane.aboard == 0
        assert not bench.router._aboard

    turned(story)


@pytest.mark.parametrize("dies", ["first", "second", "both"])
def test_a_hedged_call_outlives_the_death_of_a_replica(dies):
    async def story(bench):
        a, b = Replica("a", base=1.0), Replica("b", base=1.0)
        await bench.start(a, b, hedge_seconds=0.1)
        bench.lane.hedges.allowance = 1.0
        bench.peer("b").window = 0
        future = bench.call()
        bench.peer("b").window = 256
        await asyncio.sleep(0.5)
        assert bench.router.hedged == 1
        for replica in {"first": [a], "second": [b], "both": [a, b]}[dies]:
            del bench.replicas[replica.name]
            replica.die()
        item, took = await future
        if dies == "both":
            assert item.code == "poison_call"
        else:
            assert isinstance(item, Part)
            assert took < 1.2, "the other seat is not given up"
        assert bench.lane.aboard == bench.lane.queued == 0

    turned(story)


def test_sticky_calls_go_to_one_replica_while_it_keeps_up():
    async def story(bench):
        replicas = [Replica(name, base=0.01, most=1) for name in "abcd"]
        await bench.start(*replicas)
        homes = {}
        for turn in range(3):
            for user in range(200):
                item, _ = await bench.call(sticky=f"user-{user}")
                assert homes.setdefault(user, item.model_version) == item.model_version, turn
        sizes = [list(homes.values()).count(name) for name in "abcd"]
        assert min(sizes) > 25
        gone = replicas[0]
        del bench.replicas["a"]
        gone.die()
        for user, home in homes.items():
            item, _ = await bench.call(sticky=f"user-{user}")
            assert home == "a" or item.model_version == home, "only the lost replica's users move"
        crowd = await asyncio.gather(*[bench.call(sticky="one") for _ in range(100)])
        assert len({item.model_version for item, _ in crowd}) == 3, "a crowd spills over"

    turned(story)


def test_waiting_calls_end_at_their_deadline_and_nothing_is_left():
    async def story(bench):
        await bench.start(Replica("a", base=5.0, most=1), in_flight=1)
        futures = [bench.call(f"k{i % 3}", priority=i % 3, seconds=0.1 + i / 100) for i in range(30)]
        results = await asyncio.gather(*futures)
        assert {type(item) for item, _ in results} == {DeadlineExceeded}
        assert all(took < 0.1 + i / 100 + 0.06 for i, (_, took) in enumerate(results))
        assert bench.lane.queued == bench.lane.aboard == 0
        bench.apply()
        nobody = await bench.call(seconds=0.2)
        assert isinstance(nobody[0], Unavailable)

    turned(story)
