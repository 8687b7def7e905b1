"""What a job of each kind does, in its own process: read, compute, keep the bytes, then commit once under the lease.

Compute (`modelworks.ml`) is imported inside the steps. What a step made is seen after one transaction, or never.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelworks
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import DatasetEdit, EvaluationSpec, TableSchema, TrainingSpec
from modelworks.core.stores import Store
from modelworks.core.types import Artifact, Column, Dataset, Job, JobEvent, ModelVersion, Report
from modelworks.jobs import registering
from modelworks.jobs.context import Context
from modelworks.jobs.parts import Delivered
from modelworks.jobs.queue import Queue, patiently, still_running
from modelworks.jobs.search import choose, trial
from modelworks.ml.package import Manifest, Package
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog, Tx

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.ingest import Ingested

# what the library resolved, beside the spec that was asked for
_RESOLVED = frozenset(
    {
        "dataset_id", "test_dataset_id", "model_version_id", "model_version_ids", "compare_version_id", "compare_dataset_id",
        "upload", "filename", "texts",
    }
)  # fmt: skip
_OF_PARTS = frozenset({"part", "of", "trial", "scope", "params", "history"})


@dataclass(frozen=True)
class Step:
    """A job with all it may touch."""

    job: Job
    queue: Queue
    catalog: Catalog
    blobs: Blobs
    context: Context
    offline: bool = False
    memory_mb: int | None = None
    stores: Sequence[dict[str, Any]] = ()

    def dataset(self, key: str) -> Dataset:
        return self._kept(Dataset, key)

    def model(self, key: str) -> ModelVersion:
        return self._kept(ModelVersion, key)

    def report(self) -> Report:
        return self._kept(Report, "report_id")

    def table(self, dataset: Dataset) -> pa.Table:
        from pyarrow import parquet

        return parquet.read_table(self.blobs.path(dataset.blob))

    def package(self, model: ModelVersion) -> Package:
        return Package(Manifest.parse(self.blobs.get(model.digest)), self.blobs.path)

    def spec(self) -> dict[str, Any]:
        """The spec as it was asked for, with references resolved."""
        return {name: value for name, value in self.job.spec.items() if name not in _RESOLVED | _OF_PARTS}

    def commit(self, write: Callable[[Tx, Job], None]) -> None:
        """All that `write` does, if the lease still holds and nobody cancelled; else nothing."""

        self.context.flush()

        def attempt() -> None:
            with self.catalog.write() as tx:
                write(tx, still_running(tx, self.job.id, self.job.token))

        patiently(attempt)

    def _kept(self, noun: Any, key: str) -> Any:
        def read() -> Any:
            with self.catalog.read() as tx:
                return tx.get(noun, self.job.spec[key], project_id=self.job.project_id)

        return patiently(read)


def ingest(step: Step) -> None:
    """A file or source becomes the next version of a dataset, or the version that has its content already."""
    from modelworks.ml.data.ingest import ingest as read_table
    from modelworks.ml.data.pointed import Stores

    spec, context = step.job.spec, step.context
    path, filename = _input(step)
    out = context.workdir / "canonical.parquet"
    schema = TableSchema.model_validate(spec["schema"])

    def reading(part: float, stage: str) -> None:
        context.progress(0.1 + 0.6 * part, stage)

    stores = Stores([Store.model_validate(one) for one in step.stores], offline=step.offline)
    found = read_table(path, filename=filename, schema=schema, out=out, progress=reading, stores=stores)
    _keep_dataset(step, out, found, spec["source"] or spec["filename"])


def edit(step: Step) -> None:
    """A version of a dataset, with some of its values, rows and columns changed, becomes the next version."""
    from modelworks.ml.data.edit import edit as change

    context, base = step.context, step.dataset("dataset_id")
    out = context.workdir / "canonical.parquet"
    edits = [DatasetEdit.model_validate(one) for one in step.job.spec["edits"]]

    def editing(part: float, stage: str) -> None:
        context.progress(0.7 * part, stage)

    found = change(step.blobs.path(base.blob), base.columns, edits, out, editing)
    _keep_dataset(step, out, found, f"edit of {base.ref}")


def diff(step: Step) -> None:
    """What changed between two versions of a dataset, as the job's result."""
    from modelworks.ml.data.diff import diff as compare

    before, after = step.dataset("from_id"), step.dataset("to_id")
    old, new = (step.blobs.path(one.blob) for one in (before, after))
    found = compare(old, new, before.columns, after.columns, step.job.spec["key"])
    found = {"name": before.name, "from": before.version, "to": after.version, **found}

    def write(tx: Tx, job: Job) -> None:
        step.queue.finish(tx, job, result=found)

    step.commit(write)


