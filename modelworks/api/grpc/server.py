"""The grpc.aio server: its services, its bounds and its TLS."""

from __future__ import annotations

from typing import Any

import grpc

from modelworks.api.grpc import inference, lifecycle, open
from modelworks.api.grpc.door import Door
from modelworks.api.services import Services
from modelworks.core.settings import Settings

MAX_STREAMS = 1024  # calls at a time on one connection


def build(services: Services, address: str) -> tuple[Any, Door, int]:
    """A server bound to `address`, not started yet, its door and port. RuntimeError when the address is taken."""
    door = Door(services)
    inference.mount(door)
    lifecycle.mount(door)
    open.mount(door)
    server = grpc.aio.server(handlers=[door], options=_options(services.settings))
    settings = services.settings
    if settings.tls_cert and settings.tls_key:
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        port = server.add_insecure_port(address)
    return server, door, port


def _options(settings: Settings) -> list[tuple[str, Any]]:
    return [
        ("grpc.so_reuseport", 1),  # several gateways share the port
        ("grpc.max_receive_message_length", settings.max_body),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", int(settings.header_timeout * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
