"""From a fitted model to a package: one graph from raw columns to answers, its manifest, and proof that it answers
alike.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import ModelworksError
from modelworks.core.specs import TrainingSpec
from modelworks.core.tasks import kind_of, named
from modelworks.core.types import Signature, TensorSpec
from modelworks.ml.base import Models
from modelworks.ml.data.transforms.media_fit import spread
from modelworks.ml.data.transforms.rows import missing_mask
from modelworks.ml.data.types import batch_to_rows, signature_inputs
from modelworks.ml.evaluate.predictions import labels
from modelworks.ml.graph import compose, to_bytes
from modelworks.ml.package import Manifest, ParitySamples
from modelworks.ml.runtimes.onnx import OnnxRuntime
from modelworks.ml.runtimes.parity import difference
from modelworks.ml.train.algorithms import TRAINERS, reads
from modelworks.ml.train.anomaly import Anomaly
from modelworks.ml.train.fit import Model
from modelworks.ml.train.fitted import with_label
from modelworks.ml.train.problem import Problem, class_text
from modelworks.ml.train.seal import seal

if TYPE_CHECKING:
    from modelworks.ml.base import Batch

SAMPLES = 32
SAMPLE_BYTES = 1 << 20  # of images and sounds among them
_CHUNK = 8192
_SAMPLED_FROM = 512  # rows of data that is not in memory
_LIBRARIES = ("numpy", "scikit-learn", "lightgbm", "onnx", "onnxruntime", "modelworks")


def write_graph(problem: Problem, model: Model) -> bytes:
    """The ONNX graph from raw columns (and host outputs) to `label` and `probabilities`, or `value`."""
    estimator = model.fitted.to_onnx(len(model.preparation.feature_names))
    if isinstance(problem, Anomaly):
        estimator = problem.finish(estimator, model)
    elif problem.classes is not None:
        estimator = with_label(estimator, [class_text(name) for name in problem.classes], model.threshold)
    return to_bytes(compose(model.preparation.graph(), estimator))


def signature_of(problem: Problem, model: Model) -> Signature:
    """Only the columns that the features depend on; whether each may be missing is the preparation's word."""
    used = [column for column in problem.columns if column.name in set(model.preparation.inputs)]
    inputs = [
        spec.model_copy(update={"nullable": model.preparation.nullable[spec.name]}) for spec in signature_inputs(used)
    ]
    if isinstance(problem, Anomaly):
        return Signature(inputs=inputs, outputs=problem.outputs())
    if problem.classes is None:
        return Signature(inputs=inputs, outputs=[TensorSpec(name="value", datatype="FP32", shape=[-1])])
    outputs = [
        TensorSpec(name="label", datatype="BYTES", shape=[-1]),
        TensorSpec(name="probabilities", datatype="FP32", shape=[-1, len(problem.classes)]),
    ]
    return Signature(inputs=inputs, outputs=outputs)


def task_name(problem: Problem, signature: Signature) -> str:
    """By what the trainer is made for where that is one kind, else by the features that it uses."""
    made_for = reads(TRAINERS.get(problem.spec.algorithm))
    kind = kind_of(one.column or "" for one in signature.inputs)
    return named(problem.task, made_for[0] if len(made_for) == 1 and made_for[0] != "tabular" else kind)


