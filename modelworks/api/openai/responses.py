"""POST /v1/responses and what was stored by it: answers as items, whole or as named events."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio
from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api.body import decode_json
from modelworks.api.openai import schemas
from modelworks.api.openai.generation import (
    Asked,
    Exchange,
    encode,
    read_body,
    read_flag,
    read_format,
    read_number,
    read_stream,
)
from modelworks.api.openai.items import Output, read_items, to_messages
from modelworks.api.openai.stream import Generated
from modelworks.api.openai.tools import Reader, read_tools
from modelworks.api.routes import After, IdPath, Limit, Routes, Use, Who, answer, listing
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.generation import MAX_LOGPROBS, check_messages, check_schema, has_images, read_sampling
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.core.types import Caller, StoredResponse, new_id

routes = Routes("OpenAI", "openai")

_NOT_HERE = ("background", "conversation", "prompt", "max_tool_calls")
_LOGPROBS = "message.output_text.logprobs"


@routes.post(
    "/v1/responses",
    "openai.responses",
    "Create a response",
    answer=schemas.RESPONSE_OR_EVENTS,
    errors=(404, 504),
    body="infer",
    request_body=schemas.RESPONSE_REQUEST,
    stream=True,
)
async def create_response(request: Request, services: Use, caller: Who) -> Response:
    """Answer `input`, after the conversation that `previous_response_id` names. It is kept unless `store` is false."""
    body, model = read_body(await request.body(), decode_json)
    fields = read_fields(body, model)
    earlier: list[dict[str, Any]] = []
    if fields["previous_response_id"] is not None:
        history = services.responses.history
        earlier = await anyio.to_thread.run_sync(history, caller, fields["previous_response_id"])
    items = read_items(body.get("input"))
    return await Answering(
        request, services, caller, read_asked(body, model, [*earlier, *items]), fields, items
    ).answer()


@routes.get("/v1/responses/{id}", "openai.responses", "Get a stored response", answer=schemas.RESPONSE)
async def get_response(services: Use, caller: Who, id: IdPath) -> Response:
    """A response as it was answered."""
    return answer((await anyio.to_thread.run_sync(services.responses.get, caller, id)).body)


@routes.delete("/v1/responses/{id}", "openai.responses", "Delete a stored response", answer=schemas.RESPONSE_DELETED)
async def delete_response(services: Use, caller: Who, id: IdPath) -> Response:
    """Those that went on from it cannot be gone on from any more."""
    await anyio.to_thread.run_sync(services.responses.delete, caller, id)
    return answer({"id": id, "object": "response", "deleted": True})


@routes.get(
    "/v1/responses/{id}/input_items", "openai.responses", "List what a response answers", answer=schemas.INPUT_ITEMS
)
async def list_input_items(
    services: Use,
    caller: Who,
    id: IdPath,
    limit: Limit = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="desc: the last item first")] = "desc",
    after: After = None,
) -> Response:
    """The items of its input, not those of the conversation before."""
    stored = await anyio.to_thread.run_sync(services.responses.get, caller, id)
    items = stored.input if order == "asc" else stored.input[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidInput(f"there is no item {after!r} in this response", param="after")
        items = items[places[0] + 1 :]
    return listing(items[:limit], len(items) > limit)


def read_fields(body: dict[str, Any], model: str) -> dict[str, Any]:
    """What a response repeats of its request."""
    for name in _NOT_HERE:
        if body.get(name):
            raise InvalidInput(f"{name} is not offered here; leave it out", param=name)
    for name in ("instructions", "previous_response_id"):
        if not isinstance(body.get(name), str | None):
            raise InvalidInput(f"{name} must be a text", param=name)
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict) or len(metadata) > 16 or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidInput("metadata must be an object of at most 16 texts", param="metadata")
    text = body.get("text") or {}
    format = (text.get("format") if isinstance(text, dict) else None) or {"type": "text"}
    texts = ("user", "safety_identifier", "prompt_cache_key")
    return {
        **{name: body[name] for name in texts if isinstance(body.get(name), str)},
        "background": False,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": metadata,
        "model": model,
        "parallel_tool_calls": read_flag(body, "parallel_tool_calls", True),
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "store": read_flag(body, "store", True),
        "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
        "text": {"format": format},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [_shown(tool) for tool in body.get("tools") or [] if isinstance(tool, dict)],
        "top_logprobs": body.get("top_logprobs") or 0,
        "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
        "truncation": "disabled",
    }


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": bool(tool.get("strict")),
    }


def read_asked(body: dict[str, Any], model: str, items: list[dict[str, Any]]) -> Asked:
    """InvalidInput names the parameter that is wrong, or that this server does not offer."""
    if body.get("truncation") not in (None, "disabled"):
        raise InvalidInput("truncation must be disabled: a prompt that is too long is refused", param="truncation")
    params = {name: body[name] for name in ("temperature", "top_p") if body.get(name) is not None}
    if body.get("max_output_tokens") is not None:
        params["max_tokens"] = read_number(body, "max_output_tokens", 1, 2**31 - 1, 1)
    include = body.get("include") or []
    if body.get("top_logprobs") or (isinstance(include, list) and _LOGPROBS in include):
        params["logprobs"] = read_number(body, "top_logprobs", 0, MAX_LOGPROBS, 0)
    text = body.get("text")
    if not isinstance(text, dict | None):
        raise InvalidInput("text must be an object", param="text")
    format = read_format((text or {}).get("format"), "text.format")
    if format is not None:
        check_schema(format, "text.format")
    given = body.get("tools")
    if isinstance(given, list):  # one level flatter than in chat
        for index, tool in enumerate(given):
            if not isinstance(tool, dict) or tool.get("type") != "function":
                kind = str(tool.get("type"))[:40] if isinstance(tool, dict) else "?"
                raise InvalidInput(
                    f"a tool of type {kind} is not offered here; give functions", param=f"tools[{index}]"
                )
        given = [{"type": "function", "function": tool} for tool in given]
    parallel = read_flag(body, "parallel_tool_calls", True)
    tools = read_tools(given, body.get("tool_choice"), parallel=parallel, format=format)
    if tools.schema is not None:
        params["schema"] = tools.schema
    if tools.shown:
        params["tools"] = tools.shown
    read_sampling(params)
    stream, *_ = read_stream({"stream": body.get("stream")})
    messages = to_messages(items, body.get("instructions"))
    checked = check_messages(messages)
    prompt = Tensor("messages", "BYTES", [1], pack_bytes([encode(checked)]))
    forced = bool(tools.names and tools.schema is not None)
    return Asked(model, [prompt], params, 1, stream, True, False, tools.names, forced, has_images(checked))


class Answering(Exchange):
    def __init__(
        self,
        request: Request,
        services: Services,
        caller: Caller,
        asked: Asked,
        fields: dict[str, Any],
        items: list[dict[str, Any]],
    ) -> None:
        super().__init__(request, services, caller, asked)
        self.id = new_id(StoredResponse.PREFIX)
        self.fields = fields
        self.items = items
        self.reader = Reader(asked.tools, forced=asked.forced)
        self.output = Output("logprobs" in asked.params)
        self.reasoning_tokens = 0
        self.sequence = 0

    async def whole(self) -> dict[str, Any]:
        made = self.choices[0]
        for _ in self._events(made):
            pass
        return await self._end()

    def opening(self) -> bytes:
        body = self.body("in_progress")
        return self._event("response.created", response=body) + self._event("response.in_progress", response=body)

    def news_of(self, made: Generated) -> bytes:
        return b"".join(self._event(kind, **more) for kind, more in self._events(made))

    async def closing(self) -> bytes:
        try:
            body = await self._end()
        except ModelworksError as error:  # it could not be kept
            self.outcome = error.code
            return self.failure(error)
        return self._event(f"response.{body['status']}", response=body)

    def failure(self, error: ModelworksError) -> bytes:
        body = {**self.body("failed"), "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=body)

    def _events(self, made: Generated) -> list[tuple[str, dict[str, Any]]]:
        pieces = self.reader.feed(made.take())
        ended = made.done and not made.pending
        if ended:
            pieces += self.reader.finish()
        if self.asked.stream and any(piece.kind == "reasoning" for piece in pieces):
            self.reasoning_tokens = made.completion_tokens
        events = self.output.add(pieces, made.take_logprobs())
        if ended:
            events += self.output.finish("completed" if made.reason == "stop" else "incomplete")
        return events

    async def _end(self) -> dict[str, Any]:
        """The body at the end, once it is kept."""
        made = self.choices[0]
        body = self.body("completed" if made.reason == "stop" else "incomplete")
        if made.reason != "stop":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        body["usage"] = {
            "input_tokens": made.prompt_tokens,
            "input_tokens_details": {"cached_tokens": made.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": made.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": made.prompt_tokens + made.completion_tokens,
        }
        if self.fields["store"]:
            previous = self.fields["previous_response_id"]
            stored = StoredResponse(
                id=self.id, project_id=self.caller.project_id, previous_id=previous, input=self.items, body=body
            )
            await anyio.to_thread.run_sync(self.services.responses.keep, self.caller, stored)
        return body

    def body(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": list(self.output.items),
            "usage": None,
            **self.fields,
        }

    def _event(self, kind: str, **more: Any) -> bytes:
        body = {"type": kind, "sequence_number": self.sequence, **more}
        self.sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode(body) + b"\n\n"
