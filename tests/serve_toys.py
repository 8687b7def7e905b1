"""A tiny model for tests of the data plane, loaded by name in real replicas. Not a test module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from modelworks.core.tensors import Tensor, pack
from modelworks.core.types import Call, Principal, Signature, TensorSpec
from modelworks.engines.base import ReplicaSpec
from modelworks.ml.package import Manifest, ParitySamples
from modelworks.serve.routes import Limits, Route, Target

SECRET = "5ec7e7" * 8
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1, 1], column="number")],
    outputs=[TensorSpec(name="value", datatype="FP32", shape=[-1])],
)
DEADLY, FAULTY, SLOW = 666.0, 777.0, 888.0
PRINCIPAL = Principal("key_1", "test", "p", "developer", frozenset())


def toy_predict(inputs):
    """value = 2 x; some values kill the process, raise, or take a second."""
    x = inputs["x"]
    if (x == DEADLY).any():
        os.kill(os.getpid(), signal.SIGKILL)
    if (x == FAULTY).any():
        raise ValueError("a faulty item at 0xdeadbeef")
    if (x == SLOW).any():
        time.sleep(1.0)
    return {"value": x[:, 0] * 2}


class Starved:
    """A runtime that finds no memory."""

    def load(self, package, threads=1):
        self.weights = bytearray(2**30)


class Toy:
    def load(self, package, threads=1):
        return package.manifest.signature

    def predict(self, inputs):
        return toy_predict(inputs)

    def close(self):
        pass


def toy_spec(folder: Path, home: Path, replica_id: str, *, expected: float = 4.0, **changes) -> ReplicaSpec:
    """A replica of the toy whose package says that 2.0 gives `expected`."""
    manifest = Manifest(
        task="tabular-regression",
        runtime="toy",
        signature=SIGNATURE,
        files={},
        parity=ParitySamples(inputs=[{"x": 2.0}], outputs={"value": [expected]}),
    )
    path = folder / f"manifest-{expected}.json"
    path.write_bytes(manifest.canonical())
    values = {
        "replica_id": replica_id,
        "deployment": "toy",
        "home": str(home),
        "model_version": "toy:1",
        "manifest": str(path),
        "runtime": "serve_toys:Toy",
        "secret": SECRET,
    }
    return ReplicaSpec(**(values | changes))


def toy_route(*endpoints: tuple[str, str], **limits: int) -> Route:
    targets = tuple(Target(name, endpoint) for name, endpoint in endpoints)
    return Route("p", "toy", "toy:1", SIGNATURE, "tabular-regression", None, targets, Limits(**limits))


def tensor(x: float) -> Tensor:
    return pack("x", "FP32", [1, 1], [x])


def toy_call(x: float = 2.0, *, seconds: float = 10.0, idempotent: bool = True) -> Call:
    return Call("toy", [tensor(x)], time.monotonic() + seconds, idempotent=idempotent)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
