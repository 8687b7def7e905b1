"""A dataset that comes as a stream of chunks: written to disk as it arrives, then ingested as over HTTP."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio

from modelworks.api.grpc.door import Rpc
from modelworks.api.grpc.messages import fill, message, plain
from modelworks.api.guard import too_large
from modelworks.api.uploads import WRITE_AT
from modelworks.api.waiting import ended
from modelworks.core.errors import InvalidInput, RequestTimeout
from modelworks.core.specs import TableSchema
from modelworks.core.types import Job


async def upload(rpc: Rpc, requests: AsyncIterator[Any]) -> Any:
    """The dataset when its ingest has ended within a minute, else the job. The job's error becomes the call's."""
    caller, library = rpc.caller, rpc.services.library
    folder = await anyio.to_thread.run_sync(_scratch, rpc.services.settings.home_path / "tmp")
    try:
        header = await _header(rpc, requests)
        path = await _receive(rpc, requests, folder / "upload")
        source = header.source or None
        if (path is None) == (source is None):
            raise InvalidInput("send either chunks of a file or a `source`", param="source")
        schema = TableSchema.model_validate(plain(header).get("schema", {}))
        job = await anyio.to_thread.run_sync(
            lambda: library.upload_dataset(
                caller, name=header.name, path=path, source=source, filename=header.filename[:255], schema=schema
            )
        )
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))
    return await _outcome(rpc, job)


def _scratch(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(tempfile.mkdtemp(prefix="upload-", dir=parent))


async def _header(rpc: Rpc, requests: AsyncIterator[Any]) -> Any:
    first = await _next(rpc, requests)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidInput("the first message of an upload is its `header`", param="header")
    return first.header


async def _receive(rpc: Rpc, requests: AsyncIterator[Any], target: Path) -> Path | None:
    """Write the chunks to `target`; None when there was none."""
    limit, size, waiting = rpc.services.settings.max_upload, 0, bytearray()
    file = None
    try:
        while (request := await _next(rpc, requests)) is not None:
            if request.WhichOneof("part") != "chunk":
                raise InvalidInput("after the `header` there are only chunks", param="chunk")
            size += len(request.chunk)
            if size > limit:
                raise too_large(limit)
            file = file or target.open("wb")
            waiting += request.chunk
            if len(waiting) >= WRITE_AT:
                await anyio.to_thread.run_sync(file.write, bytes(waiting))
                waiting.clear()
        if file is not None:
            file.write(waiting)
    finally:
        if file is not None:
            file.close()
    return target if file is not None else None


async def _next(rpc: Rpc, requests: AsyncIterator[Any]) -> Any:
    """The next message, None at the end; one must come within the time that a body has over HTTP."""
    timeout = rpc.services.settings.body_timeout
    try:
        async with asyncio.timeout(timeout):
            return await anext(requests, None)
    except TimeoutError:
        raise RequestTimeout(f"no chunk came for {timeout:g} s; send the file again") from None


async def _outcome(rpc: Rpc, job: Job) -> Any:
    kind = message("modelworks.v1.UploadDatasetResponse")
    done = await ended(rpc.stopping, rpc.services, rpc.caller, job)
    if done is None:
        return fill(kind, {"job": job.public()})
    dataset = await anyio.to_thread.run_sync(rpc.services.library.dataset, rpc.caller, str(done.result["dataset"]))
    return fill(kind, {"dataset": dataset.public()})
