"""`up`, `demo` and `status`: the server itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modelworks.cli.exits import edge
from modelworks.cli.session import Session, command
from modelworks.cli.text import number, plain

Optional = typer.Option


def register(app: typer.Typer) -> None:
    app.command("up")(up)
    app.command("demo")(demo)
    command(app, "status")(status)


def up(
    home: Annotated[
        Path | None, Optional(help="Folder of the catalog, the blobs and the logs.  [default: ~/.modelworks]")
    ] = None,
    host: Annotated[str | None, Optional(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, Optional(help="HTTP port; 0 picks a free one.  [default: 8000]")] = None,
    grpc_port: Annotated[int | None, Optional(help="gRPC port; 0 picks a free one.  [default: 8001]")] = None,
    tls_cert: Annotated[Path | None, Optional(help="PEM certificate chain, for HTTP and gRPC.")] = None,
    tls_key: Annotated[Path | None, Optional(help="PEM private key of the certificate.")] = None,
    insecure: Annotated[
        bool | None, Optional("--insecure", help="Allow listening beyond loopback without TLS.")
    ] = None,
    offline: Annotated[bool | None, Optional("--offline", help="Never make an outgoing connection.")] = None,
    stores: Annotated[Path | None, Optional(help="TOML file of the stores that a table may point into.")] = None,
    gateways: Annotated[int | None, Optional(help="Processes that answer requests.  [default: 1]")] = None,
    workers: Annotated[int | None, Optional(help="Jobs that run at the same time.  [default: 2]")] = None,
    log_level: Annotated[str | None, Optional(help="debug, info, warning or error.  [default: info]")] = None,
    request_log: Annotated[
        bool | None,
        Optional("--request-log/--no-request-log", help="A line a request in logs/requests.log.  [default: on]"),
    ] = None,
    otlp_endpoint: Annotated[str | None, Optional(help="OpenTelemetry collector for traces, http://host:4318.")] = None,
    max_body: Annotated[int | None, Optional(help="Largest request body in bytes, uploads aside.")] = None,
    max_upload: Annotated[int | None, Optional(help="Largest upload in bytes.")] = None,
    max_headers: Annotated[int | None, Optional(help="Largest sum of a request's header bytes.")] = None,
    header_timeout: Annotated[float | None, Optional(help="Seconds for a request's headers to be complete.")] = None,
    body_timeout: Annotated[
        float | None, Optional(help="Seconds without a byte of a body until it is refused.")
    ] = None,
    predict_timeout: Annotated[float | None, Optional(help="Deadline of a prediction that names none; 600 for language models.")] = None,
    shutdown_grace: Annotated[float | None, Optional(help="Seconds that calls get to finish when it stops.")] = None,
    lease_seconds: Annotated[float | None, Optional(help="How long a job's lease lasts without a heartbeat.")] = None,
    job_log_days: Annotated[
        float | None, Optional(help="Days that a job's log is kept after its end.  [default: 30]")
    ] = None,
    queue_limit: Annotated[int | None, Optional(help="Calls that may wait for one deployment.")] = None,
    requests_per_minute: Annotated[int | None, Optional(help="Rate limit of a key that names none.")] = None,
    tokens_per_minute: Annotated[int | None, Optional(help="The same for tokens of language models.")] = None,
    with_parent: Annotated[bool, Optional("--with-parent", hidden=True)] = False,
) -> None:
    """Start the server on this machine, in the foreground.

    Everything is kept in the home folder. The first start makes an administrator's key, prints it once and keeps it in
    HOME/admin.key. Each option can also be given as an environment variable: MODELWORKS_PORT for --port. Stop it with
    Ctrl-C or SIGTERM.
    """
    given = {name: value for name, value in locals().items() if value is not None and name != "with_parent"}
    if with_parent:
        _stop_with_parent()
    with edge():
        from modelworks.server import serve

        raise typer.Exit(serve(_settings(given)))


def _settings(given: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from modelworks.core.errors import InvalidInput
    from modelworks.core.settings import Settings

    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        source = (
            f"--{name.replace('_', '-')}" if name in given else f"the environment variable MODELWORKS_{name.upper()}"
        )
        raise InvalidInput(f"{source} is not valid: {first['msg']}", param=name) from None


def _stop_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the process that started us is gone (Linux)."""
    import ctypes
    import os
    import signal
    import sys

    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise typer.Exit(1)


def demo(
    stay: Annotated[bool, Optional("--stay", help="Leave the server running at the end, until Ctrl-C.")] = False,
    recipe: Annotated[Path | None, Optional(help="Recipe to run.  [default: iris]")] = None,
    home: Annotated[Path, Optional(help="Home folder of the demo's server.")] = Path(".demo"),
    port: Annotated[int, Optional(help="HTTP port; 0 picks a free one.")] = 0,
    as_json: Annotated[bool, Optional("--json", help="Print one JSON object instead of the story.")] = False,
) -> None:
    """Run a recipe on a server of its own, and stop.

    Tells the story from data to prediction: profile, folds, package, endpoint, and the curl line that repeats it.
    """
    with edge():
        from modelworks.cli.demo import run

        run(recipe, home=home, port=port, stay=stay, as_json=as_json)


def status(session: Session) -> None:
    """Show the server, the key in use, and how everything is."""
    who = session.client.whoami()
    state = session.client.status()
    if session.json:
        session.emit({"url": session.client.connection.url, "key": who, "status": state})
        return
    session.facts(
        [
            ("server", session.client.connection.url),
            ("key", f"{who.key_name or who.key_id} ({who.role})"),
            ("project", who.project_name or who.project_id),
            *((name, _shown(value)) for name, value in state.items()),
            *((f"  {item['name']}", _deployment(item)) for item in state.get("deployments", [])),
        ]
    )


def _deployment(item: dict[str, Any]) -> str:
    calls, errors = item.get("requests_per_second", 0.0), item.get("errors_per_second", 0.0)
    return f"{item['status']}, {number(calls)} requests/s, {number(errors)} errors/s"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) or "-"
    if isinstance(value, list):
        return f"{len(value)}"
    return number(value) if isinstance(value, int | float) else plain(value)
