"""Linear models by stochastic gradient descent: scikit-learn's steps, epoch by epoch, with the curve of the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import CLASSIFICATION, REGRESSION
from modelworks.ml.base import Examples, JobContext
from modelworks.ml.train import params as p

if TYPE_CHECKING:
    import numpy as np

    from modelworks.ml.train.fitted import LinearFitted

_BATCH = 512  # rows of a step when the data is streamed
_OWN = ("class_weight", "tol", "n_iter_no_change", "penalty", "max_iter")  # handled here, not passed on as they are


class SgdClassifier:
    """Linear classification by stochastic gradient descent with L1 or L2 penalty; one against the rest with more than
    two classes.
    """

    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION,)
    accepts_missing: ClassVar[bool] = False
    Params: ClassVar[type[p.SgdClassifierParams]] = p.SgdClassifierParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> LinearFitted:
        import numpy as np
        from sklearn.linear_model import SGDClassifier
        from sklearn.utils.class_weight import compute_sample_weight

        classes = int(target.max()) + 1
        estimator = SGDClassifier(**_arguments(params, ctx.seed))
        weights = compute_sample_weight("balanced", target) if params.class_weight else None

        def epoch(rows: np.ndarray) -> None:
            estimator.partial_fit(rows, target, classes=np.arange(classes), sample_weight=weights)

        def loss(rows: np.ndarray) -> float:
            scores = estimator.decision_function(rows).reshape(len(rows), -1)
            signs = np.where(target[:, None] == (np.arange(classes) if classes > 2 else 1), 1.0, -1.0)
            return float(np.average(_margin_loss(scores * signs, params.loss).sum(axis=1), weights=weights))

        # a margin's loss may be large and its labels right
        _descend(estimator, _whole(features, epoch, loss), params, ctx, np.inf)
        return _fitted(estimator, "sigmoid" if classes == 2 else "softmax")

    def stream(self, examples: Examples, params: Any, ctx: JobContext, stopping: Any = None) -> LinearFitted:
        """As `train`, on rows that come in batches; the loss of an epoch is that of each batch before its step."""
        import numpy as np
        from sklearn.linear_model import SGDClassifier

        classes = int(examples.classes or 2)
        estimator = SGDClassifier(**_arguments(params, ctx.seed))
        share = np.ones(classes)
        if params.class_weight:
            counts = sum((np.bincount(part, minlength=classes) for part in examples.targets()), np.zeros(classes))
            share = counts.sum() / (classes * np.maximum(counts, 1))

        def step(rows: np.ndarray, target: np.ndarray) -> None:
            estimator.partial_fit(rows, target, classes=np.arange(classes), sample_weight=share[target])

        def loss(rows: np.ndarray, target: np.ndarray) -> float:
            scores = estimator.decision_function(rows).reshape(len(rows), -1)
            signs = np.where(target[:, None] == (np.arange(classes) if classes > 2 else 1), 1.0, -1.0)
            return float((_margin_loss(scores * signs, params.loss).sum(axis=1) * share[target]).sum())

        _descend(estimator, _streamed(examples, ctx.seed, estimator, step, loss), params, ctx, np.inf)
        return _fitted(estimator, "sigmoid" if classes == 2 else "softmax")


class SgdRegressor:
    """Linear regression by stochastic gradient descent with L1 or L2 penalty. Scale the features."""

    tasks: ClassVar[tuple[str, ...]] = (REGRESSION,)
    accepts_missing: ClassVar[bool] = False
    Params: ClassVar[type[p.SgdRegressorParams]] = p.SgdRegressorParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> LinearFitted:
        import numpy as np
        from sklearn.linear_model import SGDRegressor

        estimator = SGDRegressor(**_arguments(params, ctx.seed))

        def epoch(rows: np.ndarray) -> None:
            estimator.partial_fit(rows, target)

        def loss(rows: np.ndarray) -> float:
            return float(np.mean(_residual_loss(estimator.predict(rows) - target, params)))

        idle = float(np.mean(_residual_loss(target, params)))
        _descend(estimator, _whole(features, epoch, loss), params, ctx, idle)
        return _fitted(estimator, "identity")

    def stream(self, examples: Examples, params: Any, ctx: JobContext, stopping: Any = None) -> LinearFitted:
        """As `train`, on rows that come in batches; the loss of an epoch is that of each batch before its step."""
        from sklearn.linear_model import SGDRegressor

        estimator = SGDRegressor(**_arguments(params, ctx.seed))

        def loss(rows: np.ndarray, target: np.ndarray) -> float:
            return float(_residual_loss(estimator.predict(rows) - target, params).sum())

        idle = sum(float(_residual_loss(part, params).sum()) for part in examples.targets()) / max(1, len(examples))
        run = _streamed(examples, ctx.seed, estimator, lambda rows, target: estimator.partial_fit(rows, target), loss)
        _descend(estimator, run, params, ctx, idle)
        return _fitted(estimator, "identity")


def _arguments(params: Any, seed: int) -> dict[str, Any]:
    import numpy as np

    given = {name: value for name, value in params.model_dump().items() if name not in _OWN}
    penalty = None if params.penalty == "none" else params.penalty
    # a RandomState, not a number: each epoch must be shuffled differently
    return given | {"penalty": penalty, "random_state": np.random.RandomState(seed)}


def _whole(features: np.ndarray, epoch: Any, loss: Any) -> Callable[[], float]:
    """An epoch over rows in memory, and the loss after it."""
    import numpy as np

    rows = features.astype(np.float64)
    return lambda: _epoch(rows, epoch, loss)


def _streamed(examples: Examples, seed: int, estimator: Any, step: Any, loss: Any) -> Callable[[], float]:
    """An epoch over batches, shuffled otherwise each time, and the mean loss on the way."""
    import numpy as np

    done = 0

    def run() -> float:
        nonlocal done
        done += 1
        total, count = 0.0, 0
        try:
            for features, target in examples.batches(_BATCH, seed=(seed, done)):
                rows = features.reshape(len(features), -1).astype(np.float64)
                if hasattr(estimator, "coef_"):
                    total += loss(rows, target)
                    count += len(rows)
                step(rows, target)
        except ValueError:  # coefficients overflowed
            return float("inf")
        return total / count if count else 0.0

    return run


def _descend(estimator: Any, run: Callable[[], float], params: Any, ctx: JobContext, idle: float) -> None:
    """Epochs until the loss stands still; `adaptive` first divides the rate by 5, down to 1e-6, as scikit-learn does.

    `idle`: the loss of a model that says nothing; one that ends far above it has diverged, which is refused.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    curve: list[float] = []
    best, still, stalled = np.inf, 0, False
    with threadpool_limits(ctx.threads), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        while len(curve) < params.max_iter and not stalled:
            curve.append(run())
            if not np.isfinite(curve[-1]):
                break
            ctx.metric(len(curve), {"loss": curve[-1]})
            ctx.progress(len(curve) / params.max_iter, "fitting", epoch=len(curve), loss=curve[-1])
            still = 0 if params.tol is None or curve[-1] < best - params.tol else still + 1
            best = min(best, curve[-1])
            if still >= params.n_iter_no_change:
                stalled = params.learning_rate != "adaptive" or estimator.eta0 <= 1e-6
                estimator.eta0, still = estimator.eta0 / 5, 0
    if not np.isfinite(curve[-1]) or (idle > 0 and curve[-1] > 2 * idle):
        raise InvalidInput(
            f"gradient descent diverged after {len(curve)} epochs; scale the features (standardise), lower eta0 "
            "or choose another learning_rate",
            code="diverged",
            param="hyperparameters.eta0",
        )
    ctx.event("log", f"{len(curve)} epochs, training loss {curve[-1]:.6g}", curve=thin(curve), epochs=len(curve))
    if params.tol is not None and not stalled:
        ctx.event(
            "warning", f"no convergence in {params.max_iter} epochs; raise max_iter, scale the features or raise tol"
        )


