"""What routing one call costs in the gateway: submit -> a link that only notes the call -> its answer delivered.

    python -m bench.router [--calls 200000]

No sockets, no processes: microseconds of the router itself, with 1 and 2 replicas, 32 calls in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

from modelworks.core.tensors import Tensor
from modelworks.core.types import Call, Signature
from modelworks.serve.router import Router
from modelworks.serve.routes import Limits, Route, Snapshot, Target
from modelworks.serve.wire import Part

KEY = ("p", "toy")
PART = Part([], "toy:1")
INPUTS = [Tensor("x", "FP32", [1, 1], b"1234")]


class NotedLink:
    """Keeps each call's callback until it is answered."""

    def __init__(self) -> None:
        self.calls: dict[int, Any] = {}
        self.ready = self.usable = True
        self.lost = self.draining = self.congested = False
        self.ping_sent: float | None = None
        self.last_ping = float("inf")
        self._next = 0

    def start(self, call: Call, deliver: Any, manual: bool = False) -> int:
        self._next += 1
        self.calls[self._next] = deliver
        return self._next

    def abort(self, number: int) -> None:
        self.calls.pop(number, None)

    def close(self) -> None:
        pass

    def answer_all(self) -> None:
        calls, self.calls = self.calls, {}
        for deliver in calls.values():
            deliver(PART)


async def measure(replicas: int, calls: int, window: int = 32) -> float:
    """Microseconds a call."""
    router = Router("x" * 32)
    targets = tuple(Target(f"r{i}", f"/nowhere/{i}") for i in range(replicas))
    route = Route("p", "toy", "toy:1", Signature(inputs=[], outputs=[]), "", None, targets, Limits())
    router.apply(Snapshot(1, {route.key: route}))
    links = []
    for peer in router._peers.values():
        if peer._task:
            peer._task.cancel()
            peer._task = None
        link: Any = NotedLink()
        peer.link = link
        links.append(link)
    answered = 0

    def deliver(item: object) -> None:
        nonlocal answered
        answered += 1

    deadline = time.monotonic() + 3600
    begun = time.process_time()
    for _ in range(calls // window):
        for _ in range(window):
            router.submit(KEY, Call("toy", INPUTS, deadline), deliver)
        for link in links:
            link.answer_all()
    seconds = time.process_time() - begun
    router.close()
    assert answered == calls // window * window
    return seconds / answered * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200_000)
    options = parser.parse_args()
    for replicas in (1, 2, 8):
        found = [asyncio.run(measure(replicas, options.calls // 5)) for _ in range(5)]
        print(f"{replicas} replicas: {statistics.median(found):.2f} us a call (best {min(found):.2f})")


if __name__ == "__main__":
    main()
