"""What is typed on the command line, as values: key=value pairs, gates, JSON, rows of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput

MEDIA_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".wav", ".flac", ".mp3", ".ogg")
MAX_TRANSFORMS_BYTES = 1024 * 1024
MAX_JSON_BYTES = 64 * 1024 * 1024
_GATE = re.compile(r"^\s*([A-Za-z0-9_]+)\s*(>=|<=)\s*([-+0-9.eE]+)\s*$")


def pairs(given: Sequence[str] | None, option: str, example: str) -> Iterator[tuple[str, str]]:
    """`key=value` texts as pairs."""
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InvalidInput(f"{option} takes key=value, as in {option} {example}, not {text!r:.100}", param=option)
        yield key.strip(), value.strip()


def settings(given: Sequence[str] | None) -> dict[str, Any]:
    """`--set C=0.5 --set penalty=l1`: values are JSON where they are, else text."""
    found: dict[str, Any] = {}
    for key, value in pairs(given, "--set", "C=0.5"):
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def gates(given: Sequence[str] | None) -> list[dict[str, Any]]:
    """`--gate 'accuracy>=0.9'` -> {"metric": "accuracy", "at_least": 0.9}."""
    found = []
    for text in given or ():
        match = _GATE.match(text)
        try:
            bound = float(match[3]) if match else None
        except ValueError:
            bound = None
        if match is None or bound is None:
            raise InvalidInput(f"--gate takes metric>=number or metric<=number, not {text!r:.100}", param="--gate")
        found.append({"metric": match[1], "at_least" if match[2] == ">=" else "at_most": bound})
    return found


def method(
    *,
    kfold: int | None,
    holdout: float | None,
    test: str | None,
    repeats: int,
    group: str | None,
    time: str | None,
    split: str | None = None,
) -> dict[str, Any] | None:
    """The evaluation's method from its flags; None when none was given."""
    chosen = {
        name: value
        for name, value in (("kfold", kfold), ("holdout", holdout), ("test", test), ("split", split))
        if value is not None
    }
    more = {name: value for name, value in (("group", group), ("time", time)) if value is not None}
    if repeats != 1:
        if kfold is None:
            raise InvalidInput(
                "--repeats goes with --kfold: it repeats the K-fold with other shuffles", param="--repeats"
            )
        more["repeats"] = repeats  # type: ignore[assignment]
    if not chosen and more:
        raise InvalidInput(f"--{next(iter(more))} goes with --kfold, --holdout or --test", param=next(iter(more)))
    return {**chosen, **more} or None


def predictions(
    *,
    task: str | None,
    reference: list[str] | None,
    prediction: str | None,
    scores: list[str] | None,
    compare: str | None,
    set: list[str] | None,
) -> dict[str, Any]:
    """What `--predictions` holds, from its flags."""
    if task is None:
        raise InvalidInput("say what the predictions are of: --task classification, regression, speech-to-text...", param="--task")
    found: dict[str, Any] = {"task": task, **settings(set)}
    if reference:
        found["reference"] = reference[0] if len(reference) == 1 else reference
    if prediction:
        found["prediction"] = prediction
    if scores:
        one = scores[0]
        found["scores"] = one if len(scores) == 1 and "=" not in one else dict(pairs(scores, "--scores", "cat=p_cat"))
    if compare:
        dataset, mark, column = compare.rpartition("#")
        found["compare"] = {"prediction": column, "name": compare, **({"dataset": dataset} if mark else {})}
        if "key" in found:
            found["compare"]["key"] = found.pop("key")
    return found


