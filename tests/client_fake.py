"""A small HTTP server that answers what a test told it to and remembers what it was asked: for the SDK and the CLI."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

KEY = "mw_test-key"
CUT = object()  # an answer: close the connection without one


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def problem(status: int, code: str, detail: str, *, param: str | None = None, **headers: str) -> Reply:
    body = {"type": f"urn:modelworks:error:{code}", "title": "x", "status": status, "detail": detail, "code": code}
    media = {"content-type": "application/problem+json"}
    return Reply(
        body | {"param": param, "request_id": "req_1"},
        status,
        media | {k.replace("_", "-"): v for k, v in headers.items()},
    )


def page(*items: Any, has_more: bool = False) -> Reply:
    return Reply({"object": "list", "data": list(items), "first_id": None, "last_id": None, "has_more": has_more})


class FakeServer:
    """`on("GET", "/path", reply, reply...)`: answers in turn, the last one for ever. A dict is a reply's JSON body."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self._replies: dict[tuple[str, str], list[Any]] = defaultdict(list)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                fake._answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def on(self, method: str, path: str, *replies: Any) -> None:
        self._replies[method, path] = list(replies)

    def requests(self, method: str, path: str) -> list[Asked]:
        return [one for one in self.asked if (one.method, one.path) == (method, path)]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.asked.append(Asked(handler.command, parts.path, dict(parse_qsl(parts.query)), headers, body))
        replies = self._replies.get((handler.command, parts.path))
        if not replies:
            reply: Any = problem(404, "not_found", f"the test knows no {handler.command} {parts.path}")
        else:
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply is CUT:
            handler.close_connection = True
            return
        if not isinstance(reply, Reply):
            reply = Reply(reply)
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {"content-type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


DATASET = {
    "id": "ds_1", "project_id": "proj_1", "name": "iris", "version": 2, "digest": "9f86d081884c7d659a2f", "rows": 150, "size": 4312,
    "columns": [{"name": "petal", "type": "number", "nullable": False}, {"name": "species", "type": "category", "nullable": False}],
    "profile": {"rows": 150, "columns": [{"name": "petal", "missing": 0, "distinct": 43, "min": 1, "mean": 3.7, "max": 6.9}]},
    "warnings": [], "created_at": 1790000000.0,
}  # fmt: skip
JOB = {
    "id": "job_1", "project_id": "proj_1", "kind": "train", "spec": {"model": "iris", "algorithm": "ridge"}, "status": "queued",
    "created_at": 1790000000.0,
}  # fmt: skip
DONE = {**JOB, "status": "succeeded", "progress": 1.0, "model_version": "iris:1", "result": {"report_id": "rep_1"}}
SIGNATURE = {
    "inputs": [
        {"name": "petal", "datatype": "FP32", "shape": [-1, 1], "column": "number"},
        {"name": "count", "datatype": "INT64", "shape": [-1, 1], "column": "integer"},
        {"name": "wild", "datatype": "BOOL", "shape": [-1, 1], "column": "boolean"},
        {"name": "place", "datatype": "BYTES", "shape": [-1, 1], "column": "category"},
    ],
    "outputs": [{"name": "label", "datatype": "BYTES", "shape": [-1]}],
}
METRICS = {"accuracy": {"mean": 0.96, "std": 0.02, "low": 0.93, "high": 0.98, "folds": [0.97, 0.95]}}
VERSION = {
    "id": "mv_1", "project_id": "proj_1", "name": "iris", "version": 1, "digest": "aa11bb22cc33dd44", "task": "tabular-classification",
    "signature": SIGNATURE, "size": 10933, "metrics": METRICS, "algorithm": "ridge", "report_id": "rep_1", "created_at": 1790000000.0,
}  # fmt: skip
REPORT = {
    "id": "rep_1", "project_id": "proj_1", "job_id": "job_1", "model": "iris@champion", "model_version": "iris:2", "dataset": "iris:2",
    "dataset_digest": "x", "method": {"kfold": 5}, "metrics": METRICS,
    "details": {"confusion_matrix": {"classes": ["setosa", "other"], "rows": "true", "columns": "predicted", "counts": [[49, 1], [2, 98]]}},
}  # fmt: skip
DEPLOYMENT = {
    "id": "dep_1", "project_id": "proj_1", "name": "iris", "spec": {"model": "iris:1"}, "model_version": "iris:1",
    "model_version_id": "mv_1",
    "digest": "aa11", "task": "tabular-classification", "signature": SIGNATURE, "status": "ready", "ready_replicas": 1, "spec_revision": 1,
}  # fmt: skip
PREDICTION = {
    "outputs": [{"label": "setosa", "probabilities": {"setosa": 0.98, "other": 0.02}}],
    "model": "iris:1",
    "request_id": "req_2",
}


def event(seq: int, kind: str, message: str) -> dict[str, Any]:
    return {"id": f"ev_{seq}", "job_id": "job_1", "seq": seq, "kind": kind, "message": message, "data": {}}


def sse(*events: dict[str, Any], end: bool = True) -> Reply:
    text = "retry: 1000\n\n: still here\n\n"
    text += "".join(f"id: {one['seq']}\nevent: {one['kind']}\ndata: {json.dumps(one)}\n\n" for one in events)
    text += 'event: end\ndata: {"status": "succeeded"}\n\n' if end else ""
    return Reply(text.encode(), headers={"content-type": "text/event-stream"})
