"""gRPC on a real server: independent clients, the whole lifecycle, and the gateway's death."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from modelworks.api.grpc.messages import message
from tests.server import RunningServer, until

CLIENTS = Path(__file__).parent / "grpc_clients.py"
CSV = "size,colour,price\n" + "".join(f"{n}.5,{'red' if n % 3 else 'blue'},{n * 10 + n % 3}\n" for n in range(60))


class Lifecycle:
    """modelworks.v1 by its own descriptors."""

    def __init__(self, server: RunningServer) -> None:
        soon = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=soon)
        self.metadata = (("authorization", f"Bearer {server.key}"),)

    def __call__(
        self, service: str, method: str, request: str, answer: str, /, *more: tuple[str, str], **fields: Any
    ) -> Any:
        data = message(f"modelworks.v1.{request}")(**fields).SerializeToString()
        call = self.channel.unary_unary(f"/modelworks.v1.{service}/{method}")
        return message(f"modelworks.v1.{answer}").FromString(call(data, metadata=(*self.metadata, *more), timeout=60))

    def upload(self, parts: list[dict[str, Any]]) -> Any:
        kind = message("modelworks.v1.UploadDatasetRequest")
        call = self.channel.stream_unary("/modelworks.v1.Datasets/Upload")
        found = call(iter([kind(**part).SerializeToString() for part in parts]), metadata=self.metadata, timeout=60)
        return message("modelworks.v1.UploadDatasetResponse").FromString(found)

    def follow(self, job_id: str, *kinds: str) -> list[Any]:
        data = message("modelworks.v1.JobEventsRequest")(id=job_id, kinds=kinds).SerializeToString()
        call = self.channel.unary_stream("/modelworks.v1.Training/FollowEvents")
        kind = message("modelworks.v1.JobEvent")
        return [kind.FromString(item) for item in call(data, metadata=self.metadata, timeout=60)]


@pytest.mark.parametrize(
    ("client", "package"), [("triton", "tritonclient"), ("triton-aio", "tritonclient"), ("kserve", "kserve")]
)
def test_an_independent_client_works_unchanged(iris: RunningServer, client: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    key = iris.client.keys.create(name=f"grpc-{client}", role="invoke-only").key
    command = [sys.executable, str(CLIENTS), client, str(iris.grpc_port), key, "iris"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert f"ok {client}" in found.stdout, found.stdout + found.stderr


def test_the_lifecycle_from_chunks_to_a_prediction(iris: RunningServer) -> None:
    rpc = Lifecycle(iris)
    data = CSV.encode()
    chunks = [{"chunk": data[start : start + 100]} for start in range(0, len(data), 100)]
    dataset = rpc.upload([{"header": {"name": "grpc-prices", "filename": "prices.csv"}}, *chunks]).dataset
    assert (dataset.version, dataset.rows) == (1, 60)
    assert [(column.name, column.type) for column in dataset.columns] == [
        ("size", "number"), ("colour", "category"), ("price", "integer"),
    ]  # fmt: skip
    assert dataset.digest == iris.client.datasets.get("grpc-prices").digest

    once = ("idempotency-key", "grpc-once")
    asked = {
        "model": "grpc-prices",
        "dataset": "grpc-prices:1",
        "target": "price",
        "algorithm": "ridge",
        "validation": {"kfold": 3},
    }
    job = rpc("Training", "Create", "CreateTrainingJobRequest", "Job", once, **asked)
    assert rpc("Training", "Create", "CreateTrainingJobRequest", "Job", once, **asked).id == job.id
    events = rpc.follow(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    folds = [event for event in events if event.kind == "fold"]
    assert len(folds) == 3
    assert rpc.follow(job.id, "fold") == folds
    listed = rpc("Training", "ListEvents", "JobEventsRequest", "ListJobEventsResponse", id=job.id, kinds=["fold"])
    assert list(listed.data) == folds
    with pytest.raises(grpc.RpcError, match=r"'folds' is not a kind of event; use some of status, .*fold"):
        rpc.follow(job.id, "folds")
    job = rpc("Training", "Get", "JobRequest", "Job", id=job.id)
    assert (job.status, job.model_version) == ("succeeded", "grpc-prices:1")
    assert job.metrics["r2"]["mean"] > 0.9

    evaluation = rpc(
        "Evaluation", "Create", "CreateEvaluationRequest", "Job", model="grpc-prices:1", method={"kfold": 2}
    )
    until(lambda: rpc("Evaluation", "Get", "JobRequest", "Job", id=evaluation.id).status == "succeeded", 30)
    reports = rpc("Evaluation", "ListReports", "ListReportsRequest", "ListReportsResponse", model="grpc-prices")
    assert len(reports.data) == 2

    state = rpc("Deployment", "Put", "PutDeploymentRequest", "DeploymentState", name="grpc-prices", model="grpc-prices")
    assert state.model_version == "grpc-prices:1"
    until(lambda: rpc("Deployment", "Get", "NameRequest", "DeploymentState", name="grpc-prices").status == "ready", 30)
    row = {"size": 30.5, "colour": "red"}
    answer = rpc("Deployment", "Predict", "PredictRequest", "PredictResponse", name="grpc-prices", inputs=[row])
    native = iris.client.deployments.predict("grpc-prices", [row]).outputs[0].value
    assert answer.outputs[0]["value"] == pytest.approx(native)
    with pytest.raises(grpc.RpcError) as caught:
        rpc("Deployment", "Predict", "PredictRequest", "PredictResponse", name="grpc-prices", inputs=[{"size": 1.0}])
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "colour" in caught.value.details()
    rpc("Deployment", "Delete", "NameRequest", "DeploymentState", name="grpc-prices")


def test_an_upload_that_is_wrong_is_refused_and_leaves_nothing(iris: RunningServer) -> None:
    rpc = Lifecycle(iris)
    header = {"header": {"name": "grpc-wrong"}}
    for parts in (
        [{"chunk": b"a,b\n"}],
        [header],
        [header, header],
        [{"header": {"name": "../x"}}, {"chunk": b"a\n1\n"}],
        [],
    ):
        with pytest.raises(grpc.RpcError) as caught:
            rpc.upload(parts)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, parts
    assert not list((iris.home / "tmp").glob("upload-*"))


def test_a_training_request_is_checked_as_over_http(iris: RunningServer) -> None:
    rpc = Lifecycle(iris)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"algorithm": "nothing"}, "nothing"),
        ({"hyperparameters": {"C": -1}}, "C"),
        ({"validation": {"kfold": 1}}, "kfold"),
        ({"more": {"colour": "red"}}, "colour"),
        ({"dataset": "no-such-table"}, "no-such-table"),
    ]
    for change, word in wrong:
        asked = {"model": "m", "dataset": "iris", "target": "species", "algorithm": "logistic-regression", **change}
        with pytest.raises(grpc.RpcError) as caught:
            rpc("Training", "Create", "CreateTrainingJobRequest", "Job", **asked)
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), change
        assert word in caught.value.details(), change


def test_the_gateways_death_is_survived(server: RunningServer) -> None:
    rpc = Lifecycle(server)
    rpc("Deployment", "List", "ListRequest", "ListDeploymentsResponse")
    (gateway,) = server.processes("gateway")
    os.kill(gateway.pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            rpc("Deployment", "List", "ListRequest", "ListDeploymentsResponse")
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    until(answers, 30)


def test_a_second_server_does_not_share_the_grpc_port(server: RunningServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modelworks.cli", "up", "--home", str(tmp_path / "other"), "--port", "0"]
    other = subprocess.run([*command, "--grpc-port", str(server.grpc_port)], capture_output=True, text=True, timeout=30)
    assert other.returncode != 0
    assert "--grpc-port" in other.stdout + other.stderr


def test_over_tls_with_the_certificate_of_http(tmp_path: Path) -> None:
    certificate, key = tls_pair(tmp_path)
    server = RunningServer(tmp_path / "home", "--tls-cert", str(certificate), "--tls-key", str(key))
    try:
        address, live = f"127.0.0.1:{server.grpc_port}", "/inference.GRPCInferenceService/ServerLive"
        metadata = (("authorization", f"Bearer {server.key}"),)

        def code(channel: grpc.Channel, *, known: bool = True) -> grpc.StatusCode:
            try:
                channel.unary_unary(live)(b"", metadata=metadata if known else (), timeout=5)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(address, trusted) as channel:
            until(lambda: code(channel) == grpc.StatusCode.OK, 20)
            assert code(channel, known=False) == grpc.StatusCode.UNAUTHENTICATED
        with grpc.secure_channel(
            address, grpc.ssl_channel_credentials(tls_pair(tmp_path, "other")[0].read_bytes())
        ) as channel:
            assert code(channel) == grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(address) as channel:
            assert code(channel) == grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop()


def tls_pair(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(
            who, who, key.public_key(), x509.random_serial_number(), now - timedelta(1), now + timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return paths


def test_the_documented_caller_lives_a_whole_life(iris: RunningServer, tmp_path: Path) -> None:
    """docs/grpc_call.py, as docs/grpc.md tells it: no .proto file, JSON in and out."""
    script = Path(__file__).parent.parent / "docs" / "grpc_call.py"
    where = f"127.0.0.1:{iris.grpc_port}"

    def run(*arguments: str, fails: bool = False) -> Any:
        command = [sys.executable, str(script), where, *arguments]
        environment = {**os.environ, "MODELWORKS_API_KEY": iris.key}
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout.splitlines()

    def call(service: str, body: dict[str, Any], *more: str) -> Any:
        return [json.loads(line) for line in run(f"modelworks.v1.{service}", json.dumps(body), *more)]

    assert "modelworks.v1.Training/FollowEvents" in run()
    table = tmp_path / "prices.csv"
    table.write_text(CSV)
    dataset = call("Datasets/Upload", {"header": {"name": "by-hand"}}, "--file", str(table))[0]["dataset"]
    assert int(dataset["rows"]) == 60
    asked = {"model": "by-hand", "dataset": "by-hand", "target": "price", "algorithm": "ridge"}
    job = call("Training/Create", asked)[0]
    events = call("Training/FollowEvents", {"id": job["id"]})
    assert [int(event["seq"]) for event in events] == list(range(1, len(events) + 1))
    assert call("Training/Get", {"id": job["id"]})[0]["model_version"] == "by-hand:1"
    assert call("Training/Cancel", {"id": job["id"]})[0]["status"] == "succeeded"
    refused = run("modelworks.v1.Training/Create", json.dumps({**asked, "algorithm": "none"}), fails=True)
    assert refused.startswith("INVALID_ARGUMENT: ")
    assert "x-error-code: " in refused
