"""The tables: one a noun, its columns taken from the noun's fields (plain ones as columns, structured ones as JSON)."""

from __future__ import annotations

import types
import typing
from typing import Any

import sqlalchemy as sa

from modelworks.core.types import (
    Alias,
    Artifact,
    AuditRecord,
    Checkpoint,
    Dataset,
    Deployment,
    DeploymentRevision,
    IdempotencyRecord,
    Job,
    JobEvent,
    Key,
    Membership,
    ModelVersion,
    Noun,
    Project,
    Replica,
    Report,
    StoredResponse,
    User,
)

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_PLAIN: dict[Any, Any] = {str: sa.String, int: sa.BigInteger, float: sa.Float, bool: sa.Boolean}


def _column(name: str, annotation: Any) -> sa.Column[Any]:
    arms = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arms = list(typing.get_args(annotation))
    nullable = type(None) in arms
    arms = [str if typing.get_origin(arm) is typing.Literal else arm for arm in arms if arm is not type(None)]
    plain = _PLAIN.get(arms[0]) if len(arms) == 1 else None
    kind = plain() if plain else sa.JSON(none_as_null=True)
    return sa.Column(name, kind, primary_key=name == "id", nullable=nullable)


def _table(noun: type[Noun], name: str, *extra: sa.Constraint | sa.Index) -> sa.Table:
    columns = [_column(field, info.annotation) for field, info in noun.model_fields.items()]
    return sa.Table(name, metadata, *columns, *extra)


TABLES: dict[type[Noun], sa.Table] = {
    Project: _table(Project, "projects", sa.UniqueConstraint("name")),
    User: _table(User, "users", sa.UniqueConstraint("name")),
    Membership: _table(Membership, "memberships", sa.UniqueConstraint("user_id", "project_id")),
    Key: _table(Key, "keys", sa.UniqueConstraint("digest")),
    Dataset: _table(Dataset, "datasets", sa.UniqueConstraint("project_id", "name", "version")),
    Job: _table(
        Job,
        "jobs",
        sa.Index("ix_jobs_queue", "status", "available_at"),
        sa.Index("ix_jobs_project", "project_id"),
        sa.Index("ix_jobs_parent", "parent_id"),
    ),
    JobEvent: _table(JobEvent, "job_events", sa.UniqueConstraint("job_id", "seq")),
    Checkpoint: _table(Checkpoint, "checkpoints", sa.UniqueConstraint("job_id", "name")),
    Artifact: _table(Artifact, "artifacts", sa.Index("ix_artifacts_digest", "digest")),
    Report: _table(Report, "reports", sa.Index("ix_reports_project", "project_id", "model")),
    ModelVersion: _table(ModelVersion, "model_versions", sa.UniqueConstraint("project_id", "name", "version")),
    Alias: _table(Alias, "aliases", sa.UniqueConstraint("project_id", "model", "alias")),
    Deployment: _table(Deployment, "deployments", sa.UniqueConstraint("project_id", "name")),
    DeploymentRevision: _table(
        DeploymentRevision, "deployment_revisions", sa.UniqueConstraint("deployment_id", "number")
    ),
    Replica: _table(Replica, "replicas", sa.Index("ix_replicas_deployment", "deployment_id")),
    StoredResponse: _table(StoredResponse, "responses", sa.Index("ix_responses_project", "project_id", "created_at")),
    AuditRecord: _table(AuditRecord, "audit", sa.Index("ix_audit_project", "project_id")),
    IdempotencyRecord: _table(IdempotencyRecord, "idempotency", sa.UniqueConstraint("project_id", "scope", "key")),
}

# A counter for each topic, raised by every change to its nouns, so that gateways notice without reading the rows.
changes = sa.Table(
    "changes",
    metadata,
    sa.Column("topic", sa.String, primary_key=True),
    sa.Column("counter", sa.BigInteger, nullable=False),
)

TOPICS: dict[type[Noun], str] = {
    Deployment: "routing",
    Replica: "routing",
    Key: "access",
    User: "access",
    Membership: "access",
    Project: "access",
}
