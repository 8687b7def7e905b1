"""A recipe: read and checked from its TOML file, then carried out on a server step by step."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from modelworks.cli.data import SERVER_SOURCES
from modelworks.cli.exits import Failed
from modelworks.client import error_of_job, parse
from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.recipe import Recipe
from modelworks.core.specs import TrainingSpec
from modelworks.core.tasks import GENERATION

if TYPE_CHECKING:
    from modelworks.client import Client, Prediction
    from modelworks.core.types import Dataset, Deployment, Job, JobEvent, ModelVersion

MAX_BYTES = 1024 * 1024
_READY_SECONDS = 120.0
_LOADED_SECONDS = 1800.0  # for a language model of many gigabytes
_FILLED_IN = ("model", "dataset", "seed")


@dataclass(frozen=True)
class Loaded:
    """A recipe whose every part is valid. `file` is the local file to upload; None: the server fetches the source."""

    path: Path
    recipe: Recipe
    file: Path | None
    deployment: str | None
    inputs: list[dict[str, Any]]
    chat: dict[str, Any] | None = None  # messages and parameters of a sample chat

    def training(self, dataset: str) -> TrainingSpec:
        return self._parse(TrainingSpec, {**(self.recipe.train or {}), **self._filled(dataset)}, "train")

    def deploy_spec(self, model: str) -> DeploymentSpec:
        given = {key: value for key, value in (self.recipe.deploy or {}).items() if key != "name"}
        return self._parse(DeploymentSpec, {**given, "model": model}, "deploy")

    def _filled(self, dataset: str) -> dict[str, Any]:
        return {"model": self.recipe.name, "dataset": dataset, "seed": self.recipe.seed}

    def _parse(self, model: Any, value: Any, section: str) -> Any:
        return _checked(self.path, model, value, section)


class Teller(Protocol):
    """Who is told as the story goes."""

    def begins(self, loaded: Loaded) -> None: ...
    def uploading(self, file: Path) -> Any:
        """A context manager that yields the callback of the upload's progress, or None."""

    def has_data(self, dataset: Dataset, new: bool) -> None: ...
    def training(self, job: Job) -> Any:
        """A context manager that yields the callbacks (progress, on_event) while the job runs."""

    def importing(self, source: str) -> Any:
        """A context manager that yields what is called with the job that takes the model in."""

    def has_model(self, version: ModelVersion, new: bool) -> None: ...
    def deploying(self, name: str) -> Any:
        """A context manager around the wait for the deployment."""

    def is_deployed(self, deployment: Deployment, url: str, new: bool) -> None: ...
    def predicted(self, inputs: list[dict[str, Any]], prediction: Prediction, curl: str) -> None: ...
    def chatted(self, chat: dict[str, Any], text: str, curl: str) -> None: ...
    def ends(self, outcome: Outcome) -> None: ...


@dataclass
class Outcome:
    """What `--json` prints."""

    recipe: str
    dataset: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    folds: list[dict[str, Any]] = field(default_factory=list)
    deployment: dict[str, Any] | None = None
    url: str | None = None
    prediction: dict[str, Any] | None = None
    curl: str | None = None
    warnings: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


def load(path: Path) -> Loaded:
    """Read and check a recipe; InvalidInput names the file and the key."""
    try:
        data = path.read_bytes()[: MAX_BYTES + 1]
    except OSError as error:
        raise InvalidInput(f"cannot read the recipe {path} ({error.strerror})", param="recipe") from None
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{path} is larger than {MAX_BYTES} bytes; a recipe is a small TOML file", param="recipe")
    try:
        found = tomllib.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}", param="recipe") from None
    recipe: Recipe = _checked(path, Recipe, found, "")
    for key in _FILLED_IN:
        if key in (recipe.train or {}):
            raise InvalidInput(f"{path}: train.{key} is filled in by the recipe; leave it out", param=f"train.{key}")
    origin, section = (recipe.data, "data") if recipe.data else (recipe.model, "model")
    assert origin is not None
    file = _local_file(path, origin.source, section)
    chat = _chat(path, recipe)
    inputs = [] if chat else _inputs(path, recipe)
    loaded = Loaded(path, recipe, file, _deployment(path, recipe), inputs, chat)
    if recipe.data:
        loaded.training(recipe.data.name)
    if loaded.deployment:
        loaded.deploy_spec(recipe.name)
    return loaded


