"""What a user of tritonclient does against /v2, in a process without the server. Not a test module.

python -m tests.triton_story HOST:PORT KEY     prints one JSON object of what came back
"""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
import tritonclient.http as client
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

NAMES = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], dtype=np.float32)


def inputs(kind, *, binary=True):
    made = []
    for index, name in enumerate(NAMES):
        tensor = kind.InferInput(name, [2, 1], "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(ROWS[:, index : index + 1]), binary_data=binary)
        made.append(tensor)
    return made


def shown(result) -> dict:
    return {
        "label": [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy("label").tolist()],
        "probabilities": np.round(result.as_numpy("probabilities").astype(float), 4).tolist(),
    }


def refused(call) -> str:
    try:
        call()
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    return "no error"


def blocking(url: str, headers: dict) -> dict:
    # each call gets a dictionary of its own: the client writes into it
    found: dict = {}
    with client.InferenceServerClient(url) as triton:
        found["live"] = [triton.is_server_live(headers), triton.is_server_ready(headers)]
        found["ready"] = [triton.is_model_ready("iris", "1", headers), triton.is_model_ready("iris", "9", headers)]
        found["server"] = triton.get_server_metadata(headers)
        found["model"] = triton.get_model_metadata("iris", headers=dict(headers))
        found["config"] = triton.get_model_config("iris", headers=dict(headers))
        found["index"] = triton.get_model_repository_index(headers=dict(headers))
        triton.load_model("iris", headers=dict(headers))
        found["unload"] = refused(lambda: triton.unload_model("iris", headers=dict(headers)))
        answers = {}
        for name, made in {"binary": inputs(client), "json": inputs(client, binary=False)}.items():
            answers[name] = shown(triton.infer("iris", made, headers=dict(headers)))
        for algorithm in ("gzip", "deflate"):
            answers[algorithm] = shown(
                triton.infer("iris", inputs(client), headers=dict(headers), request_compression_algorithm=algorithm)
            )
        for binary in (True, False):
            outputs = [client.InferRequestedOutput(name, binary_data=binary) for name in ("label", "probabilities")]
            answers[f"outputs {binary}"] = shown(
                triton.infer("iris", inputs(client), outputs=outputs, request_id="7", headers=dict(headers))
            )
        pending = triton.async_infer("iris", inputs(client), model_version="1", headers=dict(headers))
        answers["async"] = shown(pending.get_result())
        found["answers"] = answers
        found["unknown"] = refused(lambda: triton.infer("none", inputs(client), headers=dict(headers)))
        found["few"] = refused(lambda: triton.infer("iris", inputs(client)[:3], headers=dict(headers)))
        found["keyless"] = refused(lambda: triton.infer("iris", inputs(client)))
        found["stats"] = triton.get_inference_statistics("iris", headers=dict(headers))
    return found


async def concurrent(url: str, headers: dict) -> list[dict]:
    async with aio.InferenceServerClient(url) as triton:
        results = await asyncio.gather(*(triton.infer("iris", inputs(aio), headers=dict(headers)) for _ in range(8)))
        return [shown(result) for result in results]


def main() -> None:
    url, key = sys.argv[1:]
    headers = {"authorization": f"Bearer {key}"}
    found = blocking(url, headers)
    found["concurrent"] = asyncio.run(concurrent(url, headers))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
