"""What the router follows: an immutable picture of which replicas serve which deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from struct import Struct
from typing import Any

from modelworks.core.types import Signature, TensorSpec
from modelworks.serve.checks import Shape
from modelworks.serve.columns import Kind
from modelworks.serve.features import Field, class_name, fields, numbers

Key = tuple[str, str]  # project id, deployment name


@dataclass(frozen=True)
class Target:
    """A replica that may be called, and its Unix socket."""

    replica_id: str
    endpoint: str


@dataclass(frozen=True)
class Limits:
    """What one gateway keeps to for one deployment.

    `queue`: calls that may wait; `in_flight`: calls sent to one replica before they wait; `concurrency`: calls aboard of
    all replicas together; `wait_seconds`: how long a replica waits for company; `hedge_seconds`: when an idempotent call
    without an answer is sent to a second replica.
    """

    queue: int = 1024
    in_flight: int = 256
    concurrency: int | None = None
    wait_seconds: float = 0.0
    hedge_seconds: float | None = None


@dataclass(frozen=True)
class Detour:
    """A rule by which calls go to the deployment `to` of the same project: those with more than `longer_than` bytes of
    input, or those that failed by one of `on`."""

    to: str
    on: frozenset[str] = frozenset()
    longer_than: int | None = None


@dataclass(frozen=True)
class Route:
    """A deployment as gateways see it: the model version that answers, how to speak to it, and where."""

    project_id: str
    name: str
    model_version: str  # iris:3
    signature: Signature
    task: str
    classes: list[Any] | None = None
    replicas: tuple[Target, ...] = ()
    limits: Limits = field(default_factory=Limits)
    detours: tuple[Detour, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> the LoRA adapter's version
    cache: tuple[float, int] | None = None  # whole answers are kept: seconds, bytes
    images: bool = False  # messages may hold images
    platform: str = "onnxruntime_onnx"  # engine and format, as the Open Inference Protocol names them
    failed: str = ""  # why there is no replica and none is to be expected: calls are refused at once

    @property
    def key(self) -> Key:
        return self.project_id, self.name

    # what features.py needs, made once a route

    @cached_property
    def fields(self) -> list[Field]:
        return fields(self.signature.inputs, self.task)

    @cached_property
    def numbers(self) -> Struct | None:
        """What packs a row, if all of the signature's inputs are plain numbers."""
        return numbers(self.fields)

    @cached_property
    def scores(self) -> Struct | None:
        """What unpacks one row of a classifier's probabilities."""
        return Struct(f"<{len(self.classes)}f") if self.classes else None

    @cached_property
    def floats(self) -> bool:
        """Whether all inputs are plain floats."""
        return all(spec.datatype in ("FP32", "FP64") for spec in self.signature.inputs)

    @cached_property
    def numeric(self) -> bool:
        """Whether all inputs are numbers or booleans that JSON can hold."""
        return all(spec.datatype not in ("BYTES", "FP16", "BF16") for spec in self.signature.inputs)

    @cached_property
    def row_fixed(self) -> bool:
        """Whether each row of a table has the same bytes: numbers and booleans, one a feature."""
        return bool(self.fields) and all(field.plain and field.code for field in self.fields)

    @cached_property
    def row_kind(self) -> Kind:
        """The kind of calls as `encode_rows` makes them of a table's rows."""
        return tuple((spec.name, spec.datatype, tuple(spec.shape[1:])) for spec in self.signature.inputs)

    @cached_property
    def memo(self) -> dict[str, Any]:
        """What dialects derive from this route, each under its own name."""
        return {}

    @cached_property
    def shapes(self) -> dict[Kind, Shape]:
        """Kinds of calls that were checked against the signature; see `check_inputs`."""
        return {}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The inputs by name."""
        return {spec.name: spec for spec in self.signature.inputs}

    @cached_property
    def class_names(self) -> list[str]:
        return [class_name(value) for value in self.classes or []]

    @cached_property
    def labels(self) -> dict[str, Any]:
        """What a model's label output may hold -> the class."""
        return {text: value for value in self.classes or [] for text in (str(value), class_name(value))}


@dataclass(frozen=True)
class Snapshot:
    """All routes at one moment. `number` grows: an older snapshot never replaces a newer one."""

    number: int
    routes: Mapping[Key, Route]
