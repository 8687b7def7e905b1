"""A report as a page and figures: what is in it, that nothing in it is markup, and that it is made once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.core.errors import NotFound
from modelworks.core.specs import TrainingSpec
from modelworks.core.types import Job
from modelworks.ml.evaluate.folds import read_kept
from modelworks.ml.evaluate.page import page
from modelworks.ml.evaluate.plots import draw, learning_curves, plots
from modelworks.ml.train.train import Trained
from tests.jobhome import Home, caller, iris_csv
from tests.learning import Context, Table, bundled, run
from tests.test_courses import clicks, ratings
from tests.test_forecast import passengers

WHO = caller()
HOSTILE = "<script>alert('$x^{2$')</script>"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("reports") / "home")
    home.start(workers=1)
    home.ingest(WHO, iris_csv().replace("versicolor", HOSTILE))
    yield home
    home.close()


@pytest.fixture(scope="module")
def trained(home: Home) -> Job:
    given = {"model": "iris", "dataset": "iris", "target": "species", "algorithm": "logistic-regression"}
    spec = TrainingSpec.model_validate({**given, "validation": {"kfold": 3}, "slices": ["`petal length (cm)` > 4"]})
    return home.succeeded(home.library.train(WHO, spec))


def test_a_report_becomes_a_page_of_its_own_once(home: Home, trained: Job) -> None:
    report = trained.result["report_id"]
    job = home.succeeded(home.library.render_report(WHO, report))
    text = home.library.rendering(WHO, job).decode()
    assert home.library.render_report(WHO, report).id == job.id
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"<(script|link|iframe|object)|javascript:|\son\w+=|(?:src|href)=\"(?!data:image/png;base64,)", text)
    names = [one["name"] for one in job.result["plots"]]
    assert names == ["confusion-matrix", "roc", "precision-recall", "calibration", "folds", "slices"]
    assert text.count("<img ") == len(names)
    for name in names:
        assert home.library.rendering(WHO, job, name).startswith(b"\x89PNG")
    with pytest.raises(NotFound, match="it has: confusion-matrix"):
        home.library.rendering(WHO, job, "residuals")
    assert f"{trained.metrics['accuracy']['mean']:.4g}" in text
    with pytest.raises(NotFound):
        home.library.render_report(caller("proj_b"), report)


def report_of(trained: Trained) -> dict[str, Any]:
    about = {"id": "r", "job_id": "j", "model": "m", "model_version": None, "dataset": "d:1", "dataset_digest": "0" * 64, "seed": 0}
    return about | {name: trained.report[name] for name in ("metrics", "details", "method")}


def drawing(trained: Trained, ctx: Context) -> list[tuple[str, str, bytes]]:
    points = [{"step": step, "unit": unit, "part": part, "values": values} for part, unit, step, values in ctx.points]
    return draw(report_of(trained), read_kept(trained.report["predictions"]), points)


def test_a_net_on_numbers_has_residuals_and_its_learning_curve(tmp_path: Path) -> None:
    ctx = Context(tmp_path)
    trained = run(bundled("diabetes"), tmp_path, ctx, algorithm="mlp", hyperparameters={"epochs": 3, "hidden": [4]})
    drawn = drawing(trained, ctx)
    assert [name for name, _, _ in drawn] == ["predicted", "residuals", "learning-curve"]
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for _, _, png in drawn)
    assert "Learning curve" in page(report_of(trained), drawn)


QUICK: dict[str, Any] = {"epochs": 2, "hidden": [4]}


@pytest.mark.parametrize(
    ("data", "spec", "names"),
    [
        (
            lambda: bundled("breast_cancer"),
            {"algorithm": "autoencoder", "hyperparameters": {"positive": "malignant", "bottleneck": 2, **QUICK}},
            ["scores", "roc", "precision-recall", "learning-curve"],
        ),
        (
            lambda: ratings(30, 10),
            {"algorithm": "recommender", "target": "rating", "hyperparameters": {"epochs": 2, "factors": 2}},
            ["predicted", "residuals", "learning-curve"],
        ),
        (
            clicks,
            {"algorithm": "recommender", "target": None, "hyperparameters": {"epochs": 2, "factors": 2}},
            ["learning-curve"],
        ),
        (
            passengers,
            {"algorithm": "forecaster", "target": "passengers", "time": "month", "hyperparameters": {"season": 12, **QUICK}},
            ["forecast", "predicted", "residuals", "learning-curve"],
        ),
    ],
    ids=["anomalies", "ratings", "clicks", "forecast"],
)
def test_a_report_of_every_course_is_a_page(
    tmp_path: Path, data: Callable[[], Table], spec: dict[str, Any], names: list[str]
) -> None:
    ctx = Context(tmp_path)
    trained = run(data(), tmp_path, ctx, **{"target": "target", **spec})
    drawn = drawing(trained, ctx)
    assert [name for name, _, _ in drawn] == names
    assert page(report_of(trained), drawn).count("<img ") == len(names)


def test_a_second_fit_of_a_part_begins_a_line_of_its_own() -> None:
    told = [(1, 0.5), (2, 0.25), (1, 0.75), (2, 0.5)]
    points = [{"step": step, "unit": "epoch", "part": "final fit", "values": {"loss": loss}} for step, loss in told]
    (line,) = learning_curves(points).values()
    assert [math.isnan(loss) for _, loss in line] == [False, False, True, False, False]


def test_figures_of_folds_and_slices_show_what_stands_for_the_task() -> None:
    figures = {"mean": 0.5, "std": 0.1, "low": 0.4, "high": 0.6, "folds": [0.4, 0.6]}
    metrics = dict.fromkeys(("mse", "mae", "r2"), figures)
    slices = [{"slice": "age > 60", "rows": 40, "metrics": metrics}]
    for task, name in (("tabular-regression", "r2"), ("forecast", "mse")):  # mase was not asked for
        details = {"task": task, "slices": slices}
        titles = {name: title for name, title, _ in plots({"details": details, "metrics": metrics}, None, [])}
        assert titles == {"folds": f"{name} of each fold", "slices": f"{name} by slice"}
