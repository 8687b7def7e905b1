"""Packages as one file: export, import within bounds, and telling by its content what an upload is. Pickle never
passes.
"""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

from modelworks.core.embedding import EMBEDDING, RERANK
from modelworks.core.errors import InvalidInput, PayloadTooLarge, UnsupportedMedia
from modelworks.core.tasks import ADAPTER
from modelworks.ml.adapter_import import RUNTIME as ADAPTER_RUNTIME
from modelworks.ml.adapter_import import check_adapter, import_peft, is_adapter
from modelworks.ml.data.archives import zip_directory
from modelworks.ml.decoder_import import TASK as GENERATION
from modelworks.ml.decoder_import import check_decoder, import_decoder, sees
from modelworks.ml.folder import ADAPTER_CONFIG, CONFIG, config_of, stage
from modelworks.ml.llm_import import check_llama, import_gguf
from modelworks.ml.onnx_import import check_onnx, import_onnx
from modelworks.ml.package import Manifest, Package
from modelworks.ml.runtimes.onnx import MODEL_FILE
from modelworks.ml.runtimes.parity import replay_parity
from modelworks.ml.runtimes.registry import RUNTIMES

__all__ = ["check_package", "export_package", "import_folder", "import_gguf", "import_onnx", "import_package", "sniff"]

MANIFEST = "manifest.json"
MAX_MANIFEST = 64 * 1024**2
MAX_ENTRIES = 1000
MAX_DIRECTORY = 1024**2  # bytes of a ZIP's table of contents
MAX_PACKAGE = 64 * 1024**3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_BLOCK = 1024**2
_ACCEPTED = (
    "upload an ONNX file, a GGUF model or LoRA adapter, a ZIP of a model's folder (config.json, safetensors, tokenizer) "
    "or of a LoRA adapter's as PEFT saves it, or a package that was exported from here"
)


def export_package(manifest: Manifest, locate: Callable[[str], Path], out: Path) -> None:
    """Write `manifest` and its files to `out` as one ZIP: stored, in order, without times, so equal packages are equal
    bytes.
    """
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(MANIFEST), manifest.canonical())
        for name, file in sorted(manifest.files.items()):
            entry = _entry(f"files/{name}")
            entry.file_size = file.size
            with archive.open(entry, "w") as target, locate(file.digest).open("rb") as source:
                while block := source.read(_BLOCK):
                    target.write(block)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry


