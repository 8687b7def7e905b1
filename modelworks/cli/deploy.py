"""`deploy`, `predict` and `deployments`: from a model version to an endpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelworks.cli.session import Session, command, group
from modelworks.cli.text import decimal, lines, number, plain, when
from modelworks.core.errors import InvalidInput

if TYPE_CHECKING:
    from modelworks.client import Output
    from modelworks.core.types import Deployment

app = group("Look at deployments, roll them back, delete them.")
_BATCH = 500  # rows of one request when predicting a file


def register(root: typer.Typer) -> None:
    command(root, "deploy")(deploy)
    command(root, "predict")(predict)


def deploy(
    session: Session,
    model: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")],
    name: Annotated[str | None, typer.Option(help="Name of the deployment; by default the model's.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas, at least.  [default: 1]")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Replicas, at most: between both, they follow the load.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Calls under way that one replica is meant for.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads of a replica.")] = None,
    memory_mb: Annotated[int | None, typer.Option(help="Memory limit of a replica in MiB.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Of a language model: auto, openvino, llama, transformers or vllm.  [default: auto]")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of one call of a language model.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs over which each replica is split, by the engine vllm.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A LoRA adapter as NAME=MODEL: --adapter pirate=pirate-lora:1. Repeatable.")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Calls that run together at most.")] = None,
    wait_ms: Annotated[float | None, typer.Option(help="How long an idle replica waits for more calls.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 120.0,
) -> None:
    """Serve a model version under a name. Doing it again with another version replaces it without a gap."""
    from modelworks.core.specs import Ref

    spec: dict[str, Any] = {"model": model}
    for part, given in (
        ("replicas", {"min": replicas, "max": max_replicas, "target": target}),
        ("resources", {"threads": threads, "memory_mb": memory_mb}),
        ("batching", {"max_batch": max_batch, "wait_ms": wait_ms}),
    ):
        chosen = {key: value for key, value in given.items() if value is not None}
        if chosen:
            spec[part] = chosen
    more = (("engine", engine), ("context", context), ("tensor_parallel_size", tensor_parallel_size))
    spec |= {key: value for key, value in more if value is not None}
    if adapter:
        spec["adapters"] = dict(map(_adapter, adapter))
    name = name or Ref.parse(model).name
    deployment = session.client.deployments.put(name, spec)
    if wait:
        deployment = wait_ready(session, name, timeout)
    if session.json:
        session.emit(deployment)
        return
    url = f"{session.client.connection.url}/api/v1/deployments/{name}/predict"
    session.say(f"{name}: {deployment.model_version}, {deployment.status}, revision {deployment.spec_revision}, {url}")


def _adapter(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise InvalidInput(f"{text[:100]!r} must be NAME=MODEL, such as pirate=pirate-lora:1", param="--adapter")
    return name, model


def wait_ready(session: Session, name: str, timeout: float) -> Deployment:
    """Wait with a spinner on a terminal. A deployment that fails is `Failed`."""
    if session.json or not session.notes.is_terminal:
        return session.client.deployments.wait_ready(name, timeout=timeout)
    from rich.text import Text

    with session.notes.status(Text(f"starting {name}")):
        return session.client.deployments.wait_ready(name, timeout=timeout)


def predict(
    session: Session,
    name: Annotated[str, typer.Argument(help="Name of the deployment.")],
    input: Annotated[
        list[str] | None, typer.Option(help="A row as JSON: --input '{\"a\": 1}', or a list of rows. Repeatable.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Rows in a .csv, .tsv, .jsonl or .json file; or one image or sound.")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(help="Of a language model, as NAME=VALUE: --parameter max_tokens=16. Repeatable.")
    ] = None,
) -> None:
    """Predict rows of named raw features. In --input, "@PATH" stands for the file of an image or a sound."""
    from modelworks.cli import values

    if file is not None and file.suffix.lower() in values.MEDIA_SUFFIXES:
        rows: Iterable[dict[str, Any]] = [{_only_file(session, name): file}]
    else:
        rows = map(values.with_files, values.rows(input, file))
    if file is not None and file.suffix.lower() in (".csv", ".tsv"):
        inputs = session.client.deployments.get(name).signature.inputs
        columns: dict[str, str | None] = {one.name: one.column for one in inputs}
        rows = (values.typed(row, columns) for row in rows)
    params = dict(map(_parameter, parameter or ()))
    outputs: list[Output] = []
    model = request = ""
    for batch in _batches(rows, 1 if params else _BATCH):  # a language model takes one at a time
        answer = session.client.deployments.predict(name, batch, parameters=params)
        outputs += answer.outputs
        model, request = answer.model, answer.request_id
    if not outputs:
        session.note("there are no rows to predict")
    if session.json:
        session.emit(
            {"outputs": [one.model_dump(exclude_none=True) for one in outputs], "model": model, "request_id": request}
        )
        return
    _table(session, outputs)


def _parameter(text: str) -> tuple[str, Any]:
    """The value as JSON, or as the text that it is."""
    import json

    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InvalidInput(f"{text[:100]!r} must be NAME=VALUE, such as max_tokens=16", param="--parameter")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _only_file(session: Session, name: str) -> str:
    """The feature of the deployment that is an image or a sound."""
    inputs = session.client.deployments.get(name).signature.inputs
    found = [one.name for one in inputs if one.column in ("image", "audio")]
    if len(found) != 1 or len(inputs) != 1:
        listed = ", ".join(one.name for one in inputs)
        raise InvalidInput(
            f"{name} takes {listed}; give a row as --input, with \"@PATH\" for the file of an image or a sound",
            param="--file",
        )
    return found[0]


def _batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch


def _table(session: Session, outputs: list[Output]) -> None:
    if not outputs:
        return
    shares = outputs[0].probabilities
    if isinstance(shares, dict):
        session.table(
            ("label", *map(plain, shares)),
            (
                (one.label, *(decimal(one.probabilities.get(name)) for name in shares))
                for one in outputs
                if isinstance(one.probabilities, dict)
            ),
        )
        return
    names = list(outputs[0].model_dump(exclude_none=True))
    session.table(
        tuple(map(plain, names)) or ("output",),
        (tuple(_cell(found.get(name)) for name in names) for found in (one.model_dump() for one in outputs)),
    )


def _cell(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else number(value)


@command(app, "list")
def list_(
    session: Session,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 100,
    after: Annotated[str | None, typer.Option(help="Go on after this id.")] = None,
) -> None:
    """List deployments."""
    found = session.client.deployments.list(limit=limit, after=after)
    if session.json:
        session.emit(found)
        return
    session.table(
        ("deployment", "model", "status", "replicas", "revision", "message", "created"),
        (
            (
                one.name,
                one.model_version,
                one.status,
                one.ready_replicas,
                one.spec_revision,
                one.message,
                when(one.created_at),
            )
            for one in found.items
        ),
    )


@command(app, "show")
def show(session: Session, name: Annotated[str, typer.Argument(help="Name of the deployment.")]) -> None:
    """Show a deployment, its replicas and its revisions."""
    deployment = session.client.deployments.get(name)
    replicas = session.client.deployments.replicas(name)
    revisions = session.client.deployments.revisions(name)
    if session.json:
        session.emit({"deployment": deployment, "replicas": list(replicas), "revisions": list(revisions)})
        return
    session.facts(
        [
            ("deployment", deployment.name),
            ("model", deployment.model_version),
            ("status", deployment.status + (f": {deployment.message}" if deployment.message else "")),
            ("revision", deployment.spec_revision),
            ("url", f"{session.client.connection.url}/api/v1/deployments/{name}/predict"),
        ]
    )
    session.table(
        ("replica", "model", "status", "revision", "ready since", "message"),
        (
            (one.id, one.model_version, one.status, one.spec_revision, when(one.ready_at), one.message)
            for one in replicas
        ),
    )
    session.table(
        ("revision", "model", "created"), ((one.number, one.model_version, when(one.created_at)) for one in revisions)
    )


@command(app, "rollback")
def rollback(
    session: Session,
    name: Annotated[str, typer.Argument(help="Name of the deployment.")],
    revision: Annotated[int | None, typer.Option(help="The revision to go back to; by default the one before.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 120.0,
) -> None:
    """Serve an earlier revision again, as a new one."""
    deployment = session.client.deployments.rollback(name, revision)
    if wait:
        deployment = wait_ready(session, name, timeout)
    if session.json:
        session.emit(deployment)
    else:
        session.say(f"{name}: {deployment.model_version}, {deployment.status}, revision {deployment.spec_revision}")


@command(app, "delete")
def delete(session: Session, name: Annotated[str, typer.Argument(help="Name of the deployment.")]) -> None:
    """Delete a deployment; its replicas finish what they are doing and stop."""
    session.client.deployments.delete(name)
    session.emit({"deleted": name}) if session.json else session.say(f"{name} is deleted")


@command(app, "logs")
def logs(session: Session, name: Annotated[str, typer.Argument(help="Name of the deployment.")]) -> None:
    """Show the ends of the logs of the newest replicas."""
    text = session.client.deployments.logs(name)
    session.emit({"log": text}) if session.json else print(lines(text))
