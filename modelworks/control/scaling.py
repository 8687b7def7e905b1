"""What to start and what to stop for one deployment. Pure: rows in, a plan out; no clock, no process, no catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from modelworks.core.specs import DeploymentSpec
from modelworks.core.types import Deployment, Replica

_GIVING_UP = 5  # crashes in a row after which a deployment that serves nothing is called failed
_BACKOFF = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Failures:
    """What became of this revision's replicas so far: crashes in a row, when the last one was, why, and a fatal reason."""

    crashes: int = 0
    last: float = 0.0
    fatal: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """`start` so many replicas of the present revision, `restore` so many of the last that was ready; `drain` these;
    show `status` and `message`."""

    status: str
    message: str = ""
    start: int = 0
    restore: int = 0
    drain: list[Replica] = field(default_factory=list)
    remove: bool = False


def retry_at(failures: Failures) -> float:
    """When the next replica may start after `failures`: at once, then ever later, at most every 30 s."""
    return failures.last + _BACKOFF[min(failures.crashes, len(_BACKOFF) - 1)]


def plan(
    desired: Deployment,
    observed: Sequence[Replica],
    failures: Failures,
    now: float,
    earlier: Failures | None = None,
) -> Plan:
    """The next step from what is `observed` towards what is `desired`.

    The revision that was last ready goes on serving until enough new replicas are, also across a restart of the server,
    so that a revision that cannot start harms nobody. `earlier`: what became of that revision's replicas.
    """
    live = [replica for replica in observed if replica.status in ("starting", "ready")]
    if desired.status == "deleting":
        return Plan("deleting", drain=live, remove=not observed)
    wanted = DeploymentSpec.model_validate(desired.spec).replicas.min
    new = [replica for replica in live if replica.spec_revision == desired.spec_revision]
    old = [replica for replica in live if replica.spec_revision != desired.spec_revision]
    ready = [replica for replica in new if replica.status == "ready"]
    old_ready = [replica for replica in old if replica.status == "ready"]

    restore = 0
    if len(ready) < wanted and desired.serving_revision not in (None, desired.spec_revision) and not old:
        earlier = earlier or Failures()
        restore = wanted if not earlier.fatal and now >= retry_at(earlier) else 0
    if failures.fatal:
        kept = f"; revision {old_ready[0].spec_revision} goes on serving" if old_ready else ""
        return Plan("failed", f"revision {desired.spec_revision}: {failures.fatal}{kept}", drain=new, restore=restore)
    if len(ready) >= wanted:
        surplus = sorted(new, key=lambda replica: (replica.status == "ready", replica.id))[: len(new) - wanted]
        return Plan("ready", drain=old + surplus)
    missing = wanted - len(new)
    start = missing if missing > 0 and now >= retry_at(failures) else 0
    status = _waiting_status(desired, bool(ready or old_ready), failures)
    return Plan(status, _waiting_message(failures), start=start, restore=restore)


def serving(desired: Deployment, observed: Sequence[Replica]) -> list[Replica]:
    """The ready replicas that calls go to: those of the present revision once there are enough, else the newest older."""
    ready = [replica for replica in observed if replica.status == "ready"]
    if not ready:
        return []
    wanted = DeploymentSpec.model_validate(desired.spec).replicas.min
    new = [replica for replica in ready if replica.spec_revision == desired.spec_revision]
    old = [replica for replica in ready if replica.spec_revision != desired.spec_revision]
    if len(new) >= wanted or not old:
        return new
    newest = max(replica.spec_revision for replica in old)
    return [replica for replica in old if replica.spec_revision == newest]


def _waiting_status(desired: Deployment, serves: bool, failures: Failures) -> str:
    if failures.crashes >= _GIVING_UP and not serves:
        return "failed"  # still tried again now and then, as the cause may pass
    if desired.status in ("ready", "degraded"):
        return "degraded"
    if desired.status == "failed":
        return "degraded" if serves else "failed"
    return desired.status


def _waiting_message(failures: Failures) -> str:
    if not failures.crashes:
        return ""
    why = f": {failures.reason}" if failures.reason else ""
    return f"a replica died {failures.crashes} times in a row{why}; starting it again"