def import_package(
    path: Path, workdir: Path, *, max_bytes: int = MAX_PACKAGE, threads: int = 1
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files (name -> path in `workdir`) of an exported package, all checked.

    InvalidInput or PayloadTooLarge for anything but a package: other entries, links, names with paths, more bytes
    than the
    manifest declares, wrong digests, an unsafe graph, answers that differ from its parity samples. Nothing is
    written outside
    `workdir`, and no more than the manifest declares.
    """
    with path.open("rb") as file:
        _check_directory(file)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = _entries(archive)
                manifest = Manifest.parse(_bounded(archive, entries.pop(MANIFEST), MAX_MANIFEST))
                _check_manifest(manifest, set(entries), max_bytes)
                files = {
                    name: _unpack(archive, entries[f"files/{name}"], manifest, name, workdir)
                    for name in sorted(manifest.files)
                }
        except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, RuntimeError, OSError) as error:
            raise _bad(f"the archive is damaged ({str(error)[:100]})") from None
    check_package(manifest, files, threads)
    return manifest, files


def check_package(manifest: Manifest, files: dict[str, Path], threads: int = 1) -> None:
    """InvalidInput unless the graph is safe, loads, fits its signature and answers its parity samples."""
    if manifest.runtime == ADAPTER_RUNTIME:
        check_adapter(manifest, files)
        return
    if manifest.runtime not in RUNTIMES:
        raise _bad(f"it wants the runtime {manifest.runtime[:80]!r}, and there are {', '.join(RUNTIMES)}")
    if manifest.runtime in ("onnx", "encoder"):
        if MODEL_FILE not in files:
            raise _bad(f"it has no {MODEL_FILE}")
        check_onnx(files[MODEL_FILE])
    by_digest = {manifest.files[name].digest: path for name, path in files.items()}
    if manifest.runtime == "llama":
        check_llama(manifest, files, threads)
        return
    if manifest.runtime == "transformers":
        check_decoder(manifest, files, threads)
        return
    runtime = RUNTIMES.get(manifest.runtime)()
    runtime.load(Package(manifest, by_digest.__getitem__), threads)
    replay_parity(Package(manifest, by_digest.__getitem__), runtime)
    runtime.close()


def import_folder(
    path: Path,
    workdir: Path,
    *,
    task: str | None = None,
    licence: str | None = None,
    threads: int = 1,
    tell: Callable[[float, str], None] = lambda part, stage: None,
) -> tuple[Manifest, dict[str, Path]]:
    """The same from a model's folder, or a ZIP of one: config.json, safetensors and tokenizer; see folder.py."""
    folder = stage(path, workdir)
    found = task or (ADAPTER if is_adapter(folder) else _task_of(folder))
    if found == ADAPTER and is_adapter(folder):
        return import_peft(folder, workdir, licence=licence)
    if found in (EMBEDDING, RERANK):
        from modelworks.ml.encoder_import import import_encoder

        return import_encoder(folder, workdir, task=found, licence=licence, threads=threads)
    if found == GENERATION:
        return import_decoder(folder, workdir, licence=licence, threads=threads, tell=tell)
    raise InvalidInput(
        f"a model's folder is not served as {found[:80]!r}; name the task, one of {EMBEDDING}, {RERANK}, {GENERATION}",
        param="task",
        code="unsupported_model",
    )


def _task_of(folder: Path) -> str:
    """Told from what the folder holds."""
    named = config_of(folder).get("architectures") or [""]
    if (folder / "modules.json").is_file():
        return EMBEDDING
    if str(named[0]).endswith("ForSequenceClassification"):
        return RERANK
    if str(named[0]).endswith(("ForCausalLM", "LMHeadModel")) or (
        str(named[0]).endswith("ForConditionalGeneration") and sees(config_of(folder))
    ):
        return GENERATION
    return EMBEDDING if str(named[0]).endswith("Model") else str(named[0])


def _check_directory(file: BinaryIO) -> None:
    try:
        entries, length = zip_directory(file)
    except ValueError as error:
        raise _bad(str(error)) from None
    if entries > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise PayloadTooLarge(
            f"the archive lists {entries} entries; a package has at most {MAX_ENTRIES}", code="bad_package"
        )


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        folder, _, name = entry.filename.rpartition("/")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if (
            not (entry.filename == MANIFEST or (folder == "files" and _NAME.match(name)))
            or entry.orig_filename != entry.filename
        ):
            raise _bad(f"it holds {entry.orig_filename[:80]!r}, where only {MANIFEST} and files/NAME belong")
        if kind not in (0, stat.S_IFREG) or entry.flag_bits & 0x1 or entry.filename in entries:
            raise _bad(f"{entry.filename!r} is a link, a device, encrypted, or there twice")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a bound
            raise _bad(f"{entry.filename!r} is compressed by another method than deflate")
        entries[entry.filename] = entry
    if MANIFEST not in entries:
        raise _bad(f"it has no {MANIFEST}")
    return entries


def _check_manifest(manifest: Manifest, entries: set[str], max_bytes: int) -> None:
    wanted = {f"files/{name}" for name in manifest.files}
    if wanted != entries:
        raise _bad(f"its manifest and its files do not agree on {sorted(wanted ^ entries)[0][:100]!r}")
    total = sum(file.size for file in manifest.files.values())
    if total > max_bytes:
        raise PayloadTooLarge(f"the package unpacks to {total} bytes, more than {max_bytes}", code="bad_package")


def _bounded(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    with archive.open(entry) as source:
        data = source.read(limit + 1)
    if len(data) > limit:
        raise PayloadTooLarge(f"{entry.filename} is larger than {limit} bytes", code="bad_package")
    return data


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, manifest: Manifest, name: str, workdir: Path) -> Path:
    """Write one file, at most as long as the manifest says, and check its digest."""
    declared = manifest.files[name]
    target = workdir / name
    digest, left = hashlib.sha256(), declared.size
    with archive.open(entry) as source, target.open("wb") as out:
        while block := source.read(_BLOCK):
            left -= len(block)
            if left < 0:
                raise _bad(f"{name!r} is larger than its manifest says")
            digest.update(block)
            out.write(block)
    if left or digest.hexdigest() != declared.digest:
        raise _bad(f"{name!r} is not the file that its manifest names")
    return target


def _bad(why: str) -> InvalidInput:
    return InvalidInput(f"this is not a sound package: {why}; export it again", code="bad_package")


def sniff(path: Path) -> Literal["onnx", "gguf", "package", "folder"]:
    """What an upload is, told from its bytes. UnsupportedMedia names what it is instead, and what is accepted."""
    if path.is_dir():
        return "folder"
    with path.open("rb") as file:
        head = file.read(512)
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"):
            return _sniff_zip(file)
    if head[:4] == b"GGUF":
        return "gguf"
    # an ONNX file starts with its field ir_version, a small number
    if len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 0x40:
        return "onnx"
    raise UnsupportedMedia(f"this file is {_known(head)}; {_ACCEPTED}", code="unsupported_model_format")


def _sniff_zip(file: BinaryIO) -> Literal["package", "folder"]:
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError):
        raise _bad("the archive is damaged") from None
    if MANIFEST in names:
        return "package"
    files = {name.rpartition("/")[2] for name in names if name.count("/") < 2}
    if files & {CONFIG, ADAPTER_CONFIG} and any(name.endswith(".safetensors") for name in files):
        return "folder"
    if any(name.endswith("data.pkl") for name in names):
        what = "a PyTorch checkpoint (pickle, which can run code)"
    elif any(name.endswith((".weights.h5", "model.h5")) for name in names):
        what = "a Keras archive"
    elif names and all(name.endswith(".npy") for name in names):
        what = "a NumPy archive"
    else:
        what = f"a ZIP archive without {MANIFEST}"
    raise UnsupportedMedia(f"this file is {what}; {_ACCEPTED}", code="unsupported_model_format")


_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 or Keras file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "compressed by gzip (joblib does that with pickles)"),
    (b"BZh", "compressed by bzip2 (joblib does that with pickles)"),
    (b"\xfd7zXZ", "compressed by xz (joblib does that with pickles)"),
    (b"\x04\x22\x4d\x18", "compressed by lz4 (joblib does that with pickles)"),
    (b"ZF", "a compressed joblib file (pickle, which can run code)"),
)
_OLD_PICKLE = re.compile(rb"\A(?:\(|\]|\}|c[\w.]+\n[\w.]+\n|[ISFVLN])")


def _known(head: bytes) -> str:
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return "a pickle (also joblib and old PyTorch files), which can run code"
    if len(head) > 1 and head[0] == 0x78 and (head[0] * 256 + head[1]) % 31 == 0:
        return "compressed by zlib (joblib does that with pickles)"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100 * 1024**2:
        return "a safetensors file without its config.json"
    if _OLD_PICKLE.match(head):
        return "a text, or a pickle of an old protocol"
    return "in no format that is known here" if head else "empty"
