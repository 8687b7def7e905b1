"""What /openapi.json says of OpenAI's routes: the part of OpenAI's own specification that is served."""

from __future__ import annotations

from typing import Any

from modelworks.api.schemas import Content, plain

_EXAMPLE_MODEL = {"id": "smollm2-chat", "object": "model", "created": 1760000000, "owned_by": "smollm2-chat:1"}
_MODEL: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string", "description": "the deployment's name"},
        "object": {"const": "model"},
        "created": {"type": "integer", "description": "Unix time in seconds"},
        "owned_by": {"type": "string", "description": "the model version that answers"},
    },
}
MODEL: Content = plain(_MODEL, _EXAMPLE_MODEL)
MODELS: Content = plain(
    {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
    },
    {"object": "list", "data": [_EXAMPLE_MODEL]},
)

_TEXT = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
_PENALTY = {"type": ["number", "null"], "minimum": -2, "maximum": 2}
_LIMIT = {"type": ["integer", "null"], "minimum": 1}
REQUEST: dict[str, Any] = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["model", "messages"],
            "properties": {
                "model": {"type": "string", "description": "a deployment's name"},
                "messages": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["role"],
                        "properties": {
                            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                            "content": _TEXT,
                        },
                    },
                },
                "max_completion_tokens": _LIMIT,
                "max_tokens": _LIMIT,
                "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2, "default": 1},
                "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "default": 1},
                "presence_penalty": _PENALTY,
                "frequency_penalty": _PENALTY,
                "seed": {"type": ["integer", "null"]},
                "stop": {
                    "oneOf": [
                        {"type": "string"},
                        {"type": "array", "items": {"type": "string"}, "maxItems": 4},
                        {"type": "null"},
                    ]
                },
                "stream": {"type": ["boolean", "null"]},
                "stream_options": {
                    "type": ["object", "null"],
                    "properties": {"include_usage": {"type": "boolean"}},
                },
                "n": {"enum": [1, None]},
            },
        },
        "example": {
            "model": "smollm2-chat",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_completion_tokens": 64,
        },
    }
}
_USAGE: dict[str, Any] = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}
_COMPLETION: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "chat.completion"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "system_fingerprint": {"type": "string", "description": "the model version that answered"},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "message", "logprobs", "finish_reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "message": {
                        "type": "object",
                        "required": ["role", "content", "refusal"],
                        "properties": {
                            "role": {"const": "assistant"},
                            "content": {"type": ["string", "null"]},
                            "refusal": {"type": ["string", "null"]},
                        },
                    },
                    "logprobs": {"type": "null"},
                    "finish_reason": {"enum": ["stop", "length"]},
                },
            },
        },
        "usage": _USAGE,
    },
}
_HEAD: dict[str, Any] = {
    "id": "chatcmpl-5f3a9c0d1e2f4a6b",
    "created": 1760000000,
    "model": "smollm2-chat",
    "system_fingerprint": "smollm2-chat:1",
}
COMPLETION: Content = {
    **plain(
        _COMPLETION,
        {
            **_HEAD,
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "The capital of France is Paris.", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45},
        },
    ),
    **plain(
        {"type": "string"}, 'data: {"object": "chat.completion.chunk", ...}\n\ndata: [DONE]\n\n', "text/event-stream"
    ),
}
