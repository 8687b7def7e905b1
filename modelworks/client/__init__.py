"""The SDK: everything the platform does, typed, sync (`Client`) and async (`AsyncClient`). Imports core only.

from modelworks import Client

with Client() as client:
    data = client.datasets.upload("iris.csv", name="iris")   # data.ref is "iris:1"; the bare "iris" means the newest
    job = client.training_jobs.create(model="iris", dataset=data.ref, target="species", algorithm="logistic-regression")
    job = client.training_jobs.wait(job)
    client.deployments.put("iris", model=job.model_version)
    client.deployments.wait_ready("iris")
    print(client.deployments.predict("iris", {"sepal length (cm)": 5.1, ...}).outputs[0].label)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from modelworks.client.access import Audit, Keys, Memberships, Projects, Users
from modelworks.client.connection import Connection, locate
from modelworks.client.data import Datasets
from modelworks.client.deployments import Deployments
from modelworks.client.jobs import Evaluations, Jobs, Reports, TrainingJobs, error_of_job
from modelworks.client.models import Models
from modelworks.client.modes import Async, Mode, Sync, call
from modelworks.client.texts import Texts
from modelworks.client.transport import RETRIES, AsyncCarrier, Carrier, Request, SyncCarrier, Transport
from modelworks.client.types import Algorithm, Model, NewKey, Output, Prediction, Usage, WhoAmI, parse

__all__ = [
    "Algorithm",
    "AsyncClient",
    "Client",
    "Connection",
    "Model",
    "NewKey",
    "Output",
    "Prediction",
    "Usage",
    "WhoAmI",
    "error_of_job",
    "locate",
    "parse",
]


class _Face(Texts[Mode]):
    """What both clients are: the parts of the API by name, over one transport."""

    def __init__(self, carrier: Carrier, connection: Connection, project: str | None, retries: int) -> None:
        super().__init__(Transport(connection, carrier, project=project, retries=retries))
        self.datasets: Datasets[Mode] = Datasets(self._http)
        self.jobs: Jobs[Mode] = Jobs(self._http)
        self.training_jobs: TrainingJobs[Mode] = TrainingJobs(self._http)
        self.evaluations: Evaluations[Mode] = Evaluations(self._http)
        self.reports: Reports[Mode] = Reports(self._http)
        self.models: Models[Mode] = Models(self._http)
        self.deployments: Deployments[Mode] = Deployments(self._http)
        self.keys: Keys[Mode] = Keys(self._http)
        self.projects: Projects[Mode] = Projects(self._http)
        self.users: Users[Mode] = Users(self._http)
        self.memberships: Memberships[Mode] = Memberships(self._http)
        self.audit: Audit[Mode] = Audit(self._http)

    @property
    def connection(self) -> Connection:
        """The server's address and where the key came from."""
        return self._http.connection

    @call
    async def algorithms(self) -> Sequence[Algorithm]:
        """Every algorithm, its task, and its hyperparameters as JSON Schema."""
        found = await self._http.json(Request("GET", "/api/v1/algorithms"))
        return [self._http.validate(Algorithm, item) for item in found["data"]]

    @call
    async def transforms(self) -> Sequence[dict[str, Any]]:
        """Every transform, the column types it applies to, and its parameters as JSON Schema."""
        return (await self._http.json(Request("GET", "/api/v1/transforms")))["data"]

    @call
    async def metrics(self) -> Sequence[dict[str, Any]]:
        """Every metric: id, task, direction and bounds."""
        return (await self._http.json(Request("GET", "/api/v1/metrics")))["data"]

    @call
    async def status(self) -> dict[str, Any]:
        """How the server is."""
        return await self._http.json(Request("GET", "/api/v1/status"))

    @call
    async def whoami(self) -> WhoAmI:
        return await self._http.model(Request("GET", "/api/v1/whoami"), WhoAmI)

    @call
    async def usage(self, *, by: str | None = None, deployment: str | None = None) -> Sequence[Usage]:
        """Calls and tokens since the server's home was made, by key and deployment; `by` "key" or "deployment": by that.

        An administrator's key sees all keys of its project, another key itself alone.
        """
        found = await self._http.json(Request("GET", "/api/v1/usage", query={"by": by, "deployment": deployment}))
        return [self._http.validate(Usage, item) for item in found["data"]]

    @call
    async def health(self) -> dict[str, Any]:
        """Needs no key, and is answered as soon as the server is up."""
        return await self._http.json(Request("GET", "/health", timeout=5.0))


def _options(connection: Connection, ca: str | Path | None, transport: Any) -> dict[str, Any]:
    import ssl

    options: dict[str, Any] = {"trust_env": not connection.local}  # no proxy between us and our own machine
    if transport is not None:
        options["transport"] = transport
    if connection.url.startswith("https") and ca is not None:
        options["verify"] = ssl.create_default_context(cafile=str(ca))
    return options


class Client(_Face[Sync]):
    """The server and the key are by default those of MODELWORKS_URL and MODELWORKS_API_KEY, then of the local home.

    `project`: another project, for an administrator's key. `ca`: PEM file of the authority to trust, for https.
    `max_retries`: how often a request is sent again after 429, 503 or a broken connection.
    `transport`: an httpx2 transport, for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        home: str | Path | None = None,
        project: str | None = None,
        ca: str | Path | None = None,
        max_retries: int = RETRIES,
        transport: Any = None,
    ) -> None:
        connection = locate(url, api_key, home)
        super().__init__(SyncCarrier(**_options(connection, ca, transport)), connection, project, max_retries)

    def close(self) -> None:
        self._http.carrier.http.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Face[Async]):
    """As Client, with coroutines: `await client.models.list()`, `async for event in client.jobs.stream(job)`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        home: str | Path | None = None,
        project: str | None = None,
        ca: str | Path | None = None,
        max_retries: int = RETRIES,
        transport: Any = None,
    ) -> None:
        connection = locate(url, api_key, home)
        super().__init__(AsyncCarrier(**_options(connection, ca, transport)), connection, project, max_retries)

    async def close(self) -> None:
        await self._http.carrier.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
