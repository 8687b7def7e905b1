"""An imported ONNX graph as a torch module, so that what another tool trained can be trained on.

Imports torch: only the functions that build a net may import this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as f

from modelworks.core.errors import InvalidInput
from modelworks.ml.imported import ImportedGraph
from modelworks.ml.nets.backbone import ImageBackbone, TextBackbone, write_encoder, write_images
from modelworks.ml.nets.emit import Emitter

Op = Callable[[list[Any], dict[str, Any]], Any]


class Imported(nn.Module):
    """The graph's first output for tensors that stand for its inputs. Batch statistics stay as they were measured."""

    def __init__(self, graph: ImportedGraph) -> None:
        super().__init__()
        self.graph = graph
        unknown = sorted({node.op for node in graph.nodes if node.domain or node.op not in _OPS})
        if unknown:
            raise _untrainable(f"the backbone's graph has the operators {', '.join(unknown[:10])}")
        self.weights = nn.ParameterList([torch.from_numpy(_own(graph.constants[name])) for name in graph.weights])
        rest = [name for name in graph.constants if name not in set(graph.weights)]
        self._rest = {name: f"constant{place}" for place, name in enumerate(rest)}
        for name, kept in self._rest.items():
            self.register_buffer(kept, torch.from_numpy(_own(graph.constants[name])), persistent=False)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        values: dict[str, Any] = {name: getattr(self, kept) for name, kept in self._rest.items()}
        values |= dict(zip(self.graph.weights, self.weights, strict=True))
        values |= {name: tensor for (name, _), tensor in zip(self.graph.inputs, inputs, strict=True)}
        values[""] = None
        for node in self.graph.nodes:
            made = _OPS[node.op]([values[name] for name in node.inputs], node.attributes)
            for name, value in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False):
                values[name] = value
        return values[self.graph.output]

    @property
    def trained(self) -> dict[str, np.ndarray]:
        """The weights as they are now."""
        return {name: one.detach().cpu().numpy() for name, one in zip(self.graph.weights, self.weights, strict=True)}


class Frozen(nn.Module):
    """A backbone that stays as it is: only written down, so that any operator may be in it."""

    def __init__(self, backbone: TextBackbone | ImageBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def emit(self, e: Emitter, x: str) -> str:
        if isinstance(self.backbone, TextBackbone):
            return write_encoder(e.add, e.exact, self.backbone, x)
        return write_images(e.add, e.exact, self.backbone, x)


class TextFront(nn.Module):
    """Token numbers [n, l] (as float32) to the backbone's vectors; what is padding in all rows is cut off before."""

    def __init__(self, backbone: TextBackbone) -> None:
        super().__init__()
        self.backbone, self.body = backbone, Imported(backbone.graph)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = x.long()
        mask = (ids != self.backbone.settings.pad_id).long()
        longest = max(1, int(mask.sum(dim=1).max()))
        return self.body(ids[:, :longest], mask[:, :longest])

    def emit(self, e: Emitter, x: str) -> str:
        return write_encoder(e.add, e.constant, self.backbone, x, self.body.trained)


class ImageFront(nn.Module):
    """Images [n, c, h, w] to the backbone's vectors; maps become their means."""

    def __init__(self, backbone: ImageBackbone) -> None:
        super().__init__()
        self.backbone, self.body = backbone, Imported(backbone.graph)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).flatten(2).mean(dim=2) if len(self.backbone.graph.shape) == 3 else self.body(x)

    def emit(self, e: Emitter, x: str) -> str:
        return write_images(e.add, e.constant, self.backbone, x, self.body.trained)


def _untrainable(what: str) -> InvalidInput:
    return InvalidInput(
        f"{what}, which cannot be trained here; leave fine_tune at 0, so that the backbone stays as it is",
        code="not_trainable",
        param="hyperparameters.fine_tune",
    )


def _own(values: np.ndarray) -> np.ndarray:
    return np.array(values, dtype=np.float32 if values.dtype.kind == "f" else None, order="C")


def _list(value: Any) -> list[int]:
    found = value.tolist() if hasattr(value, "tolist") else list(value)
    return [int(one) for one in (found if isinstance(found, list) else [found])]


def _axes(inputs: list[Any], attributes: dict[str, Any]) -> list[int] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return _list(inputs[1])
    return _list(attributes["axes"]) if "axes" in attributes else None


