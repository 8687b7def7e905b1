"""What a text generation is asked for and what it answers: one definition for the edges and the engines.

An edge sends a call with one input - `messages` (a JSON list), `prompt` (a text, used as it is) or `tokens` (ids) - and
the parameters of `Sampling`. An engine reads both by `read_ask`, naming in `lacks` what it cannot do, and answers parts
made by `part`. Several choices (n) are several calls; tool calls and reasoning are read out of the text by the edge.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.core.types import Signature, TensorSpec

SECONDS = 600.0  # deadline of a generation whose client names none
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 2048
MAX_CONTENT = 4 * 1024 * 1024  # characters of all messages, or of a prompt; images have MAX_IMAGES of their own
MAX_IMAGES = 32 * 1024 * 1024  # characters of all images in base64
MAX_PICTURES = 32  # images of a call
MAX_TOKENS = 1024 * 1024  # ids of a prompt
MAX_STOPS = 4
MAX_LOGPROBS = 20
MAX_BIAS = 1024
MAX_TOOLS = 128
MAX_SCHEMA = 256 * 1024  # characters of a JSON schema, and of all tools
MAX_DEPTH = 32  # of a JSON schema
COLDEST = 1e-5  # a temperature below is greedy: logits divided by it would leave the range of float32

# What an engine may lack; the value says it in the refusal. `images` are parts of messages, the others parameters.
FEATURES = {
    "images": "this model has no eyes: it takes messages of text only",
    "tokens": "the engine of this model takes texts, not token ids",
    "schema": "the engine of this model cannot hold its answer to a JSON schema",
    "logit_bias": "the engine of this model has no logit_bias",
    "logprobs": "the engine of this model gives no log probabilities",
    "top_logprobs": "the engine of this model gives the log probability of one token a place only",
    "sampled_alternatives": "the engine of this model tells alternatives (top_logprobs) at temperature 0 only",
    "echo": "the engine of this model cannot echo the prompt",
    "penalties": "the engine of this model has no presence, frequency and repetition penalties",
    "seed": "the engine of this model has no seed",
    "min_p": "the engine of this model has no min_p",
    "adapter": "the engine of this model has no LoRA adapters",
}

# Parts each hold the text since the part before; the last has the reason why it ended ("stop", "length"). `usage` counts
# tokens so far: of the prompt, generated (also those whose text is still held back), and of the prompt found in a cache.
# When logprobs are asked for, parts have one more output, `logprobs` BYTES [1]: a JSON list, see `Logprob`.
TEXT_GENERATION = Signature(
    inputs=[TensorSpec(name="messages", datatype="BYTES", shape=[1])],  # or prompt BYTES [1], or tokens INT32 [n]
    outputs=[
        TensorSpec(name="text", datatype="BYTES", shape=[1]),
        TensorSpec(name="finish_reason", datatype="BYTES", shape=[1]),
        TensorSpec(name="usage", datatype="INT32", shape=[3]),
    ],
)


class Sampling(msgspec.Struct, forbid_unknown_fields=False):
    """A call's parameters. Names, ranges and defaults are OpenAI's as far as it has them; temperature 0 is greedy."""

    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None  # 0 with echo only
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0  # 0: all
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: list[str] = []
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}  # token id in decimal -> added to its logit
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None  # alternatives a token; 0: the token alone
    echo: bool = False  # the first part's text is the prompt, with logprobs those of its tokens
    ignore_eos: bool = False  # generate until max_tokens
    schema: dict[str, Any] | None = None  # the JSON schema that the text must satisfy, enforced while sampling
    tools: list[dict[str, Any]] = []  # as OpenAI has them, for the chat template
    adapter: Annotated[str, Meta(max_length=100)] = ""  # of those that the deployment carries; "": the model itself


class Logprob(msgspec.Struct):
    """One token of `logprobs`, or one of its alternatives (which have none themselves), most likely first.

    `token`: its text, with U+FFFD where its bytes are no whole characters; `logprob`: null for a prompt's first token.
    """

    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[Logprob] = []
    id: int | None = None


class Ask(msgspec.Struct):
    """A checked call: exactly one of `messages`, `prompt` and `tokens`."""

    sampling: Sampling
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    tokens: list[int] | None = None


def read_ask(inputs: list[Tensor], params: dict[str, Any], lacks: Collection[str] = ()) -> Ask:
    """A call as an engine gets it. InvalidInput when it is not sound, or asks for one of FEATURES that `lacks` names.

    The code is then "unsupported_parameter": another engine of the deployment may have it.
    """
    ask = Ask(read_sampling(params))
    tensor = inputs[0] if len(inputs) == 1 else None
    if tensor is not None and tensor.name == "tokens" and tensor.datatype in ("INT32", "INT64"):
        size = 4 if tensor.datatype == "INT32" else 8
        ask.tokens = check_tokens(list(struct.unpack(f"<{len(tensor.data) // size}{'iq'[size == 8]}", tensor.data)))
    elif tensor is not None and tensor.name in ("messages", "prompt") and tensor.datatype == "BYTES":
        values = unpack_bytes(tensor.data, tensor.name)
        if len(values) != 1:
            raise InvalidInput(f"{tensor.name} has {len(values)} elements; one a call", param=tensor.name)
        if tensor.name == "prompt":
            ask.prompt = check_prompt(values[0].decode("utf-8", "replace"))
        else:
            ask.messages = check_messages(_json(values[0]))
    else:
        raise InvalidInput(
            "give one input: messages (BYTES [1], a JSON list of messages), prompt (BYTES [1]) or tokens (INT32 [n])",
            param="messages",
        )
    if refusal := lacking(ask, lacks):
        raise refusal
    return ask


def lacking(ask: Ask, lacks: Collection[str]) -> InvalidInput | None:
    """The refusal by an engine without the FEATURES `lacks`, or None where the call asks for none of them."""
    return next((unsupported(feature, param) for feature, param in _asked(ask) if feature in lacks), None)


def unsupported(feature: str, param: str) -> InvalidInput:
    """The refusal of one of FEATURES, which `param` asks for."""
    what = "the images" if feature == "images" else param
    said = f"{FEATURES[feature]}; leave out {what}, or ask another deployment"
    return InvalidInput(said, code="unsupported_parameter", param=param)


def check_adapter(ask: Ask, known: Collection[str]) -> None:
    """NotFound unless the call asks for one of the `known` adapters, or for none."""
    name = ask.sampling.adapter
    if name and name not in known:
        there = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise NotFound(
            f"there is no adapter {name!r} in this deployment; {there}", code="adapter_not_found", param="adapter"
        )


def read_sampling(params: dict[str, Any]) -> Sampling:
    """InvalidInput names the parameter. A `stop` of one text is a list of one."""
    given = {name: value for name, value in params.items() if value is not None}
    stop = given.get("stop")
    if isinstance(stop, str):
        given["stop"] = stop = [stop]
    try:
        found = msgspec.convert(given, Sampling)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        name = where.rstrip("`").split("[")[0].split(".")[0] or None
        raise InvalidInput(f"{name or 'a parameter'}: {text[:1].lower()}{text[1:]}", param=name) from None
    if found.temperature < COLDEST:
        found.temperature = 0.0
    if len(found.stop) > MAX_STOPS or not all(0 < len(one) <= 1000 for one in found.stop):
        raise InvalidInput(f"stop takes at most {MAX_STOPS} texts of 1 to 1000 characters", param="stop")
    if found.max_tokens == 0 and not found.echo:
        raise InvalidInput("max_tokens must be at least 1", param="max_tokens")
    bias = found.logit_bias
    if len(bias) > MAX_BIAS or not all(key.isascii() and key.isdigit() and len(key) < 10 for key in bias):
        raise InvalidInput(
            f"logit_bias takes at most {MAX_BIAS} token ids (in decimal), each with -100 to 100", param="logit_bias"
        )
    if found.schema is not None:
        check_schema(found.schema)
    return found


def check_prompt(text: str) -> str:
    if not text:
        raise InvalidInput("prompt must not be empty", param="prompt")
    if len(text) > MAX_CONTENT:
        raise InvalidInput(f"the prompt has {len(text)} characters; at most {MAX_CONTENT} are taken", param="prompt")
    return text


def check_tokens(ids: list[int]) -> list[int]:
    """Sound as far as can be told without the vocabulary: the engine refuses an id that is beyond it."""
    if not ids:
        raise InvalidInput("a prompt of token ids must not be empty", param="prompt")
    if len(ids) > MAX_TOKENS:
        raise InvalidInput(f"the prompt has {len(ids)} token ids; at most {MAX_TOKENS} are taken", param="prompt")
    for index, id in enumerate(ids):
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < 2**31:
            raise InvalidInput(f"prompt[{index}] is no token id: {str(id)[:40]}", param=f"prompt[{index}]")
    return ids


def check_schema(schema: Any, param: str = "response_format") -> None:
    """InvalidInput for a JSON schema that is too large or too deep, or that refers to something outside of itself."""
    if not isinstance(schema, dict):
        raise InvalidInput("a JSON schema is an object", code="invalid_schema", param=param)
    if len(msgspec.json.encode(schema)) > MAX_SCHEMA:
        raise InvalidInput(f"a JSON schema may have {MAX_SCHEMA} characters", code="invalid_schema", param=param)
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise InvalidInput(f"the JSON schema is deeper than {MAX_DEPTH}", code="invalid_schema", param=param)
        if isinstance(value, dict):
            ref = value.get("$ref")
            if isinstance(ref, str) and (why := _lost(schema, ref)):
                raise InvalidInput(f"the JSON schema refers to {ref[:100]!r}, {why}", code="invalid_schema", param=param)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting.extend((one, depth + 1) for one in inner)


def _lost(schema: dict[str, Any], ref: str) -> str:
    """Why a reference says nothing, or "": it must lead to something else than another way back to itself."""
    passed: set[str] = set()
    while True:
        value = _target(schema, ref)
        if not isinstance(value, dict | bool):
            return "which is not in it; use #/$defs/NAME"
        passed.add(ref)
        further = value.get("$ref") if isinstance(value, dict) else None
        if not isinstance(further, str):
            return ""
        ref = further
        if ref in passed:
            return "which leads back to itself; let it name a type"


def _target(schema: dict[str, Any], ref: str) -> Any:
    if ref != "#" and not ref.startswith("#/"):
        return None
    value: Any = schema
    for key in ref.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return None
    return value


# messages


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with a known role; InvalidInput names the place.

    Content comes back as one text, or as parts (text and image_url) where there is an image. An assistant's `tool_calls`
    and a tool's `tool_call_id` and `name` are kept.
    """
    if not isinstance(value, list) or not value:
        raise InvalidInput("messages must be a list of at least one message", param="messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidInput(f"{len(value)} messages; at most {MAX_MESSAGES} are taken", param="messages")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(value)]
    texts, images, count = 0, 0, 0
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else [message["content"]]:
            if isinstance(part, dict) and part["type"] == "image_url":
                images += len(part["image_url"]["url"])
                count += 1
            else:
                texts += len(part if isinstance(part, str) else part["text"])
        texts += sum(len(call["function"]["arguments"]) for call in message.get("tool_calls", ()))
    if texts > MAX_CONTENT:
        raise InvalidInput(f"the messages have {texts} characters; at most {MAX_CONTENT} are taken", param="messages")
    if images > MAX_IMAGES:
        raise InvalidInput(f"the images have {images} characters; at most {MAX_IMAGES} are taken", param="messages")
    if count > MAX_PICTURES:
        raise InvalidInput(f"the messages have {count} images; at most {MAX_PICTURES} are taken", param="messages")
    return messages


def has_images(messages: list[dict[str, Any]]) -> bool:
    return any(isinstance(message["content"], list) for message in messages)


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InvalidInput(f"{where} must be an object with role and content", param=where)
    role = item.get("role")
    if role not in ROLES:
        raise InvalidInput(f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    # the newer name of the system's role, which templates do not know
    message = {"role": "system" if role == "developer" else role, "content": _content(item.get("content"), where, role)}
    if role == "assistant":
        if item.get("tool_calls"):
            message["tool_calls"] = _tool_calls(item["tool_calls"], f"{where}.tool_calls")
        elif item.get("content") is None:
            raise InvalidInput(
                f"{where}.content must be a text, unless the assistant called tools", param=f"{where}.content"
            )
        if isinstance(item.get("reasoning_content"), str):
            message["reasoning_content"] = item["reasoning_content"]
    for name in ("tool_call_id", "name"):
        given = item.get(name)
        if given is not None and not isinstance(given, str):
            raise InvalidInput(f"{where}.{name} must be a text", param=f"{where}.{name}")
        if given is not None:
            message[name] = given
    if role == "tool" and "tool_call_id" not in message:
        raise InvalidInput(f"{where}.tool_call_id must name the call that this answers", param=f"{where}.tool_call_id")
    return message


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = []
    for index, item in enumerate(value if isinstance(value, list) else [None]):
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict) or not all(isinstance(function.get(k), str) for k in ("name", "arguments")):
            raise InvalidInput(
                f'{where}[{index}] must be {{"id", "type": "function", "function": {{"name", "arguments": a JSON text}}}}',
                param=f"{where}[{index}]",
            )
        function = {"name": function["name"], "arguments": function["arguments"]}
        calls.append({"id": str(item.get("id") or ""), "type": "function", "function": function})
    return calls


def _content(content: Any, where: str, role: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list) or not content:
        raise InvalidInput(f"{where}.content must be a text or a list of text parts", param=f"{where}.content")
    parts = [_content_part(part, f"{where}.content[{index}]", role) for index, part in enumerate(content)]
    if any(part["type"] == "image_url" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _content_part(part: Any, place: str, role: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image_url" and role == "user":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url[:100]:
            raise InvalidInput(
                f"{place} must hold the image itself, as a URL of the form data:image/png;base64,...; nothing is fetched",
                param=place,
            )
        return {"type": "image_url", "image_url": {"url": url}}
    if kind in ("image_url", "input_audio", "file"):
        raise InvalidInput(f"this model takes no part of type {kind} from {role}; leave it out", param=place)
    if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
        raise InvalidInput(f'{place} must be {{"type": "text", "text": ...}}', param=place)
    return {"type": "text", "text": part[kind]}


def _asked(ask: Ask) -> list[tuple[str, str]]:
    """The FEATURES that a call needs, each with the parameter that asks for it."""
    given, usual = ask.sampling, Sampling()
    asked = [
        (ask.messages is not None and has_images(ask.messages), "images", "messages"),
        (ask.tokens is not None, "tokens", "prompt"),
        (given.schema is not None, "schema", "response_format"),
        (bool(given.logit_bias), "logit_bias", "logit_bias"),
        (given.logprobs is not None, "logprobs", "logprobs"),
        ((given.logprobs or 0) > 1, "top_logprobs", "top_logprobs"),
        (bool(given.logprobs) and given.temperature > 0, "sampled_alternatives", "top_logprobs"),
        (given.echo, "echo", "echo"),
        (given.presence_penalty != usual.presence_penalty, "penalties", "presence_penalty"),
        (given.frequency_penalty != usual.frequency_penalty, "penalties", "frequency_penalty"),
        (given.repetition_penalty != usual.repetition_penalty, "penalties", "repetition_penalty"),
        (given.seed is not None, "seed", "seed"),
        (given.min_p != usual.min_p, "min_p", "min_p"),
        (bool(given.adapter), "adapter", "adapter"),
    ]
    return [(feature, param) for needed, feature, param in asked if needed]


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidInput("messages must be a JSON list of messages", param="messages") from None


# answers


def part(
    text: str, reason: str, prompt: int, made: int, cached: int, logprobs: list[Logprob] | None = None
) -> list[Tensor]:
    """The outputs of one part; `reason` is "" in all but the last. `logprobs`: of the tokens since the part before."""
    outputs = [
        Tensor("text", "BYTES", [1], pack_bytes([text])),
        Tensor("finish_reason", "BYTES", [1], pack_bytes([reason])),
        Tensor("usage", "INT32", [3], struct.pack("<3i", prompt, made, cached)),
    ]
    if logprobs is not None:
        outputs.append(Tensor("logprobs", "BYTES", [1], pack_bytes([msgspec.json.encode(logprobs)])))
    return outputs


def context_exceeded(asked: int, most: int, param: str = "messages") -> InvalidInput:
    """The refusal of a prompt that does not fit the model's context, with the numbers."""
    return InvalidInput(
        f"the prompt has {asked} tokens, and the model's context here holds {most}; shorten {param}",
        code="context_length_exceeded",
        param=param,
        detail={"prompt_tokens": asked, "context": most},
    )
