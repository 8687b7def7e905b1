"""mosec with the graph: batches of up to 64, one worker.

bench/.venvs/mosec/bin/python bench/peers/mosec_app.py MODEL.onnx --port PORT
"""

import os
import sys

import numpy as np
import onnxruntime
from mosec import Server, Worker

MODEL = os.environ.setdefault("BENCH_MODEL", sys.argv.pop(1) if len(sys.argv) > 1 else "")


class Iris(Worker):
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])

    def forward(self, data):
        rows = np.array([one["inputs"][0]["data"] for one in data], np.float32)
        labels, probabilities = self.session.run(None, {"X": rows})
        return [
            {
                "model_name": "iris",
                "outputs": [
                    {"name": "label", "shape": [1], "datatype": "INT64", "data": [label]},
                    {"name": "probabilities", "shape": [1, 3], "datatype": "FP32", "data": row},
                ],
            }
            for label, row in zip(labels.tolist(), probabilities.tolist(), strict=True)
        ]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Iris, num=1, max_batch_size=64, max_wait_time=1)
    server.run()
