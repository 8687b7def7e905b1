"""The model package: a manifest (JSON) beside weights and graphs, each named by its digest. Light: standard library and pydantic only.

The digest of a package is the SHA-256 of its manifest's canonical JSON; the manifest names every file by SHA-256. Nothing
in it depends on a clock, a job id or a random name, so the same recipe gives the same digest. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Signature


class PackageFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)

    @classmethod
    def of(cls, path: Path) -> PackageFile:
        with path.open("rb") as file:
            return cls(digest=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


class ParitySamples(BaseModel):
    """Raw inputs and what the training side answered for them; a replica must answer the same before it serves.

    `inputs`: rows as named raw features (JSON values, null = missing). `outputs`: by output name, one value a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    inputs: list[dict[str, Any]] = []
    outputs: dict[str, list[Any]] = {}
    tolerance: float = 1e-5


class Manifest(BaseModel):
    """Everything about a model version but its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    format: Literal[1] = 1
    task: str
    runtime: str = "onnx"
    algorithm: str = ""
    signature: Signature
    classes: list[Any] | None = None
    host_transforms: list[dict[str, Any]] = Field(
        [], description="fitted transforms that run before the graph, in order"
    )
    files: dict[str, PackageFile]
    lineage: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    licence: str | None = None
    description: str | None = None
    parity: ParitySamples = ParitySamples()

    def canonical(self) -> bytes:
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files and the manifest."""
        return sum(file.size for file in self.files.values()) + len(self.canonical())

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        try:
            return cls.model_validate_json(data)
        except ValueError as error:
            raise InvalidInput(f"this is not a model package's manifest: {error}", code="bad_package") from None


class Package:
    """A manifest and a way to find its files: `locate(digest) -> path`."""

    def __init__(self, manifest: Manifest, locate: Callable[[str], Path]) -> None:
        self.manifest = manifest
        self._locate = locate

    def path(self, name: str) -> Path:
        """The file `name` on this machine, whose bytes are those the manifest names."""
        try:
            file = self.manifest.files[name]
        except KeyError:
            raise InvalidInput(f"the package has no file {name!r}", code="bad_package") from None
        return self._locate(file.digest)
