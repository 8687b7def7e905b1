"""The hyperparameters of every built-in algorithm, declared as data: defaults as scikit-learn's and LightGBM's. Light."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ClassWeight = Annotated[
    Literal["balanced"] | None,
    Field(description="`balanced` weighs each class by the inverse of its share of the rows; null: all rows alike"),
]
FitIntercept = Annotated[bool, Field(description="whether to learn a constant term")]
Tolerance = Annotated[float, Field(ge=0, le=1, description="stop when an iteration improves by less than this")]
Iterations = Annotated[int, Field(ge=1, le=1_000_000, description="iterations at most")]
Alpha = Annotated[float, Field(ge=0, le=1e12, description="strength of the penalty; 0 is no penalty")]
L1Ratio = Annotated[float, Field(ge=0, le=1, description="share of L1 in the penalty: 0 is pure L2, 1 is pure L1")]


class Params(BaseModel):
    """Unknown hyperparameters are refused; a number must be one, not a text; NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LinearRegressionParams(Params):
    fit_intercept: FitIntercept = True
    positive: bool = Field(False, description="whether coefficients must not be negative")


class RidgeParams(Params):
    alpha: Alpha = 1.0
    fit_intercept: FitIntercept = True
    positive: bool = Field(False, description="whether coefficients must not be negative")


class LassoParams(Params):
    alpha: Alpha = 1.0
    fit_intercept: FitIntercept = True
    positive: bool = Field(False, description="whether coefficients must not be negative")
    max_iter: Iterations = 1000
    tol: Tolerance = 1e-4


class ElasticNetParams(LassoParams):
    l1_ratio: L1Ratio = 0.5


class LogisticRegressionParams(Params):
    penalty: Literal["l2", "l1", "elasticnet", "none"] = Field("l2", description="the penalty on the coefficients")
    C: float = Field(1.0, gt=0, le=1e12, description="inverse of the penalty's strength; smaller is stronger")
    l1_ratio: L1Ratio = Field(0.5, description="with penalty elasticnet: share of L1 in it")
    fit_intercept: FitIntercept = True
    class_weight: ClassWeight = None
    solver: Literal["auto", "lbfgs", "newton-cg", "newton-cholesky", "liblinear", "sag", "saga"] = Field(
        "auto", description="auto: lbfgs for l2 and none, saga for l1 and elasticnet"
    )
    max_iter: Iterations = 1000
    tol: Tolerance = 1e-4


class SgdParams(Params):
    """What stochastic gradient descent has in both tasks."""

    penalty: Literal["l2", "l1", "elasticnet", "none"] = Field("l2", description="the penalty on the coefficients")
    alpha: Alpha = 1e-4
    l1_ratio: L1Ratio = Field(0.15, description="with penalty elasticnet: share of L1 in it")
    fit_intercept: FitIntercept = True
    max_iter: int = Field(1000, ge=1, le=100_000, description="epochs at most: passes over the training rows")
    tol: float | None = Field(
        1e-3,
        ge=0,
        le=1,
        description="stop when the training loss improved by less than this for n_iter_no_change epochs; null: never",
    )
    n_iter_no_change: int = Field(5, ge=1, le=10_000, description="epochs without improvement until it stops")
    shuffle: bool = Field(True, description="whether each epoch visits the rows in another order")
    epsilon: float = Field(
        0.1, ge=0, le=1e12, description="with loss huber or epsilon_insensitive: the width of the tolerant zone"
    )
    eta0: float = Field(0.01, gt=0, le=1e6, description="initial learning rate of constant, invscaling and adaptive")
    power_t: float = Field(0.5, ge=0, le=10, description="exponent of invscaling: eta0 / t**power_t")
    average: bool = Field(False, description="whether to average the coefficients over all steps")


class SgdClassifierParams(SgdParams):
    loss: Literal["log_loss", "hinge", "squared_hinge", "modified_huber", "perceptron"] = Field(
        "log_loss",
        description="log_loss is a logistic regression, hinge a linear support vector machine. Probabilities are the "
        "sigmoid (two classes) or softmax (more) of the scores: calibrated at best for log_loss, else only an order",
    )
    learning_rate: Literal["optimal", "constant", "invscaling", "adaptive"] = Field(
        "optimal", description="optimal: 1 / (alpha * (t + t0)); adaptive: eta0, a fifth of it at each standstill"
    )
    class_weight: ClassWeight = None


class SgdRegressorParams(SgdParams):
    loss: Literal["squared_error", "huber", "epsilon_insensitive", "squared_epsilon_insensitive"] = Field(
        "squared_error", description="the loss that each step descends"
    )
    learning_rate: Literal["invscaling", "constant", "optimal", "adaptive"] = Field(
        "invscaling", description="invscaling: eta0 / t**power_t; adaptive: eta0, a fifth of it at each standstill"
    )
    power_t: float = Field(0.25, ge=0, le=10, description="exponent of invscaling: eta0 / t**power_t")


class BoostedTreesParams(Params):
    n_estimators: int = Field(
        100, ge=1, le=100_000, description="boosting rounds; with k > 2 classes each adds k trees"
    )
    learning_rate: float = Field(0.1, gt=0, le=10, description="how much each tree counts")
    num_leaves: int = Field(31, ge=2, le=131_072, description="leaves of a tree at most")
    max_depth: int = Field(-1, ge=-1, le=1000, description="depth of a tree at most; -1: no limit")
    min_child_samples: int = Field(20, ge=1, le=1_000_000, description="rows in a leaf at least")
    min_child_weight: float = Field(1e-3, ge=0, le=1e12, description="sum of the Hessian in a leaf at least")
    min_split_gain: float = Field(0.0, ge=0, le=1e12, description="gain of a split at least")
    subsample: float = Field(1.0, gt=0, le=1, description="share of the rows that each round sees")
    colsample_bytree: float = Field(1.0, gt=0, le=1, description="share of the features that each tree sees")
    reg_alpha: float = Field(0.0, ge=0, le=1e12, description="L1 penalty on the leaves")
    reg_lambda: float = Field(0.0, ge=0, le=1e12, description="L2 penalty on the leaves")
    max_bin: int = Field(255, ge=2, le=65_535, description="histogram bins of a feature")
    objective: Literal["auto", "squared_error", "absolute_error"] = Field(
        "auto", description="for regression: auto is squared_error; classification always uses the log loss"
    )
    class_weight: ClassWeight = None
