"""LitServe with the graph: batches of up to 64, one worker.

bench/.venvs/litserve/bin/python bench/peers/litserve_app.py MODEL.onnx PORT
"""

import sys

import litserve
import numpy as np
import onnxruntime


class Iris(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        return np.array(request["inputs"][0]["data"], np.float32)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, rows):
        return self.session.run(None, {"X": rows})

    def unbatch(self, output):
        return list(zip(output[0].tolist(), output[1].tolist(), strict=True))

    def encode_response(self, output):
        label, row = output
        outputs = [
            {"name": "label", "shape": [1], "datatype": "INT64", "data": [label]},
            {"name": "probabilities", "shape": [1, 3], "datatype": "FP32", "data": row},
        ]
        return {"model_name": "iris", "outputs": outputs}


if __name__ == "__main__":
    api = Iris(max_batch_size=64, batch_timeout=0.0005, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
