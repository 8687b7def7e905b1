"""What one process does with its rows of a batch: they go through the net, and their gradients are added up in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.ml.nets.objective import Objective
from modelworks.ml.nets.params import NetParams

if TYPE_CHECKING:
    import torch

_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class Share:
    """`net` on the device that accelerate chooses, in the precision that `params` name; the net itself is left as it is.

    InvalidInput where there is no such precision on this machine.
    """

    def __init__(self, net: torch.nn.Module, objective: Objective, params: NetParams) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        precision = _PRECISION[params.precision]
        if precision == "fp16" and not torch.cuda.is_available():
            raise InvalidInput(
                "float16 needs a GPU; choose bfloat16 or float32",
                code="bad_hyperparameter",
                param="hyperparameters.precision",
            )
        AcceleratorState._reset_state(True)  # an earlier fit of this process may have had another precision
        self.accelerator = Accelerator(mixed_precision=precision)
        self.device = self.accelerator.device
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
        self.net, self.objective, self.l1 = net.to(self.device), objective, params.l1
        self.scales, self._mixed = precision == "fp16", precision != "no"
        self.weights = [weight for weight in net.parameters() if weight.requires_grad]
        self._normalises = any("BatchNorm" in type(module).__name__ for module in net.modules())

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """What the net says of `x`, in float32 whatever it is computed in."""
        if not self._mixed:
            return self.net(x)
        with self.accelerator.autocast():
            return self.net(x).float()

    def add(self, features: np.ndarray, target: np.ndarray, rows: int, micro: int, scale: float | None = None) -> tuple[Any, int]:
        """Add the gradients of these rows, `micro` of them at a time, of a step that has `rows` in all.

        (the sum of their losses, how many rows it is of). On a GPU the sum stays there until somebody asks. `scale`: what
        losses are multiplied with before the way back; None: as the accelerator does by itself.
        """
        total: Any = 0.0
        seen, on_cpu = 0, self.device.type == "cpu"
        for start in range(0, len(target), micro):
            part = slice(start, start + micro)
            x, y = self.tensors(features[part], target[part])
            if len(y) == 1 and self._normalises and rows > 1:
                continue  # a batch of one row has no spread to normalise by
            loss = self.objective.losses(self.scores(x), y).sum() / rows
            whole = loss
            if self.l1:
                weights = sum(weight.abs().sum() for weight in self.weights if weight.ndim > 1)
                whole = loss + self.l1 * weights * (len(y) / rows)
            if scale is not None:
                whole = whole * scale
            if self.scales and scale is None:
                self.accelerator.backward(whole)
            else:  # where there is nothing to scale, the accelerator only costs time
                whole.backward()
            total += (float(loss.detach()) if on_cpu else loss.detach().double()) * rows
            seen += len(y)
        return total, seen

    def tensors(self, features: np.ndarray, target: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        x = torch.from_numpy(np.ascontiguousarray(features))
        y = self.objective.prepare(np.ascontiguousarray(target))
        return (x, y) if self.device.type == "cpu" else (x.to(self.device), y.to(self.device))


def starved(error: BaseException) -> bool:
    """Whether it is torch's or Python's way to say that memory ran out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