def _keep_dataset(step: Step, out: Path, found: Ingested, source: str) -> None:
    """Profile what was written and commit it as the next version, or as the one that has its content."""
    from modelworks.ml.data.profile import profile

    spec, context = step.job.spec, step.context
    context.progress(0.7, "profiling")
    described, warnings = profile(out, found.columns)
    context.progress(0.95, "storing")
    size = out.stat().st_size
    blob = step.blobs.put_file(out, move=True)
    dataset = Dataset(
        project_id=step.job.project_id,
        name=spec["name"],
        version=0,
        digest=found.digest,
        blob=blob,
        rows=found.rows,
        size=size,
        columns=found.columns,
        profile=described,
        warnings=found.notes + warnings,
        source=source,
        created_by=step.job.created_by,
    )

    def write(tx: Tx, job: Job) -> None:
        kept = registering.dataset(tx, job, dataset)
        result = {"dataset": kept.ref, "dataset_id": kept.id, "name": kept.name, "version": kept.version}
        step.queue.finish(tx, job, result=result)

    step.commit(write)


def _input(step: Step, *, folders: bool = False) -> tuple[Path, str]:
    """The file to read (or with `folders` the folder), and the name that tells its format."""
    spec = step.job.spec
    if digest := spec.get("upload"):
        return step.blobs.path(digest), spec["filename"]
    from modelworks.ml.data.sources import resolve

    step.context.progress(0.0, "fetching")
    folder = step.context.workdir / "source"
    folder.mkdir()
    path = resolve(spec["source"], folder, offline=step.offline, folders=folders)
    return path, path.name


def train(step: Step) -> None:
    """A dataset becomes a model version; when a gate fails, only the report is kept."""
    from modelworks.ml.data.findings import of_target
    from modelworks.ml.train.memory import budget, open_table
    from modelworks.ml.train.train import train as fit

    dataset = step.dataset("dataset_id")
    spec = TrainingSpec.model_validate(step.spec())
    if spec.advise:
        _advise(step, spec, dataset)
        return
    test = step.table(step.dataset("test_dataset_id")) if "test_dataset_id" in step.job.spec else None
    suspicions = []
    if spec.target:
        suspicions = of_target(step.blobs.path(dataset.blob), dataset.columns, spec.target, dataset.profile)
    if test is not None and step.dataset("test_dataset_id").digest == dataset.digest:
        suspicions.append("the test dataset is the training dataset: its rows are trained on; expect worse on new ones")
    for suspicion in suspicions:
        step.context.event("warning", suspicion)
    spec, searched = choose(step, spec, dataset)
    try:
        trained = fit(
            open_table(
                step.blobs.path(dataset.blob), dataset.columns, dataset.profile, spec, budget(step.memory_mb)
            ),
            dataset.columns,
            spec,
            step.context,
            test_table=test,
            dataset_ref=dataset.ref,
            dataset_digest=dataset.digest,
            code_version=modelworks.__version__,
            searched=searched,
        )
    except InvalidInput as error:
        if error.code != "gate_failed":
            raise
        _refuse(step, error, spec.model, dataset)
        return
    digest = registering.store(step.blobs, trained.manifest, trained.files)
    found = registering.keep_predictions(step.blobs, trained.report)

    def write(tx: Tx, job: Job) -> None:
        report = registering.report(
            tx,
            job,
            found,
            model=spec.model,
            dataset=dataset,
            seed=spec.seed,
            details={"warnings": suspicions + trained.warnings},
        )
        model = registering.model(tx, job, spec.model, trained.manifest, digest, report_id=report.id)
        if report.model_version != model.ref:
            report = tx.update(report, model_version=model.ref)
        if spec.alias:
            registering.alias(tx, job, model, spec.alias)
        more = {"leaderboard": searched["leaderboard"], "search": _summary(searched)} if searched else {}
        _finish_model(step, tx, job, model, metrics=report.metrics, report_id=report.id, **more)

    step.commit(write)


def _advise(step: Step, spec: TrainingSpec, dataset: Dataset) -> None:
    """Only what the training would take; the result stays with the job."""
    from modelworks.ml.data.stored import StoredTable
    from modelworks.ml.train.advise import advise
    from modelworks.ml.train.memory import budget

    stored = StoredTable(step.blobs.path(dataset.blob))
    found = advise(stored, dataset.columns, dataset.profile, spec, step.context, budget(step.memory_mb))
    for warning in found["warnings"]:
        step.context.event("warning", warning)

    def write(tx: Tx, job: Job) -> None:
        step.queue.finish(tx, job, result={"advice": found})

    step.commit(write)


