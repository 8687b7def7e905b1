"""The hyperparameters of every net, declared as data. Light: pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelworks.ml.train.params import ClassWeight, Params

Width = Annotated[int, Field(ge=1, le=65_536)]
Activation = Literal["relu", "gelu", "tanh", "silu", "leaky-relu", "sigmoid"]


class NetParams(Params):
    """How any net is trained."""

    epochs: int = Field(50, ge=1, le=100_000, description="passes over the training rows, unless it stops earlier")
    batch_size: int = Field(64, ge=1, le=1_000_000, description="rows of one step; gradient-descent takes all rows")
    accumulate: int = Field(1, ge=1, le=10_000, description="batches whose gradients are added up for one step")
    optimiser: Literal["adamw", "adam", "sgd", "momentum", "nesterov", "gradient-descent"] = Field(
        "adamw", description="gradient-descent: one step an epoch, by the gradient over all rows"
    )
    learning_rate: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = Field(
        1e-3, description="auto: a range test before training chooses it"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of momentum and nesterov")
    schedule: Literal["constant", "step", "cosine", "linear", "one-cycle"] = Field(
        "constant", description="how the learning rate goes: step divides it by 10 at 1/2 and 3/4 of all steps"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="share of all steps in which the learning rate rises from 0")
    loss: Literal["auto", "mse", "mae", "huber", "cross-entropy", "binary-cross-entropy", "focal"] = Field(
        "auto", description="auto: cross-entropy for classes, mse for numbers"
    )
    focal_gamma: float = Field(
        2.0, ge=0, le=10, description="with loss focal: how much rows that are right already fade"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each label spread over all classes")
    class_weight: ClassWeight = None
    l1: float = Field(0.0, ge=0, le=1e6, description="L1 penalty on the weights")
    l2: float = Field(0.0, ge=0, le=1e6, description="L2 penalty on the weights; decoupled (weight decay) with adamw")
    clip_norm: float | None = Field(None, gt=0, le=1e6, description="the gradient's norm at most")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the computation in training; weights and the resulting model are float32"
    )


class MlpParams(NetParams):
    hidden: list[Width] = Field([64, 64], max_length=64, description="widths of the hidden layers, e.g. [512, 512]")
    activation: Activation = Field("relu", description="between the layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of hidden units left out at random in each step")
    batch_norm: bool = Field(False, description="normalise each hidden layer over the batch")


class AutoencoderParams(MlpParams):
    hidden: list[Width] = Field(
        [64, 32], max_length=32, description="widths of the layers down to the bottleneck; the way back has them reversed"
    )
    bottleneck: int = Field(4, ge=1, le=65_536, description="how many numbers a row is brought down to")
    noise: float = Field(0.1, ge=0, le=10, description="deviation of the noise that training adds to what is to be said again")
    quantile: float = Field(
        0.99, gt=0, lt=1, description="rows with a score above this quantile of the training rows' scores are anomalies"
    )
    positive: str | None = Field(
        None, max_length=1000, description="with a target: the label that means an anomaly; by default true, 1, anomaly, "
        "outlier, abnormal, fraud or attack"
    )  # fmt: skip
    learning_rate: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = Field(
        3e-3, description="auto: a range test before training chooses it"
    )


class RecommenderParams(NetParams):
    factors: int = Field(16, ge=1, le=4096, description="numbers of each user and item")
    regularisation: float = Field(0.02, ge=0, le=1e6, description="L2 penalty on the numbers that a row uses")
    negatives: int = Field(32, ge=1, le=10_000, description="of clicks: items drawn at random to be told from the one clicked")
    top_k: int = Field(10, ge=1, le=1000, description="how many items it recommends, and what hit_rate, ndcg and recall_at_k count")
    exclude_seen: bool = Field(True, description="whether items that the user had in training are left out of recommendations")
    relevant: float | None = Field(
        None, description="of ratings: from which one on a held-out item counts for hit_rate, ndcg and recall_at_k; null: each"
    )
    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training rows, unless it stops earlier")
    batch_size: int = Field(512, ge=1, le=1_000_000, description="rows of one step; gradient-descent takes all rows")
    learning_rate: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = Field(
        0.01, description="auto: a range test before training chooses it"
    )


class CnnParams(NetParams):
    shape: list[Width] | None = Field(
        None, min_length=2, max_length=3,
        description="[channels, height, width] that the features of a table form, e.g. [1, 8, 8]; [channels, length] for a "
        "series. Images bring their own",
    )  # fmt: skip
    channels: list[Width] = Field([32, 64], min_length=1, max_length=32, description="filters of each stage")
    kernel: int = Field(3, ge=1, le=31, description="width of the filters")
    residual: int = Field(0, ge=0, le=32, description="residual blocks in each stage; 0: one plain convolution a stage")
    head: list[Width] = Field([128], max_length=8, description="widths of the layers after the convolutions")
    pooling: Literal["flatten", "average"] = Field("flatten", description="how the last maps become one row")
    batch_norm: bool = Field(True, description="normalise each channel over the batch")
    dropout: float = Field(0.25, ge=0, lt=1, description="share of units left out before each layer of the head")
    shift: int = Field(0, ge=0, le=64, description="augment: move each training image by up to this many pixels")

    @model_validator(mode="after")
    def _bounded(self) -> CnnParams:
        if self.kernel % 2 == 0:
            raise ValueError("kernel must be odd")
        return self


class MultimodalParams(NetParams):
    width: int = Field(64, ge=2, le=8192, description="numbers that each encoder gives to the head")
    hidden: list[Width] = Field([64], max_length=16, description="widths of the head's layers")
    activation: Activation = Field("relu", description="in encoders of tables and in the head")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of units left out at random in each step")
    batch_norm: bool = Field(False, description="normalise over the batch, in encoders of images and in the head")
    channels: list[Width] = Field([16, 32], min_length=1, max_length=32, description="of images and sounds: filters of each stage")
    kernel: int = Field(3, ge=1, le=31, description="of images and sounds: width of the filters")
    residual: int = Field(0, ge=0, le=32, description="of images and sounds: residual blocks in each stage")
    pooling: Literal["flatten", "average"] = Field("flatten", description="of images and sounds: how the last maps become one row")
    shift: int = Field(0, ge=0, le=64, description="augment: move each training image by up to this many pixels")
    heads: int = Field(4, ge=1, le=128, description="of texts: attention heads; must divide width")
    layers: int = Field(1, ge=1, le=48, description="of texts: transformer layers")
    clip_norm: float | None = Field(1.0, gt=0, le=1e6, description="the gradient's norm at most")

    @model_validator(mode="after")
    def _fits(self) -> MultimodalParams:
        _heads_divide(self.width, self.heads)
        if self.kernel % 2 == 0:
            raise ValueError("kernel must be odd")
        return self


class PretrainedParams(NetParams):
    """A head on a registered model: first alone, then, with `fine_tune`, together with it."""

    backbone: str | None = Field(
        None, max_length=300, description="the registered model to build on: its name, name:version or name@alias; by default "
        "the newest there is",
    )  # fmt: skip
    epochs: int = Field(40, ge=1, le=100_000, description="passes in which the head learns while the backbone stays")
    batch_size: int = Field(32, ge=1, le=1_000_000, description="rows of one step")
    l2: float = Field(0.1, ge=0, le=1e6, description="L2 penalty on the weights; decoupled (weight decay) with adamw")
    hidden: list[Width] = Field([], max_length=8, description="widths of layers between the backbone and the answer")
    dropout: float = Field(0.3, ge=0, lt=1, description="share of units left out before each layer of the head")
    fine_tune: int = Field(0, ge=0, le=1000, description="passes after that, in which the backbone learns too; 0: it stays")
    fine_tune_rate: float = Field(2e-5, gt=0, le=1, description="learning rate of those passes, rising and then falling")


class ImageClassifierParams(PretrainedParams):
    copies: int = Field(
        4, ge=1, le=100, description="with the transform augment: how many changed copies of each image the head learns from"
    )


class SequenceParams(NetParams):
    """What nets over sequences have in common."""

    steps: int | None = Field(
        None, ge=1, le=100_000, description="how many time steps the features of a table form, in order of the columns; "
        "by default each column is a step. Token sequences and sounds bring their own. Where each element is named: the most "
        "elements that a sequence may have, by default as many as the longest has"
    )  # fmt: skip
    dropout: float = Field(0.1, ge=0, lt=1, description="share of units left out at random in each step")


class RnnParams(SequenceParams):
    cell: Literal["lstm", "gru"] = Field("lstm", description="the kind of recurrent unit")
    hidden: int = Field(64, ge=1, le=8192, description="units of each layer (in each direction)")
    layers: int = Field(1, ge=1, le=16, description="layers on top of each other")
    bidirectional: bool | None = Field(
        None, description="whether it also reads from the end; null: only where each element is named"
    )
    embedding: int = Field(64, ge=1, le=8192, description="for token sequences: width of a token's vector")
    clip_norm: float | None = Field(1.0, gt=0, le=1e6, description="the gradient's norm at most")


class TransformerParams(SequenceParams):
    width: int = Field(64, ge=2, le=8192, description="of each position's vector")
    heads: int = Field(4, ge=1, le=128, description="attention heads; must divide width")
    layers: int = Field(2, ge=1, le=48, description="layers on top of each other")
    feed_forward: int = Field(128, ge=1, le=65_536, description="width of the layer between two attentions")
    vocabulary: int = Field(
        1000, ge=257, le=200_000, description="of text generation: tokens that are learnt from the texts, byte-pair encoded; "
        "257: bytes alone"
    )  # fmt: skip
    context: int = Field(256, ge=64, le=8192, description="of text generation: how many tokens it looks back on, and writes, at most")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps in which the learning rate rises from 0")
    clip_norm: float | None = Field(1.0, gt=0, le=1e6, description="the gradient's norm at most")

    @model_validator(mode="after")
    def _divides(self) -> TransformerParams:
        _heads_divide(self.width, self.heads)
        return self


class ForecasterParams(NetParams):
    season: int | None = Field(
        None, ge=2, le=10_000, description="steps after which the series repeats: 12 of months, 7 of days; null: none"
    )
    horizon: int | None = Field(
        None, ge=1, le=1000, description="steps ahead of one forecast; null: a season, or 12 where there is none"
    )
    window: int | None = Field(
        None, ge=2, le=10_000, description="steps that are looked back on; null: two seasons, or 24 and more"
    )
    log: bool | None = Field(
        None, description="learn the logarithm, for swings that grow with the level; null: told from the series"
    )
    level: float = Field(0.9, gt=0, lt=1, description="share of what comes that is to lie between low and high")
    hidden: list[Width] = Field(
        [32], max_length=16, description="widths of the net that corrects the linear forecast; [] leaves it linear"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share of hidden units left out at random in each step",
        json_schema_extra={"search": {"low": 0.0, "high": 0.5}},
    )  # fmt: skip
    learning_rate: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = Field(
        1e-3, description="auto: a range test before training chooses it",
        json_schema_extra={"search": {"low": 1e-4, "high": 1e-2, "log": True}},
    )  # fmt: skip
    l2: float = Field(
        1e-3, ge=0, le=1e6, description="L2 penalty on the weights; decoupled (weight decay) with adamw",
        json_schema_extra={"search": {"low": 1e-4, "high": 1.0, "log": True}},
    )  # fmt: skip


def _heads_divide(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError("heads must divide width")
