"""The registry: models, their versions and aliases, packages in and out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import httpx2

from modelworks.client.data import Counted, Progress, opened
from modelworks.client.jobs import OnJob, wait
from modelworks.client.lists import page, path
from modelworks.client.modes import Mode, Resource, call
from modelworks.client.transport import AWAY, Request, creation, unreachable
from modelworks.client.types import Model
from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.specs import Ref
from modelworks.core.types import Alias, Job, ModelVersion, Page

_WAIT = 24 * 3600.0


class Models(Resource[Mode]):
    """`client.models`."""

    @call
    async def list(self, *, limit: int = 20, after: str | None = None) -> Page[ModelVersion]:
        """The newest version of each model."""
        return await page(self._http, "/api/v1/models", ModelVersion, limit=limit, after=after)

    @call
    async def get(self, name: str) -> Model:
        """All versions and aliases of the model `name`."""
        return await self._get(name)

    @call
    async def version(self, name: str, version: int | None = None) -> ModelVersion:
        """`iris` (its newest version), `iris:3`, `iris@champion`, or the name and the version."""
        ref, number = await self._resolve(name, version)
        return await self._version(ref, number)

    @call
    async def import_(
        self,
        name: str,
        file: Any = None,
        *,
        source: str | None = None,
        filename: str | None = None,
        task: str | None = None,
        classes: Sequence[Any] | None = None,
        licence: str | None = None,
        convert: str | None = None,
        progress: Progress | None = None,
        on_job: OnJob | None = None,
        idempotency_key: str | None = None,
    ) -> ModelVersion:
        """Register a package (as `export` wrote it) or a model (ONNX, GGUF) as a new version of `name`; waits for it.

        `convert="q8_0"` writes a GGUF model of fewer bits anew in 8.
        In place of a file, `source`: `package:DIST/PATH` or an https URL, which the server fetches.
        `progress(sent, total)` during the upload, then `on_job(job)` at each look at the job that takes it in.
        """
        with opened(file, filename) if source is None else nullcontext((None, "")) as (content, known_as):
            form: dict[str, Any] = {
                field: (None, value)
                for field, value in (
                    ("task", task),
                    ("classes", None if classes is None else json.dumps([*classes])),
                    ("licence", licence),
                    ("convert", convert),
                    ("source", source),
                )
                if value is not None
            }
            if content is not None:
                body = Counted(content, progress) if progress else content
                form["file"] = (known_as, body, "application/octet-stream")
            request = creation(path("/api/v1/models/{}/versions", name), key=idempotency_key, form=form, patience=AWAY)
            response = await self._http.send(request)
        if response.status_code != 202:
            return self._http.validate(ModelVersion, response.json())
        job = await wait(self._http, response.json()["id"], timeout=_WAIT, progress=on_job)
        ref = Ref.parse(job.model_version or str(job.result.get("model_version")))
        return await self._version(ref.name, ref.version or 1)

    @call
    async def measure(self, model: str, *, on_job: OnJob | None = None) -> dict[str, Any]:
        """Measure the engines that run the language model `model` where the server is; waits for it.

        {"machine", "engines": {name: {"one": {"tokens_per_second", "first_token_ms"}, "many": ...}}, "fastest": {"one", "many"}}
        """
        ref, number = await self._resolve(model, None)
        where = path("/api/v1/models/{}/versions/{}/measurements", ref, number)
        job = await self._http.model(creation(where, key=None), Job)
        return dict((await wait(self._http, job.id, timeout=_WAIT, progress=on_job)).result)

    @call
    async def export(
        self, name: str, out: str | os.PathLike[str], version: int | None = None, *, progress: Progress | None = None
    ) -> Path:
        """Write the package of a version as one file to `out` (a file, or a folder that gets `name-version.mwpkg`)."""
        ref, number = await self._resolve(name, version)
        target = Path(out)
        if target.is_dir():
            target = target / f"{ref}-{number}.mwpkg"
        request = Request("GET", path("/api/v1/models/{}/versions/{}/export", ref, number))
        try:
            with _written(target) as file:
                async with self._http.open(request) as response:
                    total = int(response.headers.get("content-length") or 0) or None
                    async for chunk in self._http.carrier.chunks(response):
                        file.write(chunk)
                        if progress:
                            progress(file.tell(), total)
        except httpx2.TransportError as error:
            raise unreachable(self._http.connection, error) from None
        return target

    @call
    async def set_alias(self, name: str, alias: str, version: int) -> Alias:
        """Point `name@alias` at a version. Deployments made from it stay as they are until they are put again."""
        where = path("/api/v1/models/{}/aliases/{}", name, alias)
        return await self._http.model(Request("PUT", where, json={"version": version}), Alias)

    @call
    async def delete_alias(self, name: str, alias: str) -> None:
        await self._http.send(Request("DELETE", path("/api/v1/models/{}/aliases/{}", name, alias)))

    @call
    async def delete(self, name: str) -> tuple[int, ...]:
        """Delete `name:version`, or with a bare name all versions; the numbers of those that are gone.

        Conflict while an alias, a deployment or a job uses one.
        """
        ref = Ref.parse(name)
        if ref.alias:
            raise InvalidInput(f"{name!r} is an alias; to delete a version write {ref.name}:VERSION", param="model")
        where = path("/api/v1/models/{}", ref.name) + (f"/versions/{ref.version}" if ref.version else "")
        found = await self._http.json(Request("DELETE", where))
        return tuple(int(number) for number in found["versions"])

    async def _get(self, name: str) -> Model:
        return await self._http.model(Request("GET", path("/api/v1/models/{}", name)), Model)

    async def _version(self, name: str, version: int) -> ModelVersion:
        return await self._http.model(
            Request("GET", path("/api/v1/models/{}/versions/{}", name, version)), ModelVersion
        )

    async def _resolve(self, name: str, version: int | None) -> tuple[str, int]:
        ref = Ref.parse(name)
        number = version or ref.version
        if number:
            return ref.name, number
        model = await self._get(ref.name)
        if ref.alias:
            if ref.alias not in model.aliases:
                known = ", ".join(model.aliases) or "none"
                message = f"model {ref.name!r} has no alias {ref.alias!r}; it has: {known}"
                raise NotFound(message, code="alias_not_found", param="model")
            return ref.name, model.aliases[ref.alias]
        return ref.name, model.latest.version


@contextmanager
def _written(target: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `target` only when it is complete."""
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    except OSError as error:
        raise InvalidInput(f"cannot write {target} ({error.strerror})", param="out") from None
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
