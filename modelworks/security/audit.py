"""Who changed what: a row for each change, written in the change's transaction. Never a key or a request's content."""

from __future__ import annotations

import math
import re
from typing import Any

from modelworks.core.types import AuditRecord, Caller
from modelworks.store.catalog import Tx

_KEY = re.compile(r"mw_[A-Za-z0-9_-]{20,}")
_MAX_TEXT = 500
_MAX_ITEMS = 50
_MAX_DEPTH = 4


def record(
    tx: Tx, caller: Caller, action: str, object: str, *, project_id: str | None = None, **detail: Any
) -> AuditRecord:
    """Note that `caller` did `action` (an operation of the policy table) to `object` (a name or id).

    `detail`: JSON values that say more; long ones are cut and anything that looks like a key is blotted out. The row
    belongs to the caller's project, or to `project_id` when the change was made to another one.
    """
    principal = caller.principal
    return tx.add(
        AuditRecord(
            project_id=project_id or caller.project_id,
            principal=principal.key_id,
            action=action,
            object=_text(object),
            request_id=_text(caller.request_id),
            detail={"key_name": _text(principal.key_name), **{name: _plain(value) for name, value in detail.items()}},
        )
    )


def _text(value: str) -> str:
    clean = _KEY.sub("mw_***", value)
    return clean if len(clean) <= _MAX_TEXT else clean[:_MAX_TEXT] + "..."


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as bounded JSON."""
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth < _MAX_DEPTH and isinstance(value, dict):
        return {_text(str(name)): _plain(item, depth + 1) for name, item in list(value.items())[:_MAX_ITEMS]}
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, depth + 1) for item in list(value)[:_MAX_ITEMS]]
    return _text(str(value))
