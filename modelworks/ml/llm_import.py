"""A GGUF file from outside becomes a model package: its header is read within bounds, its chat template tried out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.generation import TEXT_GENERATION
from modelworks.core.tasks import ADAPTER
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.ml.adapter_import import import_gguf_adapter
from modelworks.ml.gguf import MAX_STRING, TOKENS, exact_type, read_gguf, to_q8_0, token_bytes
from modelworks.ml.package import Manifest, Package, PackageFile
from modelworks.ml.runtimes.llm_llama import CHAT_FILE, MODEL_FILE, LlamaRuntime
from modelworks.ml.runtimes.llm_template import CHATML, check_template

TASK = "text-generation"
Q8_0 = "q8_0"


def import_gguf(
    path: Path,
    workdir: Path,
    *,
    task: str | None = None,
    licence: str | None = None,
    convert: str | None = None,
    threads: int = 1,
    tell: Callable[[float, str], None] = lambda part, stage: None,
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files (name -> path) of a package that serves the model at `path`. `tell`: how far it is.

    With `convert` "q8_0", weights in fewer bits are written anew in that. The header is checked, the chat template rendered
    in its sandbox, and the model loaded and asked for a few tokens.
    """
    found = read_gguf(path)
    adapter = found.get("general.type") == "adapter"
    if task not in (None, ADAPTER if adapter else TASK):
        raise InvalidInput(f"this GGUF file is served as {ADAPTER if adapter else TASK}, not as {task[:80]!r}", param="task")
    if adapter:
        return import_gguf_adapter(path, found, licence=licence)
    if convert == Q8_0 and exact_type(found.get("general.file_type")) is None:
        converted = workdir / "converted.gguf"
        to_q8_0(path, converted, lambda part: tell(0.6 * part, "writing the weights in 8 bits"))
        path, found = converted, read_gguf(converted)
    chat = _chat(found)
    check_template(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
    beside = workdir / CHAT_FILE
    beside.write_bytes(_written(chat))
    files = {MODEL_FILE: path, CHAT_FILE: beside}
    name = found.get("general.name")
    tell(0.6, "reading it through")
    manifest = Manifest(
        task=TASK,
        runtime="llama",
        algorithm=str(found["general.architecture"])[:100],
        signature=TEXT_GENERATION,
        files={name: PackageFile.of(path) for name, path in files.items()},
        lineage={
            "format": "gguf",
            "file_type": found.get("general.file_type"),
            "context_length": chat["context_length"],
            "token_bytes": token_bytes(found),
        },
        licence=licence or _short(found.get("general.license")),
        description=_short(name),
    )
    tell(0.8, "trying it out")
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
    tokens = found.get(TOKENS)
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


def _short(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value.isprintable() else None
