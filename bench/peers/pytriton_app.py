"""PyTriton (Triton with its Python backend) with the graph: dynamic batches of up to 64, one instance.

bench/.venvs/pytriton/bin/python bench/peers/pytriton_app.py MODEL.onnx PORT
"""

import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

if __name__ == "__main__":
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    @batch
    def infer(X):
        labels, probabilities = session.run(None, {"X": X})
        return {"label": labels.reshape(-1, 1), "probabilities": probabilities}

    port = int(sys.argv[2])
    config = TritonConfig(http_port=port, http_address="127.0.0.1", allow_grpc=False, allow_metrics=False, log_verbose=0)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="iris",
            infer_func=infer,
            inputs=[Tensor(name="X", dtype=np.float32, shape=(4,))],
            outputs=[
                Tensor(name="label", dtype=np.int64, shape=(1,)),
                Tensor(name="probabilities", dtype=np.float32, shape=(3,)),
            ],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()
