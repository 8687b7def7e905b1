"""Parameters of the transforms of images, sounds and token sequences. Light: pydantic only."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from modelworks.core.specs import Spec

MAX_SIDE = 1024
MAX_TOKENS = 4096
Size = tuple[int, int]


def _square(value: Any) -> Any:
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


class _Sized(Spec):
    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        if isinstance(value, dict) and "size" in value:
            return {**value, "size": _square(value["size"])}
        return value

    @model_validator(mode="after")
    def _within(self) -> Any:
        size = getattr(self, "size", None)
        if size is not None and not all(1 <= side <= MAX_SIDE for side in size):
            raise ValueError(f"size is [height, width], each from 1 to {MAX_SIDE}")
        return self


class Resize(_Sized):
    size: Size | None = Field(
        None,
        description="[height, width], or one number for both; by default the size that all training images have, else "
        "their median size, at most 64",
    )
    fit: Literal["stretch", "crop", "pad"] = Field(
        "stretch", description="crop: the middle of what covers the size; pad: all of it, on black"
    )
    colour: Literal["auto", "grey", "rgb"] = Field("auto", description="auto: grey when all training images are")


class Crop(_Sized):
    size: Size = Field(description="[height, width], or one number for both")
    top: int | None = Field(None, ge=0, description="by default the middle")
    left: int | None = Field(None, ge=0, description="by default the middle")


class Normalise(Spec):
    mean: list[float] | None = Field(None, min_length=1, max_length=16, description="of each channel")
    std: list[float] | None = Field(None, min_length=1, max_length=16, description="of each channel")
    preset: Literal["imagenet"] | None = Field(None, description="the figures of a well-known data set")

    @model_validator(mode="after")
    def _both(self) -> Normalise:
        if (self.mean is None) != (self.std is None) or (self.preset and self.mean):
            raise ValueError("give mean and std, or a preset, or nothing to take them from the training rows")
        if self.std and min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self


class Augment(Spec):
    flip: Literal["horizontal", "vertical", "both"] | None = Field(None, description="mirror half of the images")
    shift: float = Field(0.0, ge=0, le=0.5, description="move by up to this share of the width and height (of the time)")
    rotate: float = Field(0.0, ge=0, le=180, description="turn by up to this many degrees, either way")
    noise: float = Field(0.0, ge=0, le=10, description="add normal noise of this deviation")

    @model_validator(mode="after")
    def _some(self) -> Augment:
        if not (self.flip or self.shift or self.rotate or self.noise):
            raise ValueError("give at least one of flip, shift, rotate and noise")
        return self


class Resample(Spec):
    rate: int = Field(16_000, ge=1000, le=96_000, description="samples a second; sounds become mono")
    seconds: float | None = Field(
        None, gt=0, le=120, description="shorter sounds are padded, longer cut; by default the longest in training, up to 10"
    )
    align: Literal["start", "centre"] = Field("start", description="which part is kept, and where the padding goes")

    @model_validator(mode="after")
    def _bounded(self) -> Resample:
        if self.seconds and self.rate * self.seconds > 2_000_000:
            raise ValueError("rate x seconds is at most 2,000,000 samples")
        return self


class MelSpectrogram(Spec):
    window: int = Field(512, ge=32, le=8192, description="samples of a frame")
    hop: int = Field(160, ge=8, le=8192, description="samples between two frames")
    bands: int = Field(40, ge=4, le=256)
    low: float = Field(20.0, ge=0, description="Hz")
    high: float | None = Field(None, gt=0, description="Hz; by default half the rate")
    log: bool = True


class Mfcc(MelSpectrogram):
    coefficients: int = Field(13, ge=2, le=128)
    log: Literal[True] = True

    @model_validator(mode="after")
    def _fewer(self) -> Mfcc:
        if self.coefficients > self.bands:
            raise ValueError("coefficients must not exceed bands")
        return self


class Pool(Spec):
    segments: int = Field(8, ge=1, le=1024, description="means over this many equal parts of the time")


class Tokenise(Spec):
    tokenizer: dict[str, Any] | str | None = Field(
        None,
        description="a tokenizer as JSON (tokenizer.json of the tokenizers library), or package:DIST/PATH of one; by "
        "default byte-pair encoding is learnt from the training rows",
    )
    model: str | None = Field(None, description="a registered embedding model, whose tokenizer is used")
    vocabulary: int = Field(4000, ge=16, le=100_000, description="tokens of a learnt tokenizer, at most")
    length: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="shorter texts are padded, longer cut; by default what fits 98 % of texts, up to 256"
    )
    lowercase: bool = Field(False, description="for a learnt tokenizer")

    @model_validator(mode="after")
    def _one(self) -> Tokenise:
        if self.model and self.tokenizer is not None:
            raise ValueError("give tokenizer or model, not both")
        return self


class Embed(Spec):
    model: str | None = Field(
        None, description="a registered embedding model: its name, name:version or name@alias; by default the newest there is"
    )
    length: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="tokens of a text that are read; by default what fits 98 % of texts, up to 256"
    )
