"""The peer: the same ONNX graph called inline by a FastAPI route on uvicorn, as a team writes it by hand.

python -m bench.inline_peer MODEL.onnx PORT
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Body(BaseModel):
    inputs: list[dict[str, float]]


def main() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    outputs = [item.name for item in session.get_outputs()]

    @app.post("/predict")
    async def predict(body: Body) -> dict[str, object]:
        feed = {name: np.array([[row[name]] for row in body.inputs], dtype=np.float32) for name in names}
        found = dict(zip(outputs, session.run(outputs, feed), strict=True))
        labels = [label.decode() if isinstance(label, bytes) else str(label) for label in found["label"].ravel()]
        rows = zip(labels, found["probabilities"].tolist(), strict=True)
        return {"outputs": [{"label": label, "probabilities": row} for label, row in rows]}

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), loop="uvloop", http="httptools", access_log=False,
                log_level="warning")  # fmt: skip


if __name__ == "__main__":
    main()
