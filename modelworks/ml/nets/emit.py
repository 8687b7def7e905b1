"""A trained net written down as ONNX, module by module, with names that count upwards: the same weights give the same bytes.

A module of ours has the method `emit(emitter, tensor) -> tensor` beside its `forward`. A module of somebody else's that
holds anything not known here goes through torch's own exporter, whose graph is then renamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput, MissingExtra
from modelworks.ml.graph import FLOAT, INT64, OPSET

if TYPE_CHECKING:
    import onnx
    import torch

Emit = Callable[["Emitter", Any, str], str]


class Unknown(Exception):
    """A module that has no translation here."""


class Emitter:
    """Nodes and constants of a graph that grows by one module after another."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._known: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
        self._count = 0

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A node; the name of its first output."""
        from onnx import helper

        names = [self._name("t") for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names[0]

    def add(self, kind: str, inputs: list[str], outputs: int, domain: str, attributes: dict[str, Any]) -> list[str]:
        """A node; the names of all its outputs."""
        self.op(kind, *inputs, outputs=outputs, domain=domain, **attributes)
        return list(self.nodes[-1].output)

    def constant(self, values: Any) -> str:
        """A constant of `values`: a tensor, an array (float32, int64 or bool), or numbers of one of these."""
        from onnx import numpy_helper

        array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
        kept: Any = {"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64)
        array = np.array(array, dtype=kept, order="C")
        key = (array.tobytes(), str(array.dtype), array.shape)
        if key not in self._known:
            self._known[key] = self._name("c")
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def exact(self, array: np.ndarray) -> str:
        """A constant of `array` as it is, of any type."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(array, self._name("c")))
        return self.constants[-1].name

    def module(self, module: torch.nn.Module, tensor: str) -> str:
        """What `module` makes of `tensor`, when it is not training."""
        own = getattr(module, "emit", None)
        if own is not None:
            return str(own(self, tensor))
        found = _known_modules().get(type(module))
        if found is None:
            raise Unknown(type(module).__name__)
        return found(self, module, tensor)

    def reshape(self, tensor: str, *shape: int) -> str:
        """0 keeps an axis, -1 is what is left."""
        return self.op("Reshape", tensor, self.constant(np.array(shape, dtype=np.int64)))

    def linear(self, tensor: str, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
        """tensor [..., i], weight [o, i]"""
        out = self.op("MatMul", tensor, self.constant(weight.detach().cpu().numpy().T))
        return out if bias is None else self.op("Add", out, self.constant(bias))

    def scale(self, tensor: str, factor: float, shift: float) -> str:
        out = self.op("Mul", tensor, self.constant(np.float32(factor)))
        return self.op("Add", out, self.constant(np.float32(shift)))

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"


def write(
    net: torch.nn.Module, shape: tuple[int, ...], scores: Callable[[Emitter, str], tuple[str, int | None]]
) -> Any:
    """The model: "features" FP32 [n, *shape], then `net`, then what `scores` appends.

    `scores` gets the net's output and returns its own, named "probabilities" when it has a width, else "value".
    """
    from onnx import helper

    from modelworks.ml.graph import finish

    emitter = Emitter()
    net.eval()
    features = helper.make_tensor_value_info("features", FLOAT, ["n", *shape])
    try:
        last = emitter.module(net, "features")
    except Unknown:
        emitter = Emitter()
        last = _export(emitter, net, shape)
    last, width = scores(emitter, last)
    name = "value" if width is None else "probabilities"
    emitter.nodes.append(helper.make_node("Identity", [last], [name], name=name))
    output = helper.make_tensor_value_info(name, FLOAT, ["n"] if width is None else ["n", width])
    graph = helper.make_graph(emitter.nodes, "net", [features], [output], initializer=emitter.constants)
    return finish(graph)


def write_vectors(net: torch.nn.Module, shape: tuple[int, ...]) -> Any:
    """The model: "features" FP32 [n, *shape] -> "vectors" FP32 [n, d]. `net` emits itself."""
    from onnx import helper

    from modelworks.ml.graph import finish

    emitter = Emitter()
    last = emitter.module(net, "features")
    emitter.nodes.append(helper.make_node("Identity", [last], ["vectors"], name="vectors"))
    features = helper.make_tensor_value_info("features", FLOAT, ["n", *shape])
    vectors = helper.make_tensor_value_info("vectors", FLOAT, ["n", "d"])
    return finish(helper.make_graph(emitter.nodes, "vectors", [features], [vectors], initializer=emitter.constants))


def _export(emitter: Emitter, net: torch.nn.Module, shape: tuple[int, ...]) -> str:
    """torch's exporter, its tensors renamed by their order, and all that it says of this machine left out."""
    import torch

    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtra(
            f"to write {type(net).__name__} down as ONNX takes torch's exporter; pip install onnxscript"
        ) from None
    example = torch.zeros(2, *shape)
    try:
        made: Any = torch.onnx.export(
            net, (example,), dynamo=True, opset_version=OPSET[""], verbose=False, external_data=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), input_names=["features"], output_names=["scores"],
        )  # fmt: skip
    except Exception as error:  # the exporter's failures have no type of their own
        raise InvalidInput(
            f"the net {type(net).__name__} cannot be written as an ONNX graph ({type(error).__name__}); build it of what "
            f"torch.onnx exports with a free number of rows",
            code="not_exportable",
            param="algorithm",
        ) from error
    graph = made.model_proto.graph
    names = {"features": "features", "": ""}
    for tensor in graph.initializer:
        names[tensor.name] = emitter._name("c")
    for node in graph.node:
        for output in node.output:
            names.setdefault(output, emitter._name("t"))
    from onnx import TensorProto

    for tensor in graph.initializer:
        kept = TensorProto()
        kept.CopyFrom(tensor)
        kept.name = names[tensor.name]
        kept.doc_string = ""
        del kept.metadata_props[:]
        emitter.constants.append(kept)
    for node in graph.node:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
        node.name = node.output[0]
        node.doc_string = ""
        del node.metadata_props[:]
        emitter.nodes.append(node)
    return names[graph.output[0].name]


