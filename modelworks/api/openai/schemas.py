"""What /openapi.json says of OpenAI's routes: the part of OpenAI's own specification that is served."""

from __future__ import annotations

from typing import Any

from modelworks.api.schemas import Content, page_of, plain

_EXAMPLE_MODEL = {"id": "smollm2-chat", "object": "model", "created": 1760000000, "owned_by": "smollm2-chat:1",
                  "task": "text-generation"}  # fmt: skip
_MODEL: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string", "description": "the deployment's name, or DEPLOYMENT:ADAPTER"},
        "object": {"const": "model"},
        "created": {"type": "integer", "description": "Unix time in seconds"},
        "owned_by": {"type": "string", "description": "the model version that answers"},
        "task": {"type": "string", "description": "what it does: text-generation, embedding..."},
        "parent": {"type": "string", "description": "of an adapter: the deployment that carries it"},
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


def _maybe(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **more}


def _object(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _request(required: list[str], properties: dict[str, Any], example: Any) -> dict[str, Any]:
    return {"application/json": {"schema": _object(required, properties), "example": example}}


_NAME: dict[str, Any] = {
    "type": "string",
    "description": "a deployment's name; of a language model also DEPLOYMENT:ADAPTER",
}
_TEXT = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
_PENALTY = _maybe("number", minimum=-2, maximum=2)
_LIMIT = _maybe("integer", minimum=1)
_SAMPLING: dict[str, Any] = {
    "temperature": _maybe("number", minimum=0, maximum=2, default=1),
    "top_p": _maybe("number", exclusiveMinimum=0, maximum=1, default=1),
    "top_k": _maybe("integer", minimum=0, description="0: all; not OpenAI's"),
    "min_p": _maybe("number", minimum=0, maximum=1, description="not OpenAI's"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _maybe("number", exclusiveMinimum=0, description="1: none; not OpenAI's"),
    "seed": _maybe("integer"),
    "logit_bias": _maybe("object", additionalProperties={"type": "number", "minimum": -100, "maximum": 100}),
    "ignore_eos": _maybe("boolean", description="go on until max_tokens; not OpenAI's"),
    "stop": {
        "oneOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "maxItems": 4},
            {"type": "null"},
        ]
    },
    "n": _maybe("integer", minimum=1, maximum=128, default=1),
    "stream": _maybe("boolean"),
    "stream_options": _maybe(
        "object",
        properties={
            "include_usage": {"type": "boolean"},
            "continuous_usage_stats": {"type": "boolean", "description": "usage so far in each event; not OpenAI's"},
        },
    ),
    "response_format": _maybe(
        "object",
        required=["type"],
        properties={
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "properties": {"name": {"type": "string"}, "schema": {"type": "object"}}},
        },
    ),
}
_FUNCTION = _object(
    ["name"],
    {"name": {"type": "string"}, "description": {"type": "string"}, "parameters": {"type": "object"}},
)
_TOOLS: dict[str, Any] = {
    "tools": _maybe(
        "array", items=_object(["type", "function"], {"type": {"const": "function"}, "function": _FUNCTION})
    ),
    "tool_choice": {
        "description": "auto, none, required, or an object that names a function; the last two are enforced"
    },
    "parallel_tool_calls": _maybe("boolean", default=True),
}
_MESSAGE = _object(
    ["role"],
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _TEXT,
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
    },
)
REQUEST = _request(
    ["model", "messages"],
    {
        "model": _NAME,
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "max_completion_tokens": _LIMIT,
        "max_tokens": _LIMIT,
        "logprobs": _maybe("boolean"),
        "top_logprobs": _maybe("integer", minimum=0, maximum=20),
        **_SAMPLING,
        **_TOOLS,
    },
    {
        "model": "smollm2-chat",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_completion_tokens": 64,
    },
)
TEXT_REQUEST = _request(
    ["model", "prompt"],
    {
        "model": _NAME,
        "prompt": {"description": "a text, a list of texts, a list of token ids, or a list of such lists"},
        "max_tokens": _maybe("integer", minimum=0, default=16),
        "echo": _maybe("boolean"),
        "logprobs": _maybe("integer", minimum=0, maximum=20),
        **_SAMPLING,
    },
    {"model": "smollm2-chat", "prompt": "The capital of France is", "max_tokens": 8},
)

