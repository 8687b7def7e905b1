"""The peer: a bare grpcio aio handler with the model inline, as a team writes it by hand from the protocol's .proto.

python -m bench.grpc_peer MODEL.onnx PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import numpy as np
import onnxruntime
import uvloop

from modelworks.api.grpc.messages import message


async def serve() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    Request, Response = message("inference.ModelInferRequest"), message("inference.ModelInferResponse")

    async def infer(request: Any, context: Any) -> Any:
        feed = {
            given.name: np.frombuffer(raw, np.float32).reshape(given.shape)
            for given, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = Response(model_name=request.model_name, model_version="1", id=request.id)
        for name, found in zip(names, session.run(names, feed), strict=True):
            text = found.dtype.kind in "OUS"
            response.outputs.add(name=name, datatype="BYTES" if text else "FP32", shape=found.shape)
            raw = (
                b"".join(len(item).to_bytes(4, "little") + item.encode() for item in found.ravel())
                if text
                else found.tobytes()
            )
            response.raw_output_contents.append(raw)
        return response

    handler = grpc.unary_unary_rpc_method_handler(infer, Request.FromString, Response.SerializeToString)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler}),)
    )
    server.add_insecure_port(f"127.0.0.1:{sys.argv[2]}")
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())
