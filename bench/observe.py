"""What counting and logging cost a call, in microseconds of CPU: the best of many short bursts.

python -m bench.observe
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from modelworks.core.types import Signature
from modelworks.serve.observe import Observer, Watch
from modelworks.serve.requestlog import RequestLog
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

CALLS, BURSTS = 2000, 300
ROUTE = Route("proj_1", "iris", "iris:1", Signature(inputs=[], outputs=[]), "tabular-classification")
PART = Part([], "iris:1", True, 120, 7, 3)


def cost(call: Callable[[], object], between: Callable[[], object] = lambda: None) -> float:
    best = float("inf")
    for _ in range(BURSTS):
        begun = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.process_time() - begun)
        between()
    return best / CALLS * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = RequestLog(Path(folder) / "requests.log", lines=10**9)
        full = RequestLog(Path(folder) / "full.log", lines=10)
        plain, logging, flooded = Observer(), Observer(log=log), Observer(log=full)

        def count() -> None:
            Watch(plain, ROUTE, len_of_nothing)(PART)

        def request(observer: Observer) -> None:
            observer.request(
                "oip.infer", 200, request_id="req_1", key_id="key_1", project_id="proj_1", deployment="iris",
                model_version="iris:1", seconds=0.001, bytes_in=100, bytes_out=100, rows=1,
            )  # fmt: skip

        flushed: list[float] = []

        def flush() -> None:
            begun = time.process_time()
            log.flush()
            flushed.append(time.process_time() - begun)

        print(f"count a call              {cost(count):6.2f}")
        print(f"count a request           {cost(lambda: request(plain)):6.2f}")
        print(f"  and keep its log line   {cost(lambda: request(logging), flush):6.2f}")
        print(f"  and drop it in a flood  {cost(lambda: request(flooded)):6.2f}")
        print(f"write a line (a thread)   {min(flushed) / CALLS * 1e6:6.2f}")


def len_of_nothing(item: object) -> None:
    """Stands for the caller's `deliver`."""


if __name__ == "__main__":
    main()
