"""What a text generation is asked for: messages and how to sample. One definition for the edges and the engines."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Signature, TensorSpec

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 2048
MAX_CONTENT = 4 * 1024 * 1024  # characters of all messages
MAX_STOPS = 4

# A stream's parts each hold the text since the part before; the last has the reason why it ended ("stop", "length").
# `usage` counts tokens: those of the prompt, those generated so far, and those of the prompt that were in the cache.
TEXT_GENERATION = Signature(
    inputs=[TensorSpec(name="messages", datatype="BYTES", shape=[1])],  # a JSON list of {"role", "content"}
    outputs=[
        TensorSpec(name="text", datatype="BYTES", shape=[1]),
        TensorSpec(name="finish_reason", datatype="BYTES", shape=[1]),
        TensorSpec(name="usage", datatype="INT32", shape=[3]),
    ],
)


class Sampling(msgspec.Struct, forbid_unknown_fields=False):
    """A call's parameters. The names, ranges and defaults are OpenAI's; temperature 0 is greedy."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: list[str] = []


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
        name = where.rstrip("`").split("[")[0] or None
        raise InvalidInput(f"{name or 'a parameter'}: {text[:1].lower()}{text[1:]}", param=name) from None
    if len(found.stop) > MAX_STOPS or not all(0 < len(one) <= 1000 for one in found.stop):
        raise InvalidInput(f"stop takes at most {MAX_STOPS} texts of 1 to 1000 characters", param="stop")
    return found


def check_messages(value: Any) -> list[dict[str, str]]:
    """Messages with a known role and text as content (a text, or parts of type text); InvalidInput names the place."""
    if not isinstance(value, list) or not value:
        raise InvalidInput("messages must be a list of at least one message", param="messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidInput(f"{len(value)} messages; at most {MAX_MESSAGES} are taken", param="messages")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(value)]
    size = sum(len(message["content"]) for message in messages)
    if size > MAX_CONTENT:
        raise InvalidInput(f"the messages have {size} characters; at most {MAX_CONTENT} are taken", param="messages")
    return messages


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise InvalidInput(f"{where} must be an object with role and content", param=where)
    role = item.get("role")
    if role not in ROLES:
        raise InvalidInput(f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    # the newer name of the system's role, which templates do not know
    return {"role": "system" if role == "developer" else role, "content": _content(item.get("content"), where, role)}


def _content(content: Any, where: str, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list) or not content:
        raise InvalidInput(f"{where}.content must be a text or a list of text parts", param=f"{where}.content")
    texts = []
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "file"):
            raise InvalidInput(f"this model takes text only; leave out the part of type {kind}", param=place)
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise InvalidInput(f'{place} must be {{"type": "text", "text": ...}}', param=place)
        texts.append(part[kind])
    return "".join(texts)
