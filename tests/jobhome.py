"""What the tests of jobs and of the library share: a home with its catalog, callers, and a real worker process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelworks.control.library import Library
from modelworks.core.settings import Settings
from modelworks.core.specs import TableSchema
from modelworks.core.types import FINAL_JOB_STATES, Caller, Dataset, Job, Principal
from modelworks.engines.process import Child, spawn
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog

IRIS = {"target": "species", "algorithm": "logistic-regression"}
# long enough to be killed in
LONG = {**IRIS, "validation": {"kfold": 10, "repeats": 3}}


class Home:
    """A server's folder without the server. `start` runs its worker; `close` ends it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("blobs", "logs", "tmp"):
            (root / name).mkdir(parents=True)
        self.catalog = Catalog(root / "catalog.sqlite")
        self.catalog.migrate()
        self.blobs = Blobs(root / "blobs")
        self.library = Library(self.catalog, self.blobs)
        self.worker: Child | None = None

    def start(self, **settings: Any) -> Child:
        config = {"home": str(self.root), "settings": Settings(home=self.root, **settings).model_dump(mode="json")}
        title = f"modelworks worker --home {self.root}"
        self.worker = spawn("modelworks.jobs.worker", config, title=title, log=self.root / "logs" / "worker.log")
        return self.worker

    def close(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker.wait(5)
        self.catalog.close()

    def upload(self, who: Caller, text: str, name: str = "iris", **more: Any) -> Job:
        path = self.root / "tmp" / f"upload-{os.urandom(4).hex()}.csv"
        path.write_text(text)
        return self.library.upload_dataset(who, name=name, path=path, filename="data.csv", **more)

    def ingest(self, who: Caller, text: str, name: str = "iris", schema: TableSchema | None = None) -> Dataset:
        """With the worker running."""
        job = self.succeeded(self.upload(who, text, name, schema=schema))
        return self.library.dataset(who, job.result["dataset"])

    def succeeded(self, job: Job, timeout: float = 120) -> Job:
        ended = self.library.wait(job.id, timeout)
        assert ended.status == "succeeded", (ended.status, ended.stage, ended.error, self.log(job))
        return ended

    def ended(self, job: Job, timeout: float = 120) -> Job:
        ended = self.library.wait(job.id, timeout)
        assert ended.status in FINAL_JOB_STATES, (ended.status, ended.stage)
        return ended

    def get(self, job: Job) -> Job:
        with self.catalog.read() as tx:
            return tx.get(Job, job.id)

    def log(self, job: Job) -> str:
        return "\n".join(path.read_text() for path in (self.root / "logs" / "jobs").glob(f"{job.id}.*"))

    def child_of(self, job: Job) -> int | None:
        """The process id of the job's process."""
        wanted = f"modelworks job {job.id} --home {self.root}"
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and wanted in _command(folder):
                return int(folder.name)
        return None


def gone(pid: int) -> bool:
    """Whether it has ended; what nobody reaps stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _command(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def caller(project: str = "proj_a", key: str = "key_a", *, idempotency_key: str | None = None) -> Caller:
    who = Principal(key_id=key, key_name=key, project_id=project, role="developer", scopes=frozenset())
    return Caller(who, request_id="req_1", idempotency_key=idempotency_key)


def until(true: Callable[[], Any], timeout: float = 30) -> Any:
    """What `true` returns once it is truthy."""
    end = time.monotonic() + timeout
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def iris_csv(rows: slice = slice(None)) -> str:
    from sklearn.datasets import load_iris

    data = load_iris()
    header = ",".join([*data.feature_names, "species"])
    lines = [
        ",".join([*map(str, features), str(data.target_names[label])])
        for features, label in zip(data.data.tolist(), data.target.tolist(), strict=True)
    ]
    return "\n".join([header, *lines[rows]]) + "\n"
