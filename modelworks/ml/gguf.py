"""GGUF files from outside: the header read within bounds, and the weights written anew as Q8_0."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from modelworks.core.errors import InvalidInput, MissingExtra

MAX_ENTRIES = 4096
MAX_TENSORS = 65_536
MAX_ARRAY = 2_000_000  # elements: the largest vocabularies have some 260,000
MAX_STRING = 4 * 1024**2
MAX_HEADER = 256 * 1024**2
MAX_RANK = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEEP = 16  # elements of an array that are kept; of the tokens, all
TOKENS = "tokenizer.ggml.tokens"
# tensor type -> (elements a block, bytes a block), from the GGML format
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip


class _Reader:
    """Reads forward and never past the file's end or MAX_HEADER."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = min(size, MAX_HEADER)
        self.offset = 0

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise _bad("its header runs past its end")
        data = self._file.read(count)
        if len(data) != count:
            raise _bad("its header runs past its end")
        self._left -= count
        self.offset += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, most: int, what: str) -> int:
        value = self.number("Q")
        if value > most:
            raise _bad(f"it announces {value} {what}; at most {most} are taken")
        return int(value)

    def text(self, most: int = MAX_STRING) -> str:
        return self.take(self.count(most, "bytes of one text")).decode("utf-8", "replace")

    def value(self, kind: int, key: str, *, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or nested:
            raise _bad(f"the value of {key[:80]!r} has an unknown type {kind}")
        inner, length = self.number("I"), self.count(MAX_ARRAY, "elements of one list")
        if code := _SCALARS.get(inner):
            data = self.take(length * struct.calcsize(f"<{code}"))
            kept = min(length, _KEEP)
            return list(struct.unpack_from(f"<{kept}{code}", data))
        found = []
        for index in range(length):
            one = self.value(inner, key, nested=True)
            if index < _KEEP or key == TOKENS:
                found.append(one)
        return found


def read_gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file (of long lists but the first elements), once its header is sound.

    InvalidInput for another format or version, for counts beyond bounds, and for tensors that overlap the file's end.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        if reader.take(4) != b"GGUF" or (version := reader.number("I")) not in (2, 3):
            raise _bad("it is not GGUF of version 2 or 3, little-endian")
        tensors, entries = reader.count(MAX_TENSORS, "tensors"), reader.count(MAX_ENTRIES, "entries")
        found: dict[str, Any] = {"version": version}
        for _ in range(entries):
            key = reader.text(65_535)
            if key in found:
                raise _bad(f"it has the entry {key[:80]!r} twice")
            found[key] = reader.value(reader.number("I"), key)
        _check_tensors(reader, tensors, size, found.get("general.alignment", 32))
    if not isinstance(found.get("general.architecture"), str):
        raise _bad("it does not name its architecture")
    return found


def _check_tensors(reader: _Reader, count: int, size: int, alignment: Any) -> None:
    if not isinstance(alignment, int) or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise _bad(f"its alignment is {alignment!r}")
    extents: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        name, rank = reader.text(1024), reader.number("I")
        if name in extents or not 1 <= rank <= MAX_RANK:
            raise _bad(f"its tensor {name[:80]!r} is there twice or has rank {rank}")
        shape = [reader.number("Q") for _ in range(rank)]
        kind, offset = reader.number("I"), reader.number("Q")
        if kind not in _BLOCKS:
            raise _bad(f"its tensor {name[:80]!r} has an unknown type {kind}")
        elements, width = _BLOCKS[kind]
        if math.prod(shape) > 2**40 or shape[0] % elements:
            raise _bad(f"its tensor {name[:80]!r} has the shape {shape}")
        extents[name] = (offset, math.prod(shape) // elements * width)
    start = -(-reader.offset // alignment) * alignment
    for name, (offset, length) in extents.items():
        if offset % alignment or start + offset + length > size:
            raise _bad(f"its tensor {name[:80]!r} lies outside the file; it may have been cut off")
    if not extents:
        raise _bad("it has no tensors")


# general.file_type -> its name, of the types that every engine reads as they are. OpenVINO turns four-bit files into
# worse models than llama.cpp does (mean NLL 3.995 against 3.748 for SmolLM2 in Q4_1)
_EXACT = {0: "F32", 1: "F16", 7: "Q8_0", 32: "BF16"}


def exact_type(file_type: Any) -> str | None:
    """The name of a file's type when every engine reads it as it is; None for the smaller types."""
    return _EXACT.get(file_type) if isinstance(file_type, int) else None


def check_exact(file_type: Any) -> None:
    """InvalidInput for the types of which OpenVINO makes worse models than they are."""
    if exact_type(file_type) is None:
        raise InvalidInput(
            "OpenVINO loses quality on GGUF files of fewer than 8 bits (mean NLL 3.995 against 3.748 in llama.cpp for "
            'SmolLM2 in Q4_1); import the model again with convert "q8_0", or choose engine: llama',
            code="unsupported_model",
            param="engine",
        )


def token_bytes(found: dict[str, Any]) -> int:
    """Bytes of one token's keys and values in 16 bits, by the header; 0 when it does not tell."""
    arch = found["general.architecture"]

    def number(name: str, default: int = 0) -> int:
        value = found.get(f"{arch}.{name}", default)
        return value if isinstance(value, int) else default

    heads, width = number("attention.head_count"), number("embedding_length")
    if not heads or not width:
        return 0
    size = number("attention.key_length", width // heads) + number("attention.value_length", width // heads)
    return 2 * number("block_count") * number("attention.head_count_kv", heads) * size


def to_q8_0(path: Path, out: Path, tell: Callable[[float], None] = lambda part: None) -> None:
    """Write the model at `path` with its quantised weights as Q8_0, which every engine reads at the source's quality.

    `tell`: how far it is, from 0 to 1.
    """
    try:
        from gguf import GGMLQuantizationType as Type
        from gguf import GGUFReader, GGUFWriter
        from gguf.quants import dequantize, quantize
    except ImportError:
        raise MissingExtra("converting needs the package gguf; pip install 'modelworks[llm]'") from None
    source = GGUFReader(path)
    writer = GGUFWriter(out, str(source.fields["general.architecture"].contents()), use_temp_file=True)
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = 7 if name == "general.file_type" else field.contents()
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub_type=inner)
    done, total = 0, sum(tensor.n_elements for tensor in source.tensors)
    for tensor in source.tensors:
        tell(done / total)
        done += tensor.n_elements
        data, kind = tensor.data, tensor.tensor_type
        if kind not in (Type.F32, Type.F16, Type.BF16, Type.Q8_0):
            try:
                data, kind = quantize(dequantize(data, kind), Type.Q8_0), Type.Q8_0
            except NotImplementedError:
                raise InvalidInput(f"weights of the type {kind.name} cannot be converted", code="bad_gguf") from None
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bad(why: str) -> InvalidInput:
    return InvalidInput(f"this is not a sound GGUF file: {why}", code="bad_gguf")
