"""A model as the hubs keep it - config.json, safetensors, a tokenizer - from a folder or a ZIP of one, taken within bounds.

Only files that are known to be data are looked at: weights in pickle, code and anything else stay behind.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput, MissingExtra, NotFound, PayloadTooLarge

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
MAX_JSON = 64 * 1024**2
MAX_FOLDER = 256 * 1024**3
_RATIO = 100  # a ZIP unpacks to at most so many times its size
_WANTED = re.compile(
    r"(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|modules"
    r"|sentence_bert_config|config_sentence_transformers|processor_config|preprocessor_config|chat_template|adapter_config"
    r"|model\.safetensors\.index)\.json"
    r"|vocab\.txt|merges\.txt|(?:tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|README\.md"
    r"|(?:adapter_model|model(?:-\d{5}-of-\d{5})?)\.safetensors|[0-9]_[A-Za-z]{1,40}/(?:config\.json|model\.safetensors)"
)
_LICENCE = re.compile(r"^licen[cs]e:[ \t]*[\"']?([\w.+-]{1,100})", re.MULTILINE)


def wanted(name: str) -> bool:
    """Whether the file `name` ("1_Pooling/config.json") of a model's folder is looked at."""
    return _WANTED.fullmatch(name) is not None


def stage(source: Path, workdir: Path) -> Path:
    """A folder in `workdir` with the wanted files of the folder or ZIP `source`. InvalidInput without a config.json."""
    target = workdir / "model"
    target.mkdir()
    if source.is_dir():
        _link(source, target)
    else:
        _unpack(source, target)
    if not (target / CONFIG).is_file() and not (target / ADAPTER_CONFIG).is_file():
        raise InvalidInput(
            f"a model's folder has a {CONFIG} at its top, beside its safetensors; this one has none", code="bad_model"
        )
    return target


def read_json(path: Path, default: Any = None) -> Any:
    """`default` when there is no such file; InvalidInput when it is not sound JSON."""
    if not path.is_file():
        return default
    if path.stat().st_size > MAX_JSON:
        raise PayloadTooLarge(f"{path.name} has more than {MAX_JSON} bytes", code="bad_model")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InvalidInput(f"{path.name} is not JSON", code="bad_model") from None


def config_of(folder: Path) -> dict[str, Any]:
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise InvalidInput(f"{CONFIG} does not name its model_type", code="bad_model")
    return found


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files; InvalidInput when there are none, or one is cut off."""
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        raise NotFound(
            "the model's folder has no model.safetensors; other kinds of weights are not read, since they can run code",
            code="no_safetensors",
        )
    for path in found:
        check_safetensors(path)
    return found


def check_safetensors(path: Path) -> None:
    """InvalidInput unless the header is sound and every tensor lies inside the file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtra("this needs safetensors; pip install 'modelworks[llm]'") from None
    try:
        with safe_open(str(path), framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise InvalidInput(
            f"{path.name} is not a sound safetensors file: {str(error)[:200]}", code="bad_safetensors"
        ) from None


def licence_of(folder: Path) -> str | None:
    """The licence that the head of README.md names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        head = file.read(64 * 1024)
    if not head.startswith("---"):
        return None
    found = _LICENCE.search(head.partition("\n---")[0])
    return found[1] if found else None


def _link(source: Path, target: Path) -> None:
    for path in [*source.glob("*"), *source.glob("[0-9]_*/*")]:
        name = path.relative_to(source).as_posix()
        if wanted(name) and path.is_file():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).symlink_to(path.resolve())


def _unpack(source: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            entries = _entries(archive)
            total = sum(entry.file_size for entry in entries.values())
            if total > min(MAX_FOLDER, _RATIO * source.stat().st_size):
                raise PayloadTooLarge(f"the archive unpacks to {total} bytes, which is too much", code="bad_archive")
            for name, entry in entries.items():
                (target / name).parent.mkdir(exist_ok=True)
                with archive.open(entry) as packed, (target / name).open("wb") as out:
                    shutil.copyfileobj(packed, out, 1024**2)  # zipfile stops at the size that was announced
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, RuntimeError, OSError) as error:
        raise InvalidInput(f"the archive is damaged ({str(error)[:100]})", code="bad_archive") from None


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The wanted entries by name, below the one folder that all may lie in."""
    names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    tops = {name.partition("/")[0] for name in names}
    prefix = f"{next(iter(tops))}/" if len(tops) == 1 and CONFIG not in names else ""
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename.removeprefix(prefix)
        if not wanted(name):
            continue
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG) or name in found:
            raise InvalidInput(f"{name!r} is a link, a device, or there twice", code="bad_archive")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InvalidInput(f"{name!r} is compressed by another method than deflate", code="bad_archive")
        found[name] = entry
    return found
