"""What openai-python does with the server: all that it has a method for. `strict`: it checks each answer's types."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import openai
from pydantic import BaseModel

CHAT, EMBED = os.environ["CHAT"], os.environ["EMBED"]
PLACE = {"base_url": os.environ["URL"], "max_retries": 0, "timeout": 120.0}
STRICT = {"_strict_response_validation": True} if "strict" in sys.argv else {}
client = openai.OpenAI(api_key=os.environ["KEY"], **PLACE, **STRICT)
plain = openai.OpenAI(api_key=os.environ["KEY"], **PLACE)  # where the strict client has quirks of its own
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip


class City(BaseModel):
    name: str
    population: int


def chat(messages: Any = PARIS, **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": CHAT, "messages": messages, "temperature": 0, "max_tokens": 16, **more}
    )


def fails(kind: type[Exception], call: Any, **expected: Any) -> Any:
    found: Any = None
    try:
        call()
    except kind as error:
        found = error
    assert found is not None, f"no {kind.__name__}"
    for name, value in expected.items():
        assert getattr(found, name) == value, (name, getattr(found, name), found)
    return found


def models() -> None:
    names = [model.id for model in client.models.list()]
    assert {CHAT, EMBED} <= set(names)
    assert client.models.retrieve(CHAT).object == "model"


def completions_of_chats() -> None:
    whole = chat()
    assert "Paris" in whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    with chat(stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(model=CHAT, messages=PARIS, max_completion_tokens=8, temperature=0) as events:
        kinds = {event.type for event in events}
        assert "content.delta" in kinds
        assert events.get_final_completion().choices[0].finish_reason in ("stop", "length")
    several = chat(n=2, logprobs=True, stop=["."], temperature=0, user="u", metadata={"a": "b"}, seed=1)
    assert len(several.choices) == 2
    assert several.choices[0].logprobs.content[0].logprob <= 0
    parts = [{"role": "developer", "content": "Be brief."},
             {"role": "user", "content": [{"type": "text", "text": "The capital of France?"}]}]  # fmt: skip
    assert chat(parts, max_tokens=4).usage.completion_tokens <= 4
    stream = chat([{"role": "user", "content": "Tell me a long story."}], max_tokens=500, stream=True)
    next(iter(stream))
    stream.close()


def schemas() -> None:
    parsed = client.chat.completions.parse(
        model=CHAT, messages=[{"role": "user", "content": "Paris has 2 million people. Give it as JSON."}],
        response_format=City, temperature=0, max_tokens=120,
    )  # fmt: skip
    assert isinstance(parsed.choices[0].message.parsed, City)
    asked = [{"role": "user", "content": "Answer in JSON: the capital of France."}]
    given = chat(asked, response_format={"type": "json_object"}, max_tokens=200)
    if given.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(given.choices[0].message.content), dict)


def tools() -> None:
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        found = chat(asked, tools=[WEATHER], tool_choice=choice, max_tokens=60).choices[0]
        assert found.finish_reason == "tool_calls"
        (call, *_) = found.message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(
        model=CHAT, messages=asked, tools=[WEATHER], tool_choice=named, temperature=0, max_tokens=60
    ) as events:
        message = events.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.name == "weather"
    call = message.tool_calls[0]
    answered = [*asked, {"role": "assistant", "content": None, "tool_calls": [
        {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}]},
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 20 degrees."}]  # fmt: skip
    assert chat(answered, tools=[WEATHER], max_tokens=24).choices[0].message.content
    assert chat(asked, tools=[WEATHER], tool_choice="none", max_tokens=4).choices[0].message.tool_calls is None
    chat(asked, tools=[WEATHER], tool_choice="auto", parallel_tool_calls=False, max_tokens=8)


def responses() -> None:
    first = client.responses.create(
        model=CHAT, input="What is the capital of France?", temperature=0, max_output_tokens=16, metadata={"a": "b"}
    )
    assert "Paris" in first.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    items = client.responses.input_items.list(first.id)
    assert [item.role for item in items] == ["user"]
    with client.responses.stream(
        model=CHAT, input="And of Italy?", previous_response_id=first.id, temperature=0, max_output_tokens=16
    ) as events:
        kinds = [event.type for event in events]
        second = events.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert second.usage.input_tokens > first.usage.input_tokens
    parsed = client.responses.parse(
        model=CHAT, input="Paris has 2 million people. Give it as JSON.", text_format=City, temperature=0,
        max_output_tokens=120,
    )  # fmt: skip
    assert isinstance(parsed.output_parsed, City)
    function = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    called = client.responses.create(
        model=CHAT, input="The weather in Rome?", tools=[function], tool_choice="required", temperature=0,
        max_output_tokens=60,
    )  # fmt: skip
    (call, *_) = [item for item in called.output if item.type == "function_call"]
    given = [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}]
    after = client.responses.create(
        model=CHAT, input=given, previous_response_id=called.id, temperature=0, max_output_tokens=16, store=False
    )
    assert after.output_text
    client.responses.delete(first.id)
    fails(openai.NotFoundError, lambda: client.responses.retrieve(first.id))


def texts() -> None:
    found = client.completions.create(model=CHAT, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in found.choices[0].text
    for prompt in (["One", "Two"], [504, 3575, 282], [[504, 3575], [282]]):
        many = client.completions.create(model=CHAT, prompt=prompt, max_tokens=2, temperature=0)
        assert len(many.choices) == (1 if isinstance(prompt[0], int) else 2)
    # strict, the client refuses a finish_reason of null, which OpenAI too writes in all events but the last
    chunks = list(plain.completions.create(model=CHAT, prompt="Once", max_tokens=4, stream=True, temperature=0))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    scored = client.completions.create(model=CHAT, prompt="Once upon", max_tokens=3, logprobs=1, temperature=0)
    assert len(scored.choices[0].logprobs.token_logprobs) == 3


def embeddings() -> None:
    one = plain.embeddings.create(model=EMBED, input="A cat sits on the mat.")  # the client asks for base64
    given = client.embeddings.create(
        model=EMBED, input=["A cat sits on the mat.", "Stocks fell."], encoding_format="float"
    )
    assert max(abs(a - b) for a, b in zip(one.data[0].embedding, given.data[0].embedding, strict=True)) < 1e-5
    assert len(given.data[0].embedding) == 384
    small = (
        client.embeddings.create(model=EMBED, input="A cat", dimensions=64, encoding_format="float").data[0].embedding
    )
    assert abs(sum(value * value for value in small) - 1) < 1e-4
    assert len(small) == 64
    ids = client.embeddings.create(model=EMBED, input=[[101, 1037, 4937, 102]], encoding_format="float")
    assert ids.usage.prompt_tokens == 4
    assert len(client.moderations.create(model=EMBED, input="I will kill you.").results) == 1


def errors() -> None:
    fails(openai.NotFoundError, lambda: chat(model="nothing"), code="model_not_found", param="model")
    fails(openai.BadRequestError, lambda: chat(temperature=9), param="temperature", type="invalid_request_error")
    fails(openai.BadRequestError, lambda: chat([]), param="messages")
    fails(openai.BadRequestError, lambda: chat(model=EMBED), param="model")
    long = fails(openai.BadRequestError, lambda: chat([{"role": "user", "content": "word " * 9000}]),
                 code="context_length_exceeded")  # fmt: skip
    assert "tokens" in long.message
    fails(openai.AuthenticationError, lambda: openai.OpenAI(api_key="mw_no", **PLACE).models.list())
    slow = openai.OpenAI(api_key=os.environ["SLOW_KEY"], **PLACE)
    assert slow.models.with_raw_response.list().headers["x-ratelimit-remaining-requests"] == "0"
    refused = fails(openai.RateLimitError, slow.models.list, type="requests")
    assert int(refused.response.headers["retry-after"]) > 0
    assert refused.response.headers["x-request-id"]


async def together() -> None:
    async with openai.AsyncOpenAI(api_key=os.environ["KEY"], **PLACE, **STRICT) as client:
        calls = [
            client.chat.completions.create(
                model=CHAT, messages=[{"role": "user", "content": f"Count from {at}."}], max_tokens=8
            )
            for at in range(12)
        ]
        assert all(one.usage.completion_tokens <= 8 for one in await asyncio.gather(*calls))


if __name__ == "__main__":
    for part in (models, completions_of_chats, schemas, tools, responses, texts, embeddings, errors):
        part()
    asyncio.run(together())
    print(f"openai-python {openai.__version__}{', strict' if STRICT else ''}")
