"""The entries of a call's metadata as grpcio makes them in the loop: plain pairs, and not more than are sensible.

Until a client has acknowledged our settings grpc bounds its headers by 16 MiB alone, and when the connection breaks, even
in headers that never ended, all that came is handed over: 100,000 entries and more, each a named tuple.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from grpc._cython import cygrpc

MAX = 1024  # entries of one call; the 16 KiB that grpc allows an orderly client hold fewer

_made = 0
_loop = 0  # the thread of the server's loop; what clients in other threads of this process receive is not counted


def bound() -> None:
    """From now on, in the loop that calls it. grpcio has no setting for it; where it has no such name this changes nothing."""
    global _loop
    _loop = threading.get_ident()
    cygrpc._Metadatum = _pair


def _pair(name: str, value: Any) -> tuple[str, Any]:
    global _made
    if threading.get_ident() != _loop:
        return name, value
    _made += 1
    if _made > MAX:
        _made = 0
        raise asyncio.CancelledError  # which grpcio takes for the caller's: it ends the call without a word
    return name, value


def begin() -> None:
    """The entries of one call are all there; count those of the next."""
    global _made
    _made = 0