def evaluate(step: Step) -> None:
    """A model version, or the way it was trained, measured on a dataset; and against another one on the same rows."""
    from modelworks.ml.evaluate.evaluate import evaluate as measure

    if step.job.spec.get("predictions"):
        _evaluate_given(step)
        return
    dataset, model = step.dataset("dataset_id"), step.model("model_version_id")
    spec = EvaluationSpec.model_validate(step.spec())
    other = step.package(step.model("compare_version_id")) if "compare_version_id" in step.job.spec else None
    result = measure(spec, step.package(model), step.table(dataset), dataset.columns, step.context, other=other)
    found = {"metrics": result.metrics, "details": result.details, "method": result.method}
    found |= registering.keep_predictions(step.blobs, {"predictions": result.predictions})
    if spec.how.test:
        _note_known_rows(result.details, dataset, [step.package(model), *([other] if other else [])])

    def write(tx: Tx, job: Job) -> None:
        report = registering.report(
            tx, job, found, model=model.name, dataset=dataset, seed=spec.seed, model_version=model.ref
        )
        step.queue.finish(tx, job, metrics=report.metrics, model_version=model.ref, result={"report_id": report.id})

    step.commit(write)


def _evaluate_given(step: Step) -> None:
    """Predictions that came with the request or lie in a dataset, scored against the truth beside them."""
    from modelworks.ml.evaluate.given import evaluate_given

    asked = step.job.spec
    dataset = step.dataset("dataset_id") if "dataset_id" in asked else None
    if dataset is not None:
        table, columns, digest = step.table(dataset), dataset.columns, dataset.digest
    else:
        table, columns, digest = _rows_of_request(step)
    other = step.dataset("compare_dataset_id") if "compare_dataset_id" in asked else None
    # without a dataset the rows are the upload; the spec says so as it did when it was asked for
    spec = EvaluationSpec.model_validate(step.spec() | ({} if dataset else {"dataset": "rows"}))
    result = evaluate_given(spec, table, columns, step.context, other=(step.table(other), other.columns) if other else None)
    found = {"metrics": result.metrics, "details": result.details, "method": result.method, "digest": digest}
    found |= registering.keep_predictions(step.blobs, {"predictions": result.predictions})
    version = step.model("model_version_id") if "model_version_id" in asked else None
    name = version.name if version else str(asked["model"])

    def write(tx: Tx, job: Job) -> None:
        ref = version.ref if version else None
        report = registering.report(tx, job, found, model=name, dataset=dataset, seed=spec.seed, model_version=ref)
        step.queue.finish(tx, job, metrics=report.metrics, model_version=ref, result={"report_id": report.id})

    step.commit(write)


def _rows_of_request(step: Step) -> tuple[pa.Table, list[Column], str]:
    from pyarrow import parquet

    from modelworks.ml.data.ingest import ingest as read_table

    path, filename = _input(step)
    out = step.context.workdir / "canonical.parquet"
    schema = TableSchema(columns=dict.fromkeys(step.job.spec["texts"], "text"))
    found = read_table(path, filename=filename, schema=schema, out=out)
    return parquet.read_table(out), found.columns, found.digest


def _note_known_rows(details: dict[str, Any], dataset: Dataset, packages: list[Package]) -> None:
    """A test set that a model was trained on tells how well it remembers; the report must say so."""
    for package in packages:
        lineage = package.manifest.lineage
        if dataset.digest == lineage.get("dataset_digest") or dataset.ref == lineage.get("dataset"):
            note = f"these rows were trained on ({dataset.ref}): expect worse figures on new ones"
            if note not in details["notes"]:
                details["notes"].append(note)


def render(step: Step) -> None:
    """A report as a page and its figures, which are kept with it."""
    from modelworks.ml.evaluate.folds import read_kept
    from modelworks.ml.evaluate.page import page
    from modelworks.ml.evaluate.plots import draw

    report = step.report()
    with step.catalog.read() as tx:
        held = tx.find(Artifact, owner_id=report.id, kind=registering.PREDICTIONS)
        events = tx.list(JobEvent, job_id=report.job_id, kind="metric", limit=10_000)
    found = read_kept(step.blobs.get(held.digest)) if held else None
    shown = report.public()
    drawn = draw(shown, found, [event.data for event in events])
    step.context.progress(0.8, "drawn")
    text = page(shown, drawn).encode()
    files = {"page": ("report-page", text), **{f"plot:{name}": ("report-plot", png) for name, _, png in drawn}}
    digests = {name: step.blobs.put_bytes(data) for name, (_, data) in files.items()}
    result = {
        "report_id": report.id,
        "page": digests["page"],
        "plots": [{"name": name, "title": title, "digest": digests[f"plot:{name}"]} for name, title, _ in drawn],
    }

    def write(tx: Tx, job: Job) -> None:
        for name, (kind, data) in files.items():
            size = len(data)
            tx.add(Artifact(project_id=job.project_id, digest=digests[name], kind=kind, size=size, owner_id=report.id))
        step.queue.finish(tx, job, result=result)

    step.commit(write)


