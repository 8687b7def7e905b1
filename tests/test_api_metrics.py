"""/metrics as Prometheus reads it, who sees what in it, the request log of both lanes, and traces that arrive."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelworks.api.metrics import METRICS, SERVER_WIDE
from modelworks.core.errors import InvalidInput, MissingExtra
from modelworks.core.specs import KeySpec, ProjectSpec
from modelworks.serve import tracing
from modelworks.serve.observe import Observer
from modelworks.serve.requestlog import RequestLog
from tests.api_house import ROW, House, house

PREDICT = "/api/v1/deployments/iris/predict"
SECRET_WORD = "chartreuse"
ORDER = ("project", "deployment", "model_version", "operation", "status", "le")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[House]:
    with house(tmp_path / "home") as found:
        yield found


def scraped(home: House, key: str | None = None) -> dict[str, Any]:
    """name -> {labels' values: value} of all samples, by Prometheus' own parser."""
    with home.client(None) as client:
        answer = client.get("/metrics", headers={"authorization": f"Bearer {key or home.keys['admin']}"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = tuple(sample.labels[label] for label in ORDER if label in sample.labels)
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_what_was_sent_is_what_is_scraped(home: House) -> None:
    with home.client() as client:
        for _ in range(5):
            assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 200
        assert client.post(PREDICT, json={"inputs": [{}]}).status_code == 400
        assert client.post(PREDICT.replace("iris", "no"), json={"inputs": [ROW]}).status_code == 404
        assert client.post(PREDICT, json={"inputs": [ROW]}, headers={"connection": "close"}).status_code == 200
    with home.client(None) as client:
        assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 401
    found = scraped(home)
    call = ("default", "iris", "iris:1")
    assert found["modelworks_requests_total"] == {(*call, "200"): 6.0}
    assert found["modelworks_errors_total"] == {call: 0.0}
    assert found["modelworks_request_duration_seconds_count"] == {call: 6.0}
    assert found["modelworks_request_duration_seconds_bucket"][(*call, "+Inf")] == 6.0
    assert found["modelworks_batch_size_sum"] == {call: 6.0}
    requests = found["modelworks_http_requests_total"]
    statuses = {status: count for (operation, status), count in requests.items() if operation == "deployments.predict"}
    assert statuses == {"200": 6.0, "400": 1.0, "404": 1.0, "401": 1.0}
    assert found["modelworks_resident_memory_bytes"][()] > 1e6


def test_every_name_is_declared_and_documented(home: House) -> None:
    text = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    documented = {
        match[1]: (match[2], match[3], match[4])
        for match in re.finditer(r"^\| `(\w+)`(?: \*)? \| (\w+) \| ([\w, ]*?) ?\| (.*) \|$", text, re.M)
    }
    declared = {
        name + ("_total" if kind == "counter" else ""): (kind, ", ".join(labels), what)
        for name, (kind, what, labels) in METRICS.items()
    }
    assert documented == declared
    marked = {name.removesuffix("_total") for name in re.findall(r"^\| `(\w+)` \*", text, re.M)}
    assert marked == set(SERVER_WIDE)
    with home.client() as client:
        assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 200
    for name in scraped(home):
        base = re.sub(r"_(total|bucket|sum|count)$", "", name)
        assert base in METRICS or name in METRICS


def test_a_key_without_the_scope_is_refused(home: House) -> None:
    with home.client("invoke-only") as client:
        answer = client.get("/metrics")
        assert answer.status_code == 403
        assert "usage:read" in answer.text
    with home.client(None) as client:
        assert client.get("/metrics").status_code == 401
    assert scraped(home, home.keys["viewer"])


def test_a_project_sees_its_own_alone(home: House) -> None:
    project = home.services.access.create_project(home.caller(), ProjectSpec(name="research"))
    with home.client("admin", params=None) as client:
        made = client.post(
            "/api/v1/keys",
            json=KeySpec(name="theirs", role="admin").model_dump(mode="json", exclude_none=True),
            headers={"x-project": "research"},
        )
        assert made.status_code == 201, made.text
        assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 200
    observer = home.services.gateway.observer
    observer.tally((project.id, "theirs", "m:1")).answered = 3
    theirs = scraped(home, made.json()["key"])
    assert theirs["modelworks_requests_total"] == {("research", "theirs", "m:1", "200"): 3.0}
    assert {labels[0] for labels in theirs["modelworks_jobs"]} == {"research"}
    assert not any(name.startswith(SERVER_WIDE) for name in theirs)
    all_of_it = scraped(home)
    assert {labels[0] for labels in all_of_it["modelworks_requests_total"]} == {"research", "default"}
    viewer = scraped(home, home.keys["viewer"])
    assert {labels[0] for labels in viewer["modelworks_requests_total"]} == {"default"}


def test_log_lines_of_both_lanes_without_content_or_key(home: House, tmp_path: Path) -> None:
    path = tmp_path / "requests.log"
    observer = Observer(log=RequestLog(path))
    home.services.gateway.observer = observer
    row = {**ROW, "colour": SECRET_WORD}
    with home.client() as client:
        fast = client.post(PREDICT, json={"inputs": [row, row]})
        slow = client.post(PREDICT, json={"inputs": [row, row]}, headers={"connection": "close"})
        bad = client.post(PREDICT, json={"inputs": [{**row, "colour": {SECRET_WORD: 1}}]})
        client.get("/api/v1/whoami")
        client.get("/health")
        client.get(f"/{SECRET_WORD}")
    assert (fast.status_code, slow.status_code, bad.status_code) == (200, 200, 400)
    assert observer.log is not None
    observer.log.close()
    text = path.read_text()
    assert SECRET_WORD not in text
    assert not any(key in text for key in home.keys.values())
    import json

    lines = [json.loads(line) for line in text.splitlines()]
    by_id = {line["request_id"]: line for line in lines}
    one, two = (by_id[answer.headers["x-request-id"]] for answer in (fast, slow))
    for line, answer in ((one, fast), (two, slow)):
        assert line["operation"] == "deployments.predict"
        assert line["deployment"] == "iris"
        assert line["model_version"] == "iris:1"
        assert line["key_id"] == home.admin.key_id
        assert line["project_id"] == home.admin.project_id
        assert line["status"] == 200
        assert line["rows"] == 2
        assert line["bytes_in"] == int(answer.request.headers["content-length"])
        assert line["bytes_out"] == len(answer.content)
        assert 0 < line["duration_ms"] < 5000
    assert set(one) == set(two)
    assert by_id[bad.headers["x-request-id"]]["status"] == 400
    assert [line["operation"] for line in lines].count("whoami.get") == 1
    assert len(lines) == 5  # /health has none


def test_a_client_that_leaves_is_499_in_both_lanes(home: House) -> None:
    import socket
    import time

    observer = home.services.gateway.observer
    home.router.hold = True
    body = b'{"inputs": [{"length": 1.5, "colour": "red", "count": 3, "ripe": true}]}'
    for number, more in enumerate(((), ("connection: close",)), 1):
        with socket.create_connection(("127.0.0.1", home.port)) as connection:
            head = home.head("POST", PREDICT, "content-type: application/json", f"content-length: {len(body)}", *more)
            connection.sendall(head + body)
            until = time.monotonic() + 5
            while len(home.router.calls) < number:
                assert time.monotonic() < until
                time.sleep(0.01)
        while observer.requests.get(("deployments.predict", 499), 0) < number:
            assert time.monotonic() < until, (number, observer.requests)
            time.sleep(0.01)
    (tally,) = observer.tallies.values()
    assert tally.outcomes == {499: 2}


# -- traces ------------------------------------------------------------------------------------------------------------


class Collector:
    """An OTLP/HTTP collector on loopback that keeps the spans it is sent."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        spans = self.spans = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                import gzip

                data = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    data = gzip.decompress(data)
                assert self.path == "/v1/traces"
                for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("lane", ["fast", "slow"])
def test_spans_reach_the_collector_under_the_callers_trace(home: House, lane: str) -> None:
    collector = Collector()
    traces = tracing.Tracing(collector.url)
    home.services.gateway.observer = Observer(tracing=traces)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    more = {"connection": "close"} if lane == "slow" else {}
    with home.client() as client:
        row = {**ROW, "colour": SECRET_WORD}
        named = [
            {"traceparent": f"00-{trace}-{parent}-{flag}", **more} for flag in ("01", "00")
        ]  # the second: not sampled
        answers = [client.post(PREDICT, json={"inputs": [row]}, headers=headers) for headers in named]
        client.post(PREDICT, json={"inputs": [{}]}, headers={"traceparent": "nonsense", **more})
    traces.close()
    collector.close()
    assert [answer.status_code for answer in answers] == [200, 200]
    ours = {span.name: span for span in collector.spans if span.trace_id.hex() == trace}
    assert set(ours) == {"deployments.predict", "call replica"}
    request, call = ours["deployments.predict"], ours["call replica"]
    assert request.parent_span_id.hex() == parent
    assert call.parent_span_id == request.span_id
    said = {pair.key: pair.value.string_value or pair.value.int_value for pair in request.attributes}
    assert said["http.response.status_code"] == 200
    assert said["modelworks.request_id"] == answers[0].headers["x-request-id"]
    inner = {pair.key: pair.value for pair in call.attributes}
    assert inner["modelworks.model_version"].string_value == "iris:1"
    assert {"modelworks.queue_us", "modelworks.model_us", "modelworks.batch"} <= set(inner)
    (other,) = (span for span in collector.spans if span.trace_id.hex() != trace)
    assert other.parent_span_id == b""
    assert SECRET_WORD not in str(collector.spans)


def test_a_collector_that_is_away_costs_no_request(home: House) -> None:
    home.services.gateway.observer = Observer(tracing=tracing.Tracing("http://127.0.0.1:9"))
    with home.client() as client:
        for _ in range(10):
            assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 200


def test_endpoints_that_could_not_be_used_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.check("http://127.0.0.1:4318", offline=True)
    for endpoint, offline in (("collector:4317", False), ("http://collector.example:4318", True)):
        with pytest.raises(InvalidInput) as refused:
            tracing.check(endpoint, offline=offline)
        assert refused.value.param == "otlp_endpoint"
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"modelworks\[otel\]"):
        tracing.check("http://127.0.0.1:4318", offline=False)


