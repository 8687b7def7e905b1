"""The grpc.aio server: its services, its bounds and its TLS."""

from __future__ import annotations

from typing import Any

import grpc

from modelworks.api.grpc import entries, inference, lifecycle, open
from modelworks.api.grpc.door import Door
from modelworks.api.services import Services
from modelworks.core.settings import Settings

MAX_CONNECTIONS = 1024  # at a time, of one gateway; what comes beyond is closed
MAX_STREAMS = 1024  # calls at a time on one connection
IDLE = 300.0  # seconds without a call until a connection is asked to close
LOOK_ALIVE = 60.0  # seconds of silence until a connection is asked whether its client is still there


def build(services: Services, address: str) -> tuple[Any, Door, int]:
    """A server bound to `address`, not started yet, its door and port. RuntimeError when the address is taken."""
    door = Door(services)
    inference.mount(door)
    lifecycle.mount(door)
    open.mount(door)
    entries.bound()
    server = grpc.aio.server(handlers=[door], options=_options(services.settings))
    settings = services.settings
    if settings.tls_cert and settings.tls_key:
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        port = server.add_insecure_port(address)
    return server, door, port


def _options(settings: Settings) -> list[tuple[str, Any]]:
    patience = int(settings.header_timeout * 1000)
    return [
        ("grpc.so_reuseport", 1),  # several gateways share the port
        ("grpc.max_receive_message_length", settings.max_body),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", patience),
        ("grpc.http2.settings_timeout", patience),  # until the client has acknowledged these bounds
        ("grpc.max_connection_idle_ms", int(IDLE * 1000)),
        ("grpc.keepalive_time_ms", int(LOOK_ALIVE * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
