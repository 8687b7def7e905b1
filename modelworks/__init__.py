"""Modelworks: make models and put them to work. `from modelworks import Client`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelworks.client import AsyncClient, Client
    from modelworks.core.errors import (
        Conflict,
        DeadlineExceeded,
        Forbidden,
        InvalidInput,
        ModelworksError,
        NotFound,
        PayloadTooLarge,
        RateLimited,
        Unauthenticated,
        Unavailable,
    )

    __version__: str

__all__ = [
    "AsyncClient",
    "Client",
    "Conflict",
    "DeadlineExceeded",
    "Forbidden",
    "InvalidInput",
    "ModelworksError",
    "NotFound",
    "PayloadTooLarge",
    "RateLimited",
    "Unauthenticated",
    "Unavailable",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Loaded at first use, so that `import modelworks` stays light in the server's processes."""
    if name in ("Client", "AsyncClient"):
        from modelworks import client

        return getattr(client, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("modelworks")
    if name in __all__:
        from modelworks.core import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