_USAGE = _object(
    ["prompt_tokens", "completion_tokens", "total_tokens"],
    {
        **{name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}},
    },
)
_LOGPROBS = _maybe("object", properties={"content": {"type": "array", "items": {"type": "object"}}})
_ANSWER = _object(
    ["role", "content", "refusal"],
    {
        "role": {"const": "assistant"},
        "content": _maybe("string"),
        "refusal": _maybe("string"),
        "reasoning_content": {"type": "string", "description": "what a model wrote between its marks of reasoning"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
    },
)


def _choice(more: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ["index", *more, "finish_reason"],
        {"index": {"type": "integer"}, **more, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}},
    )


def _completion(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ["id", "object", "created", "model", "choices", "usage"],
        {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "system_fingerprint": {"type": "string", "description": "the model version that answered"},
            "choices": {"type": "array", "items": choice},
            "usage": _USAGE,
        },
    )


_HEAD: dict[str, Any] = {"created": 1760000000, "model": "smollm2-chat", "system_fingerprint": "smollm2-chat:1"}
_SPENT = {"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45}


def _events(example: str) -> Content:
    return plain({"type": "string"}, example, "text/event-stream")


COMPLETION: Content = {
    **plain(
        _completion("chat.completion", _choice({"message": _ANSWER, "logprobs": _LOGPROBS})),
        {
            "id": "chatcmpl-5f3a9c0d1e2f4a6b",
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
            "usage": _SPENT,
        },
    ),
    **_events('data: {"object": "chat.completion.chunk", ...}\n\ndata: [DONE]\n\n'),
}
TEXT_COMPLETION: Content = {
    **plain(
        _completion("text_completion", _choice({"text": {"type": "string"}, "logprobs": _maybe("object")})),
        {
            "id": "cmpl-5f3a9c0d1e2f4a6b",
            **_HEAD,
            "object": "text_completion",
            "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
            "usage": _SPENT,
        },
    ),
    **_events('data: {"object": "text_completion", ...}\n\ndata: [DONE]\n\n'),
}

# embeddings and what is made of them

EMBEDDING_REQUEST = _request(
    ["model", "input"],
    {
        "model": _NAME,
        "input": {"description": "a text, a list of texts, a list of token ids, or a list of such lists"},
        "encoding_format": {"enum": ["float", "base64", None], "description": "base64: little-endian float32"},
        "dimensions": _maybe("integer", minimum=1, description="the first so many, scaled to length 1 again"),
    },
    {"model": "minilm-embed", "input": ["A cat sits on the mat.", "The stock market fell."]},
)
EMBEDDINGS: Content = plain(
    _object(
        ["object", "data", "model", "usage"],
        {
            "object": {"const": "list"},
            "data": {
                "type": "array",
                "items": _object(
                    ["object", "index", "embedding"],
                    {
                        "object": {"const": "embedding"},
                        "index": {"type": "integer"},
                        "embedding": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "number"}}]},
                    },
                ),
            },
            "model": {"type": "string"},
            "usage": _object(
                ["prompt_tokens", "total_tokens"],
                {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
            ),
        },
    ),
    {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.1301, -0.0159]}],
        "model": "minilm-embed",
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    },
)
RERANK_REQUEST = _request(
    ["model", "query", "documents"],
    {
        "model": {"type": "string", "description": "a deployment of a rerank or an embedding model"},
        "query": {"type": "string"},
        "documents": {"type": "array", "minItems": 1, "items": {"description": 'a text, or {"text": ...}'}},
        "top_n": _LIMIT,
        "return_documents": _maybe("boolean"),
    },
    {"model": "minilm-embed", "query": "pets", "documents": ["The stock market fell.", "A cat sits on the mat."]},
)
_EXAMPLE_RANKED = {"index": 1, "relevance_score": 0.41, "document": {"text": "A cat sits on the mat."}}
RERANKED: Content = plain(
    _object(
        ["id", "object", "model", "results", "usage"],
        {
            "id": {"type": "string"},
            "object": {"const": "list"},
            "model": {"type": "string"},
            "results": {
                "type": "array",
                "items": _object(
                    ["index", "relevance_score"],
                    {
                        "index": {"type": "integer"},
                        "relevance_score": {"type": "number", "minimum": 0, "maximum": 1},
                        "document": {"type": "object"},
                    },
                ),
            },
            "usage": {"type": "object"},
            "meta": {"type": "object"},
        },
    ),
    {
        "id": "rerank-5f3a9c0d",
        "object": "list",
        "model": "minilm-embed",
        "results": [_EXAMPLE_RANKED],
        "usage": {"prompt_tokens": 16, "total_tokens": 16},
        "meta": {"tokens": {"input_tokens": 16}},
    },
)
MODERATION_REQUEST = _request(
    ["input"],
    {
        "model": _maybe("string", description="a deployment of task text-classification or embedding"),
        "input": {"description": "a text, a list of texts, or a list of parts of type text"},
    },
    {"model": "minilm-embed", "input": "I will kill you."},
)
MODERATION: Content = plain(
    _object(
        ["id", "model", "results"],
        {
            "id": {"type": "string"},
            "model": {"type": "string"},
            "results": {
                "type": "array",
                "items": _object(
                    ["flagged", "categories", "category_scores", "category_applied_input_types"],
                    {
                        "flagged": {"type": "boolean"},
                        "categories": {"type": "object", "additionalProperties": {"type": "boolean"}},
                        "category_scores": {"type": "object", "additionalProperties": {"type": "number"}},
                        "category_applied_input_types": {"type": "object"},
                    },
                ),
            },
        },
    ),
    {
        "id": "modr-5f3a9c0d",
        "model": "minilm-embed",
        "results": [
            {
                "flagged": True,
                "categories": {"violence": True},
                "category_scores": {"violence": 0.91},
                "category_applied_input_types": {"violence": ["text"]},
            }
        ],
    },
)

