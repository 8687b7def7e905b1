"""Autoencoders: a net that says each row again through a narrow middle; what it says badly is unlike what it learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Stopping
from modelworks.core.tasks import ANOMALY
from modelworks.ml.base import Examples, JobContext
from modelworks.ml.nets.fitted import NetFitted
from modelworks.ml.nets.params import AutoencoderParams
from modelworks.ml.nets.trainer import NetTrainer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AnomalyFitted(NetFitted):
    """`threshold`: the score above which a row is an anomaly."""

    threshold: float = math.inf


class Autoencoder(NetTrainer):
    """Anomaly detection: a net learns to say rows again through a narrow middle; those it says badly are anomalies."""

    tasks: ClassVar[tuple[str, ...]] = (ANOMALY,)
    shaped: ClassVar[bool] = False
    Params: ClassVar[type[AutoencoderParams]] = AutoencoderParams

    def net(self, examples: Examples, outputs: int, params: Any) -> torch.nn.Module:
        from modelworks.ml.nets.layers import Reconstruction
        from modelworks.ml.nets.mlp import perceptron

        inside = math.prod(examples.shape)
        if params.bottleneck >= inside > 1:
            raise InvalidInput(
                f"there are {inside} features, and the bottleneck of {params.bottleneck} would let them all through; "
                f"give one below {inside}",
                code="bad_hyperparameter",
                param="hyperparameters.bottleneck",
            )
        encoder = perceptron(inside, params.hidden, params.bottleneck, params)
        decoder = perceptron(params.bottleneck, params.hidden[::-1], inside, params)
        return Reconstruction(encoder, decoder, params.noise)

    def objective(self, examples: Examples, params: Any) -> Any:
        return Badness()

    def learn(self, examples: Examples, params: Any, ctx: JobContext, stopping: Stopping | None = None) -> AnomalyFitted:
        made = super().learn(examples, params, ctx, stopping)
        fitted = AnomalyFitted(**{field.name: getattr(made, field.name) for field in fields(NetFitted)})
        scores = [fitted.predict(features)["value"] for features, _ in examples.batches(1024)]
        bound = between(np.concatenate(scores), params.quantile)
        return replace(fitted, threshold=bound)


def between(scores: np.ndarray, quantile: float) -> float:
    """The quantile, midway between two scores, so that no row lies on it."""
    ordered = np.sort(scores)
    place = min(len(ordered) - 1, math.ceil(quantile * len(ordered)))
    return float(np.float32((ordered[max(0, place - 1)] + ordered[place]) / 2))


class Badness:
    """In place of an `Objective`: the net itself gives each row's error, and that is what is made small."""

    outputs, link, mean, scale = 1, "scale", 0.0, 1.0
    classes = None

    def prepare(self, target: np.ndarray) -> torch.Tensor:
        import torch

        return torch.zeros(len(target))

    def losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return scores.float().reshape(-1)

    def measure(self, metric: str, scores: np.ndarray, target: np.ndarray) -> float | None:
        return float(scores.mean()) if metric == "reconstruction_error" else None
