"""Rate limits across gateways: the clock turned by hand, and real processes, one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelworks.security.leases import _GROUPS, _SLOTS, Buckets, LeasingLimiter, create


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def table(tmp_path: Path):
    descriptor = create(tmp_path)
    assert not list(tmp_path.iterdir()), "it has no name"
    yield descriptor
    os.close(descriptor)


def pair(table: int) -> tuple[Clock, LeasingLimiter, LeasingLimiter]:
    clock = Clock()
    return clock, LeasingLimiter(Buckets(table), clock=clock), LeasingLimiter(Buckets(table), clock=clock)


def test_two_gateways_share_one_bucket(table: int) -> None:
    clock, one, other = pair(table)
    taken = [(one, other)[number % 2].take("key_1", 60) for number in range(60)]
    assert all(allowed for allowed, _, _ in taken)
    assert [left for _, left, _ in taken] == list(range(59, -1, -1))
    for limiter in (one, other):
        assert limiter.take("key_1", 60) == (False, 0, pytest.approx(1.0))
    clock.now += 1.001
    assert [one.take("key_1", 60)[0], other.take("key_1", 60)[0]] == [True, False]
    assert other.take("key_2", 60)[0], "another key has its own"


def test_a_refusal_is_remembered_until_a_token_is_there(table: int) -> None:
    clock, one, _ = pair(table)
    assert one.take("k", 1)[0]
    assert one.take("k", 1) == (False, 0, pytest.approx(60.0))
    clock.now += 59.0
    assert one.take("k", 1) == (False, 0, pytest.approx(1.0))
    clock.now += 1.1
    assert one.take("k", 1)[0]


def test_a_fast_key_draws_rarely_and_never_beyond_its_limit(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, one, other = pair(table)
    draws = []
    draw = Buckets.draw
    monkeypatch.setattr(Buckets, "draw", lambda *a: draws.append(1) or draw(*a))
    allowed = 0
    while one.take("k", 120_000)[0] and allowed <= 120_000:
        allowed += 1
    assert allowed == 120_000
    assert len(draws) <= 1202
    assert not other.take("k", 120_000)[0]


def test_a_new_limit_holds_at_once(table: int) -> None:
    _, one, other = pair(table)
    assert one.take("k", 100)[0]
    assert sum(other.take("k", 5)[0] for _ in range(20)) == 5


def test_gateways_share_a_keys_tokens(table: int) -> None:
    clock, one, two = pair(table)
    assert one.reserve("key_1", 600, 500)[:2] == (True, 100)
    assert two.reserve("key_1", 600, 200) == (False, 100, pytest.approx(10.0))
    one.give("key_1", 600, -100)
    assert two.reserve("key_1", 600, 1)[:2] == (False, 0)
    two.give("key_1", 600, -60)  # it owes
    assert one.take("key_1", 10)[0]
    clock.now += 6.0
    assert one.reserve("key_1", 600, 1) == (False, 0, pytest.approx(0.1))


def test_a_gateway_that_looked_at_its_clock_earlier_refills_nothing_twice(table: int) -> None:
    buckets, tag = Buckets(table), bytes(16)
    assert buckets.draw(tag, 600, 600, 1000.0) == (600, 0.0)
    assert buckets.draw(tag, 600, 4, 1000.5) == (4, pytest.approx(1.0))
    assert buckets.draw(tag, 600, 1, 1000.0) == (1, pytest.approx(0.0))
    assert buckets.draw(tag, 600, 9, 1000.5) == (0, pytest.approx(0.0))


def test_a_full_group_forgets_the_least_recently_used(table: int) -> None:
    buckets = Buckets(table)
    tags = [(7 + number * _GROUPS).to_bytes(4, "little") + bytes(12) for number in range(_SLOTS + 1)]
    for second, tag in enumerate(tags[:_SLOTS]):
        assert buckets.draw(tag, 10, 10, 1000.0 + second * 1e-3) == (10, 0.0)
    assert buckets.draw(tags[-1], 10, 1, 1001.0)[0] == 1
    assert buckets.draw(tags[1], 10, 10, 1001.0)[0] == 0, "the others are still known"
    assert buckets.draw(tags[0], 10, 10, 1001.0)[0] == 10, "the oldest is not"


_TAKER = """
import sys, time
from modelworks.security.leases import Buckets, LeasingLimiter
limiter = LeasingLimiter(Buckets(int(sys.argv[1])))
print("ready", flush=True)
taken = 0
until = time.monotonic() + float(sys.argv[3])
while time.monotonic() < until:
    taken += limiter.take("k", int(sys.argv[2]))[0]
print(taken, flush=True)
"""


def test_processes_together_take_what_one_could_and_a_killed_one_blocks_nobody(table: int) -> None:
    limit, seconds = 3000, 1.0
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TAKER, str(table), str(limit), str(seconds)],
            stdout=subprocess.PIPE, text=True, pass_fds=(table,),
        )
        for _ in range(3)
    ]  # fmt: skip
    begun = time.monotonic()
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    processes[0].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=20)[0] for process in processes]
    elapsed = time.monotonic() - begun
    assert outputs[0] == ""
    taken = sum(int(text) for text in outputs[1:])
    assert 0 < taken <= limit + limit / 60 * elapsed + 1
