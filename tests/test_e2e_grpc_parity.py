"""Every method of modelworks.v1 says what REST says of the same thing."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from modelworks.api.grpc.messages import POOL, message
from tests.server import RunningServer, until

ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}
STREAMED = {"Upload", "FollowEvents"}  # test_e2e_grpc.py
EPHEMERAL = {"request_id", "object", "updated_at", "last_id", "first_id", "revision_at", "heartbeat_at"}


class Both:
    """The same question over both carriers."""

    def __init__(self, server: RunningServer) -> None:
        self.http = server.http()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}")
        self.metadata = (("authorization", f"Bearer {server.key}"),)
        self.asked: set[str] = set()

    def rpc(self, path: str, **fields: Any) -> dict[str, Any]:
        """The answer as JSON has it."""
        service, _, name = path.partition("/")
        method = POOL.FindServiceByName(f"modelworks.v1.{service}").methods_by_name[name]
        data = json_format.ParseDict(fields, message(method.input_type.full_name)()).SerializeToString()
        call = self.channel.unary_unary(f"/modelworks.v1.{path}")
        found = message(method.output_type.full_name).FromString(call(data, metadata=self.metadata, timeout=60))
        self.asked.add(path)
        return json_format.MessageToDict(found, preserving_proto_field_name=True)

    def rest(self, path: str, verb: str = "GET", body: Any = None) -> Any:
        answer = self.http.request(verb, path, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def same(self, path: str, fields: dict[str, Any], url: str) -> None:
        unlike = differing(plain(self.rpc(path, **fields)), plain(self.rest(url)), path)
        assert not unlike, unlike

    def refused_alike(self, path: str, fields: dict[str, Any], verb: str, url: str, body: Any = None) -> None:
        answer = self.http.request(verb, url, json=body)
        with pytest.raises(grpc.RpcError) as caught:
            self.rpc(path, **fields)
        trailing = dict(caught.value.trailing_metadata())
        assert answer.status_code >= 400
        here = (trailing["x-error-code"], caught.value.details())
        assert here == (answer.json()["code"], answer.json()["detail"]), path


def plain(value: Any) -> Any:
    """Without what is empty, which protobuf leaves out; whole numbers as int, 64-bit ones, which come as text, too."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item not in (None, "", [], {}, False, 0, "0")}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differing(here: Any, there: Any, at: str) -> list[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        found = []
        for key in (here.keys() | there.keys()) - EPHEMERAL:
            if key not in here or key not in there:
                found.append(f"{at}.{key} only over {'gRPC' if key in here else 'REST'}")
            else:
                found += differing(here[key], there[key], f"{at}.{key}")
        return found
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        return [
            line
            for number, pair in enumerate(zip(here, there, strict=True))
            for line in differing(*pair, f"{at}[{number}]")
        ]
    return [] if here == there else [f"{at}: {str(here)[:80]} over gRPC, {str(there)[:80]} over REST"]


