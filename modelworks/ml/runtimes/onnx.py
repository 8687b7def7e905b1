"""Runs a package's ONNX graph by onnxruntime. Imports numpy alone; onnxruntime comes in with `load`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import SHOWN, InvalidInput, ModelworksError
from modelworks.core.types import Signature, TensorSpec
from modelworks.ml import graph
from modelworks.ml.data.transforms.host import compile_host, rows_at_once
from modelworks.ml.data.transforms.rows import missing_mask
from modelworks.ml.package import Package

if TYPE_CHECKING:
    from modelworks.ml.base import Batch

MODEL_FILE = "model.onnx"
_COLUMN_DTYPES: dict[str, Any] = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.uint8}
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "BF16": np.float32, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
    **{f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)},
}  # fmt: skip


class OnnxRuntime:
    """One graph in one session.

    A tabular model's inputs are columns, [n] or [n, 1]; any other's have the shapes it declares.
    """

    def __init__(self) -> None:
        self._session: Any = None
        self._signature: Signature | None = None
        self._ports: dict[str, str] = {}  # inputs and outputs that the session calls otherwise: those of BF16
        self._host: Callable[[Batch], Batch] | None = None
        self._rows: int | None = None
        self._names: list[str] = []  # of the outputs
        self._known: dict[str, dict[Any, None]] = {}  # by input, the only values that it may have
        # where all inputs can go to the session as they come: their names there, their types, whether they are columns
        self._plain: dict[str, tuple[str, np.dtype[Any], bool]] = {}
        self._refusals: tuple[type[Exception], ...] = ()
        self._failures: tuple[type[Exception], ...] = ()

    def load(self, package: Package, threads: int = 1) -> Signature:
        """InvalidInput when onnxruntime cannot load the graph or it lacks what the manifest's signature promises."""
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        manifest = package.manifest
        self._refusals = (state.InvalidArgument,)
        self._failures = (state.Fail, state.RuntimeException, state.EPFail, state.NotImplemented)
        model = package.path(MODEL_FILE).read_bytes()
        specs = [*manifest.signature.inputs, *manifest.signature.outputs]
        if half := [spec.name for spec in specs if spec.datatype == "BF16"]:
            model, self._ports = graph.float32_ports(model, half)
        try:
            self._session = graph.session(model, threads)
        except (*self._refusals, *self._failures, state.InvalidProtobuf, state.InvalidGraph, state.NoSuchFile) as error:
            raise InvalidInput(f"onnxruntime cannot load the model: {_brief(error)}", code="bad_model") from error
        self._signature = manifest.signature
        self._known = {spec.name: dict.fromkeys(spec.known) for spec in manifest.signature.inputs if spec.known is not None}
        try:
            self._host = compile_host(manifest.host_transforms) if manifest.host_transforms else None
            self._rows = rows_at_once(manifest.host_transforms)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"the package's host transforms are malformed: {error!r:.200}", code="bad_package"
            ) from error
        self._check()
        return manifest.signature

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. InvalidInput names the input that is missing, unknown, mistyped or of a wrong shape."""
        if self._plain and len(inputs) == len(self._plain) and (feed := self._as_they_are(inputs)) is not None:
            return self._answer(self._names, feed)
        signature = self._loaded()
        if unknown := next((name for name in inputs if all(spec.name != name for spec in signature.inputs)), None):
            raise InvalidInput(f"the model has no input {unknown[:80]!r}", code="unknown_feature", param=unknown[:80])
        arrays = {spec.name: _array(spec, inputs) for spec in signature.inputs}
        for name, known in self._known.items():
            _check_known(name, arrays[name], known)
        tabular = bool(signature.inputs and signature.inputs[0].column)
        return self._answer(self._names, self._columns(arrays) if tabular else arrays)

    def _as_they_are(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """What the session wants, where the inputs are just that; None: they must be looked at."""
        feed = {}
        rows = -1
        for name, (port, dtype, column) in self._plain.items():
            array = inputs.get(name)
            if array is None or array.dtype != dtype:
                return None
            if column:
                shape = array.shape
                if len(shape) != 2 or shape[1] != 1 or (shape[0] != rows and rows >= 0):
                    return None
                rows = shape[0]
            feed[port] = array
        return feed

    def _answer(self, names: list[str], feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            if self._ports:
                return self._run_half(names, feed)
            return dict(zip(names, self._run(names, feed), strict=True))
        except self._refusals as error:
            raise InvalidInput(f"the model refuses this input: {_brief(error)}", code="bad_input") from error
        except self._failures as error:
            raise ModelworksError(
                "the model failed on this input; the replica's log has the reason", code="model_failed"
            ) from error

    def _run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The session's outputs; long sequences some rows at a time, so that memory stays bounded."""
        rows = len(next(iter(feed.values()))) if feed and self._rows else 0
        if not self._rows or rows <= self._rows:
            return self._session.run(names, feed)
        parts = [
            self._session.run(names, {name: values[start : start + self._rows] for name, values in feed.items()})
            for start in range(0, rows, self._rows)
        ]
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def close(self) -> None:
        self._session = None

    def _run_half(self, names: list[str], feed: Batch) -> dict[str, np.ndarray]:
        """Where there is bfloat16: answered as two raw bytes each (dtype V2)."""
        ports = self._ports
        asked = [ports.get(name, name) for name in names]
        found = self._session.run(asked, {ports.get(name, name): array for name, array in feed.items()})
        return {
            name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") if name in ports else array
            for name, array in zip(names, found, strict=True)
        }

    def _columns(self, batch: Batch) -> dict[str, np.ndarray]:
        counts = {len(column) for column in batch.values()}
        if len(counts) > 1:
            raise InvalidInput(f"the inputs have different numbers of rows: {sorted(counts)[:5]}", code="bad_shape")
        return graph.feed(self._inputs, self._host(batch) if self._host else batch)

    def _check(self) -> None:
        signature = self._loaded()
        self._inputs = self._session.get_inputs()
        self._names = [spec.name for spec in signature.outputs]
        self._plain = self._find_plain(signature)
        outputs = {output.name for output in self._session.get_outputs()}
        for spec in signature.outputs:
            if self._ports.get(spec.name, spec.name) not in outputs:
                raise InvalidInput(
                    f"the graph has no output {spec.name!r}, which the signature promises", code="bad_package"
                )
        if any(bool(spec.column) != bool(signature.inputs[0].column) for spec in signature.inputs):
            raise InvalidInput("the signature mixes columns and plain tensors", code="bad_package")

    def _find_plain(self, signature: Signature) -> dict[str, tuple[str, np.dtype[Any], bool]]:
        ports = {graph.column_of(port.name): port for port in self._inputs}
        found = {}
        for spec in signature.inputs:
            if spec.datatype in ("BYTES", "BF16") or spec.known is not None or self._host is not None:
                return {}
            name, dtype = spec.name, np.dtype(_DTYPES[spec.datatype])
            if spec.column:
                if not spec.nullable or spec.datatype == "BOOL" or spec.name not in ports:
                    return {}
                name = ports[spec.name].name
                wanted = graph.numpy_type(ports[spec.name])
                if wanted is None or wanted != dtype:
                    return {}
            found[spec.name] = name, dtype, bool(spec.column)
        return found

    def _loaded(self) -> Signature:
        if self._session is None or self._signature is None:
            raise ModelworksError("the runtime has no model; call load first")
        return self._signature


