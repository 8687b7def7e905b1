"""Images in messages: a small vision model of random weights, imported, says of images what transformers' generate says."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.ml.build import export_package, import_folder, import_package
from modelworks.ml.package import Manifest
from modelworks.ml.runtimes.choice import choose
from modelworks.ml.runtimes.llm_transformers import TransformersRuntime
from tests.server import RunningServer
from tests.tiny_llama import loaded, make_llama, packaged, prompt, run
from tests.tiny_llava import TOKENS, make_llava, picture, seen

NEEDED = ("torch", "transformers", "jinja2", "PIL")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]

PLAIN = {"ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    make_llava(folder)
    return folder


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, Path]]:
    return import_folder(folder, tmp_path_factory.mktemp("import"))


@pytest.fixture(scope="module")
def engine(imported: tuple[Manifest, dict[str, Path]]) -> Iterator[TransformersRuntime]:
    with loaded(imported) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With the vision model as `eyes` and a model of text as `blind`."""
    running = RunningServer(tmp_path_factory.mktemp("home"), workers=2)
    try:
        text = tmp_path_factory.mktemp("llama")
        make_llama(text)
        for name, source in (("eyes", folder), ("blind", text)):
            archive = shutil.make_archive(str(tmp_path_factory.mktemp("zip") / name), "zip", source)
            running.client.models.import_(name, Path(archive))
            running.client.deployments.put(name, name)
        for name in ("eyes", "blind"):
            running.client.deployments.wait_ready(name)
        yield running
    finally:
        running.stop()


def messages(value: list[dict[str, Any]]) -> Tensor:
    return Tensor("messages", "BYTES", [1], pack_bytes([json.dumps(value)]))


