"""Files that run code where they are loaded carelessly, each with a canary; and archives that break out or blow up."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper


class Trap:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.canary, "w")


def pickled(canary: Path, protocol: int = 4) -> bytes:
    return pickle.dumps(Trap(canary), protocol)


def shell_pickled(canary: Path) -> bytes:
    """By hand, in the oldest protocol, as text."""
    return b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


def _torch(canary: Path) -> bytes:
    return zipped({"archive/data.pkl": pickled(canary, 2), "archive/version": b"3\n", "archive/data/0": b"\0" * 64})


def _keras(canary: Path) -> bytes:
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    layer = {"class_name": "Lambda", "config": {"function": {"class_name": "__lambda__", "config": {"code": code}}}}
    config = {"class_name": "Sequential", "config": {"layers": [layer]}}
    return zipped(
        {
            "config.json": json.dumps(config).encode(),
            "metadata.json": b'{"keras_version": "3.0.0"}',
            "model.weights.h5": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
        }
    )


def _npy(canary: Path) -> bytes:
    out = io.BytesIO()
    array = np.empty(1, dtype=object)
    array[0] = Trap(canary)
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def _tar(canary: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("model.pkl")
        data = pickled(canary)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def graph(*, op: str = "Identity", domain: str = "", outside: str | None = None, doc: str = "") -> bytes:
    """A small ONNX model; `outside`: its weights lie in that file beside it."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    if outside is not None:
        weights.ClearField("float_data")
        weights.data_location = TensorProto.EXTERNAL
        for key, value in (("location", outside), ("offset", "0"), ("length", "4")):
            entry = weights.external_data.add()
            entry.key, entry.value = key, value
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"]),
        helper.make_node(op, ["m"], ["y"], domain=domain),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
        [weights],
        doc_string=doc,
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return bytes(onnx.ModelProto(ir_version=8, graph=made, opset_import=opsets).SerializeToString())


CODE: dict[str, Callable[[Path], bytes]] = {
    "pickle of protocol 0": shell_pickled,
    "pickle of protocol 2": lambda canary: pickled(canary, 2),
    "pickle of protocol 5": lambda canary: pickled(canary, 5),
    "joblib": lambda canary: pickled(canary, 3) + b"\0" * 64,
    "joblib by zlib": lambda canary: zlib.compress(pickled(canary)),
    "joblib by gzip": lambda canary: gzip.compress(pickled(canary)),
    "joblib by bzip2": lambda canary: bz2.compress(pickled(canary)),
    "joblib by xz": lambda canary: lzma.compress(pickled(canary)),
    "torch": _torch,
    "keras": _keras,
    "npy": _npy,
    "npz": lambda canary: zipped({"a.npy": _npy(canary)}),
    "tar": _tar,
    "gguf": lambda canary: b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40) + b"{{ cycler.__init__.__globals__ }}" * 10,
    "safetensors": lambda canary: struct.pack("<Q", 2**40) + b'{"w":{}}',
}
GRAPHS: dict[str, bytes] = {
    "weights above": graph(outside="../../../../../../../../etc/passwd"),
    "weights at an absolute path": graph(outside="/etc/passwd"),
    "weights beside": graph(outside="weights.bin"),
    "weights in the secret": graph(outside="../../../secret.key"),
    "an op of nobody's": graph(op="Touch", domain="evil.ops"),
    "a python op": graph(op="PyOp", domain="ai.onnx.contrib"),
    "cut off": graph()[:-20],
    "noise": b"\x08\x08" + os.urandom(500),
}


# -- archives ----------------------------------------------------------------------------------------------------------


def entries_of(package: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def declaring(package: bytes, **changes: Any) -> bytes:
    """The package with another manifest."""
    found = entries_of(package)
    found["manifest.json"] = json.dumps(json.loads(found["manifest.json"]) | changes).encode()
    return zipped(found)


def holding(package: bytes, model: bytes) -> bytes:
    """The package with another graph, which its manifest declares rightly."""
    files = {"model.onnx": {"digest": hashlib.sha256(model).hexdigest(), "size": len(model)}}
    changed = declaring(package, files=files)
    return zipped(entries_of(changed) | {"files/model.onnx": model})


def with_entry(
    package: bytes, name: str, data: bytes = b"x", *, mode: int = stat.S_IFREG, twice: bool = False
) -> bytes:
    """The package with one more entry, whatever its name and kind."""
    out = io.BytesIO(package)
    with warnings.catch_warnings(), zipfile.ZipFile(out, "a") as archive:
        warnings.simplefilter("ignore")
        entry = zipfile.ZipInfo(name)
        entry.filename = entry.orig_filename = name  # as it is: ZipInfo would clean it
        entry.create_system, entry.external_attr = 3, (mode | 0o777) << 16
        for _ in range(2 if twice else 1):
            archive.writestr(entry, data)
    return out.getvalue()


def bomb(package: bytes, name: str, size: int, method: int) -> bytes:
    """The package with `name` grown to `size` zeros, packed; a manifest keeps its text in front of them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for entry, data in entries_of(package).items():
            packed = zipfile.ZIP_STORED if entry != name else method
            archive.writestr(entry, data if entry != name else data + b" " * size, compress_type=packed)
    return out.getvalue()


def million() -> bytes:
    """An archive of a few bytes whose table of contents says that a million entries follow, and one that has 70 000."""
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, 46 * 10**6, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4, 1)
    return (
        b"PK\x03\x04" + wide + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", *([0xFFFF] * 4), *([0xFFFFFFFF] * 2), 0)
    )


def crowd(count: int = 70_000) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(count):
            archive.writestr(zipfile.ZipInfo(f"files/{number}"), b"")
    return out.getvalue()