def test_every_method_says_what_rest_says(iris: RunningServer) -> None:
    both = Both(iris)
    job = next(one.id for one in iris.client.training_jobs.list(status="succeeded") if one.model_version == "iris:1")
    spec = {"model": "iris:1", "method": {"holdout": 0.3}, "seed": 7}
    evaluation = both.rpc("Evaluation/Create", **spec)["id"]
    until(lambda: both.rest(f"/api/v1/evaluations/{evaluation}")["status"] == "succeeded", 30)
    report = both.rest(f"/api/v1/evaluations/{evaluation}")["result"]["report_id"]
    asks: list[tuple[str, dict[str, Any], str]] = [
        ("Datasets/Get", {"dataset": "iris:1"}, "/api/v1/datasets/iris/versions/1"),
        ("Datasets/List", {"limit": 2}, "/api/v1/datasets?limit=2"),
        ("Training/Get", {"id": job}, f"/api/v1/training-jobs/{job}"),
        ("Training/List", {"limit": 3, "status": "succeeded"}, "/api/v1/training-jobs?limit=3&status=succeeded"),
        ("Training/ListEvents", {"id": job, "limit": 5}, f"/api/v1/training-jobs/{job}/events?limit=5"),
        (
            "Training/ListEvents",
            {"id": job, "after": 1, "kinds": ["status", "fold"]},
            f"/api/v1/training-jobs/{job}/events?after=1&kind=status&kind=fold",
        ),
        ("Training/ListAlgorithms", {}, "/api/v1/algorithms"),
        ("Training/ListTransforms", {}, "/api/v1/transforms"),
        ("Training/ListMetrics", {}, "/api/v1/metrics"),
        ("Evaluation/Get", {"id": evaluation}, f"/api/v1/evaluations/{evaluation}"),
        ("Evaluation/List", {"limit": 3}, "/api/v1/evaluations?limit=3"),
        ("Evaluation/GetReport", {"id": report}, f"/api/v1/reports/{report}"),
        ("Evaluation/ListReports", {"model": "iris", "limit": 3}, "/api/v1/reports?model=iris&limit=3"),
        ("Deployment/Get", {"name": "iris"}, "/api/v1/deployments/iris"),
        ("Deployment/List", {"limit": 3}, "/api/v1/deployments?limit=3"),
        ("Deployment/ListRevisions", {"name": "iris"}, "/api/v1/deployments/iris/revisions"),
        ("Deployment/ListReplicas", {"name": "iris"}, "/api/v1/deployments/iris/replicas"),
    ]
    for path, fields, url in asks:
        both.same(path, fields, url)
    versions = both.rest("/api/v1/datasets/iris")["versions"]
    assert sorted(one["version"] for one in both.rpc("Datasets/ListVersions", name="iris")["data"]) == versions
    for path, name, url in (
        ("Training/GetLog", {"id": job}, f"/api/v1/training-jobs/{job}/log"),
        ("Deployment/GetLogs", {"name": "iris"}, "/api/v1/deployments/iris/logs"),
    ):
        assert both.rpc(path, **name).get("text", "") == both.http.get(url).text
    row = {"inputs": [ROW]}
    here, there = (
        both.rpc("Deployment/Predict", name="iris", **row),
        both.rest("/api/v1/deployments/iris/predict", "POST", row),
    )
    assert not differing(plain(here), plain(there), "Predict")

    changes(both, iris)
    declared = {
        f"{service}/{method.name}"
        for service in ("Datasets", "Training", "Evaluation", "Deployment")
        for method in POOL.FindServiceByName(f"modelworks.v1.{service}").methods
    }
    assert {path for path in declared if path.partition("/")[2] not in STREAMED} == both.asked


def changes(both: Both, server: RunningServer) -> None:
    """What changes something: REST shows it, and the wrong is refused in the same words."""
    name = "grpc-parity"
    put = both.rpc("Deployment/Put", name=name, model="iris:1", spec={"batching": {"max_batch": 4}})
    assert both.rest(f"/api/v1/deployments/{name}")["revision"] == int(put["revision"])
    both.rpc("Deployment/Put", name=name, model="iris:1", spec={"batching": {"max_batch": 8}})
    back = both.rpc("Deployment/Rollback", name=name)
    assert both.rest(f"/api/v1/deployments/{name}")["spec"]["batching"]["max_batch"] == 4
    assert int(back["revision"]) > int(put["revision"])
    both.rpc("Deployment/Delete", name=name)

    job = both.rpc(
        "Training/Create", model="parity", dataset="iris", target="species", algorithm="gradient-boosted-trees",
        validation={"kfold": 5, "repeats": 20}, hyperparameters={"n_estimators": 300},
    )["id"]  # fmt: skip
    for method, state in (("Pause", "paused"), ("Resume", "queued"), ("Cancel", "cancel")):
        both.rpc(f"Training/{method}", id=job)
        fine = (state, "running", "validating") if state == "queued" else (state,)
        until(lambda fine=fine: both.rest(f"/api/v1/training-jobs/{job}")["status"].startswith(fine), 20)

    wrong = {"model": "m", "dataset": "iris", "target": "species", "algorithm": "nothing"}
    both.refused_alike("Training/Create", wrong, "POST", "/api/v1/training-jobs", wrong)
    both.refused_alike("Training/Get", {"id": "job_none"}, "GET", "/api/v1/training-jobs/job_none")
    both.refused_alike("Datasets/Get", {"dataset": "none"}, "GET", "/api/v1/datasets/none")
    both.refused_alike("Deployment/Get", {"name": "none"}, "GET", "/api/v1/deployments/none")
    put_wrong = {"model": "iris:1", "replicas": {"min": -1}}
    fields = {"name": name, "model": "iris:1", "spec": {"replicas": {"min": -1}}}
    both.refused_alike("Deployment/Put", fields, "PUT", f"/api/v1/deployments/{name}", put_wrong)
    row = {"inputs": [{**ROW, "petal width (cm)": "wide"}]}
    both.refused_alike("Deployment/Predict", {"name": "iris", **row}, "POST", "/api/v1/deployments/iris/predict", row)
