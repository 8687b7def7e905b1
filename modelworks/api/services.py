"""What the edges call: one object that the composition root fills in and every route reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelworks.api.intake import Intake, Room
from modelworks.api.shares import Shares

if TYPE_CHECKING:
    from modelworks.control.access import Access
    from modelworks.control.deployments import Deployments
    from modelworks.control.library import Library
    from modelworks.control.responses import Responses
    from modelworks.core.settings import Settings
    from modelworks.security.identity import Authenticator
    from modelworks.security.leases import LeasingLimiter
    from modelworks.security.quota import RateLimiter
    from modelworks.serve.gateway import Gateway
    from modelworks.store.catalog import Catalog


@dataclass(frozen=True)
class Services:
    settings: Settings
    catalog: Catalog
    library: Library
    deployments: Deployments
    access: Access
    responses: Responses
    authenticator: Authenticator
    limiter: RateLimiter | LeasingLimiter
    gateway: Gateway
    room: Room = field(default_factory=Room)
    shares: Shares = field(default_factory=Shares)

    def intake(self, now: float) -> Intake:
        """For a body that comes from now on. `now`: seconds of the clock that goes on with it."""
        return Intake(self.room, 2 * self.settings.max_body, self.settings.body_timeout, now)
