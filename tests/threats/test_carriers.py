"""Row 5: auth that depends on the carrier. The same key gets the same verdict however it comes, and only one way in."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from modelworks.core.types import Role
from modelworks.security import policy
from tests.test_e2e_lifecycle import ROW
from tests.threats.conftest import Estate
from tests.threats.probe import Wire, head
from tests.threats.walk import Way, guarded

NOTHING = "content-type: application/x-nothing"  # no route takes it: what is allowed ends here, before anything is done
REFUSED = {"none", "garbage", "short", "revoked", "expired", "disabled", "unknown"}

# ways in which the one header may be spelled; all are the same to HTTP
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as documented": lambda key: f"Authorization: Bearer {key}",
    "lower case": lambda key: f"authorization: bearer {key}",
    "upper case": lambda key: f"AUTHORIZATION: BEARER {key}",
    "odd case": lambda key: f"aUTHORIZATION:bEARER {key}",
    "no blank": lambda key: f"authorization:Bearer {key}",
    "blanks before": lambda key: f"authorization:   Bearer {key}",
    "blanks within": lambda key: f"authorization: Bearer   {key}",
}
MANNERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "HTTP/1.1": ("1.1", ()),
    "HTTP/1.1, closing": ("1.1", ("connection: close",)),
    "HTTP/1.0": ("1.0", ()),
    "HTTP/1.0, kept": ("1.0", ("connection: keep-alive",)),
    "with other headers": ("1.1", ("accept: */*", "x-request-id: mine", "cookie: a=b", "accept-encoding: gzip")),
    "absolute": ("1.1", ()),
    "announcing": ("1.1", ("expect: 100-continue",)),
}


def secrets(estate: Estate) -> dict[str, str]:
    wrong = {"garbage": "x" * 46, "short": estate.server.key[:-1], "unknown": "mw_" + "A" * 43, "none": ""}
    return estate.keys | wrong


def power(who: str) -> frozenset[str]:
    """What the key of `who` may do, by the policy table."""
    if who in REFUSED:
        return frozenset()
    if who == "narrow":
        return policy.granted("developer", "default", scopes=["data:read", "invoke"])
    if who == "user":
        return policy.granted("admin", "default", member="developer")
    role: Role = "invoke-only" if who == "listed" else who.removeprefix("other-")  # type: ignore[assignment]
    return policy.granted(role, "other" if who.startswith("other") else "default")


def verdict(who: str, way: Way) -> int:
    scope = policy.OPERATIONS[str(way.rule.operation)]
    if who in REFUSED:
        return 401
    return 415 if scope == policy.ANY_KEY or scope in power(who) else 403


def of_each_scope() -> list[Way]:
    """One route for each scope and method of it."""
    found: dict[tuple[str, str], Way] = {}
    for way in guarded():
        found.setdefault((policy.OPERATIONS[str(way.rule.operation)], way.method), way)
    return list(found.values())


def test_every_key_on_every_route(estate: Estate) -> None:
    with Wire(estate.server) as wire:
        for who, key in secrets(estate).items():
            for way in guarded():
                lines = (f"authorization: Bearer {key}", NOTHING) if key else (NOTHING,)
                answer = wire.ask(head(way.method, way.to(estate.values), None, *lines))
                assert answer.status == verdict(who, way), (who, str(way), answer.body[:300])


@pytest.mark.parametrize("manner", MANNERS)
def test_the_verdict_is_the_same_however_the_key_comes(estate: Estate, manner: str) -> None:
    version, more = MANNERS[manner]
    chosen = of_each_scope()
    for who, key in secrets(estate).items():
        for number, way in enumerate(chosen):
            spelling = list(SPELLINGS.values())[number % len(SPELLINGS)]
            lines = (spelling(key), NOTHING, *more) if key else (NOTHING, *more)
            target = way.to(estate.values)
            target = f"http://elsewhere{target}" if manner == "absolute" else target
            with Wire(estate.server) as wire:
                status = wire.ask(head(way.method, target, None, *lines, version=version)).status
                assert status == verdict(who, way), (who, manner, str(way))
                if way.method == "GET" and not way.rule.stream:
                    with Wire(estate.server) as other:
                        status = other.ask(head("HEAD", target, None, *lines, version=version)).status
                        assert status == verdict(who, way), (who, manner, "HEAD", way.path)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_key_the_first_time_and_from_memory(estate: Estate, spelling: str) -> None:
    for who in ("admin", "viewer", "revoked", "unknown"):
        key = secrets(estate)[who]
        for way in of_each_scope()[:12]:
            with Wire(estate.server) as wire:
                data = head(way.method, way.to(estate.values), None, SPELLINGS[spelling](key), NOTHING)
                assert [wire.ask(data).status for _ in range(2)] == [verdict(who, way)] * 2, (who, spelling, str(way))


def test_what_is_not_the_header_is_never_a_key(estate: Estate) -> None:
    key = estate.server.key
    basic = base64.b64encode(f"admin:{key}".encode()).decode()
    lines = [
        f"cookie: authorization=Bearer {key}", f"cookie: api_key={key}; session={key}", f"x-api-key: {key}",
        f"authorization: Basic {basic}", f"authorization: {key}", f"authorization: Token {key}",
        f"authorization: Bearer{key}", f"authorization: Bearer \"{key}\"", f"authorization: Bearer {key}, Bearer {key}",
        f"authorization: Bearer {key} {key}", f"authorization: Bearer {key.upper()}", f"authorization: Bearer {key[::-1]}",
        f"authorization: Bearer {key}\x00", f"authorization: Bearer\t{key}", f"proxy-authorization: Bearer {key}",
        f"authorization : Bearer {key}", f"x-authorization: Bearer {key}", f"authorization: \xa0Bearer {key}",
        f"sec-websocket-protocol: bearer.{key}", f"x-forwarded-authorization: Bearer {key}", f"api-key: {key}",
        f"x: y\r\n authorization: Bearer {key}", f"x: y\n\tauthorization: Bearer {key}", f"Authorization\t: Bearer {key}",
    ]  # fmt: skip
    for line in lines:
        with Wire(estate.server) as wire:
            status = wire.ask(head("GET", "/api/v1/whoami", None, line)).status
            assert status in (400, 401), (line, status)
    query = ("api_key", "key", "token", "access_token", "authorization", "Authorization")
    for target in (*(f"/api/v1/whoami?{name}={key}" for name in query), f"/api/v1/whoami?authorization=Bearer%20{key}"):
        with Wire(estate.server) as wire:
            assert wire.ask(head("GET", target)).status == 401, target
            assert wire.ask(head("GET", f"http://admin:{key}@x{target}")).status == 401, target


def test_a_key_in_the_body_or_a_trailer_is_no_key(estate: Estate) -> None:
    key = estate.server.key
    form = f"access_token={key}&name=x".encode()
    media = ("content-type: application/x-www-form-urlencoded", f"content-length: {len(form)}")
    with Wire(estate.server) as wire:
        assert wire.ask(head("POST", "/api/v1/datasets", None, *media) + form).status == 401
    trailer = b"0\r\nauthorization: Bearer " + key.encode() + b"\r\n\r\n"
    lines = ("transfer-encoding: chunked", "trailer: authorization", "content-type: application/json")
    with Wire(estate.server) as wire:
        assert wire.ask(head("POST", "/api/v1/keys", None, *lines) + trailer).status == 401


def test_two_headers_are_none(estate: Estate) -> None:
    """Which of the two counted would depend on who looks."""
    good, bad = (f"authorization: Bearer {estate.keys[who]}" for who in ("admin", "revoked"))
    for lines in ((good, bad), (bad, good), (good, good), (good, "authorization:"), ("authorization:", good)):
        with Wire(estate.server) as wire:
            assert wire.ask(head("GET", "/api/v1/whoami", None, *lines)).status == 401, lines


def test_a_connection_remembers_nobody(estate: Estate) -> None:
    """A good call opens nothing for what follows it, one by one or all at once."""
    keys = secrets(estate)
    order = ("admin", "none", "admin", "revoked", "viewer", "unknown", "admin", "other-admin", "none")
    expected = [401 if who in REFUSED else 200 for who in order]
    asked = [head("GET", "/api/v1/whoami", keys[who] or None) for who in order]
    with Wire(estate.server) as wire:
        assert [wire.ask(data).status for data in asked] == expected
    # all of them before any answer
    last = head("GET", "/health", None, "connection: close")
    with Wire(estate.server) as wire:
        wire.send(b"".join([*asked, last]))
        received = b""
        while chunk := wire.socket.recv(65536):
            received += chunk
    statuses = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [*expected, 200]
    assert received.count(estate.other.encode()) == 1, "each answer is its own key's"


def test_a_request_that_hides_in_a_body_is_not_run(estate: Estate) -> None:
    hidden = head("DELETE", "/api/v1/deployments/iris", estate.server.key)
    for lines in (
        ("transfer-encoding: chunked", "content-length: 5"),
        ("content-length: 5", "transfer-encoding: chunked"),
        ("transfer-encoding: xchunked", "content-length: 5"),
        ("transfer-encoding: chunked", "transfer-encoding: identity", "content-length: 5"),
        ("content-length: 0", f"content-length: {len(hidden)}"),
        (f"content-length: +{len(hidden)}",),
        (f"content-length: 0x{len(hidden):x}",),
    ):
        with Wire(estate.server) as wire:
            wire.send(head("POST", "/api/v1/models", estate.keys["viewer"], *lines) + b"0\r\n\r\n" + hidden)
            received = b""
            wire.socket.settimeout(0.5)
            try:
                while chunk := wire.socket.recv(65536):
                    received += chunk
            except (TimeoutError, ConnectionResetError):
                pass
            assert b"HTTP/1.1 202" not in received, lines
    with estate.probe() as probe:
        assert probe.get("/api/v1/deployments/iris").json()["status"] == "ready"


def test_both_lanes_judge_alike(estate: Estate) -> None:
    """A prediction in each dialect, with everything that may or may not be in order about the key and the body."""
    tensors = [{"name": name, "shape": [1, 1], "datatype": "FP32", "data": [value]} for name, value in ROW.items()]
    bodies = {"/api/v1/deployments/iris/predict": {"inputs": [ROW]}, "/v2/models/iris/infer": {"inputs": tensors}}
    expected = dict.fromkeys(REFUSED, 401) | {"viewer": 403, "other-viewer": 403, "listed": 403}
    expected |= {"other-admin": 404, "other-developer": 404, "other-invoke-only": 404}
    for path, body in bodies.items():
        for who, key in secrets(estate).items():
            headers = {"authorization": f"Bearer {key}"} if key else {}
            with estate.probe(None) as probe:
                fast = probe.post(path, json=body, headers=headers)
                slow = probe.post(path, json=body, headers=headers | {"idempotency-key": "x"})
                elsewhere = probe.post(path, json=body, headers=headers | {"x-project": "default"})
                other = probe.post(
                    f"http://{probe.client.base_url.netloc.decode()}{path}?x=1", json=body, headers=headers
                )
            assert fast.status_code == slow.status_code == other.status_code == expected.get(who, 200), (who, path)
            refused = 403 if who.startswith("other") else expected.get(who, 200)
            assert elsewhere.status_code == refused, (who, path)
