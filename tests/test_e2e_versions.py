"""Versions of a dataset through a real server: edited, compared, deleted; what is in use stays."""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys

import pytest

from modelworks.core.errors import Conflict, InvalidInput, NotFound
from tests.server import RunningServer, until


def people(count: int = 120) -> bytes:
    chance = random.Random(3)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "age", "city", "ill"])
    for number in range(count):
        age = chance.randint(20, 80)
        writer.writerow([f"p{number}", age, chance.choice(["oslo", "rome"]), "yes" if age > 50 else "no"])
    return out.getvalue().encode()


@pytest.fixture(scope="module")
def house(running: RunningServer) -> RunningServer:
    running.client.datasets.upload(people(), name="people")
    return running


def test_edits_make_a_version_and_a_diff_tells_them(house: RunningServer) -> None:
    client = house.client
    made = client.datasets.edit(
        "people:1",
        [
            {"op": "set", "column": "city", "value": "bergen", "where": {"city": "oslo"}},
            {"op": "set", "column": "age", "value": 99, "rows": [1, 2, 3]},
            {"op": "drop", "where": {"id": ["p10", "p11"]}},
            {"op": "split", "shares": {"train": 0.75, "test": 0.25}, "stratify": "ill"},
        ],
    )
    assert (made.ref, made.rows, made.source) == ("people:2", 118, "edit of people:1")
    assert [column.name for column in made.columns] == ["id", "age", "city", "ill", "split"]
    found = client.datasets.diff("people", 1, 2, key="id")
    assert (found["name"], found["from"], found["to"]) == ("people", 1, 2)
    assert {word: found["rows"][word] for word in ("from", "to", "added", "removed")} == {
        "from": 120, "to": 118, "added": 0, "removed": 2,
    }  # fmt: skip
    assert found["changed_values"]["age"] == 3
    assert [column["name"] for column in found["columns"]["added"]] == ["split"]
    moved = {one["name"]: one["moved"] for one in found["distributions"]}
    assert (moved["city"], moved["ill"]) == (True, False)
    assert sorted(one["values"]["id"] for one in found["samples"]["removed"]) == ["p10", "p11"]
    assert found["samples"]["changed"][0]["columns"]["age"]["to"] == 99
    whole = client.datasets.diff("people", 1, 2)
    with house.http() as http:
        assert http.get("/api/v1/datasets/people/diff", params={"to": 2}).json() == whole
    assert whole["rows"]["changed"] is None
    assert whole["rows"]["unchanged"] + whole["rows"]["removed"] == 120
    jobs = client.jobs.list(kind="diff", limit=100)
    assert client.datasets.diff("people", 1, 2) == whole
    assert len(client.jobs.list(kind="diff", limit=100)) == len(jobs), "the same question was computed twice"


def test_the_same_edit_again_is_the_same_version(house: RunningServer) -> None:
    edits = [{"op": "rename", "column": "city", "name": "town"}]
    first = house.client.datasets.edit("people:1", edits)
    assert house.client.datasets.edit("people:1", edits).ref == first.ref


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"edits": []}, "edits"),
        ({"edits": [{"op": "melt"}]}, "edits.0.op"),
        ({"edits": [{"op": "set", "column": "age"}]}, "edits.0"),
        ({"edits": [{"op": "set", "column": "agee", "value": 3}]}, "edits[0]"),
        ({"edits": [{"op": "set", "column": "age", "value": "old"}]}, "edits[0]"),
        ({"edits": [{"op": "set", "column": "age", "value": 1, "rows": [9999]}]}, "edits[0]"),
        ({"edits": [{"op": "drop", "where": {"nothing": 1}}]}, "edits[0]"),
        ({"edits": [{"op": "drop", "where": {"city": "atlantis"}}]}, "edits[0]"),
        ({"edits": [{"op": "drop", "where": {"ill": ["yes", "no"]}}]}, "edits"),
        ({"edits": [{"op": "split", "shares": {"a": 0.5}}]}, "edits.0"),
        ({"version": 77, "edits": [{"op": "drop", "rows": [1]}]}, "dataset"),
    ],
)
def test_a_bad_edit_is_named_and_changes_nothing(house: RunningServer, body: dict, param: str) -> None:
    before = house.client.datasets.versions("people")
    with house.http() as http:
        answer = http.post("/api/v1/datasets/people/edits", json={"version": 1, **body})
    assert answer.status_code == (404 if param == "dataset" else 400), answer.text
    assert answer.json()["param"] == param, answer.text
    assert house.client.datasets.versions("people") == before


