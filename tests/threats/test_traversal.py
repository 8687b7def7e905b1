"""Row 8: path traversal. Some two hundred payloads on every name, id, header, file name and source; nothing leaves home."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from modelworks.core.specs import ALIAS_PATTERN, NAME_PATTERN
from tests.server import until
from tests.threats.conftest import Estate
from tests.threats.probe import Wire, head, together
from tests.threats.walk import guarded, leaves, replaced, with_json

UP = (
    "../", "..\\", "..%2f", "..%5c", "%2e%2e/", "%2e%2e%2f", "%2e%2e\\", "..%252f", "%252e%252e%252f", "....//", "..../",
    "..;/", ".%2e/", "%c0%ae%c0%ae/", "%c0%ae%c0%ae%c0%af", "..%c0%af", "..%u2215", "\uff0e\uff0e\uff0f", "..\u2215", "..\u2044",
    "\u2025/", ".\x00./", "..\x00/", "./../", "../.", "..//", "/../", "\\..\\", "x/../../", "iris/../../",
)  # fmt: skip
TARGETS = ("etc/passwd", "outside.txt", "admin.key", "secret.key")
ALONE = (
    "..", ".", "...", "....", "~", "~root", "/", "//", "\\", "/etc/passwd", "//etc/passwd", "///etc/passwd", "\\etc\\passwd",
    "file:///etc/passwd", "file:/etc/passwd", "file://localhost/etc/passwd", "/proc/self/environ", "/proc/self/cmdline",
    "/dev/zero", "/dev/stdin", "C:\\windows\\win.ini", "c:/windows/win.ini", "\\\\server\\share\\x", "//server/share", "COM1:",
    "iris/../iris", "iris/.", "iris/..", "iris\x00", "iris\x00.csv", "\x00iris", "iris\n", "iris\r\nx: y", "iris\t", " iris",
    "iris ", "iris/", "/iris", "iris\\", "iris:", ":1", "iris:1/../2", "iris@../x", "@champion", "-rf", "--help", ".hidden", "_x",
    "iris%00", "iris%2f..", "iris*", "ir?s", "iris[0-9]", "{iris}", "$HOME", "${HOME}", "$(pwd)", "%HOME%", "iris;ls", "iris|ls",
    "iris&x", "\u202eiris", "ir\u200bis", "irïs", "\uff49ris", "a" * 101, "a" * 255, "a" * 4000, "../" * 300 + "etc/passwd",
)  # fmt: skip


def payloads(home: Path) -> list[str]:
    climbing = [up * depth + target for number, up in enumerate(UP) for depth, target in _depths(number)]
    return [*climbing, *ALONE, str(home / "admin.key"), str(home.parent / "outside.txt"), f"{home}/../outside.txt"]


def _depths(number: int) -> Iterator[tuple[int, str]]:
    for step in range(4):
        yield 1 + (number + 2 * step) % 8, TARGETS[(number + step) % len(TARGETS)]


@pytest.fixture(scope="module")
def hostile(estate: Estate) -> list[str]:
    found = payloads(estate.server.home)
    assert len(set(found)) > 180
    return found


class Watch:
    """What lies around the home, and what must never be in an answer."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.token = secrets.token_hex(16)
        (home.parent / "outside.txt").write_text(self.token)
        self.secrets = (self.token, (home / "admin.key").read_text().strip(), "root:x:0:0", "SQLite format 3")
        self.before = self.around()
        self.inside = {path.name for path in home.iterdir()}

    def around(self) -> dict[str, int]:
        found = {}
        for folder in (self.home.parent, self.home.parent.parent):
            for path in folder.iterdir():
                if path.is_file():
                    found[str(path)] = path.stat().st_mtime_ns
        for name in ("etc", "tmp/outside.txt", "tmp/evil", "outside.txt", "evil"):
            path = Path("/", name)
            found[str(path)] = path.stat().st_mtime_ns if path.exists() else 0
        return found

    def look(self, body: bytes, what: object) -> None:
        for secret in self.secrets:
            assert secret.encode() not in body, what


