"""Use cases on deployments: they only write what is desired; the reconcile loop makes it so."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelworks.control.idempotency import create_once
from modelworks.control.references import resolve_model
from modelworks.control.requests import without_paths
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.specs import NAME_PATTERN
from modelworks.core.tasks import ADAPTER, GENERATION
from modelworks.core.types import Caller, Deployment, DeploymentRevision, ModelVersion, Page, Replica
from modelworks.ml.runtimes.choice import LLAMA, TRANSFORMERS, VLLM, check_adapter, choose
from modelworks.security import audit
from modelworks.store.catalog import Catalog, Tx

FORMATS = {"gguf": LLAMA, "safetensors": TRANSFORMERS}  # of a language model's package: the runtime


class Deployments:
    """`logs` is the folder where replicas write their logs."""

    def __init__(self, catalog: Catalog, logs: Path) -> None:
        self._catalog = catalog
        self._logs = logs

    def put(self, caller: Caller, name: str, spec: DeploymentSpec) -> Deployment:
        """Write what should be serving under `name`. The same again changes nothing; anything else is a new revision."""
        _check_name(name)
        body = {"name": name, "spec": spec.model_dump(mode="json")}
        with self._catalog.write() as tx:
            return create_once(
                tx, caller, "deployments.put", body, Deployment, lambda: self._write(tx, caller, name, spec)
            )

    def _write(self, tx: Tx, caller: Caller, name: str, spec: DeploymentSpec, status: str = "updating") -> Deployment:
        model = resolve_model(tx, caller.project_id, spec.model)
        adapters = _adapters(tx, caller, spec, model)
        spec = spec.model_copy(update={"adapters": {key: one.ref for key, one in adapters.items()}})
        _check_engine(spec, model, sum(one.size for one in adapters.values()))
        known = tx.find(Deployment, project_id=caller.project_id, name=name)
        _check_routes(tx, caller, name, spec, model.task)
        resolved: dict[str, Any] = {
            "spec": spec.model_dump(mode="json"),
            "model_version": model.ref,
            "model_version_id": model.id,
            "digest": model.digest,
            "task": model.task,
            "signature": model.signature,
        }
        if known is None:
            deployment = tx.add(
                Deployment(project_id=caller.project_id, name=name, created_by=caller.principal.key_id, **resolved)
            )
        elif known.status == "deleting":
            raise InvalidInput(
                f"deployment {name!r} is being deleted; try again in a moment", code="deleting", param="name"
            )
        elif known.model_version_id == model.id and known.spec == resolved["spec"] and known.status != "failed":
            return known
        else:
            deployment = tx.update(known, status=status, message="", spec_revision=known.spec_revision + 1, **resolved)
        tx.add(
            DeploymentRevision(
                project_id=caller.project_id,
                deployment_id=deployment.id,
                number=deployment.spec_revision,
                spec=resolved["spec"],
                model_version=model.ref,
                created_by=caller.principal.key_id,
            )
        )
        audit.record(tx, caller, "deployments.put", name, revision=deployment.spec_revision, model_version=model.ref)
        return deployment

    def get(self, caller: Caller, name: str) -> Deployment:
        with self._catalog.read() as tx:
            return self._find(tx, caller, name)

    def list(self, caller: Caller, *, limit: int = 20, after: str | None = None) -> Page[Deployment]:
        with self._catalog.read() as tx:
            return tx.page(Deployment, limit=limit, after=after, project_id=caller.project_id)

    def delete(self, caller: Caller, name: str) -> Deployment:
        """Its replicas finish what they are doing and stop; then the name is free again."""
        with self._catalog.write() as tx:
            deployment = self._find(tx, caller, name)
            if deployment.status == "deleting":
                return deployment
            audit.record(tx, caller, "deployments.delete", name)
            return tx.update(deployment, status="deleting", message="")

    def rollback(self, caller: Caller, name: str, number: int | None = None) -> Deployment:
        """Write the spec of revision `number` (by default the one before) as a new revision, with its model version."""
        with self._catalog.write() as tx:
            deployment = self._find(tx, caller, name)
            if number is None and deployment.spec_revision == 1:
                raise InvalidInput(
                    f"deployment {name!r} is at its first revision: there is nothing to go back to",
                    code="revision_not_found",
                    param="revision",
                )
            number = deployment.spec_revision - 1 if number is None else number
            old = tx.find(DeploymentRevision, deployment_id=deployment.id, number=number)
            if old is None or number == deployment.spec_revision:
                raise InvalidInput(
                    f"deployment {name!r} has no earlier revision {number}; it is at revision {deployment.spec_revision}",
                    code="revision_not_found",
                    param="revision",
                )
            spec = DeploymentSpec.model_validate({**old.spec, "model": old.model_version})
            return self._write(tx, caller, name, spec, status="rolling_back")

    def revisions(self, caller: Caller, name: str) -> Sequence[DeploymentRevision]:
        with self._catalog.read() as tx:
            deployment = self._find(tx, caller, name)
            return tx.list(DeploymentRevision, deployment_id=deployment.id)

    def replicas(self, caller: Caller, name: str) -> Sequence[Replica]:
        with self._catalog.read() as tx:
            return tx.list(Replica, deployment_id=self._find(tx, caller, name).id)

    def logs(self, caller: Caller, name: str, *, limit: int = 64 * 1024) -> str:
        """The ends of the newest replicas' logs, `limit` bytes in all, without this machine's paths."""
        with self._catalog.read() as tx:
            deployment = self._find(tx, caller, name)
            newest = tx.list(Replica, deployment_id=deployment.id, newest_first=True, limit=4)
        parts = []
        for replica in reversed(newest):
            path = self._logs / f"{replica.id}.log"
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - limit // len(newest)))
                    tail = file.read().decode(errors="replace")
                parts.append(f"== {replica.id} ({replica.model_version}, {replica.status})\n{tail}")
        return without_paths("\n".join(parts), self._logs.parent)

    def _find(self, tx: Tx, caller: Caller, name: str) -> Deployment:
        found = tx.find(Deployment, project_id=caller.project_id, name=name)
        if found is None:
            raise NotFound(
                f"there is no deployment {name[:100]!r} in this project; `modelworks deploy` makes one",
                code="deployment_not_found",
                param="name",
            )
        return found


def _check_routes(tx: Tx, caller: Caller, name: str, spec: DeploymentSpec, task: str) -> None:
    """InvalidInput unless every rule names another deployment of the same task that there is."""
    for index, rule in enumerate(spec.routes):
        other = tx.find(Deployment, project_id=caller.project_id, name=rule.to)
        if rule.to == name or other is None or other.task != task:
            reason = (
                "there is none" if other is None else "it is this one" if rule.to == name else f"it serves {other.task}"
            )
            raise InvalidInput(
                f"routes[{index}].to must name another deployment of task {task}, and of {rule.to!r}: {reason}",
                param=f"routes.{index}.to",
            )


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidInput(
            f"{name[:100]!r} cannot be a deployment's name: use 1 to 100 letters, digits, '.', '_' or '-'", param="name"
        )


def _adapters(tx: Tx, caller: Caller, spec: DeploymentSpec, model: ModelVersion) -> dict[str, ModelVersion]:
    """What the adapters mean now. InvalidInput for one that no engine puts on this model, and for one without a model."""
    if model.task == ADAPTER:
        base = model.lineage.get("base_model")
        raise InvalidInput(
            f"{model.ref} is a LoRA adapter and serves nothing by itself; deploy its base model{f' ({base})' if base else ''} "
            f'with adapters: {{"{model.name}": "{model.ref}"}}',
            param="model",
        )
    found = {}
    for name, text in spec.adapters.items():
        param = f"adapters.{name}"
        try:
            found[name] = one = resolve_model(tx, caller.project_id, text)
        except (InvalidInput, NotFound) as error:
            error.param = param
            raise
        if one.task != ADAPTER or model.task != GENERATION:
            said = f"{one.ref} does {one.task}" if one.task != ADAPTER else f"{model.ref} does {model.task}"
            raise InvalidInput(f"adapters are LoRA adapters of a language model, and {said}", param=param)
        runtime = FORMATS.get(str(model.lineage.get("format")), LLAMA)
        check_adapter(spec.engine, runtime, model.algorithm, one.lineage, param)
    return found


def _check_engine(spec: DeploymentSpec, model: ModelVersion, more: int) -> None:
    """InvalidInput for an engine that cannot run this model, and with the numbers for one that this machine cannot hold.

    `more`: bytes of its adapters.
    """
    if model.task != GENERATION:
        given = [name for name in ("engine", "context", "tensor_parallel_size") if getattr(spec, name) not in ("auto", None)]
        if given:
            param = given[-1]
            raise InvalidInput(f"{param} is for language models, and {model.ref} does {model.task}", param=param)
        return
    runtime = FORMATS.get(str(model.lineage.get("format")))
    chosen = spec.engine if runtime is None else choose(spec.engine, runtime, model.algorithm, model.lineage)
    if spec.tensor_parallel_size is not None and chosen != VLLM:
        raise InvalidInput(
            f"tensor_parallel_size is for the engine vllm, and {chosen} runs this model; leave it out",
            param="tensor_parallel_size",
        )
    trained = model.lineage.get("context_length")
    if spec.context is not None and isinstance(trained, int) and spec.context > trained:
        raise InvalidInput(f"{model.ref} was trained on {trained} tokens; ask for at most that", param="context")
    context = spec.context or min(2048, trained or 2048)
    cache = context * int(model.lineage.get("token_bytes") or 0)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if model.size + more + cache > here:
        raise InvalidInput(
            f"{model.ref} does not fit: {(model.size + more) >> 20} MiB of weights and {cache >> 20} MiB of cache for {context} "
            f"tokens, and this machine has {here >> 20} MiB; take a smaller model or context",
            code="does_not_fit",
            param="model",
        )
