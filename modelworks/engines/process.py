"""Child processes that never outlive their parent: own group, config over stdin, three independent death notices.

The parent calls `spawn`; the child calls `attach` before anything else. Stdin stays open as long as the parent lives.
When it closes, the kernel itself kills the child's whole group (SIGIO redirected to SIGKILL), which needs no
interpreter; PDEATHSIG and a watcher thread stand behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from modelworks.core.settings import MIB, child_environment
from modelworks.engines.memory import limit

LOG_KEEP = 10 * MIB
MAX_CONFIG = MIB - 1  # fits in the pipe, so that writing it never waits for the child
_PR_SET_PDEATHSIG = 1
ORPHANED = 70  # exit code of a child whose parent is gone


class Child:
    """A started process and its group, from the parent's side. Thread-safe. Keep it: dropping it ends the process."""

    def __init__(self, process: subprocess.Popen[bytes], title: str) -> None:
        self.pid = process.pid
        self.title = title
        self.started = time.time()
        self._process = process
        self._lock = threading.Lock()

    def tell(self, config: dict[str, Any], *, title: str, log: Path, memory_mb: int | None = None) -> None:
        """What a child that was spawned without a config waits for: once. It writes to `log` from then on."""
        self.title = title
        _write(self._process, _envelope(config, title, memory_mb, log))

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs. Ends what is left of its group."""
        with self._lock:
            if self._process.returncode is not None:
                return self._process.returncode
            # The group is killed while the zombie still holds its number, so that no stranger's group can be hit.
            try:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                ended = None
                self._process.poll()
            if ended is not None:
                kill_group(self.pid)
                self._process.wait()
                if self._process.stdin:
                    self._process.stdin.close()
            return self._process.returncode

    def wait(self, timeout: float) -> int | None:
        """`poll` for up to `timeout` seconds."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return code

    def terminate(self, grace: float) -> None:
        """SIGTERM to the group now, SIGKILL after `grace` seconds if it still runs. Returns at once."""
        if self.signal(signal.SIGTERM):
            timer = threading.Timer(grace, self.kill)
            timer.daemon = True
            timer.start()

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> bool:
        """Send `number` to the group; False when the child has ended."""
        if self.poll() is not None:
            return False
        with self._lock:
            return self._process.returncode is None and kill_group(self.pid, number)


def kill_group(group: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Signal every process of the group that `group` leads; False when there is none."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def spawn(
    module: str,
    config: dict[str, Any] | None,
    *,
    title: str,
    log: Path,
    arguments: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    threads: int = 1,
    memory_mb: int | None = None,
) -> Child:
    """Start `python -m module`, which must call `attach`. `config` is JSON data and travels over stdin alone.

    Without a config it waits in `attach` until it is told one. May be called from any thread: off the main thread, a
    thread that lives as long as the process does the fork, because PDEATHSIG fires when the forking *thread* ends.
    """
    line = b"" if config is None else _envelope(config, title, memory_mb)

    def start() -> Child:
        trim_log(log)
        with log.open("ab") as output:
            process = subprocess.Popen(
                # -P: the folder the server was started in must not shadow the child's modules
                [sys.executable, "-P", "-m", "modelworks.engines.boot", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                process_group=0,
                env=child_environment(threads),
                pipesize=-1 if 0 < len(line) < 32 * 1024 else MIB,
                bufsize=0,
            )
        _write(process, line)
        return Child(process, title)

    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return start() if threading.current_thread() is threading.main_thread() else _forker.run(start)


def _envelope(config: dict[str, Any], title: str, memory_mb: int | None, log: Path | None = None) -> bytes:
    envelope = {
        "title": title,
        "parent": os.getpid(),
        "memory_mb": memory_mb,
        "log": str(log) if log else None,
        "config": config,
    }
    line = json.dumps(envelope).encode() + b"\n"
    if len(line) > MAX_CONFIG:
        raise ValueError(f"the config of {title!r} has {len(line)} bytes; pass what is large as a file")
    return line


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; poll tells how
        process.stdin.write(line)


class _Forker:
    """One thread that never ends and forks on behalf of the others."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Child], Future[Child]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def run(self, start: Callable[[], Child]) -> Child:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="forker", daemon=True)
                self._thread.start()
        future: Future[Child] = Future()
        self._tasks.put((start, future))
        return future.result()

    def _loop(self) -> None:
        while True:
            start, future = self._tasks.get()
            try:
                future.set_result(start())
            except BaseException as error:  # handed to the caller, whose error it is
                future.set_exception(error)


_forker = _Forker()


def trim_log(path: Path, keep: int = LOG_KEEP) -> None:
    """Cut a log that grew past `keep` bytes down to its last ones, in place: who appends to it goes on."""
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        if size > keep:
            with path.open("rb+") as file:
                file.seek(size - keep)
                tail = file.read(keep)
                file.seek(0)
                file.truncate()
                file.write(tail)


def tail_log(path: Path, most: int = 64 * 1024, *, since: int = 0) -> str:
    """The last `most` bytes of a log after its first `since`, whole lines where it is longer; "" when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(since if since <= size else 0, size - most, 0)
            file.seek(start)
            data = file.read(most)
    except FileNotFoundError:
        return ""
    return (data if start == since or not start else data.partition(b"\n")[2]).decode(errors="replace")


# the child's side


def attach(title: str | None = None) -> dict[str, Any]:
    """Called first in a child: ties its life to the parent's and returns the config. `title` replaces the spawner's."""
    _die_with_parent()
    pipe = sys.stdin.fileno()
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(pipe, MAX_CONFIG)
        if not more:
            os._exit(ORPHANED)
        line += more
    envelope = json.loads(line)
    if os.getppid() != envelope["parent"]:  # it died before PDEATHSIG was set
        os._exit(ORPHANED)
    _die_with_pipe(pipe)
    threading.Thread(target=_watch, args=(pipe,), name="parent-watch", daemon=True).start()
    if envelope["log"]:
        _write_to(envelope["log"])
    import setproctitle

    setproctitle.setproctitle(title or envelope["title"])
    if envelope["memory_mb"]:
        limit(int(envelope["memory_mb"]))
    gc.freeze()  # what was imported is never garbage
    gc.enable()
    return envelope["config"]


def _write_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _die_with_pipe(pipe: int) -> None:
    """Have the kernel SIGKILL this process's group when the pipe's last writer is gone; nothing more is written."""
    if sys.platform != "linux" or os.getpgrp() != os.getpid():
        return
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _watch(pipe: int) -> None:
    """For systems without the above, and for the moment before it was set: end when the pipe closes."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        poll.poll()
        if not os.read(pipe, 4096):
            if os.getpgrp() == os.getpid():
                kill_group(os.getpid())
            os._exit(ORPHANED)
