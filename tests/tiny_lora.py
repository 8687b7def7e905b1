"""LoRA adapters made in a test, as PEFT saves them and as llama.cpp's converter writes them. Not a test module."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tests.tiny_gguf import NAMES

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
RANK = 4


def draw(model: Any, seed: int, size: float = 0.3) -> dict[str, tuple[Any, Any]]:
    """Layer -> (A [rank, in], B [out, rank]) of random numbers that 16 bits hold."""
    import torch

    random = torch.Generator().manual_seed(seed)
    found = {}
    for at in range(model.config.num_hidden_layers):
        for layer in LAYERS:
            out, width = model.get_submodule(f"model.layers.{at}.{layer}").weight.shape
            down, up = (torch.randn(shape, generator=random) * size for shape in ((RANK, width), (out, RANK)))
            found[f"model.layers.{at}.{layer}"] = down.half().float(), up.half().float()
    return found


def noise(width: int) -> dict[str, tuple[Any, Any]]:
    """For the queries of any Llama's first layer."""
    import torch

    random = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=random) for shape in ((RANK, width), (width, RANK)))
    return {"model.layers.0.self_attn.q_proj": (down, up)}


def merge(model: Any, matrices: dict[str, tuple[Any, Any]], scale: float) -> Any:
    """A model whose weights have the adapter in them: W + scale * B A."""
    import torch

    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, (down, up) in matrices.items():
            merged.get_submodule(name).weight += scale * (up @ down)
    return merged


def save_peft(folder: Path, matrices: dict[str, tuple[Any, Any]], alpha: float, **more: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for name, (down, up) in matrices.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": alpha, "bias": "none", "use_dora": False,
        "base_model_name_or_path": "/home/somebody/tiny/llama", "target_modules": ["q_proj", "v_proj", "down_proj"],
        "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
    return folder


def save_gguf(path: Path, matrices: dict[str, tuple[Any, Any]], alpha: float, architecture: str = "qwen2") -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, pair in matrices.items():
        _, _, layer, *inner = name.split(".")
        for side, value in zip("ab", pair, strict=True):
            writer.add_tensor(f"blk.{layer}.{NAMES['.'.join(inner)]}.weight.lora_{side}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
