"""Running a fit that cannot be interrupted: a cancelled job ends within a second, and warnings become its events."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from modelworks.ml.base import JobContext

T = TypeVar("T")
_POLL = 0.5


def watched(fit: Callable[[], T], ctx: JobContext, stage: str) -> T:
    """`fit()`, with `ctx.progress` called twice a second meanwhile, which raises Cancelled.

    The fit runs on a daemon thread: after a cancel it is left behind and dies with the job's process. What scikit-learn
    warns of (no convergence) becomes an event of kind "warning".
    """
    from threadpoolctl import threadpool_limits

    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = fit()
        except BaseException as error:  # carried to the caller's thread, which raises it
            outcome["error"] = error

    with warnings.catch_warnings(record=True) as caught, threadpool_limits(ctx.threads):
        warnings.simplefilter("always")
        thread = threading.Thread(target=run, name="fit", daemon=True)
        thread.start()
        thread.join(_POLL)
        while thread.is_alive():
            ctx.progress(0.0, stage)
            thread.join(_POLL)
    report(caught, ctx)
    if "error" in outcome:
        raise outcome["error"]
    result: T = outcome["result"]
    return result


def report(caught: list[warnings.WarningMessage], ctx: JobContext) -> None:
    """Each different warning once, in one line; deprecations are the developer's business."""
    from sklearn.exceptions import ConvergenceWarning

    seen: set[str] = set()
    for warning in caught:
        if issubclass(warning.category, DeprecationWarning | FutureWarning | ResourceWarning):
            continue
        text = " ".join(str(warning.message).split())
        if issubclass(warning.category, ConvergenceWarning):
            text = f"the fit did not converge: {text[:200]}; raise max_iter, scale the features or raise tol"
        if text not in seen:
            seen.add(text)
            ctx.event("warning", text[:400])