@pytest.fixture
def watch(estate: Estate) -> Iterator[Watch]:
    found = Watch(estate.server.home)
    yield found
    assert found.around() == found.before, "something was written outside of the home"
    (found.home.parent / "outside.txt").unlink()
    inside = {path.name for path in found.home.iterdir()}
    assert inside - found.inside <= {"catalog.sqlite-journal", "tmp"}, "something new lies in the home"


FREE = {"users.create": {("name",)}, "oip.infer": {("id",)}, "datasets.edit": {("edits", 0, "value")}}


def targets(payload: str, number: int) -> str:
    """The payload as a part of a URL: escaped whole, or by turns left as it is but for what no URL can hold."""
    return quote(payload, safe="") if number % 2 else quote(payload, safe="/\\;:@$&+,=~!*'()[]{}|%.")


def test_no_path_leads_out(estate: Estate, watch: Watch, hostile: list[str]) -> None:
    """Each parameter of each route. What is no name is refused by its form, before anything is looked for."""
    with_parameters = [way for way in guarded() if way.names]
    lines = {"none": (), "form": ("content-type: multipart/form-data; boundary=b",)}
    lines |= dict.fromkeys(("json", "infer"), ("content-type: application/json",))
    wire = Wire(estate.server)
    for way in with_parameters:
        for place, name in enumerate(way.names):
            for number, payload in enumerate(hostile[(len(way.path) + place) % 2 :: 2]):
                values = dict(estate.values)
                values[f"{way.collection}.{name}"] = targets(payload, number)
                path = way.to(values)
                body = b"--b--\r\n" if way.rule.body == "form" else b"" if way.rule.body == "none" else b"{}"
                more = (*lines[way.rule.body], f"content-length: {len(body)}") if body else ()
                answer = wire.ask(head(way.method, path, estate.server.key, *more) + body, said=payload)
                assert 400 <= answer.status < 500, (str(way), path, answer.status, answer.body[:300])
                watch.look(answer.body, path)
                if answer.headers.get("connection") == "close":
                    wire.socket.close()
                    wire = Wire(estate.server)
    wire.socket.close()


def test_no_field_of_a_body_leads_out(estate: Estate, watch: Watch, hostile: list[str]) -> None:
    """Each text of each JSON body, those that the documentation shows and those that may be added."""
    fields = {
        "training_jobs.create": (
            ("features", 0), ("metrics", 0), ("alias",), ("task",), ("validation", "test"), ("validation", "group"),
            ("validation", "time"), ("transforms", 0, "op"), ("transforms", 0, "columns", 0), ("hyperparameters", "solver"),
        ),
        "evaluations.create": (("compare",), ("dataset",), ("method", "test"), ("method", "group")),
        "keys.create": (("user",), ("scopes", 0), ("role",)),
    }  # fmt: skip
    with estate.probe() as probe:
        for way in with_json():
            example = way.body()
            # free texts, which are kept as they are: names of users, the id that a client gives its inference, a label
            free = FREE.get(str(way.rule.operation), set())
            for place in {*leaves(example, (str,)), *fields.get(str(way.rule.operation), ())} - free:
                for payload in hostile[len(place) :: 4]:
                    request = way.request(replaced(example, place, payload))
                    answer = probe.send(way.method, way.to(estate.values), said=payload, **request)
                    assert 400 <= answer.status_code < 500, (str(way), place, payload, answer.text[:300])
                    watch.look(answer.content, (str(way), place, payload))


def test_no_header_leads_out(estate: Estate, watch: Watch, hostile: list[str]) -> None:
    names = ("x-request-id", "x-project", "idempotency-key", "last-event-id", "accept", "host", "x-filename")
    job = estate.values["training-jobs.id"]
    paths = ("/api/v1/whoami", f"/api/v1/jobs/{job}/events/stream", "/api/v1/models/iris/versions/1")
    wire = Wire(estate.server)
    for name in names:
        for number, payload in enumerate(hostile[len(name) % 2 :: 2]):
            if any(ord(letter) < 32 for letter in payload):
                continue  # no header can hold it
            text = payload.encode().decode("latin-1")
            path = paths[1] if name == "last-event-id" else paths[number % 3]
            answer = wire.ask(head("GET", path, estate.server.key, f"{name}: {text}"), said=payload)
            assert answer.status < 500, (name, payload)
            watch.look(answer.body, (name, payload))
            said = answer.headers.get("x-request-id", "")
            assert name == "x-request-id" or re.fullmatch(r"req_[0-9a-f]{24}", said), (name, said)
            if answer.headers.get("connection") == "close" or answer.status == 0:
                wire.socket.close()
                wire = Wire(estate.server)
    wire.socket.close()


