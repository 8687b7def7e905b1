"""An ONNX graph that gives back each of its inputs, one of every datatype, and values for them. Not a test module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64", "BYTES",
)  # fmt: skip


def write_model(path: Path, datatypes: tuple[str, ...] = DATATYPES) -> Path:
    """Inputs `FP32`..., each [-1, 3], and outputs `FP32 back`... of the same shape."""
    from onnx import TensorProto, helper, save

    names = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
    kinds = {name: getattr(TensorProto, names.get(name, name)) for name in datatypes}
    nodes = [helper.make_node("Identity", [name], [f"{name} back"]) for name in datatypes]
    inputs = [helper.make_tensor_value_info(name, kind, ["n", 3]) for name, kind in kinds.items()]
    outputs = [helper.make_tensor_value_info(f"{name} back", kind, ["n", 3]) for name, kind in kinds.items()]
    graph = helper.make_graph(nodes, "every", inputs, outputs)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def values() -> dict[str, Any]:
    """Two rows for each input, with the ends of its range among them. BF16 as float32 that bfloat16 holds exactly."""
    found: dict[str, Any] = {}
    for name in DATATYPES:
        if "INT" in name:
            dtype = np.dtype(name.lower())
            info = np.iinfo(dtype)
            found[name] = np.array([[info.min, 0, 1], [2, 3, info.max]], dtype=dtype)
    found["BOOL"] = np.array([[True, False, True], [False, True, True]])
    for name, dtype, top in (
        ("FP16", np.float16, 65504.0),
        ("FP32", np.float32, 3.4e38),
        ("FP64", np.float64, 1.7e308),
    ):
        found[name] = np.array([[0.1, -0.0, top], [-top, 1.5, 2**-14]], dtype=dtype)
    found["BF16"] = np.array([[1.5, -2.0, 2.0**100], [0.0, -(2.0**-100), 3.140625]], dtype=np.float32)
    texts = ["", "a", "grün", "中文", "x" * 300, "two\nlines"]
    found["BYTES"] = np.array([text.encode() for text in texts], dtype=object).reshape(2, 3)
    return {name: found[name] for name in DATATYPES}


def differing(answer: dict[str, Any]) -> list[str]:
    """Datatypes whose array in `answer` (by output name) is not what went in."""
    wrong = []
    for name, sent in values().items():
        back = answer.get(f"{name} back")
        if name == "BYTES" and back is not None:  # tritonclient gives texts that came in JSON as str
            flat = [text.encode() if isinstance(text, str) else text for text in back.ravel()]
            back = np.array(flat, dtype=object).reshape(back.shape)
        if back is None or list(back.shape) != list(sent.shape) or not np.array_equal(back, sent):
            wrong.append(name)
    return wrong
