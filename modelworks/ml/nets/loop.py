"""The one loop that trains every net. Device, precision and gradient scaling are accelerate's; the rest is here.

A run can be broken at any step and taken up from its last checkpoint. On the CPU, with the same seed and number of
threads, it then ends with the same weights to the last bit: order and augmentation come from (seed, epoch, batch), and
everything else that changes is in the checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Stopping
from modelworks.core.telemetry import resident
from modelworks.ml.base import Examples, JobContext
from modelworks.ml.nets import optimise, state
from modelworks.ml.nets.objective import Objective
from modelworks.ml.nets.params import NetParams

if TYPE_CHECKING:
    import torch

CHECKPOINT = "net"
_REPORT_EVERY = 0.25  # seconds
_CHECKPOINT_EVERY = 1.0  # seconds, at least
_CHECKPOINT_SHARE = 50  # ... and so many times what the last one took
_WHOLE = 4096  # rows at a time of gradient descent over all rows
_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class Loop:
    """One run of `net` over `examples`. `held`: rows that tell when to stop; they are not trained on."""

    def __init__(
        self,
        net: torch.nn.Module,
        examples: Examples,
        objective: Objective,
        params: NetParams,
        ctx: JobContext,
        stopping: Stopping | None = None,
        held: Examples | None = None,
    ) -> None:
        self.net, self.examples, self.objective = net, examples, objective
        self.params, self.ctx, self.held = params, ctx, held
        self.stopping = stopping or Stopping()
        self.epochs = self.stopping.max_epochs or params.epochs
        full = params.optimiser == "gradient-descent"
        self.size = min(len(examples), _WHOLE if full else params.batch_size)
        self.chunks = math.ceil(len(examples) / self.size)
        self.per_step = self.chunks if full else min(params.accumulate, self.chunks)
        self.steps = self.epochs * math.ceil(self.chunks / self.per_step)
        self.micro = self.size  # rows that go through the net at once; halved when memory runs out
        self.rate = 0.0
        self.history: list[dict[str, Any]] = []
        self._epoch, self._chunk, self._step = 0, 0, 0
        self._sum: Any = 0.0  # of the epoch's losses; on a GPU it stays there until somebody asks
        self._rows = self._norm = 0.0
        self._best: dict[str, torch.Tensor] | None = None
        self._best_value, self._since = math.inf, 0
        self._spent = 0.0  # seconds of earlier attempts
        self._begun = self._told = self._kept = time.monotonic()
        self._cost = 0.0
        self._seen = 0  # rows of this attempt

    def run(self) -> list[dict[str, Any]]:
        """Train; the net is left on the CPU with the weights to keep. Returns the curve: a dict for each epoch.

        InvalidInput with code nan_loss when the loss is no number any more.
        """
        self._prepare()
        self._resume()
        while self._epoch < self.epochs and not self._over():
            self._train_epoch()
            self._judge()
            self._epoch, self._chunk = self._epoch + 1, 0
            self._sum = self._rows = 0.0
            self._keep()
        if self._best is not None:
            self.net.load_state_dict(self._best)
        self.net.to("cpu")
        self.net.eval()
        return self.history

    # before

    def _prepare(self) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        precision = _PRECISION[self.params.precision]
        if precision == "fp16" and not torch.cuda.is_available():
            raise InvalidInput(
                "float16 needs a GPU; choose bfloat16 or float32",
                code="bad_hyperparameter",
                param="hyperparameters.precision",
            )
        AcceleratorState._reset_state(True)  # an earlier fit of this process may have had another precision
        self._accelerator = Accelerator(mixed_precision=precision)
        self.device = self._accelerator.device
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
        self.net.to(self.device)
        if self.params.learning_rate == "auto":
            self.rate = self._find_rate()
        else:
            self.rate = self.params.learning_rate
        made = optimise.optimiser_of(self.net, self.params, self.rate)
        self._model = self._accelerator.prepare(self.net)
        # accelerate's optimiser scales gradients; where there is nothing to scale, its step only costs time
        self._optimiser = self._accelerator.prepare(made) if precision == "fp16" else made
        self._weights = [weight for weight in self.net.parameters() if weight.requires_grad]
        self._normalises = any("BatchNorm" in type(module).__name__ for module in self.net.modules())
        self._fixed_rate = self.params.schedule == "constant" and not self.params.warmup
        self._id = state.fingerprint(self.net, self.examples, self.params, self.stopping, self.ctx.seed)

    def _resume(self) -> None:
        data = self.ctx.restore(CHECKPOINT)
        if not data or state.place_of(data).get("id") != self._id:
            return
        self._best, place = state.load(data, self.net, self._optimiser)
        self._epoch, self._chunk, self._step = place["epoch"], place["chunk"], place["step"]
        self._sum, self._rows = place["sum"], place["rows"]
        self._best_value = math.inf if place["best"] is None else place["best"]
        self._since, self._spent = place["since"], place["spent"]
        self.micro, self.rate, self.history = place["micro"], place["rate"], place["history"]
        self.ctx.event("log", f"goes on in epoch {self._epoch + 1}, after {self._step} steps", epoch=self._epoch + 1)

    def _find_rate(self) -> float:
        """A range test: the rate grows from step to step, on a copy of the net, until the loss runs away."""
        import copy

        import torch

        kept, random = copy.deepcopy(self.net.state_dict()), torch.get_rng_state()
        optimiser = optimise.optimiser_of(self.net, self.params, 1e-6)
        low, high, count = (1e-6, 1.0, 80) if self.params.optimiser in ("adam", "adamw") else (1e-5, 10.0, 80)
        rates: list[float] = []
        losses: list[float] = []
        self.net.train()
        while len(rates) < count:
            for features, target in self.examples.batches(self.size, seed=(self.ctx.seed, 1, len(rates))):
                rates.append(low * (high / low) ** (len(rates) / (count - 1)))
                for group in optimiser.param_groups:
                    group["lr"] = rates[-1]
                optimiser.zero_grad()
                if len(target) == 1:
                    rates.pop()
                    break
                x, y = self._tensors(features, target)
                loss = self.objective.losses(self.net(x), y).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.params.clip_norm or math.inf)
                optimiser.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]) or losses[-1] > 4 * min(losses) + 1e-12 or len(rates) >= count:
                    count = len(rates)
                    break
            self.ctx.progress(0.0, "finding the learning rate")
        if not math.isfinite(losses[-1]):
            rates, losses = rates[:-1], losses[:-1]
        self.net.load_state_dict(kept)
        torch.set_rng_state(random)
        if len(losses) < 3:
            return 1e-3
        found = float(f"{optimise.suggest(rates, losses):.2g}")
        self.ctx.event("log", f"the range test chose the learning rate {found:g}", rates=rates, losses=losses)
        return found

    # an epoch

    def _train_epoch(self) -> None:
        import torch

        while self._chunk < self.chunks:
            try:
                self._steps()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not starved(error) or self.micro <= 1:
                    raise
            else:
                return
            self._halve()

    def _halve(self) -> None:
        import torch

        self._optimiser.zero_grad(set_to_none=True)
        self.micro = max(1, self.micro // 2)
        self._sum, self._rows, self._chunk = self._safe  # the step is done anew
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.ctx.event(
            "warning",
            f"memory ran out: from here on {self.micro} rows go through the net at a time, and their gradients are added "
            f"up to the same batch of {self.size}",
            micro_batch=self.micro,
        )

    def _steps(self) -> None:
        """Batch after batch from where it is to the end of the epoch."""
        self._model.train()
        self._safe = (self._sum, self._rows, self._chunk)
        order = None if self.per_step == self.chunks and self.params.optimiser == "gradient-descent" else self.ctx.seed
        seed = None if order is None else (order, 0, self._epoch)
        for features, target in self.examples.batches(self.size, seed=seed, skip=self._chunk):
            first = self._chunk - self._chunk % self.per_step
            rows = min(len(self.examples) - first * self.size, self.per_step * self.size)
            self._add_gradients(features, target, rows)
            self._chunk += 1
            if self._chunk % self.per_step == 0 or self._chunk == self.chunks:
                self._update()
                self._safe = (self._sum, self._rows, self._chunk)
                now = time.monotonic()
                if now - self._told >= _REPORT_EVERY:
                    self._tell(now)
                if now - self._kept >= max(_CHECKPOINT_EVERY, _CHECKPOINT_SHARE * self._cost):
                    self._keep()
                if self.stopping.max_seconds and self._elapsed(now) >= self.stopping.max_seconds:
                    return

    def _add_gradients(self, features: np.ndarray, target: np.ndarray, rows: int) -> None:
        count = len(target)
        for start in range(0, count, self.micro):
            part = slice(start, start + self.micro)
            x, y = self._tensors(features[part], target[part])
            if len(y) == 1 and self._normalises and rows > 1:
                continue  # a batch of one row has no spread to normalise by
            loss = self.objective.losses(self._model(x), y).sum() / rows
            whole = loss
            if self.params.l1:
                weights = sum(weight.abs().sum() for weight in self._weights if weight.ndim > 1)
                whole = loss + self.params.l1 * weights * (len(y) / rows)
            self._accelerator.backward(whole)
            self._sum += (float(loss.detach()) if self.device.type == "cpu" else loss.detach().double()) * rows
            self._rows += len(y)
        self._seen += count

    def _update(self) -> None:
        due = time.monotonic() - self._told >= _REPORT_EVERY or self._chunk == self.chunks
        if (due or self.device.type == "cpu") and not math.isfinite(self._sum):
            raise InvalidInput(
                f"the loss is no number any more in epoch {self._epoch + 1}, step {self._step + 1}; lower learning_rate "
                f"(it is {self.rate:g}), set clip_norm, or scale the features",
                code="nan_loss",
                param="hyperparameters.learning_rate",
            )
        if not self._fixed_rate:
            rate = self.rate * optimise.factor(self.params, self._step, self.steps)
            for group in self._optimiser.param_groups:
                group["lr"] = rate
        if self.params.clip_norm:
            norm = self._accelerator.clip_grad_norm_(self._weights, self.params.clip_norm)
            self._norm = float(norm) if due or self.device.type == "cpu" else self._norm
        elif due:
            self._norm = self._gradient_norm()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._step += 1

    def _gradient_norm(self) -> float:
        import torch

        return float(torch.nn.utils.get_total_norm([w.grad for w in self._weights if w.grad is not None]))

    def _tensors(self, features: np.ndarray, target: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        x = torch.from_numpy(np.ascontiguousarray(features))
        y = self.objective.prepare(np.ascontiguousarray(target))
        return (x, y) if self.device.type == "cpu" else (x.to(self.device), y.to(self.device))

    # after an epoch

    def _judge(self) -> None:
        """The curve's next point, and whether it is the best so far."""
        now = time.monotonic()
        found: dict[str, Any] = {"loss": float(self._sum) / max(self._rows, 1)}
        if self.held is not None:
            found |= self._measure(self.held)
        rates = {group["lr"] for group in self._optimiser.param_groups}
        more = {"lr": max(rates), "grad_norm": self._norm}
        self.history.append({"epoch": self._epoch + 1, **found, **more})
        speed = self._seen / max(now - self._begun, 1e-9)
        curve = {**found, **more, "rows_per_s": speed}
        self.ctx.metric(self._epoch + 1, {name: value for name, value in curve.items() if value is not None})
        self._tell(now, **found)
        if self.held is None:
            return
        value, sign = self._watched(found)
        if sign * value < self._best_value - self.stopping.min_delta:
            self._best_value, self._since = sign * value, 0
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in self.net.state_dict().items()}
        else:
            self._since += 1

    def _watched(self, found: dict[str, Any]) -> tuple[float, float]:
        """(the value to improve, 1 when less is better, else -1)"""
        from modelworks.ml.evaluate.catalogue import METRICS

        name = self.stopping.metric
        value = found.get(f"val_{name}")
        if value is None:
            return math.inf, 1.0
        return value, -1.0 if name != "loss" and METRICS[name].greater_is_better else 1.0

    def _measure(self, held: Examples) -> dict[str, Any]:
        """The loss on `held`, and the metric that is watched."""
        import torch

        outputs, true, total = [], [], 0.0
        self._model.eval()
        with torch.no_grad():
            for features, target in held.batches(max(256, self.micro)):
                for start in range(0, len(target), max(self.micro, 256)):
                    part = slice(start, start + max(self.micro, 256))
                    x, y = self._tensors(features[part], target[part])
                    scores = self._model(x)
                    total += float(self.objective.losses(scores, y).sum())
                    outputs.append(scores.float().cpu().numpy())
                    true.append(target[part])
        found: dict[str, Any] = {"val_loss": total / len(held)}
        if self.stopping.metric != "loss":
            found[f"val_{self.stopping.metric}"] = self.objective.measure(
                self.stopping.metric, np.concatenate(outputs), np.concatenate(true)
            )
        return found

    def _over(self) -> bool:
        """Whether to stop before all epochs are done."""
        stopping = self.stopping
        if stopping.max_seconds and self._elapsed(time.monotonic()) >= stopping.max_seconds:
            self.ctx.event("log", f"stopped after {stopping.max_seconds:g} seconds, in epoch {self._epoch + 1}")
            return True
        if stopping.patience and self._since >= stopping.patience:
            best = self._epoch - self._since
            self.ctx.event("log", f"stopped: no better {stopping.metric} since epoch {best}, whose weights are kept")
            return True
        return False

    def _elapsed(self, now: float) -> float:
        return self._spent + now - self._begun

    def _tell(self, now: float, **more: Any) -> None:
        self._told = now
        share = (self._epoch + self._chunk / self.chunks) / self.epochs
        spent = now - self._begun
        speed = self._seen / max(spent, 1e-9)
        left = (1 - share) * self.epochs * len(self.examples) / max(speed, 1e-9)
        if self.stopping.max_seconds:
            share = max(share, min(1.0, self._elapsed(now) / self.stopping.max_seconds))
            left = min(left, max(0.0, self.stopping.max_seconds - self._elapsed(now)))
        values = {
            "loss": float(self._sum) / max(self._rows, 1),
            "learning_rate": self._optimiser.param_groups[0]["lr"],
            "grad_norm": self._norm,
            "rows_per_s": round(speed, 1),
            "eta_s": round(left, 1),
            "memory_mb": self._memory_mb(),
            **more,
        }
        shown = {name: value for name, value in values.items() if math.isfinite(value)}
        self.ctx.progress(min(share, 1.0), f"epoch {self._epoch + 1} of {self.epochs}", epoch=self._epoch + 1, **shown)

    def _memory_mb(self) -> float:
        import torch

        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return round(resident() / 2**20, 1)

    def _keep(self) -> None:
        """A checkpoint, unless the last one is too fresh for what it costs."""
        now = time.monotonic()
        if now - self._kept < max(_CHECKPOINT_EVERY, _CHECKPOINT_SHARE * self._cost):
            return
        place = {
            "id": self._id, "epoch": self._epoch, "chunk": self._chunk, "step": self._step, "sum": float(self._sum),
            "rows": self._rows, "best": None if math.isinf(self._best_value) else self._best_value,
            "since": self._since, "spent": self._elapsed(now), "micro": self.micro, "rate": self.rate,
            "history": self.history,
        }  # fmt: skip
        self.ctx.checkpoint(CHECKPOINT, state.dump(self.net, self._optimiser, self._best, place))
        self._kept = time.monotonic()
        self._cost = self._kept - now


def starved(error: Exception) -> bool:
    """Whether it is torch's or Python's way to say that memory ran out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()


def answers(net: torch.nn.Module, examples: Examples, size: int = 512) -> Iterator[np.ndarray]:
    """Scores of a trained net on the CPU, batch by batch, in the rows' order."""
    import torch

    with torch.inference_mode():
        for features, _ in examples.batches(size):
            yield net(torch.from_numpy(np.ascontiguousarray(features))).float().numpy()
