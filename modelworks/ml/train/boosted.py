"""Gradient boosted decision trees by LightGBM, made deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from modelworks.core.tasks import CLASSIFICATION, REGRESSION
from modelworks.ml.base import JobContext
from modelworks.ml.train import params as p

if TYPE_CHECKING:
    import numpy as np

    from modelworks.ml.train.fitted import TreesFitted


class GradientBoostedTrees:
    """Gradient boosted decision trees (LightGBM) for classification and regression; missing numbers need no filling."""

    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION, REGRESSION)
    accepts_missing: ClassVar[bool] = True
    Params: ClassVar[type[p.BoostedTreesParams]] = p.BoostedTreesParams

    def train(self, features: np.ndarray, target: np.ndarray, params: Any, ctx: JobContext) -> TreesFitted:
        """Integer targets are class indices, float ones values."""
        import lightgbm
        import numpy as np
        from sklearn.utils.class_weight import compute_sample_weight

        from modelworks.ml.train.fitted import TreesFitted
        from modelworks.ml.train.sgd import thin

        classes = int(target.max()) + 1 if target.dtype.kind == "i" else 0
        weights = compute_sample_weight("balanced", target) if params.class_weight and classes else None
        settings = _settings(params, classes, ctx)
        data = lightgbm.Dataset(
            features.astype(np.float64), label=target, weight=weights, params=settings, free_raw_data=False
        )

        curve: list[float] = []

        def report(env: Any) -> None:
            losses = {name: value for _, name, value, _ in env.evaluation_result_list}
            curve.extend(losses.values())
            ctx.metric(env.iteration + 1, {"loss": next(iter(losses.values()))}, unit="round")
            ctx.progress((env.iteration + 1) / params.n_estimators, "boosting", round=env.iteration + 1, **losses)

        booster = lightgbm.train(
            settings, data, num_boost_round=params.n_estimators, valid_sets=[data], callbacks=[report]
        )
        ctx.event("log", f"{len(curve)} rounds, training loss {curve[-1]:.6g}", curve=thin(curve), rounds=len(curve))
        if all("split_feature" not in tree["tree_structure"] for tree in booster.dump_model()["tree_info"]):
            ctx.event(
                "warning",
                f"no split was found: {len(features)} rows are few for min_child_samples "
                f"{params.min_child_samples}; lower it",
            )
        if not classes:
            return TreesFitted(booster, "identity", 1)
        return TreesFitted(booster, "sigmoid", 1) if classes == 2 else TreesFitted(booster, "softmax", classes)


def _settings(params: Any, classes: int, ctx: JobContext) -> dict[str, Any]:
    given = params.model_dump(exclude={"n_estimators", "objective", "class_weight"})
    if classes:
        objective = "binary" if classes == 2 else "multiclass"
    else:
        objective = "regression_l1" if params.objective == "absolute_error" else "regression"
    return given | {
        "objective": objective,
        **({"num_class": classes} if classes > 2 else {}),
        "subsample_freq": 1 if params.subsample < 1 else 0,
        "seed": ctx.seed % 2**31,  # LightGBM's seeds are int32
        "num_threads": ctx.threads,
        "deterministic": True,
        "force_col_wise": True,
        "verbosity": -1,
    }
