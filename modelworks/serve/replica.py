"""The replica program: one process that loads one model package, proves that it answers as training did, and serves it.

    python -m modelworks.serve.replica      (its config comes over stdin, see engines/process.py)

It writes its phase beside its socket as JSON: loading, ready, draining, failed, stopped. Exit codes: 0 drained,
1 crashed, 3 refused to serve (the package does not load, or its parity samples do not come out).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from modelworks.core import telemetry
from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.tasks import GENERATION
from modelworks.core.tensors import to_numpy
from modelworks.engines.base import ReplicaSpec
from modelworks.engines.local import status_path
from modelworks.engines.memory import starved, without_folders
from modelworks.engines.process import attach
from modelworks.ml.package import Manifest, Package
from modelworks.serve.batcher import Batcher
from modelworks.serve.continuous import Continuous
from modelworks.serve.features import encode_features
from modelworks.serve.host import Host
from modelworks.serve.wire import Part

REFUSED = 3
_WARM_UP = 5
_TUNING = 0.3  # seconds that measuring the model may take
_BEAT = 1.0  # seconds between signs of life

log = telemetry.logger("replica")


def main() -> int:
    spec = msgspec.convert(attach(), ReplicaSpec)
    gc.disable()  # until the model is loaded
    telemetry.configure(process=f"replica {spec.replica_id}")
    report = Status(Path(spec.endpoint))
    report("loading")
    begun = time.perf_counter()
    try:
        runtime, manifest = load(spec)
        batcher = driver(runtime, manifest, spec)
        samples = prove(manifest, batcher) if isinstance(batcher, Batcher) else 0
    except Exception as error:  # the process's edge: a runtime that cannot load is reported, not just a stack in a log
        reason = why_not(error, spec.memory_mb)
        if isinstance(error, ModelworksError):
            log.error("refused", reason=error.message, code=error.code)
        else:
            log.exception("load_failed")
        report("failed", reason)
        return REFUSED
    seconds = warm_up(manifest, batcher) if isinstance(batcher, Batcher) else 0.0
    if isinstance(batcher, Batcher) and batcher.adaptive:
        tune(manifest, batcher)
    log.info("loaded", seconds=round(time.perf_counter() - begun, 3), parity_samples=samples, batch_seconds=seconds)
    gc.collect()
    gc.freeze()  # what was loaded is never garbage: later collections skip it
    gc.enable()
    uvloop.run(serve(spec, batcher, seconds, report))
    with contextlib.suppress(ModelworksError):
        runtime.close()
    return 0


def why_not(error: Exception, memory_mb: int | None) -> str:
    """Why the model could not be loaded, for the deployment's message."""
    if memory_mb and starved(error):
        return f"the model needs more than memory_mb={memory_mb} MiB to be loaded; raise resources.memory_mb"
    if isinstance(error, ModelworksError):
        return error.message
    said = without_folders(" ".join(str(error).split()))[:300]
    return f"the model could not be loaded: {type(error).__name__}" + (f": {said}" if said else "")


def load(spec: ReplicaSpec) -> tuple[Any, Manifest]:
    """The runtime with the package loaded, and the package's manifest."""
    manifest = Manifest.parse(Path(spec.manifest).read_bytes())
    name = spec.runtime or _chosen(spec, manifest)
    if spec.tensor_parallel_size and name != "vllm":
        said = f"tensor_parallel_size is for the engine vllm, and {name} runs this model; leave it out"
        raise InvalidInput(said, param="tensor_parallel_size")
    runtime = _runtime(name)()
    package = Package(manifest, _locator(spec))
    if hasattr(runtime, "admit") and manifest.task == GENERATION:
        adapters = {
            name: Package(Manifest.parse(Path(path).read_bytes()), _locator(spec)) for name, path in spec.adapters.items()
        }
        more = {"tensor_parallel_size": spec.tensor_parallel_size} if spec.tensor_parallel_size else {}
        runtime.load(package, spec.threads, slots=spec.max_batch, context=spec.context, adapters=adapters, **more)
    elif hasattr(runtime, "admit"):
        runtime.load(package, spec.threads, slots=spec.max_batch)
    else:
        runtime.load(package, spec.threads)
    return runtime, manifest


def driver(runtime: Any, manifest: Manifest, spec: ReplicaSpec) -> Batcher | Continuous:
    """What runs the calls: a runtime that batches continuously by itself, or a batcher around `predict`."""
    if hasattr(runtime, "admit"):
        return Continuous(runtime, model_version=spec.model_version)
    return Batcher(
        runtime.predict,
        manifest.signature,
        model_version=spec.model_version,
        max_batch=spec.max_batch,
        max_rows=spec.max_rows,
        wait_ms=spec.wait_ms,
        auto=spec.auto_batch,
        p99_ms=spec.p99_ms,
    )


