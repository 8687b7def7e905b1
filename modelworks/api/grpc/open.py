"""grpc.health.v1.Health, open to everybody, and server reflection, open to every valid key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio

from modelworks.api.grpc.door import PUBLIC, Door, Method, Rpc
from modelworks.api.grpc.messages import POOL, parse
from modelworks.core.errors import NotFound

HEALTH = "grpc.health.v1.Health"
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")  # the same on the wire
_WAIT = 3600.0  # seconds; a watcher is woken when the server stops

_Status = health_pb2.HealthCheckResponse
_files: set[str] = set()  # that our pool has


def mount(door: Door) -> None:
    """Last of all: what they tell of are the services that were registered before."""
    check = Method(f"/{HEALTH}/Check", PUBLIC, _check(door), health_pb2.HealthCheckRequest, False, False)
    watch = Method(f"/{HEALTH}/Watch", PUBLIC, _watch(door), health_pb2.HealthCheckRequest, False, True)
    reflect = _reflect([*door.names, HEALTH, *REFLECTION])
    methods = [Method(f"/{name}/ServerReflectionInfo", "whoami.get", reflect, None, True, True) for name in REFLECTION]
    for method in (check, watch, *methods):
        door.register(method)
    door.names += [HEALTH, *REFLECTION]


def _check(door: Door) -> Any:
    async def check(rpc: Rpc, request: Any) -> Any:
        if request.service and request.service not in door.names:
            raise NotFound(f"there is no service {request.service[:100]!r}", code="service_not_found", param="service")
        return _Status(status=_Status.SERVING)

    return check


def _watch(door: Door) -> Any:
    async def watch(rpc: Rpc, request: Any) -> AsyncIterator[Any]:
        known = not request.service or request.service in door.names
        yield _Status(status=_Status.SERVING if known else _Status.SERVICE_UNKNOWN)
        while not await door.stopping.wait(_WAIT):
            pass
        yield _Status(status=_Status.NOT_SERVING)

    return watch


def _reflect(names: list[str]) -> Any:
    for descriptor in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        if descriptor.name not in _files:
            POOL.AddSerializedFile(descriptor.serialized_pb)
            _files.add(descriptor.name)
    servicer = aio.ReflectionServicer(names, pool=POOL)

    async def reflect(rpc: Rpc, messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            async for data in messages:
                yield parse(reflection_pb2.ServerReflectionRequest, data)

        async for response in servicer.ServerReflectionInfo(requests(), rpc.context):
            yield response

    return reflect
