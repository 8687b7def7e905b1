"""Replicas as real processes under load: killed, hung, poisoned, drained; none of it is a client's problem."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import uvloop

from modelworks.core.errors import ModelworksError
from modelworks.core.tensors import unpack
from modelworks.engines import local
from modelworks.engines.base import ENGINES
from modelworks.engines.local import LocalEngine, run_folder
from modelworks.serve.gateway import Gateway
from modelworks.serve.router import Router
from modelworks.serve.routes import Snapshot
from tests.serve_toys import DEADLY, PRINCIPAL, SECRET, gone, toy_call, toy_route, toy_spec, wait_for


class Platform:
    """A local engine with toy replicas, and a gateway that follows them."""

    def __init__(self, folder):
        self.folder = folder
        self.engine = LocalEngine(folder / "home")
        self.handles = {}
        self.number = 0

    def start(self, name, **changes):
        handle = self.engine.start(toy_spec(self.folder, self.folder / "home", name, **changes))
        self.handles[name] = handle
        return handle

    def observed(self, name):
        return next((seen for seen in self.engine.list() if seen.replica_id == name), None)

    def wait_ready(self, *names):
        for name in names:
            assert wait_for(lambda name=name: self.observed(name).phase == "ready", 10), self.engine.logs(
                self.handles[name]
            )

    def gateway(self):
        """Inside a loop: a gateway that routes to all replicas started so far."""
        self.router = Router(SECRET)
        self.follow()
        return Gateway(self.router)

    def follow(self):
        self.number += 1
        route = toy_route(*[(name, handle.endpoint) for name, handle in self.handles.items()])
        self.router.apply(Snapshot(self.number, {route.key: route}))


@pytest.fixture
def platform(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    it = Platform(tmp_path)
    yield it
    it.engine.close()


async def predict(gateway, x=2.0, seconds=10.0):
    return unpack((await gateway.infer(PRINCIPAL, toy_call(x, seconds=seconds))).outputs[0])[0]


async def steady(gateway, stop, results):
    x = 0
    while not stop.is_set():
        x += 1
        results.append(await predict(gateway, x % 500) == 2 * (x % 500))


def test_a_replica_lives_its_whole_life(platform):
    handle = platform.start("rpl_1")
    assert stat.S_IMODE(os.stat(platform.engine.run).st_mode) == 0o700
    platform.wait_ready("rpl_1")
    assert stat.S_IMODE(os.stat(handle.endpoint).st_mode) == 0o600
    command = Path(f"/proc/{handle.pid}/cmdline").read_text()
    assert f"modelworks replica toy --home {platform.folder / 'home'}" in command
    assert SECRET not in command + Path(f"/proc/{handle.pid}/environ").read_text(errors="replace")

    async def story():
        gateway = platform.gateway()
        assert await predict(gateway) == 4.0
        aboard = asyncio.create_task(predict(gateway, 888.0))  # takes a second
        await asyncio.sleep(0.2)
        platform.engine.stop(handle, 10)
        assert await aboard == 1776.0, "SIGTERM lets what is aboard finish"
        platform.router.close()

    uvloop.run(story())
    seen = []
    assert wait_for(lambda: seen.append(platform.observed("rpl_1")) or not seen[-1].alive, 5)
    assert (seen[-1].exit_code, seen[-1].phase) == (0, "stopped")
    assert platform.engine.list() == [], "an ended replica is told of once"
    assert list(platform.engine.run.iterdir()) == []
    assert "ready" in platform.engine.logs(handle)
    assert SECRET not in platform.engine.logs(handle)
    platform.engine.stop(handle, 1)


def test_a_process_that_was_prepared_becomes_the_next_replica_or_ends(platform):
    engine = platform.engine
    engine.prepare()
    first = platform.start("rpl_1")
    second = platform.start("rpl_2")  # of which there was none
    platform.wait_ready("rpl_1", "rpl_2")
    for handle in (first, second):
        command = Path(f"/proc/{handle.pid}/cmdline").read_text()
        assert f"modelworks replica toy --home {platform.folder / 'home'}" in command
        assert wait_for(lambda handle=handle: "ready" in engine.logs(handle), 5)  # written after it says so
    assert (platform.folder / "home" / "logs" / "spare.log").read_text() == ""

    async def story():
        gateway = platform.gateway()
        assert [await predict(gateway, float(x)) for x in range(4)] == [0.0, 2.0, 4.0, 6.0]
        platform.router.close()

    uvloop.run(story())
    engine.prepare()
    spare = engine._spare
    limited = platform.start("rpl_3", memory_mb=4096)  # its limit holds from the first import on
    assert limited.pid != spare.pid
    engine.dismiss()
    assert wait_for(lambda: gone(spare.pid), 5)
    os.kill(first.pid, signal.SIGKILL)
    assert wait_for(lambda: (seen := platform.observed("rpl_1")) is None or not seen.alive, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expected": 5.0}, "does not answer its parity samples as training did"),
        ({"runtime": "no_such_module:Runtime"}, "could not be loaded: ModuleNotFoundError: No module named 'no_such_"),
        ({"runtime": "serve_toys:Starved", "memory_mb": 256}, "needs more than memory_mb=256 MiB"),
        ({"runtime": "unheard-of"}, "there is no runtime 'unheard-of'"),
        ({"manifest": __file__}, "not a model package's manifest"),
    ],
)
def test_a_replica_refuses_to_serve_what_is_wrong(platform, changes, message):
    handle = platform.start("rpl_1", **changes)
    seen = []
    assert wait_for(lambda: seen.append(platform.observed("rpl_1")) or not seen[-1].alive, 10)
    assert (seen[-1].exit_code, seen[-1].phase) == (3, "failed")
    assert message in seen[-1].message
    assert not Path(handle.endpoint).exists()


def test_kill_9_under_load_fails_no_call(platform):
    platform.start("rpl_1")
    platform.start("rpl_2")
    platform.wait_ready("rpl_1", "rpl_2")

    async def story():
        gateway = platform.gateway()
        stop, results = asyncio.Event(), []
        clients = [asyncio.create_task(steady(gateway, stop, results)) for _ in range(32)]
        for turn in range(3):
            await asyncio.sleep(0.2)
            victim = f"rpl_{turn + 1}"
            os.kill(platform.handles.pop(victim).pid, signal.SIGKILL)
            platform.start(f"rpl_{turn + 3}")
            platform.follow()
            while not set(platform.handles) <= {seen.replica_id for seen in platform.router.states() if seen.connected}:
                await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)
        assert len(results) > 500
        assert all(results)
        platform.router.close()

    uvloop.run(story())
    ended = []
    wait_for(lambda: ended.extend(seen for seen in platform.engine.list() if not seen.alive) or len(ended) == 3, 2)
    assert [seen.exit_code for seen in ended] == [-signal.SIGKILL] * 3
    assert all("signal 9" in seen.message for seen in ended)


@pytest.mark.slow
def test_kill_9_every_second_under_a_load_of_64_fails_no_call(platform):
    platform.start("rpl_1")
    platform.start("rpl_2")
    platform.wait_ready("rpl_1", "rpl_2")

    async def story():
        gateway = platform.gateway()
        stop, results = asyncio.Event(), []
        clients = [asyncio.create_task(steady(gateway, stop, results)) for _ in range(64)]
        for turn in range(5):
            await asyncio.sleep(1.0)
            os.kill(platform.handles.pop(f"rpl_{turn + 1}").pid, signal.SIGKILL)
            platform.start(f"rpl_{turn + 3}")
            platform.follow()
        await asyncio.sleep(1.0)
        stop.set()
        await asyncio.gather(*clients)
        assert len(results) > 1000
        assert all(results)
        assert gateway.router.outstanding(("p", "toy")) == 0
        platform.router.close()

    uvloop.run(story())


def test_a_replica_measures_its_model_when_asked_to(platform):
    handle = platform.start("rpl_1", auto_batch=True, p99_ms=20.0)
    platform.wait_ready("rpl_1")
    log = platform.engine.logs(handle)
    assert "measured" in log
    assert "rows_16" in log

    async def story():
        gateway = platform.gateway()
        assert await asyncio.gather(*[predict(gateway, x) for x in range(300)]) == [2.0 * x for x in range(300)]
        platform.router.close()

    uvloop.run(story())


def test_a_hung_replica_is_avoided_within_three_seconds(platform):
    platform.start("rpl_1")
    platform.start("rpl_2")
    platform.wait_ready("rpl_1", "rpl_2")

    async def story():
        gateway = platform.gateway()
        while sum(state.connected for state in platform.router.states()) < 2:
            await asyncio.sleep(0.01)
        pid = platform.handles["rpl_1"].pid
        os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        answers = await asyncio.gather(*[predict(gateway, x) for x in range(20)])
        took = time.monotonic() - begun
        assert answers == [2.0 * x for x in range(20)], "calls aboard of the hung one are answered by the other"
        assert 1.0 < took < 3.5
        (hung,) = [state for state in platform.router.states() if state.hung_seconds > 2]
        assert hung.replica_id == "rpl_1"
        begun = time.monotonic()
        await asyncio.gather(*[predict(gateway, x) for x in range(20)])
        assert time.monotonic() - begun < 0.5
        os.kill(pid, signal.SIGCONT)
        for _ in range(300):
            if not any(state.hung_seconds for state in platform.router.states()):
                break
            await asyncio.sleep(0.01)
        assert not any(state.hung_seconds for state in platform.router.states()), "it is used again once it answers"
        platform.router.close()

    uvloop.run(story())


def test_a_poison_call_takes_two_replicas_and_no_third(platform):
    for name in ("rpl_1", "rpl_2", "rpl_3"):
        platform.start(name)
    platform.wait_ready(*platform.handles)

    async def story():
        gateway = platform.gateway()
        while sum(state.connected for state in platform.router.states()) < 3:
            await asyncio.sleep(0.01)
        with pytest.raises(ModelworksError) as info:
            await predict(gateway, DEADLY)
        assert (info.value.status, info.value.code) == (500, "poison_call")
        assert await predict(gateway, 1.0) == 2.0
        platform.router.close()

    uvloop.run(story())
    assert wait_for(lambda: sum(gone(handle.pid) for handle in platform.handles.values()) == 2, 2)


def test_long_homes_get_a_private_folder_for_their_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(local.tempfile, "gettempdir", lambda: str(tmp_path))
    home = tmp_path / ("x" * 120)
    folder = run_folder(home)
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert run_folder(home) == folder
    folder.rmdir()
    folder.symlink_to(tmp_path)
    monkeypatch.setattr(local.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "fresh"))
    (tmp_path / "fresh").mkdir()
    assert run_folder(home) == tmp_path / "fresh", "a link that someone else put there is not followed"


def test_engines_are_found_by_name():
    assert ENGINES.get("local") is LocalEngine


BANNED = ["fastapi", "starlette", "sqlalchemy", "pandas", "sklearn", "torch", "duckdb", "pyarrow"]


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        ("modelworks.serve.replica, modelworks.ml.runtimes.onnx, modelworks.ml.runtimes.parity", BANNED),
        ("modelworks.serve.gateway, modelworks.serve.features", [*BANNED, "numpy", "onnxruntime", "onnx"]),
        ("modelworks.engines.local", [*BANNED, "numpy", "onnxruntime"]),
    ],
)
def test_imports_stay_light(modules, banned):
    program = f"import sys, {modules}; print([name for name in {banned!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
