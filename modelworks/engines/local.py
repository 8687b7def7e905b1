"""Replicas as child processes of this one, on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import threading
import time
from pathlib import Path

import msgspec

from modelworks.engines.base import Handle, Observed, ReplicaSpec
from modelworks.engines.memory import last_words, tells_of_starving
from modelworks.engines.process import LOG_KEEP, Child, spawn, tail_log, trim_log

MAX_SOCKET_PATH = 100  # sockaddr_un holds 107 bytes and a NUL
_NAP = 2.0  # seconds between two looks after which silence is counted anew


class LocalEngine:
    """`home` is the server's folder: sockets and status files go to `home/run`, logs to `home/logs`."""

    def __init__(self, home: Path) -> None:
        self.home = Path(home).absolute()
        self.run = run_folder(self.home)
        self._children: dict[str, tuple[Child, ReplicaSpec]] = {}
        self._lock = threading.Lock()
        self._beats: dict[
            str, tuple[float, float]
        ] = {}  # replica -> (its status file's time, when that was first seen)
        self._last_look = 0.0
        self._spare: Child | None = None

    def prepare(self) -> None:
        """Start a process that imports what most models need while it is not known yet what it will serve."""
        self._spare = spawn(
            "modelworks.serve.replica",
            None,
            title=f"modelworks spare --home {self.home}",
            log=self.home / "logs" / "spare.log",
            arguments=["spare"],
        )

    def dismiss(self) -> None:
        """End what `prepare` started, if no replica has become of it."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.kill()
            spare.wait(1.0)

    def start(self, spec: ReplicaSpec) -> Handle:
        endpoint = spec.endpoint or str(self.run / f"{spec.replica_id}.sock")
        config = msgspec.to_builtins(spec) | {"endpoint": endpoint}
        title, log = f"modelworks replica {spec.deployment} --home {spec.home}", self._log(spec.replica_id)
        child = self._spare
        if child is not None and child.poll() is None and spec.threads == 1 and spec.memory_mb is None:
            self._spare = None
            child.tell(config, title=title, log=log)
        else:
            child = spawn(
                "modelworks.serve.replica",
                config,
                title=title,
                log=log,
                threads=spec.threads,
                memory_mb=spec.memory_mb,
            )
        with self._lock:
            self._children[spec.replica_id] = child, msgspec.structs.replace(spec, endpoint=endpoint, secret="")
        return Handle(spec.replica_id, child.pid, endpoint)

    def stop(self, handle: Handle, grace: float) -> None:
        with self._lock:
            known = self._children.get(handle.replica_id)
        if known and known[0].pid == handle.pid:
            known[0].terminate(grace)

    def list(self) -> list[Observed]:
        with self._lock:
            children = list(self._children.items())
        now = time.monotonic()
        if now - self._last_look > _NAP:  # this process was stopped itself: it cannot tell who was silent meanwhile
            self._beats.clear()
        self._last_look = now
        return [self._observe(replica_id, child, spec) for replica_id, (child, spec) in children]

    def logs(self, handle: Handle) -> str:
        return tail_log(self._log(handle.replica_id))

    def close(self) -> None:
        """End all at once, by force."""
        self.dismiss()
        for child, _ in self._children.values():
            child.kill()

    def _observe(self, replica_id: str, child: Child, spec: ReplicaSpec) -> Observed:
        code = child.poll()
        phase, message = read_status(Path(spec.endpoint))
        if code is None:
            trim_log(self._log(replica_id), 2 * LOG_KEEP)
        else:
            with self._lock:
                self._children.pop(replica_id, None)
                self._beats.pop(replica_id, None)
            for leftover in (Path(spec.endpoint), status_path(Path(spec.endpoint))):
                leftover.unlink(missing_ok=True)
            phase = "stopped" if code == 0 else "failed"
            if code < 0 or (code > 0 and not message):
                message = _cause(code, tail_log(self._log(replica_id)), spec.memory_mb)
        return Observed(
            replica_id=replica_id,
            deployment=spec.deployment,
            pid=child.pid,
            alive=code is None,
            exit_code=code,
            started=child.started,
            endpoint=spec.endpoint,
            phase=phase,
            message=message,
            silent=self._silence(replica_id, spec) if code is None and phase in ("ready", "draining") else 0.0,
        )

    def _silence(self, replica_id: str, spec: ReplicaSpec) -> float:
        """How long the status file's time has stood still, by this process's own clock."""
        try:
            beat = status_path(Path(spec.endpoint)).stat().st_mtime
        except OSError:
            return 0.0
        if self._beats.get(replica_id, (None, 0.0))[0] != beat:
            self._beats[replica_id] = beat, self._last_look
        return self._last_look - self._beats[replica_id][1]

    def _log(self, replica_id: str) -> Path:
        return self.home / "logs" / f"{replica_id}.log"


def _cause(code: int, log: str, memory_mb: int | None) -> str:
    """Why a replica ended that did not say so itself."""
    if memory_mb and tells_of_starving(log):
        return f"the model needs more than memory_mb={memory_mb} MiB; raise resources.memory_mb"
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    words = last_words(log)
    return f"the replica {how}; the last line of its log: {words}" if words else f"the replica {how}"


def run_folder(home: Path) -> Path:
    """A private folder (0700) for sockets: `home/run`, or one in the temporary folder when that path is too long.

    What an earlier server left there is removed: one server a home, whose children die with it.
    """
    folder = home / "run"
    if len(os.fsencode(folder)) + 48 > MAX_SOCKET_PATH:
        name = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"mw-{os.getuid()}-{name}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True, mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        folder = Path(tempfile.mkdtemp(prefix="mw-"))  # someone else took the name
    folder.chmod(0o700)
    for leftover in (*folder.glob("*.sock"), *folder.glob("*.status")):
        leftover.unlink(missing_ok=True)
    return folder


def status_path(endpoint: Path) -> Path:
    """Where the replica behind `endpoint` writes its phase, as JSON."""
    return endpoint.with_suffix(".status")


def read_status(endpoint: Path) -> tuple[str, str]:
    """(phase, message) as the replica last wrote them; ("loading", "") before that."""
    try:
        status = json.loads(status_path(endpoint).read_bytes())
        return str(status["phase"]), str(status.get("message", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return "loading", ""
