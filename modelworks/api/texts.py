"""Text generation in the dialects that are not OpenAI's: its prompt as a row, its parameters, its answer as a row."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from modelworks.core.errors import InvalidInput
from modelworks.core.generation import (
    TEXT_GENERATION,
    Sampling,
    check_messages,
    check_prompt,
    check_tokens,
    read_sampling,
)
from modelworks.core.tasks import GENERATION
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.core.types import Answer, Signature, TensorSpec
from modelworks.serve.routes import Route

NAMES = frozenset(Sampling.__struct_fields__)
_WHOLE = ("max_tokens", "top_k", "seed", "logprobs")
_STRUCTURED = ("logit_bias", "schema", "tools")
_PROMPTS = ("messages", "prompt", "tokens")

# what OpenAPI says of them
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "description": "of text generation: max_tokens, temperature (0: the likeliest token), top_p, top_k, min_p, seed, stop (a text "
    "or up to 4), presence_penalty, frequency_penalty, repetition_penalty, logit_bias, logprobs, ignore_eos, schema (a JSON "
    "schema that the text must satisfy), tools, adapter (a LoRA adapter of the deployment). Without max_tokens 512 tokens of a "
    "key's limit are reserved for the answer",
    "properties": {
        "max_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
        "seed": {"type": "integer"},
        "stop": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]},
        "adapter": {"type": "string"},
    },
}


def parameters(route: Route, given: Mapping[str, Any] | None, *, strict: bool) -> dict[str, Any]:
    """Those of Sampling among `given`, checked: InvalidInput names the one that is wrong. For other tasks none.

    `strict`: others are refused; else they are the protocol's own. What is no text may come as one, of JSON, since some
    carriers know plain values only.
    """
    if route.task != GENERATION:
        if strict and given:
            raise InvalidInput(
                f"parameters are for language models, and {route.name!r} does {route.task}", param="parameters"
            )
        return {}
    found = {}
    for name, value in (given or {}).items():
        if name in NAMES:
            found[name] = _plain(name, value)
        elif strict:
            known = ", ".join(sorted(NAMES))
            raise InvalidInput(
                f"there is no parameter {name[:80]!r}; there are {known}", param=f"parameters.{name[:80]}"
            )
    if found:
        read_sampling(found)
    return found


def _plain(name: str, value: Any) -> Any:
    if name in _WHOLE and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (name in _STRUCTURED or (name == "stop" and value.startswith("["))):
        try:
            read = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            read = None
        if name == "stop":
            return read if isinstance(read, list) and all(isinstance(one, str) for one in read) else value
        if read is None:
            raise InvalidInput(f"{name} as a text must be JSON", param=name)
        return read
    return value


def text_input(rows: Any) -> list[Tensor]:
    """Of one row that has `messages` (a list, or its JSON), `prompt` (a text) or `tokens` (ids) the input of a call."""
    if not isinstance(rows, list) or len(rows) != 1:
        raise InvalidInput("a language model takes one row a request; send one request for each", param="inputs")
    (row,) = rows
    if not isinstance(row, dict) or len(row) != 1 or not row.keys() <= {*_PROMPTS}:
        raise InvalidInput(f"a row has exactly one of {', '.join(_PROMPTS)}", code="bad_inputs", param="inputs")
    ((name, value),) = row.items()
    if name == "tokens" and isinstance(value, list):
        ids = check_tokens([int(one) if isinstance(one, float) and one.is_integer() else one for one in value])
        return [Tensor("tokens", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids))]
    if name == "messages" and isinstance(value, list):
        return [Tensor(name, "BYTES", [1], pack_bytes([msgspec.json.encode(check_messages(value))]))]
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a {'text' if name == 'prompt' else 'list'}", code="bad_inputs", param=name)
    return [Tensor(name, "BYTES", [1], pack_bytes([check_prompt(value)]))]


# what a call over the Open Inference Protocol may give, one of them
TEXT_INPUTS = Signature(
    inputs=[
        TensorSpec(name="messages", datatype="BYTES", shape=[1], optional=True),
        TensorSpec(name="prompt", datatype="BYTES", shape=[1], optional=True),
        TensorSpec(name="tokens", datatype="INT32", shape=[-1], optional=True),
    ],
    outputs=TEXT_GENERATION.outputs,
)
_TRITON = "text_input"  # the name of a prompt in Triton's backends for language models
TEXT_SPECS = {spec.name: spec for spec in TEXT_INPUTS.inputs} | {_TRITON: TEXT_INPUTS.inputs[1]}


def settle_text(tensors: Sequence[Tensor]) -> None:
    """Name and shape the one tensor of a request as TEXT_INPUTS does, in place.

    `text_input` is a prompt, and a batch of one text is that text. InvalidInput where there is not exactly one tensor.
    """
    if len(tensors) != 1:
        raise InvalidInput(
            f"a language model takes one input, not {len(tensors)}: messages, prompt (or {_TRITON}) or tokens; what steers the "
            "generation goes into the request's `parameters`",
            code="bad_inputs",
            param="inputs",
        )
    (one,) = tensors
    if one.name == _TRITON:
        one.name = "prompt"
    if one.datatype == "BYTES" and one.shape == [1, 1]:
        one.shape = [1]


def text_output(answer: Answer) -> list[dict[str, Any]]:
    """The one row of an answer: text, finish_reason, usage, and logprobs where they were asked for."""
    found = {tensor.name: tensor for tensor in answer.outputs}
    prompt, made, cached = struct.unpack("<3i", found["usage"].data)
    row: dict[str, Any] = {
        "text": unpack_bytes(found["text"].data)[0].decode("utf-8", "replace"),
        "finish_reason": unpack_bytes(found["finish_reason"].data)[0].decode(),
        "usage": {"prompt_tokens": prompt, "completion_tokens": made, "cached_tokens": cached},
    }
    if "logprobs" in found:
        row["logprobs"] = msgspec.json.decode(unpack_bytes(found["logprobs"].data)[0])
    return [row]
