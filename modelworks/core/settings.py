"""Settings: the only place that reads environment variables. Each has a flag of the same name on `modelworks up`."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Read from flags, then `MODELWORKS_*` environment variables, then these defaults. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="MODELWORKS_", frozen=True, extra="ignore", populate_by_name=True)

    home: Path = Field(Path("~/.modelworks"), description="the folder that holds the catalog, the blobs and the logs")
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="the HTTP port; 0 picks a free one")
    grpc_port: int = Field(8001, ge=0, le=65535, description="the gRPC port; 0 picks a free one")
    tls_cert: Path | None = Field(None, description="PEM certificate chain for HTTP and gRPC")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")
    insecure: bool = Field(False, description="allow listening beyond loopback without TLS")
    offline: bool = Field(False, description="never make an outgoing connection")
    gateways: int = Field(
        1, ge=1, le=64, description="processes that answer requests and share the HTTP and gRPC ports"
    )
    workers: int = Field(2, ge=1, le=256, description="jobs that run at the same time on this machine, beside one of data")
    log_level: str = Field("info", description="debug, info, warning or error")
    request_log: bool = Field(True, description="one line a request in logs/requests.log, without its content")
    stores: Path | None = Field(None, description="TOML file of the stores that a table may point into; see docs/data.md")
    otlp_endpoint: str | None = Field(
        None,
        validation_alias=AliasChoices("MODELWORKS_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="base address of an OpenTelemetry collector (OTLP over HTTP) for traces; unset: none",
    )

    max_body: int = Field(64 * MIB, description="largest request body, uploads aside")
    max_upload: int = Field(64 * 1024 * MIB, description="largest upload")
    max_headers: int = Field(64 * 1024, description="largest sum of a request's header bytes")
    header_timeout: float = Field(10.0, description="seconds within which a request's headers must be complete")
    body_timeout: float = Field(
        30.0, description="seconds without a byte of an announced body until the call is refused"
    )
    predict_timeout: float = Field(30.0, description="deadline of a prediction that names none; language models have 600 s if that is more")
    shutdown_grace: float = Field(10.0, description="seconds that running calls get to finish when the server stops")
    lease_seconds: float = Field(10.0, description="how long a job's lease lasts without a heartbeat")
    job_log_days: float = Field(30.0, gt=0, description="days that the log of a job is kept after its end")
    queue_limit: int = Field(1024, description="calls that may wait for one deployment before 429")
    requests_per_minute: int | None = Field(None, description="rate limit of a key that names none; unset: unlimited")
    tokens_per_minute: int | None = Field(None, description="the same for tokens of language and embedding models")

    # clients
    url: str | None = Field(None, description="server address for the CLI and the SDK")
    api_key: str | None = Field(None, description="API key for the CLI and the SDK", repr=False)

    @property
    def home_path(self) -> Path:
        return self.home.expanduser().absolute()


_PASSED_ON = frozenset(
    {"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}
    | {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"}
)


def gpus_hidden() -> bool:
    """Whether the operator lets no process see a GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def child_environment(threads: int = 1) -> dict[str, str]:
    """The environment of a child process: what it needs to start, `threads` for its numeric libraries, and no secret."""
    passed = {
        name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(("LC_", "OPENBLAS_"))
    }
    # a waiting thread sleeps: spinning ones starve the other processes of a small machine
    # nothing here calls home; and what has threads is not forked
    silent = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    numeric = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {"OPENBLAS_NUM_THREADS": str(threads)} | passed | silent | numeric
