"""A user's own graph made to answer as a table's task does: `value`, or `label` and `probabilities`. What does not fit
is named: which input or output, and how it differs. onnx is imported inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import CLASSIFICATION
from modelworks.core.types import ColumnType, Signature, TensorSpec

if TYPE_CHECKING:
    import onnx

    from modelworks.ml.base import Batch

COLUMN_OF: dict[str, ColumnType] = {"FP32": "number", "INT64": "integer", "BOOL": "boolean", "BYTES": "category"}
_FLOATS = ("FP32", "FP64", "FP16")
_WHOLE = ("INT64", "INT32", "INT16", "INT8", "UINT8", "UINT16", "UINT32", "BOOL")
_LEAST_OPSET = 13  # of ai.onnx, when the graph imports none
_LEAST_IR = 7  # that opset's
_SUMS_TO_ONE = 1e-2


def observed(signature: Signature, outputs: Batch) -> Signature:
    """The signature with the sizes that outputs turned out to have, where it declares none; rows stay free."""

    def known(spec: TensorSpec) -> TensorSpec:
        found = list(outputs[spec.name].shape)
        declared = spec.shape if len(spec.shape) == len(found) else [-1] * len(found)
        shape = [size if size > 0 or not place else found[place] for place, size in enumerate(declared)]
        return spec.model_copy(update={"shape": shape})

    return signature.model_copy(update={"outputs": [known(spec) for spec in signature.outputs]})


def with_columns(signature: Signature) -> Signature:
    """Inputs named as columns when each is one: [-1, 1] of a type that columns have. Else they stay plain tensors."""
    if not are_columns(signature):
        return signature
    inputs = [
        spec.model_copy(update={"column": COLUMN_OF[spec.datatype], "shape": [-1, 1]}) for spec in signature.inputs
    ]
    return signature.model_copy(update={"inputs": inputs})


def are_columns(signature: Signature) -> bool:
    return all(spec.shape in ([-1, 1], [-1]) and spec.datatype in COLUMN_OF for spec in signature.inputs)


def adapt(model: onnx.ModelProto, signature: Signature, task: str, classes: Sequence[Any] | None) -> dict[str, str]:
    """Append to `model` what makes its outputs those of `task`; which of its outputs each is made from.

    `signature` is `observed`. InvalidInput names the input or output that does not fit.
    """
    for spec in signature.inputs:
        _check_rows(spec, task, "input")
    for spec in signature.outputs:
        _check_rows(spec, task, "output")
    if task == CLASSIFICATION:
        return _adapt_classifier(model, signature.outputs, task, classes)
    return _adapt_regressor(model, signature.outputs, task)


def check_answers(outputs: Batch, classes: Sequence[Any]) -> None:
    """InvalidInput when a classifier's answers to made-up inputs are no probabilities, or no labels of `classes`."""
    chances, labels = outputs["probabilities"], outputs["label"].tolist()
    if not np.isfinite(chances).all():
        return  # made-up inputs may be out of its range
    sums = chances.sum(axis=1)
    if (chances < -_SUMS_TO_ONE).any() or (abs(sums - 1) > _SUMS_TO_ONE).any():
        raise _misfit(
            CLASSIFICATION,
            f"its scores are no probabilities, as those of a row sum to {sums[abs(sums - 1).argmax()]:.4g}; export it "
            "with probabilities (such as a Softmax at its end)",
        )
    texts = [str(value) for value in classes]
    if unknown := [label for label in labels if label not in texts]:
        raise _misfit(CLASSIFICATION, f"it gives the label {unknown[0][:80]!r}, which classes does not name")
    best = [texts[index] for index in chances.argmax(axis=1)]
    if all(label != other for label, other in zip(labels, best, strict=True)):
        raise _misfit(
            CLASSIFICATION,
            f"it gives the label {labels[0][:80]!r} where {best[0][:80]!r} is the most probable; give classes in the "
            "order of the columns of its probabilities",
        )


# what an output is


def _check_rows(spec: TensorSpec, task: str, what: str) -> None:
    if not spec.shape or spec.shape[0] != -1:
        wanted = "the first size must be free, one for each row; export it with a dynamic batch axis"
        raise _misfit(task, f"the {what} {_told(spec)} has no rows: {wanted}")


def _adapt_regressor(model: onnx.ModelProto, outputs: Sequence[TensorSpec], task: str) -> dict[str, str]:
    if len(outputs) != 1:
        raise _misfit(task, f"it has {len(outputs)} outputs ({_list(outputs)}), where one, the value, is needed")
    spec = outputs[0]
    if spec.datatype not in _FLOATS or spec.shape[1:] not in ([], [1]):
        raise _misfit(task, f"the output {_told(spec)} must be a float, one for each row: shape [-1] or [-1, 1]")
    from onnx import TensorProto

    tail = _Tail(model, [spec.name], ["value"])
    tail.add("Reshape", [tail.cast(tail.source(spec.name), TensorProto.FLOAT), tail.numbers([-1])], "value")
    tail.finish([("value", TensorProto.FLOAT, ["n"])])
    return {"value": spec.name}


