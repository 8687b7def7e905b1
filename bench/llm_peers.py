"""What `bench.llm` compares with, each in a process of its own: python -m bench.llm_peers KIND MODEL THREADS STREAMS

`openvino` and `llama` call the engine in this process; `xllamacpp` is its own HTTP server. The first line on stdout says
that the model is loaded (for a server: its address). Then one JSON line a round comes in on stdin, a list of
[prompt's messages, max tokens], and one goes out: tokens, seconds, seconds to each first token.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a replica

BLOCK = 32
CONTEXT = 1024  # tokens a stream


class OpenVino:
    """OpenVINO GenAI's continuous batching, stepped by hand."""

    def __init__(self, model: str, threads: int, streams: int) -> None:
        import openvino_genai as genai

        self._genai = genai
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.num_kv_blocks = 65_536 // BLOCK
        scheduler.max_num_batched_tokens = 256
        scheduler.max_num_seqs = 256
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self._tokenizer = self._pipeline.get_tokenizer()
        self._number = 0

    def run(self, asked: list[tuple[list[dict[str, str]], int]]) -> tuple[int, float, list[float]]:
        begun = time.perf_counter()
        handles = []
        for messages, most in asked:
            config = self._genai.GenerationConfig(max_new_tokens=most, ignore_eos=True, apply_chat_template=False)
            prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            self._number += 1
            handles.append(self._pipeline.add_request(self._number, prompt, config))
        firsts = [0.0] * len(handles)
        tokens = 0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - begun
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        tokens += len(output.generated_ids)
                        firsts[index] = firsts[index] or now
        return tokens, time.perf_counter() - begun, firsts


class Llama:
    """llama.cpp called in this process, a thread a stream: its own HTTP server, by its other door."""

    def __init__(self, model: str, threads: int, streams: int, *, port: int | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = model
        for cpu in (params.cpuparams, params.cpuparams_batch):
            cpu.n_threads = threads
        params.n_parallel = streams
        params.n_ctx = CONTEXT * streams
        params.kv_unified = False
        params.verbosity = -1
        if port is not None:
            params.hostnames = ["127.0.0.1"]
            params.port = port
        self._server = xllamacpp.Server(params)
        self.address = self._server.listening_address

    def run(self, asked: list[tuple[list[dict[str, str]], int]]) -> tuple[int, float, list[float]]:
        begun = time.perf_counter()
        firsts, tokens = [0.0] * len(asked), [0] * len(asked)

        def one(index: int, messages: Any, most: int) -> None:
            def take(chunk: Any) -> bool:
                if chunk.get("usage"):
                    tokens[index] = chunk["usage"]["completion_tokens"]
                elif chunk["choices"][0]["delta"].get("content"):
                    firsts[index] = firsts[index] or time.perf_counter() - begun
                return False

            body = {"messages": messages, "max_tokens": most, "temperature": 0, "ignore_eos": True, "stream": True}
            self._server.handle_chat_completions({**body, "stream_options": {"include_usage": True}}, take)

        threads = [
            threading.Thread(target=one, args=(index, messages, most)) for index, (messages, most) in enumerate(asked)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(tokens), time.perf_counter() - begun, firsts


def main() -> None:
    kind, model, threads, streams = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print on stdout
    if kind == "xllamacpp":
        server = Llama(model, threads, streams, port=0)
        print(server.address, file=out, flush=True)
        sys.stdin.read()
        return
    engine = OpenVino(model, threads, streams) if kind == "openvino" else Llama(model, threads, streams)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.run(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # without the engines' clean-up