def package(
    problem: Problem, model: Model, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and its files.

    ModelworksError when the graph does not answer as training did on every row of the data.
    """
    spec, signature = problem.spec, signature_of(problem, model)

    def prove(runtime: OnnxRuntime, manifest: Manifest) -> ParitySamples:
        check_every_row(problem, model, runtime, manifest)
        return parity_samples(problem, model, manifest)

    return seal(
        write_graph(problem, model), prove, workdir, threads,
        task=task_name(problem, signature),
        algorithm=spec.algorithm,
        signature=signature,
        classes=problem.classes,
        host_transforms=model.preparation.host,
        lineage=lineage,
        metrics=metrics,
        licence=spec.licence,
        description=spec.description,
    )  # fmt: skip


def training_side(problem: Problem, model: Model, part: Batch) -> dict[str, np.ndarray]:
    """What training says about rows, as outputs by name, rounded to float32 once."""
    answer = model.predict(part)
    if isinstance(problem, Anomaly):
        return problem.said(model, answer)
    if problem.classes is None:
        return {"value": answer.astype(np.float32)}
    names = np.array([class_text(name) for name in problem.classes], dtype=object)
    return {"label": names[labels(answer, model.threshold)], "probabilities": answer.astype(np.float32)}


def check_every_row(problem: Problem, model: Model, runtime: OnnxRuntime, manifest: Manifest) -> None:
    rows = problem.rows
    for chunk, part in problem.portions(rows, _CHUNK):
        got = runtime.predict({spec.name: part[spec.name] for spec in manifest.signature.inputs})
        found = difference(training_side(problem, model, part), got, manifest.parity.tolerance)
        if found:
            raise ModelworksError(
                f"the packaged graph does not answer as training did ({found}, counted from row {chunk[0] + 1} of the "
                "data); "
                "please report this with the algorithm and the transforms",
                code="parity_mismatch",
            )


def parity_samples(problem: Problem, model: Model, manifest: Manifest) -> ParitySamples:
    """Rows spread over the data, among them one with a missing value where there is one."""
    rows = problem.rows if problem.stored is None else spread(problem.rows, _SAMPLED_FROM)
    rows = rows[: _within(problem, rows)]
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows))).round().astype(np.int64))
    batch = problem.part(rows)
    gaps = np.zeros(len(rows), dtype=bool)
    for spec in manifest.signature.inputs:
        gaps |= missing_mask(batch[spec.name])
    if gaps.any() and not gaps[chosen].any():
        chosen[-1] = int(gaps.argmax())
        chosen = np.unique(chosen)
    part = problem.part(rows[chosen])
    outputs = training_side(problem, model, part)
    return ParitySamples(
        inputs=batch_to_rows(part, manifest.signature.inputs),
        outputs={name: values.tolist() for name, values in outputs.items()},
    )


def _within(problem: Problem, rows: np.ndarray) -> int:
    """How many of the first `rows` may be chosen among, so that SAMPLES of their files stay within SAMPLE_BYTES."""
    names = [column.name for column in problem.columns if column.type in ("image", "audio")]
    if not names:
        return len(rows)
    part = problem.part(rows)
    sizes = np.zeros(len(rows), dtype=np.int64)
    for name in names:
        sizes += np.array([len(data) for data in part[name]], dtype=np.int64)
    if SAMPLES * int(sizes.max()) <= SAMPLE_BYTES:
        return len(rows)
    return max(1, int(np.searchsorted(sizes.cumsum(), SAMPLE_BYTES, side="right")))


def models_named(spec: TrainingSpec) -> list[str]:
    """The registered models that a training builds on."""
    named = [spec.hyperparameters.get("backbone"), *(step.params.get("model") for step in spec.transforms or [])]
    return sorted({ref for ref in named if isinstance(ref, str)})


def _lasting(spec: TrainingSpec) -> dict[str, Any]:
    """The spec without what has no influence on the result."""
    kept = spec.model_dump(mode="json", exclude={"search", "advise"})
    if kept["validation"]:
        kept["validation"].pop("parallel", None)
    return kept


def lineage_of(
    spec: TrainingSpec, dataset: str, dataset_digest: str, code_version: str, models: Models
) -> dict[str, Any]:
    """Where a model comes from: nothing in it depends on the clock."""
    built_on = {ref: models(ref).manifest for ref in models_named(spec)}
    on = {"models": {ref: {"digest": one.digest, "licence": one.licence} for ref, one in built_on.items()}} if built_on else {}
    return {
        **on,
        "dataset": dataset,
        "dataset_digest": dataset_digest,
        "spec": _lasting(spec),
        "seeds": {"split": spec.seed, "training": spec.seed},
        "code_version": code_version,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
