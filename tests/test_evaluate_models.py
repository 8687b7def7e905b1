"""Evaluating models that exist: trained again part by part, or by their own graph on a test set; and comparing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from modelworks.core.errors import InvalidInput
from modelworks.core.specs import EvaluationSpec
from modelworks.core.types import Column
from modelworks.ml.evaluate.evaluate import Evaluated, evaluate
from modelworks.ml.package import Manifest, Package
from tests.learning import Context, bundled, mixed, packaged, run


def assess(
    package: Package, data: tuple[pa.Table, list[Column]], ctx: Context, other: Package | None = None, **spec: Any
) -> Evaluated:
    whole = EvaluationSpec.model_validate({"model": "m:1"} | ({"compare": "m:2"} if other else {}) | spec)
    return evaluate(whole, package, data[0], data[1], ctx, other=other)


def test_kfold_of_a_model_equals_the_validation_of_its_training(tmp_path: Path) -> None:
    data = bundled("iris")
    trained = run(data, tmp_path, algorithm="logistic-regression", validation={"kfold": 5})
    found = assess(packaged(trained, tmp_path), data, Context(tmp_path), method={"kfold": 5})
    assert found.metrics == trained.report["metrics"]
    assert found.method == {"kfold": 5}
    assert found.details["confusion_matrix"] == trained.report["details"]["confusion_matrix"]


def test_repeated_kfold(tmp_path: Path) -> None:
    data = bundled("iris")
    package = packaged(run(data, tmp_path, algorithm="logistic-regression"), tmp_path)
    found = assess(package, data, Context(tmp_path), method={"kfold": 4, "repeats": 3}, metrics=["accuracy"])
    assert len(found.metrics["accuracy"]["folds"]) == 12
    assert list(found.metrics) == ["accuracy"]


def test_a_test_set_is_answered_by_the_packaged_graph(tmp_path: Path) -> None:
    table, columns = mixed(300)
    spec: dict[str, Any] = {
        "algorithm": "gradient-boosted-trees",
        "target": "ill",
        "hyperparameters": {"n_estimators": 20},
    }
    trained = run((table.slice(0, 200), columns), tmp_path, features=["age", "visits", "member", "city"], **spec)
    found = assess(
        packaged(trained, tmp_path),
        (table.slice(200), columns),
        Context(tmp_path),
        method={"test": "held:1"},
        gates=[{"metric": "accuracy", "at_least": 0.99}],
    )
    assert found.details["test_rows"] == [100]
    assert 0.7 < found.metrics["accuracy"]["mean"] < 0.99
    assert found.details["gates"][0]["passed"] is False
    assert found.details["interval"]["resamples"] == 1000


def test_two_models_on_the_same_rows(tmp_path: Path) -> None:
    data = mixed(300)
    spec: dict[str, Any] = {"algorithm": "ridge", "target": "score"}
    good = packaged(run(data, tmp_path, features=["age", "visits", "city"], **spec), tmp_path)
    poor = packaged(run(data, tmp_path, features=["age", "member"], **spec), tmp_path)
    for method in ({"kfold": 3}, {"holdout": 0.4}, {"test": "held:1"}):
        ctx = Context(tmp_path)
        found = assess(good, data, ctx, poor, method=method, metrics=["r2", "mae"])
        comparison = found.details["comparison"]
        assert (comparison["verdict"], comparison["with"]) == ("better", "m:2")
        assert comparison["metrics"]["mae"]["difference"] < 0
        assert assess(poor, data, Context(tmp_path), good, method=method).details["comparison"]["verdict"] == "worse"
        fractions = [fraction for fraction, _, _ in ctx.reports]
        assert fractions == sorted(fractions)


def test_models_whose_row_ops_differ_are_compared_on_common_rows(tmp_path: Path) -> None:
    data = mixed(200)
    spec: dict[str, Any] = {"algorithm": "logistic-regression", "target": "ill", "features": ["age", "visits"]}
    every = packaged(run(data, tmp_path, **spec), tmp_path)
    fewer = packaged(run(data, tmp_path, transforms=["drop-missing", "standardise"], **spec), tmp_path)
    found = assess(every, data, Context(tmp_path), fewer, method={"kfold": 3})
    gaps = sum(
        a is None or b is None for a, b in zip(*(data[0].column(n).to_pylist() for n in ("age", "visits")), strict=True)
    )
    assert found.details["comparison"]["rows"] == 200 - gaps


def test_an_evaluation_goes_on_after_a_kill(tmp_path: Path) -> None:
    data = bundled("wine")
    package = packaged(run(data, tmp_path, algorithm="logistic-regression"), tmp_path)
    ctx = Context(tmp_path)
    first = assess(package, data, ctx, package, method={"kfold": 3})
    assert len(ctx.kept) == 6
    again = Context(tmp_path, kept=dict(list(ctx.kept.items())[:4]))
    second = assess(package, data, again, package, method={"kfold": 3})
    assert (second.metrics, second.details) == (first.metrics, first.details)
    assert [data["resumed"] for kind, _, data in again.events if kind == "fold"] == [True] * 4 + [False] * 2


def test_what_cannot_be_evaluated_says_why(tmp_path: Path) -> None:
    iris = bundled("iris")
    package = packaged(run(iris, tmp_path, algorithm="logistic-regression"), tmp_path)
    bare = package.manifest.model_copy(update={"lineage": {}})
    imported = Package(bare, package._locate)
    with pytest.raises(InvalidInput, match="use the method test"):
        assess(imported, iris, Context(tmp_path), method={"kfold": 3})
    found = assess(imported, iris, Context(tmp_path), method={"test": "iris:1"})
    assert found.metrics["accuracy"]["mean"] > 0.9
    wine = packaged(run(bundled("wine"), tmp_path, algorithm="logistic-regression"), tmp_path)
    with pytest.raises(InvalidInput, match="do not predict the same"):
        assess(package, iris, Context(tmp_path), wine, method={"kfold": 3})
    with pytest.raises(InvalidInput, match="has no column 'sepal length"):
        assess(package, bundled("wine"), Context(tmp_path), method={"test": "wine:1"})
    table, columns = iris
    renamed = table.set_column(4, "target", pa.array(["rose"] * 150))
    with pytest.raises(InvalidInput, match="row 1 has the class 'rose'"):
        assess(package, (renamed, columns), Context(tmp_path), method={"test": "iris:2"})
    custom = Package(Manifest(task="custom", signature=bare.signature, files=bare.files), package._locate)
    with pytest.raises(InvalidInput, match="task 'custom'"):
        assess(custom, iris, Context(tmp_path), method={"test": "iris:1"})


def test_a_test_set_in_other_types_is_read_as_the_model_needs_it(tmp_path: Path) -> None:
    table, columns = bundled("iris")
    package = packaged(run((table, columns), tmp_path, algorithm="logistic-regression"), tmp_path)
    texts = table.set_column(0, table.column_names[0], table.column(0).cast(pa.string()))
    typed = [Column(name=columns[0].name, type="category"), *columns[1:]]
    same = assess(package, (table, columns), Context(tmp_path), method={"test": "iris:1"})
    assert assess(package, (texts, typed), Context(tmp_path), method={"test": "iris:1"}).metrics == same.metrics
    spoiled = texts.set_column(0, table.column_names[0], pa.array(["long"] * 150))
    with pytest.raises(InvalidInput, match="does not fit"):
        assess(package, (spoiled, typed), Context(tmp_path), method={"test": "iris:1"})
