"""GET /metrics: the figures of all gateways in Prometheus' text format. Docs: docs/operations.md lists every metric."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import anyio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from modelworks.api.docs import release
from modelworks.api.routes import Routes, Use, Who
from modelworks.api.services import Services
from modelworks.core.errors import CatalogUnavailable
from modelworks.core.telemetry import logger, resident
from modelworks.core.types import MOVES, Caller, Job, Project
from modelworks.security import policy
from modelworks.serve.figures import SECONDS, SIZES, Histogram, Tally
from modelworks.serve.gather import Totals, alone

routes = Routes("Server")
log = logger("api.metrics")

CALL = ("project", "deployment", "model_version")
PLACE = ("project", "deployment")

# every metric: name -> (type, what it is, labels); docs/operations.md is checked against this
METRICS: dict[str, tuple[str, str, Sequence[str]]] = {
    "modelworks_requests": ("counter", "Calls of deployments that ended, by HTTP status; 499: cancelled by the caller", (*CALL, "status")),
    "modelworks_errors": ("counter", "Those of them that failed on the server's side (status 500 and above)", CALL),
    "modelworks_request_duration_seconds": ("histogram", "From a call's submission in the gateway to its end", CALL),
    "modelworks_queue_seconds": ("histogram", "How long a call that was answered waited in the replica for the model", CALL),
    "modelworks_model_seconds": ("histogram", "How long the model took for the batch that a call was in", CALL),
    "modelworks_batch_size": ("histogram", "How many calls ran together, as each call saw it", CALL),
    "modelworks_retries": ("counter", "Calls that were given to another replica because the first was lost or refused them", PLACE),
    "modelworks_tokens": ("counter", "By kind: prompt, cached; completion (delivered), repeated (by the cache)", (*PLACE, "key", "kind")),
    "modelworks_calls_outstanding": ("gauge", "Calls that are aboard of replicas", PLACE),
    "modelworks_calls_waiting": ("gauge", "Calls that wait in gateways for a replica", PLACE),
    "modelworks_replicas": ("gauge", "Replicas that a gateway is connected to", PLACE),
    "modelworks_replica_memory_bytes": ("gauge", "Resident memory of a deployment's replicas, summed", PLACE),
    "modelworks_jobs": ("gauge", "Jobs by status", ("project", "status")),
    "modelworks_http_requests": ("counter", "HTTP requests by operation of the policy table and status", ("operation", "status")),
    "modelworks_event_loop_lag_seconds": ("histogram", "How late the gateways' event loops were, looked at ten times a second", ()),
    "modelworks_gateways": ("gauge", "Gateways that share the port", ()),
    "modelworks_resident_memory_bytes": ("gauge", "Resident memory of the gateways, summed", ()),
    "modelworks_request_log_dropped": ("counter", "Lines the request log left out because there were too many", ()),
    "modelworks_build_info": ("gauge", "1, with the version as a label", ("version",)),
}  # fmt: skip
SERVER_WIDE = (  # not of one project: for administrators of the installation
    "modelworks_http_requests",
    "modelworks_request_log_dropped",
    "modelworks_resident_memory_bytes",
    "modelworks_gateways",
    "modelworks_event_loop_lag_seconds",
)

ANSWER: dict[str, Any] = {
    "text/plain": {
        "schema": {"type": "string"},
        "example": '# TYPE modelworks_requests_total counter\nmodelworks_requests_total{project="default",'
        'deployment="iris",model_version="iris:1",status="200"} 42.0\n',
    }
}


@routes.get("/metrics", "metrics.scrape", "Metrics for Prometheus", answer=ANSWER)
async def scrape(services: Use, caller: Who) -> Response:
    """Of the key's project; a system administrator's key of the project `default` sees all projects and the server."""
    totals = await gathered(services)
    text = await anyio.to_thread.run_sync(_render, services, caller, totals)
    return Response(text, media_type=CONTENT_TYPE_LATEST, headers={"cache-control": "no-store"})


async def gathered(services: Services) -> Totals:
    """The figures of all gateways; this one's as of now."""
    observer = services.gateway.observer
    present = observer.snapshot()
    shelf = observer.shelf
    if shelf is None:
        return alone(present)

    def total() -> Totals:
        shelf.put(present)
        return shelf.total()

    return await anyio.to_thread.run_sync(total)


def _render(services: Services, caller: Caller, totals: Totals) -> bytes:
    everything = policy.is_system(caller.principal)
    only = None if everything else caller.project_id
    names, jobs = _from_catalog(services, only)
    families = list(_families(totals, only, names, jobs))
    if not everything:
        families = [family for family in families if family.name not in SERVER_WIDE]
    return generate_latest(_Once(families))


