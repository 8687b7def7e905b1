"""OpenAI's own specification against the routes served here: python tests/clients/spec_walk.py OPENAI.YAML [EXAMPLES]

schemathesis makes requests that the specification allows and ones that it does not. No answer may be a server's error; each
error has OpenAI's form; what is a success is as the specification says. Models and lengths are set to what there is.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

ROUTES = (
    ("/models", "GET"),
    ("/models/{model}", "GET"),
    ("/chat/completions", "POST"),
    ("/completions", "POST"),
    ("/responses", "POST"),
    ("/responses/{response_id}", "GET"),
    ("/responses/{response_id}", "DELETE"),
    ("/responses/{response_id}/input_items", "GET"),
    ("/embeddings", "POST"),
    ("/moderations", "POST"),
)
MODELS = {"/embeddings": os.environ["EMBED"], "/moderations": os.environ["EMBED"]}
LENGTHS = {
    "/chat/completions": "max_completion_tokens",
    "/completions": "max_tokens",
    "/responses": "max_output_tokens",
}


def fit(case: Any, path: str, draw: int) -> None:
    """Of three requests two name a model that there is, and none asks for long answers."""
    body = case.body
    if isinstance(body, dict):
        if draw:
            body["model"] = MODELS.get(path, os.environ["CHAT"])
        for name in (LENGTHS.get(path), "max_tokens" if path == "/chat/completions" else None):
            if name and isinstance(body.get(name, 0), int):
                body[name] = min(body.get(name) or 2, 2)
        body.pop("n", None) if isinstance(body.get("n"), int) and body["n"] > 4 else None


def walk(schema: Any, path: str, method: str, examples: int) -> dict[int, int]:
    operation = schema[path][method]
    seen: dict[int, int] = {}
    both = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=both, draw=st.integers(0, 2))
    def run(case: Any, draw: int) -> None:
        fit(case, path, draw)
        case.headers = {"Authorization": f"Bearer {os.environ['KEY']}"}
        response = case.call(base_url=os.environ["URL"])
        status = response.status_code
        seen[status] = seen.get(status, 0) + 1
        if status >= 400:
            assert status < 500, (status, response.text[:500], case.body)
            error = response.json()["error"]
            if os.environ.get("WHY"):
                print(status, error["param"], error["message"][:150])
            assert error.keys() == {"message", "type", "param", "code"}, error
        elif not response.headers["content-type"][0].startswith("text/event-stream"):
            case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

    run()
    return seen


def main() -> None:
    schema = schemathesis.openapi.from_path(sys.argv[1])
    examples = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    for path, method in ROUTES:
        seen = walk(schema, path, method, examples)
        print(
            f"{method} {path}: {', '.join(f'{count} x {status}' for status, count in sorted(seen.items()))}", flush=True
        )


if __name__ == "__main__":
    main()
