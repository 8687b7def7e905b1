"""What may be asked for: each request is checked, and its references resolved, before anything is queued. Light."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec

import modelworks
from modelworks.control import backbones
from modelworks.control.references import resolve_dataset, resolve_model
from modelworks.core.errors import InvalidInput
from modelworks.core.specs import ALIAS_PATTERN, NAME_PATTERN, EvaluationSpec, Method, Ref, TrainingSpec
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Dataset, Job, ModelVersion, Report
from modelworks.ml.evaluate.asked import check_language, check_other, columns_of, settled, text_column
from modelworks.ml.evaluate.catalogue import check_metrics, offered
from modelworks.ml.evaluate.slices import parse_slice
from modelworks.ml.search.space import check_search
from modelworks.ml.train.algorithms import AUTO
from modelworks.ml.train.checks import check_method, check_training, find, task_in
from modelworks.store.catalog import Tx

_CODE = str(Path(modelworks.__file__).parent.parent)
_TRACE = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*", re.MULTILINE)
SOURCES = ("sklearn:", "package:", "https://")
TASKS = ("tabular-classification", "tabular-regression")
MAX_CLASSES = 100_000


def training(tx: Tx, project_id: str, spec: TrainingSpec) -> dict[str, Any]:
    """The job's spec: `spec` with defaults filled in and each dataset by its version, beside their ids."""
    dataset = resolve_dataset(tx, project_id, spec.dataset)
    checked, models = backbones.resolved(tx, project_id, check_training(spec, dataset.columns))
    search = check_search(checked, task_in(checked, dataset.columns))
    if spec.advise and spec.algorithm == AUTO:
        raise InvalidInput("auto keeps to its time budget; name one algorithm to be advised of", param="advise")
    if search and search.validation:
        check_method(search.validation, dataset.columns, spec.target)
    for one in spec.slices:
        parse_slice(one, dataset.columns)
    checked = checked.model_copy(update={"dataset": dataset.ref, "search": search})
    resolved = checked.model_dump(mode="json") | {"dataset_id": dataset.id, "model_version_ids": models}
    if spec.validation and spec.validation.test:
        test = resolve_dataset(tx, project_id, spec.validation.test, "validation.test")
        if spec.target:
            find(test.columns, spec.target, "validation.test")
        resolved["validation"]["test"] = test.ref
        resolved["test_dataset_id"] = test.id
    return resolved


def has_parts(spec: dict[str, Any]) -> bool:
    """Whether a job of this spec will wait for others that are parts of it."""
    method = spec.get("validation") or spec.get("method") or {}
    if spec.get("advise"):
        return False
    return bool(spec.get("search")) or (method.get("kfold") is not None and (method.get("parallel") or 1) > 1)


def evaluation(tx: Tx, project_id: str, spec: EvaluationSpec) -> dict[str, Any]:
    """The job's spec: each model and dataset by its version, beside their ids."""
    model, method = resolve_model(tx, project_id, str(spec.model)), spec.how
    if model.task == GENERATION:
        check_language(spec)
    elif spec.text:
        raise InvalidInput(f"text is for language models, and {model.ref} does {model.task}; leave it out", param="text")
    else:
        check_metrics(model.task, spec.metrics, spec.gates)
    if method.test:  # then the test set is all the data there is
        dataset = resolve_dataset(tx, project_id, method.test, "method.test")
    elif spec.dataset:
        dataset = resolve_dataset(tx, project_id, spec.dataset)
    else:
        dataset = _trained_on(tx, project_id, model)
    if model.task == GENERATION:
        text_column(spec, dataset.columns)
    else:
        _check_split(method, model, dataset)
    for one in spec.slices:
        parse_slice(one, dataset.columns)
    resolved = spec.model_dump(mode="json") | {
        "model": model.ref,
        "model_version_id": model.id,
        "dataset": dataset.ref,
        "dataset_id": dataset.id,
    }
    if method.test:
        resolved["method"]["test"] = dataset.ref
    if spec.compare:
        other = resolve_model(tx, project_id, spec.compare)
        if other.task != model.task:
            raise InvalidInput(
                f"{other.ref} does {other.task} and {model.ref} {model.task}; only models of one task can be compared",
                param="compare",
            )
        resolved["compare"] = other.ref
        resolved["compare_version_id"] = other.id
    return resolved


def predictions(tx: Tx, project_id: str, spec: EvaluationSpec) -> tuple[dict[str, Any], bytes | None]:
    """(the job's spec, the rows that the request itself brings, as JSON Lines)."""
    given = spec.predictions
    assert given is not None
    resolved = spec.model_dump(mode="json") | {"model": _name_of(tx, project_id, spec, "model") or "predictions"}
    lines = None
    if given.rows is not None:
        columns = columns_of(given.rows)
        lines = _lines(given.rows)
        resolved |= {"filename": "rows.jsonl", "texts": [one.name for one in columns if one.type == "text"]}
    else:
        dataset = resolve_dataset(tx, project_id, str(spec.dataset))
        columns = dataset.columns
        resolved |= {"dataset": dataset.ref, "dataset_id": dataset.id}
    given = settled(given, columns)
    check_metrics(given.task, spec.metrics, spec.gates, among=offered(given))
    for one in spec.slices:
        parse_slice(one, columns)
    if given.compare is not None and given.compare.dataset:
        other = resolve_dataset(tx, project_id, given.compare.dataset, "predictions.compare.dataset")
        check_other(given, other.columns)
        given = given.model_copy(update={"compare": given.compare.model_copy(update={"dataset": other.ref})})
        resolved["compare_dataset_id"] = other.id
    else:
        check_other(given, columns)
    if version := resolved["model"] if ":" in resolved["model"] else None:
        resolved["model_version_id"] = resolve_model(tx, project_id, version).id
    return resolved | {"predictions": given.model_copy(update={"rows": None}).model_dump(mode="json")}, lines


