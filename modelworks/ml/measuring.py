"""Which engine runs a language model fastest on this machine, for one user and for many: a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.ml.package import Package
from modelworks.ml.runtimes.choice import LLAMA, OPENVINO, TRANSFORMERS, VLLM, choose
from modelworks.ml.runtimes.registry import RUNTIMES

MANY = 16  # calls at a time
TOKENS = 32  # of each answer
_CONTEXT = 512
_STALLED = 120.0  # seconds without a token after which an engine is given up
_MODULES = {OPENVINO: "openvino_genai", LLAMA: "xllamacpp", TRANSFORMERS: "transformers", VLLM: "vllm"}
_PROMPT = "Write one paragraph about the number {}, and say where one meets it in daily life. "

log = logger("measuring")


def candidates(package: Package) -> list[str]:
    """The engines that are installed and run this model at its quality."""
    manifest, found = package.manifest, []
    for engine, module in _MODULES.items():
        try:
            choose(engine, manifest.runtime, manifest.algorithm, manifest.lineage)
        except InvalidInput:
            continue
        if find_spec(module) is not None:
            found.append(engine)
    return found


def measure(package: Package, threads: int, tell: Callable[[float, str], None]) -> dict[str, Any]:
    """`engines`: figures by engine, each for `one` call and for `many` at a time; `fastest`: the engine for each.

    An engine that fails here has its `error`. InvalidInput when none does.
    """
    names = candidates(package)
    figures: dict[str, Any] = {}
    for index, name in enumerate(names):
        tell(index / len(names), f"measuring {name}")
        try:
            figures[name] = _of_engine(name, package, threads)
        except ModelworksError as error:
            figures[name] = {"error": error.message}
        except Exception as error:  # a plug's edge: the other engines are measured still
            log.error("engine_failed", engine=name, exc_info=error)
            figures[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    sound = {name: found for name, found in figures.items() if "error" not in found}
    if not sound:
        reasons = "; ".join(f"{name}: {found['error']}" for name, found in figures.items())
        raise InvalidInput(f"no engine runs this model here{': ' if reasons else ''}{reasons}", code="no_engine")
    fastest = {who: max(sound, key=lambda name: sound[name][who]["tokens_per_second"]) for who in ("one", "many")}
    return {"engines": figures, "fastest": fastest, "threads": threads, "calls": MANY, "tokens": TOKENS}


def _of_engine(name: str, package: Package, threads: int) -> dict[str, Any]:
    runtime: Any = RUNTIMES.get(name)()
    begun = time.perf_counter()
    runtime.load(package, threads, slots=MANY, context=_CONTEXT)
    loaded = time.perf_counter() - begun
    try:
        _run(runtime, 1, 4, first=0)  # what is set up at the first call is no part of the figures
        one, many = _run(runtime, 1, TOKENS, first=1), _run(runtime, MANY, TOKENS, first=2)
        return {"load_seconds": round(loaded, 2), "one": one, "many": many}
    finally:
        runtime.close()


def _run(runtime: Any, calls: int, tokens: int, *, first: int) -> dict[str, float]:
    """Tokens a second of all calls together, and the mean time to the first token.

    `first`: the number in the first call's prompt. No number comes twice, as engines keep what they have read.
    """
    left: set[int] = set(range(calls))
    answered: dict[int, float] = {}
    waiting = list(range(calls))
    made = 0
    begun = time.perf_counter()
    while left:
        while waiting and len(runtime) < runtime.slots:
            number = waiting.pop(0)
            prompt = Tensor("prompt", "BYTES", [1], pack_bytes([_PROMPT.format(first + number) * 3]))
            params = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
            runtime.admit(number, [prompt], params, True)
        steps = runtime.step(_STALLED)
        if not steps:
            raise ModelworksError(f"no token came for {_STALLED:g} s", code="model_error")
        for number, item, done in steps:
            if isinstance(item, ModelworksError):
                raise item
            answered.setdefault(number, time.perf_counter() - begun)
            if done:
                left.discard(number)
                made += memoryview(item[2].data).cast("i")[1] if item else 0
    seconds = time.perf_counter() - begun
    return {
        "tokens_per_second": round(made / seconds, 2),
        "first_token_ms": round(1000 * sum(answered.values()) / calls, 1),
    }
