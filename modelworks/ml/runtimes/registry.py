"""The runtimes a package can name. Light: each is imported when it is first asked for."""

from __future__ import annotations

from modelworks.core.registry import Registry
from modelworks.ml.base import Runtime

RUNTIMES: Registry[type[Runtime]] = Registry(
    "modelworks.runtimes",
    "runtime",
    {
        "onnx": "modelworks.ml.runtimes.onnx:OnnxRuntime",
        "encoder": "modelworks.ml.runtimes.encoder:EncoderRuntime",  # texts to vectors, pairs of texts to scores
        "llama": "modelworks.ml.runtimes.llm_llama:LlamaRuntime",  # continuous: admit / step / abort
        "openvino": "modelworks.ml.runtimes.llm_openvino:OpenVinoRuntime",  # continuous; for packages of "llama" too
        "transformers": "modelworks.ml.runtimes.llm_transformers:TransformersRuntime",  # continuous; safetensors
        "vllm": "modelworks.ml.runtimes.llm_vllm:VllmRuntime",  # continuous; packages of "transformers" on GPUs
        "openvino+llama": "modelworks.ml.runtimes.llm_standby:StandbyRuntime",  # what OpenVINO lacks goes to llama.cpp
    },
)
