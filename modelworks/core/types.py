"""The nouns: frozen structs for what is kept in the catalog and answered by the API, with the legal moves of their states.

Times are seconds since the epoch (UTC), as the catalog's clock tells them. Every kept noun has an `id` made by the
server (sortable by age), a `revision` that grows by one at each change, and the `project_id` it belongs to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, Literal, TypeVar, overload

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from modelworks.core.errors import Conflict
from modelworks.core.tensors import Tensor

ColumnType = Literal["number", "integer", "category", "boolean", "text", "time", "image", "audio", "sequence"]
Role = Literal["admin", "developer", "viewer", "invoke-only"]
JobStatus = Literal[
    "queued", "validating", "running", "paused", "succeeded", "failed", "refused", "cancelling", "cancelled"
]
JobKind = Literal["ingest", "train", "evaluate", "import", "edit", "diff", "measure", "trial", "fold", "render"]
EventKind = Literal["status", "log", "progress", "metric", "fold", "trial", "resource", "warning", "error"]
Slot = Literal["taken", "later", "free", "wanted"]
DeploymentStatus = Literal["creating", "updating", "ready", "degraded", "rolling_back", "failed", "deleting"]
ReplicaStatus = Literal["starting", "ready", "draining", "failed", "stopped"]

# jobs that make or compare datasets: they have a lane beside the others
DATA_JOBS: frozenset[JobKind] = frozenset({"ingest", "edit", "diff"})

FINAL_JOB_STATES: frozenset[str] = frozenset({"succeeded", "failed", "refused", "cancelled"})

# noun -> state -> the states it may move to. `move` is the only way to change a status.
MOVES: dict[str, dict[str, frozenset[str]]] = {
    "job": {
        "queued": frozenset({"validating", "running", "paused", "cancelled", "failed"}),
        "validating": frozenset({"running", "queued", "failed", "cancelling", "cancelled"}),
        "running": frozenset({"queued", "paused", "succeeded", "failed", "refused", "cancelling", "cancelled"}),
        "paused": frozenset({"queued", "cancelled"}),
        "cancelling": frozenset({"cancelled", "succeeded", "failed", "refused"}),
        "succeeded": frozenset(),
        "failed": frozenset(),
        "refused": frozenset(),
        "cancelled": frozenset(),
    },
    "deployment": {
        "creating": frozenset({"ready", "failed", "updating", "deleting"}),
        "updating": frozenset({"ready", "degraded", "failed", "rolling_back", "deleting"}),
        "ready": frozenset({"updating", "degraded", "deleting", "failed", "rolling_back"}),
        "degraded": frozenset({"ready", "updating", "failed", "deleting", "rolling_back"}),
        "rolling_back": frozenset({"ready", "degraded", "failed", "deleting", "updating"}),
        "failed": frozenset({"updating", "ready", "degraded", "rolling_back", "deleting"}),
        "deleting": frozenset(),
    },
    "replica": {
        "starting": frozenset({"ready", "failed", "stopped", "draining"}),
        "ready": frozenset({"draining", "failed", "stopped"}),
        "draining": frozenset({"stopped", "failed"}),
        "failed": frozenset({"stopped"}),
        "stopped": frozenset(),
    },
}


def check_move(noun: str, current: str, target: str) -> None:
    """Raise Conflict unless `noun` may go from state `current` to `target` (staying put is always allowed)."""
    if target != current and target not in MOVES[noun][current]:
        raise Conflict(f"a {noun} that is {current} cannot become {target}", code="illegal_state")


def new_id(prefix: str) -> str:
    """A fresh id such as `job_0198c0f4e1b25f3a9c0d1e2f`: 48 bits of milliseconds, then 48 random bits."""
    return f"{prefix}_{int(time.time() * 1000):012x}{os.urandom(6).hex()}"


class Noun(BaseModel):
    """A kept thing. `PREFIX` starts its ids; `HIDDEN` fields never leave the server."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())
    PREFIX: ClassVar[str] = ""
    HIDDEN: ClassVar[frozenset[str]] = frozenset()

    id: str = ""
    revision: int = 0
    created_at: float = 0.0

    def public(self) -> dict[str, Any]:
        """The JSON form that the API answers: without the HIDDEN fields."""
        return self.model_dump(mode="json", exclude=set(self.HIDDEN))


N = TypeVar("N", bound=Noun)


class Project(Noun):
    PREFIX: ClassVar[str] = "proj"
    name: str


class User(Noun):
    PREFIX: ClassVar[str] = "user"
    name: str
    disabled: bool = False


class Membership(Noun):
    """`user_id` acts in `project_id` with `role`."""

    PREFIX: ClassVar[str] = "mem"
    user_id: str
    project_id: str
    role: Role


