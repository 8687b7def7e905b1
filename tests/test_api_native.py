"""The lifecycle API over HTTP: the use cases behind it are real, the worker's part is played by the test."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from modelworks.api import waiting
from modelworks.core.types import Column, Dataset, Job, JobEvent, ModelVersion, Signature
from tests.api_house import ROW, House, house, read_all
from tests.server import until

CSV = b"length,species\n5.1,setosa\n4.9,setosa\n"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home")) as found:
        yield found


def keep_dataset(api: House, name: str, version: int = 1) -> Dataset:
    with api.services.catalog.write() as tx:
        return tx.add(
            Dataset(
                project_id=api.admin.project_id,
                name=name,
                version=version,
                digest="d" * 64,
                blob="b" * 64,
                rows=2,
                size=10,
                columns=[Column(name="length", type="number"), Column(name="species", type="category")],
                profile={"rows": 2, "mean": float("nan")},
            )
        )


def keep_model(api: House, name: str, version: int = 1) -> ModelVersion:
    with api.services.catalog.write() as tx:
        return tx.add(
            ModelVersion(
                project_id=api.admin.project_id,
                name=name,
                version=version,
                digest="d" * 64,
                task="tabular-classification",
                signature=Signature(inputs=[], outputs=[]),
                size=10,
            )
        )


def keep_job(api: House, **fields: Any) -> Job:
    with api.services.catalog.write() as tx:
        return tx.add(Job(project_id=api.admin.project_id, kind="train", spec={}, **fields))


def tell(api: House, job: Job, seq: int, kind: str = "log", message: str = "") -> None:
    with api.services.catalog.write() as tx:
        tx.add(JobEvent(job_id=job.id, seq=seq, kind=kind, message=message or f"line {seq}"))


def end(api: House, job_id: str, status: str = "succeeded", **fields: Any) -> None:
    with api.services.catalog.write() as tx:
        job = tx.get(Job, job_id)
        if job.status == "queued":
            job = tx.update(job, status="running")
        tx.update(job, status=status, **fields)


def worker(api: House, name: str, **outcome: Any) -> threading.Thread:
    """Ends the job that makes `name`, as a worker would."""

    def run() -> None:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            with api.services.catalog.read() as tx:
                found = [job for job in tx.list(Job, status="queued") if job.spec.get("name") == name]
            if found:
                end(api, found[0].id, **outcome)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_an_upload_waits_for_its_ingest_and_answers_the_dataset(api: House) -> None:
    kept = keep_dataset(api, "waited")
    thread = worker(api, "waited", result={"dataset": kept.ref})
    with api.client() as client:
        answer = client.post(
            "/api/v1/datasets",
            data={"name": "waited", "schema": '{"columns": {"species": "text"}}'},
            files={"file": ("../../etc/passwd.csv", CSV)},
        )
    thread.join()
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == "/api/v1/datasets/waited/versions/1"
    body = answer.json()
    assert body["columns"][0] == {"name": "length", "type": "number", "nullable": False}
    assert body["profile"]["mean"] is None
    assert "blob" not in body
    with api.services.catalog.read() as tx:
        job = tx.list(Job, kind="ingest", newest_first=True)[0]
    assert job.spec["filename"] == "passwd.csv"
    assert job.spec["schema"]["columns"] == {"species": "text"}
    assert (api.home / "blobs" / job.spec["upload"][:2] / job.spec["upload"]).read_bytes() == CSV
    assert not list((api.home / "tmp").iterdir())


def test_the_error_of_an_ingest_is_the_answer(api: House) -> None:
    error = {
        "message": "row 3, column 'a': not a number",
        "code": "bad_row",
        "param": "a",
        "status": 400,
        "detail": {"row": 3},
    }
    thread = worker(api, "broken", status="failed", error=error)
    with api.client() as client:
        answer = client.post("/api/v1/datasets", data={"name": "broken"}, files={"file": ("x.csv", CSV)})
    thread.join()
    assert answer.status_code == 400
    assert answer.json()["detail"] == error["message"]
    assert (answer.json()["code"], answer.json()["row"]) == ("bad_row", 3)


def test_a_long_ingest_answers_202_with_the_job(api: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_SECONDS", 0.1)
    with api.client() as client:
        answer = client.post("/api/v1/datasets", data={"name": "slow", "source": "sklearn:iris"})  # urlencoded
        assert answer.status_code == 202
        job = client.get(answer.headers["location"]).json()
        assert (job["kind"], job["status"], job["spec"]["source"]) == ("ingest", "queued", "sklearn:iris")
        client.post(f"/api/v1/jobs/{job['id']}/cancel")


def test_an_upload_with_the_same_idempotency_key_is_made_once(api: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_SECONDS", 0.0)
    with api.client() as client:
        send = {"headers": {"idempotency-key": "once"}}
        first = client.post("/api/v1/datasets", data={"name": "once"}, files={"file": ("x.csv", CSV)}, **send)
        again = client.post("/api/v1/datasets", data={"name": "once"}, files={"file": ("x.csv", CSV)}, **send)
        other = client.post(
            "/api/v1/datasets", data={"name": "once"}, files={"file": ("x.csv", CSV + b"1,b\n")}, **send
        )
        client.post(f"/api/v1/jobs/{first.json()['id']}/cancel")
    assert first.json()["id"] == again.json()["id"]
    assert other.status_code == 422


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, {"file": ("x.csv", CSV)}, "name"),
        ({"name": "x"}, None, "file"),
        ({"name": "x", "source": "sklearn:iris"}, {"file": ("x.csv", CSV)}, "file"),
        ({"name": "x", "sauce": "sklearn:iris"}, None, "sauce"),
        ({"name": "../x"}, {"file": ("x.csv", CSV)}, "name"),
        ({"name": "x", "source": "/etc/passwd"}, None, "source"),
        ({"name": "x", "source": "file:///etc/passwd"}, None, "source"),
        ({"name": "x", "schema": "{"}, {"file": ("x.csv", CSV)}, "schema"),
        ({"name": "x", "schema": '{"columns": {"a": "nonsense"}}'}, {"file": ("x.csv", CSV)}, "schema.columns.a"),
        ({"name": "x"}, {"upload": ("x.csv", CSV)}, "file"),
    ],
)
def test_forms_that_are_wrong_are_400_and_name_the_field(api: House, data: Any, files: Any, param: str) -> None:
    with api.client() as client:
        answer = client.post("/api/v1/datasets", data=data, files=files)
    assert answer.status_code == 400, answer.text
    assert answer.json()["param"] == param, answer.json()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.csv"\r\n\r\nabc',
        b"--b\r\n\r\nabc\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\xfe\r\n--b--\r\n',
        b"--b\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(100)) + b"\r\nabc\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="' + b"a" * 10_000 + b'"\r\n\r\nabc\r\n--b--\r\n',
        b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\na\r\n' % i for i in range(50))
        + b"--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + b"a" * 1_100_000 + b"\r\n--b--\r\n",
    ],
)
def test_malformed_multipart_is_400_and_leaves_nothing(api: House, body: bytes) -> None:
    with api.client() as client:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post("/api/v1/datasets", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert not list((api.home / "tmp").iterdir())


def test_datasets_are_listed_and_read_by_version(api: House) -> None:
    for version in (1, 2):
        keep_dataset(api, "two", version)
    keep_dataset(api, "one")
    with api.client() as client:
        assert client.get("/api/v1/datasets/two").json()["versions"] == [1, 2]
        assert client.get("/api/v1/datasets/two").json()["version"] == 2
        assert client.get("/api/v1/datasets/two/versions/1").json()["version"] == 1
        assert client.get("/api/v1/datasets/two/versions/9").status_code == 404
        assert client.get("/api/v1/datasets/two/versions/0").status_code == 400
        first = client.get("/api/v1/datasets?limit=1").json()
        assert first["object"] == "list"
        assert first["has_more"]
        assert first["first_id"] == first["last_id"] == first["data"][0]["id"]
        rest = client.get(f"/api/v1/datasets?limit=100&after={first['last_id']}").json()
        assert first["last_id"] not in [item["id"] for item in rest["data"]]
        for query in ("limit=0", "limit=101", "limit=x", "after=%27%20OR%201=1", "limit=1;drop"):
            assert client.get(f"/api/v1/datasets?{query}").status_code == 400, query


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_training_is_queued_and_its_errors_name_the_field(api: House) -> None:
    keep_dataset(api, "learn")
    spec = {"model": "m", "dataset": "learn", "target": "species", "algorithm": "logistic-regression"}
    with api.client() as client:
        answer = client.post("/api/v1/training-jobs", json=spec)
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/api/v1/training-jobs/{answer.json()['id']}"
        assert client.get(answer.headers["location"]).json()["spec"]["dataset"] == "learn:1"
        assert not Job.HIDDEN & answer.json().keys()
        cases = {
            "target": {k: v for k, v in spec.items() if k != "target"},
            "algoritm": {**spec, "algoritm": "x"},
            "validation.kfold": {**spec, "validation": {"kfold": 1}},
            "seed": {**spec, "seed": -1},
            "model": {**spec, "model": "../../etc"},
            "dataset": {**spec, "dataset": "nothere"},
        }
        for param, body in cases.items():
            wrong = client.post("/api/v1/training-jobs", json=body)
            assert wrong.status_code == (404 if param == "dataset" else 400), param
            assert wrong.json()["param"] == param, wrong.json()
            assert repr(param) in wrong.json()["detail"] or param == "dataset"
        several = client.post("/api/v1/training-jobs", json={"status": "succeeded", "project_id": "proj_x"}).json()
        # whether a target is needed depends on the algorithm
        assert {"model", "dataset", "algorithm", "status", "project_id"} == {
            item["param"] for item in several["errors"]
        }
        assert client.post("/api/v1/training-jobs").json()["detail"].startswith("this request needs a JSON body")
        assert client.post("/api/v1/training-jobs", content=b"[1]").json()["detail"] == "the body must be a JSON object"


def test_a_job_is_steered_and_conflicts_are_not_to_be_retried(api: House) -> None:
    job = keep_job(api)
    base = f"/api/v1/training-jobs/{job.id}"
    with api.client() as client:
        assert client.post(f"{base}/pause").json()["status"] == "paused"
        assert client.post(f"{base}/resume").json()["status"] == "queued"
        assert client.post(f"{base}/cancel").json()["status"] == "cancelled"
        assert client.post(f"{base}/cancel").status_code == 202
        refused = client.post(f"{base}/pause")
        assert refused.status_code == 409
        assert refused.headers["x-should-retry"] == "false"
        listed = client.get("/api/v1/jobs?kind=train&status=cancelled").json()["data"]
        assert job.id in [item["id"] for item in listed]
        assert client.get("/api/v1/jobs?kind=nonsense").status_code == 400
        assert client.get(f"/api/v1/evaluations/{job.id}").status_code == 404
        assert client.get("/api/v1/training-jobs/job_000").status_code == 404


def test_events_are_listed_by_number(api: House) -> None:
    job = keep_job(api)
    for seq in range(1, 6):
        tell(api, job, seq)
    with api.client() as client:
        found = client.get(f"/api/v1/jobs/{job.id}/events?after=1&limit=2").json()
        assert [item["seq"] for item in found["data"]] == [2, 3]
        assert found["has_more"]
        assert not client.get(f"/api/v1/jobs/{job.id}/events?after=3").json()["has_more"]
        chosen = client.get(f"/api/v1/jobs/{job.id}/events?kind=status&kind=error").json()["data"]
        whole = client.get(f"/api/v1/jobs/{job.id}/events").json()["data"]
        assert chosen == [one for one in whole if one["kind"] in ("status", "error")]
        assert client.get(f"/api/v1/jobs/{job.id}/events?kind=fold").json()["data"] == [
            one for one in whole if one["kind"] == "fold"
        ]
        assert client.get(f"/api/v1/jobs/{job.id}/events?kind=nonsense").status_code == 400
        assert client.get(f"/api/v1/jobs/{job.id}/log").headers["content-type"].startswith("text/plain")


def test_events_stream_until_the_job_ends_and_resume_by_last_event_id(api: House) -> None:
    job = keep_job(api)
    tell(api, job, 1)
    tell(api, job, 2, message="two\nlines\r\nid: 99\n\nevent: forged")
    url = f"/api/v1/training-jobs/{job.id}/events/stream"
    lines: list[str] = []
    with api.client() as client, client.stream("GET", url) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            lines.append(line)
            if line.startswith("id: 2"):
                tell(api, job, 3)
                end(api, job.id)
    assert [line for line in lines if line.startswith("id:")] == ["id: 1", "id: 2", "id: 3"]
    assert lines.count("event: end") == 1
    assert "event: forged" not in lines
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data:")]
    assert data[1]["message"] == "two\nlines\r\nid: 99\n\nevent: forged"
    assert data[-1] == {"status": "succeeded"}
    with api.client() as client:
        rest = client.get(url, headers={"last-event-id": "2"}).text
        assert "id: 3" in rest
        assert "id: 2" not in rest
        assert client.get(url, headers={"last-event-id": "x"}).status_code == 400
        assert client.get("/api/v1/jobs/job_000/events/stream").status_code == 404
        assert client.head(url).status_code == 405


def test_a_stream_stops_when_its_client_leaves(api: House) -> None:
    job = keep_job(api)
    asked: list[float] = []
    library = api.services.library
    events = library.events

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(time.monotonic())
        return events(*args, **kwargs)

    library.events = counted  # type: ignore[method-assign]
    try:
        with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
            connection.sendall(api.head("GET", f"/api/v1/jobs/{job.id}/events/stream"))
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.4)
        assert asked
        time.sleep(0.3)
        before = len(asked)
        time.sleep(1.2)
        assert len(asked) == before, "the catalog is still asked"
    finally:
        library.events = events  # type: ignore[method-assign]


# -- models and deployments --------------------------------------------------------------------------------------------


def test_models_aliases_and_deployments(api: House) -> None:
    for version in (1, 2):
        keep_model(api, "iris", version)
    with api.client() as client:
        assert client.put("/api/v1/models/iris/aliases/champion", json={"version": 1}).json()["version"] == 1
        model = client.get("/api/v1/models/iris").json()
        assert (model["name"], [item["version"] for item in model["versions"]]) == ("iris", [1, 2])
        assert model["aliases"] == {"champion": 1}
        assert client.get("/api/v1/models/none").status_code == 404
        assert client.put("/api/v1/models/iris/aliases/champion", json={"version": 7}).status_code == 404

        put = client.put("/api/v1/deployments/iris", json={"model": "iris@champion"})
        assert (put.status_code, put.headers["location"]) == (202, "/api/v1/deployments/iris")
        assert (put.json()["model_version"], put.json()["spec_revision"]) == ("iris:1", 1)
        with api.services.catalog.write() as tx:
            tx.update(api.services.deployments.get(api.caller(), "iris"), status="ready")
        client.put("/api/v1/deployments/iris", json={"model": "iris:2"})
        with api.services.catalog.write() as tx:
            tx.update(api.services.deployments.get(api.caller(), "iris"), status="ready")
        assert client.post("/api/v1/deployments/iris/rollback").json()["model_version"] == "iris:1"
        revisions = client.get("/api/v1/deployments/iris/revisions").json()
        assert [item["number"] for item in revisions["data"]] == [1, 2, 3]
        assert client.post("/api/v1/deployments/iris/rollback", json={"revision": 9}).status_code == 400
        assert client.get("/api/v1/deployments/iris/replicas").json()["data"] == []
        assert client.get("/api/v1/deployments/iris/logs").status_code == 200
        status = client.get("/api/v1/status").json()
        assert status["deployments"][0]["name"] == "iris"
        assert client.delete("/api/v1/deployments/iris").status_code == 202
        assert client.delete("/api/v1/models/iris/aliases/champion").json() == {"id": "champion", "deleted": True}
        actions = [item["action"] for item in client.get("/api/v1/audit?limit=100").json()["data"]]
        assert "deployments.put" in actions


def test_an_export_is_streamed_and_its_file_removed(api: House, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_model(api, "exported")

    def export(caller: Any, ref: str, out: Any) -> Any:
        assert ref == "exported:1"
        out.write_bytes(b"package")
        return out

    monkeypatch.setattr(api.services.library, "export_version", export)
    with api.client() as client:
        answer = client.get("/api/v1/models/exported/versions/1/export")
        assert answer.content == b"package"
        assert 'filename="exported-1' in answer.headers["content-disposition"]
    assert until(lambda: not list((api.home / "tmp").iterdir()), 10.0)


def test_an_imported_version_is_answered(api: House) -> None:
    keep_model(api, "own")
    thread = worker(api, "own", model_version="own:1")
    with api.client() as client:
        files = {"file": ("m.onnx", b"\x08\x07")}
        fields = {"task": "tabular-classification", "classes": '["a", "b"]', "licence": "MIT"}
        answer = client.post("/api/v1/models/own/versions", data=fields, files=files)
        thread.join()
        assert answer.status_code == 201, answer.text
        assert answer.json()["name"] == "own"
        for classes in ("[", "{}", "[]", "[[1]]", "[NaN]"):
            wrong = client.post("/api/v1/models/own/versions", data={"classes": classes}, files=files)
            assert (wrong.status_code, wrong.json()["param"]) == (400, "classes")


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc", "%2e%2e", "a%00b", ";$(id)", "'%20OR%201=1--", "a" * 101, "{{7*7}}", "%ff"]
)
def test_hostile_names_in_paths_are_refused(api: House, name: str) -> None:
    with api.client() as client:
        for path in ("models", "datasets", "deployments", "jobs", "keys"):
            for method in ("GET", "DELETE"):
                assert client.request(method, f"/api/v1/{path}/{name}").status_code in (400, 404, 405)


# -- predict -----------------------------------------------------------------------------------------------------------

PREDICT = "/api/v1/deployments/iris/predict"


def test_predict_answers_rows_with_the_model_and_the_request_id(api: House) -> None:
    with api.client("invoke-only") as client:
        answer = client.post(PREDICT, json={"inputs": [ROW, {**ROW, "length": None}]}, headers={"x-request-id": "r1"})
    assert answer.status_code == 200, answer.text
    row = {"label": "b", "probabilities": {"a": 0.25, "b": 0.75}}
    assert answer.json() == {"outputs": [row, row], "model": "iris:1", "request_id": "r1"}
    call = api.router.calls[-1]
    assert [tensor.name for tensor in call.inputs] == ["length", "colour", "count", "ripe"]
    assert call.deadline > time.monotonic()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{}", "inputs"),
        (b'{"inputs": []}', "inputs"),
        (b'{"inputs": {}}', "inputs"),
        (b'{"inputs": [[1]]}', "inputs[0]"),
        (b'{"inputs": [{}]}', "length"),
        (b'{"inputs": [{"length": 1, "colour": "red", "count": 3}]}', "ripe"),
        (b'{"inputs": [{"length": 1, "colour": "red", "count": 3, "ripe": true, "weight": 1}]}', "weight"),
        (b'{"inputs": [{"length": "long", "colour": "red", "count": 3, "ripe": true}]}', "length"),
        (b'{"inputs": [{"length": 1, "colour": null, "count": 3, "ripe": true}]}', "colour"),
        (b'{"inputs": [{"length": [[1]], "colour": "red", "count": 3, "ripe": true}]}', "length"),
        (b'{"inputs": [{"length": NaN, "colour": "red", "count": 3, "ripe": true}]}', "JSON"),
        (b'{"inputs": [{"length": 1, "colour": "red", "count": 3, "ripe": true}], "status": "x"}', "status"),
        (b"", "JSON"),
    ],
)
def test_predict_refuses_what_does_not_fit_and_names_it(api: House, body: bytes, named: str) -> None:
    with api.client() as client:
        answer = client.post(PREDICT, content=body)
    assert answer.status_code == 400
    assert named in answer.json()["detail"]


def test_predict_bounds_the_number_of_rows(api: House) -> None:
    with api.client() as client:
        answer = client.post(PREDICT, content=b'{"inputs": [' + b"{}," * 65_536 + b"{}]}")
    assert (answer.status_code, answer.json()["code"]) == (400, "too_many_rows")


def test_a_call_is_aborted_when_its_client_leaves(api: House) -> None:
    api.router.hold = True
    try:
        body = json.dumps({"inputs": [ROW]}).encode()
        with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection:
            before = len(api.router.calls)
            connection.sendall(api.head("POST", PREDICT, f"content-length: {len(body)}") + body)
            while len(api.router.calls) == before:
                time.sleep(0.01)
            assert not api.router.aborted
        until = time.monotonic() + 3
        while not api.router.aborted and time.monotonic() < until:
            time.sleep(0.01)
        assert api.router.aborted
    finally:
        api.router.hold = False


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_unexpected_error_says_nothing_but_the_request_id(api: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"secret at {api.home}")

    monkeypatch.setattr(api.services.library, "models", broken)
    monkeypatch.setattr(api.services.gateway, "route", broken)
    with api.client() as client:
        for method, path in (("GET", "/api/v1/models"), ("GET", "/v2/models/iris"), ("POST", PREDICT)):
            answer = client.request(method, path, json={"inputs": [ROW]} if method == "POST" else None)
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert str(api.home) not in answer.text
            assert "Traceback" not in answer.text
            assert "request id" in answer.text
            assert answer.headers["x-request-id"]


def test_keys_are_shown_once_and_never_stored_by_caches(api: House) -> None:
    with api.client() as client:
        made = client.post("/api/v1/keys", json={"name": "new", "role": "viewer"})
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        assert made.json()["key"].startswith("mw_")
        assert "digest" not in made.json()
        listed = client.get("/api/v1/keys").text
        assert made.json()["key"] not in listed
        assert "digest" not in listed
        whoami = client.get("/api/v1/whoami", headers={"authorization": f"Bearer {made.json()['key']}"}).json()
        assert whoami["role"] == "viewer"
        assert client.delete(f"/api/v1/keys/{made.json()['id']}").json()["revoked_at"]


def test_users_projects_and_members(api: House) -> None:
    with api.client() as client:
        user = client.post("/api/v1/users", json={"name": "ada"}).json()
        project = client.post("/api/v1/projects", json={"name": "lab"}).json()
        assert client.post("/api/v1/projects", json={"name": "lab"}).status_code == 409
        for where in (project["id"], "lab"):
            put = client.put(f"/api/v1/projects/{where}/members/{user['id']}", json={"role": "viewer"})
            assert put.json()["role"] == "viewer"
        there = client.get("/api/v1/memberships", headers={"x-project": "lab"}).json()
        assert [item["user_id"] for item in there["data"]] == [user["id"]]
        assert client.delete(f"/api/v1/projects/lab/members/{user['id']}").json()["deleted"]
        assert client.delete(f"/api/v1/users/{user['id']}").json()["disabled"]


def test_the_server_stops_while_a_stream_is_open(tmp_path: Any) -> None:
    with house(tmp_path / "home") as found:
        job = keep_job(found)
        with socket.create_connection(("127.0.0.1", found.port), timeout=5) as connection:
            connection.sendall(found.head("GET", f"/api/v1/jobs/{job.id}/events/stream"))
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            before = time.monotonic()
            found.extra["server"].should_exit = True
            assert read_all(connection).endswith(b"0\r\n\r\n")
            assert time.monotonic() - before < 2
