"""The reconcile loop against a hand-driven engine: what it starts, when calls move, what a crash or a refusal leads to."""

import platform

import pytest

from modelworks.control.deployments import Deployments
from modelworks.control.reconcile import Reconciler
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.types import Caller, Deployment, Job, ModelVersion, Principal, Project, Replica, Signature
from modelworks.engines.base import Handle, Observed
from modelworks.serve.figures import Load
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog


class HandEngine:
    """Starts nothing: the test says what became of each replica."""

    def __init__(self):
        self.specs = {}
        self.seen = {}
        self.stopped = []

    def start(self, spec):
        self.specs[spec.replica_id] = spec
        self.set(spec.replica_id)
        return Handle(spec.replica_id, 1, f"/run/{spec.replica_id}")

    def set(self, replica_id, **fields):
        base = {
            "replica_id": replica_id, "deployment": "iris", "pid": 1, "alive": True, "exit_code": None, "started": 0.0,
            "endpoint": "", "phase": "loading", "message": "",
        }  # fmt: skip
        self.seen[replica_id] = Observed(**{**base, **fields})

    def stop(self, handle, grace):
        self.stopped.append(handle.replica_id)

    def list(self):
        seen = list(self.seen.values())
        self.seen = {key: value for key, value in self.seen.items() if value.alive}
        return seen

    def logs(self, handle):
        return ""


class House:
    def __init__(self, folder):
        self.now = 0.0
        self.calls = 0
        self.catalog = Catalog(folder / "catalog.sqlite")
        self.catalog.migrate()
        self.blobs = Blobs(folder / "blobs")
        self.engine = HandEngine()
        self.folder = folder
        self.reconciler = self.fresh()
        self.deployments = Deployments(self.catalog, folder / "logs")
        with self.catalog.write() as tx:
            self.project = tx.add(Project(name="default"))
        principal = Principal(
            key_id="key_1", key_name="k", project_id=self.project.id, role="admin", scopes=frozenset()
        )
        self.caller = Caller(principal)
        self.add_version(1)

    def fresh(self):
        return Reconciler(
            self.catalog, self.blobs, self.engine, home=self.folder, secret="s" * 64, clock=lambda: self.now,
            loads=lambda: {(self.project.id, "iris"): Load(self.project.id, "iris", aboard=self.calls)},
        )  # fmt: skip

    def add_version(self, number):
        with self.catalog.write() as tx:
            tx.add(
                ModelVersion(
                    project_id=self.project.id, name="iris", version=number, task="tabular-classification", size=1,
                    digest=self.blobs.put_bytes(b"manifest %d" % number), signature=Signature(inputs=[], outputs=[]),
                )
            )  # fmt: skip

    def put(self, **spec):
        return self.deployments.put(self.caller, "iris", DeploymentSpec(**{"model": "iris", **spec}))

    def turn(self, times=1, seconds=1.0):
        for _ in range(times):
            self.now += seconds
            self.reconciler.turn()

    def get(self):
        return self.deployments.get(self.caller, "iris")

    def active(self):
        with self.catalog.read() as tx:
            return tx.list(Replica, status=["starting", "ready", "draining"])


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def bring_up(house, **spec):
    house.put(**spec)
    house.turn()
    for replica in house.active():
        house.engine.set(replica.id, phase="ready")
    house.turn(2)
    assert house.get().status == "ready"


def test_from_desired_to_ready(house):
    house.put(replicas={"min": 2})
    house.turn()
    assert [row.status for row in house.active()] == ["starting", "starting"]
    assert all(row.endpoint for row in house.active())
    for replica in house.active():
        house.engine.set(replica.id, phase="ready")
    house.turn(2)
    assert (house.get().status, house.get().ready_replicas) == ("ready", 2)


def test_the_same_put_again_changes_nothing(house):
    bring_up(house)
    assert house.put().spec_revision == 1
    house.turn()
    assert len(house.engine.specs) == 1


def test_a_new_version_replaces_the_old_only_when_ready(house):
    bring_up(house)
    (old,) = house.active()
    house.add_version(2)
    assert house.put().model_version == "iris:2"
    house.turn()
    new = next(row for row in house.active() if row.id != old.id)
    assert house.get().status == "updating"
    assert old.id not in house.engine.stopped
    house.engine.set(new.id, phase="ready")
    house.turn(3)
    assert house.get().status == "ready"
    assert house.engine.stopped == [old.id]
    house.engine.set(old.id, alive=False, exit_code=0, phase="stopped")
    house.turn()
    assert [row.id for row in house.active()] == [new.id]


def test_a_refused_package_fails_the_revision_and_the_old_one_serves_on(house):
    bring_up(house)
    (old,) = house.active()
    house.add_version(2)
    house.put()
    house.turn()
    new = next(row for row in house.active() if row.id != old.id)
    house.engine.set(new.id, alive=False, exit_code=3, phase="failed", message="parity sample 4 differs")
    house.turn(5)
    found = house.get()
    assert found.status == "failed"
    assert "parity sample 4 differs" in found.message
    assert [row.id for row in house.active()] == [old.id]
    assert len(house.engine.specs) == 2, "a package that was refused is not started again"
    back = house.deployments.rollback(house.caller, "iris")
    assert (back.status, back.model_version, back.spec_revision) == ("rolling_back", "iris:1", 3)


