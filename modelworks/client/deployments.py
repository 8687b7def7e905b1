"""Deployments: say what should serve, wait until it does, and ask it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from modelworks.client.lists import page, path
from modelworks.client.modes import Mode, Resource, call
from modelworks.client.transport import AWAY, Request
from modelworks.client.types import Prediction, build
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import DeadlineExceeded, ModelworksError, NotFound, Unavailable
from modelworks.core.generation import SECONDS
from modelworks.core.types import Deployment, DeploymentRevision, Page, Replica

_ANSWERED = SECONDS + 30  # beyond the deadline of any prediction: the server is the one to say that it passed
_POLL = (0.1, 1.0)
Row = Mapping[str, Any]


class Deployments(Resource[Mode]):
    """`client.deployments`."""

    @call
    async def put(
        self, name: str, spec: DeploymentSpec | Mapping[str, Any] | str | None = None, **fields: Any
    ) -> Deployment:
        """Say what should serve under `name`: a model ("iris:1"), a DeploymentSpec, or its fields (model, replicas...).

        The same again changes nothing; anything else is a new revision. Answers at once: see `wait_ready`.
        """
        if isinstance(spec, str):
            spec = {"model": spec}
        given = build(DeploymentSpec, spec, fields, "the deployment")
        body = given.model_dump(mode="json", exclude_unset=True)
        return await self._http.model(Request("PUT", _path(name), json=body), Deployment)

    @call
    async def get(self, name: str) -> Deployment:
        return await self._get(name)

    @call
    async def list(self, *, limit: int = 20, after: str | None = None) -> Page[Deployment]:
        return await page(self._http, "/api/v1/deployments", Deployment, limit=limit, after=after)

    @call
    async def delete(self, name: str) -> None:
        """Its replicas finish what they are doing and stop."""
        await self._http.send(Request("DELETE", _path(name)))

    @call
    async def rollback(self, name: str, revision: int | None = None) -> Deployment:
        """Write the spec of an earlier revision (by default the one before) as a new revision."""
        body = {} if revision is None else {"revision": revision}
        return await self._http.model(
            Request("POST", _path(name, "/rollback"), json=body, idempotent=False), Deployment
        )

    @call
    async def revisions(self, name: str) -> Sequence[DeploymentRevision]:
        return (await page(self._http, _path(name, "/revisions"), DeploymentRevision)).items

    @call
    async def replicas(self, name: str) -> Sequence[Replica]:
        return (await page(self._http, _path(name, "/replicas"), Replica)).items

    @call
    async def logs(self, name: str) -> str:
        """The ends of the logs of its newest replicas."""
        return (await self._http.send(Request("GET", _path(name, "/logs")))).text

    @call
    async def wait_ready(
        self, name: str, *, timeout: float = 120.0, progress: Callable[[Deployment], None] | None = None
    ) -> Deployment:
        """The deployment once its present spec is served. Raises its message when it failed.

        A server that restarts in the meantime is waited for.
        """
        started = last_seen = time.monotonic()
        while True:
            try:
                deployment = await self._get(name)
                last_seen = time.monotonic()
            except Unavailable:
                if time.monotonic() - last_seen > AWAY:
                    raise
                continue
            if progress:
                progress(deployment)
            if deployment.status == "ready":
                return deployment
            if deployment.status == "deleting":
                raise NotFound(f"deployment {name!r} is being deleted", code="deployment_not_found", param="name")
            if deployment.status == "failed":
                raise ModelworksError(
                    f"deployment {name!r} failed: {deployment.message or 'see its logs'}", code="deployment_failed"
                )
            elapsed = time.monotonic() - started
            if elapsed >= timeout:
                reason = f" ({deployment.message})" if deployment.message else ""
                raise DeadlineExceeded(
                    f"deployment {name!r} is still {deployment.status} after {timeout:g} s{reason}; it goes on",
                    code="wait_timeout",
                )
            await self._http.carrier.sleep(min(max(_POLL[0], elapsed / 20), _POLL[1], timeout - elapsed))

    @call
    async def predict(
        self,
        name: str,
        inputs: Row | Sequence[Row],
        *,
        parameters: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Prediction:
        """Predict rows of named raw features; one mapping or many. `outputs` come in the order of the inputs.

        An image or a sound is its file: bytes, or a pathlib.Path to read. `parameters` are a language model's (max_tokens,
        temperature, seed, stop, adapter...). `timeout`: seconds without an answer after which this client gives up; by
        default later than the server does.
        """
        given = [inputs] if isinstance(inputs, Mapping) else inputs
        rows = [{name: _value(value) for name, value in row.items()} for row in given]
        body = {"inputs": rows, **({"parameters": dict(parameters)} if parameters else {})}
        seconds = _ANSWERED if timeout is None else timeout
        return await self._http.model(Request("POST", _path(name, "/predict"), json=body, timeout=seconds), Prediction)

    async def _get(self, name: str) -> Deployment:
        return await self._http.model(Request("GET", _path(name)), Deployment)


def _value(value: Any) -> Any:
    """Files in base64, all else as it is."""
    if isinstance(value, PurePath):
        value = Path(value).read_bytes()
    return base64.b64encode(value).decode() if isinstance(value, bytes | bytearray) else value


def _path(name: str, rest: str = "") -> str:
    return path("/api/v1/deployments/{}", name) + rest