# responses

_ITEM = {"type": "object", "properties": {"type": {"type": "string"}}}
RESPONSE_REQUEST = _request(
    ["model", "input"],
    {
        "model": _NAME,
        "input": {"description": "a text, or items: messages, function_call and function_call_output"},
        "instructions": _maybe("string"),
        "previous_response_id": _maybe("string"),
        "max_output_tokens": _LIMIT,
        "store": _maybe("boolean", default=True, description="keep it, so that it can be read and gone on from"),
        "text": _maybe("object", properties={"format": {"type": "object"}}),
        "tools": _maybe("array", items={"type": "object", "required": ["type"]}),
        "tool_choice": _TOOLS["tool_choice"],
        "parallel_tool_calls": _TOOLS["parallel_tool_calls"],
        "metadata": _maybe("object", additionalProperties={"type": "string"}),
        "include": _maybe("array", items={"type": "string"}),
        "top_logprobs": _maybe("integer", minimum=0, maximum=20),
        **{name: _SAMPLING[name] for name in ("temperature", "top_p", "stream")},
    },
    {"model": "smollm2-chat", "input": "What is the capital of France?", "max_output_tokens": 64},
)
_EXAMPLE_OUTPUT = {
    "id": "msg_5f3a9c0d",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "The capital of France is Paris.", "annotations": [], "logprobs": []}],
}
_RESPONSE: Content = plain(
    _object(
        ["id", "object", "created_at", "status", "model", "output", "error", "usage"],
        {
            "id": {"type": "string"},
            "object": {"const": "response"},
            "created_at": {"type": "integer"},
            "status": {"enum": ["completed", "incomplete", "in_progress", "failed"]},
            "model": {"type": "string"},
            "output": {"type": "array", "items": _ITEM},
            "error": _maybe("object"),
            "usage": _maybe("object"),
        },
    ),
    {
        "id": "resp_0198c0f4e1b25f3a9c0d1e2f",
        "object": "response",
        "created_at": 1760000000,
        "status": "completed",
        "model": "smollm2-chat",
        "output": [_EXAMPLE_OUTPUT],
        "error": None,
        "usage": {"input_tokens": 37, "output_tokens": 8, "total_tokens": 45},
    },
)
RESPONSE = _RESPONSE
RESPONSE_OR_EVENTS: Content = {
    **_RESPONSE,
    **_events('event: response.created\ndata: {"type": "response.created", "sequence_number": 0, ...}\n\n'),
}
RESPONSE_DELETED: Content = plain(
    _object(
        ["id", "object", "deleted"],
        {"id": {"type": "string"}, "object": {"type": "string"}, "deleted": {"const": True}},
    ),
    {"id": "resp_0198c0f4e1b25f3a9c0d1e2f", "object": "response", "deleted": True},
)
INPUT_ITEMS: Content = page_of(
    _ITEM,
    {
        "id": "msg_5f3a9c0d",
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": "What is the capital of France?"}],
    },
)
