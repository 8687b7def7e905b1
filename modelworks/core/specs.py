"""What users declare: the bodies of requests and the parts of a recipe, checked in one place before anything runs."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from modelworks.core.errors import InvalidInput
from modelworks.core.types import ColumnType, Role

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
ALIAS_PATTERN = r"^[A-Za-z][A-Za-z0-9._-]{0,99}$"
Name = Annotated[
    str,
    StringConstraints(pattern=NAME_PATTERN),
    Field(description="1 to 100 letters, digits, `.`, `_` or `-`, starting with a letter or digit", examples=["iris"]),
]
_REF = re.compile(
    r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,99})(?::(?P<version>[1-9][0-9]{0,8})|@(?P<alias>[A-Za-z][A-Za-z0-9._-]{0,99}))?$"
)


class Spec(BaseModel):
    """Unknown fields are refused, so that a typing error is not silently ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Ref(Spec):
    """`iris`, `iris:3` or `iris@champion`."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str, what: str = "model") -> Ref:
        match = _REF.fullmatch(text)
        if not match:
            raise InvalidInput(
                f"{text[:120]!r} does not name a {what}; write name, name:version or name@alias",
                param=what,
                code="bad_reference",
            )
        version = match["version"]
        return cls(name=match["name"], version=int(version) if version else None, alias=match["alias"])

    def __str__(self) -> str:
        return self.name + (f":{self.version}" if self.version else f"@{self.alias}" if self.alias else "")


RefText = Annotated[str, StringConstraints(max_length=220), Field(examples=["iris:1", "iris@champion"])]


class TableSchema(Spec):
    """Corrections to what ingest would infer."""

    columns: dict[str, ColumnType] = Field({}, description="type by column name; columns not named are inferred")
    header: list[str] | bool | None = Field(
        None,
        description="for a text file without a header row: the names of its columns, or false to call them column_1, "
        "column_2...; true: the first row is the header, whatever it looks like; otherwise told from the file",
    )
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="for CSV; otherwise told from the file")
    encoding: str | None = Field(None, description="for text files; UTF-8 when not given", examples=["latin-1"])
    missing: list[str] | None = Field(
        None, description="texts that mean a missing value; by default '', NA, N/A, NaN, nan, null, NULL, None, ?"
    )
    on_corrupt: Literal["refuse", "skip"] = Field(
        "refuse", description="what to do with an image or a sound that cannot be decoded; skipped ones are counted"
    )


class DatasetEdit(Spec):
    """One change to a dataset's rows. `rows` (numbers from 1, as in the version that is edited) and `where` choose them;
    without both, all.

    set: `column` to `value` (null: missing); with a `type`, a column that is not there is added.  drop: the rows.
    rename: `column` to `name`.  split: the column `split` (or `column`) by `shares`, drawn with `seed`.
    Series, along `time` (of each `group` by itself): lag and difference of `column` by `lags`; window: `how` over the
    `size` steps before; resample to one row `every` step; unpivot: `columns` of a wide table as `series` and `value`.
    """

    op: Literal["set", "drop", "rename", "split", "lag", "difference", "window", "resample", "unpivot"]
    column: str | None = Field(None, min_length=1, max_length=1000)
    value: str | int | float | bool | None = None
    type: ColumnType | None = Field(None, description="of a new column, which set then adds")
    rows: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1, max_length=100_000)
    where: dict[str, Any] | None = Field(
        None, min_length=1, max_length=20, description="column -> its value, or a list of values; null is missing"
    )
    name: str | None = Field(None, min_length=1, max_length=1000, description="of rename")
    shares: dict[str, float] | None = Field(
        None, min_length=1, max_length=20, examples=[{"train": 0.8, "test": 0.2}], description="of split; they sum to 1"
    )
    stratify: str | None = Field(None, max_length=1000, description="of split: keep this column's shares in each part")
    seed: int = Field(0, ge=0, lt=2**32)
    time: str | None = Field(None, max_length=1000, description="the column that a series runs along")
    group: str | None = Field(None, max_length=1000, description="the column that tells series apart")
    lags: list[Annotated[int, Field(ge=1, le=10_000)]] | None = Field(None, min_length=1, max_length=500, examples=[[1, 12]])
    size: int | None = Field(None, ge=1, le=10_000, description="of window: how many steps")
    every: str | None = Field(None, max_length=40, examples=["1 day"], description="of resample")
    how: Literal["mean", "sum", "min", "max", "std", "last"] = "mean"
    fill: Literal["previous", "missing"] = Field("previous", description="of resample: steps without a row")
    keep: bool = Field(False, description="keep the rows whose past is too short, with missing values")
    columns: list[str] | None = Field(None, min_length=1, max_length=10_000, description="of unpivot")

    @model_validator(mode="after")
    def _complete(self) -> DatasetEdit:
        along = ["column", "time"]
        needs = {
            "set": ["column"], "drop": [], "rename": ["column", "name"], "split": ["shares"], "lag": along,
            "difference": along, "window": [*along, "size"], "resample": ["time", "every"], "unpivot": ["columns"],
        }[self.op]  # fmt: skip
        for field in needs:
            if getattr(self, field) is None:
                raise ValueError(f"{self.op} needs {field}")
        if self.op == "set" and "value" not in self.model_fields_set:
            raise ValueError("set needs value; null makes it missing")
        if self.op == "drop" and self.rows is None and self.where is None:
            raise ValueError("drop needs rows or where")
        taken = {
            "set": ("column", "value", "type", "rows", "where"), "drop": ("rows", "where"), "rename": ("column", "name"),
        }.get(self.op)  # fmt: skip
        for field in self.model_fields_set - {"op", *(taken or self.model_fields_set)}:
            if getattr(self, field) is not None:
                raise ValueError(f"{self.op} takes no {field}")
        if self.type in ("image", "audio", "sequence"):
            raise ValueError("a column of files or sequences cannot be added by an edit")
        if self.shares is not None and (abs(sum(self.shares.values()) - 1) > 1e-6 or min(self.shares.values()) <= 0):
            raise ValueError("shares must be above 0 and sum to 1")
        return self


class DatasetEdits(Spec):
    """A new version of a dataset, made from one that is there."""

    version: int | None = Field(None, ge=1, description="the version to start from; by default the newest")
    edits: list[DatasetEdit] = Field(min_length=1, max_length=1000)


def _transform(value: Any) -> Any:
    return {"op": value} if isinstance(value, str) else value


class TransformSpec(BaseModel):
    """One step of cleaning or transformation: its `op`, the columns it applies to, and its own parameters beside them.

    `columns` is a list of names, or one of "all", "number", "integer", "numeric", "category", "boolean", "text", "time", "image", "audio"
    for all features of that type as they are at that step. Each op's parameters are listed by `GET /api/v1/transforms`.
    """

    model_config = ConfigDict(extra="allow")
    op: str
    columns: list[str] | str | None = None

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


Transforms = list[Annotated[TransformSpec, BeforeValidator(_transform)]]


class Method(Spec):
    """How to evaluate: exactly one of `holdout`, `kfold`, `test`, `split`, `last`."""

    holdout: float | None = Field(None, gt=0, lt=1, description="the share of rows held out")
    kfold: int | None = Field(None, ge=2, le=100, description="number of folds")
    repeats: int = Field(1, ge=1, le=100, description="with kfold: how many times, each shuffled differently")
    test: RefText | None = Field(None, description="another dataset whose rows are the test set")
    split: str | None = Field(
        None, description="a column that says `train` or `test` of each row; rows of any other value are left out"
    )
    last: int | None = Field(
        None, ge=1, le=1000, description="of a recommender: each user's last so many rows, by `time` if there is one"
    )
    stratify: bool | None = Field(
        None, description="keep class shares in each part; by default wherever it is possible"
    )
    group: str | None = Field(None, description="rows that share this column's value stay together")
    time: str | None = Field(None, description="split along this column: train on the past, test on what follows")
    shuffle: bool = True
    parallel: int | None = Field(
        None, ge=1, le=64,
        description="with kfold: how many folds at a time, as jobs of their own, as slots and cores allow; the results are "
        "the same. By default as many as there are free slots when a fold takes long",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one(self) -> Method:
        chosen = [name for name in ("holdout", "kfold", "test", "split", "last") if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ValueError("give exactly one of holdout, kfold, test, split and last")
        if self.group and self.time:
            raise ValueError("give group or time, not both")
        if self.split and (self.group or self.time or self.stratify):
            raise ValueError("with split the column decides; leave group, time and stratify out")
        if self.repeats > 1 and (self.kfold is None or self.time):
            raise ValueError("repeats goes with kfold, without time")
        return self


class Gate(Spec):
    """A condition on a metric's mean; registration is blocked when it fails."""

    metric: str = Field(examples=["accuracy"])
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least or at_most")
        return self


