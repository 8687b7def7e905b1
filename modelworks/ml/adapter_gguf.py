"""A LoRA adapter of PEFT's, written as GGUF for the model file that it is to change, as llama.cpp reads both."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput, MissingExtra
from modelworks.ml.adapter_import import WEIGHTS_FILE, read_scales
from modelworks.ml.folder import ADAPTER_CONFIG
from modelworks.ml.gguf import read_gguf
from modelworks.ml.package import Package

if TYPE_CHECKING:
    import numpy as np

_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}


def write_gguf(adapter: Package, model: Path, out: Path) -> Path:
    """`out`, with `adapter` for the GGUF file `model`. InvalidInput for layers that the model does not have.

    Scales are folded into the second matrix, as one file has one alpha and PEFT's layers may differ. Queries and keys of
    the Llama family lie in GGUF in another order of their rows, which is made for the adapter's too.
    """
    try:
        from gguf import GGUFWriter, get_tensor_name_map
        from gguf.constants import MODEL_ARCH_NAMES
    except ImportError:
        raise MissingExtra("PEFT adapters of GGUF models need the package gguf; pip install 'modelworks[llm]'") from None
    header = read_gguf(model)
    architecture = str(header["general.architecture"])
    found = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(found, int(header[f"{architecture}.block_count"]))
    files = {name: adapter.path(name) for name in (ADAPTER_CONFIG, WEIGHTS_FILE)}
    tensors = _tensors(files[WEIGHTS_FILE])
    writer = GGUFWriter(out, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # the scale is in the weights
    for module, (scale, _) in read_scales(files).items():
        stem = names.get_name(module)
        if stem is None:
            raise InvalidInput(
                f"the adapter changes {module}, and the model has no such layer; deploy it with the model that it was "
                "trained on",
                code="bad_adapter",
                param="adapters",
            )
        down, up = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        writer.add_tensor(f"{stem}.weight.lora_a", down)
        writer.add_tensor(f"{stem}.weight.lora_b", _ordered(up * scale, stem, header))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _ordered(up: np.ndarray, stem: str, header: dict[str, Any]) -> np.ndarray:
    kind = stem.rpartition(".")[2]
    if header["general.architecture"] != "llama" or kind not in ("attn_q", "attn_k"):
        return up
    heads = header["llama.attention.head_count"]
    if kind == "attn_k":
        heads = header.get("llama.attention.head_count_kv", heads)
    if up.shape[0] % (2 * heads):
        raise InvalidInput(f"the adapter's matrices for {stem} do not fit {heads} heads", code="bad_adapter", param="adapters")
    rows = up.reshape(heads, 2, -1, up.shape[1])
    return rows.swapaxes(1, 2).reshape(up.shape).copy()


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors as float32, of a file whose header was checked; numpy by itself has no bfloat16."""
    import numpy as np

    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    found = {}
    for name, about in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in _TYPES:
            raise InvalidInput(f"the adapter's weights are {about['dtype']}; save them as float32 or bfloat16", code="bad_adapter")
        first, last = about["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], _TYPES[about["dtype"]])
        if about["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        found[name] = values.astype(np.float32).reshape(about["shape"])
    return found