def test_no_name_of_a_file_leads_out(estate: Estate, watch: Watch, hostile: list[str]) -> None:
    """The file is received, whatever it is called, before the form is found to lack its name."""
    with estate.probe() as probe:
        for payload in hostile:
            escaped = payload.replace("\\", "\\\\").replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
            part = f'--b\r\ncontent-disposition: form-data; name="file"; filename="{escaped}"\r\n\r\na,b\n1,2\n\r\n--b--\r\n'
            for path in ("/api/v1/datasets", "/api/v1/models/-/versions"):
                headers = {"content-type": "multipart/form-data; boundary=b"}
                answer = probe.post(path, content=part.encode(), headers=headers, said=payload)
                assert answer.status_code == 400, (payload, answer.text)
            field = part.replace('name="file"', f'name="{escaped}"')
            answer = probe.post("/api/v1/datasets", content=field.encode(), headers=headers, said=payload)
            assert answer.status_code == 400, (payload, answer.text)
            if re.fullmatch(NAME_PATTERN, payload.strip()):
                continue  # blanks around a form's field are not part of it
            form = {"name": payload, "source": "sklearn:iris"}
            answer = probe.post("/api/v1/datasets", data=form, said=payload)
            assert answer.status_code == 400, (payload, answer.text)
    until(lambda: not list((watch.home / "tmp").iterdir()), 10)


def test_a_file_keeps_the_last_part_of_its_name_only(estate: Estate, watch: Watch) -> None:
    names = ("../../../outside.txt", "..\\..\\a\x00b.csv", str(watch.home / "admin.key"))
    with estate.probe() as probe:

        def upload(name: str, number: int) -> str:
            content = f"a,b\n{number},2\n3,{number}\n".encode()
            form = {"name": f"threats-file-{number}"}
            answer = probe.post("/api/v1/datasets", data=form, files={"file": (name, content)}, said=name)
            assert answer.status_code == 201, answer.text
            return str(answer.json()["source"])

        sources = together([lambda one=one: upload(one[1], one[0]) for one in enumerate(names)], threads=2)
    assert not [source for source in sources if "/" in source or "\\" in source or not source.isprintable()]


def test_a_source_is_no_path(estate: Estate, watch: Watch, hostile: list[str]) -> None:
    with estate.probe() as probe:
        for number, payload in enumerate(hostile):
            source = ("", "file:", "path:", "s3://", "http://")[number % 5] + payload
            answer = probe.post("/api/v1/datasets", data={"name": "threats-source", "source": source}, said=payload)
            assert answer.status_code == 400, (source, answer.text)
            watch.look(answer.content, source)
        # what has the form of a source is judged by the job that reads it
        some = (
            "package:numpy/../../../../../../etc/passwd",
            "sklearn:../../etc/passwd",
            f"package:numpy/{watch.home}/admin.key",
        )
        form = {"name": "threats-source"}
        calls = [lambda one=one: probe.post("/api/v1/datasets", data={**form, "source": one}, said=one) for one in some]
        for source, answer in zip(some, together(calls, threads=3), strict=True):
            assert answer.status_code in (400, 404), (source, answer.text)
            watch.look(answer.content, source)


def test_none_of_them_is_a_name(hostile: list[str]) -> None:
    """A test of the tests: each payload is one that a route must refuse by its form."""
    for pattern in (NAME_PATTERN, ALIAS_PATTERN, r"^[A-Za-z0-9_-]{1,64}$"):
        # `_x` and the like are fine as ids, and no id is ever a path
        found = {payload for payload in hostile if re.fullmatch(pattern, payload)}
        assert found <= {"_x", "-rf", "--help"}
