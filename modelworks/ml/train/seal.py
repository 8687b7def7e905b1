"""One ONNX graph and what is said of it become a package, proven to answer as training did."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelworks.ml.package import Manifest, Package, PackageFile, ParitySamples
from modelworks.ml.runtimes.onnx import MODEL_FILE, OnnxRuntime
from modelworks.ml.runtimes.parity import replay_parity


def seal(
    graph: bytes,
    prove: Callable[[OnnxRuntime, Manifest], ParitySamples],
    workdir: Path,
    threads: int,
    **said: Any,
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and its files. `said`: the manifest's other fields.

    `prove` holds the loaded graph against training and gives the samples. ModelworksError when they are not replayed alike.
    """
    digest = hashlib.sha256(graph).hexdigest()
    manifest = Manifest(files={MODEL_FILE: PackageFile(digest=digest, size=len(graph))}, **said)
    path = workdir / f"{digest}.onnx"
    path.write_bytes(graph)
    try:
        runtime = OnnxRuntime()
        runtime.load(Package(manifest, lambda _: path), threads)
        manifest = manifest.model_copy(update={"parity": prove(runtime, manifest)})
        replay_parity(Package(manifest, lambda _: path), runtime)
        runtime.close()
    finally:
        path.unlink()
    return manifest, {MODEL_FILE: graph}
