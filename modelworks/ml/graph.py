"""ONNX graphs with deterministic names, their sessions, and the joining of a feature graph with an estimator's.

Nothing here knows what a transform or an estimator is. Imports numpy; onnx and onnxruntime inside functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput

if TYPE_CHECKING:
    import onnx
    import onnxruntime

OPSET = {"": 18, "ai.onnx.ml": 3}
IR_VERSION = 9
ML = "ai.onnx.ml"

# onnx.TensorProto's codes, so that a graph can be described without importing onnx
FLOAT, UINT8, INT64, STRING, BOOL, DOUBLE = 1, 2, 7, 8, 9, 11
_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(string)": object,
}

# A graph cannot have an input and an output of one name, but a table may have a column called "label".
_RESERVED = re.compile(r"^(?:features|label|probabilities|value)(?: \(column\))*$")
_ESCAPE = " (column)"


def input_name(column: str) -> str:
    """The graph input of a raw column: its name verbatim, but for the few names that outputs use."""
    return column + _ESCAPE if _RESERVED.match(column) else column


def column_of(name: str) -> str:
    """The inverse of `input_name`."""
    return name.removesuffix(_ESCAPE) if _RESERVED.match(name) and name.endswith(_ESCAPE) else name


class Graph:
    """A graph under construction. Tensors are [N, width], or [N, *shape] where a shape is given; names count upwards:
    the same calls give the same bytes.
    """

    def __init__(self, taken: set[str] | None = None) -> None:
        self.kinds: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of tensors that are no tables
        self._taken = {input_name(name) for name in taken or ()}
        self._inputs: list[str] = []
        self._constants: dict[str, np.ndarray] = {}
        self._nodes: dict[str, tuple[str, list[str], str, dict[str, Any]]] = {}  # by output
        self._count = 0

    def input(self, column: str, kind: int, width: int = 1, shape: tuple[int, ...] | None = None) -> str:
        """An input of shape [N, width], or [N, *shape], for `column`."""
        name = input_name(column)
        self._inputs.append(name)
        self._taken.add(name)
        self._describe(name, kind, width, shape)
        return name

    def constant(self, values: Any, kind: int = FLOAT) -> str:
        """A constant tensor. `values` are numbers, or texts when kind is STRING."""
        dtype: Any = {FLOAT: np.float32, DOUBLE: np.float64, INT64: np.int64, STRING: object, BOOL: np.bool_}[kind]
        name = self._fresh("c")
        self._constants[name] = np.asarray(values, dtype=dtype)
        self.kinds[name] = kind
        return name

    def node(
        self,
        op: str,
        inputs: list[str],
        *,
        kind: int = FLOAT,
        width: int = 1,
        shape: tuple[int, ...] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """A node with one output of `kind` and shape [N, width], or [N, *shape]; returns the output's name."""
        name = self._fresh("t")
        self._nodes[name] = (op, inputs, domain, attributes)
        self._describe(name, kind, width, shape)
        return name

    def _describe(self, name: str, kind: int, width: int, shape: tuple[int, ...] | None) -> None:
        self.kinds[name] = kind
        self.widths[name] = width if shape is None else math.prod(shape)
        if shape is not None:
            self.shapes[name] = shape

    def shape(self, tensor: str) -> tuple[int, ...]:
        """What follows the rows: (width,), or the shape of a tensor that is no table."""
        return self.shapes.get(tensor, (self.widths[tensor],))

    def flat(self, tensor: str) -> str:
        """The tensor as [N, width]."""
        if len(self.shape(tensor)) == 1:
            return tensor
        width = self.widths[tensor]
        return self.node("Reshape", [tensor, self.constant([-1, width], INT64)], kind=self.kinds[tensor], width=width)

    def concat(self, tensors: list[str]) -> str:
        """Tensors of one kind side by side; one alone is returned as it is."""
        if len(tensors) == 1:
            return tensors[0]
        width = sum(self.widths[tensor] for tensor in tensors)
        return self.node("Concat", tensors, axis=1, kind=self.kinds[tensors[0]], width=width)

    def pick(self, tensor: str, indices: list[int]) -> str:
        """The columns `indices` of `tensor`, in that order."""
        if indices == list(range(self.widths[tensor])):
            return tensor
        return self.node(
            "Gather", [tensor, self.constant(indices, INT64)], axis=1, kind=self.kinds[tensor], width=len(indices)
        )

    def inputs_of(self, tensors: list[str]) -> list[str]:
        """The graph inputs that `tensors` depend on, in order of declaration."""
        reached = self._reach(tensors)
        return [name for name in self._inputs if name in reached]

    def is_input(self, tensor: str) -> bool:
        return tensor in self._inputs

    def model(self, outputs: dict[str, str], name: str) -> onnx.ModelProto:
        """The part of the graph that `outputs` (output name -> tensor) need, as a checked model."""
        import onnx
        from onnx import helper, numpy_helper

        reached = self._reach(list(outputs.values()))
        nodes = [
            helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes)
            for output, (op, inputs, domain, attributes) in self._nodes.items()
            if output in reached
        ]
        nodes += [helper.make_node("Identity", [tensor], [output], name=output) for output, tensor in outputs.items()]
        graph = helper.make_graph(
            nodes,
            name,
            [
                helper.make_tensor_value_info(tensor, self.kinds[tensor], ["n", *self.shape(tensor)])
                for tensor in self._inputs
                if tensor in reached
            ],
            [
                helper.make_tensor_value_info(output, self.kinds[tensor], ["n", *self.shape(tensor)])
                for output, tensor in outputs.items()
            ],
            initializer=[
                numpy_helper.from_array(values, constant)
                for constant, values in self._constants.items()
                if constant in reached
            ],
        )
        model = finish(graph)
        onnx.checker.check_model(model)
        return model

    def _reach(self, tensors: list[str]) -> set[str]:
        reached: set[str] = set()
        waiting = list(tensors)
        while waiting:
            tensor = waiting.pop()
            if tensor not in reached:
                reached.add(tensor)
                waiting += self._nodes[tensor][1] if tensor in self._nodes else []
        return reached

    def _fresh(self, prefix: str) -> str:
        while True:
            self._count += 1
            name = f"{prefix}{self._count}"
            if name not in self._taken:
                return name


