"""The one way into the data plane: every dialect decodes to a Call, asks the gateway, and encodes the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from modelworks.core.errors import Forbidden, ModelworksError, NotFound, Unavailable
from modelworks.core.generation import SECONDS as GENERATION_SECONDS
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Answer, Call, Principal
from modelworks.serve.channel import Deliver
from modelworks.serve.convoy import Rider
from modelworks.serve.detours import Caches, Errand
from modelworks.serve.metering import TASKS, Limiter, Meter
from modelworks.serve.observe import Observer, Watch
from modelworks.serve.router import Pending, Router
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part

MayCall = Callable[[Principal, str], bool]
Check = Callable[[Principal, Call], None]


def allowed(principal: Principal, deployment: str) -> bool:
    """The default policy: a key's allow-list of deployments."""
    return principal.models is None or deployment in principal.models


class Gateway:
    """`may_call` decides who may call which deployment; each of `checks` may refuse a call by raising (quota).

    Every call that names a deployment there is goes through `submit`, where `observer` counts its end.
    """

    def __init__(
        self,
        router: Router,
        *,
        may_call: MayCall = allowed,
        checks: Sequence[Check] = (),
        timeout: float = 30.0,
        observer: Observer | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        self.router = router
        self.observer = observer or Observer()
        self._may_call = may_call
        self._checks = tuple(checks)
        self._timeout = timeout
        self._limiter = limiter
        self._caches = Caches()

    def deadline(self, seconds: float | None = None) -> float:
        """The deadline of a call that begins now: `seconds` from now, or the default."""
        return time.monotonic() + (self._timeout if seconds is None else seconds)

    def deadline_of(self, route: Route, left: float | None = None) -> float:
        """The deadline of a call of `route` that begins now: a text takes as long as it is, so its models have longer.

        `left`: seconds in which the client gives up, where it says so and that is sooner.
        """
        seconds = max(self._timeout, GENERATION_SECONDS) if route.task == GENERATION else self._timeout
        return self.deadline(seconds if left is None else min(seconds, left))

    def route(self, principal: Principal, deployment: str, version: str | None = None) -> Route:
        """The route of a deployment in the principal's project. Forbidden; NotFound, also for a version not served."""
        if not self._may_call(principal, deployment):
            raise Forbidden(
                f"this key may not call {str(deployment)[:100]!r}; its list of models does not name it",
                param="deployment",
            )
        route = self.router.route((principal.project_id, deployment))
        if route is None:
            raise NotFound(
                f"there is no deployment {str(deployment)[:100]!r}", code="deployment_not_found", param="deployment"
            )
        if version is not None and version != route.model_version.rpartition(":")[2]:
            raise NotFound(
                f"{deployment!r} does not serve version {version[:20]!r}; it serves {route.model_version}",
                code="version_not_found",
                param="version",
            )
        return route

    def ready(self, principal: Principal, deployment: str, version: str | None = None) -> bool:
        """Whether a replica of the deployment could answer now."""
        return self.router.ready(self.route(principal, deployment, version).key)

    def routes(self, principal: Principal) -> list[Route]:
        """What the principal may call, by name."""
        mine = [route for route in self.router.routes() if route.project_id == principal.project_id]
        return sorted((route for route in mine if self._may_call(principal, route.name)), key=lambda route: route.name)

    def submit(self, principal: Principal, call: Call, deliver: Deliver, *, manual: bool = False) -> Pending | Errand:
        """Start a call; its parts or one error come to `deliver`. For dialects without tasks; `abort` ends it.

        `manual`: the caller tells by `took` how many parts it has passed on, and the replica waits for a slow reader.
        """
        route = self.route(principal, call.deployment, call.version)
        call.key_id = principal.key_id
        if route.task in TASKS and not call.counted:
            meter = Meter(self.observer, self._limiter, principal, route, call, deliver)
            try:
                found = self._start(principal, route, call, meter, manual)
            except ModelworksError:
                meter.settle()
                raise
            found.meter = meter
            meter.repeated = isinstance(found, Errand) and found.cached
        else:
            found = self._start(principal, route, call, deliver, manual)
        self.observer.call(route.key, principal.key_id)
        return found

    def _start(
        self, principal: Principal, route: Route, call: Call, deliver: Deliver, manual: bool
    ) -> Pending | Errand:
        if route.detours or route.cache is not None:
            return self._send_out(principal, route, call, deliver, manual)
        return self._submit(principal, route, call, deliver, manual)

    def _send_out(
        self, principal: Principal, route: Route, call: Call, deliver: Deliver, manual: bool
    ) -> Pending | Errand:
        """By the deployment's rules, which its owner set: another one that they name needs no grant of its own."""

        def submit(name: str, call: Call, deliver: Deliver) -> Pending:
            there = self.router.route((route.project_id, name))
            if there is None:
                raise Unavailable(f"the deployment {name!r} that the rules of {route.name!r} name is gone")
            return self._submit(
                principal, there, msgspec.structs.replace(call, deployment=name, version=None), deliver, manual
            )

        cache = self._caches.of(route)
        if adapter := call.params.get("adapter"):  # not to where there is none of this name
            there = (self.router.route((route.project_id, rule.to)) for rule in route.detours)
            kept = [rule for rule, to in zip(route.detours, there, strict=True) if to and adapter in to.adapters]
            route = replace(route, detours=tuple(kept))
        errand = Errand(route, call, deliver, cache, submit, lambda it: Watch(self.observer, route, it))
        errand.start()
        return errand

    def _submit(self, principal: Principal, route: Route, call: Call, deliver: Deliver, manual: bool) -> Pending:
        watch = Watch(self.observer, route, deliver)
        try:
            for check in self._checks:
                check(principal, call)
            return self.router.submit(route.key, call, watch, manual=manual)
        except ModelworksError as error:
            watch.refused(error)
            raise

    def together(self, route: Route) -> bool:
        """Whether calls of the route may be submitted by `submit_many`."""
        ruled = route.detours or route.cache is not None or route.task in TASKS
        return not (
            ruled or self._checks or self.observer.tracing is not None or route.limits.hedge_seconds is not None
        )

    def submit_many(self, riders: list[Rider]) -> bool:
        """Start calls of one convoy; False: submit them one by one. The dialect asked `route` for each principal."""
        convoy = riders[0].convoy
        return self.router.submit_many(convoy.route.key, convoy.kind, riders, convoy.deadline - time.monotonic())

    def took(self, pending: Pending | Errand, parts: int = 1) -> None:
        """So many more parts of a `manual` call were passed on."""
        if isinstance(pending, Errand):
            if pending.pending is None:
                return
            pending = pending.pending
        self.router.took(pending, parts)

    def abort(self, pending: Pending | Errand) -> bool:
        """Nobody waits for the answer any more: whether a replica was at work on it. After its end this does nothing."""
        sent = pending.pending if isinstance(pending, Errand) else pending
        at_work = sent is not None and not sent.done and sent.peer is not None
        if not pending.done:
            if isinstance(pending.deliver, Watch):
                pending.deliver.cancelled()
            if pending.meter is not None:
                pending.meter.settle(left=at_work)
        if isinstance(pending, Errand):
            pending.done = True
        if sent is not None and not sent.done:
            if sent is not pending and isinstance(sent.deliver, Watch):
                sent.deliver.cancelled()
            self.router.abort(sent)
        return at_work

    async def infer(self, principal: Principal, call: Call) -> Answer:
        """The whole answer. Cancelling the task (the client went away) aborts the call in the replica too."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        outputs: list[Any] = []

        def deliver(item: Part | ModelworksError) -> None:
            if future.done():
                return
            if isinstance(item, ModelworksError):
                future.set_exception(item)
            elif not item.done:
                outputs.extend(item.outputs)
            else:
                future.set_result(Answer(outputs + item.outputs if outputs else item.outputs, item.model_version))

        pending = self.submit(principal, call, deliver)
        try:
            return await future
        finally:
            self.abort(pending)

    async def stream(self, principal: Principal, call: Call) -> AsyncIterator[Part]:
        """The parts of the answer as they come. Leaving the loop early aborts the call."""
        arrived: asyncio.Queue[Part | ModelworksError] = asyncio.Queue()
        pending = self.submit(principal, call, arrived.put_nowait, manual=True)
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, ModelworksError):
                    raise item
                yield item
                if item.done:
                    return
                self.took(pending)
        finally:
            self.abort(pending)
