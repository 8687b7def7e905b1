"""OpenAI's API without an engine: what it writes for what a model says, read by OpenAI's own client in its strict mode."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from modelworks.api.openai.generation import Events, Patience
from modelworks.api.openai.stream import Generated
from modelworks.control.reconcile import DRAIN_SECONDS
from modelworks.core.errors import InvalidInput, RateLimited, Unavailable
from modelworks.core.generation import MAX_DEPTH, SECONDS
from modelworks.serve.router import RETIRE_SECONDS
from modelworks.serve.routes import Detour
from tests.api_house import House, house
from tests.openai_house import TextRouter, furnish

openai = pytest.importorskip("openai")
LINK = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}]}]
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"$ref": "#/$defs/name"}}, "$defs": {"name": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home")) as found:
        furnish(found)
        yield found


@pytest.fixture
def model(api: House) -> TextRouter:
    router = api.router
    assert isinstance(router, TextRouter)
    router.says, router.reason = ["Hello"], "stop"
    return router


@pytest.fixture(scope="module")
def client(api: House) -> Any:
    return openai.OpenAI(
        base_url=f"{api.url}/v1", api_key=api.keys["invoke-only"], max_retries=0, _strict_response_validation=True
    )


def chat(client: Any, messages: Any = PARIS, **more: Any) -> Any:
    return client.chat.completions.create(model="chat", messages=messages, **more)


def joined(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# chat


def test_n_choices_are_n_calls_with_seeds_of_their_own(client: Any, model: TextRouter) -> None:
    model.says = lambda call: [f"seed {call.params['seed']}"]
    whole = chat(client, n=3, seed=5)
    assert [choice.message.content for choice in whole.choices] == ["seed 5", "seed 6", "seed 7"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (10, 3)  # the prompt once
    assert whole.usage.prompt_tokens_details.cached_tokens == 4
    chunks = list(chat(client, n=2, seed=5, stream=True, stream_options={"include_usage": True}))
    for index, text in ((0, "seed 5"), (1, "seed 6")):
        mine = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert joined(mine) == text
        assert mine[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 2


def test_logprobs_are_beside_the_text_whole_and_streamed(client: Any, model: TextRouter) -> None:
    model.says = ["He", "llo"]
    whole = chat(client, logprobs=True, top_logprobs=2)
    assert [one.logprob for one in whole.choices[0].logprobs.content] == [-0.5]
    assert model.asked["logprobs"] == 2
    chunks = list(chat(client, logprobs=True, stream=True))
    told = [one.token for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert "".join(told) == joined(chunks) == "Hello"
    assert chat(client).choices[0].logprobs is None


def test_formats_become_schemas(client: Any, model: TextRouter) -> None:
    chat(client, response_format={"type": "json_object"})
    assert model.asked["schema"] == {"type": "object"}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat(
        client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    )
    assert model.asked["schema"] == schema
    chat(client, response_format={"type": "text"})
    assert "schema" not in model.asked


@pytest.mark.parametrize(
    "says",
    [
        ["Let me look.\n<tool", '_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_', "call>"],
        ['Let me look.\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}'],
        ["Let me look.\n[TOOL_CALLS][", '{"name": "weather", "arguments": {"city": "Paris"}}]'],
        ["Let me look.\n[TOOL_CALLS]weather[ARGS]", '{"city": "Paris"}'],
        ['Let me look.\n<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}'],
        ['Let me look.\n<function=weather>{"city": "Paris"}</function>'],
        [
            "Let me look.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
        ],
    ],
)
def test_calls_of_tools_are_read_of_every_family(client: Any, model: TextRouter, says: list[str]) -> None:
    model.says = says
    choice = chat(client, tools=[WEATHER]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    chunks = list(chat(client, tools=[WEATHER], stream=True))
    assert joined(chunks).strip() == "Let me look."
    (told,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert (told.index, told.function.name, json.loads(told.function.arguments)) == (0, "weather", {"city": "Paris"})
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert chat(client).choices[0].message.content == "".join(says)  # without tools it is text


def test_bare_json_is_a_call_only_of_a_tool_that_there_is(client: Any, model: TextRouter) -> None:
    model.says = ['{"name": "weather", ', '"parameters": {"city": "Paris"}}']
    assert chat(client, tools=[WEATHER]).choices[0].message.tool_calls[0].function.name == "weather"
    assert chat(client, tools=[TIME]).choices[0].message.content == "".join(model.says)
    model.says = ["```json\n[1, 2]\n```"]
    assert joined(list(chat(client, tools=[WEATHER], stream=True))) == "```json\n[1, 2]\n```"


def test_several_calls_and_a_broken_one(client: Any, model: TextRouter) -> None:
    one = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
    model.says = [one, one]
    calls = chat(client, tools=[WEATHER]).choices[0].message.tool_calls
    assert len({call.id for call in calls}) == 2
    model.says, model.reason = ['<tool_call>\n{"name": "wea'], "length"
    choice = chat(client, tools=[WEATHER]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ('<tool_call>\n{"name": "wea', "length")


def test_a_choice_of_tools_is_enforced_by_a_schema(client: Any, model: TextRouter) -> None:
    model.says = ['[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": {}}]']
    found = chat(client, tools=[WEATHER, TIME], tool_choice="required").choices[0]
    assert [call.function.name for call in found.message.tool_calls] == ["weather", "time"]
    schema = model.asked["schema"]
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    city = schema["$defs"]["c0"]["properties"]["arguments"]["properties"]["city"]
    assert city == {"$ref": "#/$defs/c0/properties/arguments/$defs/name"}
    model.says = ['{"name": "time", "arguments": {}}']
    named = {"type": "function", "function": {"name": "time"}}
    found = chat(client, tools=[WEATHER, TIME], tool_choice=named).choices[0]
    assert (found.message.content, found.message.tool_calls[0].function.name) == (None, "time")
    assert list(model.asked["schema"]["$defs"]) == ["c0"]
    chat(client, tools=[WEATHER], tool_choice="none")
    assert not {"tools", "schema"} & model.asked.keys()
    single = chat(client, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
    assert single.choices[0].message.tool_calls
    assert "anyOf" in model.asked["schema"]


def test_reasoning_is_separated(client: Any, model: TextRouter) -> None:
    model.says = ["<thi", "nk>\nFrance", "...</th", "ink>\n\nPar", "is."]
    message = chat(client).choices[0].message
    assert (message.reasoning_content, message.content) == ("France...", "Paris.")
    chunks = list(chat(client, stream=True))
    assert joined(chunks) == "Paris."
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas).strip() == "France..."


def test_what_a_tool_answered_goes_back_to_the_model(client: Any, model: TextRouter) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *PARIS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    chat(client, messages)
    assert model.asked["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]


deep: Any = {}
for _ in range(MAX_DEPTH):
    deep = {"properties": {"a": deep}}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": LINK}, "messages[0].content[0]"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"functions": [{"name": "x"}]}}, "functions"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": "embed"}, "model"),
    ],
)  # fmt: skip
def test_bad_input_is_a_400_that_names_it(client: Any, model: TextRouter, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "chat", "messages": PARIS, **more})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


def test_errors_of_the_engine_keep_their_status_also_in_a_stream(client: Any, model: TextRouter) -> None:
    for error, raised in (
        (InvalidInput("no", code="unsupported_parameter", param="logit_bias"), openai.BadRequestError),
        (RateLimited("full", code="queue_full", retry_after=7), openai.RateLimitError),
        (Unavailable("away", retry_after=2), openai.InternalServerError),
    ):
        model.says = error
        for stream in (False, True):
            with pytest.raises(raised) as caught:
                chat(client, stream=stream)
            assert caught.value.code == error.code
            if error.retry_after:
                assert caught.value.response.headers["retry-after"] == str(int(error.retry_after))


# completions


def test_completions_take_texts_and_token_ids_and_lists_of_both(client: Any, model: TextRouter) -> None:
    model.says = lambda call: [f"<{call.inputs[0].shape[0]}>"]
    for prompt, texts in (("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3, 4, 5]], 2)):
        found = client.completions.create(model="chat", prompt=prompt, n=2)
        assert [choice.index for choice in found.choices] == list(range(2 * texts))
        assert found.usage.prompt_tokens == 10 * texts
    assert [choice.text for choice in found.choices] == ["<2>", "<2>", "<3>", "<3>"]
    assert model.asked["tokens"] == [3, 4, 5]
    assert model.asked["max_tokens"] == 16
    chunks = list(client.completions.create(model="chat", prompt=["a", "b"], stream=True))
    assert [(chunk.choices[0].index, chunk.choices[0].text) for chunk in chunks] == [(0, "<1>"), (1, "<1>")]


def test_completions_have_logprobs_in_the_old_form(client: Any, model: TextRouter) -> None:
    found = client.completions.create(model="chat", prompt="a", logprobs=1, echo=True, max_tokens=1).choices[0]
    logprobs = found.logprobs
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["Hello"], [-0.5], [0])
    assert logprobs.top_logprobs == [{"Hello": -0.5}]
    assert model.asked["echo"] is True


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"logprobs": 99}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_completions_are_a_400_that_names_it(
    client: Any, model: TextRouter, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "chat", "prompt": "a", **more})
    assert caught.value.param == param


# embeddings


def test_embeddings_of_texts_and_ids_as_numbers_and_base64(client: Any, api: House, model: TextRouter) -> None:
    whole = client.embeddings.create(model="embed", input=["abba", "cd d"], encoding_format="float")
    assert [one.embedding for one in whole.data] == [[2, 2, 0, 0], [0, 0, 1, 2]]
    assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (3, 3)
    assert client.embeddings.create(model="embed", input="a", encoding_format="float").data[0].embedding == [1, 0, 0, 0]
    ids = client.embeddings.create(model="embed", input=[[1, 2, 3], [4]], encoding_format="float")
    assert [one.embedding for one in ids.data] == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert ids.usage.prompt_tokens == 4
    short = client.embeddings.create(model="embed", input="aaabbbbc", dimensions=2, encoding_format="float")
    assert short.data[0].embedding == pytest.approx([0.6, 0.8])
    with api.client() as http:
        body = {"model": "embed", "input": "ab", "encoding_format": "base64"}
        data = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert struct.unpack("<4f", base64.b64decode(data)) == (1, 1, 0, 0)
    ordinary = openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.keys["admin"])  # asks for base64 by itself
    assert ordinary.embeddings.create(model="embed", input="ab").data[0].embedding == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [["a"]]}, "input"),
        ({"dimensions": 5}, "dimensions"),
        ({"model": "chat"}, "model"),
    ],
)
def test_bad_embeddings_are_a_400_that_names_it(client: Any, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": "embed", "input": "a", "encoding_format": "float", **more})
    assert caught.value.param == param


def test_documents_are_ranked_by_their_vectors(api: House, model: TextRouter) -> None:
    body = {"model": "embed", "query": "ab", "documents": ["ccc", {"text": "ab"}, "a"], "top_n": 2}
    with api.client() as http:
        found = http.post("/v1/rerank", json={**body, "return_documents": True}).json()
        assert [one["index"] for one in found["results"]] == [1, 2]
        assert found["results"][0]["relevance_score"] == pytest.approx(1)
        assert found["results"][0]["document"] == {"text": "ab"}
        assert "document" not in http.post("/v1/rerank", json=body).json()["results"][0]
        for more, param in (({"documents": []}, "documents"), ({"query": ""}, "query"), ({"top_n": 0}, "top_n")):
            answer = http.post("/v1/rerank", json={**body, **more})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_images_are_refused_before_any_work_where_the_model_has_no_eyes(client: Any, model: TextRouter) -> None:
    url = "data:image/png;base64,aGk="
    part = {"type": "image_url", "image_url": {"url": url}}
    before = len(model.calls)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, [{"role": "user", "content": [part]}], stream=stream)
        assert (caught.value.param, caught.value.code) == ("messages", "unsupported_parameter")
    asked = [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    with pytest.raises(openai.BadRequestError, match="no eyes"):
        client.responses.create(model="chat", input=asked)
    assert len(model.calls) == before
    blind = model.texts["chat"]
    for more in ({"images": True}, {"detours": (Detour("eyes", frozenset({"unsupported"})),)}):
        model.texts["chat"] = replace(blind, **more)
        try:
            assert chat(client, [{"role": "user", "content": [part]}]).choices[0].message.content == "Hello"
        finally:
            model.texts["chat"] = blind


# moderations


def test_texts_are_moderated_by_a_classifier_or_by_nearness(client: Any, api: House, model: TextRouter) -> None:
    judged = client.moderations.create(model="judge", input=["fine", "xx"])
    assert [one.flagged for one in judged.results] == [False, True]
    assert judged.results[1].category_scores.model_dump()["toxic"] == 1
    for asked in ("embed", "omni-moderation-latest", openai.NOT_GIVEN):  # the only embedding model
        found = client.moderations.create(model=asked, input="some text")
        assert found.model == "embed"
        assert 0 <= found.results[0].category_scores.self_harm <= 1
    parts = client.moderations.create(
        model="judge", input=[{"type": "text", "text": "a"}, {"type": "text", "text": "x"}]
    )
    assert [one.flagged for one in parts.results] == [True]
    for more, param in (
        ({"input": []}, "input"),
        ({"model": "chat"}, "model"),
        ({"model": "iris"}, "model"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "input[0]"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.moderations.create(**{"model": "judge", "input": "a", **more})
        assert caught.value.param == param


# responses


def test_a_response_is_stored_gone_on_from_and_deleted(client: Any, api: House, model: TextRouter) -> None:
    model.says = ["Paris", "."]
    first = client.responses.create(
        model="chat", input="The capital of France?", instructions="Be brief.", metadata={"a": "b"}
    )
    assert (first.output_text, first.status, first.usage.input_tokens) == ("Paris.", "completed", 10)
    second = client.responses.create(
        model="chat", input=[{"role": "user", "content": "And Italy?"}], previous_response_id=first.id
    )
    assert [(message["role"], message["content"]) for message in model.asked["messages"]] == [
        ("user", "The capital of France?"),
        ("assistant", "Paris."),
        ("user", "And Italy?"),
    ]
    assert client.responses.retrieve(first.id).model_dump() == first.model_dump()
    items = client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in items] == ["And Italy?"]
    other = openai.OpenAI(base_url=f"{api.url}/v1", api_key=_stranger(api), max_retries=0)
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        other.responses.create(model="chat", input="x", previous_response_id=first.id)
    client.responses.delete(first.id)
    for act in (
        lambda: client.responses.retrieve(first.id),
        lambda: client.responses.create(model="chat", input="x", previous_response_id=second.id),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            act()
        assert caught.value.code == "response_not_found"
    unkept = client.responses.create(model="chat", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def _stranger(api: House) -> str:
    """A developer's key of another project."""
    from modelworks.core.specs import KeySpec, ProjectSpec
    from modelworks.core.types import Caller

    project = api.services.access.create_project(api.caller(), ProjectSpec(name="elsewhere"))
    admin = api.services.authenticator.authenticate(f"Bearer {api.keys['admin']}", project=project.name)
    return api.services.access.create_key(Caller(admin), KeySpec(name="k", role="developer"))[1]


