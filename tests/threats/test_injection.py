"""Rows 11 and 12: shells, templates and SQL. What a client writes is data wherever it goes, and filters filter."""

from __future__ import annotations

import csv
import io
import re
import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from modelworks.core.specs import NAME_PATTERN
from tests.threats.conftest import Estate
from tests.threats.probe import Probe
from tests.threats.walk import Way, guarded, leaves, replaced, with_json

SQL = (
    "'", "''", '"', "`", "\\", "';--", "' OR '1'='1", "' OR 1=1 --", '" OR ""="', "') OR ('1'='1", "1 OR 1=1", "1' OR '1'='1' /*",
    "'; DROP TABLE keys; --", "'; DELETE FROM models; --", "'; UPDATE keys SET role='admin'; --", "'; ATTACH '/tmp/x' AS x; --",
    "' UNION SELECT digest FROM key --", "' UNION ALL SELECT NULL,NULL,NULL --", "x' AND (SELECT 1 FROM sqlite_master) --",
    "1; SELECT load_extension('x')", "' || (SELECT hex(randomblob(100000000))) || '", "' AND randomblob(1000000000) --",
    "'; SELECT pg_sleep(10); --", "' OR SLEEP(10) --", "admin'--", "%", "_", "%' OR '%'='", "*", "id) OR (1=1", "1e309", "-1",
    "\x00' OR 1=1", "\u2019 OR 1=1", "%27%20OR%201=1", "0x27", "CHAR(39)", "NULL", "null", "true", "[]", "{}", "$ne", "id DESC", "1--",
)  # fmt: skip


def commands(canary: Path) -> list[str]:
    """What some shell, template, format or spreadsheet would run; each would make the canary, or 49 of 7*7."""
    touch = f"touch {canary}"
    return [
        f";$({touch})", f"`{touch}`", f"$({touch})", f"| {touch}", f"; {touch} #", f"& {touch} &", f"\n{touch}\n", f"'; {touch}; '",
        f'"; {touch}; "', f"{{{{7*7}}}}{{{{cycler.__init__.__globals__.os.popen('{touch}')}}}}", "{{7*7}}", "${7*7}", "<%= 7*7 %>",
        "#{7*7}", "{7*7}", "{0.__class__.__mro__}", "%(password)s%n%s%x", "%s" * 20, f"=cmd|'/C {touch}'!A0", "@SUM(7*7)", "-7*7",
        f"__import__('os').system('{touch}')", f"exec(open('{canary}','w'))", "${jndi:ldap://127.0.0.1/x}", "<script>alert(1)</script>",
        "\"><img src=x onerror=alert(1)>", "javascript:alert(1)", "\x1b]0;x\x07\x1b[2J", "../../x", "--help", "-rf", "a=b", "a,b", 'a"b',
        "RUN curl x", "FROM scratch", "constructor", "__proto__", "__class__", "\u202egnp.x", "null", "NaN", "True",
    ]  # fmt: skip


# -- row 12 ------------------------------------------------------------------------------------------------------------


# free texts, which are kept as they are
FREE = {"users.create": {("name",)}, "oip.infer": {("id",)}, "datasets.edit": {("edits", 0, "value")}}


def filtered() -> list[tuple[Way, str]]:
    """Every list and every parameter that it takes in its query."""
    gets = [way for way in guarded() if way.method == "GET"]
    return [(way, name) for way in gets for place, name in way.parameters if place == "query"]


def catalog(estate: Estate) -> dict[str, int]:
    """Rows of each table; the file is read beside the server, as a thief would."""
    with sqlite3.connect(f"file:{estate.server.home}/catalog.sqlite?mode=ro", uri=True) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: db.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}


def test_the_walk_finds_the_filters() -> None:
    assert {name for _, name in filtered()} >= {"after", "limit", "status", "kind", "model"}


def test_no_filter_is_sql(estate: Estate) -> None:
    before = catalog(estate)
    slowest = 0.0
    with estate.probe() as probe:
        for way, name in filtered():
            if way.rule.stream:
                continue
            path = way.to(estate.values)
            for payload in SQL:
                began = time.monotonic()
                answer = probe.get(path, params={name: payload}, said=payload)
                slowest = max(slowest, time.monotonic() - began)
                if answer.status_code == 404 and str(way.rule.operation).startswith("openai."):
                    continue  # no response is stored on this server
                assert answer.status_code in (200, 400), (path, name, payload, answer.text[:300])
                if answer.status_code == 200 and not (name == "after" and payload.isalnum()):
                    # a filter that takes any text finds nothing of that name
                    assert answer.json()["data"] == [] or payload in ("_", "%"), (path, name, payload)
    assert slowest < 5
    after = catalog(estate)
    assert after.keys() == before.keys()
    assert after == before


def test_what_a_list_is_not_asked_for_changes_nothing(estate: Estate) -> None:
    """No filter, order or field slips in by a parameter that the route does not declare."""
    extra = {
        "sort": "digest", "order_by": "1;DROP TABLE key", "order": "desc", "fields": "digest", "filter": "1=1", "all": "true",
        "project_id": estate.other, "project": estate.other, "include": "digest", "q": "' OR 1=1", "id": "1", "where": "1=1",
    }  # fmt: skip
    with estate.probe("developer") as probe:
        for way in guarded():
            if way.method != "GET" or way.names or ("query", "limit") not in way.parameters:
                continue
            plain, asked = (probe.get(way.path, params=params) for params in ({}, extra))
            assert (plain.status_code, plain.content) == (
                asked.status_code,
                asked.content,
            ) or plain.status_code == 403, way.path


