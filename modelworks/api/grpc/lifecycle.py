"""modelworks.v1: the lifecycle's services over the same use cases as /api/v1."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, get_args

import anyio

from modelworks.api.events import BATCH, POLL
from modelworks.api.grpc.door import Door, Rpc
from modelworks.api.grpc.messages import fill, message, plain
from modelworks.api.grpc.uploads import upload
from modelworks.api.native.jobs import find_job
from modelworks.api.texts import parameters, text_input, text_output
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import NAME_PATTERN, EvaluationSpec, TrainingSpec
from modelworks.core.tasks import GENERATION
from modelworks.core.types import FINAL_JOB_STATES, Call, EventKind
from modelworks.serve.features import MAX_ROWS, decode_outputs, encode_rows

_NAME = re.compile(NAME_PATTERN)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_JOB_STATES = {"queued", "validating", "running", "paused", "cancelling", *FINAL_JOB_STATES}
_EVENT_KINDS = get_args(EventKind)

Work = Callable[[Rpc, Any], Any]


def mount(door: Door) -> None:
    door.add(
        "modelworks.v1.Datasets",
        {
            "Upload": ("datasets.create", upload),
            "Get": ("datasets.get", _threaded(_get_dataset)),
            "List": ("datasets.list", _threaded(_list_datasets)),
            "ListVersions": ("datasets.get", _threaded(_list_versions)),
        },
    )
    door.add(
        "modelworks.v1.Training",
        {
            "Create": ("training_jobs.create", _threaded(_train)),
            "Get": ("training_jobs.get", _threaded(_get_job)),
            "List": ("training_jobs.list", _threaded(_list_jobs("train"))),
            "Cancel": ("training_jobs.cancel", _threaded(_steer("cancel"))),
            "Pause": ("training_jobs.pause", _threaded(_steer("pause"))),
            "Resume": ("training_jobs.resume", _threaded(_steer("resume"))),
            "ListEvents": ("training_jobs.events", _threaded(_list_events)),
            "FollowEvents": ("training_jobs.events", _follow),
            "GetLog": ("training_jobs.logs", _threaded(_log)),
            "ListAlgorithms": ("algorithms.list", _threaded(_catalogue("modelworks.ml.train.algorithms"))),
            "ListTransforms": ("transforms.list", _threaded(_catalogue("modelworks.ml.data.transforms.catalogue"))),
            "ListMetrics": ("metrics.list", _threaded(_catalogue("modelworks.ml.evaluate.catalogue"))),
        },
    )
    door.add(
        "modelworks.v1.Evaluation",
        {
            "Create": ("evaluations.create", _threaded(_evaluate)),
            "Get": ("evaluations.get", _threaded(_get_evaluation)),
            "List": ("evaluations.list", _threaded(_list_jobs("evaluate"))),
            "GetReport": ("evaluations.get", _threaded(_get_report)),
            "ListReports": ("evaluations.list", _threaded(_list_reports)),
        },
    )
    door.add(
        "modelworks.v1.Deployment",
        {
            "Put": ("deployments.put", _threaded(_put)),
            "Get": ("deployments.get", _threaded(_deployment("get"))),
            "List": ("deployments.list", _threaded(_list_deployments)),
            "Delete": ("deployments.delete", _threaded(_deployment("delete"))),
            "Rollback": ("deployments.rollback", _threaded(_rollback)),
            "ListRevisions": ("deployments.revisions", _threaded(_list_revisions)),
            "ListReplicas": ("deployments.get", _threaded(_list_replicas)),
            "GetLogs": ("deployments.logs", _threaded(_deployment_logs)),
            "Predict": ("deployments.predict", _shared(predict)),
        },
    )


def _threaded(work: Work) -> Callable[[Rpc, Any], Any]:
    """Use cases are synchronous: they run in a thread."""

    async def run(rpc: Rpc, request: Any) -> Any:
        return await anyio.to_thread.run_sync(work, rpc, request)

    return _shared(run)


def _shared(work: Callable[[Rpc, Any], Awaitable[Any]]) -> Callable[[Rpc, Any], Any]:
    """It begins when the caller's share of the loop allows."""

    async def run(rpc: Rpc, request: Any) -> Any:
        return await rpc.in_turn(work, request)

    return run


# -- datasets ----------------------------------------------------------------------------------------------------------


