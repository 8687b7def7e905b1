"""The registered models that a training builds on: each reference becomes the version it means now, of the right task."""

from __future__ import annotations

from typing import Any

from modelworks.control.references import resolve_model
from modelworks.core.embedding import EMBEDDING
from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.specs import TrainingSpec, TransformSpec
from modelworks.core.types import ModelVersion
from modelworks.ml.train.algorithms import AUTO, TRAINERS
from modelworks.store.catalog import Tx

_HOW = {
    EMBEDDING: "an embedding model of texts; register one, for example by `modelworks run recipes/embed.toml`",
    "image-embedding": "an image model; register its ONNX, for example as in docs/recipes.md, with the task image-embedding",
}


def resolved(tx: Tx, project_id: str, spec: TrainingSpec) -> tuple[TrainingSpec, list[str]]:
    """`spec` (checked) with `backbone` and every transform's `model` as name:version, and the ids of those versions.

    NotFound, InvalidInput.
    """
    used: dict[str, None] = {}

    def find(named: Any, task: str, param: str) -> str:
        model = _find(tx, project_id, named, task, param)
        used[model.id] = None
        return model.ref

    hyperparameters = dict(spec.hyperparameters)
    wanted = None if spec.algorithm == AUTO else getattr(TRAINERS.get(spec.algorithm), "backbone", None)
    if wanted is not None:
        named = hyperparameters.get("backbone")
        hyperparameters["backbone"] = find(named, wanted, "hyperparameters.backbone")
    transforms = spec.transforms
    if transforms is not None:
        transforms = [
            _with_model(one, find(one.params.get("model"), EMBEDDING, f"transforms[{place}].model")) if _names_model(one) else one
            for place, one in enumerate(transforms)
        ]
    return spec.model_copy(update={"hyperparameters": hyperparameters, "transforms": transforms}), list(used)


def _names_model(step: TransformSpec) -> bool:
    return step.op == "embed" or bool(step.params.get("model"))


def _with_model(step: TransformSpec, ref: str) -> TransformSpec:
    return TransformSpec.model_validate({**step.model_dump(exclude_none=True), "model": ref})


def _find(tx: Tx, project_id: str, named: Any, task: str, param: str) -> ModelVersion:
    if named is not None:
        found = _named(tx, project_id, str(named), param)
        if task == EMBEDDING and found.task != task:
            raise InvalidInput(f"{found.ref} does {found.task}; this takes {_HOW[task]}", code="wrong_task", param=param)
        return found
    newest = tx.list(ModelVersion, project_id=project_id, task=task, newest_first=True, limit=1)
    if not newest:
        field = param.rpartition(".")[2]
        message = f"this project has no {task} model, and {field} takes {_HOW[task]}"
        raise NotFound(message, code="model_not_found", param=param)
    return newest[0]


def _named(tx: Tx, project_id: str, named: str, param: str) -> ModelVersion:
    try:
        return resolve_model(tx, project_id, named)
    except (NotFound, InvalidInput) as error:
        raise type(error)(error.message, code=error.code, param=param) from None
