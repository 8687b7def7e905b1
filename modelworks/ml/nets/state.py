"""A training run on disk: weights, optimiser, generators and place, as safetensors with a JSON header. Never pickle."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.ml.base import Examples

if TYPE_CHECKING:
    import torch

_FORMAT = "modelworks-training-1"


def dump(net: Any, optimiser: Any, best: dict[str, torch.Tensor] | None, place: dict[str, Any]) -> bytes:
    """`place`: JSON values that tell where the run is."""
    import torch
    from safetensors.torch import save

    tensors = {f"net/{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in (best or {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random/cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    found = optimiser.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in found["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimiser/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    header = {"place": place, "numbers": numbers, "groups": found["param_groups"], "has_best": best is not None}
    kept = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return save(kept, metadata={"format": _FORMAT, "state": json.dumps(header)})


def load(data: bytes, net: Any, optimiser: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Puts net, optimiser and generators where they were; (the best weights so far, the place)."""
    import torch
    from safetensors.torch import load as read

    header = _header(data)
    tensors = read(data)
    net.load_state_dict(_part(tensors, "net/"))
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["numbers"].items()}
    for name, value in _part(tensors, "optimiser/").items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": header["groups"]})
    torch.set_rng_state(tensors["random/cpu"])
    cuda = _part(tensors, "random/cuda/")
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([cuda[str(i)] for i in range(len(cuda))])
    best = _part(tensors, "best/") if header["has_best"] else None
    return best, header["place"]


def place_of(data: bytes) -> dict[str, Any]:
    """The place alone; empty when `data` is no such state."""
    try:
        found: dict[str, Any] = _header(data)["place"]
        return found
    except (ValueError, KeyError, UnicodeDecodeError):
        return {}


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    if metadata.get("format") != _FORMAT:
        raise ValueError("not a training state")
    found: dict[str, Any] = json.loads(metadata["state"])
    return found


def _part(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def fingerprint(net: Any, examples: Examples, *about: Any) -> str:
    """Tells runs apart: a checkpoint is taken up only by the run that wrote it."""
    digest = hashlib.sha256(json.dumps([*map(str, about)]).encode())
    digest.update(str([(name, tuple(value.shape)) for name, value in net.state_dict().items()]).encode())
    digest.update(str((len(examples), examples.shape, examples.classes)).encode())
    for features, target in examples.batches(256):
        digest.update(np.ascontiguousarray(features).tobytes() + np.ascontiguousarray(target).tobytes())
        break
    for part in examples.targets():
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
