"""What to start and what to stop for one deployment. Pure: rows in, a plan out; no clock, no process, no catalog."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from modelworks.core.deployment import DeploymentSpec, Replicas
from modelworks.core.types import Deployment, Replica

_GIVING_UP = 5  # crashes in a row after which a deployment that serves nothing is called failed
UP_WINDOW = 3.0  # seconds over which the calls under way are averaged before more replicas are started
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


def follow(replicas: Replicas, current: int, seen: Sequence[tuple[float, int]], now: float) -> int:
    """How many replicas the load asks for, `current` being there; `seen`: when, and calls under way then, oldest first.

    Up as soon as the average of the last seconds asks for more than there are; down once the highest count of the last
    `scale_down_s` would have been served by fewer.
    """
    most = replicas.max or replicas.min
    current = min(max(current, replicas.min), most)
    recent = [calls for at, calls in seen if now - at <= UP_WINDOW]
    if not recent or most == replicas.min:
        return current
    up = math.ceil(sum(recent) / len(recent) / replicas.target)
    if up > current:
        return min(up, most)
    if now - seen[0][0] < replicas.scale_down_s:
        return current
    highest = max(calls for at, calls in seen if now - at <= replicas.scale_down_s)
    return min(current, max(replicas.min, math.ceil(highest / replicas.target)))


def plan(
    desired: Deployment,
    observed: Sequence[Replica],
    failures: Failures,
    now: float,
    earlier: Failures | None = None,
    wanted: int | None = None,
) -> Plan:
    """The next step from what is `observed` towards what is `desired`. `wanted`: replicas that the load asks for.

    The revision that was last ready goes on serving until enough new replicas are, also across a restart of the server,
    so that a revision that cannot start harms nobody. `earlier`: what became of that revision's replicas.
    """
    live = [replica for replica in observed if replica.status in ("starting", "ready")]
    if desired.status == "deleting":
        return Plan("deleting", drain=live, remove=not observed)
    least = DeploymentSpec.model_validate(desired.spec).replicas.min
    wanted = max(least, wanted or least)
    new = [replica for replica in live if replica.spec_revision == desired.spec_revision]
    old = [replica for replica in live if replica.spec_revision != desired.spec_revision]
    ready = [replica for replica in new if replica.status == "ready"]
    old_ready = [replica for replica in old if replica.status == "ready"]

    restore = 0
    if len(ready) < least and desired.serving_revision not in (None, desired.spec_revision) and not old:
        earlier = earlier or Failures()
        restore = least if not earlier.fatal and now >= retry_at(earlier) else 0
    if failures.fatal:
        kept = f"; revision {old_ready[0].spec_revision} goes on serving" if old_ready else ""
        return Plan("failed", f"revision {desired.spec_revision}: {failures.fatal}{kept}", drain=new, restore=restore)
    start = max(0, wanted - len(new)) if now >= retry_at(failures) else 0
    if len(ready) >= (wanted if old_ready else least):
        surplus = sorted(new, key=lambda replica: (replica.status == "ready", replica.id))[: max(0, len(new) - wanted)]
        return Plan("ready", start=start, drain=old + surplus)
    status = _waiting_status(desired, bool(ready or old_ready), failures)
    return Plan(status, _waiting_message(failures), start=start, restore=restore)


def serving(desired: Deployment, observed: Sequence[Replica]) -> list[Replica]:
    """The ready replicas that calls go to: those of the present revision once there are enough, and no fewer than of the
    one before; else the newest older."""
    ready = [replica for replica in observed if replica.status == "ready"]
    if not ready:
        return []
    least = DeploymentSpec.model_validate(desired.spec).replicas.min
    new = [replica for replica in ready if replica.spec_revision == desired.spec_revision]
    old = [replica for replica in ready if replica.spec_revision != desired.spec_revision]
    newest = max((replica.spec_revision for replica in old), default=0)
    before = [replica for replica in old if replica.spec_revision == newest]
    return new if not before or len(new) >= max(least, len(before)) else before


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
