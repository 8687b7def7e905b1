"""The figures that gateways keep and share: counters and gauges, as they are in memory and on disk."""

from __future__ import annotations

import msgspec

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
MICROSECONDS = tuple(int(bound * 1e6) for bound in SECONDS)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
CANCELLED = 499  # the caller went away first; what proxies write for it
FORMAT = 2  # of what is kept on disk; a file of another format is ignored
MAX_SERIES = 2000  # deployments and versions counted apart; those after them are counted together
OTHER = ("", "other", "")

Key = tuple[str, str, str]  # project id, deployment, model version
Spender = tuple[str, str, str]  # project id, deployment, key id


class Histogram(msgspec.Struct, array_like=True):
    """`counts[i]`: values up to `bounds[i]` and above the bound before; the last: above all."""

    counts: list[int]
    total: float = 0.0

    def merge(self, other: Histogram) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


def seconds() -> Histogram:
    return Histogram([0] * (len(SECONDS) + 1))


class Tally(msgspec.Struct, array_like=True):
    """One model version of one deployment, as one gateway saw it. Plain lists, as every call comes by here.

    `duration` of all calls, by SECONDS; `queue` and `model` of those answered, by MICROSECONDS; `batch`, by SIZES: calls
    that ran together. `sums` of these four, in seconds, microseconds, microseconds and calls.
    """

    answered: int = 0
    failed: dict[int, int] = msgspec.field(default_factory=dict)  # HTTP status -> calls that ended with it
    duration: list[int] = msgspec.field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    queue: list[int] = msgspec.field(default_factory=lambda: [0] * (len(MICROSECONDS) + 1))
    model: list[int] = msgspec.field(default_factory=lambda: [0] * (len(MICROSECONDS) + 1))
    batch: list[int] = msgspec.field(default_factory=lambda: [0] * (len(SIZES) + 1))
    sums: list[float] = msgspec.field(default_factory=lambda: [0.0, 0, 0, 0])

    @property
    def outcomes(self) -> dict[int, int]:
        """HTTP status -> calls."""
        return ({200: self.answered} if self.answered else {}) | self.failed

    def histograms(self) -> tuple[Histogram, Histogram, Histogram, Histogram]:
        """Of duration, queue and model in seconds, and of batch."""
        duration, queue, model, batch = self.sums
        return (
            Histogram(self.duration, duration),
            Histogram(self.queue, queue / 1e6),
            Histogram(self.model, model / 1e6),
            Histogram(self.batch, batch),
        )

    def merge(self, other: Tally) -> None:
        self.answered += other.answered
        for status, count in other.failed.items():
            self.failed[status] = self.failed.get(status, 0) + count
        for name in ("duration", "queue", "model", "batch", "sums"):
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            setattr(self, name, [mine + theirs for mine, theirs in pairs])


class Load(msgspec.Struct, array_like=True):
    """One deployment now, by one gateway: calls aboard of replicas, calls waiting, and rates over the last seconds."""

    project_id: str
    deployment: str
    aboard: int = 0
    waiting: int = 0
    per_second: float = 0.0
    errors_per_second: float = 0.0


class ReplicaNow(msgspec.Struct, array_like=True):
    """One replica as a gateway sees it; `memory` in bytes, 0: not known."""

    project_id: str
    deployment: str
    replica_id: str
    connected: bool
    memory: int = 0


class Snapshot(msgspec.Struct, array_like=True):
    """All of one gateway's figures at one moment: what its file holds."""

    format: int
    token: str
    tallies: list[tuple[Key, Tally]] = []
    requests: list[tuple[str, int, int]] = []  # operation, status, count
    retries: list[tuple[str, str, int]] = []  # project id, deployment, count
    lag: Histogram = msgspec.field(default_factory=seconds)
    log_dropped: int = 0
    # gauges: not kept once the gateway is gone
    memory: int = 0
    loads: list[Load] = []
    replicas: list[ReplicaNow] = []
    # counters again
    tokens: list[tuple[Spender, list[int]]] = []  # as `Observer.tokens` has them
    calls: list[tuple[Spender, int]] = []  # taken from each key
