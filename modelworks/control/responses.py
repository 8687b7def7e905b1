"""Use cases on stored answers of the Responses API: kept for 30 days, in the project whose key asked."""

from __future__ import annotations

from typing import Any

from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.types import Caller, StoredResponse
from modelworks.store.catalog import Catalog, Tx

KEPT = 30 * 86_400.0  # seconds
MAX_CHAIN = 256  # answers that one conversation may go back


class Responses:
    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def keep(self, caller: Caller, response: StoredResponse) -> None:
        """On disk when it returns. What is older than KEPT goes."""
        with self._catalog.write() as tx:
            tx.add(response)
            table = tx.table(StoredResponse)
            tx.delete_where(
                StoredResponse,
                table.c.project_id == caller.project_id,
                table.c.created_at < tx.now() - KEPT,
            )

    def get(self, caller: Caller, id: str) -> StoredResponse:
        with self._catalog.read() as tx:
            return _find(tx, caller, id)

    def delete(self, caller: Caller, id: str) -> None:
        with self._catalog.write() as tx:
            tx.delete(_find(tx, caller, id))

    def history(self, caller: Caller, id: str) -> list[dict[str, Any]]:
        """The items of a conversation up to and with answer `id`, oldest first: what was asked and what was answered."""
        chain: list[StoredResponse] = []
        with self._catalog.read() as tx:
            wanted: str | None = id
            while wanted is not None:
                if len(chain) >= MAX_CHAIN:
                    raise InvalidInput(
                        f"the conversation goes back more than {MAX_CHAIN} answers; begin a new one with what matters of it",
                        param="previous_response_id",
                    )
                chain.append(_find(tx, caller, wanted, "previous_response_id"))
                wanted = chain[-1].previous_id
        return [item for one in reversed(chain) for item in (*one.input, *one.body["output"])]


def _find(tx: Tx, caller: Caller, id: str, param: str | None = None) -> StoredResponse:
    found = tx.find(StoredResponse, id=id, project_id=caller.project_id)
    if found is None:
        raise NotFound(
            f"there is no stored response {id[:80]!r}; it was deleted, is older than 30 days, or was made with store: false",
            code="response_not_found",
            param=param,
        )
    return found
