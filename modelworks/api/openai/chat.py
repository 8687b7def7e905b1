"""POST /v1/chat/completions: messages in, an answer or calls of tools out, whole or streamed."""

from __future__ import annotations

import os
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from modelworks.api.body import decode_json
from modelworks.api.openai import schemas
from modelworks.api.openai.generation import (
    MAX_CHOICES,
    Asked,
    Exchange,
    encode,
    read_body,
    read_flag,
    read_format,
    read_number,
    read_stream,
)
from modelworks.api.openai.items import logprob
from modelworks.api.openai.stream import Generated, usage
from modelworks.api.openai.tools import Reader, ToolCall, read_tools
from modelworks.api.routes import Routes, Use, Who
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput
from modelworks.core.generation import MAX_LOGPROBS, check_messages, check_schema, has_images, read_sampling
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.core.types import Caller

routes = Routes("OpenAI", "openai")

# the parameters that have the same name in a request and in Sampling; the second line is not OpenAI's, but what servers
# of open models take
SAMPLING = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias",
    "top_k", "min_p", "repetition_penalty", "ignore_eos",
)  # fmt: skip


@routes.post(
    "/v1/chat/completions",
    "openai.chat",
    "Create a chat completion",
    answer=schemas.COMPLETION,
    errors=(404, 504),
    body="infer",
    request_body=schemas.REQUEST,
    stream=True,
)
async def create_chat_completion(request: Request, services: Use, caller: Who) -> Response:
    """Answer `messages`; with `stream` as server-sent events. Parameters that are not known here are ignored."""
    return await Chat(request, services, caller, read_chat(await request.body())).answer()


def read_chat(data: bytes) -> Asked:
    """InvalidInput names the parameter that is wrong, or that this server does not offer."""
    body, model = read_body(data, decode_json)
    for name in ("functions", "function_call"):
        if body.get(name):
            raise InvalidInput(f"{name} is the old name; send tools and tool_choice", param=name)
    if body.get("audio") or "audio" in (body.get("modalities") or ()):
        raise InvalidInput("chat here answers text only; leave out audio", param="audio")
    params = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            params["max_tokens"] = read_number(body, name, 1, 2**31 - 1, 1)
    if read_flag(body, "logprobs"):
        params["logprobs"] = read_number(body, "top_logprobs", 0, MAX_LOGPROBS, 0)
    elif body.get("top_logprobs"):
        raise InvalidInput("top_logprobs goes with logprobs: true", param="top_logprobs")
    format = read_format(body.get("response_format"))
    if format is not None:
        check_schema(format)
    parallel = read_flag(body, "parallel_tool_calls", True)
    tools = read_tools(body.get("tools"), body.get("tool_choice"), parallel=parallel, format=format)
    if tools.schema is not None:
        params["schema"] = tools.schema
    if tools.shown:
        params["tools"] = tools.shown
    read_sampling(params)
    stream, with_usage, running = read_stream(body)
    checked = check_messages(body.get("messages"))
    messages = Tensor("messages", "BYTES", [1], pack_bytes([encode(checked)]))
    forced = bool(tools.names and tools.schema is not None)
    n = read_number(body, "n", 1, MAX_CHOICES, 1)
    return Asked(model, [messages], params, n, stream, with_usage, running, tools.names, forced, has_images(checked))


class Chat(Exchange):
    def __init__(self, request: Request, services: Services, caller: Caller, asked: Asked) -> None:
        super().__init__(request, services, caller, asked)
        self.readers = [Reader(asked.tools, forced=asked.forced) for _ in self.choices]
        self.called = [0] * len(self.choices)
        self.id = f"chatcmpl-{os.urandom(12).hex()}"

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": self.version,
        }

    async def whole(self) -> dict[str, Any]:
        choices = [self._choice(made) for made in self.choices]
        return {**self.head("chat.completion"), "choices": choices, "usage": usage(self.choices)}

    def _choice(self, made: Generated) -> dict[str, Any]:
        reader = self.readers[made.index]
        pieces = [*reader.feed(made.take()), *reader.finish()]
        text = "".join(piece.text for piece in pieces if piece.kind == "text")
        reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        calls = [piece.call for piece in pieces if piece.call is not None]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning.strip()
        if calls:
            message["content"] = text.strip() or None
            message["tool_calls"] = [tool_call(call) for call in calls]
        return {
            "index": made.index,
            "message": message,
            "logprobs": self._logprobs(made),
            "finish_reason": "tool_calls" if calls and made.reason == "stop" else made.reason,
        }

    def _logprobs(self, made: Generated) -> dict[str, Any] | None:
        if "logprobs" not in self.asked.params:
            return None
        return {"content": [logprob(one) for one in made.take_logprobs()], "refusal": None}

    # the stream

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(made, delta) for made in self.choices)

    def news_of(self, made: Generated) -> bytes:
        reader = self.readers[made.index]
        pieces = reader.feed(made.take())
        ended = made.done and not made.pending
        if self.plain and not ended and len(pieces) == 1 and pieces[0].kind == "text":
            return self.filled(made, pieces[0].text, lambda text: self._chunk(made, {"content": text}))
        if ended:
            pieces += reader.finish()
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.kind == "text":
                deltas.append({"content": piece.text})
            elif piece.kind == "reasoning":
                deltas.append({"reasoning_content": piece.text})
            elif piece.call is not None:
                at = self.called[made.index]
                self.called[made.index] += 1
                deltas.append({"tool_calls": [{"index": at, **tool_call(piece.call)}]})
        logprobs = self._logprobs(made)
        if logprobs is not None and not deltas and logprobs["content"]:
            deltas.append({})  # tokens without text of their own
        events = [self._chunk(made, delta, logprobs=logprobs if at == 0 else None) for at, delta in enumerate(deltas)]
        if ended:
            called = self.called[made.index] and made.reason == "stop"
            events.append(self._chunk(made, {}, "tool_calls" if called else made.reason))
        return b"".join(events)

    async def closing(self) -> bytes:
        event = b""
        if self.asked.usage:
            body = {**self.head("chat.completion.chunk"), "choices": [], "usage": usage(self.choices)}
            event = b"data: " + encode(body) + b"\n\n"
        return event + b"data: [DONE]\n\n"

    def _chunk(
        self, made: Generated, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": made.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        body: dict[str, Any] = {**self.head("chat.completion.chunk"), "choices": [choice]}
        if self.asked.usage:
            body["usage"] = usage(self.choices) if self.asked.running else None
        return b"data: " + encode(body) + b"\n\n"


def tool_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{os.urandom(12).hex()}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
