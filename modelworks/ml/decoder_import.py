"""A language model as the hubs keep it - config.json, safetensors, tokenizer.json - becomes a package for transformers."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput
from modelworks.core.generation import TEXT_GENERATION
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.ml.data.media import pillow
from modelworks.ml.data.tokens import load
from modelworks.ml.folder import CONFIG, check_safetensors, config_of, licence_of, read_json, weights_of
from modelworks.ml.package import Manifest, Package, PackageFile
from modelworks.ml.runtimes.choice import TRANSFORMERS
from modelworks.ml.runtimes.llm_eyes import PROCESSOR_FILES
from modelworks.ml.runtimes.llm_template import CHATML, MAX_TEMPLATE, check_template
from modelworks.ml.runtimes.llm_transformers import CHAT_FILE, TOKENIZER_FILE, TransformersRuntime

TASK = "text-generation"
INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# what a config may name that would run or fetch code
_CODE = ("auto_map", "_attn_implementation", "attn_implementation", "_experts_implementation", "kernel_config")


def import_decoder(
    folder: Path,
    workdir: Path,
    *,
    licence: str | None = None,
    threads: int = 1,
    tell: Callable[[float, str], None] = lambda part, stage: None,
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files of a package that serves the staged model in `folder`.

    InvalidInput for weights that are quantised or not whole, for an architecture that needs code of its own, without a
    tokenizer.json, and when the model does not generate. `tell`: how far it is.
    """
    config = _data(config_of(folder))
    _check_config(config)
    weights = weights_of(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise InvalidInput(
            f"the folder has no {TOKENIZER_FILE}; save the tokenizer with transformers' PreTrainedTokenizerFast",
            code="bad_model",
        )
    chat = _chat(folder, config)
    check_template(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
    written = {CONFIG: config, CHAT_FILE: chat, **(_processor(folder) if sees(config) else {})}
    files = {name: workdir / f"written-{name}" for name in written}
    for name, value in written.items():
        files[name].write_bytes(json.dumps(value, sort_keys=True).encode())
    files |= {path.name: path.resolve() for path in weights}
    files[TOKENIZER_FILE] = (folder / TOKENIZER_FILE).resolve()
    if (folder / INDEX).is_file():
        files[INDEX] = (folder / INDEX).resolve()
    tell(0.2, "reading it through")
    manifest = Manifest(
        task=TASK,
        runtime=TRANSFORMERS,
        algorithm=str(config["model_type"])[:100],
        signature=TEXT_GENERATION,
        files={name: PackageFile.of(path) for name, path in files.items()},
        lineage={
            "format": "safetensors",
            "context_length": chat["context_length"],
            "token_bytes": _token_bytes(_language(config)),
            **({"images": True} if sees(config) else {}),
        },
        licence=licence or licence_of(folder),
    )
    tell(0.6, "trying it out")
    _try_out(manifest, files, threads)
    return manifest, files


def check_decoder(manifest: Manifest, files: dict[str, Path], threads: int = 1) -> None:
    """The same for a package that comes whole."""
    data = {CONFIG, CHAT_FILE, TOKENIZER_FILE}
    processor = set(files) & set(PROCESSOR_FILES)
    others = set(files) - data - {INDEX} - processor
    weights = [name for name in others if _WEIGHTS.fullmatch(name)]
    sound = data <= set(files) and weights and len(weights) == len(others)
    if not sound or manifest.signature != TEXT_GENERATION or manifest.task != TASK:
        raise InvalidInput("this is not a sound package of a language model; export it again", code="bad_package")
    config, chat = read_json(files[CONFIG]), read_json(files[CHAT_FILE])
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("model_type"), str)
        or _data(config) != config
        or (manifest.lineage.get("images") is True and not (sees(config) and processor))
    ):
        raise InvalidInput(f"{CONFIG} is not as it was written; export the package again", code="bad_package")
    if (
        not isinstance(chat, dict)
        or not all(isinstance(chat.get(name), str) for name in ("template", "bos", "eos"))
        or not all(isinstance(id, int) for id in chat.get("ends") or [None])
    ):
        raise InvalidInput(f"{CHAT_FILE} is not as it was written; export the package again", code="bad_package")
    for name in processor:
        settings = read_json(files[name])
        if not isinstance(settings, dict) or _data(settings) != settings:
            raise InvalidInput(f"{name} is not as it was written; export the package again", code="bad_package")
    _check_config(config)
    for name in weights:
        check_safetensors(files[name])
    check_template(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"])
    _try_out(manifest, files, threads)


def sees(config: dict[str, Any]) -> bool:
    """Whether the model of this config takes images."""
    return isinstance(config.get("vision_config"), dict)


def _language(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of what makes the text; those of a vision model are one level deeper."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _data(value: Any) -> Any:
    """The same without what would run or fetch code, at every level."""
    if isinstance(value, dict):
        return {name: _data(inner) for name, inner in value.items() if name not in _CODE}
    return [_data(inner) for inner in value] if isinstance(value, list) else value


def _processor(folder: Path) -> dict[str, Any]:
    """The files that say how images become pixels and tokens, by name."""
    found = {name: read_json(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()}
    if not set(PROCESSOR_FILES[:2]) & set(found):
        raise InvalidInput(
            f"the model takes images, and the folder has no {PROCESSOR_FILES[1]}; save its processor beside it by "
            "processor.save_pretrained(FOLDER)",
            code="bad_model",
        )
    for name, value in found.items():
        if not isinstance(value, dict):
            raise InvalidInput(f"{name} is not an object", code="bad_model")
        found[name] = {key: inner for key, inner in _data(value).items() if key != "chat_template"}
    settings = found.setdefault(PROCESSOR_FILES[2], {})
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # tokenizer.json as it is, as text alone is read
    return found


def _check_config(config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        raise InvalidInput(
            "quantised safetensors are not read; take the model in its original precision, or a GGUF file of it",
            code="unsupported_model",
        )


def _try_out(manifest: Manifest, files: dict[str, Path], threads: int) -> None:
    """InvalidInput unless two calls of different length that run together are answered, one of them with an image where
    the model takes images; that answer must be what transformers' `generate` says."""
    by_digest = {manifest.files[name].digest: path for name, path in files.items()}
    runtime = TransformersRuntime()
    sees = manifest.lineage.get("images") is True
    runtime.load(Package(manifest, by_digest.__getitem__), threads, slots=2, context=None if sees else 512)
    try:
        texts = ("Hello", "Hello, and good morning to everybody")
        _run(runtime, [Tensor("prompt", "BYTES", [1], pack_bytes([text])) for text in texts])
        if sees:
            messages = _shown()
            seen = Tensor("messages", "BYTES", [1], pack_bytes([json.dumps(messages)]))
            alone, _ = _run(runtime, [seen])[0], _run(runtime, [seen, Tensor("prompt", "BYTES", [1], pack_bytes(["Hello"]))])
            said = runtime.generated(messages, len(alone))
            if said != alone[: len(said)]:
                raise InvalidInput(
                    "with an image this model does not answer here as by transformers' generate; its architecture "
                    f"({manifest.algorithm}) is not served",
                    code="unsupported_model",
                )
    finally:
        runtime.close()


def _run(runtime: TransformersRuntime, prompts: list[Tensor]) -> list[list[int]]:
    """The first tokens of the answers to calls that run together."""
    for number, prompt in enumerate(prompts):
        params = {"max_tokens": 3, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        runtime.admit(number, [prompt], params, False)
    found: list[list[int]] = [[] for _ in prompts]
    while len(runtime):
        for index, item, _ in runtime.step(10.0):
            if not isinstance(item, list):
                reason = getattr(item, "message", "no answer")
                raise InvalidInput(f"the model does not generate text here: {reason}", code="bad_model")
            found[int(str(index))] = [one["id"] for one in json.loads(unpack_bytes(item[3].data)[0])]
    return found


def _shown() -> list[dict[str, Any]]:
    """A message with an image of many colours."""
    file = io.BytesIO()
    pillow().linear_gradient("L").rotate(30).convert("RGB").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": parts}]


def _chat(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What chat.json holds. An empty template: the folder brought none, ChatML is used."""
    settings = read_json(folder / "tokenizer_config.json", {})
    if not isinstance(settings, dict):
        raise InvalidInput("tokenizer_config.json is not an object", code="bad_model")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((it.get("template") for it in template if isinstance(it, dict) and it.get("name") == "default"), "")
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        template = beside.read_bytes()[: 4 * MAX_TEMPLATE].decode("utf-8", "replace")
    generation = read_json(folder / "generation_config.json", {})
    return {
        "template": template if isinstance(template, str) else "",
        "bos": _token(settings.get("bos_token")),
        "eos": _token(settings.get("eos_token")),
        "ends": _ends(folder, config, generation if isinstance(generation, dict) else {}, _token(settings.get("eos_token"))),
        "context_length": _number(_language(config), "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"),
    }


def _ends(folder: Path, config: dict[str, Any], generation: dict[str, Any], eos: str) -> list[int]:
    """The ids of the tokens that end an answer."""
    found: list[Any] = [load(read_json(folder / TOKENIZER_FILE), TOKENIZER_FILE).token_to_id(eos)]
    for value in (generation.get("eos_token_id"), config.get("eos_token_id"), _language(config).get("eos_token_id")):
        found += value if isinstance(value, list) else [value]
    return sorted({one for one in found if isinstance(one, int) and not isinstance(one, bool) and one >= 0})


def _token(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _token_bytes(config: dict[str, Any]) -> int:
    """Bytes of one token's keys and values in 32 bits; 0 when the config does not tell."""
    layers = _number(config, "num_hidden_layers", "n_layer") or 0
    heads = _number(config, "num_attention_heads", "n_head") or 0
    width = _number(config, "hidden_size", "n_embd") or 0
    kept = _number(config, "num_key_value_heads") or heads
    size = _number(config, "head_dim") or (width // heads if heads else 0)
    return 4 * 2 * layers * kept * size


def _number(config: dict[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)
