"""Admit, step and abort with a runtime whose steps are turned by hand: slots, order, deadlines, counting."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from modelworks.api.openai.stream import Generated
from modelworks.core.errors import DeadlineExceeded, InvalidInput, ModelworksError, Unavailable
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.serve.continuous import Continuous
from modelworks.serve.wire import Part


class Hand:
    """Runs nothing by itself: tests say what a step brings."""

    slots = 2

    def __init__(self) -> None:
        self.aboard: list[Any] = []
        self.aborted: list[Any] = []
        self.events: SimpleQueue[Any] = SimpleQueue()

    def admit(self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool) -> None:
        if params.get("bad"):
            raise InvalidInput("bad")
        self.aboard.append((call_id, params.get("name")))

    def step(self, timeout: float) -> list[Any]:
        try:
            found = self.events.get(timeout=min(timeout, 0.02))
        except Empty:
            return []
        if isinstance(found, Exception):
            raise found
        return [found]

    def abort(self, call_id: Hashable) -> None:
        self.aborted.append(call_id)

    def number(self, name: str) -> Any:
        return next(number for number, known in self.aboard if known == name)

    def says(self, name: str, text: str | None, done: bool = False) -> None:
        self.events.put((self.number(name), None if text is None else outputs(text, 3, len(text)), done))


def outputs(text: str, prompt: int, made: int, reason: str = "") -> list[Tensor]:
    return [
        Tensor("text", "BYTES", [1], pack_bytes([text])),
        Tensor("finish_reason", "BYTES", [1], pack_bytes([reason])),
        Tensor("usage", "INT32", [3], struct.pack("<3i", prompt, made, 0)),
    ]


class Driven:
    def __init__(self) -> None:
        self.hand = Hand()
        self.now = 0.0
        self.steps: list[tuple[Any, Any, bool]] = []
        self.driver = Continuous(self.hand, model_version="m:1", clock=lambda: self.now)
        self.driver.start(self.steps.extend)

    def admit(self, name: str, deadline: float = 100.0, **params: Any) -> None:
        self.driver.admit(name, [], deadline, {"name": name, **params}, True)

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, self.steps
            time.sleep(0.002)

    def of(self, name: str) -> list[Any]:
        return [item for id, item, _ in self.steps if id == name]


@pytest.fixture
def driven() -> Any:
    found = Driven()
    yield found
    found.driver.stop()


def test_calls_beyond_the_slots_wait_and_go_in_order(driven: Driven) -> None:
    for name in "abcd":
        driven.admit(name)
    assert [name for _, name in driven.hand.aboard] == ["a", "b"]
    assert (driven.driver.waiting, driven.driver.in_slots, len(driven.driver)) == (2, 2, 4)
    driven.hand.says("b", "x", done=True)
    driven.until(lambda: len(driven.hand.aboard) == 3)
    assert driven.hand.aboard[-1][1] == "c"
    assert [part.done for part in driven.of("b")] == [True]


def test_an_aborted_call_holds_its_slot_until_the_runtime_lets_go_and_says_nothing_more(driven: Driven) -> None:
    for name in "abc":
        driven.admit(name)
    driven.driver.abort("a")
    assert driven.hand.aborted == [driven.hand.number("a")]
    driven.hand.says("a", "late")
    driven.hand.says("b", "x")
    driven.until(lambda: driven.of("b"))
    assert not driven.of("a")
    assert [name for _, name in driven.hand.aboard] == ["a", "b"]
    driven.hand.says("a", None, done=True)
    driven.until(lambda: len(driven.hand.aboard) == 3)
    driven.driver.abort("nobody")
    driven.driver.abort("c")
    driven.driver.abort("c")
    assert len(driven.hand.aborted) == 2


def test_a_call_that_waits_is_aborted_at_once(driven: Driven) -> None:
    for name in "abc":
        driven.admit(name)
    driven.driver.abort("c")
    assert (driven.driver.waiting, driven.hand.aborted) == (0, [])


def test_deadlines_end_calls_that_wait_and_that_run(driven: Driven) -> None:
    driven.admit("a", deadline=50.0)
    driven.admit("b")
    driven.admit("c", deadline=10.0)
    driven.now = 20.0
    driven.until(lambda: driven.of("c"))
    assert isinstance(driven.of("c")[0], DeadlineExceeded)
    driven.now = 60.0
    driven.until(lambda: driven.of("a"))
    assert isinstance(driven.of("a")[0], DeadlineExceeded)
    assert driven.hand.aborted == [driven.hand.number("a")]


def test_a_call_that_is_refused_takes_no_slot_now_or_later(driven: Driven) -> None:
    with pytest.raises(InvalidInput):
        driven.admit("a", bad=True)
    assert len(driven.driver) == 0
    driven.admit("b")
    driven.admit("c")
    driven.admit("d", bad=True)
    driven.admit("e")
    driven.hand.says("b", "x", done=True)
    driven.until(lambda: driven.of("d") and driven.driver.in_slots == 2)
    assert isinstance(driven.of("d")[0], InvalidInput)


def test_an_engine_that_breaks_fails_its_calls_and_takes_no_more(driven: Driven) -> None:
    for name in "abc":
        driven.admit(name)
    driven.hand.events.put(RuntimeError("broken"))
    driven.until(lambda: len(driven.steps) == 3)
    assert all(isinstance(item, Unavailable) for _, item, _ in driven.steps)
    with pytest.raises(Unavailable):
        driven.admit("d")


def test_admissions_and_aborts_from_another_thread_leave_nothing(driven: Driven) -> None:
    """200 calls, half of them aborted while the engine's thread answers the others."""
    stop = threading.Event()

    def engine() -> None:
        seen = 0
        while not stop.is_set():
            for number, _ in driven.hand.aboard[seen:]:
                driven.hand.events.put((number, outputs("x", 1, 1), False))
                driven.hand.events.put((number, outputs("y", 1, 2, "stop"), True))
                seen += 1
            time.sleep(0.001)

    thread = threading.Thread(target=engine)
    thread.start()
    for index in range(200):
        driven.admit(f"call{index}")
        if index % 2:
            driven.driver.abort(f"call{index}")
    driven.until(lambda: not len(driven.driver) and not driven.driver.in_slots)
    stop.set()
    thread.join()
    for index in range(0, 200, 2):
        assert [part.done for part in driven.of(f"call{index}")] == [False, True], index


def test_what_a_slow_client_has_not_taken_is_one_text_and_counted_when_it_is_taken() -> None:
    async def run() -> None:
        made = Generated()
        for count in range(1, 1001):
            made.deliver(Part(outputs("é", 5, count), "m:1", False))
        assert len(made.pending) <= 257
        assert made.delivered == 0
        await made.ready()
        assert made.take() == "é" * 1000
        assert made.delivered == 1000
        made.deliver(Part(outputs("", 5, 1001, "stop"), "m:1", True))
        await made.ready()
        assert (made.take(), made.delivered, made.reason, made.done) == ("", 1001, "stop", True)

    asyncio.run(run())


def test_a_client_that_leaves_or_an_error_wakes_the_reader() -> None:
    async def run() -> None:
        for act in (lambda made: made.leave(), lambda made: made.deliver(ModelworksError("broken"))):
            made = Generated()
            asyncio.get_running_loop().call_later(0.01, act, made)
            await asyncio.wait_for(made.ready(whole=True), 2)
            assert made.gone or made.error

    asyncio.run(run())