@pytest.mark.parametrize("query", ["from=x", "from=1&to=x", "from=0&to=1", "from=1&to=999", "from=1&to=1&key=zip"])
def test_a_bad_diff_is_a_4xx(house: RunningServer, query: str) -> None:
    with house.http() as http:
        assert http.get(f"/api/v1/datasets/people/diff?{query}").status_code == (404 if "999" in query else 400)
        assert http.get("/api/v1/datasets/nobody/diff?from=1&to=1").status_code == 404
    with pytest.raises(InvalidInput, match="is no key"):
        house.client.datasets.diff("people", 1, 1, key="city")


def test_what_is_in_use_is_not_deleted_and_numbers_are_not_given_twice(house: RunningServer) -> None:
    client = house.client
    first = client.datasets.upload(people(60), name="gone")
    job = client.training_jobs.create(model="gone", dataset="gone:1", target="ill", algorithm="logistic-regression")
    assert client.training_jobs.wait(job).status == "succeeded"
    second = client.datasets.edit("gone", [{"op": "drop", "rows": [1]}])
    with pytest.raises(Conflict, match="gone:1 is what model version gone:1 was trained on"):
        client.datasets.delete("gone:1")
    assert client.datasets.delete("gone:2") == (2,)
    with pytest.raises(NotFound):
        client.datasets.get("gone:2")
    third = client.datasets.edit("gone", [{"op": "drop", "rows": [2]}])
    assert (first.version, second.version, third.version) == (1, 2, 3)
    assert client.datasets.delete("gone", force=True) == (1, 3)
    with pytest.raises(NotFound):
        client.datasets.delete("gone")
    assert client.datasets.upload(people(60), name="gone").version == 4


def test_a_model_version_in_use_stays_and_its_number_is_not_given_twice(house: RunningServer) -> None:
    client = house.client
    client.datasets.upload(people(60), name="spare")

    def trained(strength: float) -> str:
        job = client.training_jobs.create(
            model="spare", dataset="spare", target="ill", algorithm="logistic-regression", hyperparameters={"C": strength}
        )
        return str(client.training_jobs.wait(job).model_version)

    assert [trained(1.0), trained(2.0)] == ["spare:1", "spare:2"]
    client.models.set_alias("spare", "champion", 1)
    client.deployments.put("spare", model="spare:2")
    with pytest.raises(Conflict, match="spare:1 is what alias spare@champion points at"):
        client.models.delete("spare:1")
    with pytest.raises(Conflict, match="spare:2 is in use by deployment spare"):
        client.models.delete("spare:2")
    with pytest.raises(Conflict):
        client.models.delete("spare")
    assert len(client.models.get("spare").versions) == 2, "a refusal deleted some"
    client.models.delete_alias("spare", "champion")
    with house.http(client.keys.create(name="viewer-of-spare", role="viewer").key) as http:
        assert http.delete("/api/v1/models/spare/versions/1").status_code == 403
    with house.http() as http:
        answer = http.delete("/api/v1/models/spare/versions/1")
        assert (answer.status_code, answer.json()) == (200, {"deleted": True, "name": "spare", "versions": [1]})
        assert http.get("/api/v1/models/spare/versions/1").status_code == 404
        assert http.delete("/api/v1/models/spare/versions/1").status_code == 404
        audit = http.get("/api/v1/audit").json()["data"]
    assert [row["object"] for row in audit if row["action"] == "models.delete"] == ["spare:1"]
    client.deployments.delete("spare")
    until(lambda: "spare" not in [one.name for one in client.deployments.list(limit=100)], 20)
    assert client.models.delete("spare") == (2,)
    assert trained(1.0) == "spare:3"


def test_the_command_line(house: RunningServer) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "modelworks.cli", "data", *arguments, "--url", house.url, "--api-key", house.key]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = run("edit", "people:1", "--set", "city=turin", "--rows", "5,7-8")
    ref = made.split(":")[1]
    assert "3 changed" in run("diff", "people:1", ref, "--key", "id")
    assert f"version {ref}" in run("delete", f"people:{ref}")