def _chosen(spec: ReplicaSpec, manifest: Manifest) -> str:
    from modelworks.ml.runtimes.choice import choose

    name = choose(spec.engine, manifest.runtime, manifest.algorithm, manifest.lineage)
    if name != manifest.runtime:
        log.info("engine_chosen", engine=name)
    return name


def _runtime(name: str) -> Callable[[], Any]:
    if ":" in name:
        module, _, attribute = name.partition(":")
        return getattr(import_module(module), attribute)
    from modelworks.ml.runtimes.registry import RUNTIMES

    return RUNTIMES.get(name)


def _locator(spec: ReplicaSpec) -> Callable[[str], Path]:
    def locate(digest: str) -> Path:
        if digest in spec.files:
            return Path(spec.files[digest])
        if spec.blobs is None:
            raise ModelworksError(f"the package's file {digest[:12]} is not on this machine", code="blob_not_found")
        return Path(spec.blobs) / digest[:2] / digest

    return locate


def prove(manifest: Manifest, batcher: Batcher) -> int:
    """Answer the parity samples by the path that calls take; how many. ParityMismatch names the first difference."""
    samples = manifest.parity
    if not samples.inputs:
        return 0
    from modelworks.ml.runtimes.parity import ParityMismatch, difference

    answer = _answer(manifest, batcher, samples.inputs)
    if isinstance(answer, ModelworksError):
        raise ParityMismatch(f"the model failed on its parity samples: {answer.message}")
    found = difference(samples.outputs, {tensor.name: to_numpy(tensor) for tensor in answer.outputs}, samples.tolerance)
    if found:
        raise ParityMismatch(
            f"the model does not answer its parity samples as training did: {found}; train or import it again"
        )
    return len(samples.inputs)


def warm_up(manifest: Manifest, batcher: Batcher) -> float:
    """Run the first parity sample a few times; the seconds that the fastest took, 0 when there is no sample."""
    best = 0.0
    for _ in range(_WARM_UP if manifest.parity.inputs else 0):
        begun = time.perf_counter()
        _answer(manifest, batcher, manifest.parity.inputs[:1])
        seconds = time.perf_counter() - begun
        best = min(best or seconds, seconds)
    return best


def tune(manifest: Manifest, batcher: Batcher) -> None:
    """Measure batches of the parity samples, so that the first calls already run in batches of a good size."""
    inputs = manifest.signature.inputs
    if manifest.parity.inputs and all(spec.shape and spec.shape[0] == -1 for spec in inputs):
        found = batcher.measure(
            [encode_features(inputs, manifest.task, [row]) for row in manifest.parity.inputs[:64]], _TUNING
        )
        log.info("measured", **{f"rows_{rows}": round(seconds, 7) for rows, seconds in found.items()})


def _answer(manifest: Manifest, batcher: Batcher, rows: list[dict[str, Any]]) -> Part | ModelworksError:
    batcher.admit("sample", encode_features(manifest.signature.inputs, manifest.task, rows), time.monotonic() + 3600)
    ((_, answer, _),) = batcher.step()
    return answer


async def serve(spec: ReplicaSpec, batcher: Batcher | Continuous, batch_seconds: float, report: Status) -> None:
    """Listen until SIGTERM, then finish what is aboard."""
    host = Host(
        batcher,
        secret=spec.secret,
        replica_id=spec.replica_id,
        model_version=spec.model_version,
        queue_limit=spec.queue_limit,
    )
    host.batch_seconds = batch_seconds
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await host.listen(spec.endpoint)
    report("ready")
    log.info("ready", deployment=spec.deployment, model_version=spec.model_version)
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _BEAT)
        if isinstance(batcher, Continuous) and batcher.failed:
            raise ModelworksError("the model's engine has ended; a new replica takes its place")
        report.beat()
    report("draining")
    draining = asyncio.ensure_future(host.drain(spec.drain_seconds))
    while not (await asyncio.wait([draining], timeout=_BEAT))[0]:
        report.beat()
    finished = draining.result()
    report("stopped")
    log.info("stopped", finished=finished)


class Status:
    """The phase, written beside the socket for whoever started this replica; renamed into place, never half there."""

    def __init__(self, endpoint: Path) -> None:
        self._path = status_path(endpoint)

    def __call__(self, phase: str, message: str = "") -> None:
        content = {"phase": phase, "message": message, "pid": os.getpid(), "at": time.time()}
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(content))
        aside.chmod(0o600)
        aside.replace(self._path)

    def beat(self) -> None:
        """A sign of life: the status file's time, which the engine watches."""
        with contextlib.suppress(OSError):
            os.utime(self._path)


def prepare() -> None:
    """Import what most models need, before it is known which one this process will serve."""
    import onnxruntime  # noqa: F401

    from modelworks.ml.runtimes import onnx, parity, registry  # noqa: F401


if __name__ == "__main__":
    if "spare" in sys.argv:
        prepare()
    sys.exit(main())
