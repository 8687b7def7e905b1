"""A user's own ONNX file: checked without trusting it, its signature read, run once, and packaged. onnx is imported
inside.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput, ModelworksError, PayloadTooLarge
from modelworks.core.tasks import CLASSIFICATION, REGRESSION
from modelworks.core.types import Signature, TensorSpec
from modelworks.ml import onnx_tables
from modelworks.ml.data.types import batch_to_rows
from modelworks.ml.package import Manifest, Package, PackageFile, ParitySamples
from modelworks.ml.runtimes.onnx import MODEL_FILE, OnnxRuntime
from modelworks.ml.runtimes.parity import difference

if TYPE_CHECKING:
    import onnx

    from modelworks.ml.base import Batch

MAX_MODEL = 2 * 1024**3 - 1  # protobuf's own limit
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_MAX_PORTS = 10_000
_MAX_DUMMY = 64 * 1024**2  # elements of one dummy input
_MAX_SAMPLE = 4096  # numbers that parity samples may hold
_FREE_SIZES = (1, 8, 64, 224)  # tried in turn for free dimensions but the first
_ELEMENTS = {  # TensorProto's codes
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip


def import_onnx(
    path: Path,
    workdir: Path,
    *,
    task: str | None = None,
    classes: list[Any] | None = None,
    licence: str | None = None,
    description: str | None = None,
    threads: int = 1,
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest of a user's ONNX model and its files by name (in `workdir`).

    `task` is by default "tabular-..." when the signature is a table's (each input a column [-1, 1]; outputs label and
    probabilities, or value), else "custom". A model whose `task` is given as tabular may name its outputs as it likes:
    what gives them their usual names and shapes is appended. An input of several columns, such as X [-1, 4], stays one
    feature, whose value is a list. InvalidInput says what is wrong with the model; nothing of it is run before its
    structure was checked.
    """
    model = check_onnx(path)
    target = workdir / MODEL_FILE
    if _without_zipmap(model):
        _save(model, target)
    elif path != target:
        shutil.copyfile(path, target)
    signature = _signature(model)
    origin: dict[str, Any] = {"producer": model.producer_name[:100], "digest": PackageFile.of(path).digest}
    found = _task(signature, classes, strict=task is None)
    adapted = task in (CLASSIFICATION, REGRESSION) and task != found
    if adapted:
        assert task is not None
        _, outputs = _try_out(_manifest("custom", signature, target), target, threads)
        origin["outputs"] = onnx_tables.adapt(model, onnx_tables.observed(signature, outputs), task, classes)
        _save(model, target)
        signature, found = _signature(model), task
    if found != "custom" and task in (None, found):
        signature = onnx_tables.with_columns(signature)
    about = {"classes": classes, "lineage": {"imported": origin}, "licence": licence, "description": description}
    manifest, outputs = _try_out(_manifest(task or found, signature, target, **about), target, threads)
    if adapted and task == CLASSIFICATION:
        onnx_tables.check_answers(outputs, classes or [])
    return manifest, {MODEL_FILE: target}


def _save(model: onnx.ModelProto, target: Path) -> None:
    target.write_bytes(model.SerializeToString(deterministic=True))


def _manifest(task: str, signature: Signature, path: Path, **about: Any) -> Manifest:
    files = {MODEL_FILE: PackageFile.of(path)}
    return Manifest(task=task, signature=signature, files=files, **about)


