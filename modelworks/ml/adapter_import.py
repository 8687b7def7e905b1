"""A LoRA adapter - a folder as PEFT saves it, or a GGUF file - becomes a model version of its own.

It answers nothing by itself: a deployment of its base model carries it, beside others.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.generation import TEXT_GENERATION
from modelworks.core.tasks import ADAPTER
from modelworks.ml.folder import ADAPTER_CONFIG, check_safetensors, licence_of, read_json
from modelworks.ml.package import Manifest, PackageFile
from modelworks.ml.runtimes.choice import LORA_GGUF, LORA_PEFT

WEIGHTS_FILE = "adapter_model.safetensors"
GGUF_FILE = "adapter.gguf"
RUNTIME = "adapter"  # what its manifest names: engines of its base model load it
MAX_RANK = 4096
_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]{1,300})\.lora_(?P<side>[AB])\.weight")
# of PEFT's config: what an adapter may not have, since it would not act as it was trained
_BEYOND = {
    "use_dora": "DoRA", "modules_to_save": "whole layers of its own", "layer_replication": "replicated layers",
    "lora_bias": "biases", "trainable_token_indices": "tokens of its own", "alora_invocation_tokens": "an invocation",
    "use_qalora": "QALoRA", "target_parameters": "parameters that are no layers",
}  # fmt: skip
_KEPT = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def import_peft(folder: Path, workdir: Path, *, licence: str | None = None) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files of the staged adapter in `folder`. InvalidInput for what is more than plain LoRA."""
    found = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(found, dict):
        raise _bad(f"{ADAPTER_CONFIG} is not an object")
    base = found.get("base_model_name_or_path")
    _refuse_more(found)
    modules = sorted({name.rpartition(".")[2] for name in _shapes(folder / WEIGHTS_FILE)})
    config = {name: found[name] for name in _KEPT if name in found} | {"bias": "none", "target_modules": modules}
    beside = workdir / f"written-{ADAPTER_CONFIG}"
    beside.write_bytes(json.dumps(config, sort_keys=True).encode())
    weights = (folder / WEIGHTS_FILE).resolve()
    files = {ADAPTER_CONFIG: beside, WEIGHTS_FILE: weights}
    scales = read_scales(files)
    lineage = {
        "format": LORA_PEFT,
        "rank": max(rank for _, rank in scales.values()),
        "layers": len(scales),
        "modules": modules[:32],
        "base_model": "/".join(base.split("/")[-2:])[:200] if isinstance(base, str) and base.isprintable() else None,
    }
    return _manifest(files, lineage, licence or licence_of(folder)), files


def import_gguf_adapter(path: Path, found: dict[str, Any], *, licence: str | None = None) -> tuple[Manifest, dict[str, Path]]:
    """The same of a GGUF file, whose metadata `found` is."""
    alpha = found.get("adapter.lora.alpha")
    if found.get("adapter.type") != "lora" or not isinstance(alpha, float) or not math.isfinite(alpha):
        raise _bad("of GGUF adapters, those of type lora with an adapter.lora.alpha are read")
    files = {GGUF_FILE: path}
    lineage = {"format": LORA_GGUF, "architecture": str(found["general.architecture"])[:100], "alpha": alpha}
    return _manifest(files, lineage, licence), files


def check_adapter(manifest: Manifest, files: dict[str, Path]) -> None:
    """The same for a package that comes whole."""
    from modelworks.ml.gguf import read_gguf

    if manifest.task != ADAPTER or manifest.signature != TEXT_GENERATION:
        raise _bad("its package is not sound; export it again")
    if set(files) == {GGUF_FILE}:
        again, _ = import_gguf_adapter(files[GGUF_FILE], read_gguf(files[GGUF_FILE]))
    elif set(files) == {ADAPTER_CONFIG, WEIGHTS_FILE}:
        read_scales(files)
        return
    else:
        raise _bad("its package is not sound; export it again")
    if again.lineage["architecture"] != manifest.lineage.get("architecture"):
        raise _bad("its package names another architecture than its file; export it again")


def read_scales(files: dict[str, Path]) -> dict[str, tuple[float, int]]:
    """Of each layer that the adapter changes: what its product is multiplied by, and its rank."""
    config = read_json(files[ADAPTER_CONFIG])
    if not isinstance(config, dict):
        raise _bad(f"{ADAPTER_CONFIG} is not an object")
    _refuse_more(config)
    found: dict[str, tuple[float, int]] = {}
    for module, (down, up) in _shapes(files[WEIGHTS_FILE]).items():
        rank = down[0]
        if len(down) != 2 or len(up) != 2 or up[1] != rank or not 0 < rank <= MAX_RANK:
            raise _bad(f"the matrices of {module} do not fit each other: {down} and {up}")
        found[module] = _scale(config, module, rank), rank
    return found


def _shapes(path: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Layer -> the shapes of its two matrices."""
    from safetensors import safe_open

    if not path.is_file():
        raise _bad(f"there is no {WEIGHTS_FILE} beside {ADAPTER_CONFIG}; other kinds of weights are not read")
    check_safetensors(path)
    sides: dict[str, dict[str, list[int]]] = {}
    with safe_open(str(path), framework="numpy") as opened:
        for key in opened.keys():  # noqa: SIM118 - it is no mapping
            match = _TENSOR.fullmatch(key)
            if match is None:
                raise _bad(f"it has the tensor {key[:120]!r}, which is no part of LoRA on linear layers")
            sides.setdefault(match["module"], {})[match["side"]] = list(opened.get_slice(key).get_shape())
    lonely = [module for module, pair in sides.items() if len(pair) != 2]
    if lonely or not sides:
        raise _bad(f"{lonely[0]} has one of two matrices" if lonely else "it changes no layer")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _refuse_more(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _bad(f"its type is {str(config.get('peft_type'))[:60]!r}; LORA is served")
    for name, what in _BEYOND.items():
        if config.get(name):
            raise _bad(f"it has {what} ({name}); train it as plain LoRA, or merge it into its model and import that")
    if config.get("bias") not in (None, "none"):
        raise _bad('it has biases (bias); train it with bias="none", or merge it into its model and import that')


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """As PEFT computes it: alpha / rank, or alpha / sqrt(rank)."""
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    declared = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _bad("lora_alpha is no number")
    if declared != rank:
        raise _bad(f"{ADAPTER_CONFIG} gives {module} the rank {str(declared)[:20]}, and its matrices have {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Any, module: str, usual: Any) -> Any:
    """PEFT's rule: a pattern is the end of a layer's name. Regular expressions of a stranger are not run."""
    if not patterns:
        return usual
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+\$?", str(key)) for key in patterns):
        raise _bad("rank_pattern and alpha_pattern are read when they name layers, not as regular expressions")
    for key, value in patterns.items():
        name = key.removeprefix("^").removesuffix("$")
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return usual


def _manifest(files: dict[str, Path], lineage: dict[str, Any], licence: str | None) -> Manifest:
    return Manifest(
        task=ADAPTER,
        runtime=RUNTIME,
        algorithm="lora",
        signature=TEXT_GENERATION,
        files={name: PackageFile.of(path) for name, path in files.items()},
        lineage=lineage,
        licence=licence,
    )


def _bad(why: str) -> InvalidInput:
    return InvalidInput(f"this LoRA adapter cannot be served: {why}", code="bad_adapter")