# -- usage -------------------------------------------------------------------------------------------------------------


def used(home: House, role: str = "admin", **query: str) -> Any:
    with home.client(role) as client:
        answer = client.get("/api/v1/usage", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def test_usage_tells_each_keys_calls_and_tokens_and_a_key_its_own_alone(home: House) -> None:
    with home.client("invoke-only") as client:
        for _ in range(3):
            assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 200
        assert client.post(PREDICT + "?lane=slow", json={"inputs": [ROW]}).status_code == 200
        assert client.post(PREDICT, json={"inputs": [{}]}).status_code == 400
        assert client.post(PREDICT.replace("iris", "no"), json={"inputs": [ROW]}).status_code == 404
        mine = client.get("/api/v1/whoami").json()["key_id"]
    with home.client("developer") as client:
        assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 200
        other = client.get("/api/v1/whoami").json()["key_id"]
    observer, project = home.services.gateway.observer, home.admin.project_id
    observer.tokens((project, "chat"), mine, 10, 4, 6, 1)
    observer.tokens((project, "chat"), mine, 5, 2)
    observer.tokens(("proj_2", "chat"), mine, 100, 100)
    none = dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens", "repeated_tokens"), 0)
    ours = {"project_id": project, "key_id": mine, "key": "k-invoke-only"}
    tokens = {"prompt_tokens": 15, "completion_tokens": 6, "cached_tokens": 6, "repeated_tokens": 1}
    chat = {**ours, "deployment": "chat", "calls": 0, **tokens}
    iris = {**ours, "deployment": "iris", "calls": 4, **none}
    theirs = {**iris, "key_id": other, "key": "k-developer", "calls": 1}

    assert used(home, "invoke-only") == [chat, iris]
    assert used(home, "developer") == [theirs]
    assert used(home, "viewer") == []
    assert used(home) == [chat, *sorted([iris, theirs], key=lambda line: line["key_id"])]
    assert used(home, deployment="chat") == [chat]
    sums = {**ours, "deployment": None, "calls": 4, **tokens}
    assert used(home, by="key") == sorted([sums, {**theirs, "deployment": None}], key=lambda line: line["key_id"])
    nobodys = {"project_id": project, "key_id": None, "key": None}
    assert used(home, by="deployment") == [{**chat, **nobodys}, {**iris, **nobodys, "calls": 5}]
    with home.client() as client:
        refused = client.get("/api/v1/usage", params={"by": "user"})
    assert (refused.status_code, refused.json()["param"]) == (400, "by")
    with home.client(None) as client:
        assert client.get("/api/v1/usage").status_code == 401