def test_the_events_of_a_response_come_in_openais_order(client: Any, model: TextRouter) -> None:
    model.says = ["Pa", "ris"]
    events = list(client.responses.create(model="chat", input="x", stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "Paris"
    assert client.responses.retrieve(events[-1].response.id).output_text == "Paris"


def test_calls_and_reasoning_in_a_response(client: Any, model: TextRouter) -> None:
    model.says = ["<think>hm</think>\n\n", '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>']
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    events = list(client.responses.create(model="chat", input="x", tools=[tool], stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[2:] == [
        "output_item.added", "reasoning_text.delta", "reasoning_text.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    first = events[-1].response
    call = first.output[1]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    model.says = ["It rains."]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    client.responses.create(model="chat", input=[output], previous_response_id=first.id, tools=[tool])
    roles = [message["role"] for message in model.asked["messages"]]
    assert roles == ["user", "assistant", "tool"]


def test_a_response_that_was_cut_and_one_that_failed(client: Any, model: TextRouter) -> None:
    model.reason = "length"
    cut = client.responses.create(model="chat", input="x", max_output_tokens=1)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [event.type for event in client.responses.create(model="chat", input="x", stream=True)][
        -1
    ] == "response.incomplete"
    format = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    client.responses.create(model="chat", input="x", text=format)
    assert model.asked["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ],
)
def test_bad_responses_are_a_400_that_names_it(
    client: Any, model: TextRouter, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "chat", "input": "x", **more})
    assert caught.value.param == param


# the SDK and the command line


def test_the_sdk_chats_and_embeds(api: House, model: TextRouter) -> None:
    from modelworks import Client

    with Client(url=api.url, api_key=api.keys["admin"], max_retries=0) as sdk:
        model.says = ["Hel", "lo"]
        assert sdk.chat("chat", "Hi", max_tokens=4)["choices"][0]["message"]["content"] == "Hello"
        assert (model.asked["messages"], model.asked["max_tokens"]) == ([{"role": "user", "content": "Hi"}], 4)
        assert "".join(sdk.chat_stream("chat", [{"role": "user", "content": "Hi"}])) == "Hello"
        assert sdk.embeddings("embed", ["ab", "d"]) == [[1, 1, 0, 0], [0, 0, 0, 1]]
        with pytest.raises(InvalidInput):
            list(sdk.chat_stream("chat", "Hi", temperature=9))


def test_a_conversation_on_the_command_line(api: House, model: TextRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from modelworks.cli.app import app

    monkeypatch.setenv("MODELWORKS_URL", api.url)
    monkeypatch.setenv("MODELWORKS_API_KEY", api.keys["admin"])
    model.says = ["Hel", "lo\x1b[2J"]
    one = CliRunner().invoke(app, ["chat", "chat", "Hi", "--system", "Be kind."])
    assert (one.exit_code, one.stdout) == (0, "Hello\\x1b[2J\n"), one.output
    assert [message["role"] for message in model.asked["messages"]] == ["system", "user"]
    two = CliRunner().invoke(app, ["chat", "chat"], input="Hi\n\nAgain\n")
    assert two.exit_code == 0
    assert [message["role"] for message in model.asked["messages"]] == ["user", "assistant", "user"]


# what is counted


def test_tokens_are_counted_by_deployment_and_key(client: Any, api: House, model: TextRouter) -> None:
    def counted() -> Counter[str]:
        with api.client() as http:
            text = http.get("/metrics").text
        found: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("modelworks_tokens_total{") and 'deployment="chat"' in line:
                found[line.partition('kind="')[2].partition('"')[0]] += int(
                    float(line.rpartition(" ")[2])
                )  # of all keys
        return found

    model.says = ["a", "b", "c"]
    chat(client)
    before = counted()
    chat(client)
    list(chat(client, stream=True))
    after = counted()
    assert {kind: after[kind] - before[kind] for kind in after} == {
        "prompt": 20, "completion": 6, "cached": 8, "repeated": 0,
    }  # fmt: skip


def test_a_keys_tokens_a_minute_are_reserved_and_settled(api: House, model: TextRouter) -> None:
    """The model reads 10 tokens and writes one for each piece; before it has, a text counts a token for four bytes."""
    key = api.make_key("invoke-only", tokens_per_minute=100)
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0)

    def left(**more: Any) -> int:
        answer = client.chat.completions.with_raw_response.create(model="chat", messages=PARIS, **more)
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
        assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
        b"".join(answer.http_response.iter_bytes())
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    model.says = ["a", "b"]
    reading = 100 - 10 - left(max_tokens=10)
    assert 10 < reading < 25
    assert left(max_tokens=10, stream=True) in (100 - 12 - reading - 10, 100 - 11 - reading - 10)  # 10 + 2 were used
    with pytest.raises(openai.RateLimitError) as caught:
        left(max_tokens=90)
    assert (caught.value.type, caught.value.code) == ("tokens", "rate_limited")
    assert 5 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert int(caught.value.response.headers["x-ratelimit-remaining-tokens"]) in range(74, 80)
    vectors = client.embeddings.with_raw_response.create(model="embed", input="a b c")
    assert vectors.headers["x-ratelimit-limit-tokens"] == "100"


def test_an_answer_out_of_the_cache_is_counted_as_such_and_free(api: House, model: TextRouter) -> None:
    model.says = ["a", "b", "c"]
    route = model.texts["chat"]
    model.texts["chat"] = replace(route, cache=(60.0, 10**6))
    key = api.make_key("invoke-only", tokens_per_minute=1000)
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0)
    try:
        answers = [client.chat.completions.with_raw_response.create(model="chat", messages=PARIS) for _ in range(3)]
    finally:
        model.texts["chat"] = route
    assert [answer.headers.get("x-cache") for answer in answers] == [None, "hit", "hit"]
    usages = [answer.parse().usage for answer in answers]
    assert [one.completion_tokens for one in usages] == [3, 3, 3]
    assert [one.prompt_tokens_details.cached_tokens for one in usages] == [4, 10, 10]
    remaining = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers]
    assert remaining[2] >= remaining[1]  # more came back meanwhile
    with api.client() as http:
        text = http.get("/metrics").text
    assert [line.rpartition(" ")[2] for line in text.splitlines() if 'kind="repeated"' in line and " 6.0" in line]


def test_the_tokens_of_other_dialects_count_too(api: House, model: TextRouter) -> None:
    """What is asked by the Open Inference Protocol or the native route, whole: no way in is free."""
    key = api.make_key("invoke-only", tokens_per_minute=745)
    tensor = {"name": "messages", "datatype": "BYTES", "shape": [1], "data": [json.dumps(PARIS)]}
    headers = {"authorization": f"Bearer {key}"}
    model.says = ["a"] * 200
    with api.client(None) as http:

        def used() -> int:
            with api.client() as admin:
                lines = admin.get("/metrics").text.splitlines()
            ours = [
                line for line in lines if line.startswith("modelworks_tokens_total{") and 'deployment="chat"' in line
            ]
            return sum(int(float(line.rpartition(" ")[2])) for line in ours if "prompt" in line or "completion" in line)

        before = used()
        statuses = [
            http.post("/v2/models/chat/infer", json={"inputs": [tensor]}, headers=headers).status_code for _ in range(4)
        ]
        assert statuses == [200, 200, 429, 429]  # 210 each are used, and some 530 are reserved for each before it runs
        assert used() - before == 420


def test_a_write_that_a_client_does_not_take_ends_and_waiting_for_the_model_does_not() -> None:
    async def run() -> None:
        with Patience(0.05) as patience:
            await patience.write(asyncio.sleep(0))
            await asyncio.sleep(0.2)  # nothing to write
        with pytest.raises(TimeoutError), Patience(0.05) as patience:
            await patience.write(asyncio.sleep(30))

    asyncio.run(run())


def test_a_stream_that_the_server_has_to_end_says_so() -> None:
    async def story() -> None:
        news, sent, closed = asyncio.Event(), [], []
        exchange: Any = SimpleNamespace(
            choices=[Generated(0, news)], news=news, opening=lambda: b"first", failure=lambda error: error.code.encode(),
            close=lambda: closed.append(True),
        )  # fmt: skip

        async def send(message: Any) -> None:
            sent.append(message)

        running = asyncio.ensure_future(Events(exchange, {})({}, None, send))
        while len(sent) < 2:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [(one["body"], one["more_body"]) for one in sent[1:]] == [(b"first", True), (b"stopping", False)]
        assert (exchange.end, closed) == ("stopping", [True])

    asyncio.run(story())
    assert min(DRAIN_SECONDS, RETIRE_SECONDS) > SECONDS, (
        "a replica that is replaced, and the way to it, outlive its calls"
    )


def test_usage_so_far_comes_with_each_event_when_it_is_asked_for(client: Any, model: TextRouter) -> None:
    model.says = ["a", "b"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options))
    assert all(chunk.usage.prompt_tokens == 10 for chunk in chunks)
    assert chunks[-1].usage.completion_tokens == chunks[-2].usage.completion_tokens == 2
