"""Versions of datasets and models: which to compare, which may be deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelworks.control.references import dataset_versions, find_model, model_versions, resolve_dataset
from modelworks.core.errors import Conflict, InvalidInput
from modelworks.core.specs import DatasetEdit
from modelworks.core.types import (
    FINAL_JOB_STATES,
    Alias,
    Artifact,
    Caller,
    Dataset,
    Deployment,
    DeploymentRevision,
    Job,
    ModelVersion,
    Replica,
)
from modelworks.security import audit
from modelworks.store.catalog import Tx

_SHOWN = 5
_PLURALS = {"alias": "aliases"}


def find_version(tx: Tx, project_id: str, name: str, version: int | None) -> Dataset:
    return resolve_dataset(tx, project_id, f"{name}:{version}" if version else name)


def comparison(
    tx: Tx, project_id: str, name: str, old: int | None, new: int | None, key: str | None
) -> dict[str, Any]:
    """The spec of the job that compares two versions; by default the newest, and the one before `new`.

    InvalidInput for a key that is no column of both.
    """
    after = find_version(tx, project_id, name, new)
    if old is None:
        earlier = [one.version for one in dataset_versions(tx, project_id, name) if one.version < after.version]
        old = max(earlier, default=after.version)
    before = find_version(tx, project_id, name, old)
    both = {column.name for column in before.columns} & {column.name for column in after.columns}
    if key is not None and key not in both:
        there = ", ".join(sorted(both)[:20]) or "none"
        message = f"there is no column {key[:80]!r} in both versions; they share: {there}"
        raise InvalidInput(message, code="unknown_column", param="key")
    return {"name": name, "from_id": before.id, "to_id": after.id, "key": key}


def check_edits(edits: Sequence[DatasetEdit], base: Dataset) -> None:
    """InvalidInput for rows and columns that are not there at their step; whether values fit is the job's to find out."""
    types: dict[str, str] = {column.name: column.type for column in base.columns}
    for index, one in enumerate(edits):
        if one.op in ("lag", "difference", "window", "resample", "unpivot"):
            _check_series(one, types, f"edits[{index}]")
            return  # what follows acts on columns and rows that only the job knows
        where = f"edits[{index}]"
        if one.rows and max(one.rows) > base.rows:
            raise InvalidInput(f"{where}: there is no row {max(one.rows)}; {base.ref} has {base.rows}", param=where)
        adds = one.op == "split" or (one.op == "set" and one.type is not None)
        named = [*(one.where or {}), *([one.stratify] if one.stratify else []), *([one.column] if one.column and not adds else [])]
        for name in named:
            if name not in types:
                raise InvalidInput(
                    f"{where}: the dataset has no column {name[:80]!r}; it has {', '.join(list(types)[:20])} "
                    "(a set with a type adds one)",
                    code="unknown_column",
                    param=where,
                )
        if adds:
            types.setdefault(one.column or "split", one.type or "category")
        elif one.op == "rename" and one.name in types:
            raise InvalidInput(f"{where}: there is a column {str(one.name)[:80]!r} already", param=where)
        elif one.op == "rename":
            types[str(one.name)] = types.pop(str(one.column))


def _check_series(one: DatasetEdit, types: dict[str, str], where: str) -> None:
    for name in (one.column, one.time, one.group, *(one.columns or ())):
        if name is not None and name not in types:
            there = ", ".join(list(types)[:20])
            raise InvalidInput(
                f"{where}: the dataset has no column {name[:80]!r}; it has {there}", code="unknown_column", param=where
            )


def answered(tx: Tx, project_id: str, spec: dict[str, Any]) -> Job | None:
    """A job that compared the same two versions."""
    jobs = tx.table(Job)
    for job in tx.list(Job, jobs.c.status != "cancelled", project_id=project_id, kind="diff", newest_first=True, limit=500):
        if job.spec == spec and (job.status == "succeeded" or job.status not in FINAL_JOB_STATES):
            return job
    return None


def delete(tx: Tx, caller: Caller, name: str, version: int | None, *, force: bool) -> list[int]:
    """Delete one version of `name`, or all of them; their numbers, none of which is ever given again.

    Conflict (dataset_in_use) while a job works on one, and, without `force`, when a model was trained on one: it can
    then no longer be evaluated anew without naming a dataset.
    """
    chosen = dataset_versions(tx, caller.project_id, name)
    if version is not None:
        chosen = [find_version(tx, caller.project_id, name, version)]
    for dataset in chosen:
        _refuse_jobs(tx, dataset, "dataset_in_use")
        if not force:
            _refuse_models(tx, dataset)
    for dataset in chosen:
        tx.delete(dataset)
        audit.record(tx, caller, "datasets.delete", dataset.ref, digest=dataset.digest)
    return [dataset.version for dataset in chosen]


