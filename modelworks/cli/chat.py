"""`chat`: talk with a deployed language model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from modelworks.cli.session import Session, command
from modelworks.cli.text import lines


def register(root: typer.Typer) -> None:
    command(root, "chat")(chat)


def chat(
    session: Session,
    name: Annotated[str, typer.Argument(help="Name of the deployment.")],
    message: Annotated[
        str | None, typer.Argument(help="What to say; without it, what comes on stdin, line by line.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer, at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answer.")] = None,
) -> None:
    """Say something to a language model, or talk with it: the answer is printed as it comes. Ctrl-D ends."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = {key: value for key, value in given.items() if value is not None}
    messages = [{"role": "system", "content": system}] if system else []
    if message is not None:
        messages.append({"role": "user", "content": message})
        _say(session, name, messages, params)
        return
    while line := _line():
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _say(session, name, messages, params)})


def _line() -> str:
    """The next line that is not blank; "" at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    for line in sys.stdin:
        if line.strip():
            return line.strip()
    return ""


def _say(session: Session, name: str, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    if session.json:
        answer = session.client.chat(name, messages, **params)
        session.emit(answer)
        return str(answer["choices"][0]["message"]["content"])
    texts = []
    for text in session.client.chat_stream(name, messages, **params):
        texts.append(text)
        print(lines(text), end="", flush=True)
    print()
    return "".join(texts)
