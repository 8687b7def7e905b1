"""The bounds of the protocol, on real sockets: slow, large and malformed heads, pipelines, peers that do not read."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from modelworks.api.protocol import MAX_HEADER_COUNT, MAX_URL, BoundedProtocol
from tests.api_house import House, house, read_all

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home"), max_headers=16_384, header_timeout=0.6, body_timeout=1.0) as found:
        yield found


def connect(api: House) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.port), timeout=6)


def test_a_head_that_drips_is_408_and_closed(api: House) -> None:
    with connect(api) as connection:
        before = time.monotonic()
        connection.sendall(GET + b"x-slow: ")
        for _ in range(20):
            try:
                connection.sendall(b"a")
            except OSError:
                break
            time.sleep(0.05)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer
    assert time.monotonic() - before < 5


def test_a_connection_that_says_nothing_is_closed(api: House) -> None:
    with connect(api) as connection:
        before = time.monotonic()
        assert connection.recv(100) == b""
        assert 0.4 < time.monotonic() - before < 3


def test_the_next_request_on_a_connection_has_the_same_deadline(api: House) -> None:
    with connect(api) as connection:
        connection.sendall(GET + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /heal")
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_what_came_while_the_loop_was_held_is_read_before_a_deadline_ends_it(
    api: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wide body takes a second of the loop: who asked in time meanwhile is not told to have been silent."""
    read, held = BoundedProtocol.data_received, threading.Event()

    def slow(protocol: BoundedProtocol, data: bytes) -> None:
        if b"x-wide" in data:
            held.set()
            time.sleep(1.0)  # longer than header_timeout
        read(protocol, data)

    monkeypatch.setattr(BoundedProtocol, "data_received", slow)
    with connect(api) as other, connect(api) as wide:
        time.sleep(0.2)
        wide.sendall(GET + b"x-wide: yes\r\n\r\n")
        assert held.wait(5)
        other.sendall(GET + b"\r\n")
        assert other.recv(65536).startswith(b"HTTP/1.1 200")
        assert wide.recv(65536).startswith(b"HTTP/1.1 200")


def test_headers_that_are_too_large_are_431(api: House) -> None:
    assert api.raw(GET + b"x: " + b"a" * 20_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    many = b"".join(b"x-%d: %s\r\n" % (i, b"a" * 200) for i in range(100))
    assert api.raw(GET + many + b"\r\n").startswith(b"HTTP/1.1 431")
    # one header without an end: nothing of it reaches a callback of the parser
    endless = GET + b"x: " + b"a" * 2_000_000
    assert api.raw(endless).startswith((b"HTTP/1.1 431", b""))
    # right at the limit it is taken
    assert api.raw(GET + b"connection: close\r\nx: " + b"a" * 16_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_too_many_headers_are_431(api: House) -> None:
    lines = b"".join(b"a: b\r\n" for _ in range(MAX_HEADER_COUNT + 1))
    assert api.raw(GET + lines + b"\r\n").startswith(b"HTTP/1.1 431")
    # a hundred thousand: cut off long before the end
    assert api.raw(GET + b"a: b\r\n" * 100_000 + b"\r\n")[:12] in (b"HTTP/1.1 431", b"")


def test_a_long_url_is_414(api: House) -> None:
    answer = api.raw(b"GET /v2/" + b"a" * MAX_URL + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 414")
    assert b'{"error":"the URL is longer' in answer, "in the dialect of the path"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
    ],
)
def test_malformed_requests_are_4xx_and_say_nothing_of_the_inside(api: House, request_bytes: bytes) -> None:
    answer = api.raw(request_bytes)
    assert answer.startswith(b"HTTP/1.1 4"), answer
    assert b"Traceback" not in answer
    assert b"0x" not in answer


def test_one_byte_at_a_time_is_no_error(api: House) -> None:
    answer = api.raw(GET + b"connection: close\r\n\r\n", gap=0.001)
    assert answer.startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_order_and_bounded(api: House) -> None:
    three = GET + b"x-request-id: one\r\n\r\n" + GET + b"x-request-id: two\r\n\r\n"
    answer = api.raw(three + GET + b"x-request-id: three\r\nconnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.index(b"one") < answer.index(b"two") < answer.index(b"three")
    flood = api.raw((GET + b"\r\n") * 20_000)
    assert flood.count(b"HTTP/1.1 200") < 20_000


def test_an_early_answer_reaches_a_client_that_is_still_sending(api: House) -> None:
    for _ in range(5):
        with connect(api) as connection:
            connection.sendall(b"POST /api/v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\n\r\n")
            time.sleep(0.02)
            try:
                for _ in range(8):
                    connection.sendall(b"a" * 65536)
            except OSError:
                pass
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 401")
            assert b"connection: close" in answer


def test_a_small_refused_body_keeps_the_connection(api: House) -> None:
    with connect(api) as connection:
        connection.sendall(b"POST /api/v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        connection.sendall(b"hello" + GET + b"connection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_is_cut_off(api: House) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(6)
        connection.connect(("127.0.0.1", api.port))
        # more than what the kernel buffers on the way
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n" * 16)
        time.sleep(2.2)  # the server's write deadline is 1 s
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += len(chunk)
    assert received < 16 * 1_500_000


def test_other_clients_are_served_while_many_connections_hang(api: House) -> None:
    hanging = [connect(api) for _ in range(100)]
    for connection in hanging:
        connection.sendall(GET + b"x: ")
    with api.client(None) as client:
        before = time.monotonic()
        assert client.get("/health").status_code == 200
        assert time.monotonic() - before < 0.4
    for connection in hanging:
        connection.close()


def test_connections_leave_nothing_behind(api: House) -> None:
    for _ in range(20):
        api.raw(GET + b"connection: close\r\n\r\n")
    time.sleep(0.1)
    gc.collect()
    alive = [item for item in gc.get_objects() if isinstance(item, BoundedProtocol)]
    assert len([item for item in alive if item._timer is not None]) <= 5
