"""Sources: bundled sets, files of packages, paths, and URLs that must not reach into this machine's network."""

import contextlib
import http.server
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest

from modelworks.core.errors import InvalidInput, NotFound, PayloadTooLarge, Unavailable
from modelworks.core.specs import TableSchema
from modelworks.ml.data.download import check_url, download, is_public
from modelworks.ml.data.ingest import ingest
from modelworks.ml.data.sources import SKLEARN, resolve

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    ("name", "rows", "target", "kind"),
    [
        ("iris", 150, "species", "category"),
        ("wine", 178, "cultivar", "category"),
        ("breast_cancer", 569, "diagnosis", "category"),
        ("diabetes", 442, "progression", "number"),
        ("digits", 1797, "digit", "integer"),
        ("linnerud", 20, "Pulse", "number"),
    ],
)
def test_bundled_sets(tmp_path, name, rows, target, kind):
    path = resolve(f"sklearn:{name}", tmp_path)
    result = ingest(path, filename=path.name, schema=TableSchema(), out=tmp_path / "out")
    assert result.rows == rows
    assert (result.columns[-1].name, result.columns[-1].type) == (target, kind)
    assert all(column.type == "number" for column in result.columns[:-1])
    assert set(SKLEARN) >= {name}


def test_iris_is_exactly_iris(tmp_path):
    lines = resolve("sklearn:iris", tmp_path).read_text().splitlines()
    assert lines[:2] == [
        "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm),species",
        "5.1,3.5,1.4,0.2,setosa",
    ]


def test_files_of_packages(tmp_path):
    path = resolve("package:scikit-learn/sklearn/datasets/data/iris.csv", tmp_path)
    assert path.read_text().startswith("150,4,setosa")
    for bad in (
        "package:scikit-learn/../../../etc/passwd",
        "package:scikit-learn//etc/passwd",
        "package:scikit-learn/sklearn/datasets/data",
        "package:scikit-learn/sklearn/datasets/data/nope.csv",
        "package:../x/y",
        "package:scikit-learn",
        "package:no-such-distribution/x.csv",
        "package:scikit-learn/..\\..\\x",
    ):
        with pytest.raises((InvalidInput, NotFound)):
            resolve(bad, tmp_path)


def test_paths(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n")
    assert resolve(str(tmp_path / "a.csv"), tmp_path) == tmp_path / "a.csv"
    assert resolve(str(tmp_path), tmp_path) == tmp_path / "a.csv"
    (tmp_path / "b.csv").write_text("a\n1\n")
    with pytest.raises(InvalidInput, match=r"2 tables \(a.csv, b.csv\)"):
        resolve(str(tmp_path), tmp_path)
    with pytest.raises(NotFound, match="there is no file"):
        resolve(str(tmp_path / "c.csv"), tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "s3://b/x.csv",
        "file:///etc/passwd",
        "http://example.com/x.csv",
        "ftp://x/y",
        "data:text/csv,a",
        "sklearn:boston",
    ],
)
def test_sources_that_are_not_read(tmp_path, source):
    with pytest.raises(InvalidInput) as caught:
        resolve(source, tmp_path)
    assert caught.value.param == "source"


def test_offline_fetches_nothing(tmp_path):
    with pytest.raises(InvalidInput, match="offline"):
        resolve("https://example.com/x.csv", tmp_path, offline=True)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "198.18.0.1",
        "192.0.2.1",
        "240.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00::1",
        "ff02::1",
        "fec0::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "2002:a00:1::",
        "2001:db8::1",
        "x",
    ],
)
def test_addresses_that_are_not_public(address, tmp_path):
    assert not is_public(address)
    dialled = []
    with pytest.raises(InvalidInput, match="not an address on the open internet"):
        # one bad address among good ones is enough
        download("https://x.example/", tmp_path, resolve=lambda h, p: [PUBLIC, address], dial=dialled.append)  # type: ignore[arg-type,return-value]
    assert not dialled


def test_public_addresses():
    assert all(map(is_public, [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0177.0.0.1",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "169.254.169.254",
        "LOCALHOST",
        "127.0.0.1.",
    ],
)
def test_other_ways_to_write_this_machine(host, tmp_path):
    with pytest.raises((InvalidInput, Unavailable)):  # Unavailable: where the resolver does not know the form
        resolve(f"https://{host}/x.csv", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "https://user:password@example.com/",
        "https://user@example.com/",
        "https:///x",
        "https://example.com:99999/",
        "https://[::1/",
        "https://example.com/a b",
        "https://example.com/\r\nHost: x",
        "https://example.com\\@127.0.0.1/",
        "https://exämple.com/",
        "http://example.com/",
        "https://example.com/" + "x" * 5000,
    ],
)
def test_urls_that_are_refused(url):
    with pytest.raises(InvalidInput, match="the URL is refused"):
        check_url(url)


