"""The engine plug: where replica processes run. An engine starts, stops and lists them; it decides nothing."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from modelworks.core.registry import Registry


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a replica needs to serve a model version. `secret`: what links must present; it never leaves memory."""

    replica_id: str
    deployment: str
    home: str
    model_version: str
    manifest: str  # path of the package's manifest
    files: dict[str, str] = {}  # digest -> path; what is not in it is looked up under `blobs`
    blobs: str | None = None  # root of the blob store
    runtime: str | None = None  # replaces the manifest's: a registered name, or "module:Class"
    endpoint: str = ""  # Unix socket; "" lets the engine choose
    secret: str
    engine: str = "auto"  # of a language model (see ml/runtimes/choice.py)
    context: int | None = None  # tokens of one call of a language model
    tensor_parallel_size: int | None = None  # of a language model: GPUs of this replica
    adapters: dict[str, str] = {}  # of a language model: name -> path of the LoRA adapter's manifest
    threads: int = 1
    memory_mb: int | None = None
    max_batch: int = 64
    max_rows: int = 4096
    wait_ms: float = 0.0
    auto_batch: bool = False  # find the batch size by measuring (see serve/sizing.py)
    p99_ms: float | None = None
    queue_limit: int = 4096  # calls that may wait inside the replica
    drain_seconds: float = 10.0


class Handle(msgspec.Struct, frozen=True):
    """A started replica."""

    replica_id: str
    pid: int
    endpoint: str


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine sees of a replica. `phase` and `message`: the replica's own last words (see serve/replica.py)."""

    replica_id: str
    deployment: str
    pid: int
    alive: bool
    exit_code: int | None
    started: float
    endpoint: str
    phase: str = "loading"  # loading, ready, draining, failed, stopped
    message: str = ""
    silent: float = 0.0  # seconds since its last sign of life, while it is ready


class Engine(Protocol):
    def start(self, spec: ReplicaSpec) -> Handle: ...

    def stop(self, handle: Handle, grace: float) -> None:
        """Ask it to drain; end it by force after `grace` seconds. Returns at once; stopping twice is harmless."""

    def list(self) -> list[Observed]:
        """All replicas started here. One that has ended is listed once with its exit code, then forgotten."""

    def logs(self, handle: Handle) -> str:
        """The end of what it printed."""


ENGINES: Registry[Any] = Registry("modelworks.engines", "engine", {"local": "modelworks.engines.local:LocalEngine"})