def finish(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model around `graph` at the house's opset and IR version."""
    from onnx import helper

    imports = [helper.make_opsetid(domain, version) for domain, version in OPSET.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="modelworks")


def to_bytes(model: onnx.ModelProto) -> bytes:
    """The model's bytes; the same model always gives the same."""
    return bytes(model.SerializeToString(deterministic=True))


def session(model: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU with `threads` compute threads, which do not spin while they wait."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])


def float32_ports(model: bytes, names: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """The model with float32 in the place of bfloat16, which numpy lacks, at the inputs and outputs of these names; and
    what those are called then.
    """
    import onnx

    loaded = onnx.load_model_from_string(model)
    graph, cast = loaded.graph, onnx.helper.make_node
    ports = {name: f"{name}/float32" for name in names}
    for place, port in enumerate(port for port in graph.input if port.name in ports):
        graph.node.insert(place, cast("Cast", [ports[port.name]], [port.name], to=onnx.TensorProto.BFLOAT16))
    graph.node.extend(
        cast("Cast", [port.name], [ports[port.name]], to=onnx.TensorProto.FLOAT)
        for port in graph.output
        if port.name in ports
    )
    for port in (*graph.input, *graph.output):
        if port.name in ports:
            port.name = ports[port.name]
            port.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return loaded.SerializeToString(deterministic=True), ports


def numpy_type(port: Any) -> Any:
    """Numpy's type of a session's input; None for one that no column has."""
    return _DTYPES.get(port.type)


def feed(inputs: list[Any], batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `session.run` wants for its `inputs`: 1-d columns of the batch become [n, 1]. InvalidInput if one lacks."""
    values: dict[str, np.ndarray] = {}
    for wanted in inputs:
        column = column_of(wanted.name)
        try:
            array = np.asarray(batch[column])
        except KeyError:
            raise InvalidInput(f"the column {column!r} is missing", param=column, code="missing_feature") from None
        array = array.astype(_DTYPES.get(wanted.type, array.dtype), copy=False)
        values[wanted.name] = array.reshape(-1, 1) if array.ndim == 1 else array
    return values


def compose(features: onnx.ModelProto, estimator: onnx.ModelProto) -> onnx.ModelProto:
    """One model from raw columns to the estimator's outputs, whose input "features" is what `features` puts out."""
    import onnx
    from onnx import compose as joint
    from onnx import version_converter

    used = {name for node in features.graph.node for name in (*node.input, *node.output)} | {
        i.name for i in features.graph.input
    }
    prefix = "model/"
    while any(name.startswith(prefix) for name in used):
        prefix = "_" + prefix
    outputs = [output.name for output in estimator.graph.output]
    versions = {entry.domain: entry.version for entry in estimator.opset_import}
    if versions.get("", OPSET[""]) != OPSET[""]:
        estimator = version_converter.convert_version(estimator, OPSET[""])
    estimator = joint.add_prefix(estimator, prefix)
    _align(estimator)
    merged = joint.merge_models(features, estimator, io_map=[("features", prefix + "features")], name="modelworks")
    graph = merged.graph
    renames = {prefix + name: name for name in outputs}
    taken = {i.name for i in graph.input} | {name for node in graph.node for name in node.output}
    if clash := sorted(set(outputs) & taken):
        raise InvalidInput(f"the output {clash[0]!r} has the name of another tensor", code="bad_graph")
    for node in graph.node:
        node.input[:] = [renames.get(name, name) for name in node.input]
        node.output[:] = [renames.get(name, name) for name in node.output]
    for output in graph.output:
        output.name = renames[output.name]
    del graph.value_info[:]  # stale after the renaming, and onnxruntime infers it anew
    model = finish(graph)
    onnx.checker.check_model(model)
    return model


def _align(model: onnx.ModelProto) -> None:
    """Give the estimator the house's IR version and operator sets. InvalidInput for operators newer than those."""
    from onnx import helper

    for entry in model.opset_import:
        if entry.domain == ML and entry.version > OPSET[ML]:
            raise InvalidInput(
                f"the estimator uses {ML} {entry.version}; export it for {ML} {OPSET[ML]}", code="bad_graph"
            )
    model.ir_version = IR_VERSION
    extra = {
        entry.domain: entry.version
        for entry in model.opset_import
        if entry.domain not in OPSET and entry.domain != "ai.onnx"
    }
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in (OPSET | extra).items())
