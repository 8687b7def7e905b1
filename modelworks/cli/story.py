"""The story of a recipe, for people (`Story`) or for nobody (`Silence`, with --json)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.cli.data import profile_table
from modelworks.cli.progress import job_bar, transfer
from modelworks.cli.recipe import Loaded, Outcome
from modelworks.cli.session import Session
from modelworks.cli.text import counted, decimal, headline, interval, lines, number, plain, short, size

if TYPE_CHECKING:
    from modelworks.client import Prediction
    from modelworks.core.types import Dataset, Deployment, Job, ModelVersion

_METRICS = 4  # beside the first
_ROWS = 5  # of a prediction
_LINES = 12  # of a chat's answer


class Silence:
    """Tells nothing; the outcome says it all."""

    def begins(self, loaded: Loaded) -> None: ...
    def has_data(self, dataset: Dataset, new: bool) -> None: ...
    def has_model(self, version: ModelVersion, new: bool) -> None: ...
    def is_deployed(self, deployment: Deployment, url: str, new: bool) -> None: ...
    def predicted(self, inputs: list[dict[str, Any]], prediction: Prediction, curl: str) -> None: ...
    def chatted(self, chat: dict[str, Any], text: str, curl: str) -> None: ...
    def ends(self, outcome: Outcome) -> None: ...

    @contextmanager
    def uploading(self, file: Path) -> Iterator[Any]:
        yield None

    @contextmanager
    def training(self, job: Job) -> Iterator[Any]:
        yield lambda job: None, lambda event: None

    @contextmanager
    def importing(self, source: str) -> Iterator[None]:
        yield

    @contextmanager
    def deploying(self, name: str) -> Iterator[None]:
        yield


class Story:
    """On stdout; bars that vanish are on stderr."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def begins(self, loaded: Loaded) -> None:
        self._line("Recipe", loaded.recipe.name, loaded.recipe.description)

    def uploading(self, file: Path) -> Any:
        return transfer(self._session, f"uploading {file.name}")

    def has_data(self, dataset: Dataset, new: bool) -> None:
        known = "" if new else ", as before"
        about = f"{counted(dataset.rows, 'row')}, {counted(len(dataset.columns), 'column')}, digest {short(dataset.digest)}{known}"
        self._line("Data", dataset.ref, about)
        profile_table(self._session, dataset)
        for warning in dataset.warnings:
            self._detail(f"warning: {warning}", "yellow")

    @contextmanager
    def training(self, job: Job) -> Iterator[Any]:
        spec = job.spec
        self._line("Training", str(spec.get("algorithm", "")), f"{_method(spec)}, seed {spec.get('seed', 0)}")
        with job_bar(self._session, "training", self._detail) as callbacks:
            yield callbacks

    @contextmanager
    def importing(self, source: str) -> Iterator[Any]:
        self._line("Import", source, "")
        with job_bar(self._session, "importing", self._detail) as (progress, _):
            yield progress

    def has_model(self, version: ModelVersion, new: bool) -> None:
        first = headline(version.metrics, version.task)
        if first:
            self._detail(f"mean {first[0]} {interval(first[1])} (95 % interval)", "bold green")
            others = [(name, found) for name, found in version.metrics.items() if name != first[0]]
            rest = [f"{name} {number(found.get('mean'))}" for name, found in others if isinstance(found, dict)]
            self._detail(", ".join(rest[:_METRICS]))
        known = "" if new else ", as before"
        self._line("Model", version.ref, f"package {size(version.size)}, digest {short(version.digest)}{known}")

    def deploying(self, name: str) -> Any:
        return self._session.notes.status("starting a replica")

    def is_deployed(self, deployment: Deployment, url: str, new: bool) -> None:
        self._line("Endpoint", url, f"revision {deployment.spec_revision}{'' if new else ', as before'}")

    def predicted(self, inputs: list[dict[str, Any]], prediction: Prediction, curl: str) -> None:
        for row, output in list(zip(inputs, prediction.outputs, strict=False))[:_ROWS]:
            shown = ", ".join(f"{name} {value}" for name, value in list(row.items())[:6]) + (
                ", …" if len(row) > 6 else ""
            )
            if output.label is not None:
                shares = output.probabilities
                chances = (
                    "  ".join(f"{name} {decimal(share)}" for name, share in shares.items())
                    if isinstance(shares, dict)
                    else ""
                )
                self._line("Prediction", str(output.label), chances)
            else:
                known = isinstance(output.value, float) and not isinstance(output.value, bool)
                value = f"{output.value:.6g}" if known else json.dumps(_brief(output.model_dump(exclude_none=True)))
                self._line("Prediction", value, "")
            self._detail(f"for {shown}")
        self._detail("once more, from the shell:")
        print(lines(curl))  # as it is, so that it can be copied

    def chatted(self, chat: dict[str, Any], text: str, curl: str) -> None:
        self._line("Chat", str(chat["messages"][-1].get("content", "")), "")
        for line in text.splitlines()[:_LINES]:
            self._detail(line, "bold green")
        self._detail("once more, from the shell:")
        print(lines(curl))

    def ends(self, outcome: Outcome) -> None:
        made = ", ".join(outcome.new)
        self._line(
            "Done", made or "nothing new was made", "" if made else "the same data, model and deployment as before"
        )

    def _line(self, what: str, name: str, about: str) -> None:
        from rich.text import Text

        text = Text.assemble((f"{what:<11}", "cyan"), (plain(name), "bold"))
        self._session.console.print(text.append(f"  {plain(about)}") if about else text)

    def _detail(self, text: str, style: str = "") -> None:
        from rich.text import Text

        if text:
            self._session.console.print(Text(f"{'':<11}{plain(text)}", style))


def _method(spec: dict[str, Any]) -> str:
    """`5-fold cross-validation`, `hold-out of 0.2`, `test set iris-test:1`."""
    method = spec.get("validation") or {}
    if method.get("kfold"):
        repeats = f", {method['repeats']} times" if (method.get("repeats") or 1) > 1 else ""
        return f"{method['kfold']}-fold cross-validation{repeats}"
    if method.get("test"):
        return f"test set {method['test']}"
    if method.get("last") or (spec.get("user") and not method):
        return f"each user's last {method.get('last') or 1} held out"
    return f"hold-out of {method.get('holdout') or 0.2}"


def _brief(value: Any) -> Any:
    """Long lists of numbers, such as an embedding, by their beginning."""
    if isinstance(value, dict):
        return {name: _brief(one) for name, one in value.items()}
    if isinstance(value, list) and len(value) > 8 and all(isinstance(one, float) for one in value):
        return [*(round(one, 4) for one in value[:4]), f"... {len(value)} numbers"]
    return value
