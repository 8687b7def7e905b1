"""Named tensors as they cross the wire: Open Inference Protocol datatypes, little-endian bytes, row-major.

BYTES elements are each a 4-byte little-endian length and the bytes. A missing value of a table's column is NaN in a float
tensor, an empty element in BYTES, INT64_MISSING in INT64, and any byte above 1 in BOOL.
"""

from __future__ import annotations

import binascii
import math
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from modelworks.core.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np

INT64_MISSING = -(2**63)
BOOL_MISSING = 2

# datatype -> (bytes an element, struct code; "" where JSON cannot carry it)
DATATYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "B"),
    "UINT8": (1, "B"),
    "UINT16": (2, "H"),
    "UINT32": (4, "I"),
    "UINT64": (8, "Q"),
    "INT8": (1, "b"),
    "INT16": (2, "h"),
    "INT32": (4, "i"),
    "INT64": (8, "q"),
    "FP16": (2, "e"),
    "BF16": (2, ""),
    "FP32": (4, "f"),
    "FP64": (8, "d"),
    "BYTES": (0, ""),
}

_NUMPY = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
_OIP = {**{numpy: oip for oip, numpy in _NUMPY.items()}, "void16": "BF16"}  # numpy has no bfloat16: two raw bytes
_LITTLE = {  # numpy's dtype.str
    f"{'|' if size == 1 else '<'}{'b' if oip == 'BOOL' else numpy[0]}{size}": oip
    for oip, numpy in _NUMPY.items()
    for size in (DATATYPES[oip][0],)
} | {"|V2": "BF16"}


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class Tensor(msgspec.Struct, array_like=True):
    """`data` holds prod(shape) elements of `datatype`."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes


def element_count(shape: Sequence[int]) -> int:
    """The product of `shape`; InvalidInput for a negative size or a product beyond 2**31."""
    for size in shape:
        if size < 0:
            raise InvalidInput(f"shape {list(shape)} has a negative size", code="bad_shape")
    count = math.prod(shape)
    if count > 2**31:
        raise InvalidInput(f"shape {list(shape)[:8]} asks for {count} elements, more than 2**31", code="bad_shape")
    return count


def pack(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """A tensor from flat Python `values` (str or bytes for BYTES). Raises InvalidInput that names the tensor."""
    try:
        _, code = DATATYPES[datatype]
    except KeyError:
        raise InvalidInput(
            f"{name!r} has datatype {datatype!r}; use one of {', '.join(DATATYPES)}", code="bad_datatype", param=name
        ) from None
    if len(values) != element_count(shape):
        raise InvalidInput(
            f"{name!r} has {len(values)} values but its shape {list(shape)} asks for {element_count(shape)}",
            code="bad_shape",
            param=name,
        )
    try:
        if datatype == "BYTES":
            data = pack_bytes(values)
        elif not code:
            raise InvalidInput(f"{name!r}: {datatype} travels only as binary data, not in JSON", param=name)
        else:
            data = struct.pack(f"<{len(values)}{code}", *values)
    except (struct.error, OverflowError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{name!r} has a value that is not {datatype}: {error}", code="bad_value", param=name
        ) from None
    return Tensor(name, datatype, list(shape), data)


def pack_bytes(values: Iterable[str | bytes]) -> bytes:
    parts: list[bytes] = []
    for value in values:
        raw = value.encode() if isinstance(value, str) else value
        parts.append(struct.pack("<I", len(raw)))
        parts.append(raw)
    return b"".join(parts)


def unpack_bytes(data: bytes, name: str = "tensor") -> list[bytes]:
    """The elements of a BYTES tensor's data; InvalidInput when a length runs past the end."""
    values: list[bytes] = []
    offset, end = 0, len(data)
    while offset < end:
        if offset + 4 > end:
            raise InvalidInput(f"{name!r}: BYTES data ends inside a length", code="bad_tensor", param=name)
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + length > end:
            raise InvalidInput(
                f"{name!r}: a BYTES element runs past the end of the data", code="bad_tensor", param=name
            )
        values.append(data[offset : offset + length])
        offset += length
    return values


def decode_base64(text: str | bytes) -> bytes:
    """The bytes of a file that came as base64, plain or URL-safe, padded or not, perhaps as a data URL. ValueError."""
    data = text.encode("ascii") if isinstance(text, str) else text
    if data.startswith(b"data:"):
        head, mark, rest = data.partition(b";base64,")
        data = rest if mark and len(head) < 200 else data
    data = b"".join(data.split()).translate(_URL_SAFE)
    return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)


def unpack(tensor: Tensor) -> list[Any]:
    """The flat values as Python numbers, bools or bytes."""
    if tensor.datatype == "BYTES":
        return unpack_bytes(tensor.data, tensor.name)
    if tensor.datatype == "BF16":
        return to_numpy(tensor).ravel().tolist()
    size, code = DATATYPES[tensor.datatype]
    values = struct.unpack(f"<{len(tensor.data) // size}{code}", tensor.data)
    return [bool(value) for value in values] if tensor.datatype == "BOOL" else list(values)


def check_size(tensor: Tensor) -> None:
    """Raise InvalidInput unless `data` has exactly the bytes that shape and datatype ask for."""
    count = element_count(tensor.shape)
    size, _ = DATATYPES[tensor.datatype]
    have = len(unpack_bytes(tensor.data, tensor.name)) if tensor.datatype == "BYTES" else len(tensor.data)
    want = count if tensor.datatype == "BYTES" else count * size
    if have != want:
        unit = "elements" if tensor.datatype == "BYTES" else "bytes"
        raise InvalidInput(
            f"{tensor.name!r} has {have} {unit} but shape {tensor.shape} of {tensor.datatype} asks for {want}",
            code="bad_shape",
            param=tensor.name,
        )


def to_numpy(tensor: Tensor) -> np.ndarray:
    """An array of the tensor's shape: object array of bytes for BYTES, float32 for BF16; read-only where it shares memory."""
    import numpy as np

    if tensor.datatype == "BYTES":
        flat = np.empty(element_count(tensor.shape), dtype=object)
        flat[:] = unpack_bytes(tensor.data, tensor.name)
        return flat.reshape(tensor.shape)
    if tensor.datatype == "BF16":
        wide = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=dtype_of(tensor.datatype)).reshape(tensor.shape)


@cache
def dtype_of(datatype: str) -> np.dtype[Any]:
    """Numpy's little-endian type of a datatype of numbers that it has: all but BF16."""
    import numpy as np

    return np.dtype(_NUMPY[datatype]).newbyteorder("<")


def datatype_of(array: np.ndarray) -> str | None:
    """The datatype of an array of little-endian numbers; None for any other."""
    return _LITTLE.get(array.dtype.str)


def from_numpy(name: str, array: np.ndarray) -> Tensor:
    """A tensor from an array: numbers, bools, an object/str array of str or bytes (BYTES), or dtype V2 (BF16)."""
    import numpy as np

    shape = list(array.shape)
    if array.dtype.kind in "OUS":
        return Tensor(name, "BYTES", shape, pack_bytes(array.ravel().tolist()))
    datatype = _OIP[array.dtype.name]
    return Tensor(
        name, datatype, shape, np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    )