class Resources(Spec):
    threads: int = Field(1, ge=1, le=256, description="compute threads of one process")
    memory_mb: int | None = Field(
        None, ge=256, le=2**24, description="limit of the process's memory in MiB, at least 256"
    )


class JobResources(Resources):
    """As `Resources`: what learns takes more to begin with than what serves."""

    memory_mb: int | None = Field(
        None, ge=512, le=2**24, description="limit of the process's memory in MiB, at least 512"
    )
    processes: int = Field(
        1, ge=1, le=64, description="of nets: processes that share each batch, one a GPU where there are any, else one a core"
    )


class Stopping(Spec):
    """When a net stops training before its `epochs` are over. The weights that were best on the rows held out are kept."""

    patience: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="stop after so many epochs without improvement on rows held out of the training",
    )
    metric: str = Field(
        "loss", max_length=100, description="what must improve: `loss`, or one of the task's `GET /api/v1/metrics`"
    )
    min_delta: float = Field(0.0, ge=0, description="what counts as an improvement at least")
    holdout: float = Field(0.1, gt=0, lt=1, description="with patience: the share of the training rows held out for it")
    max_epochs: int | None = Field(None, ge=1, le=100_000, description="epochs at most; in place of the hyperparameter")
    max_seconds: float | None = Field(None, gt=0, le=30 * 86400, description="seconds of one fit's training at most")