def check_onnx(path: Path) -> onnx.ModelProto:
    """The parsed model. InvalidInput for what is no sound ONNX, names files outside itself, or needs unknown
    operators.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if path.stat().st_size > MAX_MODEL:
        raise PayloadTooLarge(f"the ONNX file is larger than {MAX_MODEL} bytes, which one file cannot hold")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        raise InvalidInput(
            "the file is not ONNX: it cannot be parsed; export the model again", code="bad_model"
        ) from None
    if not model.graph.node:
        raise InvalidInput("the file is not ONNX, or its graph has no operator", code="bad_model")
    if len(model.training_info):
        raise InvalidInput("the model holds training graphs; export it for inference", code="bad_model")
    _check_parts(model)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise InvalidInput(
            f"the ONNX model is not valid: {' '.join(str(error).split())[:300]}", code="bad_model"
        ) from None
    return model


def _check_parts(model: onnx.ModelProto) -> None:
    """No data in other files, no operators but the known domains' and the model's own functions."""
    own = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in own:
            raise InvalidInput(
                f"the model uses the operator {node.domain[:80]}.{node.op_type[:80]}, which is not available; "
                "export it with the operators of ai.onnx, ai.onnx.ml or com.microsoft only",
                code="unknown_operator",
            )
        if node.op_type == "EPContext":
            raise InvalidInput(
                "the model holds a compiled context of one device; export plain ONNX", code="unknown_operator"
            )
    for tensor in _tensors(model):
        if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
            raise InvalidInput(
                f"the model keeps the data of {tensor.name[:80]!r} in another file; save it in one file "
                "(save_as_external_data=False)",
                code="external_data",
            )


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """The main graph, the functions, and every graph inside a node's attributes."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        part = waiting.pop()
        yield part
        for node in part.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += attribute.graphs


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for part in _graphs(model):
        yield from part.node


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for part in _graphs(model):
        sparse = list(getattr(part, "sparse_initializer", ()))
        yield from getattr(part, "initializer", ())
        attributes = [attribute for node in part.node for attribute in node.attribute]
        attributes += getattr(part, "attribute_proto", ())
        for attribute in attributes:
            yield attribute.t
            yield from attribute.tensors
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
        for each in sparse:
            yield each.values
            yield each.indices


def _without_zipmap(model: onnx.ModelProto) -> bool:
    """Replace outputs that a ZipMap makes (skl2onnx's default: a map a row) by the tensor before it."""
    zipmaps = {
        node.output[0]: node for node in model.graph.node if node.op_type == "ZipMap" and node.domain == "ai.onnx.ml"
    }
    changed = False
    for output in model.graph.output:
        node = zipmaps.get(output.name)
        if node is None:
            continue
        model.graph.node.remove(node)
        for other in model.graph.node:
            other.output[:] = [output.name if name == node.input[0] else name for name in other.output]
            other.input[:] = [output.name if name == node.input[0] else name for name in other.input]
        output.type.tensor_type.elem_type = 1
        output.type.tensor_type.ClearField("shape")
        for _ in range(2):
            output.type.tensor_type.shape.dim.add().dim_param = ""
        changed = True
    return changed


def _signature(model: onnx.ModelProto) -> Signature:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [_port(value, "input") for value in model.graph.input if value.name not in constants]
    outputs = [_port(value, "output") for value in model.graph.output]
    if not inputs or not outputs or len(inputs) + len(outputs) > _MAX_PORTS:
        raise InvalidInput(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs; it needs some of each", code="bad_model"
        )
    return Signature(inputs=inputs, outputs=outputs)


def _port(value: onnx.ValueInfoProto, what: str) -> TensorSpec:
    kind = value.type
    if not kind.HasField("tensor_type"):
        raise InvalidInput(
            f"the {what} {value.name[:80]!r} is not a tensor; export the model with tensor {what}s only",
            code="bad_model",
            param=value.name[:80],
        )
    datatype = _ELEMENTS.get(kind.tensor_type.elem_type)
    if datatype is None:
        raise InvalidInput(
            f"the {what} {value.name[:80]!r} has an element type that cannot be served; use float32, int64, "
            "string, bool or the like",
            code="bad_model",
            param=value.name[:80],
        )
    if not kind.tensor_type.HasField("shape") and what == "input":
        raise InvalidInput(
            f"the input {value.name[:80]!r} has no shape; export the model with one",
            code="bad_model",
            param=value.name[:80],
        )
    shape = [
        size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else -1
        for size in kind.tensor_type.shape.dim
    ]
    return TensorSpec(name=value.name, datatype=datatype, shape=shape)


