"""Calls of one deployment and kind that came in one turn of the loop and leave together.

What a call costs the router, the link and the counters is then shared by all of them; a call that does not have the
usual fate (its replica dies, it is aborted, it fails) goes on as any other, by a `Call` that is made only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelworks.core.errors import ModelworksError
from modelworks.core.tensors import Tensor
from modelworks.core.types import Call
from modelworks.serve.channel import Deliver, Fellow
from modelworks.serve.columns import Answers, Kind, Layout
from modelworks.serve.lane import Pending
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

if TYPE_CHECKING:
    from modelworks.serve.router import Router


class Convoy:
    """What its riders share. A dialect's subclass says whose call one is and tells the answers.

    `purpose`: riders whose answers may be told together have the same.
    """

    def __init__(self, purpose: object, route: Route, kind: Kind, begun: float, deadline: float) -> None:
        self.purpose = purpose
        self.route = route
        self.kind = kind
        self.begun = begun
        self.deadline = deadline

    def call(self, rider: Rider, tensors: list[Tensor]) -> Call:
        """The call of one rider."""
        raise NotImplementedError

    def deliver(self, rider: Rider) -> Deliver:
        """What takes its answer when that comes alone."""
        raise NotImplementedError

    def finish(self, riders: list[Rider], answers: Answers) -> None:
        """Tell the whole answers of riders of this purpose."""
        raise NotImplementedError


class Rider(Pending, Fellow):
    """One call of a convoy. `caller`: whatever the dialect knows it by."""

    router: Router
    _call: Call | None = None
    _deliver: Deliver | None = None

    def __init__(self, convoy: Convoy, caller: Any, data: bytes, rows: int) -> None:
        self.convoy = convoy
        self.caller = caller
        self.data = data
        self.rows = rows
        self.deadline = convoy.deadline

    @property
    def call(self) -> Call:  # type: ignore[override]  # made when somebody asks
        if self._call is None:
            self._call = self.convoy.call(self, Layout(self.convoy.kind).cut(self.data, 0, self.rows, ()))
        return self._call

    @property
    def deliver(self) -> Deliver:  # type: ignore[override]  # as `call`
        if self._deliver is None:
            self._deliver = self.convoy.deliver(self)
        return self._deliver

    def __call__(self, item: Part | ModelworksError) -> None:
        self.router.arrived(self, item)

    def together(self, others: list[Any]) -> bool:
        purpose, lane = self.convoy.purpose, self.lane
        for other in others:  # noqa: SIM110 - a generator would cost more than what it looks at
            if type(other) is not Rider or other.convoy.purpose is not purpose or other.lane is not lane:
                return False
        return True

    def arrived(self, fellows: list[Any], answers: Answers) -> None:
        self.router.arrived_many(fellows, answers)
