"""The rate limiter, with a clock turned by hand."""

from __future__ import annotations

import threading

import pytest

from modelworks.security.quota import RateLimiter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_minutes_calls_at_once_then_one_by_one(clock):
    limiter = RateLimiter(clock=clock)
    answers = [limiter.take("key_1", 60) for _ in range(60)]
    assert all(allowed for allowed, _, _ in answers)
    assert [left for _, left, _ in answers] == list(range(59, -1, -1))
    assert answers[-1][2] == pytest.approx(60.0)  # seconds until all are there again
    assert limiter.take("key_1", 60) == (False, 0, pytest.approx(1.0))  # seconds until the next
    clock.now += 0.5
    assert limiter.take("key_1", 60) == (False, 0, pytest.approx(0.5))
    clock.now += 0.5
    assert limiter.take("key_1", 60)[0]
    assert not limiter.take("key_1", 60)[0]


def test_what_is_saved_up_is_bounded_and_refusals_cost_nothing(clock):
    limiter = RateLimiter(clock=clock)
    for _ in range(10):
        limiter.take("key_1", 3)
    clock.now += 3600
    assert [limiter.take("key_1", 3)[0] for _ in range(4)] == [True, True, True, False]


def test_keys_do_not_share(clock):
    limiter = RateLimiter(clock=clock)
    assert limiter.take("key_1", 1)[0]
    assert not limiter.take("key_1", 1)[0]
    assert limiter.take("key_2", 1)[0]


def test_a_smaller_limit_holds_at_once(clock):
    limiter = RateLimiter(clock=clock)
    limiter.take("key_1", 1000)
    assert [limiter.take("key_1", 2)[0] for _ in range(3)] == [True, True, False]


def test_a_clock_that_goes_back_gives_nothing(clock):
    limiter = RateLimiter(clock=clock)
    clock.now = 100.0
    limiter.take("key_1", 1)
    clock.now = 0.0
    assert not limiter.take("key_1", 1)[0]
    clock.now = 100.0
    assert not limiter.take("key_1", 1)[0]


def test_memory_is_bounded_and_the_busy_stay(clock):
    limiter = RateLimiter(clock=clock, capacity=10)
    limiter.take("busy", 1)
    for number in range(1000):
        limiter.take(f"key_{number}", 1)
        assert not limiter.take("busy", 1)[0]
    assert len(limiter._buckets) == 10


def test_threads_overshoot_by_nothing(clock):
    limiter = RateLimiter(clock=clock)
    allowed = []

    def call() -> None:
        allowed.extend(limiter.take("key_1", 100)[0] for _ in range(100))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(allowed) == 100


def test_tokens_are_reserved_and_given_back(clock):
    limiter = RateLimiter(clock=clock)
    assert limiter.reserve("key_1", 600, 500) == (True, 100, pytest.approx(50.0))
    assert limiter.reserve("key_1", 600, 200) == (False, 100, pytest.approx(10.0))  # seconds until 200 are there
    assert limiter.take("key_1", 1)[0]  # calls are counted apart
    limiter.give("key_1", 600, 400)
    assert limiter.reserve("key_1", 600, 0)[:2] == (True, 500)
    limiter.give("key_1", 600, -700)  # used more than reserved
    assert limiter.reserve("key_1", 600, 100) == (False, 0, pytest.approx(30.0))
    clock.now += 3600
    assert limiter.reserve("key_1", 600, 0)[1] == 600
    limiter.give("key_1", 600, 50)
    assert limiter.reserve("key_1", 600, 0)[1] == 600  # never more than a minute's
