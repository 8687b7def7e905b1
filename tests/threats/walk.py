"""Walking the router: every route that the application declares, with real values for its path and a body that fits."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from modelworks.api.app import create_app
from modelworks.api.routes import Rule

PUBLIC = frozenset({"/health", "/docs", "/docs/start.js", "/docs/{asset}", "/openapi.json"})
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# what a path's parameter may be, where one value does for all routes; ids differ by collection and come from the estate
VALUES = {
    "name": "iris",
    "model": "iris",
    "version": "1",
    "alias": "threats",
    "project": "default",
    "asset": "start.js",
    "id": "resp_000000000000000000000000",  # where a collection has no id of its own: of OpenAI's API
}
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Way:
    """One route and method. `example`: the JSON body that the documentation shows, if it takes one."""

    method: str
    path: str
    rule: Rule
    example: Any = None
    schema: dict[str, Any] = field(default_factory=dict, compare=False)
    parameters: tuple[tuple[str, str], ...] = ()  # (place, name) of each, beside those of the path

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def names(self) -> list[str]:
        """The path's parameters."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]

    def to(self, values: Mapping[str, str]) -> str:
        """The path with `values`; a parameter that nobody knows a value for fails the test, so that it gets one."""
        path = self.path
        for name in self.names:
            value = values.get(f"{self.collection}.{name}", values.get(name))
            assert value is not None, f"{self}: tests/threats has no value for {name!r}; give it one in walk.py"
            path = path.replace(f"{{{name}}}", value)
        return path

    @property
    def collection(self) -> str:
        parts = self.path.split("/")
        return parts[3] if len(parts) > 3 else ""

    def body(self) -> Any:
        return copy.deepcopy(self.example)

    def request(self, body: Any = None) -> dict[str, Any]:
        """Keyword arguments for a client: a body of the kind that the route takes."""
        if self.rule.body in ("json", "infer"):
            return {"content": json.dumps(self.body() if body is None else body), "headers": JSON}
        if self.rule.body == "form":
            return {"data": {"name": "threats"}, "files": {"file": ("x.bin", b"x")}}
        return {}


@lru_cache(1)
def document() -> dict[str, Any]:
    return cast("dict[str, Any]", _application().inner.openapi())


@lru_cache(1)
def _application() -> Any:
    return create_app(cast(Any, None))  # routes are declared without services


@lru_cache(1)
def ways() -> tuple[Way, ...]:
    """All routes, the public ones too."""
    return tuple(_way(path, method, rule) for path, method, rule in _application().table)


def guarded() -> list[Way]:
    return [way for way in ways() if way.path not in PUBLIC]


def with_json() -> list[Way]:
    return [way for way in guarded() if way.rule.body in ("json", "infer")]


def table() -> Any:
    """The guard's table, and the router behind it."""
    return _application().table, _application().inner.router


def _way(path: str, method: str, rule: Rule) -> Way:
    operation = document()["paths"].get(path, {}).get(method.lower(), {})
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    parameters = tuple((item["in"], item["name"]) for item in operation.get("parameters", []) if item["in"] != "path")
    return Way(method, path, rule, content.get("example"), content.get("schema", {}), parameters)


# -- the inside of JSON ------------------------------------------------------------------------------------------------

Place = tuple[str | int, ...]


def leaves(value: Any, kinds: tuple[type, ...], place: Place = ()) -> Iterator[Place]:
    """Where values of `kinds` stand in a JSON value."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, kinds, (*place, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, kinds, (*place, index))
    elif isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        yield place


def objects(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where objects stand in a JSON value, the value itself first."""
    if isinstance(value, dict):
        yield place
        for name, item in value.items():
            yield from objects(item, (*place, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from objects(item, (*place, index))


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy of `value` with `new` at `place`; what is missing on the way there is made."""
    if not place:
        return new
    step = place[0]
    if isinstance(step, int):
        items = list(value or ())
        items[step : step + 1] = [replaced(items[step] if step < len(items) else None, place[1:], new)]
        return items
    members = dict(value or {})
    members[step] = replaced(members.get(step), place[1:], new)
    return members


def declared(schema: dict[str, Any], kind: str, place: Place = ()) -> Iterator[Place]:
    """Where the schema of a body allows a value of the JSON type `kind`, also in fields that the example leaves out."""
    if len(place) > 6:
        return
    if reference := schema.get("$ref"):
        schema = document()["components"]["schemas"][reference.rpartition("/")[2]]
    for option in (*schema.get("anyOf", ()), *schema.get("allOf", ()), *schema.get("oneOf", ())):
        yield from declared(option, kind, place)
    if schema.get("type") == kind:
        yield place
    for name, inner in schema.get("properties", {}).items():
        yield from declared(inner, kind, (*place, name))
    if isinstance(schema.get("items"), dict) and schema["items"]:
        yield from declared(schema["items"], kind, (*place, 0))
