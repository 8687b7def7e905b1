"""Jobs of all kinds, training jobs and evaluations: start, follow, wait, stop."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import httpx2

from modelworks.client.lists import page, path
from modelworks.client.modes import Mode, Resource, call, stream
from modelworks.client.transport import AWAY, Request, Transport, creation, unreachable
from modelworks.client.types import build, shorthand
from modelworks.core.errors import Conflict, DeadlineExceeded, ModelworksError, Unavailable, from_dict
from modelworks.core.specs import EvaluationSpec, TrainingSpec
from modelworks.core.types import FINAL_JOB_STATES, Job, JobEvent, Page, Report

OnJob = Callable[[Job], None]
OnEvent = Callable[[JobEvent], None]
_POLL = (0.1, 1.0)
_SILENCE = 60.0  # the server sends a sign of life every 15 s
_EVENTS = 100
_TRAINING = "/api/v1/training-jobs"


class Jobs(Resource[Mode]):
    """`client.jobs`: jobs of every kind (ingest, train, evaluate, import)."""

    _PATH = "/api/v1/jobs"

    @call
    async def list(
        self,
        *,
        kind: str | None = None,
        status: str | None = None,
        parent: Job | str | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> Page[Job]:
        """Newest first. `kind` and `status` narrow the list; `parent`: the parts of that job (trials, folds)."""
        query = {"kind": kind, "status": status, "parent": None if parent is None else _id(parent)}
        where = self._PATH if parent is None else Jobs._PATH
        return await page(self._http, where, Job, limit=limit, after=after, query=query)

    @call
    async def get(self, job: Job | str) -> Job:
        return await self._http.model(Request("GET", path(self._PATH + "/{}", _id(job))), Job)

    @call
    async def events(
        self, job: Job | str, *, after: int = 0, limit: int = _EVENTS, kind: str | Sequence[str] | None = None
    ) -> Sequence[JobEvent]:
        """What has happened in the job after event number `after`; of this kind, or these, alone ("fold", "warning"...)."""
        return await _events(self._http, _id(job), after, limit, _kinds(kind))

    @stream
    async def stream(
        self, job: Job | str, *, after: int = 0, kind: str | Sequence[str] | None = None
    ) -> AsyncGenerator[JobEvent, None]:
        """The events as they happen, until the job is final; of this kind, or these, alone. Reconnects where it was cut off."""
        silent_since = time.monotonic()
        pause = _POLL[0]
        while True:
            try:
                async with self._http.open(_stream_request(job, after, _kinds(kind))) as response:
                    silent_since = time.monotonic()
                    async for sent in self._http.carrier.events(response):
                        if sent.event == "end":
                            return
                        if not sent.data:  # only a `retry:`, or a sign of life
                            continue
                        event = self._http.validate(JobEvent, json.loads(sent.data))
                        after, silent_since, pause = event.seq, time.monotonic(), _POLL[0]
                        yield event
            except httpx2.ReadTimeout:
                silent_since = time.monotonic()
            except httpx2.TransportError as error:
                if time.monotonic() - silent_since > AWAY:
                    raise unreachable(self._http.connection, error) from None
            except Unavailable:
                if time.monotonic() - silent_since > AWAY:
                    raise
            await self._http.carrier.sleep(pause)
            pause = min(pause * 1.5, _POLL[1])

    @call
    async def wait(
        self,
        job: Job | str,
        *,
        progress: OnJob | None = None,
        on_event: OnEvent | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> Job:
        """The job once it is final. `progress(job)` at each look, `on_event(event)` for each event, in order.

        With `check`, a job that did not succeed raises its error. After `timeout` seconds: DeadlineExceeded, while
        the job goes on.
        """
        return await wait(self._http, _id(job), progress=progress, on_event=on_event, timeout=timeout, check=check)

    @call
    async def cancel(self, job: Job | str) -> Job:
        """Cancelling what is final changes nothing."""
        return await self._http.model(Request("POST", path("/api/v1/jobs/{}/cancel", _id(job))), Job)

    @call
    async def pause(self, job: Job | str) -> Job:
        """Pause a training job; it goes on from its last checkpoint when it is resumed."""
        return await self._http.model(Request("POST", path(_TRAINING + "/{}/pause", _id(job)), idempotent=False), Job)

    @call
    async def resume(self, job: Job | str) -> Job:
        """Let a paused training job go on."""
        return await self._http.model(Request("POST", path(_TRAINING + "/{}/resume", _id(job)), idempotent=False), Job)

    @call
    async def log(self, job: Job | str) -> str:
        """The end of the log of the job's process."""
        return (await self._http.send(Request("GET", path("/api/v1/jobs/{}/log", _id(job))))).text


