"""Fetches an https URL that a user named, without letting the URL reach into the network this machine stands in.

The name is resolved once and the connection goes to the address that was checked, so that a name which changes its
address in between (DNS rebinding) gains nothing. Proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from modelworks.core.errors import InvalidInput, PayloadTooLarge, Unavailable

MAX_BYTES = 16 << 30
MAX_REDIRECTS = 5
TIMEOUT = 30.0  # seconds without progress
DEADLINE = 3600.0  # seconds for one answer
_CHUNK = 1 << 20
_MAX_URL = 4096

Resolve = Callable[[str, int], list[str]]
Dial = Callable[[str, int, float], socket.socket]


def resolve_name(host: str, port: int) -> list[str]:
    """The addresses of `host`, as the system's resolver gives them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Unavailable(f"the name {host[:100]!r} cannot be resolved; check the URL", param="source") from None
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def dial(address: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=timeout)


def is_public(address: str) -> bool:
    """Whether `address` is on the open internet, also for IPv6 addresses with an IPv4 address inside."""
    try:
        ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(item is not None and not is_public(str(item)) for item in inner):
            return False
        if ip.ipv4_mapped is not None:
            return True
        if ip.is_site_local or int(ip) < 1 << 32:  # the latter: IPv4-compatible addresses, long withdrawn
            return False
    return ip.is_global and not (
        ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local
    )


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def download(
    url: str,
    folder: Path,
    *,
    max_bytes: int = MAX_BYTES,
    resolve: Resolve = resolve_name,
    dial: Dial = dial,
    context: ssl.SSLContext | None = None,
) -> Path:
    """The content of `url` as a file in `folder`, named as the URL's path ends.

    InvalidInput for a URL that is refused and for answers other than 200; PayloadTooLarge beyond `max_bytes`;
    Unavailable when the server cannot be reached. `resolve`, `dial` and `context` are for tests.
    """
    context = context or ssl.create_default_context()
    for _ in range(MAX_REDIRECTS + 1):
        host, port, target = check_url(url)
        connection = _connect(host, port, resolve, dial, context)
        # a server that sends a byte now and then never runs into the socket's time-out
        watchdog = threading.Timer(DEADLINE, connection.cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            following = _fetch(connection, target, url, folder, max_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(
                f"{host} broke off the answer ({type(error).__name__}); try again", param="source"
            ) from None
        finally:
            watchdog.cancel()
            connection.close()
        if isinstance(following, Path):
            return following
        url = following
    raise _refused(f"more than {MAX_REDIRECTS} redirects")


def check_url(url: str) -> tuple[str, int, str]:
    """(host, port, path and query) of an https URL that carries no credentials; InvalidInput for any other."""
    if len(url) > _MAX_URL or not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        raise _refused("a URL has at most 4096 characters of ASCII, without spaces; write others as %XX")
    try:
        parts = urlsplit(url)
        port = parts.port or 443
    except ValueError:
        raise _refused("it is not a URL") from None
    if parts.scheme != "https":
        raise _refused(f"only https:// is fetched, not {parts.scheme[:20]}:")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise _refused("a URL names a host, and carries no user name or password")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.hostname, port, target


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"the URL is refused: {why}", code="url_refused", param="source")


class _Vetted(http.client.HTTPSConnection):
    """HTTPS over a socket that is already connected; the certificate is still checked against the name."""

    def __init__(self, host: str, port: int, raw: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=TIMEOUT, context=context)
        self._raw, self._tls = raw, context

    def connect(self) -> None:
        self.sock = self._tls.wrap_socket(self._raw, server_hostname=self.host)

    def cut(self) -> None:
        """Ends the connection under a reader in another thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


def _connect(host: str, port: int, resolve: Resolve, dial: Dial, context: ssl.SSLContext) -> _Vetted:
    """A connection to one of the host's addresses, all of which must be public."""
    addresses = resolve(host, port)
    if not addresses or not all(is_public(address) for address in addresses):
        raise _refused(f"{host[:100]} is not an address on the open internet")
    for address in addresses[:4]:
        try:
            raw = dial(address, port, TIMEOUT)
        except OSError:
            continue
        raw.settimeout(TIMEOUT)
        connection = _Vetted(host, port, raw, context)
        try:
            connection.connect()
        except (OSError, ssl.SSLError) as error:
            raw.close()
            why = "its certificate does not hold" if isinstance(error, ssl.SSLCertVerificationError) else "TLS failed"
            raise Unavailable(f"{host} cannot be reached by https: {why}", param="source") from None
        return connection
    raise Unavailable(f"{host} cannot be reached; try again later", param="source")


def _fetch(connection: _Vetted, target: str, url: str, folder: Path, max_bytes: int) -> Path | str:
    """The file, or the URL of a redirect."""
    headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "modelworks"}
    connection.request("GET", target, headers=headers)
    answer = connection.getresponse()
    if answer.status in (301, 302, 303, 307, 308):
        return urljoin(url, answer.getheader("Location") or "")
    if answer.status != 200:
        raise _refused(f"{connection.host} answered {answer.status}")
    if (answer.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise _refused(f"{connection.host} answered in a compressed form that was not asked for")
    out = folder / _file_name(url)
    size = 0
    try:
        with out.open("wb") as file:
            while chunk := answer.read1(_CHUNK):
                size += len(chunk)
                if size > max_bytes:
                    raise PayloadTooLarge(f"the file behind the URL has more than {max_bytes} bytes", param="source")
                file.write(chunk)
        announced = answer.getheader("Content-Length")
        if announced and announced.isdigit() and int(announced) != size:
            raise Unavailable(
                f"{connection.host} broke off after {size} of {announced} bytes; try again", param="source"
            )
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return out


def _file_name(url: str) -> str:
    """The last part of the URL's path, as a harmless file name."""
    last = urlsplit(url).path.rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]", "_", last)[-100:].lstrip(".") or "download"
