"""The library without a worker: what is checked before anything is queued, whose is what, what is asked for twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.control import requests
from modelworks.control.library import Library, collect
from modelworks.core.errors import Conflict, IdempotencyMismatch, InvalidInput, ModelworksError, NotFound
from modelworks.core.specs import EvaluationSpec, TrainingSpec
from modelworks.core.types import (
    Artifact,
    AuditRecord,
    Checkpoint,
    Column,
    Dataset,
    Job,
    ModelVersion,
    Report,
    Signature,
)
from tests.jobhome import Home, caller

A, B = caller("proj_a", "key_a"), caller("proj_b", "key_b")
COLUMNS = [
    Column(name="length", type="number"),
    Column(name="when", type="time"),
    Column(name="who", type="category"),
    Column(name="species", type="category"),
]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    home.close()


@pytest.fixture
def library(home: Home) -> Library:
    for version in (1, 2):
        put_dataset(home, version=version)
    put_dataset(home, name="other", columns=COLUMNS[:2])
    put_dataset(home, project="proj_b", name="theirs")
    return home.library


def put_dataset(home: Home, project: str = "proj_a", name: str = "iris", version: int = 1, **more: Any) -> Dataset:
    dataset = Dataset(
        project_id=project, name=name, version=version, digest=f"{version:064x}", rows=10, size=1, profile={},
        **{"columns": COLUMNS, **more},
    )  # fmt: skip
    with home.catalog.write() as tx:
        return tx.add(dataset)


def put_model(home: Home, project: str = "proj_a", name: str = "iris", version: int = 1, **more: Any) -> ModelVersion:
    model = ModelVersion(
        project_id=project, name=name, version=version, signature=Signature(inputs=[], outputs=[]), size=1,
        **{
            "digest": f"{version:064x}", "task": "tabular-classification", "lineage": {"dataset_digest": f"{1:064x}"}, **more
        },
    )  # fmt: skip
    with home.catalog.write() as tx:
        return tx.add(model)


def training(**more: Any) -> TrainingSpec:
    asked = {"model": "m", "dataset": "iris", "target": "species", "algorithm": "logistic-regression", **more}
    return TrainingSpec.model_validate(asked)


def queued(home: Home) -> int:
    with home.catalog.read() as tx:
        return tx.count(Job)


def test_what_was_resolved_is_recorded_in_the_job(home: Home, library: Library) -> None:
    job = library.train(A, training(validation={"test": "iris:1"}))
    assert job.status == "queued"
    assert job.spec["dataset"] == "iris:2"
    assert job.spec["validation"]["test"] == "iris:1"
    assert job.spec["dataset_id"] == library.dataset(A, "iris:2").id
    assert job.spec["hyperparameters"]["C"] == 1.0  # the default is written down
    put_dataset(home, version=3)
    assert library.job(A, job.id).spec["dataset"] == "iris:2"
    with home.catalog.read() as tx:
        (row,) = tx.list(AuditRecord)
    assert (row.action, row.principal, row.request_id) == ("training_jobs.create", "key_a", "req_1")


@pytest.mark.parametrize(
    ("change", "kind", "param", "says"),
    [
        ({"dataset": "nope"}, NotFound, "dataset", "nope"),
        ({"dataset": "iris:9"}, NotFound, "dataset", "versions are: 1, 2"),
        ({"dataset": "theirs"}, NotFound, "dataset", "theirs"),
        ({"dataset": "iris@champion"}, InvalidInput, "dataset", "alias"),
        ({"dataset": "../iris"}, InvalidInput, "dataset", "name:version"),
        ({"target": "weight"}, InvalidInput, "target", "length, when, who, species"),
        ({"features": ["length", "weight"]}, InvalidInput, "features", "weight"),
        ({"validation": {"kfold": 3, "group": "weight"}}, InvalidInput, "group", "weight"),
        ({"validation": {"kfold": 3, "time": "weight"}}, InvalidInput, "time", "weight"),
        ({"validation": {"test": "nope"}}, NotFound, "validation.test", "nope"),
        ({"validation": {"test": "other"}}, InvalidInput, "validation.test", "species"),
        ({"algorithm": "magic"}, InvalidInput, "algorithm", "ridge"),
        ({"algorithm": "ridge"}, InvalidInput, "algorithm", "predicts numbers"),
        ({"hyperparameters": {"C": -1}}, InvalidInput, "hyperparameters.C", "above 0"),
        ({"hyperparameters": {"c": 1}}, InvalidInput, "hyperparameters.c", "it has"),
        ({"transforms": ["magic"]}, InvalidInput, "transforms[0]", "standardise"),
        ({"metrics": ["rmse"]}, InvalidInput, "metrics", "accuracy"),
        ({"gates": [{"metric": "rmse", "at_most": 1}]}, InvalidInput, "gates", "accuracy"),
    ],
)
def test_a_training_that_cannot_work_is_refused_before_it_is_queued(
    home: Home, library: Library, change: dict[str, Any], kind: type[ModelworksError], param: str, says: str
) -> None:
    with pytest.raises(kind) as caught:
        library.train(A, training(**change))
    assert caught.value.param == param
    assert says in caught.value.message
    assert queued(home) == 0


def test_an_evaluation_takes_the_models_dataset_unless_told(home: Home, library: Library) -> None:
    put_model(home)
    put_model(home, version=2)
    library.set_alias(A, "iris", "champion", 1)
    job = library.evaluate(A, EvaluationSpec(model="iris@champion", method={"kfold": 3}, compare="iris"))
    assert (job.spec["model"], job.spec["dataset"], job.spec["compare"]) == ("iris:1", "iris:1", "iris:2")
    job = library.evaluate(A, EvaluationSpec(model="iris:1", method={"test": "iris"}))
    assert (job.spec["dataset"], job.spec["method"]["test"]) == ("iris:2", "iris:2")


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "nope"}, NotFound, "model"),
        ({"model": "iris@nope"}, NotFound, "model"),
        ({"compare": "theirs"}, NotFound, "model"),
        ({"dataset": "theirs"}, NotFound, "dataset"),
        ({"method": {"test": "theirs"}}, NotFound, "method.test"),
        ({"method": {"kfold": 2, "group": "weight"}}, InvalidInput, "group"),
        ({"metrics": ["rmse"]}, InvalidInput, "metrics"),
        ({"model": "numbers", "compare": "iris"}, InvalidInput, "compare"),
        ({"text": "who"}, InvalidInput, "text"),
        # a language model was trained on no dataset that is here: what it is measured on is said first
        ({"model": "smol"}, InvalidInput, "method"),
        ({"model": "smol", "dataset": "iris"}, InvalidInput, "method"),
        ({"model": "smol", "method": {"test": "iris"}, "metrics": ["accuracy"]}, InvalidInput, "metrics"),
        ({"model": "smol", "method": {"test": "other"}}, InvalidInput, "text"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused(
    home: Home, library: Library, change: dict[str, Any], kind: type[ModelworksError], param: str
) -> None:
    put_model(home)
    put_model(home, "proj_b", "theirs")
    put_model(home, name="numbers", task="tabular-regression")
    put_model(home, name="smol", task="text-generation", lineage={})
    with pytest.raises(kind) as caught:
        library.evaluate(A, EvaluationSpec.model_validate({"model": "iris", "method": {"kfold": 2}, **change}))
    assert caught.value.param == param
    assert queued(home) == 0


def test_an_uploaded_file_is_in_the_store_before_the_job_is_acknowledged(home: Home, library: Library) -> None:
    path = home.root / "tmp" / "data.csv"
    path.write_text("a,b\n1,2\n")
    job = library.upload_dataset(A, name="t", path=path, filename="../../etc/data.csv\x00")
    assert job.spec["filename"] == "data.csv"
    assert not path.exists()
    assert home.blobs.get(job.spec["upload"]) == b"a,b\n1,2\n"
    with home.catalog.read() as tx:
        (kept,) = tx.list(Artifact)
    assert (kept.owner_id, kept.kind, kept.digest, kept.size) == (job.id, "upload", job.spec["upload"], 8)
    collect(home.catalog, home.blobs, older_than=-1)
    assert home.blobs.exists(job.spec["upload"])
    library.cancel(A, job.id)
    collect(home.catalog, home.blobs, older_than=-1)
    assert not home.blobs.exists(job.spec["upload"])


@pytest.mark.parametrize(
    "source",
    ["/etc/passwd", "file:///etc/passwd", "http://example.com/a.csv", "~/a.csv", "s3://b/k", "", "https://a\n"],
)
def test_a_source_never_names_a_file_of_the_servers(home: Home, library: Library, source: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        library.upload_dataset(A, name="t", source=source)
    assert caught.value.param == "source"
    assert queued(home) == 0


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 101, "a\n", "a;$(id)", "a:1", "a@b"])
def test_names_are_names(library: Library, home: Home, name: str) -> None:
    with pytest.raises(InvalidInput):
        library.upload_dataset(A, name=name, source="sklearn:iris")
    with pytest.raises(InvalidInput):
        library.import_version(A, name=name, path=home.root / "none")
    put_model(home)
    with pytest.raises(InvalidInput):
        library.set_alias(A, "iris", name, 1)


def test_either_a_file_or_a_source(library: Library, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        library.upload_dataset(A, name="t")
    with pytest.raises(InvalidInput):
        library.upload_dataset(A, name="t", path=tmp_path / "x", source="sklearn:iris")


@pytest.mark.parametrize("classes", [["a"], ["a", "a"], ["a", 1], [1.5, 2.5], [["a"], ["b"]], [None, None]])
def test_classes_of_an_import_are_checked(library: Library, home: Home, classes: list[Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        library.import_version(A, name="m", path=home.root / "none", classes=classes)
    assert caught.value.param == "classes"


def test_the_same_create_twice_is_one_job(home: Home, library: Library) -> None:
    once = caller("proj_a", "key_a", idempotency_key="k1")
    first = library.train(once, training())
    put_dataset(home, version=3)  # what `iris` means has changed meanwhile; the request has not
    assert library.train(once, training()).id == first.id
    with pytest.raises(IdempotencyMismatch):
        library.train(once, training(seed=1))
    assert library.train(caller("proj_a", "key_b", idempotency_key="k1"), training()).id != first.id
    assert library.train(A, training()).id != first.id

    def upload(text: str) -> Job:
        return home.upload(once, text, "t")

    assert upload("a\n1\n").id == upload("a\n1\n").id
    with pytest.raises(IdempotencyMismatch):
        upload("a\n2\n")
    with home.catalog.write() as tx:
        tx.delete(first)
    with pytest.raises(Conflict, match="was deleted since; send a new key") as gone:
        library.train(once, training())
    assert gone.value.code == "answer_deleted"


READS: list[Callable[[Library, dict[str, str]], Any]] = [
    lambda library, ids: library.dataset(B, "iris"),
    lambda library, ids: library.dataset(B, "iris:1"),
    lambda library, ids: library.dataset_versions(B, "iris"),
    lambda library, ids: library.job(B, ids["job"]),
    lambda library, ids: library.events(B, ids["job"]),
    lambda library, ids: library.log(B, ids["job"]),
    lambda library, ids: library.cancel(B, ids["job"]),
    lambda library, ids: library.pause(B, ids["job"]),
    lambda library, ids: library.resume(B, ids["job"]),
    lambda library, ids: library.report(B, ids["report"]),
    lambda library, ids: library.model_version(B, "iris"),
    lambda library, ids: library.model_version(B, "iris@champion"),
    lambda library, ids: library.model_versions(B, "iris"),
    lambda library, ids: library.set_alias(B, "iris", "mine", 1),
    lambda library, ids: library.delete_alias(B, "iris", "champion"),
    lambda library, ids: library.export_version(B, "iris:1", Path("never")),
    lambda library, ids: library.train(B, training()),
    lambda library, ids: library.evaluate(B, EvaluationSpec(model="iris", method={"kfold": 2})),
]


@pytest.mark.parametrize("number", range(len(READS)))
def test_another_projects_object_is_not_found(home: Home, library: Library, number: int) -> None:
    put_model(home)
    job = library.train(A, training())
    library.set_alias(A, "iris", "champion", 1)
    with home.catalog.write() as tx:
        report = tx.add(
            Report(
                project_id="proj_a",
                job_id=job.id,
                model="iris",
                dataset="iris:1",
                dataset_digest="",
                method={},
                metrics={},
            )
        )
    with pytest.raises(NotFound):
        READS[number](library, {"job": job.id, "report": report.id})
    assert library.job(A, job.id).status == "queued"
    assert [alias.version for alias in library.aliases(A, "iris")] == [1]
    for listed in (library.jobs, library.models, library.reports):
        assert listed(B).items == []  # type: ignore[operator]
        assert len(listed(A).items) == 1  # type: ignore[operator]
    assert [one.name for one in library.datasets(B).items] == ["theirs"]
    assert library.aliases(B) == []


def test_lists_show_the_newest_version_of_each_and_page(home: Home, library: Library) -> None:
    for name, version in (("m1", 1), ("m2", 1), ("m1", 2), ("m3", 1)):
        put_model(home, name=name, version=version)
        time.sleep(0.002)  # ids sort by the millisecond
    first = library.models(A, limit=2)
    assert [one.ref for one in first.items] == ["m3:1", "m1:2"]
    assert first.has_more
    rest = library.models(A, limit=2, after=first.items[-1].id)
    assert [one.ref for one in rest.items] == ["m2:1"]
    assert not rest.has_more
    assert sorted(one.ref for one in library.datasets(A).items) == ["iris:2", "other:1"]
    assert [one.version for one in library.dataset_versions(A, "iris")] == [1, 2]


def test_jobs_are_listed_by_kind_and_status(home: Home, library: Library) -> None:
    job = library.train(A, training())
    library.upload_dataset(A, name="t", source="sklearn:iris")
    library.cancel(A, job.id)
    assert [one.id for one in library.jobs(A, "train").items] == [job.id]
    assert [one.kind for one in library.jobs(A, status="queued").items] == ["ingest"]
    assert len(library.jobs(A, ["train", "ingest"], ["queued", "cancelled"]).items) == 2
    assert library.jobs(A, "evaluate").items == []
    assert [event.message for event in library.events(A, job.id)] == ["queued", "cancelled"]
    assert [event.seq for event in library.events(A, job.id, 1)] == [2]


def test_a_model_that_a_training_builds_on_is_not_deleted(home: Home, library: Library) -> None:
    put_dataset(home, name="notes", columns=[Column(name="text", type="text"), COLUMNS[3]])
    for version in (1, 2):
        put_model(home, name="encoder", version=version, task="embedding", digest=f"{9 + version:064x}")
    asked = training(dataset="notes", algorithm="text-classifier", hyperparameters={"backbone": "encoder:1"})
    job = library.train(A, asked)
    assert "encoder:1" in str(job.spec["hyperparameters"])
    for version in (1, None):
        with pytest.raises(Conflict) as refused:
            library.delete_model(A, "encoder", version)
        assert (refused.value.code, refused.value.detail["jobs"]) == ("model_in_use", [job.id])
    assert library.delete_model(A, "encoder", 2) == [2]
    library.cancel(A, job.id)
    embedded = library.train(A, training(dataset="notes", transforms=[{"op": "embed", "columns": ["text"], "model": "encoder"}]))
    with pytest.raises(Conflict) as refused:
        library.delete_model(A, "encoder")
    assert refused.value.detail["jobs"] == [embedded.id]
    library.cancel(A, embedded.id)
    assert library.delete_model(A, "encoder") == [1]


def test_a_report_that_is_asked_for_twice_at_once_is_rendered_by_one_job(
    home: Home, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = library.train(A, training())
    about = {"job_id": job.id, "model": "iris", "dataset": "iris:1", "dataset_digest": "", "method": {}, "metrics": {}}
    with home.catalog.write() as tx:
        first, second = (tx.add(Report(project_id="proj_a", **about)) for _ in range(2))
    made = library.render_report(A, first.id)
    assert library.render_report(A, second.id).id != made.id
    looks = [lambda tx, report: None, requests.rendered]  # as one who looked before the other's job was there
    monkeypatch.setattr(requests, "rendered", lambda tx, report: looks.pop(0)(tx, report))
    assert library.render_report(A, first.id).id == made.id
    assert looks == []


def test_an_alias_moves_and_goes(home: Home, library: Library) -> None:
    put_model(home)
    put_model(home, version=2)
    assert library.set_alias(A, "iris", "champion", 1).version == 1
    assert library.set_alias(A, "iris", "champion", 2).version == 2
    assert library.model_version(A, "iris@champion").version == 2
    with pytest.raises(NotFound, match="versions are: 1, 2"):
        library.set_alias(A, "iris", "champion", 3)
    library.delete_alias(A, "iris", "champion")
    with pytest.raises(NotFound):
        library.delete_alias(A, "iris", "champion")
    with home.catalog.read() as tx:
        actions = [row.action for row in tx.list(AuditRecord, order_by=tx.table(AuditRecord).c.created_at)]
    assert actions == ["models.set_alias", "models.set_alias", "models.delete_alias"]


def test_a_log_shows_no_paths_of_this_machine(home: Home, library: Library) -> None:
    job = library.train(A, training())
    assert library.log(A, job.id) == ""
    folder = home.root / "logs" / "jobs"
    folder.mkdir()
    (folder / f"{job.id}.log").write_text(f"reading {home.root}/blobs/ab\n" + os.__file__ + "\n")
    text = library.log(A, job.id)
    assert "reading HOME/blobs/ab" in text
    assert str(Path(os.__file__).parent.parent.parent) not in text


def test_what_a_row_refers_to_is_never_collected(home: Home, library: Library) -> None:
    kept = {name: home.blobs.put_bytes(name.encode()) for name in ("dataset", "manifest", "file", "checkpoint")}
    loose = home.blobs.put_bytes(b"loose")
    put_dataset(home, name="kept", blob=kept["dataset"])
    put_model(home, digest=kept["manifest"])
    with home.catalog.write() as tx:
        tx.add(Artifact(project_id="p", digest=kept["file"], kind="model.onnx", size=1, owner_id="mv"))
        tx.add(Checkpoint(job_id="job", name="fold-1", blob=kept["checkpoint"]))
    assert collect(home.catalog, home.blobs) == 0  # all are young
    assert collect(home.catalog, home.blobs, older_than=-1) == 1
    assert not home.blobs.exists(loose)
    assert all(home.blobs.exists(digest) for digest in kept.values())