def _reduce(fold: Callable[..., torch.Tensor]) -> Op:
    def apply(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
        axes = _axes(inputs, attributes)
        if not axes:
            if attributes.get("noop_with_empty_axes"):
                return inputs[0]
            axes = list(range(inputs[0].ndim))
        return fold(inputs[0], axes, bool(attributes.get("keepdims", 1)))

    return apply


def _divide(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    left, right = inputs
    if not left.is_floating_point() and not right.is_floating_point():
        return torch.div(left, right, rounding_mode="trunc")
    return left / right


def _gather(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    data, index = inputs[0], inputs[1].long()
    axis = attributes.get("axis", 0) % data.ndim
    index = torch.where(index < 0, index + data.shape[axis], index)
    found = data.index_select(axis, index.reshape(-1))
    return found.reshape((*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]))


def _reshape(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    data, wanted = inputs[0], _list(inputs[1])
    if not attributes.get("allowzero"):
        wanted = [data.shape[place] if size == 0 else size for place, size in enumerate(wanted)]
    return data.reshape(wanted)


def _unsqueeze(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    data, axes = inputs[0], _axes(inputs, attributes) or []
    rank = data.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _squeeze(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    axes = _axes(inputs, attributes)
    return inputs[0].squeeze() if axes is None else inputs[0].squeeze(tuple(axes))


def _slice(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    data, starts, ends = inputs[0], _list(inputs[1]), _list(inputs[2])
    axes = _list(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = _list(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        place = torch.arange(*slice(start, end, step).indices(data.shape[axis]), device=data.device)
        data = data.index_select(axis, place)
    return data


def _expand(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    shape = torch.broadcast_shapes(tuple(inputs[0].shape), tuple(_list(inputs[1])))
    return inputs[0].expand(shape)


def _filled(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    value = np.asarray(attributes.get("value", np.zeros(1, dtype=np.float32)))
    return torch.from_numpy(value.copy()).reshape(()).expand(_list(inputs[0])).clone().to(inputs[0].device)


def _cast(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    kinds = {1: torch.float32, 2: torch.uint8, 6: torch.int32, 7: torch.int64, 9: torch.bool, 11: torch.float32}
    if attributes["to"] not in kinds:
        raise _untrainable(f"the backbone casts to ONNX's type {attributes['to']}")
    return inputs[0].to(kinds[attributes["to"]])


def _clip(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    low, high = [*inputs[1:], None, None][:2]
    return torch.clamp(inputs[0], min=low, max=high) if low is not None or high is not None else inputs[0]


def _layer_norm(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    axis = attributes.get("axis", -1) % inputs[0].ndim
    bias = inputs[2] if len(inputs) > 2 else None
    return f.layer_norm(inputs[0], inputs[0].shape[axis:], inputs[1], bias, attributes.get("epsilon", 1e-5))


def _pads(attributes: dict[str, Any], rank: int) -> list[int]:
    """As torch's pad takes them. ONNX: all begins, then all ends."""
    pads = attributes.get("pads", [0] * 2 * rank)
    return [pads[place + side * rank] for place in reversed(range(rank)) for side in (0, 1)]


def _pad(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    mode = attributes.get("mode", "constant")
    if mode not in ("constant", "reflect") or (len(inputs) > 3 and inputs[3] is not None):
        raise _untrainable(f"the backbone pads by {mode}, or on chosen axes")
    value = 0.0 if len(inputs) < 3 or inputs[2] is None else float(inputs[2])
    pads = _pads({"pads": _list(inputs[1])}, inputs[0].ndim)
    return f.pad(inputs[0], pads, value=value) if mode == "constant" else f.pad(inputs[0], pads, mode=mode)


def _explicit(attributes: dict[str, Any]) -> None:
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise _untrainable("the backbone pads convolutions or pools by auto_pad")


def _conv(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    x, weight = inputs[0], inputs[1]
    rank = weight.ndim - 2
    _explicit(attributes)
    convolve = (f.conv1d, f.conv2d, f.conv3d)[rank - 1]
    return convolve(
        f.pad(x, _pads(attributes, rank)), weight, inputs[2] if len(inputs) > 2 else None,
        stride=attributes.get("strides", [1] * rank), dilation=attributes.get("dilations", [1] * rank),
        groups=attributes.get("group", 1),
    )  # fmt: skip


def _batch_norm(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    x, weight, bias, mean, variance = inputs
    return f.batch_norm(x, mean, variance, weight, bias, training=False, eps=attributes.get("epsilon", 1e-5))


def _max_pool(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    rank = len(attributes["kernel_shape"])
    dilation = attributes.get("dilations", [1] * rank)
    return _pool((f.max_pool1d, f.max_pool2d, f.max_pool3d)[rank - 1], inputs[0], attributes, float("-inf"), dilation=dilation)


def _average_pool(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    if any(attributes.get("pads", ())) and not attributes.get("count_include_pad", 0):
        raise _untrainable("the backbone's AveragePool leaves its padding out of the mean")
    pool = (f.avg_pool1d, f.avg_pool2d, f.avg_pool3d)[len(attributes["kernel_shape"]) - 1]
    return _pool(pool, inputs[0], attributes, 0.0)


def _pool(pool: Callable[..., torch.Tensor], x: torch.Tensor, attributes: dict[str, Any], padding: float, **more: Any) -> torch.Tensor:
    _explicit(attributes)
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    strides = attributes.get("strides", [1] * rank)
    wide = f.pad(x, _pads(attributes, rank), value=padding)
    made = pool(wide, kernel, strides, ceil_mode=bool(attributes.get("ceil_mode", 0)), **more)
    begins = attributes.get("pads", [0] * rank)[:rank]
    for axis, (begin, stride) in enumerate(zip(begins, strides, strict=True), 2):  # no window begins behind the values
        made = made.narrow(axis, 0, min(made.shape[axis], -(-(x.shape[axis] + begin) // stride)))
    return made


def _gemm(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    left = inputs[0].T if attributes.get("transA") else inputs[0]
    right = inputs[1].T if attributes.get("transB") else inputs[1]
    out = attributes.get("alpha", 1.0) * (left @ right)
    return out if len(inputs) < 3 else out + attributes.get("beta", 1.0) * inputs[2]


def _flatten(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    x, axis = inputs[0], attributes.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _shape(inputs: list[Any], attributes: dict[str, Any]) -> torch.Tensor:
    found = list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(found, dtype=torch.int64, device=inputs[0].device)


def _plain(call: Callable[..., Any]) -> Op:
    return lambda inputs, attributes: call(*inputs)


def _same(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    return inputs[0]


_OPS: dict[str, Op] = {
    "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul), "Div": _divide,
    "MatMul": _plain(torch.matmul), "Gemm": _gemm, "Pow": _plain(torch.pow), "Sqrt": _plain(torch.sqrt),
    "Erf": _plain(torch.erf), "Exp": _plain(torch.exp), "Log": _plain(torch.log), "Neg": _plain(torch.neg),
    "Abs": _plain(torch.abs), "Tanh": _plain(torch.tanh), "Sigmoid": _plain(torch.sigmoid), "Relu": _plain(torch.relu),
    "Reciprocal": _plain(torch.reciprocal), "Equal": _plain(torch.eq), "Greater": _plain(torch.gt),
    "Less": _plain(torch.lt), "Not": _plain(torch.logical_not), "And": _plain(torch.logical_and),
    "Or": _plain(torch.logical_or), "Where": _plain(torch.where), "Max": lambda i, a: reduce(torch.maximum, i),
    "Min": lambda i, a: reduce(torch.minimum, i), "HardSwish": _plain(f.hardswish), "Identity": _same, "Dropout": _same,
    "LeakyRelu": lambda i, a: f.leaky_relu(i[0], a.get("alpha", 0.01)), "Elu": lambda i, a: f.elu(i[0], a.get("alpha", 1.0)),
    "HardSigmoid": lambda i, a: torch.clamp(a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5), 0, 1),
    "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)), "Cast": _cast, "Shape": _shape, "Gather": _gather,
    "GatherElements": lambda i, a: torch.gather(i[0], a.get("axis", 0), i[1].long()),
    "Reshape": _reshape, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Flatten": _flatten,
    "Transpose": lambda i, a: i[0].permute(a.get("perm", list(reversed(range(i[0].ndim))))),
    "Concat": lambda i, a: torch.cat(i, a["axis"]), "Slice": _slice, "Expand": _expand, "ConstantOfShape": _filled,
    "Range": lambda i, a: torch.arange(*(one.item() for one in i), device=i[0].device), "Clip": _clip,
    "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm, "Conv": _conv, "Pad": _pad, "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda i, a: i[0].mean(dim=list(range(2, i[0].ndim)), keepdim=True),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
}  # fmt: skip
