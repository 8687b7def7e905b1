"""The shapes of the plugs on one page. Light: numpy and onnx are only named here, never imported.

A *batch* is the raw columns in wire form, one 1-d array of n rows a column:
    number   float32, NaN = missing            integer  int64, INT64_MISSING = missing (float32 when the data has gaps)
    boolean  uint8 0/1, BOOL_MISSING = missing  category, text, time  object array of str, "" = missing (time: ISO 8601)
    image, audio  object array of bytes, the files as they came, b"" = missing
The same arrays enter training, evaluation and the replica, so there is one implementation of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel

from modelworks.core.specs import Stopping
from modelworks.core.types import Signature

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from modelworks.ml.package import Package

    Batch = dict[str, np.ndarray]


Models = Callable[[str], "Package"]  # a registered model's reference -> its package


class JobContext(Protocol):
    """What a running job gives to compute: its seed, its threads, a scratch folder, and a way to report and to resume."""

    seed: int
    threads: int
    processes: int
    """How many processes share the batches of a net; each has `threads` threads."""
    workdir: Path
    only: str | None
    """The one part (`fold-3`) that this process is to compute; None: the whole job."""

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        """Report `fraction` (0 to 1) of the whole job; raises Cancelled when the job was cancelled."""

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Add a row to the job's events: kind is "log", "warning", "fold", "trial" or "progress"."""

    def metric(self, step: int, values: Mapping[str, float], *, unit: str = "epoch", part: str = "") -> None:
        """A point of the job's curves: what `values` (loss, val_loss, val_accuracy, lr, grad_norm, rows_per_s...) were
        after `step` units. Cheap to call often: points are written in batches, and thinned out when there are many.
        """

    def advise(self, found: dict[str, Any]) -> None:
        """What a fit will take, measured before it begins (`ml/nets/advice.py`): said once, and kept with the job."""

    def spread(self, names: Sequence[str], parallel: int | None, seconds: float) -> None:
        """The parts `names` are still to be computed: have them done as jobs of their own, and return once `restore`
        finds them; or return at once, when doing them here is as good. `parallel`: how many at a time, as the user
        asked; None: where slots are free and one part takes long (`seconds` is what the last one took).
        """

    def checkpoint(self, name: str, data: bytes) -> None:
        """Keep `data` under `name`: after a crash the retried job finds it with `restore`."""

    def restore(self, name: str) -> bytes | None: ...

    def model(self, ref: str) -> Package:
        """The registered model version `ref` ("minilm:1"), to build on. NotFound where there is none."""


class Relay:
    """A JobContext that hands everything on to `ctx`; those who change something of it inherit from this."""

    def __init__(self, ctx: JobContext) -> None:
        self.ctx = ctx
        self.seed, self.threads, self.processes = ctx.seed, ctx.threads, ctx.processes
        self.workdir, self.only = ctx.workdir, ctx.only

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        self.ctx.progress(fraction, stage, **metrics)

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.ctx.event(kind, message, **data)

    def metric(self, step: int, values: Mapping[str, float], *, unit: str = "epoch", part: str = "") -> None:
        self.ctx.metric(step, values, unit=unit, part=part)

    def advise(self, found: dict[str, Any]) -> None:
        self.ctx.advise(found)

    def spread(self, names: Sequence[str], parallel: int | None, seconds: float) -> None:
        self.ctx.spread(names, parallel, seconds)

    def checkpoint(self, name: str, data: bytes) -> None:
        self.ctx.checkpoint(name, data)

    def restore(self, name: str) -> bytes | None:
        return self.ctx.restore(name)

    def model(self, ref: str) -> Package:
        return self.ctx.model(ref)


