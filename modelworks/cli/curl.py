"""The curl line that repeats a prediction. The key itself is never in it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelworks.client import Connection


def predict_line(connection: Connection, name: str, inputs: list[dict[str, Any]]) -> str:
    """One shell command, over two lines; control characters in names stay escaped inside the JSON."""
    body = json.dumps({"inputs": inputs})
    url = shlex.quote(f"{connection.url}/api/v1/deployments/{name}/predict")
    return (
        f'curl -s {url} -H "Authorization: Bearer {_key(connection)}" -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(body)}"
    )


def _key(connection: Connection) -> str:
    if connection.key_file is not None:
        return f"$(cat {shlex.quote(str(connection.key_file))})"
    return "$MODELWORKS_API_KEY"
