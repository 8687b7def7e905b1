"""`models add`: where a model comes from, and what it takes to serve it."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modelworks.cli.text import size
from modelworks.core.errors import InvalidInput, MissingExtra, NotFound, Unavailable
from modelworks.core.tasks import GENERATION

if TYPE_CHECKING:
    from modelworks.cli.session import Session
    from modelworks.core.types import ModelVersion

_HUB = "hub:"
_SERVER = ("package:", "https://")


@contextmanager
def taken_in(session: Session, source: str) -> Iterator[tuple[Path | None, str | None]]:
    """The file to upload, or the source that the server fetches itself. A folder is packed, as it is, into one file."""
    if source.startswith(_SERVER):
        yield None, source
        return
    path = _from_hub(session, source.removeprefix(_HUB)) if source.startswith(_HUB) else Path(source).expanduser()
    if path.is_file():
        yield path, None
        return
    if not path.is_dir():
        raise NotFound(f"there is no file or folder {source[:200]!r}", param="source")
    with tempfile.TemporaryDirectory(prefix="modelworks-") as folder:
        packed = Path(folder) / f"{path.name or 'model'}.zip"
        _pack(path, packed)
        yield packed, None


def _pack(folder: Path, out: Path) -> None:
    from modelworks.ml.folder import ADAPTER_CONFIG, CONFIG, wanted

    found = [path for path in [*folder.glob("*"), *folder.glob("[0-9]_*/*")] if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in found}
    if not names.keys() & {CONFIG, ADAPTER_CONFIG}:
        ggufs = ", ".join(sorted(name for name in names if name.endswith(".gguf"))[:5])
        more = f"; it has {ggufs}: name one of these files" if ggufs else ""
        raise InvalidInput(f"the folder {folder.name!r} has no {CONFIG}{more}", param="source")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, path in sorted(names.items()):
            if wanted(name):
                archive.write(path, name)


def _from_hub(session: Session, name: str) -> Path:
    """A snapshot of a repository of the Hugging Face hub: known data files only; resumed and verified by its client."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtra("hub: sources need huggingface_hub; pip install 'modelworks[llm]'") from None
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "[0-9]_*/*"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=wanted))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        if isinstance(error, errors.HFValidationError):
            raise InvalidInput(f"{name[:100]!r} is no repository; write hub:OWNER/NAME", param="source") from None
        raise NotFound(f"the hub has no repository {name[:100]!r}, or it needs a login", param="source") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        raise Unavailable(
            f"the hub cannot be reached from here; where there is a network, run: hf download {name}, "
            "then give the folder's path"
        ) from None


def takes(version: ModelVersion, context: int) -> str:
    """What a language model needs on this machine, in words; "" for other models."""
    per_token = version.lineage.get("token_bytes")
    if version.task != GENERATION or not isinstance(per_token, int):
        return ""
    context = min(context, version.lineage.get("context_length") or context)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needs = version.size + context * per_token
    fits = max(0, (here - version.size) // max(1, context * per_token))
    return (
        f"serving it takes {size(version.size)} of weights and {size(context * per_token)} of cache for each call of "
        f"{context} tokens: {size(needs)} of the {size(here)} here, which hold {fits} such calls"
    )
