"""uvicorn's httptools protocol with the bounds it lacks: on a request's head, on stalled peers, on pipelines.

One timer a connection, not one a request: a deadline that moves on is noticed when the timer fires.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from modelworks.api.errors import HeadersTooLarge, UriTooLong, render
from modelworks.core.errors import InvalidInput, ModelworksError, RequestTimeout
from modelworks.core.settings import Settings

MAX_HEADER_COUNT = 256
MAX_URL = 8 * 1024
MAX_PIPELINE = 128  # requests that may wait behind one on a connection
MAX_DISCARD = 1024 * 1024  # bytes still read after the answer, so that the client gets to read it
LINGER = 2.0  # seconds of that, when the connection is to be closed
HELD = 0.1  # seconds by which a timer that comes late tells that the loop was held; so long it then goes on waiting

# What a connection is doing; each but BUSY has a deadline.
HEAD, BODY, BUSY, IDLE, DISCARD, LINGERING = range(6)


class BoundedProtocol(HttpToolsProtocol):
    """See `bounded` for how the limits get here."""

    max_headers = 64 * 1024
    header_timeout = 10.0
    write_timeout = 30.0

    def __init__(
        self, config: Any, server_state: Any, app_state: Any, _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._phase = HEAD
        self._deadline: float | None = None  # of the phase
        self._write_deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._head_open = False  # a request's first byte came, the end of its headers did not
        self._message_open = False  # the same until the end of its body
        self._head_bytes = 0
        self._head_split = False  # came in more than one piece
        self._chunk_bytes = 0
        self._discarded = 0
        self._framing = 0  # bytes since the head or the last byte of a body: sizes of chunks, trailers
        self._refusal: ModelworksError | None = None
        self._lingering: _Lingering | None = None

    # -- the connection ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(HEAD, self.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        if self._phase == LINGERING:
            self._discard(len(data))
            return
        if self._phase == IDLE:
            self._enter(HEAD, self.header_timeout)
        was_open = self._head_open
        self._framing += len(data)
        self._chunk_bytes = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self.cycle is not None:  # answered as plain HTTP/1.1; what follows would not be
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self._refuse(self._refusal or InvalidInput("this is not a valid HTTP/1.1 request", code="bad_request"))
            return
        if self._framing > self.max_headers and self._phase == BUSY and self._message_open and not self._head_open:
            self._refuse(self._headers_too_large())
            return
        self._head_split = self._head_open
        if self._head_open and was_open:
            self._head_bytes += len(data)
            if self._head_bytes > self.max_headers:
                self._refuse(self._headers_too_large())
        elif self._head_open and self._phase == IDLE:  # begun behind a request that was answered at once
            self._enter(HEAD, self.header_timeout)

    def shutdown(self) -> None:
        """The server stops: end idle connections, and tell endless answers to end."""
        stopping = self.app_state.get("stopping")
        if stopping is not None:
            stopping.set()
        super().shutdown()

    # -- the parser ----------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """uvicorn's builds the ASGI scope here; ours is built when the headers are complete, if it is needed at all."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._head_open = self._message_open = True
        self._head_split = False
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > MAX_URL:
            self._stop_parsing(UriTooLong(f"the URL is longer than {MAX_URL} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_open:
            return  # a trailer: it comes behind the checks of the head, and must not pass for a header
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADER_COUNT:
            self._stop_parsing(HeadersTooLarge(f"a request has at most {MAX_HEADER_COUNT} headers"))

    def on_headers_complete(self) -> None:
        self._check_head()
        self._head_open = False
        self._enter(BUSY, None)
        self._discarded = self._framing = 0
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers = self.scope["headers"] = headers
        super().on_headers_complete()
        if self._lingering is None:
            self._lingering = _Lingering(self)
        self.cycle.transport = self._lingering  # type: ignore[assignment]

    def _check_head(self) -> None:
        if self._head_split or self._chunk_bytes > self.max_headers:  # else it cannot be too large
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self.max_headers:
                self._stop_parsing(self._headers_too_large())
        if len(self.pipeline) >= MAX_PIPELINE:
            self._stop_parsing(
                InvalidInput("too many requests were sent without waiting for answers", code="bad_request")
            )

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        super().on_body(body)
        if self._phase == DISCARD:
            self._discard(len(body))

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._message_open = False
        if self._phase == DISCARD:
            self._enter(IDLE, self.timeout_keep_alive)

    def on_response_complete(self) -> None:
        """As uvicorn's, but the keep-alive deadline is one of this connection's only timer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing() or self._phase == LINGERING:
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._head_open:
            self._enter(HEAD, self.header_timeout)
        elif self._message_open:
            self._enter(DISCARD, self.header_timeout)
        else:
            self._enter(IDLE, self.timeout_keep_alive)

    def _stop_parsing(self, error: ModelworksError) -> None:
        self._refusal = error
        raise ValueError(error.message)  # httptools wraps it and stops

    def _headers_too_large(self) -> ModelworksError:
        return HeadersTooLarge(f"the URL and the headers of a request have at most {self.max_headers} bytes")

    # -- refusing ------------------------------------------------------------------------------------------------------

    def _refuse(self, error: ModelworksError) -> None:
        """Answer `error` and close, unless an earlier request on this connection still waits for its answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()
            return
        path = self.url.decode("latin-1") if self._head_open else ""
        status, headers, body = render(error, path, "")
        lines = [STATUS_LINE[status]]
        for name, value in [*self.server_state.default_headers, *headers]:
            if name != b"connection":
                lines.append(name + b": " + value + b"\r\n")
        self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", body]))
        self.linger()

    def close(self) -> None:
        """The answer is written and the connection is to end: at once, or, with a body still coming, a little later."""
        if self._message_open:
            self.linger()
        else:
            self.transport.close()

    def linger(self) -> None:
        """Say that nothing more will be sent and read on for a moment: closing now would reset the connection, and the
        client might never see its answer."""
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._enter(LINGERING, LINGER)

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > MAX_DISCARD:
            self.transport.close()

    # -- the timer -----------------------------------------------------------------------------------------------------

    def _enter(self, phase: int, seconds: float | None) -> None:
        self._phase = phase
        self._deadline = None if seconds is None else self.loop.time() + seconds
        if self._deadline is not None:
            self._arm(self._deadline)

    def _arm(self, when: float) -> None:
        """See to it that the timer fires at `when` or before."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self.transport is None:
            return
        now = self.loop.time()
        if self._write_deadline is not None and now >= self._write_deadline:
            self.transport.abort()
            return
        if self._deadline is not None and now >= self._deadline:
            if now - self._deadline > HELD:  # the loop was held: what came meanwhile is yet to be read
                self._deadline = now + HELD
            else:
                self._deadline = None
                self._expired()
        pending = [when for when in (self._deadline, self._write_deadline) if when is not None]
        if pending and not self.transport.is_closing():
            self._arm(min(pending))

    def _expired(self) -> None:
        if self._phase == HEAD and self._head_open:
            self._refuse(
                RequestTimeout(f"the headers were not complete within {self.header_timeout:g} s", code="header_timeout")
            )
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.time() + self.write_timeout
        self._arm(self._write_deadline)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_deadline = None

    def _unset_keepalive_if_required(self) -> None:
        """uvicorn's own keep-alive timer is not used."""


class _Lingering:
    """The transport as a request's cycle sees it: its `close` lets the client read the answer first."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, protocol: BoundedProtocol) -> None:
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self.close = protocol.close


def bounded(settings: Settings) -> type[BoundedProtocol]:
    """The protocol class with the limits of `settings`, for uvicorn's `http=`."""
    limits = {
        "max_headers": settings.max_headers,
        "header_timeout": settings.header_timeout,
        "write_timeout": settings.body_timeout,
    }
    return type("ModelworksProtocol", (BoundedProtocol,), limits)
