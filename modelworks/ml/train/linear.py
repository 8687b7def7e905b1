"""Linear and logistic regression by scikit-learn, fitted in float64 so that results equal scikit-learn's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import CLASSIFICATION, REGRESSION
from modelworks.ml.base import JobContext
from modelworks.ml.train import params as p

if TYPE_CHECKING:
    import numpy as np

    from modelworks.ml.train.fitted import LinearFitted


def _regress(estimator: Any, features: np.ndarray, target: np.ndarray, ctx: JobContext) -> LinearFitted:
    import numpy as np

    from modelworks.ml.train.fitted import LinearFitted
    from modelworks.ml.train.fitting import watched

    watched(lambda: estimator.fit(features.astype(np.float64), target), ctx, "fitting")
    coefficients = np.asarray(estimator.coef_, dtype=np.float64).reshape(1, -1)
    intercept = np.asarray(estimator.intercept_, dtype=np.float64).reshape(1)
    return LinearFitted(coefficients, intercept, "identity")


class LinearRegression:
    """Ordinary least squares."""

    tasks: ClassVar[tuple[str, ...]] = (REGRESSION,)
    accepts_missing: ClassVar[bool] = False
    Params: ClassVar[type[p.LinearRegressionParams]] = p.LinearRegressionParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> LinearFitted:
        from sklearn.linear_model import LinearRegression

        return _regress(LinearRegression(**params.model_dump()), features, target, ctx)


class Ridge:
    """Least squares with an L2 penalty."""

    tasks: ClassVar[tuple[str, ...]] = (REGRESSION,)
    accepts_missing: ClassVar[bool] = False
    Params: ClassVar[type[p.RidgeParams]] = p.RidgeParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> LinearFitted:
        from sklearn.linear_model import Ridge

        return _regress(Ridge(**params.model_dump(), random_state=ctx.seed), features, target, ctx)


class Lasso:
    """Least squares with an L1 penalty: many coefficients become exactly 0."""

    tasks: ClassVar[tuple[str, ...]] = (REGRESSION,)
    accepts_missing: ClassVar[bool] = False
    Params: ClassVar[type[p.LassoParams]] = p.LassoParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> LinearFitted:
        from sklearn.linear_model import Lasso

        return _regress(Lasso(**params.model_dump(), random_state=ctx.seed), features, target, ctx)


class ElasticNet:
    """Least squares with L1 and L2 penalties."""

    tasks: ClassVar[tuple[str, ...]] = (REGRESSION,)
    accepts_missing: ClassVar[bool] = False
    Params: ClassVar[type[p.ElasticNetParams]] = p.ElasticNetParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> LinearFitted:
        from sklearn.linear_model import ElasticNet

        return _regress(ElasticNet(**params.model_dump(), random_state=ctx.seed), features, target, ctx)


_SOLVERS = {
    "l2": ("lbfgs", "newton-cg", "newton-cholesky", "liblinear", "sag", "saga"),
    "none": ("lbfgs", "newton-cg", "newton-cholesky", "sag", "saga"),
    "l1": ("saga", "liblinear"),
    "elasticnet": ("saga",),
}


class LogisticRegression:
    """Logistic regression: binary, or multinomial with more than two classes; penalties l2, l1, elasticnet or none."""

    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION,)
    accepts_missing: ClassVar[bool] = False
    Params: ClassVar[type[p.LogisticRegressionParams]] = p.LogisticRegressionParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> LinearFitted:
        import numpy as np
        from sklearn.linear_model import LogisticRegression

        from modelworks.ml.train.fitted import LinearFitted
        from modelworks.ml.train.fitting import watched

        classes = int(target.max()) + 1
        estimator = LogisticRegression(
            C=np.inf if params.penalty == "none" else params.C,
            l1_ratio={"l2": 0.0, "none": 0.0, "l1": 1.0, "elasticnet": params.l1_ratio}[params.penalty],
            fit_intercept=params.fit_intercept,
            class_weight=params.class_weight,
            solver=_solver(params, classes),
            max_iter=params.max_iter,
            tol=params.tol,
            random_state=ctx.seed,
        )
        watched(lambda: estimator.fit(features.astype(np.float64), target), ctx, "fitting")
        link: Any = "sigmoid" if classes == 2 else "softmax"
        intercept = np.broadcast_to(np.asarray(estimator.intercept_, dtype=np.float64), len(estimator.coef_))
        return LinearFitted(np.asarray(estimator.coef_, dtype=np.float64), intercept, link)


def _solver(params: Any, classes: int) -> str:
    allowed = _SOLVERS[params.penalty]
    if params.solver == "auto":
        return allowed[0]
    if params.solver not in allowed or (params.solver == "liblinear" and classes > 2):
        fitting = [name for name in allowed if name != "liblinear" or classes == 2]
        raise InvalidInput(
            f"the solver {params.solver} does not do penalty {params.penalty} with {classes} classes; "
            f"use auto or one of: {', '.join(fitting)}",
            code="bad_hyperparameter",
            param="hyperparameters.solver",
        )
    return str(params.solver)
