"""Call any method of a Modelworks server over gRPC with JSON, by server reflection: no .proto file, no generated code.

    pip install grpcio grpcio-reflection
    export MODELWORKS_API_KEY=mw_...
    python grpc_call.py localhost:8001                                           # the services and their methods
    python grpc_call.py localhost:8001 modelworks.v1.Datasets/Upload '{"header": {"name": "iris"}}' --file iris.csv
    python grpc_call.py localhost:8001 modelworks.v1.Training/FollowEvents '{"id": "job_..."}'

Each answer is one line of JSON. A refused call prints its status, its text and its details, and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2

REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
CHUNK = 64 * 1024


class Server:
    def __init__(self, address: str, key: str, ca: Path | None) -> None:
        secure = grpc.ssl_channel_credentials(ca.read_bytes()) if ca else None
        self.channel = grpc.secure_channel(address, secure) if secure else grpc.insecure_channel(address)
        self.metadata = (("authorization", f"Bearer {key}"),)
        self.pool = descriptor_pool.DescriptorPool()

    def _ask(self, **question: str) -> Any:
        request = reflection_pb2.ServerReflectionRequest(**question)
        call = self.channel.stream_stream(REFLECTION)
        answers = call(iter([request.SerializeToString()]), metadata=self.metadata, timeout=10)
        return reflection_pb2.ServerReflectionResponse.FromString(next(answers))

    def services(self) -> list[str]:
        return [item.name for item in self._ask(list_services="").list_services_response.service]

    def service(self, name: str) -> Any:
        answer = self._ask(file_containing_symbol=name)
        if answer.HasField("error_response"):
            raise SystemExit(f"{name}: {answer.error_response.error_message}")
        files = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in
                 answer.file_descriptor_response.file_descriptor_proto]  # fmt: skip
        have: set[str] = set()
        while files:  # those first whose imports are there
            ready = [file for file in files if have.issuperset(file.dependency)]
            if not ready:
                wanted = sorted({name for file in files for name in file.dependency} - have - {f.name for f in files})
                more = self._ask(file_by_filename=wanted[0]).file_descriptor_response.file_descriptor_proto
                files += [descriptor_pb2.FileDescriptorProto.FromString(data) for data in more]
                continue
            for file in ready:
                if file.name not in have:
                    self.pool.Add(file)
                    have.add(file.name)
            files = [file for file in files if file.name not in have]
        return self.pool.FindServiceByName(name)

    def call(self, path: str, body: dict[str, Any], file: Path | None) -> Iterator[dict[str, Any]]:
        service, _, name = path.partition("/")
        method = self.service(service).FindMethodByName(name)
        request, answer = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))

        def messages() -> Iterator[bytes]:
            yield json_format.ParseDict(body, request()).SerializeToString()
            if file is not None:
                with file.open("rb") as source:
                    while chunk := source.read(CHUNK):
                        yield request(chunk=chunk).SerializeToString()

        # on the wire all four shapes are the same: messages there, messages back
        for data in self.channel.stream_stream(f"/{path}")(messages(), metadata=self.metadata):
            yield json_format.MessageToDict(answer.FromString(data), preserving_proto_field_name=True)


def refusal(server: Server, error: Any) -> str:
    """Status and text; then the error's code and the fields that it names."""
    lines = [f"{error.code().name}: {error.details()}"]
    for name, value in error.trailing_metadata() or ():
        if name in ("x-error-code", "x-request-id", "retry-after"):
            lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT of the gRPC door")
    parser.add_argument("method", nargs="?", help="package.Service/Method; without: what there is")
    parser.add_argument("body", nargs="?", default="{}", help="the request as JSON")
    parser.add_argument("--file", type=Path, help="sent behind the first message, in chunks (Datasets/Upload)")
    parser.add_argument("--ca", type=Path, help="PEM certificates to trust: speak TLS")
    options = parser.parse_args()
    server = Server(options.address, os.environ.get("MODELWORKS_API_KEY", ""), options.ca)
    try:
        if options.method:
            for answer in server.call(options.method, json.loads(options.body), options.file):
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            return 0
        for name in server.services():
            for method in server.service(name).methods if name.startswith(("inference.", "modelworks.")) else ():
                print(f"{name}/{method.name}")
    except grpc.RpcError as error:
        print(refusal(server, error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