class _Once:
    """A registry of metrics that were collected already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _from_catalog(services: Services, only: str | None) -> tuple[dict[str, str], dict[tuple[str, str], int]]:
    """Names of projects, and jobs by project and status; nothing while the catalog is away."""
    names: dict[str, str] = {}
    jobs: dict[tuple[str, str], int] = {}
    try:
        with services.catalog.read() as tx:
            names = {project.id: project.name for project in tx.list(Project)}
            projects = {} if only is None else {"project_id": only}
            counted = tx.counts(Job, "project_id", "status", **projects)
            for project_id in {project for project, _ in counted} | ({only} if only else set()):
                for status in MOVES["job"]:
                    jobs[project_id, status] = counted.get((project_id, status), 0)
    except CatalogUnavailable as error:
        log.warning("no figures of jobs: the catalog is away", reason=error.message)
    return names, jobs


def _families(
    totals: Totals, only: str | None, names: dict[str, str], jobs: dict[tuple[str, str], int]
) -> Iterator[Metric]:
    found = {name: _family(name) for name in METRICS}

    def visible(project: str) -> bool:
        return only is None or project == only

    for key, tally in totals.tallies.items():
        if visible(key[0]):
            _add_calls(found, [names.get(key[0], key[0]), key[1], key[2]], tally)
    for (project, name), count in totals.retries.items():
        if visible(project):
            found["modelworks_retries"].add_metric([names.get(project, project), name], count)
    for (project, name, key_id), counts in totals.tokens.items():
        if visible(project):
            for kind, count in zip(("prompt", "completion", "cached", "repeated"), counts, strict=True):
                found["modelworks_tokens"].add_metric([names.get(project, project), name, key_id, kind], count)
    connected: dict[tuple[str, str], tuple[int, int]] = dict.fromkeys(totals.loads, (0, 0))
    for replica in totals.replicas.values():
        place = (replica.project_id, replica.deployment)
        count, memory = connected.get(place, (0, 0))
        connected[place] = (count + replica.connected, memory + replica.memory)
    for (project, name), (count, memory) in connected.items():
        if visible(project):
            labels = [names.get(project, project), name]
            found["modelworks_replicas"].add_metric(labels, count)
            found["modelworks_replica_memory_bytes"].add_metric(labels, memory)
    for load in totals.loads.values():
        if visible(load.project_id):
            labels = [names.get(load.project_id, load.project_id), load.deployment]
            found["modelworks_calls_outstanding"].add_metric(labels, load.aboard)
            found["modelworks_calls_waiting"].add_metric(labels, load.waiting)
    for (project, status), count in jobs.items():
        found["modelworks_jobs"].add_metric([names.get(project, project), status], count)
    for (operation, code), count in totals.requests.items():
        found["modelworks_http_requests"].add_metric([operation, str(code)], count)
    _add_histogram(found["modelworks_event_loop_lag_seconds"], [], totals.lag, SECONDS)
    found["modelworks_gateways"].add_metric([], totals.gateways)
    found["modelworks_resident_memory_bytes"].add_metric([], totals.memory or resident())
    found["modelworks_request_log_dropped"].add_metric([], totals.log_dropped)
    found["modelworks_build_info"].add_metric([release()], 1)
    yield from found.values()


def _family(name: str) -> Any:
    kind, text, labels = METRICS[name]
    family = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}[kind]
    return family(name, text, labels=list(labels))


def _add_calls(found: dict[str, Any], labels: list[str], tally: Tally) -> None:
    errors = 0
    for status, count in sorted(tally.outcomes.items()):
        found["modelworks_requests"].add_metric([*labels, str(status)], count)
        errors += count if status >= 500 else 0
    found["modelworks_errors"].add_metric(labels, errors)
    duration, queue, model, batch = tally.histograms()
    _add_histogram(found["modelworks_request_duration_seconds"], labels, duration, SECONDS)
    _add_histogram(found["modelworks_queue_seconds"], labels, queue, SECONDS)
    _add_histogram(found["modelworks_model_seconds"], labels, model, SECONDS)
    _add_histogram(found["modelworks_batch_size"], labels, batch, SIZES)


def _add_histogram(family: Any, labels: list[str], histogram: Histogram, bounds: Sequence[float]) -> None:
    """Prometheus' buckets are cumulative."""
    names = [*(str(bound) for bound in bounds), "+Inf"]
    buckets = list(zip(names, accumulate(histogram.counts), strict=True))
    family.add_metric(labels, buckets=buckets, sum_value=histogram.total)