def test_the_last_good_revision_comes_back_after_a_restart(house):
    bring_up(house)
    house.add_version(2)
    house.put()
    house.turn()
    house.engine = HandEngine()  # the server was killed while revision 2 was being tried
    house.reconciler = house.fresh()
    house.turn()
    serving = {house.engine.specs[row.id].model_version: row for row in house.active()}
    assert set(serving) == {"iris:1", "iris:2"}
    house.engine.set(serving["iris:1"].id, phase="ready")
    house.engine.set(serving["iris:2"].id, alive=False, exit_code=3, message="parity sample 4 differs")
    house.turn(3)
    assert house.get().status == "failed"
    assert [(row.model_version, row.status) for row in house.active()] == [("iris:1", "ready")]


def test_a_crashed_replica_is_replaced_at_once_and_repeated_crashes_wait(house):
    bring_up(house)
    (first,) = house.active()
    house.engine.set(first.id, alive=False, exit_code=-9, message="killed")
    house.turn(1, 0.05)
    assert len(house.active()) == 1, "replaced in the same turn"
    for _ in range(3):
        (row,) = house.active()
        house.engine.set(row.id, alive=False, exit_code=1)
        house.turn(1, 0.05)
        house.turn(1, 1.0)
    (row,) = house.active()
    house.engine.set(row.id, alive=False, exit_code=1)
    house.turn(1, 0.05)
    assert house.active() == []
    house.turn(1, 2.0)
    assert len(house.active()) == 1


def test_a_hung_replica_is_ended_and_replaced(house):
    bring_up(house)
    (row,) = house.active()
    house.engine.set(row.id, phase="ready", silent=9.0)
    house.turn()
    assert house.engine.stopped == []
    house.engine.set(row.id, phase="ready", silent=11.0)
    house.turn()
    assert house.engine.stopped == [row.id]
    house.engine.set(row.id, alive=False, exit_code=-9)
    house.turn(2, 0.3)
    assert [replica.status for replica in house.active()] == ["starting"]


def test_after_a_restart_the_deployments_are_started_anew(house):
    bring_up(house)
    house.engine = HandEngine()
    house.reconciler = house.fresh()
    house.turn()
    assert [row.status for row in house.active()] == ["starting"]
    assert len(house.engine.specs) == 1


def test_delete_drains_then_frees_the_name(house):
    bring_up(house)
    house.deployments.delete(house.caller, "iris")
    house.turn(3)
    (row,) = house.active()
    assert row.status == "draining"
    house.engine.set(row.id, alive=False, exit_code=0)
    house.turn(2)
    with pytest.raises(NotFound):
        house.get()
    with house.catalog.read() as tx:
        assert tx.count(Deployment) == tx.count(Replica) == 0


def test_references_are_resolved_at_the_moment_of_the_call_or_refused_by_name(house):
    with pytest.raises(NotFound, match="roses"):
        house.put(model="roses")
    with pytest.raises(NotFound, match="champion"):
        house.put(model="iris@champion")
    with pytest.raises(InvalidInput, match="does not name a model"):
        house.put(model="iris:0")
    bring_up(house)
    house.add_version(2)
    assert house.get().model_version == "iris:1"


def test_replicas_follow_the_load_up_at_once_and_down_slowly(house):
    bring_up(house, replicas={"min": 1, "max": 3, "target": 4, "scale_down_s": 20})
    house.calls = 11
    house.turn(4)
    assert len(house.active()) == 3
    for replica in house.active():
        house.engine.set(replica.id, phase="ready")
    house.turn()
    assert (house.get().status, house.get().ready_replicas) == ("ready", 3)
    house.calls = 0
    house.turn(15)
    assert house.engine.stopped == []
    house.turn(10)
    assert len(house.engine.stopped) == 2
    for id in house.engine.stopped:
        house.engine.set(id, alive=False, exit_code=0, phase="stopped")
    house.turn(3)
    assert (house.get().status, len(house.active())) == ("ready", 1)


def test_engine_auto_goes_by_what_was_measured_on_this_machine(house):
    with house.catalog.write() as tx:
        model = tx.add(
            ModelVersion(
                project_id=house.project.id, name="iris", version=2, task="text-generation", size=1,
                digest=house.blobs.put_bytes(b"manifest 2"), signature=Signature(inputs=[], outputs=[]),
                lineage={"format": "gguf", "file_type": 7}, algorithm="llama",
            )
        )  # fmt: skip
    assert house.reconciler._engine_of(model) == "auto"
    for machine, fastest, engine in (
        ("elsewhere", "llama", "auto"),
        (platform.node(), "llama", "llama"),
        (platform.node(), "openvino", "auto"),  # with llama.cpp beside it
    ):
        result = {"machine": machine, "fastest": {"one": "llama", "many": fastest}}
        spec = {"model_version_id": model.id, "model": model.ref}
        with house.catalog.write() as tx:
            tx.add(Job(project_id=house.project.id, kind="measure", status="succeeded", spec=spec, result=result))
        assert house.reconciler._engine_of(model) == engine
    house.put()
    house.turn()
    assert [spec.engine for spec in house.engine.specs.values()] == ["auto"]