def _known_modules() -> dict[type, Emit]:
    from torch import nn

    simple = {
        nn.ReLU: "Relu", nn.Tanh: "Tanh", nn.Sigmoid: "Sigmoid", nn.Softplus: "Softplus", nn.Hardswish: "HardSwish",
    }  # fmt: skip
    table: dict[type, Emit] = {kind: _plain(name) for kind, name in simple.items()}
    table |= {
        nn.Identity: lambda e, m, x: x,
        nn.Dropout: lambda e, m, x: x,
        nn.Dropout1d: lambda e, m, x: x,
        nn.Dropout2d: lambda e, m, x: x,
        nn.Sequential: _sequential,
        nn.Linear: lambda e, m, x: e.linear(x, m.weight, m.bias),
        nn.Flatten: _flatten,
        nn.Unflatten: _unflatten,
        nn.GELU: _gelu,
        nn.SiLU: lambda e, m, x: e.op("Mul", x, e.op("Sigmoid", x)),
        nn.ELU: lambda e, m, x: e.op("Elu", x, alpha=float(m.alpha)),
        nn.LeakyReLU: lambda e, m, x: e.op("LeakyRelu", x, alpha=float(m.negative_slope)),
        nn.ReLU6: lambda e, m, x: e.op("Clip", x, e.constant(np.float32(0)), e.constant(np.float32(6))),
        nn.Conv1d: _conv,
        nn.Conv2d: _conv,
        nn.BatchNorm1d: _batch_norm,
        nn.BatchNorm2d: _batch_norm,
        nn.LayerNorm: _layer_norm,
        nn.MaxPool1d: _pool("MaxPool"),
        nn.MaxPool2d: _pool("MaxPool"),
        nn.AvgPool1d: _pool("AveragePool"),
        nn.AvgPool2d: _pool("AveragePool"),
        nn.AdaptiveAvgPool1d: _global_pool,
        nn.AdaptiveAvgPool2d: _global_pool,
    }
    return table


def _plain(name: str) -> Emit:
    return lambda e, m, x: e.op(name, x)


def _sequential(e: Emitter, m: Any, x: str) -> str:
    for part in m:
        x = e.module(part, x)
    return x


def _flatten(e: Emitter, m: Any, x: str) -> str:
    if (m.start_dim, m.end_dim) != (1, -1):
        raise Unknown("Flatten")
    return e.op("Flatten", x, axis=1)


def _unflatten(e: Emitter, m: Any, x: str) -> str:
    if m.dim != 1:
        raise Unknown("Unflatten")
    return e.reshape(x, -1, *m.unflattened_size)


def _gelu(e: Emitter, m: Any, x: str) -> str:
    if m.approximate != "none":
        raise Unknown("GELU")
    wide = e.op("Erf", e.op("Mul", x, e.constant(np.float32(1 / math.sqrt(2)))))
    half = e.op("Mul", x, e.constant(np.float32(0.5)))
    return e.op("Mul", half, e.op("Add", wide, e.constant(np.float32(1))))


def _tuple(value: Any, rank: int) -> list[int]:
    return [int(one) for one in value] if isinstance(value, tuple | list) else [int(value)] * rank


def _conv(e: Emitter, m: Any, x: str) -> str:
    if isinstance(m.padding, str) or m.padding_mode != "zeros":
        raise Unknown("Conv")
    rank = m.weight.ndim - 2
    pads = _tuple(m.padding, rank)
    inputs = [x, e.constant(m.weight), *([e.constant(m.bias)] if m.bias is not None else [])]
    return e.op(
        "Conv", *inputs, kernel_shape=_tuple(m.kernel_size, rank), strides=_tuple(m.stride, rank), pads=pads + pads,
        dilations=_tuple(m.dilation, rank), group=int(m.groups),
    )  # fmt: skip


def _batch_norm(e: Emitter, m: Any, x: str) -> str:
    if not m.track_running_stats or not m.affine:
        raise Unknown("BatchNorm")
    values = [e.constant(value) for value in (m.weight, m.bias, m.running_mean, m.running_var)]
    return e.op("BatchNormalization", x, *values, epsilon=float(m.eps))


def _layer_norm(e: Emitter, m: Any, x: str) -> str:
    if len(m.normalized_shape) != 1 or m.weight is None or m.bias is None:
        raise Unknown("LayerNorm")
    return e.op("LayerNormalization", x, e.constant(m.weight), e.constant(m.bias), axis=-1, epsilon=float(m.eps))


def _pool(name: str) -> Emit:
    def emit(e: Emitter, m: Any, x: str) -> str:
        rank = 1 if type(m).__name__.endswith("1d") else 2
        pads = _tuple(m.padding, rank)
        more = {"count_include_pad": int(m.count_include_pad)} if name == "AveragePool" else {}
        kernel = _tuple(m.kernel_size, rank)
        strides = _tuple(m.stride if m.stride is not None else m.kernel_size, rank)
        return e.op(name, x, kernel_shape=kernel, strides=strides, pads=pads + pads, ceil_mode=int(m.ceil_mode), **more)

    return emit


def _global_pool(e: Emitter, m: Any, x: str) -> str:
    if any(one != 1 for one in _tuple(m.output_size, 1)):
        raise Unknown("AdaptiveAvgPool")
    return e.op("GlobalAveragePool", x)


__all__ = ["FLOAT", "INT64", "Emitter", "Unknown", "write"]
