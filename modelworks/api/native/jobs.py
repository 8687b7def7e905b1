"""/api/v1/training-jobs, /api/v1/jobs, and the catalogues of algorithms, transforms and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import anyio
from fastapi import Header, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from modelworks.api import schemas
from modelworks.api.events import Stopping, stream
from modelworks.api.routes import After, IdPath, Limit, Routes, Use, Who, accepted, answer, listing
from modelworks.core.errors import NotFound
from modelworks.core.specs import TrainingSpec
from modelworks.core.types import Caller, EventKind, Job, JobKind, JobStatus

training = Routes("Training")
jobs = Routes("Jobs")

Status = Annotated[JobStatus | None, Query(description="only those in this state")]
Kind = Annotated[JobKind | None, Query(description="only those of this kind")]
Parent = Annotated[
    str | None,
    Query(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="only the parts of this job: trials of its search, folds"),
]
AfterSeq = Annotated[int, Query(ge=0, le=2**53, description="only events with a greater number")]
EventLimit = Annotated[int, Query(ge=1, le=1000, description="how many at most")]
EventKinds = Annotated[
    list[EventKind] | None, Query(alias="kind", description="only events of this kind; may be given several times")
]
LastEventId = Annotated[
    str | None,
    Header(pattern=r"^[0-9]{1,15}$", description="the number of the last event seen; the stream goes on after it"),
]
LOG = schemas.plain({"type": "string"}, "fold 1 of 5: accuracy 0.967\n", "text/plain; charset=utf-8")
STREAM = schemas.plain(
    {
        "type": "string",
        "description": "server-sent events; `id` is the event's number, `event` its kind, `data` a JobEvent",
    },
    'id: 7\nevent: fold\ndata: {"seq": 7, "kind": "fold", "message": "fold 3 of 5: accuracy 0.967"}\n\n',
    "text/event-stream",
)
EXAMPLE = {
    "model": "iris",
    "dataset": "iris:1",
    "target": "species",
    "algorithm": "logistic-regression",
    "hyperparameters": {"C": 1.0},
    "validation": {"kfold": 5},
    "gates": [{"metric": "accuracy", "at_least": 0.9}],
    "seed": 0,
}
MOVES = {
    "cancel": "Ends as soon as the running step notices. Cancelling again changes nothing.",
    "pause": "Its finished parts are kept; it goes on after `resume`.",
    "resume": "Back to the queue.",
}
KINDS = {"train": "training job", "evaluate": "evaluation"}
TRAINING = "/api/v1/training-jobs"
JOBS = "/api/v1/jobs"


@training.post(
    TRAINING,
    "training_jobs.create",
    "Train a model",
    status=202,
    answer=schemas.noun("Job"),
    errors=(404, 422),
    body="json",
    request=EXAMPLE,
    creates=True,
)
def create_training_job(services: Use, caller: Who, spec: TrainingSpec) -> Response:
    """Queue a training job. When it has succeeded, its `model_version` names the version it registered."""
    job = services.library.train(caller, spec)
    return accepted(job.public(), f"{TRAINING}/{job.id}")


@training.get(TRAINING, "training_jobs.list", "List training jobs", answer=schemas.page("Job"))
def list_training_jobs(
    services: Use, caller: Who, status: Status = None, limit: Limit = 20, after: After = None
) -> Response:
    """Newest first."""
    found = services.library.jobs(caller, kind="train", status=status, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


@jobs.get(JOBS, "training_jobs.list", "List jobs", answer=schemas.page("Job"))
def list_jobs(
    services: Use,
    caller: Who,
    kind: Kind = None,
    status: Status = None,
    parent: Parent = None,
    limit: Limit = 20,
    after: After = None,
) -> Response:
    """Jobs of all kinds, newest first. The parts of a job (trials of its search, folds) are listed by `parent`."""
    found = services.library.jobs(caller, kind=kind, status=status, parent=parent, limit=limit, after=after)
    return listing([item.public() for item in found.items], found.has_more)


def find_job(services: Any, caller: Caller, job_id: str, kind: str | None) -> Job:
    """The job, if it is of that kind; under /training-jobs there are only those."""
    job: Job = services.library.job(caller, job_id)
    if kind is not None and job.kind != kind:
        raise NotFound(
            f"there is no {KINDS[kind]} {job_id!r} in this project; see {JOBS}/{job_id}", code="job_not_found"
        )
    return job


def _declare(routes: Routes, base: str, prefix: str, word: str, kind: str | None) -> None:
    """The routes that one job has, under `base`: the same for all jobs and for training jobs."""

    def named(suffix: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Operation ids are unique: get_job, get_training_job."""

        def rename(endpoint: Callable[..., Any]) -> Callable[..., Any]:
            endpoint.__name__ = suffix.format(prefix)
            return endpoint

        return rename

    @routes.get(f"{base}/{{id}}", "training_jobs.get", f"Get a {word}", answer=schemas.noun("Job"))
    @named("get_{}")
    def get(services: Use, caller: Who, id: IdPath) -> Response:
        """Its status, progress, metrics, result or error."""
        return answer(find_job(services, caller, id, kind).public())

    @routes.get(
        f"{base}/{{id}}/events", "training_jobs.events", f"List a {word}'s events", answer=schemas.page("JobEvent")
    )
    @named("list_{}_events")
    def events(
        services: Use,
        caller: Who,
        id: IdPath,
        after: AfterSeq = 0,
        limit: EventLimit = 100,
        kinds: EventKinds = None,
    ) -> Response:
        """In the order they happened. Here `after` is an event's number `seq`."""
        find_job(services, caller, id, kind)
        found = services.library.events(caller, id, after, limit + 1, kinds)
        return listing([item.public() for item in found[:limit]], len(found) > limit)

    @routes.get(
        f"{base}/{{id}}/events/stream",
        "training_jobs.events",
        f"Follow a {word}'s events",
        answer=STREAM,
        stream=True,
    )
    @named("stream_{}_events")
    async def follow(
        request: Request,
        services: Use,
        caller: Who,
        id: IdPath,
        after: AfterSeq = 0,
        kinds: EventKinds = None,
        last_event_id: LastEventId = None,
    ) -> Response:
        """Server-sent events until the job is final, then an event named `end`. `Last-Event-ID` resumes."""
        await anyio.to_thread.run_sync(find_job, services, caller, id, kind)
        start = int(last_event_id) if last_event_id is not None else after
        stopping = request.scope["state"].get("stopping") or Stopping()
        return stream(services, caller, id, start, stopping, request.headers.get("authorization"), kinds)

    @routes.get(f"{base}/{{id}}/log", "training_jobs.logs", f"Read a {word}'s log", answer=LOG)
    @named("get_{}_log")
    def log(services: Use, caller: Who, id: IdPath) -> Response:
        """The end of what its process wrote, as text."""
        find_job(services, caller, id, kind)
        return PlainTextResponse(services.library.log(caller, id))

    for verb, description in MOVES.items():
        endpoint = _move(base, kind, verb)
        endpoint.__name__, endpoint.__doc__ = f"{verb}_{prefix}", description
        routes.post(
            f"{base}/{{id}}/{verb}",
            f"training_jobs.{verb}",
            f"{verb.capitalize()} a {word}",
            status=202,
            answer=schemas.noun("Job"),
            errors=(409,),
        )(endpoint)


