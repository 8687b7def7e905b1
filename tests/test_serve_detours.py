"""Rules between deployments and the cache of answers: by the API with a scripted model, and with two real deployments."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from modelworks.core.errors import DeadlineExceeded, InvalidInput, ModelworksError, RateLimited
from modelworks.core.generation import TEXT_GENERATION, context_exceeded, part
from modelworks.serve.detours import Cache
from modelworks.serve.routes import Detour, Route
from modelworks.serve.wire import Part
from tests.api_house import House, house
from tests.openai_house import TextRouter, furnish
from tests.server import RunningServer

ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home")) as found:
        furnish(found)
        yield found


@pytest.fixture
def model(api: House) -> TextRouter:
    router = api.router
    assert isinstance(router, TextRouter)
    project = router.known.project_id
    router.texts["big"] = Route(project, "big", "big:1", TEXT_GENERATION, "text-generation")
    return router


def ask(api: House, text: str = "Hi", role: str = "admin", **more: Any) -> Any:
    body = {"model": "chat", "messages": [{"role": "user", "content": text}], **more}
    with api.client(role) as http:
        return http.post("/v1/chat/completions", json=body)


def rules(model: TextRouter, *detours: Detour, cache: tuple[float, int] | None = None) -> None:
    model.texts["chat"] = replace(model.texts["chat"], detours=detours, cache=cache)


@pytest.mark.parametrize(
    ("on", "error"),
    [
        ("overload", RateLimited("full", code="queue_full")),
        ("error", ModelworksError("broken", code="model_error")),
        ("error", DeadlineExceeded("late")),
        ("context", context_exceeded(9, 5)),
        ("unsupported", InvalidInput("no", code="unsupported_parameter")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_call_goes_where_the_rule_says(
    api: House, model: TextRouter, on: str, error: ModelworksError, stream: bool
) -> None:
    model.says = lambda call: error if call.deployment == "chat" else ["from big"]  # type: ignore[return-value,assignment]
    rules(model, Detour("big", frozenset({on})))
    answer = ask(api, stream=stream)
    assert answer.status_code == 200, answer.text
    assert "from big" in answer.text
    rules(model, Detour("big", frozenset({"overload" if on != "overload" else "error"})))
    assert ask(api, stream=stream).status_code == error.status  # of another kind: no rule
    model.says = error
    rules(model, Detour("big", frozenset({on})))
    assert ask(api).status_code == error.status  # there as well: each is tried once
    assert [call.deployment for call in model.calls[-2:]] == ["chat", "big"]


def test_what_has_begun_is_not_answered_twice(api: House, model: TextRouter) -> None:
    def breaks(key: Any, call: Any, deliver: Any, **more: Any) -> Any:
        pending = type("P", (), {"done": True})()
        deliver(Part(part("Hel", "", 1, 1, 0), "chat:1", False))
        deliver(ModelworksError("broken", code="model_error"))
        model.calls.append(call)
        return pending

    rules(model, Detour("big", frozenset({"error"})))
    usual, model.submit = model.submit, breaks  # type: ignore[method-assign]
    try:
        answer = ask(api, stream=True)
    finally:
        model.submit = usual  # type: ignore[method-assign]
    assert '"code":"model_error"' in answer.text
    assert model.calls[-1].deployment == "chat"


def test_long_prompts_go_to_the_large_model(api: House, model: TextRouter) -> None:
    model.says = lambda call: [call.deployment]
    rules(model, Detour("big", longer_than=500))
    assert ask(api, "word " * 10).json()["choices"][0]["message"]["content"] == "chat"
    assert ask(api, "word " * 200).json()["choices"][0]["message"]["content"] == "big"
    del model.texts["big"]
    assert ask(api, "word " * 200).status_code == 503


def test_a_call_with_an_adapter_goes_only_where_there_is_one(api: House, model: TextRouter) -> None:
    model.says = lambda call: [f"{call.deployment} {call.params.get('adapter')}"]
    rules(model, Detour("big", longer_than=10))
    model.texts["chat"] = replace(model.texts["chat"], adapters={"pirate": "pirate-lora:1"})
    try:
        for adapters, said in (({}, "chat pirate"), ({"pirate": "other-lora:1"}, "big pirate")):
            model.texts["big"] = replace(model.texts["big"], adapters=adapters)
            answer = ask(api, "word " * 200, model="chat:pirate").json()
            assert (answer["choices"][0]["message"]["content"], answer["model"]) == (said, "chat:pirate")
        assert ask(api, model="chat:cook").status_code == 404
    finally:
        model.texts["chat"] = replace(model.texts["chat"], adapters={})


def test_the_same_call_again_is_answered_from_the_cache(api: House, model: TextRouter) -> None:
    model.says = ["a", "b"]
    rules(model, cache=(60.0, 2**20))
    before = len(model.calls)
    first, again = ask(api), ask(api)
    assert first.json()["choices"] == again.json()["choices"]
    assert (first.headers.get("x-cache"), again.headers.get("x-cache")) == (None, "hit")
    streams = [ask(api, stream=True) for _ in range(2)]
    assert [one.headers.get("x-cache") for one in streams] == [None, "hit"]
    assert len(model.calls) == before + 2
    for more in ({"seed": 1}, {"text": "other"}, {"n": 2}):
        ask(api, **more)
    assert len(model.calls) == before + 5  # of n=2 the first is known
    model.texts["chat"] = replace(model.texts["chat"], model_version="chat:2")
    assert "x-cache" not in ask(api).headers
    rules(model)
    assert "x-cache" not in ask(api).headers


def test_a_cache_is_bounded_in_time_and_bytes() -> None:
    now = [0.0]
    cache = Cache(10.0, 4000, clock=lambda: now[0])
    parts = [Part(part("x" * 100, "stop", 1, 1, 0), "m:1")]
    for name in (b"a", b"b", b"c", b"d", b"e", b"f"):
        cache.put(name, parts)
    assert cache.get(b"a") is None
    assert cache.get(b"f") == parts
    assert cache._held <= 4000
    cache.put(b"large", [Part(part("x" * 2000, "stop", 1, 1, 0), "m:1")])
    assert cache.get(b"large") is None
    now[0] = 11.0
    assert cache.get(b"f") is None
    assert cache._held < 4000


@pytest.mark.slow
def test_two_real_deployments_share_an_overload(iris: RunningServer) -> None:
    """A front that holds one call at a time and lets none wait beside one: what it cannot take, the other answers."""
    client = iris.client
    with iris.http() as http:
        for to, said in (("nothing", "there is none"), ("iris-front", "none")):
            spec = {"model": "iris", "routes": [{"to": to, "on": ["overload"]}]}
            answer = http.put("/api/v1/deployments/iris-front", json=spec)
            assert (answer.status_code, answer.json()["param"]) == (400, "routes.0.to"), answer.text
            assert said in answer.text
        assert http.put("/api/v1/deployments/x", json={"model": "iris", "routes": [{"to": "iris"}]}).status_code == 400
    limits = {"concurrency": 1, "queue": 1}
    batching = {"wait_ms": 30}
    client.deployments.put("iris-front", model="iris", limits=limits, batching=batching)
    client.deployments.wait_ready("iris-front")

    def statuses() -> set[int]:
        def one(_: int) -> int:
            with iris.http() as http:
                return http.post("/api/v1/deployments/iris-front/predict", json={"inputs": [ROW]}).status_code

        with ThreadPoolExecutor(8) as pool:
            return set(pool.map(one, range(40)))

    try:
        assert statuses() == {200, 429}
        routes = [{"to": "iris", "on": ["overload"]}]
        client.deployments.put("iris-front", model="iris", limits=limits, batching=batching, routes=routes)
        client.deployments.wait_ready("iris-front")
        assert statuses() == {200}
    finally:
        client.deployments.delete("iris-front")