class Part(Relay):
    """A part of a job: fractions are mapped to [start, end], and what it says and keeps bears its label."""

    def __init__(self, ctx: JobContext, start: float, end: float, label: str = "") -> None:
        super().__init__(ctx)
        self.start, self.end, self.label = start, end, label

    def progress(self, fraction: float, stage: str, **metrics: Any) -> None:
        self.ctx.progress(self.start + (self.end - self.start) * fraction, self._own(stage), **metrics)

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.ctx.event(kind, self._own(message), **data)

    def checkpoint(self, name: str, data: bytes) -> None:
        self.ctx.checkpoint(self._own(name), data)

    def restore(self, name: str) -> bytes | None:
        return self.ctx.restore(self._own(name))

    def _own(self, text: str) -> str:
        return f"{self.label}: {text}" if self.label else text


class Cancelled(Exception):
    """Raised inside a job by `ctx.progress` once the job was cancelled; the worker ends the job as cancelled."""


class Fitted(Protocol):
    """A trained estimator over a float32 feature matrix."""

    def predict(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """features [n, f] float32 -> {"probabilities": [n, classes] float64} or {"value": [n] float64}."""

    def to_onnx(self, n_features: int) -> onnx.ModelProto:
        """A graph with input "features" FP32 [-1, f] and output "probabilities" FP32 [-1, classes] or "value" FP32 [-1]."""


class Trainer(Protocol):
    """An algorithm. `Params` declares the hyperparameters with constraints; they are checked before a job is queued.

    It may also declare `shaped = True`: it takes images [n, c, h, w], spectrograms [n, 1, bands, frames], waveforms
    [n, samples] and token sequences [n, length] as they are (see `Preparation.blocks`); and `tokens = True`: by default
    texts become token sequences; and `reads`: the kinds of features it is made for (`core/tasks.py`), by which tasks are
    named.
    """

    tasks: ClassVar[tuple[str, ...]]
    accepts_missing: ClassVar[bool]
    Params: ClassVar[type[BaseModel]]

    def train(self, features: np.ndarray, target: np.ndarray, params: BaseModel, ctx: JobContext) -> Fitted:
        """features [n, f] float32; target [n]: class indices int64, or values float64."""


@dataclass(frozen=True)
class Block:
    """A part of the features: `start` to `stop` of the flattened ones, in `shape`. kind: table, image, audio or tokens.

    `about`: of tokens {"vocabulary", "pad"}; of sounds {"rate"}.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int
    about: dict[str, Any] = field(default_factory=dict)


class Examples(Protocol):
    """Rows to learn from, in memory or read as they are needed (`ml/nets/examples.py` has both).

    shape: of one row's features: (f,) for a table, (c, h, w) for an image, (length,) for tokens.  blocks: what the
    flattened features are.  classes: how many there are; None when the targets are numbers.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def blocks(self) -> tuple[Block, ...]: ...

    @property
    def classes(self) -> int | None: ...

    def __len__(self) -> int: ...

    def batches(
        self, size: int, *, seed: tuple[int, ...] | None = None, skip: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features [m, *shape] float32 and targets [m], m = `size` but for the last batch. With a `seed` shuffled and
        augmented as it decides; the first `skip` batches are left out, and those that follow are as without it.
        """

    def targets(self) -> Iterator[np.ndarray]:
        """All targets, piece by piece, in the order in which they lie."""

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """(the rest, about `share` of the rows), drawn at random."""

    def tail(self, share: float) -> tuple[Examples, Examples]:
        """(the rest, the last `share` of the rows)."""


class Learner(Protocol):
    """A trainer that reads batch by batch what it learns from, so that it need not fit into memory: nets.

    `learn` stands in place of `train`. `shaped`, `tokens` as in `Trainer`.
    """

    tasks: ClassVar[tuple[str, ...]]
    accepts_missing: ClassVar[bool]
    Params: ClassVar[type[BaseModel]]

    def learn(self, examples: Examples, params: BaseModel, ctx: JobContext, stopping: Stopping | None) -> Fitted: ...


class Transform(Protocol):
    """One op of the preparation; see `ml/data/transforms`."""


class Runtime(Protocol):
    """Runs a package. One instance a replica; `predict` is never called by two threads at once."""

    def load(self, package: Package, threads: int) -> Signature: ...

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """inputs by name as in the signature, first axis = rows -> outputs by name. Object arrays of str or bytes for BYTES."""

    def close(self) -> None: ...
