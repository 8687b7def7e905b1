"""What a reference (`iris`, `iris:2`, `iris@champion`) means in a project now. NotFound says what there is."""

from __future__ import annotations

from modelworks.core.errors import InvalidInput, NotFound
from modelworks.core.specs import Ref
from modelworks.core.types import Alias, Dataset, ModelVersion
from modelworks.store.catalog import Tx

_SHOWN = 20


def resolve_dataset(tx: Tx, project_id: str, text: str, param: str = "dataset") -> Dataset:
    """The dataset version that `name` (the newest) or `name:version` means."""
    ref = Ref.parse(text, "dataset")
    if ref.alias:
        message = f"datasets have no aliases; write {ref.name} or {ref.name}:version"
        raise InvalidInput(message, param=param, code="bad_reference")
    table = tx.table(Dataset)
    clauses = [] if ref.version is None else [table.c.version == ref.version]
    found = tx.find(Dataset, *clauses, project_id=project_id, name=ref.name, order_by=table.c.version.desc())
    if found is None:
        raise _no_dataset(tx, project_id, ref, param)
    return found


def resolve_model(tx: Tx, project_id: str, text: str) -> ModelVersion:
    """The model version that `name`, `name:version` or `name@alias` means at this moment; NotFound names what there is."""
    ref = Ref.parse(text)
    version = ref.version
    if ref.alias:
        alias = tx.find(Alias, project_id=project_id, model=ref.name, alias=ref.alias)
        if alias is None:
            known = [row.alias for row in tx.list(Alias, project_id=project_id, model=ref.name)]
            there = f"its aliases are: {', '.join(known)}" if known else "it has no aliases"
            raise NotFound(
                f"model {ref.name!r} has no alias {ref.alias!r}; {there}", code="alias_not_found", param="model"
            )
        version = alias.version
    table = tx.table(ModelVersion)
    clauses = [] if version is None else [table.c.version == version]
    found = tx.find(ModelVersion, *clauses, project_id=project_id, name=ref.name, order_by=table.c.version.desc())
    if found is None:
        raise _no_model(tx, project_id, ref)
    return found


def dataset_versions(tx: Tx, project_id: str, name: str) -> list[Dataset]:
    found = tx.list(Dataset, project_id=project_id, name=name, order_by=tx.table(Dataset).c.version)
    if not found:
        raise _no_dataset(tx, project_id, Ref.parse(name, "dataset"), "dataset")
    return found


def model_versions(tx: Tx, project_id: str, name: str) -> list[ModelVersion]:
    found = tx.list(ModelVersion, project_id=project_id, name=name, order_by=tx.table(ModelVersion).c.version)
    if not found:
        raise NotFound(f"there is no model {name[:100]!r} in this project", code="model_not_found", param="model")
    return found


def find_model(tx: Tx, project_id: str, name: str, version: int) -> ModelVersion:
    found = tx.find(ModelVersion, project_id=project_id, name=name, version=version)
    if found is None:
        raise _no_model(tx, project_id, Ref(name=name, version=version), "version")
    return found


def _no_model(tx: Tx, project_id: str, ref: Ref, param: str = "model") -> NotFound:
    versions = tx.list(ModelVersion, project_id=project_id, name=ref.name, order_by=tx.table(ModelVersion).c.version)
    if versions:
        there = ", ".join(str(one.version) for one in versions[-_SHOWN:])
        message = f"model {ref.name!r} has no version {ref.version}; its versions are: {there}"
    else:
        message = f"there is no model {str(ref)!r} in this project; `modelworks models list` shows what there is"
    return NotFound(message, code="model_not_found", param=param)


def _no_dataset(tx: Tx, project_id: str, ref: Ref, param: str) -> NotFound:
    versions = tx.list(Dataset, project_id=project_id, name=ref.name, newest_first=True, limit=_SHOWN)
    if versions:
        there = ", ".join(str(one.version) for one in reversed(versions))
        message = f"dataset {ref.name!r} has no version {ref.version}; its versions are: {there}"
    else:
        message = f"there is no dataset {ref.name!r} in this project; `modelworks data list` shows what there is"
    return NotFound(message, code="dataset_not_found", param=param)
