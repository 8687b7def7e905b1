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
from modelworks.ml.nets.share import Share, starved
from modelworks.ml.nets.team import PeerLost, Team, processes

if TYPE_CHECKING:
    import torch

CHECKPOINT = "net"
_REPORT_EVERY = 0.25  # seconds
_CHECKPOINT_EVERY = 1.0  # seconds, at least
_CHECKPOINT_SHARE = 50  # ... and so many times what the last one took
_WHOLE = 4096  # rows at a time of gradient descent over all rows


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
        self._team: Team | None = None

    def run(self) -> list[dict[str, Any]]:
        """Train; the net is left on the CPU with the weights to keep. Returns the curve: a dict for each epoch.

        InvalidInput with code nan_loss when the loss is no number any more.
        """
        self._prepare()
        self._resume()
        try:
            if self._team:
                self._team.start(self._own)
            while self._epoch < self.epochs and not self._over():
                self._train_epoch()
                self._judge()
                self._epoch, self._chunk = self._epoch + 1, 0
                self._sum = self._rows = 0.0
                self._keep()
        finally:
            if self._team:
                self._team.close()
        if self._best is not None:
            self.net.load_state_dict(self._best)
        self.net.to("cpu")
        self.net.eval()
        return self.history

    # before

    def _prepare(self) -> None:
        self._team = self._assemble()
        self._own = Share(self.net, self.objective, self.params)
        self.device = self._own.device
        if self.params.learning_rate == "auto":
            self.rate = self._find_rate()
        else:
            self.rate = self.params.learning_rate
        made = optimise.optimiser_of(self.net, self.params, self.rate)
        # accelerate's optimiser scales gradients; where there is nothing to scale, its step only costs time
        self._optimiser = self._own.accelerator.prepare(made) if self._own.scales else made
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

    def _assemble(self) -> Team | None:
        """Who shares the work, where several processes are asked for."""
        wanted = self.ctx.processes
        if wanted < 2:
            return None
        count = processes(wanted, self.size)
        if count < wanted:
            self.ctx.event(
                "warning",
                f"{count} of {wanted} processes train: there are no more GPUs or, without any, cores, or no more rows in a batch",
                processes=count,
            )
        if count < 2:
            return None
        self.ctx.event("log", f"{count} processes share each batch", processes=count)
        return Team(self.net, self.objective, self.params, count, self.ctx)

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
                x, y = self._own.tensors(features, target)
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
            except PeerLost as lost:
                self._renew(lost)
                continue
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not starved(error) or self.micro <= 1:
                    raise
            else:
                return
            self._halve()

    def _again(self) -> None:
        """The step is done anew."""
        self._optimiser.zero_grad(set_to_none=True)
        self._sum, self._rows, self._chunk = self._safe

    def _renew(self, lost: PeerLost) -> None:
        assert self._team is not None
        self._again()
        self.ctx.event("warning", f"a process of the training is gone ({lost}); the step is done anew with another")
        self._team.renew()

    def _halve(self) -> None:
        import torch

        self._again()
        self.micro = max(1, self.micro // 2)
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
        self.net.train()
        self._safe = (self._sum, self._rows, self._chunk)
        order = None if self.per_step == self.chunks and self.params.optimiser == "gradient-descent" else self.ctx.seed
        seed = None if order is None else (order, 0, self._epoch)
        for features, target in self.examples.batches(self.size, seed=seed, skip=self._chunk):
            first = self._chunk - self._chunk % self.per_step
            rows = min(len(self.examples) - first * self.size, self.per_step * self.size)
            if self._team and self._chunk == first:
                self._team.begin(self._step)
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
        self._seen += len(target)
        if self._team:
            features, target = self._team.deal(features, target, rows, self.micro)
        total, count = self._own.add(features, target, rows, self.micro)
        self._sum += total
        self._rows += count

    def _update(self) -> None:
        if self._team:
            total, count = self._team.gather()
            self._sum += total
            self._rows += count
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
            norm = self._own.accelerator.clip_grad_norm_(self._own.weights, self.params.clip_norm)
            self._norm = float(norm) if due or self.device.type == "cpu" else self._norm
        elif due:
            self._norm = self._gradient_norm()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._step += 1

    def _gradient_norm(self) -> float:
        import torch

        return float(torch.nn.utils.get_total_norm([w.grad for w in self._own.weights if w.grad is not None]))

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
        self.net.eval()
        with torch.no_grad():
            for features, target in held.batches(max(256, self.micro)):
                for start in range(0, len(target), max(self.micro, 256)):
                    part = slice(start, start + max(self.micro, 256))
                    x, y = self._own.tensors(features[part], target[part])
                    scores = self._own.scores(x)
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


def answers(net: torch.nn.Module, examples: Examples, size: int = 512) -> Iterator[np.ndarray]:
    """Scores of a trained net on the CPU, batch by batch, in the rows' order."""
    import torch

    with torch.inference_mode():
        for features, _ in examples.batches(size):
            yield net(torch.from_numpy(np.ascontiguousarray(features))).float().numpy()
