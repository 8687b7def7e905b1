"""A trained net as it serves: its ONNX graph, which also answers in training's name, so that both agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import ModelworksError
from modelworks.ml import graph as onnx_graph
from modelworks.ml.nets import emit
from modelworks.ml.nets.objective import Objective

if TYPE_CHECKING:
    import onnx
    import torch

_CELLS = 2_000_000  # numbers of the features that are predicted at a time
_NEAR = 2e-4  # how far the graph may be from the net, relative to the answers' size


@dataclass(frozen=True)
class NetFitted:
    """`model`: "features" FP32 [n, *shape] -> "probabilities" or "value". `history`: the curve, a dict an epoch."""

    model: onnx.ModelProto
    threads: int = 1
    history: list[dict[str, Any]] = field(default_factory=list)
    rows: int | None = None  # that are predicted at a time

    def predict(self, features: np.ndarray) -> dict[str, np.ndarray]:
        name = self.model.graph.output[0].name
        size = self.rows or chunk_of(features.shape[1:])
        found = [
            self._session.run(
                None, {"features": np.ascontiguousarray(features[start : start + size], dtype=np.float32)}
            )[0]
            for start in range(0, max(len(features), 1), size)
        ]
        return {name: np.concatenate(found).astype(np.float64)}

    def to_onnx(self, n_features: int) -> onnx.ModelProto:
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        return copy

    @cached_property
    def _session(self) -> Any:
        return onnx_graph.session(onnx_graph.to_bytes(self.model), self.threads)


def chunk_of(shape: tuple[int, ...]) -> int:
    """Rows that are predicted at a time."""
    return int(max(16, min(1024, _CELLS // max(1, int(np.prod(shape))))))


def fitted_of(
    net: torch.nn.Module,
    shape: tuple[int, ...],
    objective: Objective,
    probe: np.ndarray,
    threads: int,
    history: Any,
    rows: int | None = None,
    answers: tuple[torch.nn.Module, np.ndarray] | None = None,
) -> NetFitted:
    """`net` written down. ModelworksError when the graph answers otherwise than the net for the rows `probe`.

    `answers`: the part of a net that torch can run, and what the rest of it made of `probe`.
    """
    import torch

    def scores(e: emit.Emitter, last: str) -> tuple[str, int | None]:
        if objective.link == "scale":
            return e.scale(e.reshape(last, -1), objective.scale, objective.mean), None
        if objective.link == "softmax":
            return e.op("Softmax", last, axis=1), objective.outputs
        if objective.link == "tags":
            return e.reshape(e.op("Softmax", last, axis=2), 0, -1), shape[0] * objective.outputs
        both = e.op("Concat", e.op("Neg", last), last, axis=1)
        return e.op("Sigmoid", both), 2

    made = NetFitted(emit.write(net, shape, scores), threads, history, rows)
    with torch.inference_mode():
        run, given = answers or (net, probe)
        want = run(torch.from_numpy(np.ascontiguousarray(given))).float()
        if objective.link == "scale":
            want = want.reshape(-1) * objective.scale + objective.mean
        elif objective.link == "softmax":
            want = torch.softmax(want, dim=1)
        elif objective.link == "tags":
            want = torch.softmax(want, dim=2).flatten(1)
        else:
            want = torch.sigmoid(torch.cat([-want, want], dim=1))
    expected = want.double().numpy()
    got = next(iter(made.predict(probe).values()))
    bound = _NEAR * max(1.0, float(np.abs(expected).max(initial=0.0)))
    if got.shape != expected.shape or not np.abs(got - expected).max(initial=0.0) <= bound:
        raise ModelworksError(
            "the net's graph does not answer as the net does; please report this with the algorithm",
            code="export_mismatch",
        )
    return made
