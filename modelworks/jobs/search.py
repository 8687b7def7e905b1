"""A search as a job that waits for its trials, each a job of its own: durable, and the same again by the same seed.

What is known stands in the trials' rows; the sampler is asked anew for each. Trial n is chosen once the first
n - parallel + 1 trials have ended, by what those gave and no others, so the choice does not depend on which of the
running ones happens to end first.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.specs import SearchSpec, TrainingSpec
from modelworks.core.types import FINAL_JOB_STATES, Dataset, Job
from modelworks.jobs.parts import POLL, at_once, error_of, waiting
from modelworks.jobs.queue import patiently

if TYPE_CHECKING:
    from modelworks.jobs.steps import Step
    from modelworks.store.catalog import Tx

_KEPT, _CLOCK = "search", "search-clock"
_HOPELESS = 3  # trials that failed, and none that did not, until the search is given up
_SHARE = 0.8  # of the job's progress that is the search
SELECTION = "selection score"
UNSEEN = "rows that chose nothing"


def trial(step: Step) -> None:
    """Score one set of hyperparameters; the search that asked for it reads the result."""
    from modelworks.ml.search.sampler import Tried
    from modelworks.ml.search.trial import score
    from modelworks.ml.train.memory import budget, open_table

    dataset, given = step.dataset("dataset_id"), step.job.spec
    spec = TrainingSpec.model_validate(step.spec())
    assert spec.search is not None
    history = [Tried.read(one) for one in given.get("history", [])]
    began = time.monotonic()
    table = open_table(step.blobs.path(dataset.blob), dataset.columns, dataset.profile, spec, budget(step.memory_mb))
    found = score(table, dataset.columns, spec, spec.search, str(given["scope"]), history, step.context)
    result = {**found, "seconds": round(time.monotonic() - began, 2)}
    metrics = {str(spec.search.metric): {"mean": found["value"], "std": found["std"], "folds": found["folds"]}}

    def write(tx: Tx, job: Job) -> None:
        step.queue.finish(tx, job, result=result, metrics=metrics)

    step.commit(write)


def choose(step: Step, spec: TrainingSpec, dataset: Dataset) -> tuple[TrainingSpec, dict[str, Any] | None]:
    """(`spec` with the best algorithm and hyperparameters, what the search found); (spec, None) when none is asked for."""
    from modelworks.ml.search.space import check_search
    from modelworks.ml.train.algorithms import AUTO

    if spec.search is None and spec.algorithm != AUTO:
        return spec, None
    kept = step.context.restore(_KEPT)
    if kept is None:
        with waiting(step.context, step.queue):
            task = _task(step, spec, dataset)
            search = check_search(spec, task)
            assert search is not None
            kept = json.dumps(_search_all(step, spec, search, dataset, task)).encode()
            step.context.checkpoint(_KEPT, kept)
    found = json.loads(kept)
    best = found["best"]
    return spec.model_copy(update={**_settings(spec, best), "search": None}), found


def _task(step: Step, spec: TrainingSpec, dataset: Dataset) -> str:
    from modelworks.ml.train.problem import pose

    return pose(step.table(dataset), dataset.columns, spec).task


def _search_all(step: Step, spec: TrainingSpec, search: SearchSpec, dataset: Dataset, task: str) -> dict[str, Any]:
    """One search; or with `nested` one for each outer fold, whose winner is tested on that fold, and one over all rows."""
    method = spec.validation
    folds = int(method.kfold or 0) * method.repeats if method else 0
    if search.nested and folds:
        winners = []
        for number in range(1, folds + 1):
            share = (number - 1) / (folds + 1) * _SHARE, number / (folds + 1) * _SHARE
            winners.append(_Campaign(step, spec, search, f"part-{number}", share).run())
        _outer_folds(step, spec, winners)
        found = _Campaign(step, spec, search, "whole", (folds / (folds + 1) * _SHARE, _SHARE)).run()
        found["folds"] = [winner["best"] for winner in winners]
        return found | _honesty(UNSEEN, "each fold was tested by the winner of a search within its training rows")
    if method and method.kfold:
        return _Campaign(step, spec, search, "whole", (0.0, _SHARE)).run() | _honesty(
            SELECTION,
            "the folds of this report also chose the hyperparameters, so its figures are somewhat too good; "
            "validate by holdout or test, or set search.nested, for figures that are not",
        )
    scope = "whole" if method and method.test else "part-1"
    return _Campaign(step, spec, search, scope, (0.0, _SHARE)).run() | _honesty(
        UNSEEN, "the rows of this report chose nothing: trials were scored by folds within the training rows"
    )


def _honesty(reported: str, note: str) -> dict[str, str]:
    return {"reported": reported, "note": note}


def _outer_folds(step: Step, spec: TrainingSpec, winners: list[dict[str, Any]]) -> None:
    """Each outer fold with the hyperparameters that its own search chose, as the checkpoints that training will find."""
    context, queue, job = step.context, step.queue, step.job
    specs = {
        f"fold-{number}": {
            **job.spec,
            **_settings(spec, winner["best"]),
            "search": None,
            "part": f"fold-{number}",
            "of": "train",
        }
        for number, winner in enumerate(winners, start=1)
    }
    while True:
        parts = {part.spec["part"]: part for part in patiently(lambda: queue.parts(job.id, "fold"))}
        for name, part in parts.items():
            if part.status in FINAL_JOB_STATES and part.status != "succeeded":
                raise error_of(part, name)
        active = sum(part.status not in FINAL_JOB_STATES for part in parts.values())
        if len(parts) == len(specs) and not active:
            return
        fresh = [name for name in specs if name not in parts][: max(0, at_once(context, None) - active)]
        if fresh:
            made = [Job(project_id=job.project_id, kind="fold", spec=specs[name]) for name in fresh]
            patiently(lambda made=made: queue.add_parts(job.id, job.token, made))  # type: ignore[misc]
        context.progress(context.fraction, "testing the winners of the folds")
        time.sleep(POLL)


def _settings(spec: TrainingSpec, best: dict[str, Any]) -> dict[str, Any]:
    """What a training with the `best` settings has in place of what was asked for. Of auto, `stopping` is the budget."""
    found = {"algorithm": best["algorithm"], "hyperparameters": best["hyperparameters"]}
    return found | ({"stopping": None} if spec.algorithm == "auto" else {})


@dataclass
class _Campaign:
    """One search over the rows of `scope`; `share`: the part of the job's progress that it is."""

    step: Step
    spec: TrainingSpec
    search: SearchSpec
    scope: str
    share: tuple[float, float]
    told: list[Any] = field(default_factory=list)  # of each ended trial, in order: sampler.Tried
    board: list[dict[str, Any]] = field(default_factory=list)  # beside them: their lines of the leaderboard
    asked: list[dict[str, Any]] = field(default_factory=list)  # what each trial draws
    jobs: dict[int, Job] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        from modelworks.ml.search.sampler import Sampler

        self.sampler = Sampler(self.search, self.spec.algorithm, self.spec.hyperparameters, self.spec.seed)
        self.limit = at_once(self.step.context, self.search.parallel)
        if self.limit < self.search.parallel:
            self._log(f"{self.limit} trials run at a time, as there are no more slots or cores for them")
        self.spent = float(self.step.context.restore(self._clock) or b"0")
        self.began = time.monotonic()
        while True:
            self._look()
            self._tell()
            if self._done():
                return self._result()
            self._launch()
            self._report()
            time.sleep(POLL)

    @property
    def _clock(self) -> str:
        return f"{_CLOCK}-{self.scope}"

    def _look(self) -> None:
        """The trials' rows as they are."""
        found = patiently(lambda: self.step.queue.parts(self.step.job.id, "trial"))
        self.jobs = {job.spec["trial"]: job for job in found if job.spec["scope"] == self.scope}

    def _tell(self) -> None:
        """Take note of trials that have ended, in their order."""
        while len(self.told) < self.search.trials:
            number = len(self.told)
            if number >= len(self.asked) and not self._ask(number):
                return
            twin = self._twin(number)
            job = self.jobs.get(number)
            if twin is not None:
                self._note(number, self.told[twin], {**self.board[twin], "same_as": twin})
            elif job is None or job.status not in FINAL_JOB_STATES:
                return
            else:
                self._note(number, *self._outcome(number, job))

    def _ask(self, number: int) -> bool:
        """Draw trial `number`, if all that it is chosen by is known."""
        base = max(0, number - self.search.parallel + 1)
        if base > len(self.told):
            return False
        self.asked.append(self.sampler.ask(number, self.told[:base], self.asked[base:number]))
        return True

    def _twin(self, number: int) -> int | None:
        """The earlier trial that tried the very same; it is not run again."""
        settings = self.sampler.settings(self.asked[number])
        return next((i for i in range(number) if self.sampler.settings(self.asked[i]) == settings), None)

    def _outcome(self, number: int, job: Job) -> tuple[Any, dict[str, Any]]:
        from modelworks.ml.search.sampler import Tried

        algorithm, hyperparameters = self.sampler.settings(self.asked[number])
        result: dict[str, Any] = job.result if job.status == "succeeded" else {"state": "failed"}
        if job.status == "cancelled":
            result = {"state": "stopped"}
        tried = Tried(
            self.asked[number],
            str(result["state"]),
            result.get("value"),
            {int(step): value for step, value in result.get("steps", {}).items()},
            result.get("attributes", {}),
        )
        line: dict[str, Any] = {
            "trial": number,
            "status": tried.state,
            "value": tried.value,
            "std": result.get("std"),
            "folds": result.get("folds", []),
            "algorithm": algorithm,
            "hyperparameters": hyperparameters,
            "seconds": result.get("seconds"),
            "job": job.id,
            "error": (job.error or {}).get("message"),
        }
        return tried, line

    def _note(self, number: int, tried: Any, line: dict[str, Any]) -> None:
        self.told.append(tried)
        self.board.append({**line, "trial": number})
        self.step.context.checkpoint(self._clock, str(self._seconds()).encode())
        best = self._best()
        value = "-" if line["value"] is None else f"{line['value']:.4f}"
        best_value = "" if best is None else f"; the best is trial {best['trial'] + 1} with {best['value']:.4f}"
        message = (
            f"trial {number + 1} of {self.search.trials} {line['status']}: {self.search.metric} {value}{best_value}"
        )
        shown = {name: line[name] for name in ("status", "value", "algorithm", "hyperparameters", "job", "error")}
        self.step.context.event("trial", message, trial=number, scope=self.scope, best=best and best["trial"], **shown)
        if best is not None:
            self.step.context.metric(
                number + 1, {f"best_{self.search.metric}": best["value"]}, unit="trial", part=self._part
            )

    @property
    def _part(self) -> str:
        return "" if self.scope in ("whole", "part-1") and not self.search.nested else self.scope

    def _best(self) -> dict[str, Any] | None:
        from modelworks.ml.search.sampler import better

        best = None
        for line in self.board:
            if line["status"] != "complete" or line["value"] is None:
                continue
            if best is None or better(str(self.search.metric), line["value"], best["value"]):
                best = line
        return best

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    @property
    def _timeout(self) -> float | None:
        return self.search.timeout_s

    def _late(self) -> bool:
        """The time is up, and there is a result to go on with."""
        return self._timeout is not None and self._seconds() >= self._timeout and self._best() is not None

    def _active(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.status not in FINAL_JOB_STATES]

    def _done(self) -> bool:
        if len(self.told) >= self.search.trials:
            return True
        if self._late():
            for job in self._active():
                patiently(lambda job=job: self.step.queue.stop_part(self.step.job.id, self.step.job.token, job.id))  # type: ignore[misc]
            return True
        hopeless = len(self.told) >= min(_HOPELESS, self.search.trials) and all(
            line["status"] == "failed" for line in self.board
        )
        if hopeless:
            raise self._failure()
        return False

    def _launch(self) -> None:
        """Queue the next trials, as many as may run."""
        late = self._timeout is not None and self._seconds() >= self._timeout
        room = self.limit - len(self._active())
        number = len(self.told)
        while room > 0 and number < self.search.trials and not (late and self.jobs):
            if number >= len(self.asked) and not self._ask(number):
                return
            if number not in self.jobs and self._twin(number) is None:
                self._queue(number)
                room -= 1
            number += 1

    def _queue(self, number: int) -> None:
        algorithm, hyperparameters = self.sampler.settings(self.asked[number])
        base = max(0, number - self.search.parallel + 1)
        history = [] if self.search.pruner == "none" else [one.as_dict() for one in self.told[:base]]
        spec = {
            **self.step.job.spec,
            **_settings(self.spec, {"algorithm": algorithm, "hyperparameters": hyperparameters}),
            "search": self.search.model_dump(mode="json"),
            "trial": number,
            "scope": self.scope,
            "history": history,
        }
        job = Job(project_id=self.step.job.project_id, kind="trial", spec=spec)
        self.jobs[number] = patiently(lambda: self.step.queue.add_parts(self.step.job.id, self.step.job.token, [job]))[
            0
        ]

    def _report(self) -> None:
        running = sum(job.progress for job in self._active())
        done = (len(self.told) + running) / self.search.trials
        if self._timeout:
            done = max(done, min(1.0, self._seconds() / self._timeout))
        start, end = self.share
        stage = f"{len(self.told)} of {self.search.trials} trials"
        self.step.context.progress(start + (end - start) * min(1.0, done), stage)

    def _log(self, message: str) -> None:
        self.step.context.event("log", message)

    def _result(self) -> dict[str, Any]:
        from modelworks.ml.search.space import greater_is_better

        best = self._best()
        if best is None:
            raise self._failure()
        up = greater_is_better(str(self.search.metric))

        def place(line: dict[str, Any]) -> tuple[int, float]:
            ranked = line["status"] == "complete" and line["value"] is not None
            return (0, -line["value"] if up else line["value"]) if ranked else (1, line["trial"])

        ordered = sorted(self.board, key=place)
        stopped = self.search.trials - len(self.told)
        return {
            "metric": self.search.metric,
            "greater_is_better": up,
            "trials": len(self.told),
            "not_run": stopped,
            "seconds": round(self._seconds(), 1),
            "seed": self.spec.seed,
            "parallel": self.search.parallel,
            "space": self.search.model_dump(mode="json")["space"],
            "best": {key: best[key] for key in ("trial", "value", "std", "algorithm", "hyperparameters")},
            "leaderboard": [{"rank": rank, **line} for rank, line in enumerate(ordered, start=1)],
        }

    def _failure(self) -> ModelworksError:
        first = next((job for number, job in sorted(self.jobs.items()) if job.error), None)
        if first is not None and first.error:
            error = error_of(first, f"trial {first.spec['trial'] + 1}")
            error.message = f"no trial gave a result; the first: {error.message}"
            return error
        return InvalidInput(
            f"no trial gave a value of {self.search.metric}; choose another metric, or give more data",
            code="search_failed",
            param="search",
        )
