"""Every part of the SDK against a server that remembers what it was asked; the sync and the async client by the same cases."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modelworks import AsyncClient, Client
from modelworks.client import jobs
from modelworks.client.transport import AsyncCarrier, SyncCarrier
from modelworks.core.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    ModelworksError,
    NotFound,
    RateLimited,
    Unavailable,
)
from modelworks.core.specs import TrainingSpec
from tests.client_fake import (
    CUT,
    DATASET,
    DEPLOYMENT,
    DONE,
    JOB,
    KEY,
    PREDICTION,
    VERSION,
    FakeServer,
    Reply,
    event,
    page,
    problem,
    sse,
)


class Face:
    """A client of either kind whose calls are finished before they return."""

    def __init__(self, make: Callable[..., Any], url: str, slept: list[float]) -> None:
        self.slept = slept
        self._loop = asyncio.new_event_loop() if make is AsyncClient else None
        self.client = make(url, KEY)

    def finish(self, value: Any) -> Any:
        if self._loop is None:
            return list(value) if hasattr(value, "__next__") else value
        return self._loop.run_until_complete(_gather(value) if hasattr(value, "__anext__") else value)

    def close(self) -> None:
        self.finish(self.client.close())
        if self._loop:
            self._loop.close()


async def _gather(source: Any) -> list[Any]:
    return [item async for item in source]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def face(request: pytest.FixtureRequest, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Face]:
    slept: list[float] = []

    async def sleep(self: Any, seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(SyncCarrier, "sleep", sleep)
    monkeypatch.setattr(AsyncCarrier, "sleep", sleep)
    made = Face(request.param, fake.url, slept)
    yield made
    made.close()


RUN = {"model": "iris", "dataset": "iris", "target": "species", "algorithm": "ridge"}
CALLS: list[tuple[str, str, Any, Callable[[Any], Any], Any]] = [
    # method, path, reply, call, JSON body or None
    ("GET", "/api/v1/datasets", page(DATASET), lambda c: c.datasets.list(limit=5), None),
    ("GET", "/api/v1/datasets/iris", DATASET, lambda c: c.datasets.get("iris"), None),
    ("GET", "/api/v1/datasets/iris/versions/2", DATASET, lambda c: c.datasets.get("iris:2"), None),
    ("POST", "/api/v1/training-jobs", Reply(JOB, 202), lambda c: c.training_jobs.create(**RUN), RUN),
    ("POST", "/api/v1/training-jobs", Reply(JOB, 202), lambda c: c.training_jobs.create(TrainingSpec(**RUN), seed=3), {**RUN, "seed": 3}),
    ("GET", "/api/v1/training-jobs", page(JOB), lambda c: c.training_jobs.list(), None),
    ("POST", "/api/v1/training-jobs/job_1/pause", Reply(JOB, 202), lambda c: c.training_jobs.pause("job_1"), None),
    ("POST", "/api/v1/training-jobs/job_1/resume", Reply(JOB, 202), lambda c: c.training_jobs.resume("job_1"), None),
    ("POST", "/api/v1/training-jobs/job_1/pause", Reply(JOB, 202), lambda c: c.jobs.pause("job_1"), None),
    ("POST", "/api/v1/training-jobs/job_1/resume", Reply(JOB, 202), lambda c: c.jobs.resume("job_1"), None),
    (
        "POST", "/api/v1/training-jobs", Reply(JOB, 202),
        lambda c: c.training_jobs.create(**RUN, kfold=3, repeats=2), {**RUN, "validation": {"kfold": 3, "repeats": 2}},
    ),
    ("POST", "/api/v1/jobs/job_1/cancel", Reply(JOB, 202), lambda c: c.training_jobs.cancel("job_1"), None),
    ("GET", "/api/v1/jobs", page(JOB), lambda c: c.jobs.list(kind="train", status="queued"), None),
    ("GET", "/api/v1/jobs/job_1/events", page(event(1, "log", "x")), lambda c: c.jobs.events("job_1"), None),
    ("GET", "/api/v1/jobs/job_1/events", page(event(1, "log", "x")), lambda c: c.jobs.events("job_1", kind=["log", "fold"]), None),
    (
        "POST", "/api/v1/evaluations", Reply(JOB, 202),
        lambda c: c.evaluations.create(model="iris:1", method={"kfold": 5}), {"model": "iris:1", "method": {"kfold": 5}},
    ),
    (
        "POST", "/api/v1/evaluations", Reply(JOB, 202),
        lambda c: c.evaluations.create(model="iris:1", holdout=0.3), {"model": "iris:1", "method": {"holdout": 0.3}},
    ),
    ("GET", "/api/v1/models", page(VERSION), lambda c: c.models.list(), None),
    ("GET", "/api/v1/models/iris/versions/1", VERSION, lambda c: c.models.version("iris:1"), None),
    (
        "PUT", "/api/v1/models/iris/aliases/champion", {"project_id": "p", "model": "iris", "alias": "champion", "version": 1},
        lambda c: c.models.set_alias("iris", "champion", 1), {"version": 1},
    ),
    ("DELETE", "/api/v1/models/iris/aliases/champion", {"deleted": True}, lambda c: c.models.delete_alias("iris", "champion"), None),
    (
        "PUT", "/api/v1/deployments/iris", Reply(DEPLOYMENT, 202),
        lambda c: c.deployments.put("iris", model="iris:1", replicas={"min": 2}), {"model": "iris:1", "replicas": {"min": 2}},
    ),
    ("PUT", "/api/v1/deployments/iris", Reply(DEPLOYMENT, 202), lambda c: c.deployments.put("iris", "iris:1"), {"model": "iris:1"}),
    ("GET", "/api/v1/deployments", page(DEPLOYMENT), lambda c: c.deployments.list(), None),
    ("DELETE", "/api/v1/deployments/iris", Reply(DEPLOYMENT, 202), lambda c: c.deployments.delete("iris"), None),
    ("POST", "/api/v1/deployments/iris/rollback", Reply(DEPLOYMENT, 202), lambda c: c.deployments.rollback("iris", 1), {"revision": 1}),
    (
        "POST", "/api/v1/deployments/iris/predict", PREDICTION,
        lambda c: c.deployments.predict("iris", {"petal": 1}), {"inputs": [{"petal": 1}]},
    ),
    ("POST", "/api/v1/projects", Reply({"id": "proj_2", "name": "lab"}, 201), lambda c: c.projects.create("lab"), {"name": "lab"}),
    ("POST", "/api/v1/users", Reply({"id": "user_1", "name": "ada"}, 201), lambda c: c.users.create("ada"), {"name": "ada"}),
    ("DELETE", "/api/v1/users/user_1", {"id": "user_1", "name": "ada", "disabled": True}, lambda c: c.users.disable("user_1"), None),
    (
        "PUT", "/api/v1/projects/lab/members/user_1", {"user_id": "user_1", "project_id": "proj_2", "role": "viewer"},
        lambda c: c.memberships.put("lab", "user_1", "viewer"), {"role": "viewer"},
    ),
    ("GET", "/api/v1/audit", page(), lambda c: c.audit.list(), None),
    ("GET", "/api/v1/algorithms", page({"name": "ridge"}), lambda c: c.algorithms(), None),
    ("GET", "/api/v1/usage", page({"project_id": "p", "calls": 2}), lambda c: c.usage(by="key", deployment="iris"), None),
    ("GET", "/api/v1/status", {"version": "1"}, lambda c: c.status(), None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "reply", "call", "body"), CALLS, ids=[f"{one[0]} {one[1]}" for one in CALLS]
)
def test_calls_go_where_the_contract_says(face: Face, fake: FakeServer, method, path, reply, call, body) -> None:  # type: ignore[no-untyped-def]
    fake.on(method, path, reply)
    face.finish(call(face.client))
    (asked,) = fake.asked
    assert (asked.method, asked.path) == (method, path)
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    if body is not None:
        assert asked.json == body


def test_results_are_nouns(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/datasets", page(DATASET, has_more=True))
    found = face.finish(face.client.datasets.list())
    assert found.items[0].ref == "iris:2"
    assert found.has_more is True


def test_a_page_is_a_sequence(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/datasets", page(DATASET, {**DATASET, "name": "wine"}))
    found = face.finish(face.client.datasets.list())
    assert [one.name for one in found] == ["iris", "wine"]
    assert (len(found), found[1].name, [one.name for one in found[:1]]) == (2, "wine", ["iris"])
    fake.on("GET", "/api/v1/datasets", page())
    assert not face.finish(face.client.datasets.list())


def test_a_model_knows_its_latest_version(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/models/iris", {"name": "iris", "versions": [{**VERSION, "version": 10}, VERSION]})
    assert face.finish(face.client.models.get("iris")).latest.ref == "iris:10"


def test_a_prediction_keeps_whatever_a_model_answers(face: Face, fake: FakeServer) -> None:
    own = [
        {"label": 1, "probabilities": [0.25, 0.75], "distance": [1.5]},
        {"value": [[1, 2.5]]},
        {"value": 3},
        {"value": "x"},
    ]
    fake.on("POST", "/api/v1/deployments/own/predict", {**PREDICTION, "outputs": own})
    outputs = face.finish(face.client.deployments.predict("own", [{}])).outputs
    assert [one.model_dump(exclude_unset=True) for one in outputs] == own
    assert outputs[0].distance == [1.5]


def test_a_method_is_given_once(face: Face, fake: FakeServer) -> None:
    with pytest.raises(InvalidInput, match="not both"):
        face.finish(face.client.evaluations.create(model="iris", method={"kfold": 3}, kfold=5))
    assert fake.asked == []


def test_upload_takes_columns_as_short_for_schema(face: Face, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/datasets", Reply(DATASET, 201))
    upload = face.client.datasets.upload(
        b"a,b\n1,2\n", name="x", columns={"a": "category"}, schema={"columns": {"b": "text"}}
    )
    face.finish(upload)
    assert b'{"columns": {"b": "text", "a": "category"}}' in fake.asked[0].body


def test_the_errors_are_exported_and_the_import_stays_light() -> None:
    import subprocess
    import sys

    import modelworks
    from modelworks.core import errors

    assert modelworks.NotFound is NotFound
    assert all(hasattr(modelworks, name) for name in modelworks.__all__)
    assert {"ModelworksError", "InvalidInput", "Conflict"} <= set(modelworks.__all__) & set(vars(errors))
    code = "import modelworks, sys; sys.exit(len({'pydantic', 'httpx2', 'msgspec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_names_stay_one_path_segment(face: Face, fake: FakeServer) -> None:
    with pytest.raises(NotFound):
        face.finish(face.client.deployments.get("../keys?x=1"))
    assert fake.asked[0].path == "/api/v1/deployments/..%2Fkeys%3Fx%3D1"
    with pytest.raises(NotFound):
        face.finish(face.client.jobs.get(".."))
    assert fake.asked[1].path == "/api/v1/jobs/%2E%2E"


# errors and retries


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidInput), (403, Forbidden), (404, NotFound), (409, Conflict), (500, ModelworksError)],
)
def test_a_problem_becomes_its_error_and_is_not_retried(
    face: Face, fake: FakeServer, status: int, kind: type[ModelworksError]
) -> None:
    fake.on("GET", "/api/v1/models", problem(status, "some_code", "do this next", param="model"))
    with pytest.raises(kind) as caught:
        face.finish(face.client.models.list())
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.code, caught.value.param) == ("do this next", "some_code", "model")
    assert caught.value.detail["request_id"] == "req_1"
    assert len(fake.asked) == 1


def test_busy_answers_are_retried_when_the_server_says(face: Face, fake: FakeServer) -> None:
    fake.on(
        "GET",
        "/api/v1/models",
        problem(429, "rate_limited", "later", retry_after="3"),
        problem(503, "unavailable", "x"),
        page(),
    )
    face.finish(face.client.models.list())
    assert len(fake.asked) == 3
    assert face.slept[0] == 3.0
    assert 0 < face.slept[1] < 1


def test_retries_end(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/models", problem(429, "rate_limited", "later", retry_after="1"))
    with pytest.raises(RateLimited) as caught:
        face.finish(face.client.models.list())
    assert len(fake.asked) == 3
    assert caught.value.retry_after == 1.0


def test_a_wait_that_is_too_long_is_handed_on(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/models", problem(503, "unavailable", "down", retry_after="3600"))
    with pytest.raises(Unavailable):
        face.finish(face.client.models.list())
    assert face.slept == []


def test_a_create_is_sent_again_under_the_same_key_after_a_cut(face: Face, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/training-jobs", CUT, Reply(JOB, 202))
    job = face.finish(face.client.training_jobs.create(**RUN))
    keys = [one.headers["idempotency-key"] for one in fake.asked]
    assert job.id == "job_1"
    assert len(keys) == 2
    assert keys[0] == keys[1]
    face.finish(face.client.training_jobs.create(**RUN))
    assert fake.asked[2].headers["idempotency-key"] != keys[0]


def test_a_server_that_restarts_during_an_import_is_waited_for(face: Face, fake: FakeServer) -> None:
    away = problem(503, "unavailable", "restarting")
    fake.on("POST", "/api/v1/models/iris/versions", CUT, away, away, CUT, away, Reply(VERSION, 201))
    assert face.finish(face.client.models.import_("iris", source="package:x/y.gguf")).ref == "iris:1"
    assert len({one.headers["idempotency-key"] for one in fake.asked}) == 1
    fake.on("POST", "/api/v1/models/other/versions", away)  # it was never there
    with pytest.raises(Unavailable):
        face.finish(face.client.models.import_("other", source="package:x/y.gguf"))
    assert len(fake.requests("POST", "/api/v1/models/other/versions")) == 3
    ready = {**DEPLOYMENT, "status": "ready"}
    fake.on("GET", "/api/v1/deployments/iris", {**ready, "status": "updating"}, *[away] * 4, ready)
    assert face.finish(face.client.deployments.wait_ready("iris")).status == "ready"


def test_what_is_not_idempotent_is_not_sent_again_after_a_cut(face: Face, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/deployments/iris/rollback", CUT)
    with pytest.raises(Unavailable):
        face.finish(face.client.deployments.rollback("iris"))
    assert len(fake.asked) == 1


def test_no_server_is_unavailable_and_says_what_to_do(face: Face, fake: FakeServer) -> None:
    fake.close()
    with pytest.raises(Unavailable, match="modelworks up") as caught:
        face.finish(face.client.models.list())
    assert caught.value.code == "unreachable"
    assert len(face.slept) == 2


def test_a_stranger_at_the_port_is_told_from_modelworks(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/status", Reply(b"<html>hello</html>"))
    fake.on("GET", "/api/v1/jobs/job_1", {"hello": "world"})
    for call in (lambda: face.client.status(), lambda: face.client.jobs.get("job_1")):
        with pytest.raises(ModelworksError) as caught:
            face.finish(call())
        assert caught.value.code == "bad_answer"


def test_a_wrong_field_is_named_before_anything_is_sent(face: Face, fake: FakeServer) -> None:
    with pytest.raises(InvalidInput, match="kfold") as caught:
        face.finish(face.client.training_jobs.create(**RUN, validation={"kfold": 1}))
    assert caught.value.param == "validation.kfold"
    with pytest.raises(InvalidInput, match="targett"):
        face.finish(face.client.training_jobs.create(**RUN, targett="x"))
    assert fake.asked == []


# uploads and downloads


def test_upload_sends_the_file_and_reports_progress(face: Face, fake: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "Sales 2024.csv"
    file.write_bytes(b"a,b\n" + b"1,2\n" * 50_000)
    fake.on("POST", "/api/v1/datasets", Reply(DATASET, 201))
    seen: list[tuple[int, int | None]] = []
    upload = face.client.datasets.upload(
        file, schema={"columns": {"a": "category"}}, progress=lambda *at: seen.append(at)
    )
    assert face.finish(upload).ref == "iris:2"
    body = fake.asked[0].body
    assert b'name="name"\r\n\r\nSales-2024\r\n' in body
    assert b'{"columns": {"a": "category"}}' in body
    assert b'filename="Sales 2024.csv"' in body
    assert body.count(b"1,2\n") == 50_000
    assert [at for at, _ in seen] == sorted(at for at, _ in seen)
    assert seen[-1] == (200_004, 200_004)


def test_an_upload_that_was_cut_is_sent_again_whole(face: Face, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/datasets", CUT, Reply(DATASET, 201))
    face.finish(face.client.datasets.upload(io.BytesIO(b"a\n1\n"), name="x", filename="x.csv"))
    assert [b"\r\n\r\na\n1\n\r\n" in one.body for one in fake.asked] == [True, True]


def test_a_data_frame_is_sent_as_parquet_without_its_row_numbers(face: Face, fake: FakeServer) -> None:
    pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    frame = pandas.DataFrame({"a": [1.5, 2.5, 3.5], "b": ["x", "y", "z"]})
    fake.on("POST", "/api/v1/datasets", Reply(DATASET, 201))
    face.finish(face.client.datasets.upload(frame[frame.a > 2], name="x"))
    body = fake.asked[0].body
    start, stop = body.index(b"PAR1"), body.rindex(b"PAR1") + 4
    table = parquet.read_table(io.BytesIO(body[start:stop]))
    assert table.to_pydict() == {"a": [2.5, 3.5], "b": ["y", "z"]}


def test_a_source_is_a_form_field(face: Face, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/datasets", Reply(DATASET, 201))
    face.finish(face.client.datasets.create("sklearn:iris", name="iris"))
    assert b'name="source"\r\n\r\nsklearn:iris\r\n' in fake.asked[0].body


def test_a_long_ingest_is_waited_for(face: Face, fake: FakeServer) -> None:
    ingest = {**JOB, "kind": "ingest"}
    fake.on("POST", "/api/v1/datasets", Reply(ingest, 202))
    fake.on("GET", "/api/v1/jobs/job_1", ingest, {**ingest, "status": "succeeded", "result": {"dataset": "iris:2"}})
    fake.on("GET", "/api/v1/datasets/iris/versions/2", DATASET)
    assert face.finish(face.client.datasets.create("sklearn:iris", name="iris")).ref == "iris:2"


def test_a_missing_file_is_one_sentence(face: Face) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        face.finish(face.client.datasets.upload("/nowhere/x.csv"))
    with pytest.raises(InvalidInput, match="cannot be uploaded"):
        face.finish(face.client.datasets.upload(42, name="x"))


def test_export_writes_the_file_whole_or_not_at_all(face: Face, fake: FakeServer, tmp_path: Path) -> None:
    where = "/api/v1/models/iris/versions/1/export"
    fake.on("GET", "/api/v1/models/iris", {"name": "iris", "versions": [VERSION], "aliases": {"champion": 1}})
    fake.on("GET", where, Reply(b"package bytes", headers={"content-type": "application/octet-stream"}))
    written = face.finish(face.client.models.export("iris@champion", tmp_path))
    assert written == tmp_path / "iris-1.mwpkg"
    assert written.read_bytes() == b"package bytes"
    fake.on("GET", where, problem(404, "not_found", "gone"))
    with pytest.raises(NotFound):
        face.finish(face.client.models.export("iris:1", tmp_path / "other"))
    assert os.listdir(tmp_path) == ["iris-1.mwpkg"]


# waiting


def test_wait_tells_every_event_once_and_survives_a_server_that_restarts(face: Face, fake: FakeServer) -> None:
    away = problem(503, "unavailable", "restarting")
    fake.on("GET", "/api/v1/jobs/job_1", {**JOB, "status": "running", "progress": 0.5}, away, away, away, DONE)
    fake.on("GET", "/api/v1/jobs/job_1/events", page(event(1, "fold", "one")), page(event(2, "fold", "two")))
    told: list[str] = []
    shares: list[float] = []
    job = face.finish(
        face.client.training_jobs.wait(
            "job_1", on_event=lambda one: told.append(one.message), progress=lambda at: shares.append(at.progress)
        )
    )
    assert job.model_version == "iris:1"
    assert told == ["one", "two"]
    assert shares == [0.5, 1.0]
    assert [one.query["after"] for one in fake.requests("GET", "/api/v1/jobs/job_1/events")] == ["0", "1"]


def test_wait_raises_the_jobs_error(face: Face, fake: FakeServer) -> None:
    error = {"message": "the gate failed", "code": "gate_failed", "status": 400, "param": "gates", "detail": {}}
    fake.on("GET", "/api/v1/jobs/job_1", {**JOB, "status": "failed", "error": error})
    with pytest.raises(InvalidInput, match="the gate failed"):
        face.finish(face.client.training_jobs.wait("job_1"))
    assert face.finish(face.client.training_jobs.wait("job_1", check=False)).status == "failed"
    fake.on("GET", "/api/v1/jobs/job_1", {**JOB, "status": "cancelled"})
    with pytest.raises(Conflict, match="cancelled"):
        face.finish(face.client.training_jobs.wait("job_1"))


def test_wait_has_an_end(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/jobs/job_1", JOB)
    with pytest.raises(DeadlineExceeded, match="goes on"):
        face.finish(face.client.training_jobs.wait("job_1", timeout=0))


def test_a_report_that_nobody_renders_is_not_waited_for_for_ever(face: Face, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/reports/rep_1/plots/roc", Reply({**JOB, "kind": "render"}, 202), Reply(b"png"))
    with pytest.raises(DeadlineExceeded, match="job_1 is not final"):
        face.finish(face.client.reports.plot("rep_1", "roc", timeout=0))
    assert face.finish(face.client.reports.plot("rep_1", "roc", timeout=0)) == b"png"


def test_stream_goes_on_where_it_was_cut(face: Face, fake: FakeServer) -> None:
    where = "/api/v1/jobs/job_1/events/stream"
    fake.on(
        "GET",
        where,
        sse(event(1, "log", "one"), event(2, "fold", "two"), end=False),
        CUT,
        sse(event(3, "fold", "three")),
    )
    found = face.finish(face.client.jobs.stream("job_1"))
    assert [one.message for one in found] == ["one", "two", "three"]
    assert [one.headers.get("last-event-id") for one in fake.asked] == [None, "2", "2"]


def test_a_stream_in_which_nothing_was_said_survives_a_server_that_restarts(
    face: Face, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.on("GET", "/api/v1/jobs/job_1/events/stream", sse(end=False), CUT, sse(event(1, "log", "one")))
    seconds = iter([0.0, 40.0])  # begun; opened; then it is cut, 20 seconds after that
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: next(seconds, 60.0)))
    assert [one.message for one in face.finish(face.client.jobs.stream("job_1"))] == ["one"]


def test_stream_of_an_unknown_job_is_not_found(face: Face, fake: FakeServer) -> None:
    with pytest.raises(NotFound):
        face.finish(face.client.jobs.stream("job_9"))


def test_wait_ready_follows_a_deployment(face: Face, fake: FakeServer) -> None:
    where = "/api/v1/deployments/iris"
    fake.on("GET", where, {**DEPLOYMENT, "status": "creating"}, {**DEPLOYMENT, "status": "updating"}, DEPLOYMENT)
    assert face.finish(face.client.deployments.wait_ready("iris")).status == "ready"
    assert len(fake.asked) == 3
    fake.on("GET", where, {**DEPLOYMENT, "status": "failed", "message": "parity"})
    with pytest.raises(ModelworksError, match="parity") as caught:
        face.finish(face.client.deployments.wait_ready("iris"))
    assert caught.value.code == "deployment_failed"


def test_predictions_are_typed(face: Face, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/deployments/iris/predict", PREDICTION)
    found = face.finish(face.client.deployments.predict("iris", [{"petal": 1.0}]))
    assert found.outputs[0].label == "setosa"
    assert found.outputs[0].probabilities == {"setosa": 0.98, "other": 0.02}
    assert found.model == "iris:1"


def test_a_new_keys_secret_is_not_in_its_repr(face: Face, fake: FakeServer) -> None:
    made = {"id": "key_1", "project_id": "p", "name": "ci", "role": "viewer", "hint": "cret", "key": "mw_secret"}
    fake.on("POST", "/api/v1/keys", Reply(made, 201))
    key = face.finish(face.client.keys.create(name="ci", role="viewer"))
    assert key.key == "mw_secret"
    assert "mw_secret" not in repr(key)
