"""A foreign ONNX graph as data, to be copied into a graph of the house or trained on: nodes, constants, what is a weight.

Imports numpy; onnx inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput

if TYPE_CHECKING:
    import onnx

_STATISTICS = slice(3, 5)  # inputs of BatchNormalization that are measured, not learnt


@dataclass(frozen=True)
class Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str
    attributes: dict[str, Any]
    """Values as numbers, texts, lists and arrays."""


@dataclass(frozen=True)
class ImportedGraph:
    """inputs: (name, shape behind the rows; None where it is free).  output: the first one's name, and its width.

    weights: the constants that were learnt, in the file's order.
    """

    inputs: tuple[tuple[str, tuple[int | None, ...]], ...]
    output: str
    shape: tuple[int | None, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]
    weights: tuple[str, ...]

    def copy(
        self,
        given: dict[str, str],
        node: Callable[[Node, list[str]], list[str]],
        constant: Callable[[str], str],
    ) -> str:
        """The output's name in another graph. `given`: what stands for the inputs there. `node` and `constant` add one
        there: a node with its inputs' names there, a constant by its name here.
        """
        names = {"": ""} | given
        for one in self.nodes:
            for name in one.inputs:
                if name not in names:
                    names[name] = constant(name)
            made = node(one, [names[name] for name in one.inputs])
            names |= {here: there for here, there in zip(one.outputs, made, strict=True) if here}
        return names[self.output]


def read_graph(data: bytes, opset: int) -> ImportedGraph:
    """InvalidInput for a graph with branches or loops, or one that cannot be brought to `opset`."""
    import onnx
    from onnx import numpy_helper, version_converter

    model = onnx.load_model_from_string(data)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("", opset) != opset:
        try:
            model = version_converter.convert_version(model, opset)
        except (RuntimeError, ValueError) as error:
            raise InvalidInput(
                f"the graph cannot be brought to the operators of ONNX {opset} ({str(error)[:150]}); export it with those",
                code="bad_graph",
            ) from None
    graph = model.graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    learnt = list(constants)
    nodes = []
    for one in graph.node:
        attributes = {entry.name: _value(entry) for entry in one.attribute}
        if one.op_type == "Constant" and not one.domain:
            constants[one.output[0]] = np.asarray(next(iter(attributes.values())))
        else:
            nodes.append(Node(one.op_type, tuple(one.input), tuple(one.output), one.domain, attributes))
    measured = {name for one in nodes if one.op == "BatchNormalization" for name in one.inputs[_STATISTICS]}
    weights = tuple(n for n in learnt if constants[n].dtype.kind == "f" and constants[n].ndim and n not in measured)
    inputs = tuple((one.name, _shape(one)) for one in graph.input if one.name not in constants)
    return ImportedGraph(inputs, graph.output[0].name, _shape(graph.output[0]), tuple(nodes), constants, weights)


def _shape(info: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    sizes = [one.dim_value or None for one in info.type.tensor_type.shape.dim]
    return tuple(sizes[1:])


def _value(entry: onnx.AttributeProto) -> Any:
    from onnx import AttributeProto, helper, numpy_helper

    if entry.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(entry.t)
    if entry.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        raise InvalidInput("the graph has branches or loops, which are not built on", code="bad_graph")
    value = helper.get_attribute_value(entry)
    return value.decode() if isinstance(value, bytes) else value


def attributes_of(node: Node) -> dict[str, Any]:
    """As `onnx.helper.make_node` takes them."""
    from onnx import numpy_helper

    return {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in node.attributes.items()
    }
