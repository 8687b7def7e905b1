"""Texts by OpenAI's API: chat and embeddings, for those who have this client at hand. OpenAI's own serves as well."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from modelworks.client.modes import Mode, Resource, call, stream
from modelworks.client.transport import Request
from modelworks.core.errors import ModelworksError, from_dict

Messages = str | Sequence[Mapping[str, Any]]
_CHAT = "/v1/chat/completions"
_SECONDS = 600.0


class Texts(Resource[Mode]):
    """Mixed into both clients. `messages`: a conversation, or one text of the user."""

    @call
    async def chat(self, deployment: str, messages: Messages, **params: Any) -> dict[str, Any]:
        """One chat completion, whole, as OpenAI's API answers it; `params` are of that API (max_tokens, tools...)."""
        body = {**params, "model": deployment, "messages": _messages(messages), "stream": False}
        found: dict[str, Any] = await self._http.json(Request("POST", _CHAT, json=body, timeout=_SECONDS))
        return found

    @stream
    async def chat_stream(self, deployment: str, messages: Messages, **params: Any) -> AsyncGenerator[str, None]:
        """The text of the answer as it comes."""
        body = {**params, "model": deployment, "messages": _messages(messages), "stream": True}
        async with self._http.open(Request("POST", _CHAT, json=body, timeout=_SECONDS)) as response:
            async for sent in self._http.carrier.events(response):
                if sent.data == "[DONE]":
                    return
                event = json.loads(sent.data)
                if "error" in event:
                    raise from_dict({**event["error"], "status": 500})
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
        raise ModelworksError("the stream ended before the answer did; ask again", code="stream_cut")

    @call
    async def embeddings(
        self, deployment: str, texts: str | Sequence[str], *, dimensions: int | None = None
    ) -> list[list[float]]:
        """A vector for each text, in their order."""
        body = {
            "model": deployment,
            "input": texts if isinstance(texts, str) else list(texts),
            "dimensions": dimensions,
        }
        found = await self._http.json(Request("POST", "/v1/embeddings", json=body, timeout=_SECONDS))
        return [one["embedding"] for one in found["data"]]


def _messages(given: Messages) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [dict(one) for one in given]
