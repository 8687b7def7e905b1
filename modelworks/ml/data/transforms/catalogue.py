"""Every transform a recipe may name: its parameters, what it applies to, the check of both. Light: pydantic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import Spec, TransformSpec
from modelworks.ml.data.transforms import media_params as media

MAX_TRANSFORMS = 200
MAX_NAMED_COLUMNS = 10_000

# selector word -> the column types it stands for
SELECTORS: dict[str, tuple[str, ...]] = {
    "all": ("number", "integer", "category", "boolean", "text", "time", "image", "audio"),
    "numeric": ("number", "integer"),
    "number": ("number",),
    "integer": ("integer",),
    "category": ("category",),
    "boolean": ("boolean",),
    "text": ("text",),
    "time": ("time",),
    "image": ("image",),
    "audio": ("audio",),
}
ANY = SELECTORS["all"]
MEDIA = ("image", "audio")
PLAIN = tuple(name for name in ANY if name not in MEDIA)
NUMERIC = SELECTORS["numeric"]
FLAT = ("number", "integer", "boolean")  # held as float32 in the graph
LABELS = ("category", "text", "boolean", "integer")  # have a finite spelling that can be encoded

DatePart = Literal["year", "month", "day", "weekday", "hour", "minute", "dayofyear", "is_weekend"]


class NoParams(Spec):
    pass


class FillMissing(Spec):
    strategy: Literal["mean", "median", "most-frequent", "constant"] | None = Field(
        None, description="by default the mean for numbers and the most frequent value for everything else"
    )
    value: float | int | bool | str | None = Field(
        None, description="what to fill in; without columns, in columns of its type"
    )

    @model_validator(mode="after")
    def _value(self) -> FillMissing:
        if self.strategy == "constant" and self.value is None:
            raise ValueError("the strategy constant needs a value")
        if self.value is not None and self.strategy not in (None, "constant"):
            raise ValueError(f"value goes with the strategy constant, not {self.strategy}")
        if self.value == "" or (isinstance(self.value, float) and not abs(self.value) < float("inf")):
            raise ValueError("value must be a finite number or a text that is not empty")
        return self


class Clip(Spec):
    low: float | None = Field(None, description="absolute lower bound", allow_inf_nan=False)
    high: float | None = Field(None, description="absolute upper bound", allow_inf_nan=False)
    low_quantile: float | None = Field(None, ge=0, le=1, description="lower bound as a quantile of the training rows")
    high_quantile: float | None = Field(None, ge=0, le=1, description="upper bound as a quantile of the training rows")
    iqr: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="this many interquartile ranges beyond the quartiles; 1.5 by default",
    )
    zscore: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="this many standard deviations around the mean"
    )

    @model_validator(mode="after")
    def _family(self) -> Clip:
        families = [
            self.low is not None or self.high is not None,
            self.low_quantile is not None or self.high_quantile is not None,
            self.iqr is not None,
            self.zscore is not None,
        ]
        if sum(families) > 1:
            raise ValueError("give one of low/high, low_quantile/high_quantile, iqr and zscore")
        for low, high in ((self.low, self.high), (self.low_quantile, self.high_quantile)):
            if low is not None and high is not None and low > high:
                raise ValueError("the lower bound must not be above the upper one")
        return self


class Cast(Spec):
    to: Literal["number", "integer", "category", "boolean"]


class MinMax(Spec):
    range: tuple[float, float] = Field(
        (0.0, 1.0), description="the values that the training rows' minimum and maximum become"
    )

    @model_validator(mode="after")
    def _ordered(self) -> MinMax:
        if not -1e30 < self.range[0] < self.range[1] < 1e30:
            raise ValueError("range is [low, high] with low below high")
        return self


class Log(Spec):
    base: float | None = Field(None, gt=0, allow_inf_nan=False, description="of the logarithm; natural by default")
    offset: float = Field(
        1.0, allow_inf_nan=False, description="added before the logarithm; the default makes it log1p"
    )

    @model_validator(mode="after")
    def _base(self) -> Log:
        if self.base == 1:
            raise ValueError("base must not be 1")
        return self


class OneHot(Spec):
    max_categories: int = Field(
        1000, ge=1, le=10_000, description="the most frequent are kept; all others become zeros, like unknown ones"
    )


class Ordinal(Spec):
    order: list[str] | None = Field(
        None, min_length=1, max_length=100_000, description="values from lowest to highest; sorted by default"
    )
    unknown: float = Field(-1.0, allow_inf_nan=False, description="the number for unknown and missing values")

    @model_validator(mode="after")
    def _distinct(self) -> Ordinal:
        if self.order is not None and (len(set(self.order)) != len(self.order) or "" in self.order):
            raise ValueError("order must list different values, none of them empty")
        return self


class GroupRare(Spec):
    min_count: int | None = Field(None, ge=1, description="values seen fewer times are grouped")
    min_share: float | None = Field(
        None, gt=0, lt=1, description="values with a smaller share of the rows are grouped; 0.01 by default"
    )
    other: str = Field(
        "other", min_length=1, max_length=1000, description="the label of the group, also for unknown values"
    )

    @model_validator(mode="after")
    def _one(self) -> GroupRare:
        if self.min_count is not None and self.min_share is not None:
            raise ValueError("give min_count or min_share, not both")
        return self


class DateParts(Spec):
    parts: list[DatePart] = Field(["year", "month", "day", "weekday", "hour"], min_length=1, max_length=8)
    cyclic: bool = Field(
        False,
        description="the sine and cosine of month, day, weekday, hour, minute and dayofyear instead of their number",
    )

    @model_validator(mode="after")
    def _distinct(self) -> DateParts:
        if len(set(self.parts)) != len(self.parts):
            raise ValueError("parts must be different")
        return self


class Tokens(Spec):
    analyzer: Literal["word", "char"] = Field(
        "word",
        description="word: runs of letters and digits, and each Chinese or Japanese character; char: all characters",
    )
    ngram: tuple[int, int] | None = Field(
        None, description="[shortest, longest]; [1, 1] for words, [1, 2] for characters"
    )
    lowercase: bool = True

    @model_validator(mode="after")
    def _ngram(self) -> Tokens:
        if self.ngram is not None and not 1 <= self.ngram[0] <= self.ngram[1] <= 8:
            raise ValueError("ngram is [shortest, longest], between 1 and 8")
        return self


class TfIdf(Tokens):
    max_features: int = Field(1000, ge=1, le=20_000, description="the most frequent terms are kept")
    min_df: int = Field(1, ge=1, description="terms in fewer rows are left out")
    sublinear: bool = Field(False, description="1 + log(count) instead of the count")


class Hashing(Tokens):
    n_features: int = Field(256, ge=2, le=20_000, description="the number of columns that the terms are spread over")


@dataclass(frozen=True)
class Transform:
    """`types`: what it can be applied to; `default`: what it takes when no columns are given (None: they must be).

    kind: "rows" drops rows of training and evaluation sets, never at serving; "graph" runs in the ONNX graph; "host"
    before it; "training" changes training rows alone, anew in each epoch. `blocks`: it works on what an image, a sound
    or a text became: numbers in a shape of their own.
    """

    name: str
    kind: Literal["rows", "graph", "host", "training"]
    description: str
    types: tuple[str, ...]
    default: tuple[str, ...] | None
    Params: type[Spec] = NoParams
    blocks: bool = False


TRANSFORMS: dict[str, Transform] = {
    transform.name: transform
    for transform in (
        Transform("drop-missing", "rows", "Drop the rows that miss a value in one of the columns.", ANY, ANY),
        Transform(
            "drop-duplicates", "rows", "Keep the first of the rows that are alike in all of the columns.", ANY, ANY
        ),
        Transform("drop", "graph", "Drop the columns.", ANY, None),
        Transform("fill-missing", "graph", "Fill in missing values.", PLAIN, PLAIN, FillMissing),
        Transform("clip", "graph", "Clip outliers to bounds.", NUMERIC, NUMERIC, Clip),
        Transform(
            "cast",
            "graph",
            "Change the type of columns.",
            ("number", "integer", "category", "boolean", "text"),
            None,
            Cast,
        ),
        Transform("standardise", "graph", "Scale to mean 0 and deviation 1.", FLAT, NUMERIC),
        Transform("min-max", "graph", "Scale to a range.", FLAT, NUMERIC, MinMax),
        Transform("log", "graph", "The logarithm of value + offset.", NUMERIC, NUMERIC, Log),
        Transform(
            "one-hot",
            "graph",
            "A column of 0 and 1 for each value; unknown and missing values are zeros.",
            LABELS,
            ("category",),
            OneHot,
        ),
        Transform("ordinal", "graph", "The position of the value in an order.", LABELS, ("category",), Ordinal),
        Transform(
            "group-rare", "graph", "Put rare and unknown values under one label.", LABELS, ("category",), GroupRare
        ),
        Transform(
            "date-parts", "host", "The parts of a time, in UTC, each as a number.", ("time",), ("time",), DateParts
        ),
        Transform(
            "tf-idf",
            "host",
            "Weights of the terms of a text (TF-IDF, rows of length 1).",
            ("text", "category"),
            ("text",),
            TfIdf,
        ),
        Transform(
            "hashing",
            "host",
            "Counts of the terms of a text, spread over columns by a hash.",
            ("text", "category"),
            ("text",),
            Hashing,
        ),
        Transform(
            "resize", "host", "Decode an image and bring it to one size; values 0 to 1.", ("image",), ("image",), media.Resize
        ),
        Transform("crop", "graph", "A part of each image.", ("image",), ("image",), media.Crop, blocks=True),
        Transform(
            "normalise", "graph", "Each channel to mean 0 and deviation 1.", MEDIA, MEDIA, media.Normalise, blocks=True
        ),
        Transform(
            "augment", "training", "Changed at random in each epoch of training.", MEDIA, MEDIA, media.Augment, blocks=True
        ),
        Transform(
            "resample", "host", "Decode a sound to one rate, one channel and one length.", ("audio",), ("audio",), media.Resample
        ),
        Transform(
            "mel-spectrogram", "graph", "The (log) energy in mel bands over time.", ("audio",), ("audio",),
            media.MelSpectrogram, blocks=True,
        ),
        Transform(
            "mfcc", "graph", "Mel-frequency cepstral coefficients over time.", ("audio",), ("audio",), media.Mfcc, blocks=True
        ),
        Transform(
            "pool", "graph", "Means of a spectrogram over parts of the time.", ("audio",), ("audio",), media.Pool, blocks=True
        ),
        Transform(
            "tokenise", "host", "A text as a sequence of token numbers, 0 where it is padded.", ("text", "category"), ("text",),
            media.Tokenise,
        ),
        Transform(
            "embed", "host", "The vector that a registered embedding model gives a text, a number a column.",
            ("text", "category"), ("text",), media.Embed,
        ),
    )
}  # fmt: skip
ALIASES = {
    "normalize": "normalise", "tokenize": "tokenise", "mel": "mel-spectrogram", "standardize": "standardise",
    "minmax": "min-max", "onehot": "one-hot", "tfidf": "tf-idf",
}  # fmt: skip


def check_transforms(specs: list[TransformSpec]) -> list[TransformSpec]:
    """The same steps with canonical op names. InvalidInput names the step of an unknown op or a bad parameter."""
    if len(specs) > MAX_TRANSFORMS:
        raise InvalidInput(
            f"there are {len(specs)} transforms; at most {MAX_TRANSFORMS} are allowed", param="transforms"
        )
    return [_check(spec, f"transforms[{index}]") for index, spec in enumerate(specs)]


def params_of(spec: TransformSpec, where: str = "transforms") -> Any:
    """The validated Params of one step, with its defaults. Raises InvalidInput that names the parameter."""
    transform = _find(spec, where)
    try:
        return transform.Params.model_validate(spec.params)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(transform.Params.model_fields) or "none"
        reason = (
            f"there is no such parameter; allowed: {allowed}" if first["type"] == "extra_forbidden" else first["msg"]
        )
        at = f"{field!r}: " if field else ""
        raise InvalidInput(
            f"{transform.name}: {at}{reason}", param=f"{where}.{field}" if field else where, code="bad_transform"
        ) from None


def selected_types(spec: TransformSpec, params: Any) -> tuple[str, ...]:
    """The types a step takes that names no columns."""
    if isinstance(params, FillMissing) and params.strategy in ("mean", "median"):
        return NUMERIC
    if isinstance(params, FillMissing) and isinstance(params.value, bool):
        return ("boolean",)
    if isinstance(params, FillMissing) and params.value is not None:
        return ("category", "text") if isinstance(params.value, str) else NUMERIC
    return TRANSFORMS[spec.op].default or ()


def describe() -> list[dict[str, Any]]:
    """The catalogue as JSON: what `GET /api/v1/transforms` lists."""
    return [
        {
            "name": transform.name,
            "kind": transform.kind,
            "description": transform.description,
            "applies_to": list(transform.types),
            "default_columns": None if transform.default is None else list(transform.default),
            "parameters": transform.Params.model_json_schema(),
        }
        for transform in TRANSFORMS.values()
    ]


def _find(spec: TransformSpec, where: str) -> Transform:
    name = ALIASES.get(spec.op, spec.op)
    if name not in TRANSFORMS:
        raise InvalidInput(
            f"there is no transform {spec.op[:100]!r}; choose one of: {', '.join(TRANSFORMS)}",
            param=where,
            code="unknown_transform",
        )
    return TRANSFORMS[name]


def _check(spec: TransformSpec, where: str) -> TransformSpec:
    transform = _find(spec, where)
    params = params_of(spec, where)
    columns = spec.columns
    if columns is None and transform.default is None:
        raise InvalidInput(
            f"{transform.name} needs columns: a list of names or one of {', '.join(SELECTORS)}",
            param=f"{where}.columns",
        )
    if isinstance(columns, str) and columns not in SELECTORS:
        raise InvalidInput(
            f"{transform.name}: columns is a list of names, or one of {', '.join(SELECTORS)}; "
            f"for one column write [{columns[:100]!r}]",
            param=f"{where}.columns",
        )
    if isinstance(columns, list) and len(columns) > MAX_NAMED_COLUMNS:
        raise InvalidInput(
            f"{transform.name}: at most {MAX_NAMED_COLUMNS} columns may be named", param=f"{where}.columns"
        )
    return TransformSpec(op=transform.name, columns=columns, **params.model_dump(mode="json", exclude_unset=True))