def _get_dataset(rpc: Rpc, request: Any) -> Any:
    return _noun("DatasetVersion", rpc.services.library.dataset(rpc.caller, request.dataset))


def _list_datasets(rpc: Rpc, request: Any) -> Any:
    return _page("ListDatasetsResponse", rpc.services.library.datasets(rpc.caller, **_bounds(request)))


def _list_versions(rpc: Rpc, request: Any) -> Any:
    versions = rpc.services.library.dataset_versions(rpc.caller, _name(request.name))
    return _list("ListDatasetsResponse", versions)


# -- jobs --------------------------------------------------------------------------------------------------------------


def _train(rpc: Rpc, request: Any) -> Any:
    return _noun("Job", rpc.services.library.train(rpc.caller, TrainingSpec.model_validate(_body(request))))


def _evaluate(rpc: Rpc, request: Any) -> Any:
    return _noun("Job", rpc.services.library.evaluate(rpc.caller, EvaluationSpec.model_validate(_body(request))))


def _body(request: Any) -> dict[str, Any]:
    """The REST body: the request's own fields and those in `more`."""
    body = plain(request)
    more = body.pop("more", {})
    if twice := set(body) & set(more):
        raise InvalidInput(f"{min(twice)!r} is given twice, as a field and in `more`", param=min(twice))
    return {**more, **body}


def _get_job(rpc: Rpc, request: Any) -> Any:
    return _noun("Job", rpc.services.library.job(rpc.caller, _id(request.id)))


def _get_evaluation(rpc: Rpc, request: Any) -> Any:
    return _noun("Job", find_job(rpc.services, rpc.caller, _id(request.id), "evaluate"))


def _list_jobs(kind: Any) -> Work:
    def work(rpc: Rpc, request: Any) -> Any:
        status = request.status or None
        if status is not None and status not in _JOB_STATES:
            raise InvalidInput(
                f"{status[:40]!r} is not a state; use one of {', '.join(sorted(_JOB_STATES))}", param="status"
            )
        found = rpc.services.library.jobs(rpc.caller, kind=kind, status=status, **_bounds(request))
        return _page("ListJobsResponse", found)

    return work


def _steer(verb: str) -> Work:
    def work(rpc: Rpc, request: Any) -> Any:
        return _noun("Job", getattr(rpc.services.library, verb)(rpc.caller, _id(request.id)))

    return work


def _list_events(rpc: Rpc, request: Any) -> Any:
    limit = _limit(request.limit, 100, 1000)
    found = rpc.services.library.events(rpc.caller, _id(request.id), _after(request), limit + 1, _kinds(request))
    return _list("ListJobEventsResponse", found[:limit], has_more=len(found) > limit)


async def _follow(rpc: Rpc, request: Any) -> AsyncIterator[Any]:
    """Events as they happen, until the job is final or the server stops."""
    library, job_id, after, kinds = rpc.services.library, _id(request.id), _after(request), _kinds(request)
    pause = POLL[0]
    while True:
        job = await anyio.to_thread.run_sync(library.job, rpc.caller, job_id)
        found = await anyio.to_thread.run_sync(library.events, rpc.caller, job_id, after, BATCH, kinds)
        for event in found:
            after = event.seq
            yield _noun("JobEvent", event)
        if len(found) >= BATCH:
            continue
        if job.status in FINAL_JOB_STATES:  # read before the events, so none is missed
            return
        pause = POLL[0] if found else min(pause * 1.5, POLL[1])
        if await rpc.stopping.wait(pause):
            return


def _after(request: Any) -> int:
    if not 0 <= request.after < 2**53:
        raise InvalidInput("`after` is the number of an event, 0 or more", param="after")
    return int(request.after)


def _kinds(request: Any) -> list[str] | None:
    kinds = list(request.kinds)
    for kind in kinds:
        if kind not in _EVENT_KINDS:
            raise InvalidInput(
                f"{kind[:40]!r} is not a kind of event; use some of {', '.join(_EVENT_KINDS)}", param="kinds"
            )
    return kinds or None


def _log(rpc: Rpc, request: Any) -> Any:
    return message("modelworks.v1.LogResponse")(text=rpc.services.library.log(rpc.caller, _id(request.id)))


def _catalogue(module: str) -> Work:
    def work(rpc: Rpc, request: Any) -> Any:
        import importlib

        found = importlib.import_module(module).describe()
        return fill(message("modelworks.v1.CatalogueResponse"), {"data": found})

    return work


