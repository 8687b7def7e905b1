"""Tasks that are not features to one target: each poses, judges and packages its problem its own way.

A course is a `Problem`, so folds, searches, gates and reports treat it as any other; what differs are the methods here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.specs import Method, TrainingSpec
from modelworks.core.types import Column
from modelworks.ml.base import JobContext
from modelworks.ml.data.transforms.catalogue import check_transforms
from modelworks.ml.evaluate.catalogue import check_metrics
from modelworks.ml.evaluate.inputs import coerce
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.package import Manifest, Package
from modelworks.ml.train.algorithms import TRAINERS, check_hyperparameters
from modelworks.ml.train.checks import check_method, check_run, feature_columns
from modelworks.ml.train.problem import Problem

if TYPE_CHECKING:
    import pyarrow as pa

    from modelworks.ml.data.stored import StoredTable

_CHUNK = 8192


@dataclass(frozen=True)
class Course(Problem):
    """`kind`: the task. `default`: how it is evaluated when nothing is asked for."""

    kind: ClassVar[str]
    default: ClassVar[Method] = Method(holdout=0.2)
    given: tuple[Column, ...] = ()
    """All columns of the table."""

    # before a job is queued: light

    @classmethod
    def check(cls, spec: TrainingSpec, columns: Sequence[Column]) -> TrainingSpec:
        """As `checks.check_training`."""
        if spec.task not in (None, cls.kind):
            raise InvalidInput(f"{spec.algorithm} does {cls.kind}, not {spec.task}; choose another algorithm", param="task")
        features = feature_columns(spec, columns)
        if not features:
            raise InvalidInput("there is no feature to learn from; name at least one column", param="features")
        check_metrics(cls.kind, spec.metrics, spec.gates)
        if spec.validation:
            check_method(spec.validation, columns, spec.target)
        check_run(spec, cls.kind)
        if spec.threshold is not None:
            raise InvalidInput("threshold is for two classes; leave it out", param="threshold")
        return spec.model_copy(
            update={
                "features": [column.name for column in features],
                "hyperparameters": check_hyperparameters(spec.algorithm, spec.hyperparameters),
                "transforms": None if spec.transforms is None else check_transforms(spec.transforms),
            }
        )

    # in the job

    @classmethod
    @abstractmethod
    def pose(cls, table: pa.Table | StoredTable, columns: Sequence[Column], spec: TrainingSpec) -> Course:
        """The problem that the checked `spec` poses over `table`. InvalidInput for what cannot be learned."""

    def again(self, table: pa.Table) -> Course:
        """The same problem over another table."""
        needed = {column.name for column in self.columns} | {self.spec.target}
        wanted = [column for column in self.given if column.name in needed or column.name in table.column_names]
        return self.pose(coerce(table, wanted), wanted, self.spec)

    @abstractmethod
    def learn(self, rows: np.ndarray, ctx: JobContext) -> Any:
        """A model of `rows` alone."""

    @abstractmethod
    def judge(self, model: Any, rows: np.ndarray) -> Predictions:
        """What the model says of `rows`, which it has not seen."""

    @abstractmethod
    def package(
        self, model: Any, metrics: dict[str, Any], lineage: dict[str, Any], workdir: Path, threads: int
    ) -> tuple[Manifest, dict[str, bytes]]:
        """The manifest and its files, proven to answer as the model does."""

    def read(self, outputs: dict[str, np.ndarray], rows: np.ndarray) -> Predictions:
        """What a package's `outputs` say of `rows`: as `judge`, for a model that is there already. For `answered`."""
        raise NotImplementedError

    def details(
        self, parts: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[Predictions], wanted: Sequence[str]
    ) -> dict[str, Any]:
        """What a report shows beside the metrics. `parts`: (trained, tested); `found`: what was said of each."""
        return {}

    def check_slices(self) -> None:
        """InvalidInput when its rows are none of the dataset's, which slices are cut from."""

    def answered(self, package: Package, ctx: JobContext, end: float) -> Predictions:
        """What a package says of all rows of this problem."""
        from modelworks.ml.runtimes.registry import RUNTIMES

        runtime = RUNTIMES.get(package.manifest.runtime)()
        runtime.load(package, ctx.threads)
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(self.rows), _CHUNK):
            parts.append(runtime.predict(self.part(self.rows[start : start + _CHUNK])))
            ctx.progress(end * min(1.0, (start + _CHUNK) / len(self.rows)), "testing")
        runtime.close()
        return self.read({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, self.rows)

    def named(self) -> dict[str, Any]:
        """What a manifest says of every course."""
        spec = self.spec
        return {"task": self.kind, "algorithm": spec.algorithm, "licence": spec.licence, "description": spec.description}

    @property
    def params(self) -> Any:
        return TRAINERS.get(self.spec.algorithm).Params.model_validate(self.spec.hyperparameters)


def mismatch(found: str) -> ModelworksError:
    return ModelworksError(
        f"the packaged model does not answer as training did ({found}); please report this with the algorithm",
        code="parity_mismatch",
    )