class Range(Spec):
    """Numbers from `low` to `high`; of an integer hyperparameter, integers. `log`: spread evenly over magnitudes."""

    low: float
    high: float
    log: bool = False
    step: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0, and no step")
        return self


class Choices(Spec):
    """One of the values given, which have no order."""

    choices: list[Any] = Field(min_length=1, max_length=1000)


class SearchSpec(Spec):
    """A search for hyperparameters: trials chosen by what the earlier ones gave (TPE), each a job of its own.

    The rows that choose are not those that the report is about: with `validation` holdout or test, trials are scored by
    folds within the training rows. With kfold the report says that its figures are those that chose, unless `nested`.
    """

    trials: int = Field(20, ge=1, le=1000, description="hyperparameters tried at most; the first are those given")
    metric: str | None = Field(
        None, description="what to improve, of `GET /api/v1/metrics`; by default the task's first"
    )
    space: dict[str, Range | Choices] | None = Field(
        None,
        description="what to try for each hyperparameter; by default what the algorithm suggests. For algorithm auto only "
        "`algorithm`, with the choices among which to choose",
        examples=[{"C": {"low": 0.001, "high": 100, "log": True}, "penalty": {"choices": ["l1", "l2"]}}],
    )
    parallel: int = Field(
        2, ge=1, le=64,
        description="trials at a time, as slots and cores allow. What is tried depends on this and the seed, not on timing",
    )  # fmt: skip
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = Field(
        "median", description="gives a trial up that falls behind after a fold or, where the trainer tells, an epoch"
    )
    timeout_s: float | None = Field(
        None, gt=0, le=30 * 86400, description="no trial begins after so many seconds, and those that run are stopped"
    )
    validation: Method | None = Field(
        None, description="how a trial is scored within the rows that may choose: kfold (by default 3) or holdout"
    )
    nested: bool = Field(
        False, description="with validation kfold: a search of its own for each fold, so that the report is honest"
    )

    @model_validator(mode="after")
    def _inner(self) -> SearchSpec:
        if self.validation and self.validation.test:
            raise ValueError("validation of a search is kfold or holdout: it divides the training rows")
        return self