class TrainingJobs(Jobs[Mode]):
    """`client.training_jobs`."""

    _PATH = _TRAINING

    @call
    async def create(
        self, spec: TrainingSpec | Mapping[str, Any] | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> Job:
        """Start training: a TrainingSpec, or its fields as keyword arguments (model, dataset, target, algorithm...).

        `kfold=5`, `holdout=0.2` or `test="iris-test"` (with `repeats`, `group`, `time`) are short for `validation={...}`.
        """
        given = build(TrainingSpec, spec, shorthand(fields, "validation"), "the training job")
        return await self._http.model(creation(self._PATH, key=idempotency_key, json=_body(given)), Job)

    @call
    async def advise(
        self, spec: TrainingSpec | Mapping[str, Any] | None = None, *, timeout: float | None = None, **fields: Any
    ) -> Mapping[str, Any]:
        """What such a training would take, measured there on some of the rows: seconds, memory_mb, free_mb, will_fit,
        warnings... Nothing is trained or registered. Raises what the training would be refused with.
        """
        given = build(TrainingSpec, spec, shorthand({**fields, "advise": True}, "validation"), "the training job")
        job = await self._http.model(creation(self._PATH, key=None, json=_body(given)), Job)
        ended = await wait(self._http, job.id, timeout=timeout)
        return dict(ended.result["advice"])


class Evaluations(Jobs[Mode]):
    """`client.evaluations`: jobs that end in a report."""

    _PATH = "/api/v1/evaluations"

    @call
    async def create(
        self,
        spec: EvaluationSpec | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> Job:
        """Start an evaluation: an EvaluationSpec, or its fields as keyword arguments (model, method, compare...).

        `kfold=5`, `holdout=0.2` or `test="iris-test"` (with `repeats`, `group`, `time`) are short for `method={...}`.
        Predictions of any model, with the truth beside them: `dataset="answers", predictions={"task": "classification",
        "reference": "label", "prediction": "said"}`, or with `rows` in place of the dataset.
        """
        given = build(EvaluationSpec, spec, shorthand(fields, "method"), "the evaluation")
        return await self._http.model(creation(self._PATH, key=idempotency_key, json=_body(given)), Job)


class Reports(Resource[Mode]):
    """`client.reports`: results of evaluations."""

    @call
    async def list(self, *, model: str | None = None, limit: int = 20, after: str | None = None) -> Page[Report]:
        return await page(self._http, "/api/v1/reports", Report, limit=limit, after=after, query={"model": model})

    @call
    async def get(self, report: str) -> Report:
        return await self._http.model(Request("GET", path("/api/v1/reports/{}", report)), Report)

    @call
    async def page(self, report: str, *, timeout: float | None = None) -> str:
        """The report as one HTML page with its figures in it.

        A job makes both when they are first asked for. The server waits for it, up to a minute a call; when it is not
        done by then and `timeout` seconds are over: DeadlineExceeded, while the job goes on.
        """
        return (await self._rendered(path("/api/v1/reports/{}/page", report), timeout)).text

    @call
    async def plots(self, report: str, *, timeout: float | None = None) -> Sequence[Mapping[str, str]]:
        """The report's figures: `name` and `title` of each. Waits as `page` does."""
        found = (await self._rendered(path("/api/v1/reports/{}/plots", report), timeout)).json()
        return list(found["data"])

    @call
    async def plot(self, report: str, name: str, *, timeout: float | None = None) -> bytes:
        """One figure as PNG. Waits as `page` does."""
        return (await self._rendered(path("/api/v1/reports/{}/plots/{}", report, name), timeout)).content

    async def _rendered(self, where: str, timeout: float | None) -> httpx2.Response:
        """What the first call makes; one that takes more than a minute is asked for again."""
        started = time.monotonic()
        while True:
            response = await self._http.send(Request("GET", where))
            if response.status_code != 202:
                return response
            if timeout is not None and time.monotonic() - started >= timeout:
                raise _too_late(self._http.validate(Job, response.json()).id, timeout)
            await self._http.carrier.sleep(_POLL[1])


async def wait(
    http: Transport,
    job_id: str,
    *,
    progress: OnJob | None = None,
    on_event: OnEvent | None = None,
    timeout: float | None = None,
    check: bool = True,
) -> Job:
    """See `Jobs.wait`. Polls, ever less often; a server that restarts in the meantime is waited for."""
    started = last_seen = time.monotonic()
    after = 0
    while True:
        try:
            job = await http.model(Request("GET", path("/api/v1/jobs/{}", job_id)), Job)
            if on_event:
                after = await _tell_events(http, job_id, after, on_event)
            last_seen = time.monotonic()
        except Unavailable:
            if time.monotonic() - last_seen > AWAY:
                raise
        else:
            if progress:
                progress(job)
            if job.status in FINAL_JOB_STATES:
                return _checked(job) if check else job
        elapsed = time.monotonic() - started
        if timeout is not None and elapsed >= timeout:
            raise _too_late(job_id, timeout)
        pause = min(max(_POLL[0], elapsed / 20), _POLL[1])
        await http.carrier.sleep(pause if timeout is None else min(pause, timeout - elapsed))


def _too_late(job_id: str, timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"job {job_id} is not final after {timeout:g} s; it goes on", code="wait_timeout")


async def _tell_events(http: Transport, job_id: str, after: int, on_event: OnEvent) -> int:
    while True:
        found = await _events(http, job_id, after, _EVENTS)
        for event in found:
            after = max(after, event.seq)
            on_event(event)
        if len(found) < _EVENTS:
            return after


async def _events(
    http: Transport, job_id: str, after: int, limit: int, kinds: Sequence[str] | None = None
) -> list[JobEvent]:
    where = path("/api/v1/jobs/{}/events", job_id)
    found = await http.json(Request("GET", where, query={"after": after, "limit": limit, "kind": kinds}))
    return [http.validate(JobEvent, item) for item in found["data"]]


def error_of_job(job: Job) -> ModelworksError | None:
    """The error of a final job that did not succeed, None for one that did."""
    if job.status == "succeeded":
        return None
    if job.error:
        return from_dict(job.error)
    return Conflict(f"job {job.id} was {job.status}", code=f"job_{job.status}")


def _checked(job: Job) -> Job:
    error = error_of_job(job)
    if error is not None:
        raise error
    return job


def _kinds(kind: str | Sequence[str] | None) -> Sequence[str] | None:
    return [kind] if isinstance(kind, str) else kind


def _stream_request(job: Job | str, after: int, kinds: Sequence[str] | None) -> Request:
    headers = {"accept": "text/event-stream"} | ({"last-event-id": str(after)} if after else {})
    where = path("/api/v1/jobs/{}/events/stream", _id(job))
    return Request("GET", where, query={"kind": kinds}, headers=headers, timeout=_SILENCE)


def _body(spec: TrainingSpec | EvaluationSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_unset=True)


def _id(job: Job | str) -> str:
    return job.id if isinstance(job, Job) else job