def _name_of(tx: Tx, project_id: str, spec: EvaluationSpec, what: str) -> str | None:
    """Whose predictions they are: any name; with a version or alias, one that is here."""
    if spec.model is None:
        return None
    ref = Ref.parse(spec.model, what)
    return resolve_model(tx, project_id, spec.model).ref if ref.version or ref.alias else ref.name


def _lines(rows: list[dict[str, Any]]) -> bytes:
    """What is inside of a value, such as boxes, is a text of JSON."""
    encode = msgspec.json.encode
    flat = [
        {name: encode(value).decode() if isinstance(value, list | dict) else value for name, value in row.items()}
        for row in rows
    ]
    return b"\n".join(encode(row) for row in flat) + b"\n"


def rendered(tx: Tx, report: Report) -> Job | None:
    """A job that renders this report, or has done so."""
    jobs = tx.table(Job)
    going = jobs.c.status.not_in(["failed", "cancelled", "cancelling"])
    of_it = jobs.c.spec["report_id"].as_string() == report.id
    return tx.find(Job, going, of_it, project_id=report.project_id, kind="render")


def _trained_on(tx: Tx, project_id: str, model: ModelVersion) -> Dataset:
    found = None
    if digest := model.lineage.get("dataset_digest"):
        found = tx.find(Dataset, project_id=project_id, digest=digest)
    if found is None:
        raise InvalidInput(
            f"the dataset that {model.ref} was trained on is not in this project; name one in dataset", param="dataset"
        )
    return found


def _check_split(method: Method, model: ModelVersion, dataset: Dataset) -> None:
    target = (model.lineage.get("spec") or {}).get("target")
    if target:
        find(dataset.columns, str(target), "dataset")
    check_method(method, dataset.columns, str(target or ""))


def check_name(name: str, what: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidInput(
            f"{name[:100]!r} cannot be a {what}'s name: use 1 to 100 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit",
            param="name",
        )
    return name


def check_alias(alias: str) -> str:
    if not re.fullmatch(ALIAS_PATTERN, alias):
        raise InvalidInput(
            f"{alias[:100]!r} cannot be an alias: use 1 to 100 letters, digits, '.', '_' or '-', "
            "starting with a letter",
            param="alias",
        )
    return alias


def check_source(source: str) -> str:
    """A file's path is no source: it would name a file of the server's machine, so clients upload what they have."""
    if not source.startswith(SOURCES) or len(source) > 2000 or not source.isprintable():
        raise InvalidInput(
            f"{source[:100]!r} is not a source; give sklearn:NAME, package:DIST/PATH or an https URL, "
            "or upload the file",
            code="bad_source",
            param="source",
        )
    return source


def plain_filename(filename: str) -> str:
    """The last part of what a client calls its file: it only tells the format and is never used as a path."""
    name = "".join(letter for letter in re.split(r"[/\\]", filename)[-1] if letter.isprintable())
    return name[-200:] or "data"


def check_task(task: str | None) -> str | None:
    """Any word: a model of a task that the platform knows nothing of is served as it is."""
    if task is not None and not re.fullmatch(NAME_PATTERN, task):
        raise InvalidInput(f"{task[:80]!r} cannot be a task; give one such as {' or '.join(TASKS)}", param="task")
    return task


def check_classes(classes: list[Any] | None) -> list[Any] | None:
    if classes is None:
        return None
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise InvalidInput(f"classes has {len(classes)} names; give 2 to {MAX_CLASSES}", param="classes")
    kinds = {type(one) for one in classes}
    if len(kinds) != 1 or kinds <= {list, dict, float, type(None)} or len(set(map(str, classes))) != len(classes):
        raise InvalidInput("classes must be different texts, integers or booleans, all of one type", param="classes")
    return classes


def check_licence(licence: str | None) -> str | None:
    if licence is not None and len(licence) > 200:
        raise InvalidInput("licence has more than 200 characters; give its SPDX name", param="licence")
    return licence


def check_convert(convert: str | None) -> str | None:
    if convert not in (None, "q8_0"):
        raise InvalidInput(f"a model cannot be converted to {convert[:80]!r}; there is q8_0", param="convert")
    return convert


def without_paths(text: str, home: Path) -> str:
    """`text` without the folders of this machine and without stack frames, which are nobody's business."""
    text = _TRACE.sub("", text)
    for folder, shown in ((str(home), "HOME"), (sys.prefix, "PYTHON"), (sys.base_prefix, "PYTHON"), (_CODE, "CODE")):
        text = text.replace(folder, shown)
    return text
