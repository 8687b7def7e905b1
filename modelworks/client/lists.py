"""Paths and pages, as every resource uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from modelworks.client.transport import Request, Transport
from modelworks.core.types import Noun, Page

N = TypeVar("N", bound=Noun)


def path(template: str, *parts: object) -> str:
    """Fill in `{}`, so that a name with a slash or dots stays one segment."""
    return template.format(*(_segment(str(part)) for part in parts))


def _segment(text: str) -> str:
    quoted = quote(text, safe="")
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted


async def page(
    http: Transport,
    where: str,
    noun: type[N],
    *,
    limit: int | None = None,
    after: str | None = None,
    query: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Page[N]:
    asked = {"limit": limit, "after": after, **(query or {})}
    found = await http.json(Request("GET", where, query=asked, headers=headers or {}))
    items = [http.validate(noun, item) for item in found["data"]]
    return Page(items=items, has_more=bool(found.get("has_more")))
