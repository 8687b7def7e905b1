"""Conformance suites for people who write a plug: call them in your own tests. They raise AssertionError."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from modelworks.core.errors import NotFound


def check_trainer(trainer: Any, *, hyperparameters: dict[str, Any] | None = None) -> None:
    """That a trainer (own net or other algorithm) keeps the contract of `modelworks.ml.base`, on small data of its own.

    Declared tasks and parameters; training for each task; answers of the right shape that are numbers; the same from the
    same seed; an ONNX graph that answers as training did, with the same bytes each time.
    """
    from modelworks.core.tasks import CLASSIFICATION, GENERATION, REGRESSION, TAGGING

    assert trainer.__doc__, "say in one sentence what it does: GET /api/v1/algorithms shows its docstring"
    known = {CLASSIFICATION, REGRESSION, TAGGING, GENERATION}
    assert set(trainer.tasks) <= known, f"tasks must be of {', '.join(sorted(known))}"
    tasks = [task for task in trainer.tasks if task in (CLASSIFICATION, REGRESSION)]
    assert tasks, f"declare {CLASSIFICATION}, {REGRESSION} or both"
    assert isinstance(trainer.accepts_missing, bool), "accepts_missing must be true or false"
    schema = trainer.Params.model_json_schema()
    json.dumps(schema)
    for name, field in trainer.Params.model_fields.items():
        assert not field.is_required(), f"the hyperparameter {name} needs a default"
        assert field.description, f"describe the hyperparameter {name}"
    params = trainer.Params.model_validate(hyperparameters or {})
    for task in tasks:
        for classes in (2, 3) if task == CLASSIFICATION else (None,):
            _check_task(trainer, params, classes)


def _check_task(trainer: Any, params: Any, classes: int | None) -> None:
    import numpy as np

    from modelworks.ml import graph

    random = np.random.default_rng(0)
    features = random.normal(size=(96, 8)).astype(np.float32)
    target = features[:, 0] - 2 * features[:, 1]
    if classes:
        target = np.digitize(target, np.quantile(target, np.linspace(0, 1, classes + 1)[1:-1])).astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        fitted, again = (_train(trainer, features, target, classes, params, Path(folder)) for _ in range(2))
    name, shape = ("probabilities", (96, classes)) if classes else ("value", (96,))
    answer = fitted.predict(features)
    assert set(answer) == {name}, f"predict must answer {name!r} alone, not {sorted(answer)}"
    values = np.asarray(answer[name])
    assert values.shape == shape, f"{name} has shape {values.shape}, not {shape}"
    assert np.isfinite(values).all(), f"{name} has values that are no numbers"
    if classes:
        assert np.allclose(values.sum(axis=1), 1, atol=1e-4), "probabilities must add up to 1"
    assert np.array_equal(values, again.predict(features)[name]), "the same seed must give the same model"
    model = fitted.to_onnx(features.shape[1])
    data = graph.to_bytes(model)
    assert data == graph.to_bytes(again.to_onnx(features.shape[1])), "the same model must give the same ONNX bytes"
    assert [one.name for one in model.graph.input] == ["features"], "the graph must have one input, features"
    assert [one.name for one in model.graph.output] == [name], f"the graph must have one output, {name}"
    session = graph.session(data)
    for rows in (1, 7, 96):
        got = session.run(None, {"features": features[:rows]})[0]
        assert got.dtype == np.float32, f"{name} of the graph must be float32"
        bound = 1e-5 * np.maximum(1.0, np.abs(values[:rows]))
        assert (np.abs(got - values[:rows]) <= bound).all(), "the graph does not answer as training does"


def _train(trainer: Any, features: Any, target: Any, classes: int | None, params: Any, workdir: Path) -> Any:
    from modelworks.ml.nets.examples import MemoryExamples

    ctx = QuietContext(workdir)
    one = trainer()
    if hasattr(one, "learn"):
        return one.learn(MemoryExamples(features, target, classes=classes), params, ctx, None)
    return one.train(features, target if classes else target.astype("float64"), params, ctx)


class QuietContext:
    """A job's context that keeps what it is told."""

    seed, threads, processes = 0, 1, 1
    only: str | None = None

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.kept: dict[str, bytes] = {}
        self.events: list[tuple[str, str]] = []

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        assert 0 <= fraction <= 1, f"progress goes from 0 to 1, not {fraction}"

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.events.append((kind, message))

    def metric(self, step: int, values: Any, *, unit: str = "epoch", part: str = "") -> None:
        for value in values.values():
            float(value)

    def advise(self, found: dict[str, Any]) -> None:
        assert found["seconds"] > 0, "a fit takes time"

    def spread(self, names: Any, parallel: int | None, seconds: float) -> None:
        pass

    def checkpoint(self, name: str, data: bytes) -> None:
        self.kept[name] = data

    def restore(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def model(self, ref: str) -> Any:
        raise NotFound(f"there is no model {ref!r} here", code="model_not_found")
