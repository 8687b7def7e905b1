"""LoRA adapters around a torch model's linear layers: each row of a batch has its own, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.ml.adapter_import import WEIGHTS_FILE, read_scales
from modelworks.ml.folder import ADAPTER_CONFIG
from modelworks.ml.package import Package

if TYPE_CHECKING:
    import torch

    Matrices = tuple[torch.Tensor, torch.Tensor]  # [in, rank], [rank, out] with the scale in it


class Adapters:
    """`names` are known; `choose` says which each row of the next pass has (LoRA, arXiv 2106.09685, not merged)."""

    def __init__(self, model: Any, packages: Mapping[str, Package]) -> None:
        """InvalidInput for an adapter whose layers are not the model's."""
        self.names = frozenset(packages)
        self._rows = 0
        self._chosen: dict[str, torch.Tensor | None] = {}  # adapter -> its rows; None: all
        layers: dict[str, dict[str, Matrices]] = {}
        for name, package in packages.items():
            for path, found in _matrices(model, name, package).items():
                layers.setdefault(path, {})[name] = found
        for path, changes in layers.items():
            model.get_submodule(path).register_forward_hook(self._hook(changes))

    def choose(self, names: Sequence[str]) -> None:
        """The adapter of each row, "" for none."""
        import torch

        self._rows = len(names)
        self._chosen = {}
        for name in {*names} - {""}:
            rows = [at for at, one in enumerate(names) if one == name]
            self._chosen[name] = None if len(rows) == len(names) else torch.tensor(rows)

    def _hook(self, changes: dict[str, Matrices]) -> Any:
        def add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            for name, rows in self._chosen.items():
                if name not in changes:
                    continue
                down, up = changes[name]
                if rows is None:
                    output = output + inputs[0] @ down @ up
                else:
                    given = inputs[0].reshape(self._rows, -1, inputs[0].shape[-1])
                    rows = rows.to(given.device)
                    all_rows = output.reshape(self._rows, -1, output.shape[-1])
                    output = all_rows.index_add(0, rows, given[rows] @ down @ up).reshape(output.shape)
            return output

        return add


def _matrices(model: Any, name: str, package: Package) -> dict[str, Matrices]:
    from safetensors.torch import load_file
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    files = {file: package.path(file) for file in (ADAPTER_CONFIG, WEIGHTS_FILE)}
    tensors = load_file(files[WEIGHTS_FILE])
    found: dict[str, Matrices] = {}
    for path, (scale, _) in read_scales(files).items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        if not isinstance(module, Linear | Conv1D):
            raise _unfit(name, f"{path} is no linear layer of the model")
        down, up = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        width = tuple(module.weight.shape) if isinstance(module, Conv1D) else tuple(module.weight.shape)[::-1]
        if (down.shape[1], up.shape[0]) != width:
            raise _unfit(name, f"{path} has {width[0]} x {width[1]} weights, and it was made for {down.shape[1]} x {up.shape[0]}")
        target = {"device": module.weight.device, "dtype": module.weight.dtype}
        found[path] = down.float().T.contiguous().to(**target), (up.float().T * scale).contiguous().to(**target)
    return found


def _unfit(name: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"the adapter {name!r} does not fit this model: {why}; deploy it with the model that it was trained on",
        code="bad_adapter",
        param=f"adapters.{name}",
    )
