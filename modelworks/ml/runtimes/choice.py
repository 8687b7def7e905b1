"""Which engine runs a language model: chosen by the package and the machine, or named by the deployment. Light."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.settings import gpus_hidden
from modelworks.ml.gguf import check_exact, exact_type

AUTO, LLAMA, OPENVINO, TRANSFORMERS, VLLM = "auto", "llama", "openvino", "transformers", "vllm"
# the forms of a LoRA adapter, and the engines that read them
LORA_PEFT, LORA_GGUF = "peft", "gguf-lora"
BOTH = "openvino+llama"  # llama.cpp for the calls that ask for what OpenVINO lacks
# architectures whose GGUF OpenVINO GenAI reads
_READ = ("llama", "qwen2", "qwen3")


def choose(engine: str, runtime: str, architecture: str, lineage: dict[str, Any]) -> str:
    """The runtime for a package made for `runtime`. InvalidInput when the engine that is named cannot run it.

    `auto`: of GGUF OpenVINO where it is installed and reads the file at its quality, as it is faster with many streams;
    with llama.cpp beside it for what it lacks. Of safetensors vLLM where it is installed and there is a GPU, unless the
    model sees images.
    """
    if runtime == TRANSFORMERS:
        if lineage.get("images") is True:
            if engine not in (AUTO, TRANSFORMERS):
                raise InvalidInput(
                    f"this model sees images, and {engine} takes text only here; leave engine out, and transformers runs it",
                    param="engine",
                )
            return TRANSFORMERS
        if engine == VLLM:
            check_vllm()
            return VLLM
        if engine == AUTO and find_spec("vllm") is not None and _gpus():
            return VLLM
        if engine not in (AUTO, TRANSFORMERS):
            raise InvalidInput(
                f"the engine {engine} reads GGUF files, and this model is safetensors; leave engine out, or import a GGUF file",
                param="engine",
            )
        return TRANSFORMERS
    if engine in (TRANSFORMERS, VLLM):
        raise InvalidInput(f"{engine} runs safetensors; for this GGUF file take llama or openvino", param="engine")
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


def check_vllm() -> None:
    """InvalidInput where vLLM is not installed, with what to do."""
    if find_spec("vllm") is None:
        raise InvalidInput(
            "the engine vllm is not installed here: on a machine with a CUDA GPU, pip install 'modelworks[vllm]'; "
            "or leave engine out, and transformers runs this model",
            code="missing_extra",
            param="engine",
        )


def _gpus() -> bool:
    """Whether NVIDIA's driver shows a GPU to this process; torch, which knows more, is too heavy here."""
    return not gpus_hidden() and any(Path("/dev").glob("nvidia[0-9]*"))


def check_adapter(engine: str, runtime: str, architecture: str, adapter: dict[str, Any], param: str) -> None:
    """InvalidInput for an adapter that no engine can put on a package made for `runtime`. `adapter`: its lineage."""
    form = adapter.get("format")
    if runtime == TRANSFORMERS and form == LORA_GGUF:
        raise InvalidInput(
            "this model is safetensors, and the adapter a GGUF file; give PEFT's folder, or deploy a GGUF of the model",
            param=param,
        )
    if runtime != TRANSFORMERS and form == LORA_PEFT and architecture not in _READ:
        raise InvalidInput(
            f"PEFT's adapters are written anew for GGUF files of {', '.join(_READ)}, and this model is {architecture[:80]}; "
            "convert it by llama.cpp's convert_lora_to_gguf.py, or deploy the model's safetensors",
            param=param,
        )
    if engine == OPENVINO:
        raise InvalidInput(
            "OpenVINO takes no adapter a call; leave engine out (llama.cpp then answers calls with an adapter), or name llama",
            param="engine",
        )
    if form == LORA_GGUF and adapter.get("architecture") != architecture:
        raise InvalidInput(
            f"the adapter is for {str(adapter.get('architecture'))[:80]}, and this model is {architecture[:80]}; deploy it "
            "with the model that it was trained on",
            param=param,
        )
