"""One key that floods beside one that is calm: what the calm one's callers notice, over HTTP and gRPC.

    python -m bench.fairness [--seconds 6] [--flood 256]

The flood keeps so many calls outstanding, from a process of its own; the calm key's 4 callers send 20 requests a second
each. Two models: iris (microseconds, the gateway is what is busy) and a heavy one (milliseconds, calls wait for it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import grpc
import uvloop
from rich.console import Console
from rich.table import Table

from bench import grpc_load, load
from bench.graphs import heavy
from bench.grpc_infer import PATH
from bench.predict import ROW
from bench.stage import Stage, stage

CALLERS, PAUSE = 4, 0.05
DOORS = ("http", "grpc")
Ask = Callable[[], Awaitable[bool]]  # one request: whether it was answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--flood", type=int, default=256)
    parser.add_argument("--as", dest="role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        flood(options.role, options.flood, options.seconds, json.loads(sys.stdin.readline()))
        return
    with tempfile.TemporaryDirectory(prefix="mw-fairness-") as folder, stage(Path(folder)) as server:
        server.learn_iris()
        (Path(folder) / "heavy.onnx").write_bytes(heavy())
        server.deploy("heavy", Path(folder) / "heavy.onnx")
        Console(width=140).print(table(server, options.flood, options.seconds))


def body(model: str) -> bytes:
    inputs: list[dict[str, object]] = [
        {"name": name, "datatype": "FP32", "shape": [1, 1], "data": [value]} for name, value in ROW.items()
    ]
    if model == "heavy":
        inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": list(ROW.values())}]
    return json.dumps({"inputs": inputs}).encode()


def message(model: str) -> bytes:
    from modelworks.api.grpc.messages import message

    request = message("inference.ModelInferRequest")(model_name=model)
    for item in json.loads(body(model))["inputs"]:
        tensor = request.inputs.add(name=item["name"], datatype="FP32", shape=item["shape"])
        tensor.contents.fp32_contents.extend(item["data"])
    return bytes(request.SerializeToString())


# the flood


def flood(door: str, calls: int, seconds: float, to: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {to['key']}"}
    port, model = int(to["port"]), to["model"]
    if door == "http":
        request = load.post(f"/v2/models/{model}/infer", body(model), headers)
        found = load.measure("127.0.0.1", port, request, connections=calls, seconds=seconds)
    else:
        found = grpc_load.measure(port, PATH, headers, message(model), streams=calls, seconds=seconds)
    print(round(found.rate))


@contextmanager
def flooded(server: Stage, door: str | None, model: str, calls: int, seconds: float, key: str) -> Iterator[list[int]]:
    """While it lasts; then the list has the flood's answers a second."""
    rate: list[int] = []
    if door is None:
        yield rate
        return
    command = [sys.executable, "-m", "bench.fairness", "--as", door, "--flood", str(calls), "--seconds", str(seconds)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    port = server.port if door == "http" else server.grpc_port
    assert child.stdin is not None
    child.stdin.write(json.dumps({"key": key, "port": str(port), "model": model}) + "\n")
    child.stdin.close()
    yield rate
    assert child.stdout is not None
    rate.append(int(child.stdout.read()))
    child.wait()


# the calm key


async def calm(ask: Callable[[], Awaitable[Ask]], seconds: float) -> tuple[float, float, int, int]:
    """Milliseconds at the median and at 99 %, answers, failures."""
    times: list[float] = []
    failed = 0

    async def caller() -> None:
        nonlocal failed
        one = await ask()
        until = perf_counter() + seconds
        while (begun := perf_counter()) < until:
            failed += not await one()
            times.append(perf_counter() - begun)
            await asyncio.sleep(PAUSE)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    times.sort()
    return times[len(times) // 2] * 1000, times[int(len(times) * 0.99)] * 1000, len(times) - failed, failed


def over_http(server: Stage, model: str, key: str) -> Callable[[], Awaitable[Ask]]:
    request = load.post(f"/v2/models/{model}/infer", body(model), {"authorization": f"Bearer {key}"})

    async def ask() -> Ask:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def one() -> bool:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(size)
            return head.startswith(b"HTTP/1.1 200")

        return one

    return ask


def over_grpc(server: Stage, model: str, key: str) -> Callable[[], Awaitable[Ask]]:
    request = message(model)

    async def ask() -> Ask:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each caller
        method = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=options).unary_unary(PATH)

        async def one() -> bool:
            try:
                await method(request, metadata=(("authorization", f"Bearer {key}"),), timeout=30)
            except grpc.aio.AioRpcError:
                return False
            return True

        return one

    return ask


def table(server: Stage, calls: int, seconds: float) -> Table:
    keys = {name: server.client.keys.create(name=name, role="invoke-only").key for name in ("calm", "flood")}
    shown = Table("model", "calm over", "flood over", "flood's answers/s", "calm p50 ms", "p99 ms", "answered", "failed",
                  title=f"a calm key beside one with {calls} calls outstanding")  # fmt: skip
    for model in ("iris", "heavy"):
        for door, over in zip(DOORS, (over_http, over_grpc), strict=True):
            for foe in (None, *DOORS):
                with flooded(server, foe, model, calls, seconds + 3, keys["flood"]) as rate:
                    p50, p99, answered, failed = uvloop.run(_measured(over(server, model, keys["calm"]), seconds))
                row = (model, door, foe or "-", f"{rate[0]:,}" if rate else "", f"{p50:.1f}", f"{p99:.1f}", str(answered))
                shown.add_row(*row, str(failed))
                print(*row, failed, file=sys.stderr, flush=True)
    return shown


async def _measured(ask: Callable[[], Awaitable[Ask]], seconds: float) -> tuple[float, float, int, int]:
    await asyncio.sleep(1.5)  # the flood is there
    return await calm(ask, seconds)


if __name__ == "__main__":
    main()