class Key(Noun):
    """An API key. The key itself is never kept, only `digest` = HMAC-SHA256(server secret, key)."""

    PREFIX: ClassVar[str] = "key"
    HIDDEN: ClassVar[frozenset[str]] = frozenset({"digest"})
    project_id: str
    name: str
    role: Role
    digest: str = ""
    hint: str = Field(description="the last four characters, to tell keys apart")
    user_id: str | None = None
    scopes: list[str] | None = Field(None, description="narrows the role; null: all that the role may do")
    models: list[str] | None = Field(None, description="the deployments it may call; null: all of the project")
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    expires_at: float | None = None
    revoked_at: float | None = None


class Principal(msgspec.Struct, frozen=True):
    """Who is calling, as the gateway sees it after the key was checked. `project_id` is where the call acts."""

    key_id: str
    key_name: str
    project_id: str
    role: str
    scopes: frozenset[str]
    models: frozenset[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of language and embedding models
    expires_at: float | None = None


class Caller(msgspec.Struct, frozen=True):
    """A principal in one request: the first argument of every use case."""

    principal: Principal
    request_id: str = ""
    idempotency_key: str | None = None

    @property
    def project_id(self) -> str:
        return self.principal.project_id


class Page(msgspec.Struct, Generic[N]):
    """A part of a list: `items` in order, and whether more follow the last one. Iterable, sized and indexed as `items`."""

    items: list[N]
    has_more: bool

    def __iter__(self) -> Iterator[N]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> N: ...
    @overload
    def __getitem__(self, index: slice) -> list[N]: ...
    def __getitem__(self, index: int | slice) -> N | list[N]:
        return self.items[index]


class Column(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str
    type: ColumnType
    nullable: bool = Field(False, description="whether the data has missing values in it")


class Dataset(Noun):
    """One immutable version of a named table. `digest` names its content, `blob` the Parquet file that holds it."""

    PREFIX: ClassVar[str] = "ds"
    HIDDEN: ClassVar[frozenset[str]] = frozenset({"blob"})
    project_id: str
    name: str
    version: int
    digest: str
    blob: str = ""
    rows: int
    size: int = Field(description="bytes of the stored Parquet file")
    columns: list[Column]
    profile: dict[str, Any]
    warnings: list[str] = []
    source: str = ""
    created_by: str = ""

    @property
    def ref(self) -> str:
        return f"{self.name}:{self.version}"


class Job(Noun):
    """A unit of long work. `lease_*` and `token` belong to the worker that holds it; a write with an older token is void.

    `parent_id`: the job that this one is a part of (a trial of its search, a fold of its validation).
    `slot`: whether it takes one of its worker's slots while it runs. A job that waits for its parts lets it go (`free`)
    and takes it again (`wanted`, then `taken`); `later` takes one and is known to let it go.
    """

    PREFIX: ClassVar[str] = "job"
    HIDDEN: ClassVar[frozenset[str]] = frozenset(
        {"token", "lease_owner", "lease_expires_at", "available_at", "idle_deaths", "slot"}
    )
    project_id: str
    kind: JobKind
    spec: dict[str, Any]
    status: JobStatus = "queued"
    progress: float = 0.0
    stage: str = ""
    attempt: int = 0
    idle_deaths: int = 0
    token: int = 0
    lease_owner: str | None = None
    lease_expires_at: float | None = None
    available_at: float = 0.0
    metrics: dict[str, Any] = {}
    result: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    model_version: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    created_by: str = ""
    parent_id: str | None = None
    slot: Slot = "taken"


class JobEvent(Noun):
    """`seq` counts from 1 within a job. `kind`: status, log, progress, metric, fold, trial, resource, warning, error.

    A `metric` is a point of the job's curves: {"step", "unit", "part", "values": {name: number or null}, "seconds"}.
    """

    PREFIX: ClassVar[str] = "ev"
    job_id: str
    seq: int
    kind: str
    message: str = ""
    data: dict[str, Any] = {}


class Checkpoint(Noun):
    """A finished part of a job (a fold, an epoch), kept as a blob so that a retry starts after it."""

    PREFIX: ClassVar[str] = "ckpt"
    job_id: str
    name: str
    blob: str


class Artifact(Noun):
    """A blob that something kept refers to; blob collection marks from these rows."""

    PREFIX: ClassVar[str] = "art"
    project_id: str
    digest: str
    kind: str
    size: int
    owner_id: str


class Report(Noun):
    """The result of an evaluation. `metrics`: metric id -> {mean, std, low, high, folds}."""

    PREFIX: ClassVar[str] = "rep"
    project_id: str
    job_id: str
    model: str
    model_version: str | None = None
    dataset: str
    dataset_digest: str
    method: dict[str, Any]
    metrics: dict[str, Any]
    details: dict[str, Any] = Field(
        {}, description="confusion matrix, residual quantiles, comparison, gate, folds' sizes"
    )
    seed: int = 0


class TensorSpec(BaseModel):
    """One named input or output. `shape` has -1 where the size is free; `datatype` is the Open Inference Protocol's."""

    model_config = ConfigDict(frozen=True)
    name: str
    datatype: str
    shape: list[int]
    column: ColumnType | None = Field(None, description="for a table's column, its type")
    nullable: bool = Field(False, description="whether a missing value is accepted")
    optional: bool = Field(False, description="whether a call may leave this input out; rows of named features do")
    known: list[str] | list[int] | None = Field(None, description="the only values that it may have; null: any")


class Signature(BaseModel):
    model_config = ConfigDict(frozen=True)
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class ModelVersion(Noun):
    """Version `version` of the model `name`. `digest` is the digest of its package's manifest."""

    PREFIX: ClassVar[str] = "mv"
    project_id: str
    name: str
    version: int
    digest: str
    task: str
    signature: Signature
    classes: list[Any] | None = None
    algorithm: str = ""
    size: int = Field(description="bytes of the package")
    metrics: dict[str, Any] = {}
    lineage: dict[str, Any] = {}
    licence: str | None = None
    report_id: str | None = None
    job_id: str | None = None
    created_by: str = ""

    @property
    def ref(self) -> str:
        return f"{self.name}:{self.version}"


class Alias(Noun):
    PREFIX: ClassVar[str] = "alias"
    project_id: str
    model: str
    alias: str
    version: int


class Deployment(Noun):
    """What is desired (`spec` at revision `spec_revision`) and, in `status` and `message`, how near to it we are."""

    PREFIX: ClassVar[str] = "dep"
    project_id: str
    name: str
    spec: dict[str, Any]
    spec_revision: int = 1
    model_version: str = Field(description="the model version that the spec resolved to, as name:version")
    model_version_id: str
    digest: str
    task: str
    signature: Signature
    status: DeploymentStatus = "creating"
    message: str = ""
    ready_replicas: int = 0
    serving_revision: int | None = Field(
        None, description="the last revision that was ready; it serves until a newer is"
    )
    created_by: str = ""


class DeploymentRevision(Noun):
    """A past or present spec of a deployment, so that rolling back is writing an old one anew."""

    PREFIX: ClassVar[str] = "drev"
    project_id: str
    deployment_id: str
    number: int
    spec: dict[str, Any]
    model_version: str
    created_by: str = ""


class Replica(Noun):
    """A process that serves `model_version` for a deployment, as observed. `endpoint` is its Unix socket."""

    PREFIX: ClassVar[str] = "rpl"
    HIDDEN: ClassVar[frozenset[str]] = frozenset({"endpoint", "pid"})
    project_id: str
    deployment_id: str
    spec_revision: int
    model_version: str
    status: ReplicaStatus = "starting"
    endpoint: str = ""
    pid: int | None = None
    message: str = ""
    ready_at: float | None = None


class StoredResponse(Noun):
    """An answer of the Responses API that was kept: `body` as it was answered, `input` the items that it answers."""

    PREFIX: ClassVar[str] = "resp"
    project_id: str
    previous_id: str | None = None
    input: list[dict[str, Any]] = []
    body: dict[str, Any] = {}


class AuditRecord(Noun):
    """Who changed what. Written in the transaction of the change itself."""

    PREFIX: ClassVar[str] = "aud"
    project_id: str
    principal: str
    action: str
    object: str
    request_id: str = ""
    detail: dict[str, Any] = {}


class IdempotencyRecord(Noun):
    """The answer to a create, kept for 24 hours. `scope` is principal and route."""

    PREFIX: ClassVar[str] = "idem"
    project_id: str
    scope: str
    key: str
    body_digest: str
    answer_id: str


class Call(msgspec.Struct):
    """One inference on its way through the data plane. `deadline` is seconds on the gateway's monotonic clock.

    For the router: `key_id` shares the queue fairly with other keys; `priority` 0 high, 1 normal, 2 low; calls with the
    same `sticky` go to the same replica while it is usable and not much busier than others.
    """

    deployment: str
    inputs: list[Tensor]
    deadline: float
    request_id: str = ""
    params: dict[str, Any] = {}
    version: str | None = None
    stream: bool = False
    idempotent: bool = True
    key_id: str = ""
    priority: int = 1
    sticky: str = ""
    kind: Any = None  # of `inputs` (serve/columns.py), where the dialect knows it
    counted: bool = False  # its dialect counts the tokens that it uses


class Answer(msgspec.Struct):
    """What a replica returned for a call: output tensors and the model version that made them (`iris:1`)."""

    outputs: list[Tensor]
    model_version: str
