"""Tables that point into an object store or a folder: what they name is read, and nothing else can be reached by them."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest

from modelworks.core.errors import InvalidInput, Unavailable
from modelworks.core.specs import TableSchema
from modelworks.core.stores import Store, load
from modelworks.ml.data.ingest import Ingested, ingest
from modelworks.ml.data.pointed import Stores
from tests.jobhome import Home, caller

KEY, SECRET = "key-of-the-store", "a secret that nobody sees"


def png(shade: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("L", (4, 4), shade).save(out, "PNG")
    return out.getvalue()


class Bucket(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading takes: HEAD and GET of /bucket/key, with ranges, for requests signed with KEY."""

    objects: ClassVar[dict[str, bytes]] = {
        "/media/photos/a.png": png(10), "/media/photos/b c.png": png(20), "/media/private/x.png": png(30),
        "/media/photos/notes.txt": "wörds".encode(),
    }  # fmt: skip
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        from urllib.parse import unquote

        data = self.objects.get(unquote(self.path))
        status = 403 if f"Credential={KEY}/" not in self.headers.get("Authorization", "") else 200 if data else 404
        if status != 200 or data is None:
            data = b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>"
        elif given := self.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            whole, status = len(data), 206
            data = data[int(first) : int(last or whole) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2026 07:28:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def stores(endpoint: str, tmp_path: Path) -> list[Store]:
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "c.png").write_bytes(png(40))
    (tmp_path / "outside.png").write_bytes(png(50))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    s3 = {"name": "photos", "at": "s3://media/photos", "endpoint": endpoint, "key": KEY, "secret": SECRET}
    return [Store(**s3), Store(name="scans", at=str(folder))]


def read(table: str, stores: Stores, folder: Path, name: str = "t.csv", **schema: Any) -> tuple[Ingested, Any]:
    file = folder / name
    file.write_text(table)
    found = ingest(file, filename=name, schema=TableSchema(**schema), out=folder / "out.parquet", stores=stores)
    return found, pq.read_table(folder / "out.parquet")


def test_what_a_table_points_at_is_read_from_bucket_and_folder(stores: list[Store], tmp_path: Path) -> None:
    table = "path,label\ns3://media/photos/a.png,x\nstore://photos/b c.png,y\nstore://scans/c.png,\n,z\n"
    found, kept = read(table, Stores(stores), tmp_path)
    assert [(column.name, column.type) for column in found.columns] == [("image", "image"), ("label", "category")]
    assert kept["image"].to_pylist() == [png(10), png(20), png(40), None]
    assert kept["label"].to_pylist() == ["x", "y", None, "z"]
    found, kept = read('{"file": "store://photos/notes.txt", "label": "x"}\n', Stores(stores), tmp_path, "t.jsonl")
    assert found.columns[0].name == "text"
    assert kept["text"].to_pylist() == ["wörds"]
    offline, kept = read("path\nstore://scans/c.png\n", Stores(stores, offline=True), tmp_path)
    assert offline.rows == 1


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://media/photos/none.png", "is not there"),
        ("s3://media/private/x.png", "lies in no store"),
        ("s3://other/a.png", "lies in no store"),
        ("store://photos/../private/x.png", "no name of an object"),
        ("store://scans/../outside.png", "no name of an object"),
        ("store://scans//etc/hostname.png", "is not there"),
        ("store://scans/link.png", "is not there"),
        ("store://scans/none.png", "is not there"),
        ("store://unknown/c.png", "lies in no store"),
    ],
)
def test_nothing_else_is_reached_and_the_error_names_the_row(
    stores: list[Store], tmp_path: Path, uri: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        read(f"image,label\nstore://scans/c.png,x\n{uri},y\n", Stores(stores), tmp_path)
    assert caught.value.code == "missing_file"
    assert caught.value.detail["row"] == 2
    assert not (tmp_path / "out.parquet").exists()


def test_keys_that_do_not_fit_and_stores_that_are_away(stores: list[Store], tmp_path: Path) -> None:
    wrong = stores[0].model_copy(update={"key": "other"})
    with pytest.raises(InvalidInput, match="may not be read with the key"):
        read("image\ns3://media/photos/a.png\n", Stores([wrong]), tmp_path)
    away = stores[0].model_copy(update={"endpoint": "http://127.0.0.1:1"})
    with pytest.raises(Unavailable, match="the store 'photos' cannot be read now"):
        read("image\ns3://media/photos/a.png\n", Stores([away]), tmp_path)
    with pytest.raises(InvalidInput, match="runs offline"):
        read("image\ns3://media/photos/a.png\n", Stores(stores, offline=True), tmp_path)
    plain, _ = read("image,n\ns3://media/photos/a.png,1\n", Stores(()), tmp_path)
    assert plain.columns[0].type in ("category", "text")  # no stores: it is a text as any other
    with pytest.raises(ValueError, match="more than 0 MiB"):
        Stores(stores).read("s3://media/photos/a.png", most=10)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a]\nat = 's3://'\n", "at names a bucket"),
        ("[a]\nat = 'here'\n", "absolute path"),
        ("[a]\nat = '/srv'\nkey = 'x'\n", "a folder has no endpoint"),
        ("[a]\nat = 's3://b'\nkey = 'x'\n", "key and secret together"),
        ("[a]\nat = 's3://b'\nendpoint = 'file:///etc'\n", "endpoint is an address"),
        ("[a]\nat = 's3://b'\nmore = 1\n", "Extra inputs"),
        ("['a b']\nat = 's3://b'\n", "a store's name"),
        ("nonsense", "TOML"),
    ],
)
def test_a_file_of_stores_is_checked_when_the_server_starts(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "stores.toml").write_text(text)
    with pytest.raises(InvalidInput, match=says):
        load(tmp_path / "stores.toml")


def test_a_job_reads_them_and_its_keys_are_kept_nowhere(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "stores.toml"
    file.write_text(f'[photos]\nat = "s3://media"\nendpoint = "{endpoint}"\nkey = "{KEY}"\nsecret = "{SECRET}"\n')
    home = Home(tmp_path / "home")
    try:
        home.start(stores=file)
        dataset = home.ingest(caller(), "file,label\ns3://media/photos/a.png,x\nstore://photos/private/x.png,y\n", "pics")
        assert [column.type for column in dataset.columns] == ["image", "category"]
        for path in home.root.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert SECRET.encode() not in data
                assert KEY.encode() not in data
    finally:
        home.close()
