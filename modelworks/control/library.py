"""Use cases on data, jobs and models: what they ask for is checked here and queued; the worker does it.

`Library` is the face. What a reference means is in `references.py`, what a request may ask for in `requests.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from modelworks.control import requests, versions
from modelworks.control.idempotency import create_once
from modelworks.control.references import dataset_versions, find_model, model_versions, resolve_dataset, resolve_model
from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.specs import DatasetEdits, EvaluationSpec, TableSchema, TrainingSpec
from modelworks.core.tasks import GENERATION
from modelworks.core.types import (
    FINAL_JOB_STATES,
    Alias,
    Artifact,
    Caller,
    Dataset,
    Job,
    JobEvent,
    JobKind,
    ModelVersion,
    Page,
    Report,
    Slot,
)
from modelworks.engines.process import tail_log
from modelworks.jobs.collection import collect
from modelworks.jobs.queue import UPLOAD, Queue
from modelworks.security import audit
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog, Tx

__all__ = ["Library", "collect"]

MAX_PAGE = 1000
_CREATES = {
    "ingest": "datasets.create",
    "edit": "datasets.edit",
    "diff": "datasets.diff",
    "train": "training_jobs.create",
    "evaluate": "evaluations.create",
    "import": "models.create_version",
    "render": "reports.render",
    "measure": "models.create_measurement",
}


class Library:
    """All methods are synchronous and take the caller first; another project's object is NotFound.

    `logs` is the folder of the jobs' logs; by default the one of the home that `blobs` lies in.
    """

    def __init__(self, catalog: Catalog, blobs: Blobs, logs: Path | None = None) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._home = blobs.root.parent
        self._logs = logs or self._home / "logs" / "jobs"
        self._queue = Queue(catalog)

    # datasets

    def upload_dataset(
        self,
        caller: Caller,
        *,
        name: str,
        path: Path | None = None,
        source: str | None = None,
        filename: str = "",
        schema: TableSchema | None = None,
    ) -> Job:
        """A job that reads `path` (which the store takes) or `source` into the next version of `name`.

        Its result has `dataset` ("iris:2") and `dataset_id`.
        """
        requests.check_name(name, "dataset")
        if (path is None) == (source is None):
            raise InvalidInput("give either a file or a source", param="file")
        spec: dict[str, Any] = {
            "name": name,
            "source": requests.check_source(source) if source is not None else None,
            "filename": requests.plain_filename(filename or (path.name if path else "")),
            "schema": (schema or TableSchema()).model_dump(mode="json"),
        }
        return self._create(caller, "ingest", spec, name, upload=path)

    def datasets(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[Dataset]:
        """The newest version of each name."""
        with self._catalog.read() as tx:
            newest = _is_newest(tx, Dataset)
            return tx.page(Dataset, newest, limit=_bounded(limit), after=after, project_id=caller.project_id)

    def dataset(self, caller: Caller, ref: str) -> Dataset:
        with self._catalog.read() as tx:
            return resolve_dataset(tx, caller.project_id, ref)

    def dataset_versions(self, caller: Caller, name: str) -> list[Dataset]:
        """All versions, oldest first; NotFound when there is none."""
        with self._catalog.read() as tx:
            return dataset_versions(tx, caller.project_id, name)

    def edit_dataset(self, caller: Caller, name: str, spec: DatasetEdits) -> Job:
        """A job that makes the next version of `name` from one that is there. Its result is that of an upload."""
        with self._catalog.read() as tx:
            base = versions.find_version(tx, caller.project_id, name, spec.version)
        versions.check_edits(spec.edits, base)
        edits = [one.model_dump(mode="json", exclude_unset=True) for one in spec.edits]
        asked = {"name": name, "edits": edits, "dataset": base.ref, "dataset_id": base.id}
        return self._create(caller, "edit", asked, name)

    def diff_datasets(
        self, caller: Caller, name: str, old: int | None, new: int | None, key: str | None = None
    ) -> Job:
        """A job whose result says what changed; one that was asked the same before answers again."""
        with self._catalog.read() as tx:
            spec = versions.comparison(tx, caller.project_id, name, old, new, key)
            known = versions.answered(tx, caller.project_id, spec)
        return known or self._create(
            caller, "diff", spec, name, known=lambda tx: versions.answered(tx, caller.project_id, spec)
        )

    def delete_dataset(self, caller: Caller, name: str, version: int | None = None, *, force: bool = False) -> list[int]:
        """Delete one version, or all; the numbers of those. Conflict names what uses one; `force` spares only jobs."""
        with self._catalog.write() as tx:
            return versions.delete(tx, caller, name, version, force=force)

    # jobs

    def train(self, caller: Caller, spec: TrainingSpec) -> Job:
        with self._catalog.read() as tx:
            resolved = requests.training(tx, caller.project_id, spec)
        return self._create(caller, "train", resolved, spec.model, asked=spec.model_dump(mode="json"))

    def evaluate(self, caller: Caller, spec: EvaluationSpec) -> Job:
        """Of a model, or of predictions that are given."""
        rows = None
        with self._catalog.read() as tx:
            if spec.predictions is not None:
                resolved, rows = requests.predictions(tx, caller.project_id, spec)
            else:
                resolved = requests.evaluation(tx, caller.project_id, spec)
        asked = spec.model_dump(mode="json")
        return self._create(caller, "evaluate", resolved, resolved["model"], asked=asked, upload=rows)

    def jobs(
        self,
        caller: Caller,
        kind: JobKind | Sequence[JobKind] | None = None,
        status: str | Sequence[str] | None = None,
        *,
        parent: str | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> Page[Job]:
        """Newest first; `kind` and `status` are one or several. The parts of the job `parent`; else no parts, unless
        their kind is asked for.
        """
        chosen = {name: value for name, value in (("kind", kind), ("status", status)) if value is not None}
        with self._catalog.read() as tx:
            whole = tx.table(Job).c.parent_id.is_(None) if kind is None else sa.true()
            whose = tx.table(Job).c.parent_id == parent if parent is not None else whole
            return tx.page(Job, whose, limit=_bounded(limit), after=after, project_id=caller.project_id, **chosen)

    def job(self, caller: Caller, job_id: str) -> Job:
        with self._catalog.read() as tx:
            return tx.get(Job, job_id, project_id=caller.project_id)

    def wait(self, job_id: str, timeout: float) -> Job:
        """The job once it has ended, or as it is after `timeout` seconds. For a job that the caller was given."""
        until = time.monotonic() + timeout
        pause = 0.03
        while True:
            with self._catalog.read() as tx:
                job = tx.get(Job, job_id)
            left = until - time.monotonic()
            if job.status in FINAL_JOB_STATES or left <= 0:
                return job
            time.sleep(min(pause, left))
            pause = min(pause * 1.3, 0.25)

    def events(
        self, caller: Caller, job_id: str, after_seq: int = 0, limit: int = 100, kinds: Sequence[str] | None = None
    ) -> list[JobEvent]:
        """In order, those with a `seq` above `after_seq`; of these kinds alone."""
        with self._catalog.read() as tx:
            job = tx.get(Job, job_id, project_id=caller.project_id)
            seq = tx.table(JobEvent).c.seq
            chosen = sa.true() if kinds is None else tx.table(JobEvent).c.kind.in_(kinds)
            return tx.list(JobEvent, seq > after_seq, chosen, job_id=job.id, order_by=seq, limit=_bounded(limit))

    def log(self, caller: Caller, job_id: str, *, limit: int = 64 * 1024) -> str:
        """The last `limit` bytes of what the job's process wrote, without this machine's paths."""
        text = tail_log(self._logs / f"{self.job(caller, job_id).id}.log", limit)
        return requests.without_paths(text, self._home)

    def cancel(self, caller: Caller, job_id: str) -> Job:
        """Idempotent. A running job is `cancelling` until its process has stopped; one that has ended stays so."""
        return self._steer(caller, job_id, "cancel")

    def pause(self, caller: Caller, job_id: str) -> Job:
        return self._steer(caller, job_id, "pause")

    def resume(self, caller: Caller, job_id: str) -> Job:
        return self._steer(caller, job_id, "resume")

    # reports

    def reports(
        self,
        caller: Caller,
        *,
        model: str | None = None,
        job_id: str | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> Page[Report]:
        """Newest first; `model` is a bare name."""
        chosen = {name: value for name, value in (("model", model), ("job_id", job_id)) if value is not None}
        with self._catalog.read() as tx:
            return tx.page(Report, limit=_bounded(limit), after=after, project_id=caller.project_id, **chosen)

    def report(self, caller: Caller, report_id: str) -> Report:
        with self._catalog.read() as tx:
            return tx.get(Report, report_id, project_id=caller.project_id)

    def render_report(self, caller: Caller, report_id: str) -> Job:
        """The job that makes the report's page and figures: the one that did, or does, else a new one."""
        with self._catalog.read() as tx:
            report = tx.get(Report, report_id, project_id=caller.project_id)
            made = requests.rendered(tx, report)
        spec = {"report_id": report.id}
        return made or self._create(caller, "render", spec, report.id, known=lambda tx: requests.rendered(tx, report))

    def rendering(self, caller: Caller, job: Job, plot: str | None = None) -> bytes:
        """The page that a `render` job made, or one of its figures."""
        if plot is None:
            return self._blobs.get(job.result["page"])
        for one in job.result["plots"]:
            if one["name"] == plot:
                return self._blobs.get(one["digest"])
        there = ", ".join(one["name"] for one in job.result["plots"]) or "none"
        raise NotFound(f"the report has no plot {plot[:80]!r}; it has: {there}", code="plot_not_found", param="name")

    # models

    def models(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[ModelVersion]:
        """The newest version of each name; `aliases` tells what points at them."""
        with self._catalog.read() as tx:
            newest = _is_newest(tx, ModelVersion)
            return tx.page(ModelVersion, newest, limit=_bounded(limit), after=after, project_id=caller.project_id)

    def model_versions(self, caller: Caller, name: str) -> list[ModelVersion]:
        """All versions, oldest first; NotFound when there is none."""
        with self._catalog.read() as tx:
            return model_versions(tx, caller.project_id, name)

    def model_version(self, caller: Caller, ref: str) -> ModelVersion:
        with self._catalog.read() as tx:
            return resolve_model(tx, caller.project_id, ref)

    def aliases(self, caller: Caller, name: str | None = None) -> list[Alias]:
        """The aliases of the model `name`, or of all models."""
        with self._catalog.read() as tx:
            clauses = [] if name is None else [tx.table(Alias).c.model == name]
            return tx.list(Alias, *clauses, project_id=caller.project_id, limit=10 * MAX_PAGE)

    def set_alias(self, caller: Caller, name: str, alias: str, version: int) -> Alias:
        """Let `alias` of the model `name` point at `version`, wherever it pointed before."""
        requests.check_alias(alias)
        with self._catalog.write() as tx:
            model = find_model(tx, caller.project_id, name, version)
            known = tx.find(Alias, project_id=caller.project_id, model=model.name, alias=alias)
            if known and known.version == version:
                return known
            audit.record(tx, caller, "models.set_alias", f"{name}@{alias}", version=version)
            if known:
                return tx.update(known, version=version)
            return tx.add(Alias(project_id=caller.project_id, model=model.name, alias=alias, version=version))

    def delete_alias(self, caller: Caller, name: str, alias: str) -> None:
        with self._catalog.write() as tx:
            known = tx.find(Alias, project_id=caller.project_id, model=name, alias=alias)
            if known is None:
                message = f"model {name[:100]!r} has no alias {alias[:100]!r}"
                raise NotFound(message, code="alias_not_found", param="alias")
            audit.record(tx, caller, "models.delete_alias", f"{name}@{alias}", version=known.version)
            tx.delete(known)

    def delete_model(self, caller: Caller, name: str, version: int | None = None) -> list[int]:
        """Delete one version, or all; the numbers of those. Conflict names what uses one."""
        with self._catalog.write() as tx:
            return versions.delete_model(tx, caller, name, version)

    def import_version(
        self,
        caller: Caller,
        *,
        name: str,
        path: Path | None = None,
        source: str | None = None,
        filename: str = "",
        task: str | None = None,
        classes: list[Any] | None = None,
        licence: str | None = None,
        convert: str | None = None,
    ) -> Job:
        """A job that checks a model (ONNX, GGUF) or exported package and registers it: the file at `path`, which the
        store takes, or what `source` names.
        """
        requests.check_name(name, "model")
        if (path is None) == (source is None):
            raise InvalidInput("give either a file or a source", param="file")
        spec = {
            "name": name,
            "filename": requests.plain_filename(filename or (path.name if path else "")),
            "source": requests.check_source(source) if source is not None else None,
            "task": requests.check_task(task),
            "classes": requests.check_classes(classes),
            "licence": requests.check_licence(licence),
            "convert": requests.check_convert(convert),
        }
        return self._create(caller, "import", spec, name, upload=path)

    def measure(self, caller: Caller, ref: str) -> Job:
        """A job that measures the engines which run a language model here; deployments with `engine: auto` go by it."""
        model = self.model_version(caller, ref)
        if model.task != GENERATION:
            raise InvalidInput(f"{model.ref} does {model.task}; engines are measured for language models", param="model")
        return self._create(caller, "measure", {"model_version_id": model.id, "model": model.ref}, model.name)

    def export_version(self, caller: Caller, ref: str, out: Path) -> Path:
        """Write the package of a model version as one file at `out`."""
        from modelworks.ml.build import export_package
        from modelworks.ml.package import Manifest

        manifest = Manifest.parse(self._blobs.get(self.model_version(caller, ref).digest))
        export_package(manifest, self._blobs.path, out)
        return out

    def _create(
        self,
        caller: Caller,
        kind: JobKind,
        spec: dict[str, Any],
        name: str,
        *,
        asked: Any = None,
        upload: Path | bytes | None = None,
        known: Callable[[Tx], Job | None] = lambda tx: None,
    ) -> Job:
        """Queue a job once, or answer with the one that is `known` by then: writers take turns.

        An upload is in the store, with a row that keeps it, before the job is acknowledged.
        """
        size = 0
        if isinstance(upload, bytes):
            size, spec = len(upload), {**spec, "upload": self._blobs.put_bytes(upload)}
        elif upload:
            size, spec = upload.stat().st_size, {**spec, "upload": self._blobs.put_file(upload, move=True)}
        operation = _CREATES[kind]

        def make() -> Job:
            if there := known(tx):
                return there
            slot: Slot = "later" if requests.has_parts(spec) else "taken"
            whose = {"project_id": caller.project_id, "created_by": caller.principal.key_id}
            job = self._queue.enqueue(tx, Job(kind=kind, spec=spec, slot=slot, **whose))
            if upload:
                digest = spec["upload"]
                tx.add(Artifact(project_id=caller.project_id, digest=digest, kind=UPLOAD, size=size, owner_id=job.id))
            audit.record(tx, caller, operation, name, job=job.id)
            return job

        with self._catalog.write() as tx:
            return create_once(tx, caller, operation, asked or spec, Job, make)

    def _steer(self, caller: Caller, job_id: str, verb: str) -> Job:
        with self._catalog.write() as tx:
            job = tx.get(Job, job_id, project_id=caller.project_id)
            after: Job = getattr(self._queue, verb)(tx, job)
            if after is not job:
                audit.record(tx, caller, f"training_jobs.{verb}", job.id, status=after.status)
            return after


def _is_newest(tx: Tx, noun: type[Dataset] | type[ModelVersion]) -> Any:
    table = tx.table(noun)
    newer = table.alias()
    same = sa.and_(newer.c.project_id == table.c.project_id, newer.c.name == table.c.name)
    return ~sa.exists().where(same, newer.c.version > table.c.version)


def _bounded(limit: int) -> int:
    return max(1, min(limit, MAX_PAGE))
