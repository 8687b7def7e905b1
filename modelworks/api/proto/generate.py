"""Make descriptors.bin anew after a change of a .proto file: `make proto`, or

    pip install grpcio-tools
    python -m modelworks.api.proto.generate

The server compiles nothing: it reads these descriptors into a pool of its own, as tritonclient and kserve bring another
file of the package `inference`, which one pool cannot hold beside ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = ("inference.proto", "errors.proto", "modelworks.proto")


def main() -> int:
    try:
        from grpc_tools import protoc
    except ImportError:
        print("pip install grpcio-tools", file=sys.stderr)
        return 1
    bundled = Path(protoc.__file__).parent / "_proto"
    arguments = [
        f"-I{FOLDER}",
        f"-I{bundled}",
        "--include_imports",
        f"--descriptor_set_out={FOLDER / 'descriptors.bin'}",
    ]
    return int(protoc.main(["protoc", *arguments, *FILES]))


if __name__ == "__main__":
    sys.exit(main())
