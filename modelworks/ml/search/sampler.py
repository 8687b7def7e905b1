"""What to try next, and when to give up: Optuna's TPE and pruners over trials that are kept elsewhere.

Nothing here remembers: each question brings all that is known, and its answer depends on that, the seed and the trial's
number alone. So a search that was killed goes on as if it had not been, and the same search again tries the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from modelworks.core.specs import Choices, Range, SearchSpec
from modelworks.ml.search.space import ALGORITHM, Space, default_space, greater_is_better, is_integer, params_of

if TYPE_CHECKING:
    import optuna

_STARTUP = 8  # trials that are drawn at random before TPE has something to go by
_STUDY = "search"
Drawn = dict[str, Any]  # the name of a parameter -> its number, or the index of its choice


@dataclass(frozen=True)
class Tried:
    """A trial that has ended. `state`: complete, pruned, failed or stopped. `steps`: the metric after each step."""

    drawn: Drawn
    state: str
    value: float | None = None
    steps: dict[int, float] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Tried:
        return cls(**{**found, "steps": {int(step): value for step, value in found.get("steps", {}).items()}})


class Sampler:
    """Of one search: for `algorithm`, whose hyperparameters begin as `given`; or over algorithms when that is "auto"."""

    def __init__(self, search: SearchSpec, algorithm: str, given: Mapping[str, Any], seed: int) -> None:
        assert search.space is not None
        assert search.metric is not None
        self._search, self._seed = search, seed
        self._given = dict(given)
        named = search.space.get(ALGORITHM) if algorithm == "auto" else None
        self._families = list(named.choices) if isinstance(named, Choices) else [algorithm]
        self._auto = named is not None
        self._spaces: dict[str, Space] = (
            {name: default_space(name) for name in self._families} if self._auto else {algorithm: dict(search.space)}
        )

    def ask(self, number: int, told: Sequence[Tried], pending: Sequence[Drawn]) -> Drawn:
        """The parameters of trial `number`; `pending`: those of trials whose end is not known yet."""
        first = self._first(number)
        if first is not None:
            return first
        study = self._study(number, told, pending)
        trial = study.ask()
        family = self._families[0]
        drawn: Drawn = {}
        if self._auto:
            drawn[ALGORITHM] = trial.suggest_categorical(ALGORITHM, list(range(len(self._families))))
            family = self._families[drawn[ALGORITHM]]
        for name in self._spaces[family]:
            key = self._key(family, name)
            drawn[key] = trial._suggest(key, self._distribution(family, name))
        return drawn

    def settings(self, drawn: Drawn) -> tuple[str, dict[str, Any]]:
        """(algorithm, hyperparameters) of what was drawn."""
        family = self._families[drawn[ALGORITHM]] if self._auto else self._families[0]
        found = {} if self._auto else dict(self._given)
        for name, space in self._spaces[family].items():
            key = self._key(family, name)
            if key in drawn:
                found[name] = space.choices[drawn[key]] if isinstance(space, Choices) else drawn[key]
        return family, found

    def _first(self, number: int) -> Drawn | None:
        """The first trials are what was given: the hyperparameters, or each algorithm with its defaults."""
        if number >= len(self._families):
            return None
        family = self._families[number]
        drawn: Drawn = {ALGORITHM: number} if self._auto else {}
        values = params_of(family).model_validate({} if self._auto else self._given).model_dump(mode="json")
        for name, space in self._spaces[family].items():
            value = values[name]
            if isinstance(space, Choices):
                if value not in space.choices:
                    return None if not self._auto else {ALGORITHM: number}
                drawn[self._key(family, name)] = space.choices.index(value)
            elif isinstance(value, int | float) and space.low <= value <= space.high and space.step is None:
                drawn[self._key(family, name)] = value
            else:
                return None if not self._auto else {ALGORITHM: number}
        return drawn

    def _key(self, family: str, name: str) -> str:
        return f"{family}.{name}" if self._auto else name

    def _distribution(self, family: str, name: str) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        space = self._spaces[family][name]
        if isinstance(space, Choices):
            return CategoricalDistribution(list(range(len(space.choices))))
        if is_integer(params_of(family).model_fields[name]):
            return IntDistribution(int(space.low), int(space.high), log=space.log, step=int(space.step or 1))
        return FloatDistribution(space.low, space.high, log=space.log, step=space.step)

    def _study(self, number: int, told: Sequence[Tried], pending: Sequence[Drawn]) -> optuna.Study:
        import optuna

        seed = (self._seed * 1_000_003 + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `group` is experimental
            sampler: Any = (
                optuna.samplers.RandomSampler(seed=seed)
                if self._search.sampler == "random"
                else optuna.samplers.TPESampler(
                    seed=seed,
                    n_startup_trials=max(_STARTUP, len(self._families)),
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                )
            )
        study = new_study(self._search, sampler=sampler)
        for one in told:
            self._add(study, one)
        for drawn in pending:
            self._add(study, Tried(drawn, "running"))
        return study

    def _add(self, study: optuna.Study, tried: Tried) -> None:
        distributions = {}
        for key in tried.drawn:
            if key == ALGORITHM and self._auto:
                from optuna.distributions import CategoricalDistribution

                distributions[key] = CategoricalDistribution(list(range(len(self._families))))
            else:
                family, _, name = key.rpartition(".")
                distributions[key] = self._distribution(family or self._families[0], name)
        add_trial(study, tried, distributions)


class Pruner:
    """Says of one running trial whether it has fallen behind those before it: `told`."""

    def __init__(self, search: SearchSpec, told: Sequence[Tried]) -> None:
        self._trial: Any = None
        if search.pruner == "none":
            return
        study = new_study(search)
        for one in told:
            add_trial(study, Tried({}, one.state, one.value, one.steps, one.attributes), {})
        self._study, self._trial = study, study.ask()

    def behind(self, step: int, value: float) -> bool:
        if self._trial is None:
            return False
        self._trial.report(value, step)
        return bool(self._trial.should_prune())

    @property
    def attributes(self) -> dict[str, Any]:
        """What the pruner wants to know of this trial later."""
        if self._trial is None:
            return {}
        return dict(self._study._storage.get_trial_system_attrs(self._trial._trial_id))


def new_study(search: SearchSpec, sampler: Any = None) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner: Any = optuna.pruners.NopPruner()
    if search.pruner == "median":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0)
    elif search.pruner == "hyperband":
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource="auto", reduction_factor=3)
    direction: Any = "maximize" if greater_is_better(str(search.metric)) else "minimize"
    return optuna.create_study(study_name=_STUDY, direction=direction, sampler=sampler, pruner=pruner)


def add_trial(study: optuna.Study, tried: Tried, distributions: dict[str, Any]) -> None:
    from optuna.trial import TrialState, create_trial

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "running": TrialState.RUNNING}
    state = states.get(tried.state, TrialState.FAIL)
    study.add_trial(
        create_trial(
            state=state,
            value=tried.value if state == TrialState.COMPLETE else None,
            params=tried.drawn,
            distributions=distributions,
            intermediate_values=tried.steps,
            system_attrs=tried.attributes,
        )
    )


def better(metric: str, value: float, than: float) -> bool:
    return value > than if greater_is_better(metric) else value < than


__all__ = ["Drawn", "Pruner", "Range", "Sampler", "Tried", "better"]
