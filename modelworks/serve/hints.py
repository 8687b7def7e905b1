"""What a client may ask of the router for one call, in headers (REST) or metadata (gRPC): its class and its replica."""

from __future__ import annotations

from modelworks.core.errors import InvalidInput
from modelworks.core.types import Call, Principal

PRIORITY_HEADER = "x-priority"
STICKY_HEADER = "x-sticky-key"
CLASSES = {"high": 0, "normal": 1, "low": 2}
_LONGEST = 256


def hint(call: Call, principal: Principal, priority: str | None, sticky: str | None) -> None:
    """Note the two headers in a call. Only an administrator's key may raise a call above normal; for others high is normal."""
    if priority is not None:
        wanted = CLASSES.get(priority)
        if wanted is None:
            raise InvalidInput(
                f"{PRIORITY_HEADER} is {' or '.join(CLASSES)}, not {priority[:40]!r}", param=PRIORITY_HEADER
            )
        call.priority = wanted if principal.role == "admin" else max(wanted, 1)
    if sticky is not None:
        if len(sticky) > _LONGEST:
            raise InvalidInput(f"{STICKY_HEADER} may have {_LONGEST} characters", param=STICKY_HEADER)
        call.sticky = f"{principal.project_id}/{sticky}"
