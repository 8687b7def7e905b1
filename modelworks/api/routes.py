"""How a route is declared: with its operation from the policy table, the body it takes, its examples and its errors.

    routes = Routes("Datasets")

    @routes.get("/api/v1/datasets", "datasets.list", "List datasets", answer=page("Dataset"))
    def list_datasets(...): ...

Without an operation of the policy table a route cannot be registered. The guard reads the same declarations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import Depends, FastAPI, Query
from fastapi import Path as PathParam
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from modelworks.api import schemas
from modelworks.api.body import StrictRoute
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import ALIAS_PATTERN, NAME_PATTERN
from modelworks.core.types import Caller
from modelworks.security import policy

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Body = Literal["none", "json", "infer", "form"]
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")


@dataclass(frozen=True)
class Rule:
    """What the guard must know of a route. `operation` None: public. `infer`: JSON that may be large or compressed;
    with `binary`, raw bytes may follow the JSON where a header says how long that is; with `multipart`, a form may
    come in its place."""

    operation: str | None
    body: Body = "none"
    stream: bool = False
    binary: bool = False
    multipart: bool = False


@dataclass(frozen=True)
class Declared:
    method: str
    path: str
    rule: Rule
    endpoint: Callable[..., Any]
    options: dict[str, Any]


class Routes:
    """The routes of one part of the API, which share a tag and the form of their errors (`dialect`)."""

    def __init__(self, tag: str, dialect: Literal["native", "oip", "openai"] = "native") -> None:
        self.tag = tag
        self.dialect = dialect
        self.declared: list[Declared] = []

    def get(self, path: str, operation: str, summary: str, **more: Any) -> Callable[[Endpoint], Endpoint]:
        return self.add("GET", path, operation, summary, **more)

    def post(self, path: str, operation: str, summary: str, **more: Any) -> Callable[[Endpoint], Endpoint]:
        return self.add("POST", path, operation, summary, **more)

    def put(self, path: str, operation: str, summary: str, **more: Any) -> Callable[[Endpoint], Endpoint]:
        return self.add("PUT", path, operation, summary, **more)

    def delete(self, path: str, operation: str, summary: str, **more: Any) -> Callable[[Endpoint], Endpoint]:
        return self.add("DELETE", path, operation, summary, **more)

    def add(
        self,
        method: str,
        path: str,
        operation: str,
        summary: str,
        *,
        answer: dict[str, Any],
        status: int = 200,
        also: dict[int, dict[str, Any]] | None = None,
        errors: tuple[int, ...] = (),
        body: Body = "none",
        request: Any = None,
        request_body: dict[str, Any] | None = None,
        creates: bool = False,
        stream: bool = False,
        binary: bool = False,
        multipart: bool = False,
    ) -> Callable[[Endpoint], Endpoint]:
        """Declare a route.

        `answer`: a content object from `schemas` (media type -> schema and example); `also`: those of other good
        statuses; `errors`: the statuses beside those that every such route may answer; `request`: an example of the
        JSON body; `request_body`: the whole OpenAPI request body, where FastAPI cannot derive it; `creates`: takes an
        Idempotency-Key.
        """

        def declare(endpoint: Endpoint) -> Endpoint:
            options = {
                "summary": summary,
                "tags": [self.tag],
                "status_code": status,
                "operation_id": endpoint.__name__,
                "responses": schemas.responses(
                    self.dialect, {status: answer, **(also or {})}, {*errors, *_usual(path, body)}, operation
                ),
                "openapi_extra": schemas.extra(request, request_body, creates=creates),
            }
            self.declared.append(Declared(method, path, Rule(operation, body, stream, binary, multipart), endpoint, options))
            return endpoint

        return declare

    def mount(self, app: FastAPI, table: RouteTable) -> None:
        """Register every declared route with FastAPI and with the guard's table."""
        for route in self.declared:
            if route.rule.operation not in policy.OPERATIONS:
                raise ValueError(
                    f"{route.method} {route.path} has no operation of the policy table: {route.rule.operation!r}"
                )
            app.router.add_api_route(
                route.path,
                route.endpoint,
                methods=[route.method],
                response_class=Response,
                response_model=None,
                route_class_override=StrictRoute,
                strict_content_type=False,
                **route.options,
            )
            table.add(route.method, route.path, route.rule)


class RouteTable:
    """Path and method -> Rule, for the guard. Literal paths by dictionary, the others by regular expression."""

    def __init__(self) -> None:
        self._literal: dict[str, dict[str, Rule]] = {}
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, Rule]]] = {}

    def add(self, method: str, path: str, rule: Rule) -> None:
        if "{" not in path:
            self._literal.setdefault(path, {})[method] = rule
            return
        pattern, _, _ = compile_path(path)
        self._patterns.setdefault(path, (pattern, {}))[1][method] = rule

    def match(self, path: str) -> dict[str, Rule] | None:
        """The rules by method of the route at `path`; None when there is nothing."""
        found = self._literal.get(path)
        if found is not None:
            return found
        for pattern, rules in self._patterns.values():
            if pattern.match(path):
                return rules
        return None

    def __iter__(self) -> Any:
        """(path, method, rule) of all routes."""
        for path, rules in self._literal.items():
            yield from ((path, method, rule) for method, rule in rules.items())
        for path, (_, rules) in self._patterns.items():
            yield from ((path, method, rule) for method, rule in rules.items())


def _usual(path: str, body: Body) -> set[int]:
    """The errors that any route of this kind may answer, by what the guard and the parsing do."""
    statuses = {400, 401, 403, 429, 500, 503}
    if "{" in path:
        statuses.add(404)
    if body != "none":
        statuses |= {408, 413, 415}
    return statuses


# -- what endpoints take -----------------------------------------------------------------------------------------------


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


async def _caller(request: Request) -> Caller:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 255 and key.isprintable()):
        raise InvalidInput("an Idempotency-Key has 1 to 255 printable characters", param="Idempotency-Key")
    state = request.scope["state"]
    return Caller(state["principal"], state["request_id"], key)


Use = Annotated[Services, Depends(_services)]
Who = Annotated[Caller, Depends(_caller)]
NamePath = Annotated[str, PathParam(pattern=NAME_PATTERN, description="its name", examples=["iris"])]
AliasPath = Annotated[str, PathParam(pattern=ALIAS_PATTERN, description="the alias", examples=["champion"])]
VersionPath = Annotated[int, PathParam(ge=1, le=999_999_999, description="the version: 1, 2, 3...", examples=[1])]
IdPath = Annotated[
    str,
    PathParam(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its id", examples=["job_0198c0f4e1b25f3a9c0d1e2f"]),
]
Limit = Annotated[int, Query(ge=1, le=100, description="how many at most")]
After = Annotated[
    str | None,
    Query(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="the `last_id` of the page before, to go on from there"),
]


# -- what endpoints answer ---------------------------------------------------------------------------------------------


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body, enc_hook=str), status, headers, "application/json")


def accepted(body: Any, location: str) -> Response:
    """202: it goes on in the background; Location is where to look."""
    return answer(body, 202, {"location": location})


def listing(items: list[dict[str, Any]], has_more: bool = False) -> Response:
    """A page of a list, as OpenAI's lists are."""
    return answer(
        {
            "object": "list",
            "data": items,
            "first_id": items[0].get("id") if items else None,
            "last_id": items[-1].get("id") if items else None,
            "has_more": has_more,
        }
    )
