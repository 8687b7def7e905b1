"""The ceiling: a bare HTTP protocol with the graph inline, one process. No keys, limits, counters, errors or isolation.

python bench/peers/prototype.py MODEL.onnx PORT

Requests of one turn of the loop run as one batch. It answers POST bodies like the Open Inference Protocol's, and knows
nothing else: whatever a server does beyond this is what its users get for the difference.
"""

import asyncio
import sys

import httptools
import msgspec
import numpy as np
import onnxruntime
import uvloop


class Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(msgspec.Struct):
    inputs: list[Tensor]


class Output(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list


class Response(msgspec.Struct):
    model_name: str
    outputs: list[Output]


decode = msgspec.json.Decoder(Request).decode
encode = msgspec.json.Encoder().encode


class Model:
    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Connection, bytes]] = []

    def ask(self, connection: "Connection", body: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self._run)
        self._waiting.append((connection, body))

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        rows = np.array([decode(body).inputs[0].data for _, body in waiting], np.float32)
        labels, probabilities = self._session.run(None, {"X": rows})
        for (connection, _), label, row in zip(waiting, labels.tolist(), probabilities.tolist(), strict=True):
            outputs = [Output("label", [1], "INT64", [label]), Output("probabilities", [1, 3], "FP32", row)]
            connection.reply(encode(Response("iris", outputs)))


class Connection(asyncio.Protocol):
    def __init__(self, model: Model) -> None:
        self._model = model

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._model.ask(self, self._body)

    def reply(self, body: bytes) -> None:
        if not self._transport.is_closing():
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            self._transport.write(head % len(body) + body)


async def main(path: str, port: int) -> None:
    model = Model(path)
    await asyncio.get_running_loop().create_server(lambda: Connection(model), "127.0.0.1", port, backlog=1024)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
