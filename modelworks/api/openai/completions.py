"""POST /v1/completions: texts or token ids as they are, no template; what evaluation harnesses send."""

from __future__ import annotations

import os
import struct
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from modelworks.api.body import decode_json
from modelworks.api.openai import schemas
from modelworks.api.openai.chat import SAMPLING
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
from modelworks.api.openai.stream import Generated, usage
from modelworks.api.routes import Routes, Use, Who
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput
from modelworks.core.generation import MAX_LOGPROBS, Logprob, check_prompt, check_schema, check_tokens, read_sampling
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.core.types import Caller

routes = Routes("OpenAI", "openai")
_LENGTH = 16  # max_tokens where none is given, as OpenAI has it


@routes.post(
    "/v1/completions",
    "openai.completions",
    "Create a completion",
    answer=schemas.TEXT_COMPLETION,
    errors=(404, 504),
    body="infer",
    request_body=schemas.TEXT_REQUEST,
    stream=True,
)
async def create_completion(request: Request, services: Use, caller: Who) -> Response:
    """Go on with a text or with token ids, each of a list by itself; with `echo` and `logprobs` it is also measured."""
    return await Completion(request, services, caller, read_completion(await request.body())).answer()


def read_completion(data: bytes) -> Asked:
    """InvalidInput names the parameter that is wrong, or that this server does not offer."""
    body, model = read_body(data, decode_json)
    if body.get("suffix"):
        raise InvalidInput("suffix is not offered: models here only go on from a prompt; leave it out", param="suffix")
    n = read_number(body, "n", 1, MAX_CHOICES, 1)
    if read_number(body, "best_of", 1, MAX_CHOICES, n) != n:
        raise InvalidInput("best_of must equal n; ask for n choices and choose by their logprobs", param="best_of")
    params = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    params["echo"] = read_flag(body, "echo")
    params["max_tokens"] = read_number(body, "max_tokens", 0 if params["echo"] else 1, 2**31 - 1, _LENGTH)
    if body.get("logprobs") is not None:
        params["logprobs"] = read_number(body, "logprobs", 0, MAX_LOGPROBS, 0)
    format = read_format(body.get("response_format"))
    if format is not None:
        check_schema(format)
        params["schema"] = format
    read_sampling(params)
    prompts = read_prompts(body.get("prompt"))
    if len(prompts) * n > MAX_CHOICES:
        raise InvalidInput(
            f"{len(prompts)} prompts of {n} choices; at most {MAX_CHOICES} choices a request are made", param="prompt"
        )
    return Asked(model, prompts, params, n, *read_stream(body))


def read_prompts(prompt: Any) -> list[Tensor]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(prompt, str):
        return [_text(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return [_text(one) for one in prompt]
        if all(isinstance(one, list) for one in prompt):
            return [_ids(one) for one in prompt]
        if all(isinstance(one, int) for one in prompt):
            return [_ids(prompt)]
    raise InvalidInput("prompt must be a text, a list of texts, a list of token ids, or a list of such", param="prompt")


def _text(text: str) -> Tensor:
    return Tensor("prompt", "BYTES", [1], pack_bytes([check_prompt(text)]))


def _ids(ids: list[Any]) -> Tensor:
    return Tensor("tokens", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *check_tokens(ids)))


class Completion(Exchange):
    def __init__(self, request: Request, services: Services, caller: Caller, asked: Asked) -> None:
        super().__init__(request, services, caller, asked)
        self.offsets = [0] * len(self.choices)
        self.id = f"cmpl-{os.urandom(12).hex()}"

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": self.version,
        }

    async def whole(self) -> dict[str, Any]:
        choices = [self._choice(made, made.take(), made.reason) for made in self.choices]
        return {**self.head(), "choices": choices, "usage": self._usage()}

    def news_of(self, made: Generated) -> bytes:
        text = made.take()
        ended = made.done and not made.pending
        if not text and not ended and not made.logprobs:
            return b""
        if self.plain and not ended:
            return self.filled(made, text, lambda text: self._event(made, text))
        return self._event(made, text, made.reason if ended else None)

    def _event(self, made: Generated, text: str, reason: str | None = None) -> bytes:
        body: dict[str, Any] = {**self.head(), "choices": [self._choice(made, text, reason)]}
        if self.asked.usage:
            body["usage"] = self._usage() if self.asked.running else None
        return b"data: " + encode(body) + b"\n\n"

    async def closing(self) -> bytes:
        event = b""
        if self.asked.usage:
            event = b"data: " + encode({**self.head(), "choices": [], "usage": self._usage()}) + b"\n\n"
        return event + b"data: [DONE]\n\n"

    def _usage(self) -> dict[str, Any]:
        return usage(self.choices, len(self.asked.prompts))

    def _choice(self, made: Generated, text: str, reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(made) if "logprobs" in self.asked.params else None
        return {"index": made.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, made: Generated) -> dict[str, Any]:
        """The old form: four lists, of which the alternatives have the token itself among them."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in made.take_logprobs():
            found["tokens"].append(one.token)
            found["token_logprobs"].append(one.logprob)
            found["top_logprobs"].append(_alternatives(one))
            found["text_offset"].append(self.offsets[made.index])
            self.offsets[made.index] += len(one.token)
        return found


def _alternatives(one: Logprob) -> dict[str, float] | None:
    if one.logprob is None:
        return None
    found = {it.token: it.logprob for it in one.top_logprobs if it.logprob is not None}
    return {**found, one.token: one.logprob}
