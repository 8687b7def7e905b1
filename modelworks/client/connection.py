"""Which server, with which key: arguments first, then MODELWORKS_URL and MODELWORKS_API_KEY, then the local home."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ValidationError

from modelworks.core.errors import InvalidInput, Unauthenticated, Unavailable
from modelworks.core.settings import Settings

KeySource = Literal["argument", "environment", "home"]
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Connection:
    """`key_file` is where the key was read from, when it came from the home folder of a local server."""

    url: str
    key: str = field(repr=False)
    key_source: KeySource
    key_file: Path | None = None

    @property
    def local(self) -> bool:
        return urlsplit(self.url).hostname in _LOOPBACK


def locate(url: str | None = None, api_key: str | None = None, home: str | Path | None = None) -> Connection:
    """Raises Unavailable when no server is known or the local one does not run, Unauthenticated when there is no key.

    A home's admin key is only ever given to the server of that home, never to another address.
    """
    settings = _settings(home)
    if home is not None and url is None:  # an argument, as good as the others
        settings = settings.model_copy(update={"url": None, "api_key": None})
    wanted = url or settings.url
    running = _running(settings.home_path)
    if wanted is None:
        wanted = _local_url(settings.home_path, running)
    wanted = _checked(wanted)
    if api_key or settings.api_key:
        return Connection(wanted, _key(api_key or settings.api_key or ""), "argument" if api_key else "environment")
    key_file = settings.home_path / "admin.key"
    if running is None or str(running["url"]).rstrip("/") != wanted:
        raise Unauthenticated(
            f"there is no key for {wanted}; give --api-key (api_key=...) or set MODELWORKS_API_KEY", code="no_key"
        )
    try:
        return Connection(wanted, _key(key_file.read_text()), "home", key_file)
    except OSError as error:
        raise Unauthenticated(
            f"cannot read {key_file} ({error.strerror}); give --api-key (api_key=...) or set MODELWORKS_API_KEY",
            code="no_key",
        ) from None


def _settings(home: str | Path | None) -> Settings:
    try:
        return Settings() if home is None else Settings(home=Path(home))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise InvalidInput(
            f"the environment variable MODELWORKS_{name.upper()} is not valid: {first['msg']}", param=name
        ) from None


def _running(home: Path) -> dict[str, Any] | None:
    """What the local server wrote about itself, when its process is alive."""
    try:
        address = json.loads((home / "server.json").read_text())
        os.kill(int(address["pid"]), 0)
    except PermissionError:
        pass  # alive, another user's
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return address if isinstance(address.get("url"), str) else None


def _local_url(home: Path, running: dict[str, Any] | None) -> str:
    if running is None:
        raise Unavailable(
            f"no server runs on {home}; start one with `modelworks up`, or name another with --url or MODELWORKS_URL",
            code="no_server",
        )
    return str(running["url"])


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise InvalidInput(f"{url[:200]!r} is not a server's address; write it as http://127.0.0.1:8000", param="url")
    return url.rstrip("/")


def _key(text: str) -> str:
    key = text.strip()
    if not key.isascii() or not key.isprintable() or " " in key or not key:
        raise Unauthenticated("the API key has characters that no key has; copy it again", code="no_key")
    return key
