"""The reconcile loop: makes the replicas that are observed equal the deployments that are desired.

Runs in one thread of the server. All it needs to go on after a kill is in the catalog; what an earlier server started
died with it, so the first turn only notes that down and starts anew.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelworks.control import scaling
from modelworks.control.references import resolve_model
from modelworks.core import telemetry
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import Conflict, NotFound
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Deployment, DeploymentRevision, Job, ModelVersion, Replica
from modelworks.engines.base import Engine, Handle, Observed, ReplicaSpec
from modelworks.serve.figures import Load
from modelworks.store.blobs import Blobs
from modelworks.store.catalog import Catalog, Tx, Watch

log = telemetry.logger("reconcile")

ACTIVE = ("starting", "ready", "draining")
FATAL_EXITS = frozenset({3})  # the package itself is at fault (see serve/replica.py): starting it again would not help
HUNG_SECONDS = 10.0  # without a sign of life; gateways turn away from it after 3 s already
DRAIN_SECONDS = 900.0  # that calls aboard of a replica which is replaced get: beyond any call's deadline
_SETTLE = 0.5  # seconds that gateways get to see that a replica drains before it is told to stop
_STABLE = 60.0  # seconds of service after which earlier crashes are forgotten
_LOOK = 1.0  # seconds between two looks at the load; gateways tell it about as often
_KEPT_ROWS = 8  # ended replicas of a deployment that stay listed, with their logs


@dataclass
class _Held:
    """A replica of this run: its engine handle, and since when it drains."""

    handle: Handle
    draining_since: float | None = None
    told: bool = False


@dataclass(frozen=True)
class _Order:
    """A replica to start: its row, and what it serves. `adapters`: the digests of their manifests, by name."""

    row: Replica
    model: ModelVersion
    spec: DeploymentSpec
    adapters: dict[str, str]


class Reconciler:
    """`turn` does one step and never waits for a replica. `secret` (hex) is what links to replicas present.

    `loads`: what gateways have under way, by project id and deployment; without it every deployment stays at its least.
    """

    def __init__(
        self,
        catalog: Catalog,
        blobs: Blobs,
        engine: Engine,
        *,
        home: Path,
        secret: str,
        drain_seconds: float = DRAIN_SECONDS,
        loads: Callable[[], Mapping[tuple[str, str], Load]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._watch = Watch(catalog)
        self._blobs = blobs
        self._engine = engine
        self._home = home
        self._secret = secret
        self._drain_seconds = drain_seconds
        self._loads = loads
        self._looked = -_LOOK
        self._demand: dict[str, deque[tuple[float, int]]] = {}  # deployment -> when, and calls under way then
        self._scale: dict[str, int] = {}  # deployment -> replicas that the load asks for
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._failures: dict[tuple[str, int], scaling.Failures] = {}
        self._deployments: dict[str, Deployment] = {}
        self._replicas: dict[str, Replica] = {}
        self._seen = -1
        self._begun = False

    def turn(self) -> None:
        """Look at both sides and take the next step for each deployment. CatalogUnavailable changes nothing."""
        if not self._begun:
            self._bury_the_past()
            self._begun = True
        self._read()
        try:
            self._note(self._engine.list())
            self._weigh()
            for deployment in list(self._deployments.values()):
                self._step(deployment)
        except Conflict:  # someone wrote the row at the same moment: read again at the next turn
            self._seen = -1
        self._tell_draining()

    @property
    def starting(self) -> bool:
        """Whether a replica is on its way."""
        return any(row.status == "starting" for row in self._replicas.values())

    def stop(self, grace: float) -> None:
        """Drain all replicas, for at most `grace` seconds; rows stay as they are, the next start buries them."""
        for held in self._held.values():
            self._engine.stop(held.handle, grace)
        until = time.monotonic() + grace + 1
        while time.monotonic() < until and any(seen.alive for seen in self._engine.list()):
            time.sleep(0.02)

    def _bury_the_past(self) -> None:
        with self._catalog.write() as tx:
            for replica in tx.list(Replica, status=list(ACTIVE)):
                tx.update(replica, status="stopped", message="the server was started anew")

    def _read(self) -> None:
        if self._seen >= 0 and not self._watch.stirred():
            return
        counter = self._catalog.counters().get("routing", 0)
        if counter == self._seen:
            self._watch.seen()
            return
        with self._catalog.read() as tx:
            self._deployments = {row.id: row for row in tx.list(Deployment)}
            self._replicas = {row.id: row for row in tx.list(Replica, status=list(ACTIVE))}
        self._seen = counter
        self._watch.seen()

    # what the engine saw

    def _note(self, observed: list[Observed]) -> None:
        for seen in observed:
            row = self._replicas.get(seen.replica_id)
            if row is None:
                continue
            if not seen.alive:
                self._ended(row, seen)
            elif seen.phase == "ready" and row.status == "starting":
                self._write(row, status="ready", ready_at=time.time(), message="")
                log.info("replica ready", replica=row.id, model_version=row.model_version)
            elif seen.silent > HUNG_SECONDS and (held := self._held.get(row.id)):
                log.error("replica hangs; it is replaced", replica=row.id, silent_seconds=round(seen.silent, 1))
                self._engine.stop(held.handle, 0.0)

    def _ended(self, row: Replica, seen: Observed) -> None:
        self._held.pop(row.id, None)
        expected = row.status == "draining"
        self._write(row, status="stopped" if expected else "failed", message="" if expected else seen.message)
        if expected:
            return
        log.error("replica died", replica=row.id, exit_code=seen.exit_code, reason=seen.message)
        key = (row.deployment_id, row.spec_revision)
        before = self._failures_of(*key)
        stable = row.ready_at is not None and time.time() - row.ready_at > _STABLE
        fatal = seen.message or "the replica refused the package" if seen.exit_code in FATAL_EXITS else None
        crashes = 0 if row.ready_at is not None and before.crashes == 0 else before.crashes + 1
        self._failures[key] = scaling.Failures(0 if stable else crashes, self._clock(), fatal, seen.message)

    # what the load asks for

    def _weigh(self) -> None:
        now = self._clock()
        if self._loads is None or now - self._looked < _LOOK:
            return
        self._looked = now
        loads = self._loads()
        scaled = {row.id: DeploymentSpec.model_validate(row.spec).replicas for row in self._deployments.values()}
        scaled = {id: spec for id, spec in scaled.items() if (spec.max or spec.min) > spec.min}
        for kept in (self._demand, self._scale):
            for id in kept.keys() - scaled.keys():
                del kept[id]
        for id, spec in scaled.items():
            row = self._deployments[id]
            load = loads.get((row.project_id, row.name))
            seen = self._demand.setdefault(id, deque())
            seen.append((now, load.aboard + load.waiting if load else 0))
            while now - seen[0][0] > spec.scale_down_s + 2 * _LOOK:
                seen.popleft()
            before = self._scale.get(id, spec.min)
            self._scale[id] = scaling.follow(spec, before, seen, now)
            if self._scale[id] != before:
                log.info("scaled", deployment=row.name, replicas=self._scale[id], calls_under_way=seen[-1][1])

    # what is to be done

    def _step(self, deployment: Deployment) -> None:
        rows = [row for row in self._replicas.values() if row.deployment_id == deployment.id]
        failures = self._failures_of(deployment.id, deployment.spec_revision)
        earlier = self._failures_of(deployment.id, deployment.serving_revision or 0)
        plan = scaling.plan(deployment, rows, failures, self._clock(), earlier, self._scale.get(deployment.id))
        ready = sum(row.status == "ready" for row in rows)
        serving = deployment.spec_revision if plan.status == "ready" else deployment.serving_revision
        shown = {"status": plan.status, "message": plan.message, "ready_replicas": ready, "serving_revision": serving}
        changed = any(getattr(deployment, name) != value for name, value in shown.items())
        if not (plan.start or plan.restore or plan.drain or plan.remove or changed):
            return
        started: list[_Order] = []
        with self._catalog.write() as tx:
            if plan.remove:
                self._remove(tx, deployment)
                return
            numbers = [deployment.spec_revision] * plan.start + [deployment.serving_revision or 0] * plan.restore
            started = [self._new_replica(tx, deployment, number) for number in numbers]
            for row in plan.drain:
                self._replicas[row.id] = tx.update(row, status="draining")
            if changed:
                self._deployments[deployment.id] = tx.update(deployment, **shown)
        for order in started:
            self._start(deployment, order)
        for row in plan.drain:
            if held := self._held.get(row.id):
                held.draining_since = self._clock()

    def _failures_of(self, deployment_id: str, number: int) -> scaling.Failures:
        return self._failures.get((deployment_id, number), scaling.Failures())

    def _new_replica(self, tx: Tx, deployment: Deployment, number: int) -> _Order:
        """A row for a replica of revision `number`, with what that revision serves and how."""
        revision = tx.find(DeploymentRevision, deployment_id=deployment.id, number=number)
        assert revision is not None, "a revision is written with the deployment that names it"
        row = tx.add(
            Replica(
                project_id=deployment.project_id,
                deployment_id=deployment.id,
                spec_revision=number,
                model_version=revision.model_version,
            )
        )
        self._prune(tx, deployment)
        model = resolve_model(tx, deployment.project_id, revision.model_version)
        spec = DeploymentSpec.model_validate(revision.spec)
        adapters = {name: resolve_model(tx, deployment.project_id, ref) for name, ref in spec.adapters.items()}
        return _Order(row, model, spec, {name: one.digest for name, one in adapters.items()})

    def _start(self, deployment: Deployment, order: _Order) -> None:
        row, model, spec = order.row, order.model, order.spec
        try:
            manifest = self._blobs.path(model.digest)
            adapters = {name: str(self._blobs.path(digest)) for name, digest in order.adapters.items()}
        except NotFound as error:
            key = (deployment.id, row.spec_revision)
            self._failures[key] = scaling.Failures(fatal=f"its package is gone: {error.message}")
            self._write(row, status="failed", message=error.message)
            return
        handle = self._engine.start(
            ReplicaSpec(
                replica_id=row.id,
                deployment=deployment.name,
                home=str(self._home),
                model_version=row.model_version,
                manifest=str(manifest),
                blobs=str(self._blobs.root),
                secret=self._secret,
                engine=self._engine_of(model) if spec.engine == "auto" else spec.engine,
                context=spec.context,
                adapters=adapters,
                tensor_parallel_size=spec.tensor_parallel_size,
                threads=spec.resources.threads,
                memory_mb=spec.resources.memory_mb,
                max_batch=spec.batching.max_batch,
                max_rows=spec.batching.max_rows,
                wait_ms=spec.batching.wait_ms,
                auto_batch=spec.batching.auto,
                p99_ms=spec.batching.p99_ms,
                drain_seconds=self._drain_seconds,
            )
        )
        self._held[row.id] = _Held(handle)
        self._replicas[row.id] = row
        self._write(row, endpoint=handle.endpoint, pid=handle.pid)

    def _engine_of(self, model: ModelVersion) -> str:
        """The engine that was measured as the fastest for many on this machine; "auto" without a measurement."""
        if model.task != GENERATION:
            return "auto"
        with self._catalog.read() as tx:
            jobs = tx.list(
                Job, kind="measure", status="succeeded", project_id=model.project_id, newest_first=True, limit=200
            )
        for job in jobs:
            if job.spec.get("model_version_id") == model.id and job.result.get("machine") == platform.node():
                found = str(job.result["fastest"]["many"])
                return "auto" if found == "openvino" else found  # auto is OpenVINO with llama.cpp beside it
        return "auto"

    def _tell_draining(self) -> None:
        """Ask draining replicas to stop once gateways have had the time to turn away from them."""
        now = self._clock()
        for held in self._held.values():
            if held.draining_since is not None and not held.told and now - held.draining_since >= _SETTLE:
                held.told = True
                self._engine.stop(held.handle, self._drain_seconds)

    def _write(self, row: Replica, **changes: object) -> None:
        with self._catalog.write() as tx:
            changed = tx.update(row, **changes)
        if changed.status in ACTIVE:
            self._replicas[row.id] = changed
        else:
            self._replicas.pop(row.id, None)

    def _remove(self, tx: Tx, deployment: Deployment) -> None:
        for table in (Replica, DeploymentRevision):
            tx.delete_where(table, tx.table(table).c.deployment_id == deployment.id)
        tx.delete(deployment)
        self._deployments.pop(deployment.id, None)
        log.info("deployment removed", deployment=deployment.name)

    def _prune(self, tx: Tx, deployment: Deployment) -> None:
        ended = tx.list(Replica, deployment_id=deployment.id, status=["failed", "stopped"], newest_first=True)
        for row in ended[_KEPT_ROWS:]:
            tx.delete(row)
            (self._home / "logs" / f"{row.id}.log").unlink(missing_ok=True)