def generated(folder: Path, text: str, colors: list[str], count: int) -> tuple[list[int], int]:
    """By transformers alone, from the model's folder: the tokens that follow, and how many the prompt has."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    images = []
    for color in colors:
        data = picture(color).partition(",")[2]
        images.append(Image.open(io.BytesIO(base64.b64decode(data))))
    given = AutoProcessor.from_pretrained(folder)(
        text=f"<|user|>{'<image>' * len(images)}{text}<|assistant|>", images=images, return_tensors="pt"
    )
    made = model.generate(**given, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
    size = int(given["input_ids"].shape[1])
    assert isinstance(made, torch.Tensor)
    return made[0, size:].tolist(), size


def test_what_is_seen_is_said_as_generate_says_it_whatever_runs_beside_it(engine: TransformersRuntime, folder: Path) -> None:
    asked = [("a ship", ["red"]), ("a ship", ["blue"]), ("what is it", ["red", "green"])]
    calls = [(messages(seen(text, *map(picture, colors))), {**PLAIN, "max_tokens": 12}) for text, colors in asked]
    beside = (prompt("the capital of France"), {**PLAIN, "max_tokens": 30})
    *made, text, cut = run(engine, *calls, beside, (calls[0][0], {**PLAIN, "max_tokens": 500}), abort=4)
    for (words, colors), one in zip(asked, made, strict=True):
        wanted, size = generated(folder, words, colors, 12)
        assert (one.ids, one.usage[:2], one.reason) == (wanted, [size, 12], "length")
        assert size > TOKENS * len(colors)
        assert one.parts == 12  # a stream
    assert made[0].ids != made[1].ids
    assert run(engine, beside)[0].ids == text.ids
    assert (cut.error, cut.parts < 50, engine._batch) == (None, True, [])


def test_messages_of_text_alone_reach_a_model_with_eyes(engine: TransformersRuntime) -> None:
    said = [{"role": "user", "content": "a ship"}]
    plain, same = run(engine, (messages(said), {**PLAIN, "max_tokens": 6}),
                      (prompt("<|user|>a ship<|assistant|>"), {**PLAIN, "max_tokens": 6}))  # fmt: skip
    assert (plain.ids, plain.usage) == (same.ids, same.usage)


def huge(width: int, height: int) -> str:
    """A PNG that says it has so many pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_images_that_are_none_or_too_large_are_named(engine: TransformersRuntime) -> None:
    cut = picture("red", (400, 300), "JPEG")
    cut = cut[: len(cut) // 2 // 4 * 4]
    svg = "data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()
    bad = [huge(60_000, 60_000), cut, svg, "data:image/png;base64,aGk=", "data:image/png;base64,", "data:image/png;base64,*"]
    calls = [(messages(seen("x", picture("red"), url)), {"max_tokens": 2}) for url in bad]
    many = messages(seen("x", *[huge(6000, 6000)] * 2))
    good = (messages(seen("x", picture("red", kind="WEBP"))), {"max_tokens": 2})
    *refused, together, fine = run(engine, *calls, (many, {}), good)
    for one in refused:
        assert (one.error.code, one.error.param, one.error.status) == ("invalid_image", "messages[0].content[1]", 400)
    assert "pixels" in together.error.message
    assert fine.error is None
    assert fine.reason != ""
    (long,) = run(engine, (messages(seen("word " * 1000, picture("red"))), {}))
    assert long.error.code == "context_length_exceeded"
    assert long.error.detail["prompt_tokens"] > 1024
    (marked,) = run(engine, (messages(seen("<image>", picture("red"))), {}))
    assert marked.error.status == 400


def test_the_package_knows_that_it_sees_and_travels(
    imported: tuple[Manifest, dict[str, Path]], folder: Path, tmp_path: Path
) -> None:
    manifest, _ = imported
    assert (manifest.task, manifest.runtime, manifest.lineage["images"]) == ("text-generation", "transformers", True)
    assert (manifest.lineage["context_length"], manifest.lineage["token_bytes"]) == (1024, 4 * 2 * 2 * 2 * 8)
    export_package(manifest, packaged(imported)._locate, tmp_path / "a.mwpkg")
    (tmp_path / "in").mkdir()
    assert import_package(tmp_path / "a.mwpkg", tmp_path / "in")[0].digest == manifest.digest
    assert choose("auto", "transformers", "llava", manifest.lineage) == "transformers"
    for engine in ("vllm", "openvino"):
        with pytest.raises(InvalidInput, match="images"):
            choose(engine, "transformers", "llava", manifest.lineage)

    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((other / "processor_config.json").read_text())
    evil = {**settings, "auto_map": {"AutoProcessor": "evil.Evil"}}
    (other / "processor_config.json").write_text(json.dumps(evil))
    (other / "evil.py").write_text("raise SystemExit(9)")
    (tmp_path / "work").mkdir()
    assert import_folder(other, tmp_path / "work")[0].digest == manifest.digest
    (other / "processor_config.json").write_text(json.dumps({**settings, "processor_class": "EvilProcessor"}))
    (tmp_path / "broken").mkdir()
    with pytest.raises(InvalidInput, match=r"processor of texts and images"):
        import_folder(other, tmp_path / "broken")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (other / name).unlink()
    (tmp_path / "blind").mkdir()
    with pytest.raises(InvalidInput, match=r"save its processor"):
        import_folder(other, tmp_path / "blind")


def post(server: RunningServer, model: str, said: list[dict[str, Any]], path: str = "chat/completions", **more: Any) -> Any:
    name = "input" if path == "responses" else "messages"
    with server.http() as http:
        return http.post(f"/v1/{path}", json={"model": model, name: said, "temperature": 0, **more})


def test_images_come_by_openais_api(server: RunningServer, folder: Path) -> None:
    said, size = generated(folder, "a ship", ["red"], 8)
    asked = seen("a ship", picture("red"))
    body = post(server, "eyes", asked, max_tokens=8, ignore_eos=True, logprobs=True).json()
    assert body["usage"]["prompt_tokens"] == size > TOKENS
    assert len(body["choices"][0]["logprobs"]["content"]) == len(said) == body["usage"]["completion_tokens"]
    streamed = post(server, "eyes", asked, max_tokens=8, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(pieces) == body["choices"][0]["message"]["content"]
    assert events[-1]["usage"] == body["usage"]
    items = [{"type": "input_text", "text": "a ship"}, {"type": "input_image", "image_url": picture("red")}]
    answer = post(server, "eyes", [{"role": "user", "content": items}], "responses", max_output_tokens=4).json()
    assert answer["usage"]["input_tokens"] == size


def test_images_where_there_are_no_eyes_and_addresses_are_a_400(server: RunningServer) -> None:
    for stream in (False, True):
        refused = post(server, "blind", seen("x", picture("red")), stream=stream)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, "messages", "unsupported_parameter")
        assert "no eyes" in error["message"]
    for url in ("http://127.0.0.1:1/x.png", "https://example.org/x.png", "file:///etc/passwd", "data:text/html;base64,aGk="):
        refused = post(server, "eyes", seen("x", url))
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "messages[0].content[0]")
        assert "data:image/png;base64" in error["message"]
    error = post(server, "eyes", seen("x", "data:image/png;base64,aGk=")).json()["error"]
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error", "messages[0].content[0]", "invalid_image"
    )  # fmt: skip
    assert post(server, "eyes", seen("x", *[picture("red", (2, 2))] * 33)).json()["error"]["param"] == "messages"