def _checked(path: Path, model: Any, value: Any, section: str) -> Any:
    try:
        return parse(model, value, str(path))
    except InvalidInput as error:
        if not section:
            raise
        reason = error.message.removeprefix(f"{path}: ").removeprefix("there is no field ")
        unknown = "there is no field " if reason != error.message.removeprefix(f"{path}: ") else ""
        joint = "." if error.param else ": "
        param = f"{section}.{error.param}" if error.param else section
        raise InvalidInput(f"{path}: {unknown}{section}{joint}{reason}", param=param) from None


def _local_file(path: Path, source: str, section: str) -> Path | None:
    """A source without a scheme is a file beside the recipe."""
    if source.startswith(SERVER_SOURCES) or "://" in source:
        return None
    file = path.parent / source
    if not file.is_file():
        raise InvalidInput(
            f"{path}: {section}.source: there is no file {file}; give a path relative to the recipe, sklearn:NAME, "
            "package:DIST/PATH or an https URL",
            param=f"{section}.source",
        )
    return file


def _deployment(path: Path, recipe: Recipe) -> str | None:
    if recipe.deploy is None:
        return None
    name = recipe.deploy.get("name", recipe.name)
    if not isinstance(name, str) or "model" in recipe.deploy:
        key = "name" if not isinstance(name, str) else "model"
        why = "it must be a text" if key == "name" else "the recipe deploys the version it trained; leave it out"
        raise InvalidInput(f"{path}: deploy.{key}: {why}", param=f"deploy.{key}")
    return name