# a server on loopback behind an address that claims to be public


class Handler(http.server.BaseHTTPRequestHandler):
    hits: ClassVar[list[str]] = []

    def do_GET(self):
        Handler.hits.append(f"{self.headers['Host']}{self.path}")
        answers = {
            "/to-private": (302, {"Location": "https://private.example/data.csv"}, b""),
            "/to-http": (302, {"Location": "http://files.example/data.csv"}, b""),
            "/to-file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/loop": (302, {"Location": "/loop"}, b""),
            "/moved": (301, {"Location": "/data.csv"}, b""),
            "/gone": (404, {}, b"no"),
            "/gzip": (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"),
            "/cut": (200, {"Content-Length": "1000"}, b"a,b\n"),
        }
        status, headers, body = answers.get(self.path, (200, {}, b"a,b\n1,2\n"))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(port, a context that trusts the server's certificate for files.example)"""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "files.example")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("files.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    of_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of_server.load_cert_chain(pem)
    server.socket = of_server.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trusting = ssl.create_default_context(cadata=certificate.public_bytes(serialization.Encoding.PEM).decode())
    yield server.server_port, trusting
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(site, tmp_path):
    port, context = site
    Handler.hits.clear()
    answers = {"private.example": ["10.0.0.7"], "rebind.example": [PUBLIC]}

    def run(url, **more):
        asked, dialled = [], []

        def resolve(host, port):
            asked.append(host)
            return answers.get(host, [PUBLIC])

        def dial(address, _port, timeout):
            dialled.append(address)
            return socket.create_connection(("127.0.0.1", port), timeout)

        try:
            return download(url, tmp_path, resolve=resolve, dial=dial, context=more.pop("context", context), **more)
        finally:
            run.asked, run.dialled = asked, dialled

    return run


def test_download(fetch):
    path = fetch("https://files.example/data.csv?token=1")
    assert path.read_bytes() == b"a,b\n1,2\n"
    assert path.name == "data.csv"
    assert Handler.hits == ["files.example/data.csv?token=1"]
    # the name was resolved once, and the connection went to the address that was checked
    assert fetch.asked == ["files.example"]
    assert fetch.dialled == [PUBLIC]


def test_redirects(fetch, tmp_path):
    assert fetch("https://files.example/moved").name == "data.csv"
    for path, why in (
        ("/to-private", "open internet"),
        ("/to-http", "only https"),
        ("/to-file", "only https"),
        ("/loop", "redirects"),
    ):
        with pytest.raises(InvalidInput, match=why):
            fetch(f"https://files.example{path}")
        assert all(address == PUBLIC for address in fetch.dialled)
    assert len([hit for hit in Handler.hits if "loop" in hit]) == 6
    assert [item.name for item in tmp_path.iterdir()] == ["data.csv"]


def test_answers_that_do_not_count(fetch, tmp_path):
    with pytest.raises(InvalidInput, match="answered 404"):
        fetch("https://files.example/gone")
    with pytest.raises(InvalidInput, match="compressed"):
        fetch("https://files.example/gzip")
    with pytest.raises(Unavailable, match="broke off"):
        fetch("https://files.example/cut")
    with pytest.raises(PayloadTooLarge):
        fetch("https://files.example/data.csv", max_bytes=5)
    assert not list(tmp_path.iterdir())


def test_the_certificate_is_checked_against_the_name(fetch):
    with pytest.raises(Unavailable, match="certificate"):
        fetch("https://other.example/data.csv")
    with pytest.raises(Unavailable, match="certificate"):
        fetch("https://files.example/data.csv", context=ssl.create_default_context())
    assert Handler.hits == []


@pytest.mark.parametrize("path", ["/..%2f..%2fetc%2fpasswd", "/.bashrc", "/", "/a/../../b.csv", "/%00", "/$(id).csv"])
def test_file_names_stay_in_the_folder(fetch, tmp_path, path):
    assert fetch(f"https://files.example{path}").parent == tmp_path
