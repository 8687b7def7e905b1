"""The items of the Responses API: what they say in messages, and how an answer becomes items and their events."""

from __future__ import annotations

import os
from typing import Any

from modelworks.api.openai.tools import Piece, ToolCall
from modelworks.core.errors import InvalidInput
from modelworks.core.generation import MAX_MESSAGES, Logprob

Event = tuple[str, dict[str, Any]]


def new_item(prefix: str) -> str:
    return f"{prefix}_{os.urandom(16).hex()}"


# input


def read_items(given: Any) -> list[dict[str, Any]]:
    """The items of an input, each with an id; InvalidInput names the place."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidInput("input must be a text or a list of items", param="input")
    if len(given) > MAX_MESSAGES:
        raise InvalidInput(f"input has {len(given)} items; at most {MAX_MESSAGES} are taken", param="input")
    return [_item(item, f"input[{index}]") for index, item in enumerate(given)]


def _item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InvalidInput(f"{where} must be an object", param=where)
    kind = item.get("type") or "message"
    if kind == "message":
        return _message_item(item, where)
    if kind == "function_call":
        _texts(item, ("call_id", "name", "arguments"), where)
        kept = {name: item[name] for name in ("call_id", "name", "arguments")}
        return {"id": new_item("fc"), "type": kind, **kept, "status": "completed"}
    if kind == "function_call_output":
        _texts(item, ("call_id",), where)
        output = item.get("output")
        if isinstance(output, list):
            output = "".join(str(part.get("text", "")) for part in output if isinstance(part, dict))
        if not isinstance(output, str):
            raise InvalidInput(f"{where}.output must be a text", param=f"{where}.output")
        return {
            "id": new_item("fco"),
            "type": kind,
            "call_id": item["call_id"],
            "output": output,
            "status": "completed",
        }
    if kind == "reasoning":
        return {"id": new_item("rs"), "type": kind, "summary": [], "content": item.get("content") or []}
    raise InvalidInput(
        f"{where} is of type {str(kind)[:40]}; here are taken: message, function_call, function_call_output, reasoning",
        param=where,
    )


def _message_item(item: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise InvalidInput(f"{where}.role must be user, assistant, system or developer", param=f"{where}.role")
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list) or not content:
        raise InvalidInput(f"{where}.content must be a text or a list of parts", param=f"{where}.content")
    parts = [_part(part, kind, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {"id": new_item("msg"), "type": "message", "role": role, "content": parts, "status": "completed"}


def _part(part: Any, kind: str, place: str) -> dict[str, Any]:
    given = part.get("type") if isinstance(part, dict) else None
    if given in ("input_text", "output_text", "text", "refusal"):
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            more: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
            return {"type": kind, "text": text, **more}
    if given == "input_image" and isinstance(part.get("image_url"), str) and kind == "input_text":
        return {"type": given, "image_url": part["image_url"], "detail": part.get("detail") or "auto"}
    raise InvalidInput(f'{place} must be {{"type": "{kind}", "text": ...}}, or an input_image of a user', param=place)


def _texts(item: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not isinstance(item.get(name), str):
            raise InvalidInput(f"{where}.{name} must be a text", param=f"{where}.{name}")


def to_messages(items: list[dict[str, Any]], instructions: str | None = None) -> list[dict[str, Any]]:
    """The conversation for a chat template. Calls that follow each other are one message of the assistant."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        kind = item["type"]
        if kind == "message":
            messages.append({"role": item["role"], "content": [_content(part) for part in item["content"]]})
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    return messages