def _adapt_classifier(
    model: onnx.ModelProto, outputs: Sequence[TensorSpec], task: str, classes: Sequence[Any] | None
) -> dict[str, str]:
    if not classes:
        raise InvalidInput(
            f"{task} needs the classes of the model; name them in the order of the columns of its probabilities",
            code="wrong_task",
            param="classes",
        )
    chances = _probabilities(outputs, task, len(classes))
    rest = [spec for spec in outputs if spec is not chances]
    if len(rest) > 1:
        raise _misfit(task, f"it has {len(outputs)} outputs ({_list(outputs)}), where two are needed: label, scores")
    label = rest[0] if rest else None
    if label and (label.datatype not in (*_WHOLE, "BYTES") or label.shape[1:] not in ([], [1])):
        raise _misfit(
            task,
            f"the output {_told(label)} is no label: that is one int64 or string for each row, shape [-1] or [-1, 1]",
        )
    from onnx import TensorProto

    texts = [str(value) for value in classes]
    known = _known_labels(model, len(texts)) if label else None
    _check_order(known, texts, task)
    tail = _Tail(model, [spec.name for spec in outputs], ["label", "probabilities"])
    tail.add("Identity", [tail.cast(tail.source(chances.name), TensorProto.FLOAT)], "probabilities")
    if label is None:
        winner = tail.add("ArgMax", [tail.source(chances.name)], axis=1, keepdims=0)
        tail.add("Gather", [tail.texts(texts), winner], "label", axis=0)
    else:
        flat = tail.add("Reshape", [tail.source(label.name), tail.numbers([-1])])
        _name_labels(tail, flat, label.datatype, texts, known)
    tail.finish([("label", TensorProto.STRING, ["n"]), ("probabilities", TensorProto.FLOAT, ["n", len(texts)])])
    return {"label": label.name if label else chances.name, "probabilities": chances.name}


def _probabilities(outputs: Sequence[TensorSpec], task: str, count: int) -> TensorSpec:
    scores = [spec for spec in outputs if spec.datatype in _FLOATS and len(spec.shape) == 2]
    named = [spec for spec in scores if spec.name == "probabilities"]
    fitting = named or [spec for spec in scores if spec.shape[1] in (count, -1)]
    if len(fitting) == 1 and fitting[0].shape[1] in (count, -1):
        return fitting[0]
    if len(fitting) > 1:
        raise _misfit(
            task, f"each of the outputs {_list(fitting)} could be the probabilities; name one `probabilities`"
        )
    if len(scores) == 1:
        raise InvalidInput(
            f"classes names {count} classes, but the output {_told(scores[0])} has {scores[0].shape[1]} columns; give "
            "one class for each column, in their order",
            code="wrong_task",
            param="classes",
        )
    raise _misfit(
        task, f"none of its outputs ({_list(outputs)}) is the probabilities of {count} classes: float, [-1, {count}]"
    )


