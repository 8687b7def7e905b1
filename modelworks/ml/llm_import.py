"""A GGUF file from outside becomes a model package: its header is read within bounds, its chat template tried out."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from modelworks.core.errors import InvalidInput
from modelworks.core.generation import TEXT_GENERATION
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.ml.package import Manifest, Package, PackageFile
from modelworks.ml.runtimes.llm_llama import CHAT_FILE, MODEL_FILE, LlamaRuntime
from modelworks.ml.runtimes.llm_template import CHATML, check_template

TASK = "text-generation"
MAX_ENTRIES = 4096
MAX_TENSORS = 65_536
MAX_ARRAY = 2_000_000  # elements: the largest vocabularies have some 260,000
MAX_STRING = 4 * 1024**2
MAX_HEADER = 256 * 1024**2
MAX_RANK = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEEP = 16  # elements of an array that are kept; of the tokens, all
_TOKENS = "tokenizer.ggml.tokens"
# tensor type -> (elements a block, bytes a block), from the GGML format
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip


class _Reader:
    """Reads forward and never past the file's end or MAX_HEADER."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = min(size, MAX_HEADER)
        self.offset = 0

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise _bad("its header runs past its end")
        data = self._file.read(count)
        if len(data) != count:
            raise _bad("its header runs past its end")
        self._left -= count
        self.offset += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, most: int, what: str) -> int:
        value = self.number("Q")
        if value > most:
            raise _bad(f"it announces {value} {what}; at most {most} are taken")
        return int(value)

    def text(self, most: int = MAX_STRING) -> str:
        return self.take(self.count(most, "bytes of one text")).decode("utf-8", "replace")

    def value(self, kind: int, key: str, *, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or nested:
            raise _bad(f"the value of {key[:80]!r} has an unknown type {kind}")
        inner, length = self.number("I"), self.count(MAX_ARRAY, "elements of one list")
        if code := _SCALARS.get(inner):
            data = self.take(length * struct.calcsize(f"<{code}"))
            kept = min(length, _KEEP)
            return list(struct.unpack_from(f"<{kept}{code}", data))
        found = []
        for index in range(length):
            one = self.value(inner, key, nested=True)
            if index < _KEEP or key == _TOKENS:
                found.append(one)
        return found


def read_gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file (of long lists but the first elements), once its header is sound.

    InvalidInput for another format or version, for counts beyond bounds, and for tensors that overlap the file's end.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        if reader.take(4) != b"GGUF" or (version := reader.number("I")) not in (2, 3):
            raise _bad("it is not GGUF of version 2 or 3, little-endian")
        tensors, entries = reader.count(MAX_TENSORS, "tensors"), reader.count(MAX_ENTRIES, "entries")
        found: dict[str, Any] = {"version": version}
        for _ in range(entries):
            key = reader.text(65_535)
            if key in found:
                raise _bad(f"it has the entry {key[:80]!r} twice")
            found[key] = reader.value(reader.number("I"), key)
        _check_tensors(reader, tensors, size, found.get("general.alignment", 32))
    if not isinstance(found.get("general.architecture"), str):
        raise _bad("it does not name its architecture")
    return found


def _check_tensors(reader: _Reader, count: int, size: int, alignment: Any) -> None:
    if not isinstance(alignment, int) or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise _bad(f"its alignment is {alignment!r}")
    extents: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        name, rank = reader.text(1024), reader.number("I")
        if name in extents or not 1 <= rank <= MAX_RANK:
            raise _bad(f"its tensor {name[:80]!r} is there twice or has rank {rank}")
        shape = [reader.number("Q") for _ in range(rank)]
        kind, offset = reader.number("I"), reader.number("Q")
        if kind not in _BLOCKS:
            raise _bad(f"its tensor {name[:80]!r} has an unknown type {kind}")
        elements, width = _BLOCKS[kind]
        if math.prod(shape) > 2**40 or shape[0] % elements:
            raise _bad(f"its tensor {name[:80]!r} has the shape {shape}")
        extents[name] = (offset, math.prod(shape) // elements * width)
    start = -(-reader.offset // alignment) * alignment
    for name, (offset, length) in extents.items():
        if offset % alignment or start + offset + length > size:
            raise _bad(f"its tensor {name[:80]!r} lies outside the file; it may have been cut off")
    if not extents:
        raise _bad("it has no tensors")


def import_gguf(
    path: Path, workdir: Path, *, task: str | None = None, licence: str | None = None, threads: int = 1
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files (name -> path) of a package that serves the model at `path`.

    The header is checked, the chat template rendered in its sandbox, and the model loaded and asked for a few tokens.
    """
    if task not in (None, TASK):
        raise InvalidInput(f"a GGUF model is served as {TASK}, not as {task[:80]!r}", param="task")
    found = read_gguf(path)
    chat = _chat(found)
    check_template(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
    beside = workdir / CHAT_FILE
    beside.write_bytes(_written(chat))
    files = {MODEL_FILE: path, CHAT_FILE: beside}
    name = found.get("general.name")
    manifest = Manifest(
        task=TASK,
        runtime="llama",
        algorithm=str(found["general.architecture"])[:100],
        signature=TEXT_GENERATION,
        files={name: _file(path) for name, path in files.items()},
        lineage={
            "format": "gguf",
            "file_type": found.get("general.file_type"),
            "context_length": chat["context_length"],
        },
        licence=licence or _short(found.get("general.license")),
        description=_short(name),
    )
    try_out(Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__), threads)
    return manifest, files


def check_llama(manifest: Manifest, files: dict[str, Path], threads: int = 1) -> None:
    """The same for a package that comes whole: its chat template must be the one of its model file."""
    if set(files) != {MODEL_FILE, CHAT_FILE} or manifest.signature != TEXT_GENERATION or manifest.task != TASK:
        raise InvalidInput("this is not a sound package of a GGUF model; export it again", code="bad_package")
    chat = _chat(read_gguf(files[MODEL_FILE]))
    if files[CHAT_FILE].stat().st_size > MAX_STRING or files[CHAT_FILE].read_bytes() != _written(chat):
        raise InvalidInput(f"{CHAT_FILE} is not what the model file says; export it again", code="bad_package")
    check_template(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
    try_out(Package(manifest, {manifest.files[name].digest: path for name, path in files.items()}.__getitem__), threads)


def try_out(package: Package, threads: int = 1) -> None:
    """InvalidInput unless the engine loads the package and generates from it."""
    runtime = LlamaRuntime()
    runtime.load(package, threads, slots=1, context=512)
    try:
        messages = Tensor("messages", "BYTES", [1], pack_bytes(['[{"role": "user", "content": "Hello"}]']))
        runtime.admit("try", [messages], {"max_tokens": 4, "temperature": 0}, False)
        steps = runtime.step(120.0)
        if not steps or not isinstance(steps[0][1], list):
            reason = getattr(steps[0][1], "message", "no answer") if steps else "no answer within 120 s"
            raise InvalidInput(f"the model does not generate text here: {reason}", code="bad_model")
        unpack_bytes(steps[0][1][0].data)
    finally:
        runtime.close()


def _chat(found: dict[str, Any]) -> dict[str, Any]:
    """What chat.json holds. An empty template: the model file brought none, ChatML is used."""
    tokens = found.get(_TOKENS)
    tokens = tokens if isinstance(tokens, list) else []

    def token(name: str) -> str:
        number = found.get(f"tokenizer.ggml.{name}_token_id")
        return str(tokens[number]) if isinstance(number, int) and 0 <= number < len(tokens) else ""

    template = found.get("tokenizer.chat_template", "")
    length = found.get(f"{found['general.architecture']}.context_length")
    # a begin-of-sequence token that the tokenizer adds by itself must not come from the template too
    bos = "" if found.get("tokenizer.ggml.add_bos_token", True) else token("bos")
    return {
        "template": template if isinstance(template, str) else "",
        "bos": bos,
        "eos": token("eos"),
        "context_length": length if isinstance(length, int) else None,
    }


def _written(chat: dict[str, Any]) -> bytes:
    return json.dumps(chat, sort_keys=True).encode()


def _file(path: Path) -> PackageFile:
    with path.open("rb") as file:
        return PackageFile(digest=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _short(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value.isprintable() else None


def _bad(why: str) -> InvalidInput:
    return InvalidInput(f"this is not a sound GGUF file: {why}", code="bad_gguf")
