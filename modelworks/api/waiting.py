"""Requests that wait for a job: they answer with what it made, or after a minute with the job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api.errors import from_job
from modelworks.api.events import Stopping
from modelworks.api.routes import accepted
from modelworks.api.services import Services
from modelworks.core.types import FINAL_JOB_STATES, Caller, Job

WAIT_SECONDS = 60.0
POLL = (0.05, 0.5)  # seconds between looks: first, and at most


async def ended(stopping: Stopping, services: Services, caller: Caller, job: Job) -> Job | None:
    """The job once it has succeeded; None when it is not over after a minute, or when the server stops.

    Raises the job's error when it ended otherwise. No thread waits meanwhile.
    """
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + WAIT_SECONDS, POLL[0]
    while job.status not in FINAL_JOB_STATES and loop.time() < until:
        if await stopping.wait(pause):
            break
        pause = min(pause * 1.5, POLL[1])
        job = await anyio.to_thread.run_sync(services.library.job, caller, job.id)
    if job.status not in FINAL_JOB_STATES:
        return None
    if job.status != "succeeded":
        raise from_job(job.error)
    return job


async def outcome(
    request: Request, services: Services, caller: Caller, job: Job, made: Callable[[Job], Awaitable[Response]]
) -> Response:
    """What is `made` of the job that has succeeded; 202 with the job when it is not over after a minute."""
    state = request.scope["state"]
    stopping = state.get("stopping") or Stopping()
    if "place" in state:
        state["place"].close()  # other calls of its key need not wait for the job
    found = await ended(stopping, services, caller, job)
    return accepted(job.public(), f"/api/v1/jobs/{job.id}") if found is None else await made(found)
