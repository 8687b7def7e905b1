"""Which engine runs a language model: chosen by the package and the machine, or named by the deployment. Light."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.ml.gguf import check_exact, exact_type

AUTO, LLAMA, OPENVINO, TRANSFORMERS = "auto", "llama", "openvino", "transformers"
BOTH = "openvino+llama"  # llama.cpp for the calls that ask for what OpenVINO lacks
# architectures whose GGUF OpenVINO GenAI reads
_READ = ("llama", "qwen2", "qwen3")


def choose(engine: str, runtime: str, architecture: str, lineage: dict[str, Any]) -> str:
    """The runtime for a package made for `runtime`. InvalidInput when the engine that is named cannot run it.

    `auto`: OpenVINO where it is installed and reads the file at its quality, as it is faster with many streams; with
    llama.cpp beside it for what it lacks.
    """
    if runtime == TRANSFORMERS:
        if engine not in (AUTO, TRANSFORMERS):
            raise InvalidInput(
                f"the engine {engine} reads GGUF files, and this model is safetensors; leave engine out, or import a GGUF file",
                param="engine",
            )
        return TRANSFORMERS
    if engine == TRANSFORMERS:
        raise InvalidInput("transformers runs safetensors; for this GGUF file take llama or openvino", param="engine")
    if runtime != LLAMA:
        if engine != AUTO:
            raise InvalidInput(
                f"engine is for language models, and this one runs by {runtime}; leave it out", param="engine"
            )
        return runtime
    if engine == AUTO:
        fits = exact_type(lineage.get("file_type")) is not None and architecture in _READ
        if not fits or find_spec("openvino_genai") is None:
            return LLAMA
        return BOTH if find_spec("xllamacpp") is not None else OPENVINO
    if engine == OPENVINO:
        check_exact(lineage.get("file_type"))
        if architecture not in _READ:
            raise InvalidInput(
                f"OpenVINO reads GGUF files of {', '.join(_READ)}, not of {architecture[:80]!r}; choose engine: llama",
                code="unsupported_model",
                param="engine",
            )
    return engine
