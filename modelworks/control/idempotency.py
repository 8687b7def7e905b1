"""Creates that may be sent twice: the first answer is kept in the same transaction as the create, for 24 hours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

from modelworks.core.errors import Conflict, IdempotencyMismatch, InvalidInput
from modelworks.core.types import Caller, IdempotencyRecord, Noun
from modelworks.store.catalog import Tx

N = TypeVar("N", bound=Noun)
LIFETIME = 86_400.0


def create_once(tx: Tx, caller: Caller, route: str, body: Any, cls: type[N], make: Callable[[], N]) -> N:
    """What `make` creates, or what an earlier call with the same Idempotency-Key and the same `body` created.

    `body` is the parsed content (JSON values). The same key with another body is IdempotencyMismatch (422). When the
    answer was deleted: Conflict.
    """
    key = caller.idempotency_key
    if not key:
        return make()
    if len(key) > 255:
        raise InvalidInput("an Idempotency-Key has at most 255 characters", param="Idempotency-Key")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
    scope = f"{caller.principal.key_id} {route}"
    known = tx.find(IdempotencyRecord, project_id=caller.project_id, scope=scope, key=key)
    if known and known.created_at > tx.now() - LIFETIME:
        if known.body_digest != digest:
            raise IdempotencyMismatch(
                "this Idempotency-Key was used with another body; send a new key for a new request",
                param="Idempotency-Key",
            )
        answer = tx.find(cls, id=known.answer_id)
        if answer is None:
            raise Conflict(
                "what this Idempotency-Key created was deleted since; send a new key to create it anew",
                code="answer_deleted",
                param="Idempotency-Key",
            )
        return answer
    if known:
        tx.delete(known)
    made = make()
    tx.add(IdempotencyRecord(project_id=caller.project_id, scope=scope, key=key, body_digest=digest, answer_id=made.id))
    return made
