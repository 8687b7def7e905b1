"""Real processes: children get their config over stdin and never outlive their parent."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modelworks.engines import process
from modelworks.engines.process import MAX_CONFIG, spawn, tail_log, trim_log
from tests.serve_toys import gone, wait_for

CHILD = """
import json, os, pathlib, signal, subprocess, sys, time
from modelworks.engines.process import attach, spawn
config = attach()
out = pathlib.Path(config["out"])
pids = [os.getpid()]
if config.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if config.get("foreign"):
    pids.append(subprocess.Popen(["sleep", "60"]).pid)
if config.get("grandchild"):
    log = out.with_suffix(".log")
    keep = spawn("mw_child", {"out": config["grandchild"], "foreign": True}, title="modelworks job 2", log=log)
    pids.append(keep.pid)
out.with_suffix(".tmp").write_text(json.dumps({"pids": pids, "env": dict(os.environ), "size": len(json.dumps(config))}))
out.with_suffix(".tmp").rename(out)
print("child says hello", flush=True)
if config.get("exit") is not None:
    sys.exit(config["exit"])
while True:  # holds the interpreter as an engine would
    time.sleep(60)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "mw_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    def start(**config):
        out = tmp_path / f"out{len(started)}.json"
        started.append(spawn("mw_child", {"out": str(out), **config}, title="modelworks job 1", log=tmp_path / "c.log"))
        assert wait_for(out.exists), tail_log(tmp_path / "c.log")
        return started[-1], json.loads(out.read_text())

    yield start
    for one in started:
        one.kill()


def test_the_config_travels_over_stdin_alone(child, monkeypatch):
    monkeypatch.setenv("MODELWORKS_API_KEY", "mw_supersecret")
    one, told = child(secret="mw_supersecret", big="x" * 200_000)
    command = Path(f"/proc/{one.pid}/cmdline").read_text()
    assert command.startswith("modelworks job 1")
    assert "supersecret" not in command
    assert "supersecret" not in json.dumps(told["env"])
    assert "supersecret" not in Path(f"/proc/{one.pid}/environ").read_text()
    assert told["env"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert told["size"] > 200_000
    assert os.getpgid(one.pid) == one.pid


def test_a_config_beyond_the_pipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass what is large as a file"):
        spawn("mw_child", {"big": "x" * MAX_CONFIG}, title="t", log=tmp_path / "log")


def test_exit_codes_and_the_rest_of_the_group(child):
    one, told = child(exit=3, foreign=True)
    assert one.wait(5) == 3
    assert one.poll() == 3
    assert wait_for(lambda: gone(told["pids"][1]), 1), "what a child leaves behind is ended with it"


def test_terminate_asks_first_and_returns_at_once(child):
    one, _ = child()
    begun = time.monotonic()
    one.terminate(5)
    assert time.monotonic() - begun < 0.5
    assert one.wait(5) == -signal.SIGTERM


def test_terminate_ends_a_stubborn_group_after_the_grace(child):
    one, told = child(stubborn=True, foreign=True)
    one.terminate(0.2)
    assert one.wait(5) == -signal.SIGKILL
    assert wait_for(lambda: all(map(gone, told["pids"])), 1)


def test_kill_9_of_the_parent_leaves_no_orphan(tmp_path, monkeypatch):
    """parent -> child -> grandchild -> a program that knows nothing of us."""
    (tmp_path / "mw_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    program = (
        "import pathlib, time; from modelworks.engines.process import spawn\n"
        f"c = spawn('mw_child', {{'out': {str(first)!r}, 'foreign': True, 'grandchild': {str(second)!r}}},"
        f" title='modelworks job 1', log=pathlib.Path({str(tmp_path / 'c.log')!r}))\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        assert wait_for(lambda: first.exists() and second.exists(), 10), tail_log(tmp_path / "c.log")
        pids = json.loads(first.read_text())["pids"] + json.loads(second.read_text())["pids"]
        assert len(set(pids)) == 4
        assert not any(map(gone, pids))
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: all(map(gone, pids)), 1.0), [pid for pid in pids if not gone(pid)]


def test_the_watcher_alone_is_enough(tmp_path, monkeypatch):
    """Where the kernel's notices are missing, the pipe's end of file still ends the child."""
    (tmp_path / "mw_child.py").write_text(
        "import modelworks.engines.process as p\np._die_with_parent = p._die_with_pipe = lambda *a: None\n" + CHILD
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out.json"
    one = spawn("mw_child", {"out": str(out), "foreign": True}, title="t", log=tmp_path / "log")
    assert wait_for(out.exists), tail_log(tmp_path / "log")
    pids = json.loads(out.read_text())["pids"]
    one._process.stdin.close()
    assert wait_for(lambda: all(map(gone, pids)), 1)
    assert one.wait(1) is not None


def test_a_child_survives_the_thread_that_asked_for_it(child):
    started = []
    thread = threading.Thread(target=lambda: started.append(child()))
    thread.start()
    thread.join()
    assert not wait_for(lambda: gone(started[0][0].pid), 0.3), "PDEATHSIG fires when the forking thread ends"


def test_logs_are_bounded(tmp_path, child, monkeypatch):
    path = tmp_path / "c.log"
    path.write_bytes(b"old\n" * 1000)
    trim_log(path, 400)
    assert path.stat().st_size == 400
    monkeypatch.setattr(process, "LOG_KEEP", 400)
    one, _ = child(exit=0)
    one.wait(5)
    assert tail_log(path).endswith("child says hello\n")
    assert tail_log(path, 30).startswith("old\n")
    assert tail_log(tmp_path / "none") == ""