def _refuse_jobs(tx: Tx, one: Dataset | ModelVersion, code: str) -> None:
    jobs = tx.table(Job)
    waiting = jobs.c.status.not_in(sorted(FINAL_JOB_STATES))
    found = [job.id for job in tx.list(Job, waiting, project_id=one.project_id) if one.id in _used(job)]
    if found:
        raise Conflict(
            f"{one.ref} is in use by {_listed(found, 'job')}; wait until it ends, or cancel it",
            code=code,
            detail={_word(one): one.ref, "jobs": found[:100]},
        )


def _used(job: Job) -> list[Any]:
    """What a job's spec names, ids among it; a training also the models that it builds on."""
    return [*job.spec.values(), *job.spec.get("model_version_ids", [])]


def _refuse_models(tx: Tx, dataset: Dataset) -> None:
    same = tx.list(Dataset, project_id=dataset.project_id, digest=dataset.digest, limit=2)
    if len(same) > 1:
        return  # the same content stays under another version
    found = [
        model.ref
        for model in tx.list(ModelVersion, project_id=dataset.project_id, limit=10_000)
        if model.lineage.get("dataset_digest") == dataset.digest
    ]
    if found:
        were = "was" if len(found) == 1 else "were"
        raise Conflict(
            f"{dataset.ref} is what {_listed(found, 'model version')} {were} trained on; add force=true to delete it all the same",
            code="dataset_in_use",
            detail={"dataset": dataset.ref, "models": found[:100]},
        )


def delete_model(tx: Tx, caller: Caller, name: str, version: int | None) -> list[int]:
    """Delete one version of `name`, or all of them; their numbers, none of which is ever given again.

    Conflict (model_in_use) while an alias, a deployment or a job uses one. Its reports stay.
    """
    chosen = model_versions(tx, caller.project_id, name)
    if version is not None:
        chosen = [find_model(tx, caller.project_id, name, version)]
    for model in chosen:
        _refuse_deployments(tx, model)
        _refuse_aliases(tx, model)
        _refuse_jobs(tx, model, "model_in_use")
    for model in chosen:
        tx.delete(model)
        tx.delete_where(Artifact, tx.table(Artifact).c.owner_id == model.id)
        audit.record(tx, caller, "models.delete", model.ref, digest=model.digest)
    return [model.version for model in chosen]


def _refuse_deployments(tx: Tx, model: ModelVersion) -> None:
    """Those that ask for it, those whose last ready revision has it, and those that still run it."""
    running = tx.list(
        Replica, project_id=model.project_id, model_version=model.ref, status=["starting", "ready", "draining"]
    )
    serving = {row.deployment_id for row in running}
    found = []
    for one in tx.list(Deployment, project_id=model.project_id):
        kept = tx.find(DeploymentRevision, deployment_id=one.id, number=one.serving_revision or 0)
        specs = [one.spec, *([kept.spec] if kept else [])]
        carried = any(model.ref in spec.get("adapters", {}).values() for spec in specs)
        if one.model_version_id == model.id or one.id in serving or (kept and kept.model_version == model.ref) or carried:
            found.append(one.name)
    if found:
        raise Conflict(
            f"{model.ref} is in use by {_listed(found, 'deployment')}; deploy another version there, or delete it, first",
            code="model_in_use",
            detail={"model": model.ref, "deployments": found[:100]},
        )


def _refuse_aliases(tx: Tx, model: ModelVersion) -> None:
    found = [
        f"{one.model}@{one.alias}"
        for one in tx.list(Alias, project_id=model.project_id, model=model.name, version=model.version)
    ]
    if found:
        raise Conflict(
            f"{model.ref} is what {_listed(found, 'alias')} points at; move or delete it first",
            code="model_in_use",
            detail={"model": model.ref, "aliases": found[:100]},
        )


def _word(one: Dataset | ModelVersion) -> str:
    return "dataset" if isinstance(one, Dataset) else "model"


def _listed(names: list[str], what: str) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what if len(names) == 1 else _PLURALS.get(what, what + 's')} {', '.join(names[:_SHOWN])}{more}"