def _content(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "input_image":
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return {"type": "text", "text": part["text"]}


# output


class Output:
    """An answer as items. `add` and `finish` tell the events, in the order in which OpenAI sends them."""

    def __init__(self, logprobs: bool = False) -> None:
        self.items: list[dict[str, Any]] = []  # those that are complete
        self._wants_logprobs = logprobs
        self._open: dict[str, Any] | None = None  # the message or reasoning that still grows
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._blank = ""  # white space, kept until it is known whether a text follows
        self._fresh: list[dict[str, Any]] = []  # logprobs that no event has told yet

    def add(self, pieces: list[Piece], logprobs: list[Logprob]) -> list[Event]:
        self._fresh += [logprob(one) for one in logprobs]
        events: list[Event] = []
        for piece in pieces:
            if piece.call is not None:
                events += [*self._close("completed"), *self._call(piece.call)]
                self._blank = ""
            elif piece.kind == "reasoning":
                events += self._grow("reasoning", piece.text)
            elif self._open is None or self._open["type"] != "message":
                self._blank += piece.text
                if self._blank.strip():
                    text, self._blank = self._blank, ""
                    events += self._grow("message", text)
            else:
                events += self._grow("message", piece.text)
        return events

    def finish(self, status: str) -> list[Event]:
        """At least one item is there at the end."""
        events: list[Event] = []
        if self._open is None and not any(item["type"] != "reasoning" for item in self.items):
            events += self._grow("message", self._blank)
        return [*events, *self._close(status)]

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.items), "content_index": 0}

    def _grow(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events += [*self._close("completed"), *self._begin(kind)]
        self._text += text
        if kind == "reasoning":
            events.append(("response.reasoning_text.delta", {**self._place, "delta": text}))
        elif text:
            fresh, self._fresh = self._fresh, []
            self._logprobs += fresh
            events.append(("response.output_text.delta", {**self._place, "delta": text, "logprobs": fresh}))
        return events

    def _begin(self, kind: str) -> list[Event]:
        if kind == "reasoning":
            self._open = {"id": new_item("rs"), "type": kind, "summary": [], "status": "in_progress"}
            return [("response.output_item.added", {"output_index": len(self.items), "item": dict(self._open)})]
        self._open = {"id": new_item("msg"), "type": kind, "role": "assistant", "status": "in_progress", "content": []}
        return [
            ("response.output_item.added", {"output_index": len(self.items), "item": dict(self._open)}),
            ("response.content_part.added", {**self._place, "part": self._part("", [])}),
        ]

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        place, text = self._place, self._text
        if self._open["type"] == "reasoning":
            done = {**self._open, "status": "completed", "content": [{"type": "reasoning_text", "text": text}]}
            events: list[Event] = [("response.reasoning_text.done", {**place, "text": text})]
        else:
            part = self._part(text, [*self._logprobs, *self._fresh])
            done = {**self._open, "status": status, "content": [part]}
            events = [
                ("response.output_text.done", {**place, "text": text, "logprobs": part["logprobs"]}),
                ("response.content_part.done", {**place, "part": part}),
            ]
        events.append(("response.output_item.done", {"output_index": len(self.items), "item": done}))
        self.items.append(done)
        self._open, self._text, self._logprobs, self._fresh = None, "", [], []
        return events

    def _call(self, call: ToolCall) -> list[Event]:
        item = {
            "id": new_item("fc"),
            "type": "function_call",
            "call_id": f"call_{os.urandom(12).hex()}",
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        at = len(self.items)
        place = {"item_id": item["id"], "output_index": at}
        done = {**item, "arguments": call.arguments, "status": "completed"}
        self.items.append(done)
        name = "response.function_call_arguments"
        return [
            ("response.output_item.added", {"output_index": at, "item": item}),
            (f"{name}.delta", {**place, "delta": call.arguments}),
            (f"{name}.done", {**place, "name": call.name, "arguments": call.arguments}),
            ("response.output_item.done", {"output_index": at, "item": done}),
        ]

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": logprobs if self._wants_logprobs else [],
        }


def logprob(one: Logprob) -> dict[str, Any]:
    plain = [{"token": it.token, "bytes": it.bytes, "logprob": it.logprob} for it in (one, *one.top_logprobs)]
    return {**plain[0], "top_logprobs": plain[1:]}