def _chat(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The sample chat of `predict`: its messages, and parameters beside them."""
    found = recipe.predict or {}
    if "messages" not in found:
        return None
    if recipe.deploy is None:
        raise InvalidInput(f"{path}: predict needs a [deploy] section, which may be empty", param="predict")
    messages = found["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise InvalidInput(f"{path}: predict.messages must be a list of messages", param="predict.messages")
    return found


def _inputs(path: Path, recipe: Recipe) -> list[dict[str, Any]]:
    if recipe.predict is None:
        return []
    unknown = next((key for key in recipe.predict if key != "inputs"), None)
    if unknown:
        raise InvalidInput(
            f"{path}: there is no field predict.{unknown}; known here: inputs", param=f"predict.{unknown}"
        )
    inputs = recipe.predict.get("inputs")
    if not isinstance(inputs, list) or not inputs or not all(isinstance(row, dict) for row in inputs):
        raise InvalidInput(
            f"{path}: predict.inputs must be a list of rows, each a table of features", param="predict.inputs"
        )
    if recipe.deploy is None:
        raise InvalidInput(f"{path}: predict needs a [deploy] section, which may be empty", param="predict")
    return inputs


def carry_out(client: Client, loaded: Loaded, teller: Teller) -> Outcome:
    """ingest -> profile -> train and evaluate -> package -> deploy -> predict; tells of each step as it is done."""
    outcome = Outcome(recipe=loaded.recipe.name)
    teller.begins(loaded)
    if loaded.recipe.model:
        version = _import(client, loaded, teller, outcome)
    else:
        dataset = _ingest(client, loaded, teller, outcome)
        version = _train(client, loaded, dataset, teller, outcome)
    if loaded.deployment:
        _deploy(client, loaded, loaded.deployment, version, teller, outcome)
        if loaded.inputs:
            _predict(client, loaded.deployment, loaded.inputs, teller, outcome)
        if loaded.chat:
            _converse(client, loaded.deployment, loaded.chat, teller, outcome)
    teller.ends(outcome)
    return outcome


def _ingest(client: Client, loaded: Loaded, teller: Teller, outcome: Outcome) -> Dataset:
    data = loaded.recipe.data
    assert data is not None
    known = _dataset_versions(client, data.name)
    if loaded.file is None:
        dataset = client.datasets.create(data.source, name=data.name, schema=data.table)
    else:
        with teller.uploading(loaded.file) as progress:
            dataset = client.datasets.upload(loaded.file, name=data.name, schema=data.table, progress=progress)
    new = dataset.version not in known
    outcome.dataset = {
        "name": dataset.name,
        "version": dataset.version,
        "digest": dataset.digest,
        "rows": dataset.rows,
        "new": new,
    }
    outcome.warnings += dataset.warnings
    outcome.new += [f"dataset {dataset.ref}"] if new else []
    teller.has_data(dataset, new)
    return dataset


def _train(client: Client, loaded: Loaded, dataset: Dataset, teller: Teller, outcome: Outcome) -> ModelVersion:
    known = _model_versions(client, loaded.recipe.name)
    job = client.training_jobs.create(loaded.training(dataset.ref))
    with teller.training(job) as (progress, tell_event):

        def on_event(event: JobEvent) -> None:
            if event.kind == "fold":
                outcome.folds.append({"message": event.message, **event.data})
            elif event.kind == "warning":
                outcome.warnings.append(event.message)
            tell_event(event)

        job = client.training_jobs.wait(job, progress=progress, on_event=on_event, check=False)
    error = error_of_job(job)
    if error is not None:
        raise Failed(error.message, code=error.code, param=error.param)
    version = client.models.version(str(job.model_version))
    outcome.metrics = version.metrics or job.metrics
    _has_model(version, version.version not in known, teller, outcome)
    return version


def _import(client: Client, loaded: Loaded, teller: Teller, outcome: Outcome) -> ModelVersion:
    wanted, name = loaded.recipe.model, loaded.recipe.name
    assert wanted is not None
    known = _model_versions(client, name)
    options: dict[str, Any] = {"task": wanted.task, "licence": wanted.licence, "convert": wanted.convert}
    with teller.importing(wanted.source) as on_job:
        if loaded.file is None:
            version = client.models.import_(name, source=wanted.source, on_job=on_job, **options)
        else:
            with teller.uploading(loaded.file) as progress:
                version = client.models.import_(name, loaded.file, progress=progress, on_job=on_job, **options)
    _has_model(version, version.version not in known, teller, outcome)
    return version


def _has_model(version: ModelVersion, new: bool, teller: Teller, outcome: Outcome) -> None:
    outcome.model = {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "size": version.size,
        "new": new,
    }
    outcome.new += [f"model {version.ref}"] if new else []
    teller.has_model(version, new)


def _deploy(client: Client, loaded: Loaded, name: str, version: ModelVersion, teller: Teller, outcome: Outcome) -> None:
    before = _revision(client, name)
    put = client.deployments.put(name, loaded.deploy_spec(version.ref))
    chat = version.task == GENERATION
    with teller.deploying(name):
        deployment = client.deployments.wait_ready(name, timeout=_LOADED_SECONDS if chat else _READY_SECONDS)
    new = put.spec_revision != before
    outcome.url = f"{client.connection.url}" + ("/v1" if chat else f"/api/v1/deployments/{name}/predict")
    outcome.deployment = {
        "name": name,
        "revision": deployment.spec_revision,
        "model": deployment.model_version,
        "status": deployment.status,
        "new": new,
    }
    outcome.new += [f"deployment {name}, revision {deployment.spec_revision}"] if new else []
    teller.is_deployed(deployment, outcome.url, new)


def _predict(client: Client, name: str, inputs: list[dict[str, Any]], teller: Teller, outcome: Outcome) -> None:
    from modelworks.cli.curl import predict_line

    prediction = client.deployments.predict(name, inputs)
    outcome.prediction = prediction.model_dump(mode="json", exclude_none=True)
    outcome.curl = predict_line(client.connection, name, inputs)
    teller.predicted(inputs, prediction, outcome.curl)


def _converse(client: Client, name: str, chat: dict[str, Any], teller: Teller, outcome: Outcome) -> None:
    from modelworks.cli.curl import chat_line

    messages, params = chat["messages"], {key: value for key, value in chat.items() if key != "messages"}
    outcome.prediction = client.chat(name, messages, **params)
    outcome.curl = chat_line(client.connection, name, chat)
    teller.chatted(chat, str(outcome.prediction["choices"][0]["message"]["content"]), outcome.curl)


def _dataset_versions(client: Client, name: str) -> tuple[int, ...]:
    try:
        return client.datasets.versions(name)
    except NotFound:
        return ()


def _model_versions(client: Client, name: str) -> tuple[int, ...]:
    try:
        return tuple(one.version for one in client.models.get(name).versions)
    except NotFound:
        return ()


def _revision(client: Client, name: str) -> int | None:
    try:
        return client.deployments.get(name).spec_revision
    except NotFound:
        return None