def _epoch(rows: np.ndarray, epoch: Any, loss: Any) -> float:
    """The loss after one more epoch; infinite when coefficients overflowed, which scikit-learn says by ValueError."""
    try:
        epoch(rows)
        return float(loss(rows))
    except ValueError:
        return float("inf")


def thin(curve: list[float], points: int = 100) -> list[float]:
    """At most about `points` of the curve, evenly spread, the last among them."""
    step = max(1, len(curve) // points)
    return curve[::-1][::step][::-1]


def _margin_loss(margins: np.ndarray, name: str) -> np.ndarray:
    import numpy as np

    if name == "log_loss":
        return np.logaddexp(0, -margins)
    if name == "modified_huber":
        return np.where(margins >= -1, np.maximum(0, 1 - margins) ** 2, -4 * margins)
    if name == "perceptron":
        return np.maximum(0, -margins)
    hinge = np.maximum(0, 1 - margins)
    return hinge**2 if name == "squared_hinge" else hinge


def _residual_loss(residuals: np.ndarray, params: Any) -> np.ndarray:
    import numpy as np

    size = np.abs(residuals)
    if params.loss == "squared_error":
        return size**2 / 2
    if params.loss == "huber":
        return np.where(size <= params.epsilon, size**2 / 2, params.epsilon * size - params.epsilon**2 / 2)
    beyond = np.maximum(0, size - params.epsilon)
    return beyond if params.loss == "epsilon_insensitive" else beyond**2


def _fitted(estimator: Any, link: Any) -> LinearFitted:
    import numpy as np

    from modelworks.ml.train.fitted import LinearFitted

    coefficients = np.atleast_2d(np.asarray(estimator.coef_, dtype=np.float64))
    return LinearFitted(coefficients, np.asarray(estimator.intercept_, dtype=np.float64).reshape(-1), link)