def _task(signature: Signature, classes: list[Any] | None, *, strict: bool) -> str:
    """What the model is as it stands. `strict`: InvalidInput when its probabilities are not those of `classes`."""
    outputs = {spec.name: spec for spec in signature.outputs}
    if not onnx_tables.are_columns(signature):
        return "custom"
    if set(outputs) == {"value"} and outputs["value"].datatype == "FP32" and len(outputs["value"].shape) == 1:
        return REGRESSION
    if set(outputs) != {"label", "probabilities"} or outputs["label"].datatype != "BYTES" or not classes:
        return "custom"
    if outputs["probabilities"].shape[-1:] in ([len(classes)], [-1]):
        return CLASSIFICATION
    if strict:
        raise InvalidInput(
            f"classes names {len(classes)} classes, but probabilities has shape {outputs['probabilities'].shape}",
            param="classes",
        )
    return "custom"


def _try_out(manifest: Manifest, path: Path, threads: int) -> tuple[Manifest, Batch]:
    """Load and run the model on made-up inputs; their answers become its parity samples when they are small and
    repeat. The manifest with them, and the answers.
    """
    runtime = OnnxRuntime()
    runtime.load(Package(manifest, lambda _: path), threads)
    failure = "it has no inputs"
    for free in _FREE_SIZES:
        for rows in (2, 1):
            inputs = {spec.name: _dummy(spec, rows, free) for spec in manifest.signature.inputs}
            try:
                outputs, again = runtime.predict(inputs), runtime.predict(inputs)
            except ModelworksError as error:
                failure = f"{error.message}: {' '.join(str(error.__cause__).split())[-200:]}"
                continue
            manifest = _with_ranks(manifest, outputs)
            half = any(spec.datatype == "BF16" for spec in (*manifest.signature.inputs, *manifest.signature.outputs))
            repeats = (
                not half and difference({name: value.tolist() for name, value in outputs.items()}, again, 0.0) is None
            )
            runtime.close()
            samples = _samples(manifest.signature.inputs, inputs, outputs) if repeats else None  # JSON has no BF16
            return (manifest.model_copy(update={"parity": samples}) if samples else manifest), outputs
    runtime.close()
    raise InvalidInput(
        f"the model does not run on made-up inputs of its declared shapes: {failure}"[:600], code="bad_model"
    )


def _dummy(spec: TensorSpec, rows: int, free: int) -> np.ndarray:
    shape = [(rows if place == 0 else free) if size < 0 else size for place, size in enumerate(spec.shape)]
    count = int(np.prod(shape, dtype=object))
    if count > _MAX_DUMMY:
        raise InvalidInput(
            f"the input {spec.name[:80]!r} has {count} elements, too many to try out",
            code="bad_model",
            param=spec.name[:80],
        )
    if spec.datatype == "BYTES":
        return np.full(shape, "a", dtype=object)
    if spec.datatype.startswith(("FP", "BF")):
        values = np.linspace(0.0, 1.0, count, dtype=np.float32).reshape(shape)
        return values.astype({"FP16": np.float16, "FP64": np.float64}.get(spec.datatype, np.float32))
    dtype = np.dtype("uint8" if spec.column else "bool") if spec.datatype == "BOOL" else np.dtype(spec.datatype.lower())
    return np.ones(shape, dtype=dtype)


def _with_ranks(manifest: Manifest, outputs: Batch) -> Manifest:
    """Outputs that declare no shape get free dimensions, as many as they turned out to have."""
    known = [
        spec
        if len(spec.shape) == outputs[spec.name].ndim
        else spec.model_copy(update={"shape": [-1] * outputs[spec.name].ndim})
        for spec in manifest.signature.outputs
    ]
    return manifest.model_copy(update={"signature": manifest.signature.model_copy(update={"outputs": known})})


def _samples(specs: list[TensorSpec], inputs: Batch, outputs: Batch) -> ParitySamples | None:
    """None when inputs are not rows, are too large to keep, or an output is not finite."""
    counts = {array.shape[0] if array.ndim else -1 for array in inputs.values()}
    size = sum(array.size for array in (*inputs.values(), *outputs.values()))
    finite = all(np.isfinite(array).all() for array in outputs.values() if array.dtype.kind == "f")
    if len(counts) != 1 or -1 in counts or size > _MAX_SAMPLE or not finite:
        return None
    listed = {name: array.tolist() for name, array in outputs.items() if array.ndim}
    return ParitySamples(inputs=batch_to_rows(inputs, specs), outputs=listed) if listed else None
