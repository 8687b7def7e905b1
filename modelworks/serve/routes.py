"""What the router follows: an immutable picture of which replicas serve which deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from modelworks.core.types import Signature
from modelworks.serve.features import Field, class_name, fields

Key = tuple[str, str]  # project id, deployment name


@dataclass(frozen=True)
class Target:
    """A replica that may be called, and its Unix socket."""

    replica_id: str
    endpoint: str


@dataclass(frozen=True)
class Limits:
    """`queue`: calls that may wait in a gateway; `in_flight`: calls a gateway sends to one replica before it queues."""

    queue: int = 1024
    in_flight: int = 256


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

    @property
    def key(self) -> Key:
        return self.project_id, self.name

    # what features.py needs, made once a route

    @cached_property
    def fields(self) -> list[Field]:
        return fields(self.signature.inputs)

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
