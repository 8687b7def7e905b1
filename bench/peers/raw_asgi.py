"""A bare ASGI application on uvicorn with the graph inline: the least that a team writes by hand.

python bench/peers/raw_asgi.py MODEL.onnx PORT
"""

import sys

import msgspec
import numpy as np
import onnxruntime
import uvicorn
from prototype import Output, Response, decode

encode = msgspec.json.Encoder().encode


def main(path: str, port: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def app(scope, receive, send) -> None:
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        row = np.array([decode(body).inputs[0].data], np.float32)
        labels, probabilities = session.run(None, {"X": row})
        label = Output("label", [1], "INT64", labels.tolist())
        answer = encode(Response("iris", [label, Output("probabilities", [1, 3], "FP32", probabilities[0].tolist())]))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False,
                log_level="warning", lifespan="off")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
