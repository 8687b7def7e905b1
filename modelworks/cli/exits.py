"""Exit codes that scripts can use, and the one place where errors become a sentence on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer

from modelworks.core.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    ModelworksError,
    NotFound,
    RateLimited,
    Unauthenticated,
    Unavailable,
)

OK, FAILED, USAGE, AUTH, NOT_FOUND, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
MEANINGS = {
    OK: "done",
    FAILED: "a job or deployment failed, a conflict, or an error of the server",
    USAGE: "wrong usage or invalid input: mend the command, the file or the request",
    AUTH: "no valid API key, or one that may not do this",
    NOT_FOUND: "what was named does not exist in this project",
    UNREACHABLE: "no server, or it is too busy or too slow: try again later",
    INTERRUPTED: "interrupted by Ctrl-C",
}


class Failed(ModelworksError):
    """What was asked for was tried and failed (a job, a deployment): exit code 1, whatever the reason."""

    default_code = "failed"


def code_of(error: ModelworksError) -> int:
    if isinstance(error, Failed | Conflict):
        return FAILED
    if isinstance(error, Unauthenticated | Forbidden):
        return AUTH
    if isinstance(error, NotFound):
        return NOT_FOUND
    if isinstance(error, Unavailable | RateLimited | DeadlineExceeded):
        return UNREACHABLE
    return USAGE if 400 <= error.status < 500 else FAILED


# what a server's message calls a thing -> the flag that it is here
_FLAGS = {"the header x-project": "--project", "expires_in": "--days"}
SCHEMA_FLAGS = {
    "schema.header": "--header",
    "schema.columns": "--column",
    "schema.encoding": "--encoding",
    "schema.delimiter": "--delimiter",
    "schema.missing": "--missing",
}


@contextmanager
def named(flags: Mapping[str, str]) -> Iterator[None]:
    """An error's message on its way out says the command's flags in place of the fields of the API."""
    try:
        yield
    except ModelworksError as error:
        for field, flag in flags.items():
            error.message = error.message.replace(field, flag)
        raise


@contextmanager
def edge() -> Iterator[None]:
    """The edge of the process: an error that a user can meet ends it with one sentence and a code."""
    from modelworks.cli.text import plain

    try:
        with named(_FLAGS):
            yield
    except ModelworksError as error:
        request = error.detail.get("request_id")
        trace = f" (request {plain(request)})" if isinstance(request, str) and error.status >= 500 else ""
        print(f"error: {plain(error.message)}{trace}", file=sys.stderr)
        raise typer.Exit(code_of(error)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # the reader (`head`, `less`) has seen enough; keep the interpreter from writing to it once more
        sys.stdout = None
        raise typer.Exit(OK) from None