def import_version(step: Step) -> None:
    """A model (ONNX, GGUF, a folder) or exported package, checked here in a limited process, becomes a model version."""
    from modelworks.ml import build

    spec, context = step.job.spec, step.context
    path, _ = _input(step, folders=True)
    context.progress(0.1, "checking")
    kind = build.sniff(path)

    def tell(part: float, stage: str) -> None:
        context.progress(0.1 + 0.8 * part, stage)

    if kind != "gguf" and spec.get("convert"):
        raise InvalidInput("only GGUF models are converted; leave convert out", param="convert")
    if kind == "gguf":
        _refuse_classes(spec)
        manifest, files = build.import_gguf(
            path,
            context.workdir,
            task=spec["task"],
            licence=spec["licence"],
            convert=spec.get("convert"),
            threads=context.threads,
            tell=tell,
        )
    elif kind == "folder":
        _refuse_classes(spec)
        manifest, files = build.import_folder(
            path, context.workdir, task=spec["task"], licence=spec["licence"], threads=context.threads, tell=tell
        )
    elif kind == "onnx":
        manifest, files = build.import_onnx(
            path, context.workdir, task=spec["task"], classes=spec["classes"], licence=spec["licence"]
        )
    else:
        _refuse_options(spec)
        manifest, files = build.import_package(path, context.workdir)
    step.context.progress(0.9, "storing")
    digest = registering.store(step.blobs, manifest, files)

    def write(tx: Tx, job: Job) -> None:
        model = registering.model(tx, job, spec["name"], manifest, digest)
        _finish_model(step, tx, job, model, metrics=manifest.metrics)

    step.commit(write)


def measure(step: Step) -> None:
    """The engines that run a language model, measured on this machine; the result stays with the job."""
    from modelworks.ml.measuring import measure as run

    context = step.context
    found = run(step.package(step.model("model_version_id")), context.threads, context.progress)
    found = {"model_version": step.job.spec["model"], "machine": platform.node(), **found}

    def write(tx: Tx, job: Job) -> None:
        step.queue.finish(tx, job, model_version=step.job.spec["model"], result=found)

    step.commit(write)


def fold(step: Step) -> None:
    """One part of a validation: the predictions become a checkpoint of the job that they are a part of."""
    part = str(step.job.spec["part"])
    try:
        STEPS[step.job.spec["of"]](step)
    except Delivered as done:
        blob = done.blob
    else:
        raise InvalidInput(f"the job has no part {part!r}", code="part_missing")

    def write(tx: Tx, job: Job) -> None:
        step.queue.deliver(tx, job, part, blob)
        step.queue.finish(tx, job, result={"part": part})

    step.commit(write)


def _refuse_classes(spec: dict[str, Any]) -> None:
    if spec["classes"] is not None:
        raise InvalidInput("a language model or text encoder has no classes; leave them out", param="classes")


def _refuse_options(spec: dict[str, Any]) -> None:
    for name in ("task", "classes", "licence"):
        if spec[name] is not None:
            raise InvalidInput(
                f"a package declares its {name} itself; leave {name} out, or upload the ONNX", param=name
            )


def _summary(searched: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in searched.items() if name != "leaderboard"}


def _finish_model(
    step: Step,
    tx: Tx,
    job: Job,
    model: ModelVersion,
    *,
    metrics: dict[str, Any],
    report_id: str | None = None,
    **more: Any,
) -> None:
    result = {"model_version": model.ref, "model_version_id": model.id, "digest": model.digest, "report_id": report_id}
    result |= more | {name: value for name, value in job.result.items() if name == "advice"}
    step.queue.finish(tx, job, metrics=metrics, model_version=model.ref, result=result)


def _refuse(step: Step, error: InvalidInput, model: str, dataset: Dataset) -> None:
    """A gate failed: the report stays, the job fails with the numbers, nothing is registered."""
    detail = dict(error.detail)
    found = registering.keep_predictions(step.blobs, detail.pop("report"))
    detail["metrics"] = found["metrics"]

    def write(tx: Tx, job: Job) -> None:
        gate = {"gate": detail["gate"], "value": detail["value"], "passed": False}
        report = registering.report(
            tx, job, found, model=model, dataset=dataset, seed=step.context.seed, details={"gate": gate}
        )
        kept = error.as_dict() | {"detail": detail | {"report_id": report.id}}
        step.queue.finish(tx, job, "failed", error=kept, metrics=report.metrics, result={"report_id": report.id})

    step.commit(write)


STEPS: dict[str, Callable[[Step], None]] = {
    "ingest": ingest,
    "edit": edit,
    "diff": diff,
    "train": train,
    "evaluate": evaluate,
    "import": import_version,
    "measure": measure,
    "fold": fold,
    "render": render,
    "trial": trial,
}