# -- reports -----------------------------------------------------------------------------------------------------------


def _get_report(rpc: Rpc, request: Any) -> Any:
    return _noun("Report", rpc.services.library.report(rpc.caller, _id(request.id)))


def _list_reports(rpc: Rpc, request: Any) -> Any:
    found = rpc.services.library.reports(rpc.caller, model=request.model or None, **_bounds(request))
    return _page("ListReportsResponse", found)


# -- deployments -------------------------------------------------------------------------------------------------------


def _put(rpc: Rpc, request: Any) -> Any:
    body = plain(request)
    spec = DeploymentSpec.model_validate({**body.get("spec", {}), "model": body.get("model", "")})
    return _noun("DeploymentState", rpc.services.deployments.put(rpc.caller, _name(request.name), spec))


def _deployment(verb: str) -> Work:
    def work(rpc: Rpc, request: Any) -> Any:
        return _noun("DeploymentState", getattr(rpc.services.deployments, verb)(rpc.caller, _name(request.name)))

    return work


def _list_deployments(rpc: Rpc, request: Any) -> Any:
    return _page("ListDeploymentsResponse", rpc.services.deployments.list(rpc.caller, **_bounds(request)))


def _rollback(rpc: Rpc, request: Any) -> Any:
    number = request.revision if request.HasField("revision") else None
    if number is not None and number < 1:
        raise InvalidInput("`revision` is the number of a revision: 1, 2, 3...", param="revision")
    return _noun("DeploymentState", rpc.services.deployments.rollback(rpc.caller, _name(request.name), number))


def _list_revisions(rpc: Rpc, request: Any) -> Any:
    return _list("ListRevisionsResponse", rpc.services.deployments.revisions(rpc.caller, _name(request.name)))


def _list_replicas(rpc: Rpc, request: Any) -> Any:
    return _list("ListReplicasResponse", rpc.services.deployments.replicas(rpc.caller, _name(request.name)))


def _deployment_logs(rpc: Rpc, request: Any) -> Any:
    text = rpc.services.deployments.logs(rpc.caller, _name(request.name))
    return message("modelworks.v1.LogResponse")(text=text)


async def predict(rpc: Rpc, request: Any) -> Any:
    """The native predict: named raw features in, one object a row out."""
    name = _name(request.name)
    route = rpc.services.gateway.route(rpc.principal, name)
    given = plain(request)
    rows = given.get("inputs", [])
    if not 0 < len(rows) <= MAX_ROWS:
        raise InvalidInput(f"`inputs` has 1 to {MAX_ROWS} rows, not {len(rows)}", code="bad_inputs", param="inputs")
    texts = route.task == GENERATION
    params = parameters(route, given.get("parameters"), strict=True)
    tensors = text_input(rows) if texts else encode_rows(route, rows)
    call = Call(name, tensors, rpc.deadline(route), rpc.request_id, params)
    found = await rpc.infer(call)
    outputs = text_output(found) if texts else decode_outputs(route, found)
    body = {"outputs": outputs, "model": found.model_version, "request_id": rpc.request_id}
    return fill(message("modelworks.v1.PredictResponse"), body)


# -- forms -------------------------------------------------------------------------------------------------------------


def _noun(kind: str, noun: Any) -> Any:
    return fill(message(f"modelworks.v1.{kind}"), noun.public())


def _page(kind: str, found: Any) -> Any:
    return _list(kind, found.items, has_more=found.has_more)


def _list(kind: str, items: Any, **more: Any) -> Any:
    return fill(message(f"modelworks.v1.{kind}"), {"data": [item.public() for item in items], **more})


def _bounds(request: Any) -> dict[str, Any]:
    after = request.after or None
    if after is not None and not _ID.fullmatch(after):
        raise InvalidInput("`after` is the id of the last item of the page before", param="after")
    return {"limit": _limit(request.limit, 20, 100), "after": after}


def _limit(given: int, default: int, most: int) -> int:
    if given == 0:
        return default
    if not 1 <= given <= most:
        raise InvalidInput(f"`limit` is 1 to {most}, not {given}", param="limit")
    return given


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise InvalidInput(
            "`name` is 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit", param="name"
        )
    return text


def _id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise InvalidInput("`id` is 1 to 64 letters, digits, '_' or '-'", param="id")
    return text