class SliceSpec(Spec):
    """The rows whose `column` has the value `equals`."""

    column: str = Field(min_length=1, max_length=1000)
    equals: str | bool | float


class TrainingSpec(Spec):
    """A training job: data, target, algorithm, preparation, evaluation, and when to refuse the result."""

    model: Name
    dataset: RefText
    target: Annotated[str, BeforeValidator(lambda value: "" if value is None else value)] = Field(
        "", max_length=1000, description="the column to predict; some algorithms need none, and say so"
    )
    algorithm: str = Field(
        description="one of `GET /api/v1/algorithms`, or `auto`: the best of those that fit",
        examples=["logistic-regression"],
    )
    task: Literal[
        "tabular-classification", "tabular-regression", "image-classification", "image-regression", "text-classification",
        "text-regression", "audio-classification", "audio-regression", "multimodal-classification", "multimodal-regression",
        "forecast", "anomaly-detection", "recommendation", "token-classification", "text-generation",
    ] | None = Field(None, description="by default told from the algorithm, the target's type and the features")  # fmt: skip
    time: str | None = Field(
        None, max_length=1000,
        description="of a forecast: the column that the series runs along; of a recommender: when each row happened",
    )  # fmt: skip
    series: str | None = Field(None, max_length=1000, description="of a forecast of many series: the column that tells them apart")
    user: str | None = Field(None, max_length=1000, description="of a recommender: the column that says who")
    item: str | None = Field(None, max_length=1000, description="of a recommender: the column that says what")
    hyperparameters: dict[str, Any] = Field({}, description="of the algorithm; those not given have its defaults")
    features: list[str] | None = Field(
        None, description="the columns to learn from; by default all but target, group and time"
    )
    transforms: Transforms | None = Field(
        None, description="run in this order; by default: fill missing, standardise numbers, one-hot categories"
    )
    validation: Method | None = Field(None, description="how the model is evaluated; by default a hold-out of 0.2")
    stopping: Stopping | None = Field(None, description="when a net stops training before its epochs are over")
    metrics: list[str] | None = Field(None, description="ids of `GET /api/v1/metrics`; by default all of the task")
    slices: list[Annotated[str, StringConstraints(min_length=1, max_length=500)] | SliceSpec] = Field(
        [], max_length=100, description="parts of the tested rows to measure apart, by conditions such as `age > 60`"
    )
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["f1", "youden"] | None = Field(
        None,
        description="of two classes: the probability of the second from which on the label says it, in the package as well; "
        "f1 and youden: the best by that on held-out rows. By default the more probable class",
    )
    gates: list[Gate] = Field([], description="conditions on metrics; a failed one blocks registration")
    licence: str | None = Field(None, max_length=200, description="licence of the resulting model, kept in its package")
    description: str | None = Field(None, max_length=4000)
    alias: Annotated[str, StringConstraints(pattern=ALIAS_PATTERN)] | None = Field(
        None, description="an alias to move to the new version when it is registered"
    )
    search: SearchSpec | None = Field(None, description="search for the best hyperparameters before the final training")
    resources: JobResources = JobResources()
    seed: int = Field(0, ge=0, lt=2**32)
    advise: bool = Field(
        False,
        description="only measure what it would take, on some of the rows: the job ends with `result.advice` (seconds, "
        "memory_mb, free_mb, will_fit, warnings) and registers nothing",
    )


ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Scores = dict[Annotated[str, StringConstraints(max_length=1000)], ColumnName] | ColumnName


class OtherPredictions(Spec):
    """Predictions for the same rows, to compare with: other columns beside the first, or columns of another dataset."""

    name: str = Field("other", min_length=1, max_length=200, description="whose they are, for the report")
    prediction: ColumnName | None = None
    scores: Scores | None = None
    dataset: RefText | None = Field(
        None, description="where they are; rows are matched by `key`, without it by their order"
    )
    key: ColumnName | None = Field(None, description="the column that names a row, in both datasets")


