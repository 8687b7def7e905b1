"""The curl line that repeats a prediction or a chat. The key itself is never in it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelworks.client import Connection


def predict_line(connection: Connection, name: str, inputs: list[dict[str, Any]]) -> str:
    """One shell command, over two lines; control characters in names stay escaped inside the JSON."""
    return _line(connection, f"/api/v1/deployments/{name}/predict", {"inputs": inputs})


def chat_line(connection: Connection, name: str, chat: dict[str, Any]) -> str:
    return _line(connection, "/v1/chat/completions", {"model": name, **chat})


def _line(connection: Connection, path: str, content: dict[str, Any]) -> str:
    body = json.dumps(content)
    url = shlex.quote(f"{connection.url}{path}")
    return (
        f'curl -s {url} -H "Authorization: Bearer {_key(connection)}" -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(body)}"
    )


def _key(connection: Connection) -> str:
    if connection.key_file is not None:
        return f"$(cat {shlex.quote(str(connection.key_file))})"
    return "$MODELWORKS_API_KEY"
