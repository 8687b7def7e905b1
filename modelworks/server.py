"""The composition root: the only place that wires settings, stores, engines, loops and app together.

`serve(settings)` is `modelworks up`: one supervising process that holds the home's lock and the listening socket, starts
the gateway and the job worker as children, and runs the reconcile loop, from whose main thread replicas are started.
`python -m modelworks.server` is the gateway's process. A child that dies is started again; all die with their parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import ipaddress
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import setproctitle

from modelworks.core import stores, telemetry
from modelworks.core.errors import CatalogUnavailable, Conflict, InvalidInput, ModelworksError
from modelworks.core.settings import Settings
from modelworks.engines.process import Child, spawn
from modelworks.security import leases

if TYPE_CHECKING:
    from modelworks.serve.observe import Observer

log = telemetry.logger("server")

_SERVING_FIRST = 3.0  # seconds at most that the worker leaves the processors to replicas that start with the server
_TURN = 0.05  # seconds between two turns of the supervising loop
_STEADY = 10.0  # seconds that a child must live for its last death not to count
_FOLLOW = 0.15  # seconds between two looks of a gateway at the catalog's counters


class Home:
    """The folder of one server: catalog, blobs, logs, sockets, secrets. Readable by its owner only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.catalog = root / "catalog.sqlite"
        self.blobs = root / "blobs"
        self.logs = root / "logs"
        self.run = root / "run"
        self.tmp = root / "tmp"
        self.secret = root / "secret.key"
        self.admin_key = root / "admin.key"
        self.address = root / "server.json"

    def prepare(self) -> None:
        try:
            for folder in (self.root, self.blobs, self.logs, self.run, self.tmp):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.root.chmod(0o700)
        except OSError as error:
            raise InvalidInput(
                f"cannot use {self.root} as home ({error.strerror}); name another with --home", param="home"
            ) from None

    def lock(self) -> IO[str]:
        """Hold the home for this process; Conflict when another server has it. The lock goes with the process."""
        file = (self.root / "server.lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise Conflict(
                f"a server (process {owner}) already runs on {self.root}; stop it, or name another folder with --home"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def forget_address(self) -> None:
        """Clients find no server here any more, unless another has taken the place meanwhile: the folder may be a new one."""
        if _pid_in(self.address) == os.getpid():
            self.address.unlink(missing_ok=True)


def _pid_in(address: Path) -> int | None:
    try:
        return int(json.loads(address.read_text())["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def serve(settings: Settings, *, announce: Callable[[str], None] = print) -> int:
    """Run everything on this machine in the foreground until SIGTERM or SIGINT; returns the exit code."""
    home = Home(settings.home_path)
    home.prepare()
    lock = home.lock()
    check_binding(settings)
    stores.load(settings.stores)
    if settings.otlp_endpoint:
        from modelworks.serve.tracing import check

        check(settings.otlp_endpoint, offline=settings.offline)
    setproctitle.setproctitle(f"modelworks server --home {home.root}")
    telemetry.configure(settings.log_level, "server")
    listener = listen(settings.host, settings.port)
    grpc = reserve(settings.host, grpc_port(settings))
    try:
        return Supervisor(settings, home, listener, announce, grpc=grpc.getsockname()[:2]).run()
    finally:
        listener.close()
        grpc.close()
        home.forget_address()
        lock.close()


def check_binding(settings: Settings) -> None:
    """Beyond loopback only with TLS, or with --insecure, which is said at each start."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise InvalidInput("give --tls-cert and --tls-key together", param="tls_cert")
    for path in (settings.tls_cert, settings.tls_key):
        if path and not path.is_file():
            raise InvalidInput(f"there is no file {path}; --tls-cert and --tls-key name PEM files", param="tls_cert")
    if _is_loopback(settings.host) or settings.tls_cert:
        return
    if not settings.insecure:
        raise InvalidInput(
            f"listening on {settings.host} without TLS would send keys in the clear; "
            "give --tls-cert and --tls-key, or --insecure if something in front of it does TLS",
            param="host",
        )
    print(f"WARNING: listening on {settings.host} without TLS: keys travel in the clear", file=sys.stderr, flush=True)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidInput(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port, or --port 0 for a free one",
            param="port",
        ) from None
    listener.listen(2048)
    return listener


def grpc_port(settings: Settings) -> int:
    """The port asked for; with a free HTTP port and none named, a free one too."""
    return 0 if settings.port == 0 and "grpc_port" not in settings.model_fields_set else settings.grpc_port


def reserve(host: str, port: int) -> socket.socket:
    """A socket that holds the gRPC port without listening: the gateways, which share it, come and go.

    Sharing (SO_REUSEPORT) would also let a second server of this user in unnoticed, so the port is tried without first.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe, held = socket.socket(family, socket.SOCK_STREAM), socket.socket(family, socket.SOCK_STREAM)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        with probe:
            probe.bind((host, port))
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise InvalidInput(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --grpc-port, or --grpc-port 0",
            param="grpc_port",
        ) from None
    return held


class Service:
    """A child that must run: started again when it dies, ever later when it dies soon after its start."""

    def __init__(self, name: str, start: Callable[[], Child]) -> None:
        self.name = name
        self._start = start
        self.child: Child | None = None
        self._failures = 0
        self._started = 0.0

    def ensure(self, now: float) -> None:
        if self.child is not None and self.child.poll() is None:
            if self._failures and now - self._started > _STEADY:
                self._failures = 0
            return
        if self.child is not None:
            log.error("a process died", name=self.name, exit_code=self.child.poll())
            self.child.kill()  # what is left of its group
            self.child = None
            self._failures += 1
        if now - self._started >= min(0.1 * 2**self._failures, 10.0) or not self._failures:
            self._started = now
            self.child = self._start()


class Supervisor:
    """The main thread of the server: keeps the gateway and the worker running and turns the reconcile loop."""

    def __init__(
        self,
        settings: Settings,
        home: Home,
        listener: socket.socket,
        announce: Callable[[str], None],
        *,
        grpc: tuple[str, int],
    ) -> None:
        self._settings = settings
        self._home = home
        self._listener = listener
        self._grpc = grpc  # address and port
        self._announce = announce
        self._limits = leases.create(home.run) if settings.gateways > 1 else None
        self._channel_secret = secrets.token_hex(32)
        self._stop = False
        scheme = "https" if settings.tls_cert else "http"
        host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        gc.disable()  # until all is imported
        gateways = [Service("gateway", self._start_gateway) for _ in range(self._settings.gateways)]
        worker = Service("worker", self._start_worker)
        begun = time.monotonic()
        for gateway in gateways:
            gateway.ensure(begun)  # it imports while we prepare; it reads the catalog when told to go
        from modelworks.engines.local import LocalEngine  # not before: the gateway's start is what all wait for

        engine = LocalEngine(self._home.root)
        if self._home.catalog.exists():  # there may be something to serve
            engine.prepare()
        from modelworks.control.access import Access
        from modelworks.control.reconcile import Reconciler
        from modelworks.security.identity import Secret
        from modelworks.serve.gather import loads
        from modelworks.store.blobs import Blobs
        from modelworks.store.catalog import Catalog

        secret = Secret.load_or_create(self._home.secret)
        catalog = Catalog(self._home.catalog)
        catalog.migrate()
        first_key = Access(catalog, secret).bootstrap(self._home.root)
        self._ready_file.touch()
        reconciler = Reconciler(
            catalog,
            Blobs(self._home.blobs),
            engine,
            home=self._home.root,
            secret=self._channel_secret,
            loads=partial(loads, self._home.run),
        )
        self._say_when_up(first_key)
        gc.freeze()  # what was imported is never garbage
        gc.enable()
        services = gateways
        while not self._stop:
            now = time.monotonic()
            for service in services:
                service.ensure(now)
            try:
                reconciler.turn()
                engine.dismiss()
            except CatalogUnavailable as error:
                log.warning("the catalog is away; going on with what runs", reason=error.message)
            if worker not in services and (not reconciler.starting or now - begun > _SERVING_FIRST):
                services = [*gateways, worker]
            time.sleep(_TURN)
        self._shut_down([*gateways, worker], reconciler)
        catalog.close()
        return 0

    def _say_when_up(self, first_key: str | None) -> None:
        def wait() -> None:
            for _ in range(1500):
                with contextlib.suppress(OSError), _open(f"{self.url}/health"):
                    break
                time.sleep(0.02)
            else:
                self._announce(f"The gateway does not answer; see {self._home.logs}/gateway.log")
                return
            _wait_listening(self._grpc)
            address = {"url": self.url, "grpc_port": self._grpc[1], "pid": os.getpid()}
            temporary = self._home.address.with_suffix(".tmp")
            if self._stop:
                return
            temporary.write_text(json.dumps(address))
            temporary.replace(self._home.address)
            if first_key:
                self._announce(f"Admin key (shown once, kept in {self._home.admin_key}): {first_key}")
            self._announce(
                f"Modelworks is up at {self.url} (docs at {self.url}/docs), "
                f"gRPC on port {self._grpc[1]}, home {self._home.root}"
            )

        threading.Thread(target=wait, daemon=True).start()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stop:
            os._exit(1)  # asked twice: the children die with us
        self._stop = True

    @property
    def _ready_file(self) -> Path:
        """Says to this run's gateways that the catalog is ready to be read."""
        return self._home.run / f"ready-{os.getpid()}"

    def _config(self) -> dict[str, Any]:
        return {
            "home": str(self._home.root),
            "settings": self._settings.model_dump(mode="json", exclude={"api_key"}),
            "secret": self._channel_secret,
            "ready_file": str(self._ready_file),
            "grpc": self._grpc,
        }

    def _start_gateway(self) -> Child:
        descriptor = self._listener.fileno()
        shared = [descriptor] if self._limits is None else [descriptor, self._limits]
        return spawn(
            "modelworks.server",
            {**self._config(), "listener": descriptor, "limits": self._limits},
            title=f"modelworks gateway --home {self._home.root}",
            log=self._home.logs / "gateway.log",
            pass_fds=shared,
        )

    def _start_worker(self) -> Child:
        return spawn(
            "modelworks.jobs.worker",
            self._config(),
            title=f"modelworks worker --home {self._home.root}",
            log=self._home.logs / "worker.log",
        )

    def _shut_down(self, services: list[Service], reconciler: Any) -> None:
        """Calls finish, jobs go back to the queue, replicas drain; what does not within the grace is killed."""
        grace = self._settings.shutdown_grace + 2
        stopping = [service.child for service in services if service.child]
        for child in stopping:
            child.terminate(grace)
        for child in stopping:
            child.wait(grace + 1)
        reconciler.stop(grace=5.0)
        self._ready_file.unlink(missing_ok=True)


def _wait_listening(address: tuple[str, int]) -> None:
    """Until somebody listens there, at most ten seconds."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    for _ in range(1000):
        with contextlib.suppress(OSError), socket.create_connection((host, address[1]), timeout=1):
            return
        time.sleep(0.01)
    log.error("gRPC does not listen; see the gateway's log", port=address[1])


def _open(url: str) -> Any:
    import ssl
    import urllib.request  # not before: it imports much

    context = ssl._create_unverified_context() if url.startswith("https") else None  # our own port, by loopback
    return urllib.request.urlopen(url, timeout=2, context=context)


# the gateway's process


def gateway_main() -> int:
    from modelworks.engines.process import attach

    config = attach()
    gc.disable()  # until all is imported: see api/grpc
    settings = Settings.model_validate(config["settings"])
    telemetry.configure(settings.log_level, "gateway")
    import uvloop

    uvloop.run(_gateway(config, settings))
    return 0


async def _gateway(config: dict[str, Any], settings: Settings) -> None:
    import uvicorn

    from modelworks.api.app import create_app
    from modelworks.api.fastlane import fast
    from modelworks.api.grpc import start_grpc
    from modelworks.api.services import Services
    from modelworks.control.access import Access
    from modelworks.control.deployments import Deployments
    from modelworks.control.library import Library
    from modelworks.control.responses import Responses
    from modelworks.control.routing import Follower
    from modelworks.security.identity import Authenticator, Secret
    from modelworks.security.leases import Buckets, LeasingLimiter
    from modelworks.security.quota import RateLimiter
    from modelworks.serve.gateway import Gateway
    from modelworks.serve.router import Router
    from modelworks.serve.routes import Limits
    from modelworks.store.blobs import Blobs
    from modelworks.store.catalog import Catalog

    home = Home(Path(config["home"]))
    while not Path(config["ready_file"]).exists():
        await asyncio.sleep(0.01)
    catalog = Catalog(home.catalog)
    blobs = Blobs(home.blobs)
    secret = Secret.load_or_create(home.secret)
    authenticator = Authenticator(
        catalog, secret, default_rates=(settings.requests_per_minute, settings.tokens_per_minute)
    )
    limiter = RateLimiter() if config["limits"] is None else LeasingLimiter(Buckets(config["limits"]))
    router = Router(config["secret"])
    observer = _observer(home, settings)
    services = Services(
        settings=settings,
        catalog=catalog,
        library=Library(catalog, blobs),
        deployments=Deployments(catalog, home.logs),
        access=Access(catalog, secret),
        responses=Responses(catalog),
        authenticator=authenticator,
        limiter=limiter,
        gateway=Gateway(router, timeout=settings.predict_timeout, observer=observer, limiter=limiter),
    )
    limits = Limits(queue=settings.queue_limit)
    follower = Follower(catalog, router, authenticator, limits=limits, interval=_FOLLOW)
    await follower.start()
    observer.start(router, home.run)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(services),
            http=fast(services),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            timeout_graceful_shutdown=int(settings.shutdown_grace),
        )
    )
    grpc = start_grpc(services, tuple(config["grpc"]), server)
    # uvicorn raises the signal that stopped it once more: by default that would end us before the last lines are written
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    await server.serve(sockets=[socket.socket(fileno=config["listener"])])
    await grpc.close()
    await follower.stop()
    observer.stop()
    router.close()
    catalog.close()


def _observer(home: Home, settings: Settings) -> Observer:
    from modelworks.serve.observe import Observer
    from modelworks.serve.requestlog import RequestLog
    from modelworks.serve.tracing import Tracing

    return Observer(
        log=RequestLog(home.logs / "requests.log") if settings.request_log else None,
        tracing=Tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None,
    )


def main(arguments: list[str] | None = None) -> int:
    try:
        return gateway_main()
    except ModelworksError as error:
        print(error.message, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