def threshold(given: str | None) -> float | str | None:
    """A number, or the name of what chooses it."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


def transforms(path: Path | None) -> list[Any] | None:
    """The steps in a TOML file (`[[transforms]]`) or a JSON file (a list, or an object with `transforms`)."""
    if path is None:
        return None
    text = read_text(path, MAX_TRANSFORMS_BYTES)
    try:
        if path.suffix.lower() == ".toml":
            import tomllib

            found: Any = tomllib.loads(text)
        else:
            found = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{path} cannot be read: {error}", param="--transforms") from None
    steps = found.get("transforms") if isinstance(found, dict) else found
    if not isinstance(steps, list):
        raise InvalidInput(
            f"{path} has no list of transforms; write [[transforms]] tables with an op each", param="--transforms"
        )
    return steps


def edits(
    set_: Sequence[str] | None,
    rows: str | None,
    where: Sequence[str] | None,
    drop: bool,
    rename: Sequence[str] | None,
    split: str | None,
    stratify: str | None,
    seed: int,
) -> list[dict[str, Any]]:
    """The edits of a dataset from flags; the chosen rows go with each --set and with --drop."""
    chosen: dict[str, Any] = {}
    if rows is not None:
        chosen["rows"] = _numbers(rows)
    if where:
        chosen["where"] = {name: value or None for name, value in pairs(where, "--where", "label=kat")}
    found = [
        {"op": "set", "column": name, "value": value or None, **chosen}
        for name, value in pairs(set_, "--set", "label=cat")
    ]
    if drop:
        found.append({"op": "drop", **chosen})
    found += [{"op": "rename", "column": old, "name": new} for old, new in pairs(rename, "--rename", "old=new")]
    if split is not None:
        shares = pairs(split.split(","), "--split", "train=0.8,test=0.2")
        try:
            parts = {name: float(share) for name, share in shares}
        except ValueError:
            raise InvalidInput("--split takes shares, as in --split train=0.8,test=0.2", param="--split") from None
        found.append({"op": "split", "shares": parts, "seed": seed, **({"stratify": stratify} if stratify else {})})
    if not found:
        raise InvalidInput("give --set, --drop, --rename, --split or --file", param="--set")
    return found


def edits_in(file: Path) -> list[dict[str, Any]]:
    found = _parsed(read_text(file, MAX_JSON_BYTES), str(file))
    return list(_objects(found.get("edits", found) if isinstance(found, dict) else found, str(file)))


def _numbers(text: str) -> list[int]:
    """`3,17,20-25`"""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or len(first) > 12 or len(last) > 12:
            raise InvalidInput(
                f"--rows takes numbers and ranges, as in --rows 3,17,20-25, not {part!r:.60}", param="--rows"
            )
        if int(last or first) - int(first) > 1_000_000:
            raise InvalidInput("--rows: a range has at most 1,000,000 rows", param="--rows")
        found += range(int(first), int(last or first) + 1)
    return found


def rows(inputs: Sequence[str] | None, file: Path | None) -> Iterator[dict[str, Any]]:
    """Rows from `--input` JSON texts (an object or a list of them), or from a CSV, TSV, JSONL or JSON file.

    A CSV row's values are texts: `typed` makes them what the deployment expects.
    """
    if bool(inputs) == bool(file):
        raise InvalidInput("give either --input or --file", param="--input")
    if file is None:
        for text in inputs or ():
            yield from _objects(_parsed(text, "--input"), "--input")
    elif file.suffix.lower() in (".csv", ".tsv"):
        yield from _csv_rows(file)
    elif file.suffix.lower() in (".jsonl", ".ndjson"):
        with _open(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield from _objects(_parsed(line, f"{file}, line {number}"), f"{file}, line {number}")
    elif file.suffix.lower() == ".json":
        found = _parsed(read_text(file, MAX_JSON_BYTES), str(file))
        yield from _objects(found.get("inputs", found) if isinstance(found, dict) else found, str(file))
    else:
        raise InvalidInput(f"{file}: give a .csv, .tsv, .jsonl or .json file", param="--file")


def with_files(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `"@PATH"` replaced by the path of an image or a sound, which the SDK reads; "@@" begins a plain text."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, str) and value.startswith("@@"):
            value = value[1:]
        elif isinstance(value, str) and value.startswith("@") and Path(value[1:]).suffix.lower() in MEDIA_SUFFIXES:
            value = Path(value[1:])
            if not value.is_file():
                raise InvalidInput(f"there is no file {value}", param=name)
        found[name] = value
    return found


def typed(row: dict[str, Any], columns: dict[str, str | None]) -> dict[str, Any]:
    """A CSV row's texts as JSON values, by the type that the model's signature gives each column; "" is missing."""
    return {
        name: _value(name, value, columns[name]) if isinstance(value, str) else value
        for name, value in row.items()
        if name in columns
    }


def _value(name: str, text: str, kind: str | None) -> Any:
    if text == "":
        return None
    try:
        if kind == "number":
            return float(text)
        if kind == "integer":
            return int(text)
    except ValueError:
        raise InvalidInput(
            f"{name!r} must be a{'n' if kind == 'integer' else ''} {kind}, not {text!r:.80}", param=name
        ) from None
    if kind == "boolean":
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise InvalidInput(f"{name!r} must be true or false, not {text!r:.80}", param=name)
        return known[text.lower()]
    return text


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    import csv

    with _open(file) as stream:
        reader = csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidInput(
                        f"{file}, line {reader.line_num}: it has not as many fields as the header", param="--file"
                    )
                yield row
        except csv.Error as error:
            raise InvalidInput(f"{file}, line {reader.line_num}: {error}", param="--file") from None


def _objects(found: Any, where: str) -> Iterator[dict[str, Any]]:
    for item in found if isinstance(found, list) else [found]:
        if not isinstance(item, dict):
            raise InvalidInput(
                f"{where}: a row is a JSON object of features by name, not {item!r:.80}", param="--input"
            )
        yield item


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {error}", param="--input") from None


def read_text(path: Path, limit: int) -> str:
    """A small text file; InvalidInput when it cannot be read or is larger than `limit` bytes."""
    with _open(path) as stream:
        try:
            text = stream.read(limit + 1)
        except UnicodeDecodeError:
            raise InvalidInput(f"{path} is not UTF-8 text", param=str(path)) from None
    if len(text) > limit:
        raise InvalidInput(f"{path} is larger than {limit} bytes", param=str(path))
    return text


def _open(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise InvalidInput(f"cannot read {path} ({error.strerror})", param=str(path)) from None


def search(trials: int | None, space: list[str] | None, **more: Any) -> dict[str, Any] | None:
    """`--search 20 --space C=0.01..100:log --space penalty=l1,l2`; None when nothing of a search is asked for."""
    found = {name: value for name, value in more.items() if value is not None and name != "parallel"}
    if trials is None and not space and not found:
        return None
    if trials is not None:
        found["trials"] = trials
    if more.get("parallel") is not None:
        found["parallel"] = more["parallel"]
    if space:
        found["space"] = dict(_space(text) for text in space)
    return found


def _space(text: str) -> tuple[str, dict[str, Any]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise InvalidInput(
            f"{text!r} is no space; write NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C", param="space"
        )
    low, dots, high = values.removesuffix(":log").partition("..")
    if dots:
        try:
            return name, {"low": float(low), "high": float(high), "log": values.endswith(":log")}
        except ValueError:
            raise InvalidInput(f"{text!r}: the ends of a range are numbers", param="space") from None
    try:
        choices = json.loads(f"[{values}]")
    except ValueError:
        choices = values.split(",")
    return name, {"choices": choices}
