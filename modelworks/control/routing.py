"""How a gateway follows the catalog: a thread polls two counters and hands over a new snapshot when one has grown."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace

from modelworks.control import scaling
from modelworks.control.deployments import FORMATS
from modelworks.core import telemetry
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import CatalogUnavailable, InvalidInput
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Deployment, DeploymentRevision, ModelVersion, Replica
from modelworks.ml.runtimes.choice import BOTH, LLAMA, OPENVINO, TRANSFORMERS, VLLM, choose
from modelworks.security.identity import Authenticator
from modelworks.serve.router import Router
from modelworks.serve.routes import Detour, Key, Limits, Route, Snapshot, Target
from modelworks.store.catalog import Catalog, Tx, Watch

_SOON = 0.03  # seconds between two looks while a replica is awaited

_PLATFORMS = {
    LLAMA: "llama.cpp_gguf",
    OPENVINO: "openvino_gguf",
    BOTH: "openvino_gguf",
    TRANSFORMERS: "transformers_safetensors",
    VLLM: "vllm_safetensors",
}

log = telemetry.logger("follower")


def snapshot(tx: Tx, number: int, limits: Limits) -> Snapshot:
    """Every deployment with the replicas that its calls go to, and the signature of the version that these serve."""
    replicas: dict[str, list[Replica]] = defaultdict(list)
    for replica in tx.list(Replica, status="ready"):
        replicas[replica.deployment_id].append(replica)
    routes: dict[Key, Route] = {}
    for deployment in tx.list(Deployment):
        if deployment.status == "deleting":
            continue
        chosen = scaling.serving(deployment, replicas[deployment.id])
        ref = chosen[0].model_version if chosen else deployment.model_version
        name, _, version = ref.rpartition(":")
        model = tx.find(ModelVersion, project_id=deployment.project_id, name=name, version=int(version))
        if model is None:
            continue
        routes[deployment.project_id, deployment.name] = Route(
            project_id=deployment.project_id,
            name=deployment.name,
            model_version=ref,
            signature=model.signature,
            task=model.task,
            classes=model.classes,
            replicas=tuple(Target(replica.id, replica.endpoint) for replica in chosen),
            limits=limits_of(deployment, limits),
            detours=detours_of(deployment),
            cache=_cache_of(deployment),
            images=model.lineage.get("images") is True,
            platform=platform_of(deployment, model),
            adapters=_adapters(tx, deployment, chosen),
            failed="" if chosen else _failure(deployment),
        )
    return Snapshot(number, routes)


def _adapters(tx: Tx, deployment: Deployment, chosen: list[Replica]) -> dict[str, str]:
    """Those of the revision that the replicas serve."""
    spec = deployment.spec
    if chosen and chosen[0].spec_revision != deployment.spec_revision:
        kept = tx.find(DeploymentRevision, deployment_id=deployment.id, number=chosen[0].spec_revision)
        spec = kept.spec if kept else spec
    return dict(spec.get("adapters", {}))


def _failure(deployment: Deployment) -> str:
    """Why nothing serves and nothing is about to; "" while a replica of a revision that once was ready comes up."""
    hopeless = deployment.status == "failed" and deployment.serving_revision in (None, deployment.spec_revision)
    return (deployment.message or "its replicas do not start") if hopeless else ""


def limits_of(deployment: Deployment, usual: Limits) -> Limits:
    """The limits that a deployment's spec sets; where it sets none, the `usual` ones."""
    spec = DeploymentSpec.model_validate(deployment.spec)
    return replace(
        usual,
        queue=spec.limits.queue or usual.queue,
        in_flight=max(usual.in_flight, 2 * spec.batching.max_batch),
        concurrency=spec.limits.concurrency or usual.concurrency,
        wait_seconds=spec.batching.wait_ms / 1000,
        hedge_seconds=spec.hedge_ms / 1000 if spec.hedge_ms else None,
    )


def detours_of(deployment: Deployment) -> tuple[Detour, ...]:
    spec = DeploymentSpec.model_validate(deployment.spec)
    return tuple(Detour(rule.to, frozenset(rule.on), rule.longer_than) for rule in spec.routes)


def _cache_of(deployment: Deployment) -> tuple[float, int] | None:
    cache = DeploymentSpec.model_validate(deployment.spec).cache
    return None if cache is None else (cache.seconds, cache.megabytes * 1024 * 1024)


def platform_of(deployment: Deployment, model: ModelVersion) -> str:
    """What runs the model, and the form of its weights."""
    if model.task != GENERATION:
        return Route.platform
    runtime = FORMATS.get(str(model.lineage.get("format")), LLAMA)
    engine = DeploymentSpec.model_validate(deployment.spec).engine
    with suppress(InvalidInput):  # its replicas say so when they start
        runtime = choose(engine, runtime, model.algorithm, model.lineage)
    return _PLATFORMS[runtime]


class Follower:
    """Keeps one gateway's router and authenticator current. While the catalog is away, the last picture stands."""

    def __init__(
        self, catalog: Catalog, router: Router, authenticator: Authenticator, *, limits: Limits, interval: float = 0.15
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._authenticator = authenticator
        self._limits = limits
        self._interval = interval
        self._number = -1
        self._watch = Watch(catalog, 0.5)  # a revocation must hold within a second, also when a look came to nothing
        self._awaited = False  # a replica that calls would wait for is on its way
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    async def start(self) -> None:
        """Take the first snapshot, then follow in a thread."""
        self._loop = asyncio.get_running_loop()
        first = await asyncio.to_thread(self._look)
        if first:
            self._router.apply(first)
        self._thread.start()

    async def stop(self) -> None:
        self._stopped.set()
        await asyncio.to_thread(self._thread.join, 5.0)

    def _look(self) -> Snapshot | None:
        with self._catalog.read() as tx:
            number = tx.counter("routing")
            if number == self._number:
                return None
            taken = snapshot(tx, number, self._limits)
        self._number = number
        self._awaited = any(not route.replicas and not route.failed for route in taken.routes.values())
        return taken

    def _follow(self) -> None:
        away = False
        while not self._stopped.wait(_SOON if self._awaited else self._interval):
            try:
                if not self._watch.stirred():
                    continue
                self._authenticator.refresh()
                taken = self._look()
                self._watch.seen()
                away = False
            except CatalogUnavailable as error:
                if not away:
                    log.warning("the catalog is away; going on with the last picture", reason=error.message)
                away = True
                continue
            if taken:
                self._loop.call_soon_threadsafe(self._router.apply, taken)