def _known_labels(model: onnx.ModelProto, count: int) -> list[Any] | None:
    """The labels that a classifier's operator declares in the order of its scores; None when there is no telling."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in reversed(model.graph.node):
        for attribute in node.attribute:
            if attribute.name in ("classlabels_ints", "classlabels_int64s") and len(attribute.ints) == count:
                return list(attribute.ints)
            if attribute.name == "classlabels_strings" and len(attribute.strings) == count:
                return [value.decode(errors="replace") for value in attribute.strings]
        if node.op_type == "ArrayFeatureExtractor" and node.input[0] in constants:
            values = numpy_helper.to_array(constants[node.input[0]])
            if values.size == count and len(set(values.ravel().tolist())) == count and values.dtype.kind in "iO":
                return [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values.ravel().tolist()]
    return None


def _check_order(known: list[Any] | None, texts: list[str], task: str) -> None:
    """Labels with names of their own must be those of `classes`, in order; numbers may stand for names."""
    if known is None or (not _are_integers(texts) and all(isinstance(value, int) for value in known)):
        return
    if [str(value) for value in known] != texts:
        shown = ", ".join(str(value)[:40] for value in known[:10])
        raise InvalidInput(
            f"the model is no {task} of these classes: its own labels are, in order, {shown}; give those as classes",
            code="wrong_task",
            param="classes",
        )


def _name_labels(tail: _Tail, flat: str, datatype: str, texts: list[str], known: list[Any] | None) -> None:
    """From labels [n] to the names of their classes: as they are, by their values, or by their places."""
    from onnx import TensorProto

    if datatype == "BYTES":
        tail.add("Identity", [flat], "label")
        return
    whole = tail.cast(flat, TensorProto.INT64)
    if _are_integers(texts):
        tail.add("Cast", [whole], "label", to=TensorProto.STRING)
        return
    if known is not None and known != list(range(len(texts))):
        column = tail.add("Reshape", [whole, tail.numbers([-1, 1])])
        hits = tail.cast(tail.add("Equal", [column, tail.numbers(known)]), TensorProto.FLOAT)
        whole = tail.add("ArgMax", [hits], axis=1, keepdims=0)
    tail.add("Gather", [tail.texts(texts), whole], "label", axis=0)


def _are_integers(texts: list[str]) -> bool:
    return all(text.removeprefix("-").isdecimal() and str(int(text)) == text for text in texts)


def _told(spec: TensorSpec) -> str:
    return f"{spec.name[:80]!r} ({spec.datatype} {spec.shape})"


def _list(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(_told(spec) for spec in specs[:5]) + (", ..." if len(specs) > 5 else "")


def _misfit(task: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"the model is no {task}: {why}; or leave task out to deploy it as it is", code="wrong_task", param="task"
    )


# what is appended


class _Tail:
    """Nodes after a graph's present outputs. Tensors that have the `wanted` names already are renamed throughout."""

    def __init__(self, model: onnx.ModelProto, outputs: Sequence[str], wanted: Sequence[str]) -> None:
        self._model, self._graph = model, model.graph
        self._taken = _names(model)
        self._count = 0
        self._sources = {name: name for name in outputs}
        for value in model.graph.input:
            if value.name in wanted:
                raise InvalidInput(
                    f"the model's input {value.name!r} has the name of an output of this task; rename it",
                    code="wrong_task",
                    param="task",
                )
        for name in wanted:
            if name in self._taken:
                fresh = self._fresh()
                _rename(model, name, fresh)
                self._sources = {key: fresh if old == name else old for key, old in self._sources.items()}

    def source(self, output: str) -> str:
        """The tensor that was the graph's output of that name."""
        return self._sources[output]

    def add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        output = output or self._fresh()
        self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def cast(self, tensor: str, kind: int) -> str:
        return self.add("Cast", [tensor], to=kind)

    def numbers(self, values: Sequence[int]) -> str:
        from onnx import numpy_helper

        name = self._fresh()
        self._graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def texts(self, values: Sequence[str]) -> str:
        from onnx import TensorProto, helper

        name = self._fresh()
        encoded: list[Any] = [value.encode() for value in values]
        self._graph.initializer.append(helper.make_tensor(name, TensorProto.STRING, [len(values)], encoded))
        return name

    def finish(self, outputs: list[tuple[str, int, list[Any]]]) -> None:
        """These (name, element type, shape) become the graph's outputs."""
        from onnx import checker, helper

        del self._graph.output[:]
        self._graph.output.extend(helper.make_tensor_value_info(*output) for output in outputs)
        versions = [entry.version for entry in self._model.opset_import if entry.domain in ("", "ai.onnx")]
        if not versions:
            self._model.opset_import.append(helper.make_opsetid("", _LEAST_OPSET))
            self._model.ir_version = max(self._model.ir_version, _LEAST_IR)
        try:
            checker.check_model(self._model)
        except checker.ValidationError as error:  # such as an opset from before Reshape took its shape as an input
            raise InvalidInput(
                f"the model's outputs cannot be adapted to the task: {' '.join(str(error).split())[:200]}; export it "
                f"with opset {_LEAST_OPSET} or later",
                code="bad_model",
            ) from None

    def _fresh(self) -> str:
        while (name := f"modelworks_{self._count}") in self._taken:
            self._count += 1
        self._taken.add(name)
        return name


def _inner(model: onnx.ModelProto) -> list[Any]:
    """The main graph and the graphs inside its nodes."""
    found: list[Any] = []
    waiting: list[Any] = [model.graph]
    while waiting:
        graph = waiting.pop()
        found.append(graph)
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += attribute.graphs
    return found


def _names(model: onnx.ModelProto) -> set[str]:
    names: set[str] = set()
    for graph in _inner(model):
        for node in graph.node:
            names.update(node.input, node.output)
        for group in (graph.input, graph.output, graph.initializer, graph.value_info):
            names.update(value.name for value in group)
        names.update(tensor.values.name for tensor in graph.sparse_initializer)
    return names


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for graph in _inner(model):
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
        tensors = [tensor.values for tensor in graph.sparse_initializer]
        for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info, *tensors):
            if value.name == old:
                value.name = new
        for note in graph.quantization_annotation:
            if note.tensor_name == old:
                note.tensor_name = new
