"""Writing what a job made: content that is there already is found again, anything else is the next version.

All but `store` run inside the transaction that ends the job, so no half-written version is ever visible.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from modelworks.core.errors import ModelworksError
from modelworks.core.types import Alias, Artifact, AuditRecord, Dataset, Job, ModelVersion, Report
from modelworks.ml.package import Manifest
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Tx

MANIFEST = "manifest"
PREDICTIONS = "predictions"


def store(blobs: Blobs, manifest: Manifest, files: dict[str, bytes] | dict[str, Path]) -> str:
    """Keep the package's files and its manifest as blobs; returns the manifest's digest. They must be what it names."""
    for name, content in files.items():
        digest = blobs.put_file(content) if isinstance(content, Path) else blobs.put_bytes(content)
        if manifest.files[name].digest != digest:
            raise ModelworksError(f"the package's file {name!r} is not what its manifest names", code="bad_package")
    return blobs.put_bytes(manifest.canonical())


def dataset(tx: Tx, job: Job, made: Dataset) -> Dataset:
    """`made` as the next version of its name, or the version of that name with the same content and columns."""
    for known in tx.list(Dataset, project_id=made.project_id, name=made.name, digest=made.digest):
        if known.columns == made.columns:
            return known
    kept = tx.add(made.model_copy(update={"version": _next_version(tx, Dataset, made.project_id, made.name)}))
    _audit(tx, job, "datasets.create", kept.ref)
    return kept


def model(
    tx: Tx, job: Job, name: str, manifest: Manifest, digest: str, *, report_id: str | None = None
) -> ModelVersion:
    """The next version of the model `name`, or the version that is the same package."""
    known = tx.find(ModelVersion, project_id=job.project_id, name=name, digest=digest)
    if known:
        return known
    kept = tx.add(
        ModelVersion(
            project_id=job.project_id,
            name=name,
            version=_next_version(tx, ModelVersion, job.project_id, name),
            digest=digest,
            task=manifest.task,
            signature=manifest.signature,
            classes=manifest.classes,
            algorithm=manifest.algorithm,
            size=manifest.size,
            metrics=manifest.metrics,
            lineage=manifest.lineage,
            licence=manifest.licence,
            report_id=report_id,
            job_id=job.id,
            created_by=job.created_by,
        )
    )
    sizes = {file.digest: (kind, file.size) for kind, file in manifest.files.items()}
    for blob, (kind, size) in {**sizes, digest: (MANIFEST, len(manifest.canonical()))}.items():
        tx.add(Artifact(project_id=job.project_id, digest=blob, kind=kind, size=size, owner_id=kept.id))
    _audit(tx, job, "models.create_version", kept.ref)
    return kept


def keep_predictions(blobs: Blobs, found: dict[str, Any]) -> dict[str, Any]:
    """`found` with its predictions as a blob, for `report` to refer to."""
    data = found.get("predictions")
    rest = {name: value for name, value in found.items() if name != "predictions"}
    return rest | {"kept": (blobs.put_bytes(data), len(data))} if data else rest


def report(
    tx: Tx,
    job: Job,
    found: dict[str, Any],
    *,
    model: str,
    dataset: Dataset | None,
    seed: int,
    model_version: str | None = None,
    details: dict[str, Any] | None = None,
) -> Report:
    """`found` has metrics, details and method, and where its predictions are; without a dataset, the `digest` of its rows."""
    made = tx.add(
        Report(
            project_id=job.project_id,
            job_id=job.id,
            model=model,
            model_version=model_version,
            dataset=dataset.ref if dataset else "rows of the request",
            dataset_digest=dataset.digest if dataset else found["digest"],
            method=found["method"],
            metrics=found["metrics"],
            details={**found["details"], **(details or {})},
            seed=seed,
        )
    )
    if found.get("kept"):
        digest, size = found["kept"]
        tx.add(Artifact(project_id=job.project_id, digest=digest, kind=PREDICTIONS, size=size, owner_id=made.id))
    return made


def alias(tx: Tx, job: Job, version: ModelVersion, name: str) -> None:
    known = tx.find(Alias, project_id=job.project_id, model=version.name, alias=name)
    if known and known.version == version.version:
        return
    if known:
        tx.update(known, version=version.version)
    else:
        tx.add(Alias(project_id=job.project_id, model=version.name, alias=name, version=version.version))
    _audit(tx, job, "models.set_alias", f"{version.name}@{name}", version=version.version)


def _next_version(tx: Tx, noun: type[Dataset] | type[ModelVersion], project_id: str, name: str) -> int:
    table = tx.table(noun)
    newest = sa.select(sa.func.max(table.c.version)).where(table.c.project_id == project_id, table.c.name == name)
    return max(int(tx.execute(newest).scalar() or 0), _deleted(tx, noun, project_id, name)) + 1


def _deleted(tx: Tx, noun: type[Dataset] | type[ModelVersion], project_id: str, name: str) -> int:
    """The highest version that was deleted: a number is never given twice, as reports and lineages name it."""
    audit = tx.table(AuditRecord)
    rows = tx.execute(
        sa.select(audit.c.object).where(
            audit.c.project_id == project_id,
            audit.c.action == ("datasets.delete" if noun is Dataset else "models.delete"),
            audit.c.object.startswith(f"{name}:", autoescape=True),
        )
    )
    return max((int(ref.rpartition(":")[2]) for (ref,) in rows), default=0)


def _audit(tx: Tx, job: Job, action: str, object: str, **detail: Any) -> None:
    """By the key that asked for the job."""
    row = AuditRecord(project_id=job.project_id, principal=job.created_by, action=action, object=object)
    tx.add(row.model_copy(update={"detail": {"job": job.id, **detail}}))
