"""Classifiers on a registered model: its vectors are computed once, a head learns from them, then both may learn together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Stopping, TransformSpec
from modelworks.core.tasks import CLASSIFICATION
from modelworks.core.types import Column
from modelworks.ml.base import Examples, JobContext, Models, Part
from modelworks.ml.data.transforms.host import TOKENS_AT_ONCE
from modelworks.ml.nets.params import ImageClassifierParams, PretrainedParams
from modelworks.ml.nets.sequences import alone
from modelworks.ml.nets.trainer import NetTrainer, set_aside, set_up

if TYPE_CHECKING:
    import torch

    from modelworks.ml.nets.examples import MemoryExamples
    from modelworks.ml.nets.fitted import NetFitted

BACKBONE = "hyperparameters.backbone"
_PIXELS_AT_ONCE = 4_000_000
_SHARE = 0.3  # of the training that is the head alone, where the backbone learns too


class Pretrained(NetTrainer):
    """Subclasses tell `backbone`, the task of the models that they build on, and give `front` and `transforms`."""

    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION,)
    auto: ClassVar[bool] = False
    backbone: ClassVar[str]
    Params: ClassVar[type[PretrainedParams]] = PretrainedParams

    def front(self, examples: Examples, params: Any, models: Models) -> tuple[torch.nn.Module, int]:
        """(the backbone as a module from features [n, *shape] to vectors [n, d], rows that may go through at once)

        Without fine_tune it need not run: it only emits itself.
        """
        raise NotImplementedError

    def transforms(self, columns: list[Column], params: Any, models: Models) -> list[TransformSpec]:
        """What prepares the features for the backbone where the user names nothing."""
        raise NotImplementedError

    def learn(self, examples: Examples, params: Any, ctx: JobContext, stopping: Stopping | None = None) -> NetFitted:
        torch = set_up(ctx)
        from modelworks.ml.nets import advice
        from modelworks.ml.nets.fitted import fitted_of
        from modelworks.ml.nets.loop import Loop
        from modelworks.ml.nets.objective import Objective

        examples, held = set_aside(examples, stopping, ctx.seed)
        objective = Objective(examples, params)
        front, rows = self.front(examples, params, ctx.model)
        share = _SHARE if params.fine_tune else 1.0
        reading = _Reading(front, examples.shape, rows, Stage(ctx, "vectors", 0.0, share / 2))
        vectors = reading.vectors(examples, getattr(params, "copies", 1) if getattr(examples, "augment", None) else 0)
        judged = reading.vectors(held, 0) if held is not None else None
        torch.manual_seed(ctx.seed)
        head = _head(vectors.features, objective.outputs, params)
        loop = Loop(head, vectors, objective, params, Stage(ctx, "head", share / 2, share), stopping, judged)
        advice.give(loop, more=params.fine_tune > 0)
        history = loop.run()
        net = torch.nn.Sequential(front, head)
        if params.fine_tune:
            torch.manual_seed(ctx.seed + 1)
            both = params.model_copy(
                update={"epochs": params.fine_tune, "learning_rate": params.fine_tune_rate, "schedule": "linear", "warmup": 0.1}
            )
            limits = stopping.model_copy(update={"max_epochs": None}) if stopping else None
            whole = Loop(net, examples, objective, both, Stage(ctx, "backbone", share, 1.0, len(history)), limits, held)
            advice.give(whole)
            history = [*history, *whole.run()]
        probe = next(iter(examples.batches(min(rows, 8))))[0]
        answers = None if params.fine_tune else (head, vectors.features[: len(probe)])
        return fitted_of(net, examples.shape, objective, probe, ctx.threads, history, rows, answers)


class TextClassifier(Pretrained):
    """Classes of texts by a head on a registered embedding model, which stays as it is or is fine-tuned."""

    tokens: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("text",)
    backbone: ClassVar[str] = "embedding"

    def front(self, examples: Examples, params: Any, models: Models) -> tuple[torch.nn.Module, int]:
        from modelworks.ml.nets.backbone import text_backbone
        from modelworks.ml.nets.interpret import Frozen, TextFront

        block = alone(examples, "text-classifier")
        if block.kind != "tokens" or block.about.get("model") != params.backbone:
            raise InvalidInput(
                f"text-classifier reads one text as the tokens of its backbone; leave transforms out, or let tokenise have "
                f"the model {params.backbone}",
                code="wrong_features",
                param="transforms",
            )
        found = text_backbone(models(params.backbone), params.backbone, BACKBONE)
        front = TextFront(found) if params.fine_tune else Frozen(found)
        return front, max(1, TOKENS_AT_ONCE // block.shape[0])

    def transforms(self, columns: list[Column], params: Any, models: Models) -> list[TransformSpec]:
        names = [column.name for column in columns if column.type in ("text", "category")]
        if not names:
            raise InvalidInput("text-classifier reads a text, and no feature is one", code="wrong_features", param="features")
        return [TransformSpec.model_validate({"op": "tokenise", "columns": names, "model": params.backbone})]


class ImageClassifier(Pretrained):
    """Classes of images by a head on a registered image model, which stays as it is or is fine-tuned."""

    reads: ClassVar[tuple[str, ...]] = ("image",)
    backbone: ClassVar[str] = "image-embedding"
    Params: ClassVar[type[ImageClassifierParams]] = ImageClassifierParams

    def front(self, examples: Examples, params: Any, models: Models) -> tuple[torch.nn.Module, int]:
        from modelworks.ml.nets.backbone import image_backbone
        from modelworks.ml.nets.interpret import Frozen, ImageFront

        block = alone(examples, "image-classifier")
        found = image_backbone(models(params.backbone), params.backbone, BACKBONE)
        wanted = (found.channels, *(found.size or block.shape[1:]))
        if block.kind != "image" or block.shape != wanted:
            there = f"{block.kind} of shape {list(block.shape)}"
            raise InvalidInput(
                f"{params.backbone} takes images of shape {list(wanted)}, and the features are {there}; leave transforms "
                f"out, or resize to size {list(wanted[1:])} and colour {'rgb' if wanted[0] == 3 else 'grey'}",
                code="wrong_features",
                param="transforms",
            )
        front = ImageFront(found) if params.fine_tune else Frozen(found)
        return front, max(1, _PIXELS_AT_ONCE // int(np.prod(block.shape)))

    def transforms(self, columns: list[Column], params: Any, models: Models) -> list[TransformSpec]:
        from modelworks.ml.nets.backbone import image_backbone

        found = image_backbone(models(params.backbone), params.backbone, BACKBONE)
        colour = "rgb" if found.channels == 3 else "grey"
        resize = {"op": "resize", "columns": "image", "size": list(found.default_size), "colour": colour}
        scale: dict[str, Any] = {"op": "normalise", "columns": "image"}
        if found.channels == 3:
            scale["preset"] = "imagenet"
        return [TransformSpec.model_validate(one) for one in (resize, scale)]


@dataclass(frozen=True)
class _Reading:
    """Vectors of examples by the backbone as it came, computed by the graph that will serve."""

    front: torch.nn.Module
    shape: tuple[int, ...]
    rows: int
    ctx: Stage

    def vectors(self, examples: Examples, copies: int) -> MemoryExamples:
        """Of the rows as they lie, and of `copies` changed ones of each."""
        from modelworks.ml.graph import session, to_bytes
        from modelworks.ml.nets import emit
        from modelworks.ml.nets.examples import MemoryExamples

        run = session(to_bytes(emit.write_vectors(self.front, self.shape)), self.ctx.threads)
        total, done = len(examples) * (1 + copies), 0
        found: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        for copy in range(1 + copies):
            seed = (self.ctx.seed, 2, copy) if copy else None
            for features, target in examples.batches(self.rows, seed=seed):
                found.append(run.run(None, {"features": np.ascontiguousarray(features, dtype=np.float32)})[0])
                targets.append(target)
                done += len(target)
                self.ctx.progress(done / total, f"the backbone reads: {done} of {total} rows")
        return MemoryExamples(np.concatenate(found), np.concatenate(targets), classes=examples.classes)


def _head(vectors: np.ndarray, outputs: int, params: Any) -> torch.nn.Module:
    """Vectors in units of their deviation, then layers."""
    from torch import nn

    from modelworks.ml.nets.layers import Standardise

    parts: list[nn.Module] = [Standardise(vectors.mean(axis=0), vectors.std(axis=0))]
    width = vectors.shape[1]
    for wide in params.hidden:
        parts += [nn.Dropout(params.dropout), nn.Linear(width, wide), nn.ReLU()]
        width = wide
    return nn.Sequential(*parts, nn.Dropout(params.dropout), nn.Linear(width, outputs))


class Stage(Part):
    """A part of one training, whose curve goes on where the last one ended."""

    def __init__(self, ctx: JobContext, name: str, start: float, end: float, epochs: int = 0) -> None:
        super().__init__(ctx, start, end, name)
        self._epochs = epochs

    def metric(self, step: int, values: Mapping[str, float], *, unit: str = "epoch", part: str = "") -> None:
        self.ctx.metric(step + self._epochs, values, unit=unit, part=part)