def test_no_name_and_no_header_is_sql(estate: Estate) -> None:
    before = catalog(estate)
    with estate.probe() as probe:
        for way in with_json():
            example = way.body()
            free = FREE.get(str(way.rule.operation), set())
            for place in set(leaves(example, (str,))) - free:
                for payload in SQL[::2]:
                    if re.fullmatch(NAME_PATTERN, payload):
                        continue
                    request = way.request(replaced(example, place, payload))
                    answer = probe.send(way.method, way.to(estate.values), said=payload, **request)
                    assert 400 <= answer.status_code < 500, (str(way), place, payload, answer.text[:300])
        for payload in SQL:
            if payload.isprintable() and payload.isascii():
                answer = probe.get("/api/v1/whoami", headers={"x-project": payload}, said=payload)
                assert answer.status_code == 404, (payload, answer.text)
    assert catalog(estate) == before


# -- row 11 ------------------------------------------------------------------------------------------------------------


def test_no_command_is_a_name(estate: Estate, canary: Path) -> None:
    """Names are letters, digits, `.`, `_` and `-`: nothing that any shell, template or page takes for more."""
    with estate.probe() as probe:
        for payload in commands(canary):
            if re.fullmatch(NAME_PATTERN, payload):
                continue
            for method, path, body in (
                ("PUT", None, {"model": "iris"}),
                ("POST", "/api/v1/projects", {"name": payload}),
                ("POST", "/api/v1/keys", {"name": payload}),
                ("POST", "/api/v1/keys", {"name": "k", "models": [payload]}),
                (
                    "POST",
                    "/api/v1/training-jobs",
                    {"model": payload, "dataset": "iris", "target": "species", "algorithm": "ridge"},
                ),
                ("PUT", "/api/v1/deployments/iris", {"model": payload}),
            ):
                where = path or f"/api/v1/deployments/{quote(payload, safe='')}"
                answer = probe.send(method, where, json=body, said=payload)
                assert answer.status_code in (400, 404), (payload, where, answer.text)


@pytest.mark.slow
def test_a_table_of_commands_goes_all_the_way_as_data(estate: Estate, canary: Path) -> None:
    """Columns, cells and classes that are commands: profiled, learnt from, deployed, predicted with, logged."""
    names = [text for text in dict.fromkeys(commands(canary)) if text.isprintable()][:24]
    content = _table(names)
    with estate.probe() as probe:
        answer = probe.post(
            "/api/v1/datasets", data={"name": "threats-commands"}, files={"file": ("x.csv", content)}, said=str(content)
        )
        assert answer.status_code == 201, answer.text
        columns = [column["name"] for column in answer.json()["columns"]]
        assert columns == [*names, "class"], "a name was changed"
        text = answer.text
        assert "{{7*7}}" in text
        assert '"49"' not in text
        version = _trained(probe, names)
        row = dict.fromkeys(names, "b")
        assert (
            probe.send(
                "PUT", "/api/v1/deployments/threats-commands", json={"model": version["model_version"]}
            ).status_code
            == 202
        )
        until = time.monotonic() + 60
        while (found := probe.get("/api/v1/deployments/threats-commands").json())["status"] != "ready":
            assert found["status"] in ("creating", "updating"), found["message"]
            assert time.monotonic() < until, found
            time.sleep(0.1)
        label = _predicted(probe, row)
        assert label in ("`id`", "{{7*7}}")
        for value in commands(canary)[:12]:
            assert _predicted(probe, dict.fromkeys(names, value)) in ("`id`", "{{7*7}}")
        for path in (f"/api/v1/jobs/{version['id']}/log", "/api/v1/deployments/threats-commands/logs"):
            assert probe.get(path).status_code == 200
        assert probe.delete("/api/v1/deployments/threats-commands").status_code == 202


def _table(names: list[str]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*names, "class"])
    for number in range(40):
        cells = [names[(number + at) % 3] if at % 2 else "ab"[number % 2] for at in range(len(names))]
        writer.writerow([*cells, ("`id`", "{{7*7}}")[number % 2]])
    return out.getvalue().encode()


def _trained(probe: Probe, names: list[str]) -> dict[str, Any]:
    spec = {
        "model": "threats-commands", "dataset": "threats-commands", "target": "class", "algorithm": "logistic-regression",
        "validation": {"holdout": 0.3}, "licence": names[0], "description": "\n".join(names), "features": names,
    }  # fmt: skip
    answer = probe.post("/api/v1/training-jobs", json=spec, said=str(names))
    assert answer.status_code == 202, answer.text
    job = probe.finished(answer.json()["id"])
    assert job["status"] == "succeeded", job["error"]
    return job


def _predicted(probe: Probe, row: dict[str, Any]) -> str:
    answer = probe.post("/api/v1/deployments/threats-commands/predict", json={"inputs": [row]})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["outputs"][0]["label"])


def test_free_texts_come_back_as_they_were(estate: Estate, canary: Path) -> None:
    with estate.probe() as probe:
        for number, payload in enumerate(commands(canary)[:12]):
            name = f"threats {number} {payload}".strip()
            answer = probe.post("/api/v1/users", json={"name": name}, said=name)
            if not name.isprintable():
                assert answer.status_code == 400
                continue
            assert (answer.status_code, answer.json()["name"]) == (201, name)
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-content-type-options"] == "nosniff"
        # an answer is never a page, whatever it quotes
        for path in ("/<script>alert(1)</script>", "/api/v1/models/<script>", "/docs/<script>alert(1)</script>"):
            answer = probe.get(path)
            assert answer.status_code in (400, 404)
            assert answer.headers["content-type"] == "application/problem+json"