def _move(base: str, kind: str | None, verb: str) -> Callable[..., Response]:
    def move(services: Use, caller: Who, id: IdPath) -> Response:
        find_job(services, caller, id, kind)
        job = getattr(services.library, verb)(caller, id)
        return accepted(job.public(), f"{base}/{id}")

    return move


_declare(training, TRAINING, "training_job", "training job", "train")
_declare(jobs, JOBS, "job", "job", None)


# -- catalogues --------------------------------------------------------------------------------------------------------

CATALOGUED = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@training.get(
    "/api/v1/algorithms",
    "algorithms.list",
    "List algorithms",
    answer=schemas.page_of(
        CATALOGUED,
        {
            "name": "logistic-regression",
            "task": "tabular-classification",
            "tasks": ["tabular-classification"],
            "description": "multinomial logistic regression",
            "hyperparameters": {"type": "object", "properties": {"C": {"type": "number", "exclusiveMinimum": 0}}},
        },
    ),
)
def list_algorithms() -> Response:
    """Every trainer with its task and its hyperparameters as JSON Schema."""
    from modelworks.ml.train.algorithms import describe

    return listing(describe())


@training.get(
    "/api/v1/transforms",
    "transforms.list",
    "List transforms",
    answer=schemas.page_of(
        CATALOGUED, {"name": "standardise", "description": "mean 0, deviation 1", "columns": ["number"]}
    ),
)
def list_transforms() -> Response:
    """Every op of cleaning and transformation with its parameters as JSON Schema."""
    from modelworks.ml.data.transforms.catalogue import describe

    return listing(describe())


@training.get(
    "/api/v1/metrics",
    "metrics.list",
    "List metrics",
    answer=schemas.page_of(
        {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}},
        {"id": "accuracy", "task": "tabular-classification", "greater_is_better": True, "low": 0.0, "high": 1.0},
    ),
)
def list_metrics() -> Response:
    """Every metric id with its tasks and which way is better."""
    from modelworks.ml.evaluate.catalogue import describe

    return listing(describe())