class GivenPredictions(Spec):
    """Predictions that are there already, of any model, with the truth beside them: in a dataset's columns, or in `rows`."""

    task: str = Field(
        max_length=100, examples=["classification"],
        description="classification, regression, forecast, speech-to-text, translation, summarization, text-generation, "
        "object-detection or clustering",
    )  # fmt: skip
    rows: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="the rows themselves, a few thousand at most; more come as a dataset"
    )
    reference: ColumnName | list[ColumnName] | None = Field(
        None, examples=["label"],
        description="the column of the truth; several where a text has more than one reference. By default `reference`",
    )  # fmt: skip
    prediction: ColumnName | None = Field(
        None, description="the column of labels, values, texts, boxes or clusters. By default `prediction`"
    )
    scores: Scores | None = Field(
        None, examples=[{"cat": "p_cat", "dog": "p_dog"}, "p_*"],
        description="of classification, the columns of probabilities: by class, or a name in which * stands for the class. "
        "One of two classes is enough. Without `prediction` the label is the most probable class",
    )  # fmt: skip
    features: list[ColumnName] | None = Field(
        None, min_length=1, max_length=10_000, description="of clustering, the columns that were clustered, for silhouette"
    )
    time: ColumnName | None = Field(None, description="of a forecast, the column to sort by; by default the rows' order")
    series: ColumnName | None = Field(None, description="of a forecast, the column that tells series apart")
    season: int = Field(1, ge=1, le=10_000, description="of a forecast, the steps of a season, for mase")
    low: ColumnName | None = Field(None, description="of a forecast, the column of its interval's lower end")
    high: ColumnName | None = Field(None, description="of a forecast, the column of its interval's upper end")
    boxes: Literal["xyxy", "xywh"] = Field("xyxy", description="two corners, or a corner with width and height (COCO)")
    normalise: bool = Field(False, description="of texts: compare without case and punctuation")
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = Field("13a", description="of texts, sacrebleu's, for bleu")
    compare: OtherPredictions | None = None


class EvaluationSpec(Spec):
    """Of a model by a `method`, or of given `predictions`, of which `model` is then only the name they go by."""

    model: RefText | None = Field(None, description="required, but with `predictions`")
    dataset: RefText | None = Field(
        None, description="by default the dataset the model was trained on; of predictions, the one that holds them"
    )
    method: Method | None = Field(None, description="required, but with `predictions`")
    predictions: GivenPredictions | None = Field(None, description="score these instead of a model's own")
    text: ColumnName | None = Field(
        None, description="of a language model, the column of texts to measure perplexity on; by default the only one"
    )
    metrics: list[str] | None = None
    compare: RefText | None = Field(None, description="another model version, evaluated on the same rows")
    slices: list[Annotated[str, StringConstraints(min_length=1, max_length=500)] | SliceSpec] = Field(
        [], max_length=100, description="parts of the rows to measure apart, by conditions on the dataset's columns",
        examples=[["age > 60", 'age > 60 and sex == "F"', {"column": "sex", "equals": "F"}]],
    )  # fmt: skip
    gates: list[Gate] = []
    resources: JobResources = JobResources()
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one(self) -> EvaluationSpec:
        given = self.predictions
        if given is None:
            if self.model is None or self.method is None:
                raise ValueError(f"give {'a model' if self.model is None else 'a method'}, or predictions")
            return self
        if self.method or self.compare or self.text:
            name = "method" if self.method else "compare" if self.compare else "text"
            raise ValueError(f"with predictions leave {name} out" + ("; other ones go in predictions.compare" if self.compare else ""))
        if (self.dataset is None) == (given.rows is None):
            raise ValueError("give the predictions in a dataset or in predictions.rows, one of them")
        return self

    @property
    def how(self) -> Method:
        """The method of a model's evaluation."""
        assert self.method is not None
        return self.method


class KeySpec(Spec):
    name: Name
    role: Role = "developer"
    scopes: list[str] | None = None
    models: list[Name] | None = Field(None, description="the deployments it may call; by default all of the project")
    expires_in: float | None = Field(None, gt=0, le=10 * 365 * 86400, description="seconds from now")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1, description="of language and embedding models, read and generated")
    user: str | None = Field(None, description="id of the user it acts for; its role then never exceeds the user's")


class ProjectSpec(Spec):
    name: Name


class UserSpec(Spec):
    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]


class MembershipSpec(Spec):
    role: Role


class AliasSpec(Spec):
    version: int = Field(ge=1)