def _array(spec: TensorSpec, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The input in the dtype that the graph takes; a column as [n]."""
    try:
        array = np.asarray(inputs[spec.name])
    except KeyError:
        raise InvalidInput(f"the input {spec.name!r} is missing", code="missing_feature", param=spec.name) from None
    if spec.column in ("image", "audio"):
        array = _files(spec, array)
    else:
        array = _texts(spec, array) if spec.datatype == "BYTES" else _numbers(spec, array)
    if not spec.column:
        return array
    if array.ndim != 1:
        if array.ndim != 2 or array.shape[1] != 1:
            raise InvalidInput(
                f"the input {spec.name!r} has shape {list(array.shape)}, not [rows, 1]",
                code="bad_shape",
                param=spec.name,
            )
        array = array[:, 0]
    if not spec.nullable and missing_mask(array).any():
        raise InvalidInput(
            f"the feature {spec.name!r} is missing in row {int(missing_mask(array).argmax())}, and the model was "
            "not made to accept that",
            code="missing_value",
            param=spec.name,
        )
    return array


def _numbers(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    wanted = np.dtype((_COLUMN_DTYPES if spec.column else _DTYPES)[spec.datatype])
    if array.dtype == wanted:
        return array
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and wanted.kind != "f"):
        raise InvalidInput(
            f"the input {spec.name!r} must be {spec.datatype}, not {array.dtype}", code="bad_datatype", param=spec.name
        )
    return array.astype(wanted)


def _check_known(name: str, array: np.ndarray, known: dict[Any, None]) -> None:
    strange = next((value for value in array.ravel().tolist() if value not in known), None)
    if strange is not None:
        near = difflib.get_close_matches(str(strange)[:SHOWN], [str(value) for value in islice(known, 1000)], 1, 0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        listed = ", ".join(str(value)[:80] for value in islice(known, 20)) + (", ..." if len(known) > 20 else "")
        raise InvalidInput(
            f"the model does not know the {name} {str(strange)[:80]!r}; {hint}it knows {listed}",
            code="unknown_value",
            param=name,
        )


def _texts(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "OUS":
        raise InvalidInput(
            f"the input {spec.name!r} must be texts, not {array.dtype}", code="bad_datatype", param=spec.name
        )
    out = np.empty(array.size, dtype=object)
    try:
        out[:] = [value.decode() if isinstance(value, bytes) else str(value) for value in array.ravel().tolist()]
    except UnicodeDecodeError:
        raise InvalidInput(
            f"the input {spec.name!r} has a text that is not UTF-8", code="bad_value", param=spec.name
        ) from None
    return out.reshape(array.shape)


def _files(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """Files as bytes, which the host transforms decode."""
    if array.dtype.kind not in "OUS":
        raise InvalidInput(
            f"the input {spec.name!r} must be files, not {array.dtype}", code="bad_datatype", param=spec.name
        )
    out = np.empty(array.size, dtype=object)
    out[:] = [value.encode() if isinstance(value, str) else bytes(value) for value in array.ravel().tolist()]
    return out.reshape(array.shape)


def _brief(error: Exception) -> str:
    """onnxruntime's words without its source file and line, on one line."""
    text = " ".join(str(error).split())
    return text.partition(" : ")[2].rpartition(".cc:")[2][:300] or text[:300]
