"""What a user of tritonclient does against /v2, in a process without the server. Not a test module.

python -m tests.triton_story HOST:PORT KEY GRPC_PORT     prints one JSON object of what came back
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as client
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

from tests.every_datatype import DATATYPES, differing, values

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


def every(kind, *, binary: bool | None = True, but: tuple[str, ...] = ()):
    """One input of every datatype; `binary` None: there is no such choice (gRPC)."""
    made = []
    for name, value in values().items():
        if name not in but:
            tensor = kind.InferInput(name, list(value.shape), name)
            tensor.set_data_from_numpy(value, **({} if binary is None else {"binary_data": binary}))
            made.append(tensor)
    return made


def back(result) -> list[str]:
    """The datatypes that did not come back as they went."""
    return differing({f"{name} back": result.as_numpy(f"{name} back") for name in DATATYPES})


def all_datatypes(url: str, address: str, headers: dict) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with client.InferenceServerClient(url) as triton:
        for sent in (None, "gzip", "deflate"):
            result = triton.infer(
                "every",
                every(client),
                headers=dict(headers),
                request_compression_algorithm=sent,
                response_compression_algorithm=sent,
            )
            found[f"http {sent}"] = back(result)
        # JSON for all that has such a form
        whole = every(client)
        halves = [tensor for tensor in whole if tensor.name() in ("FP16", "BF16")]
        mixed = [*every(client, binary=False, but=("FP16", "BF16")), *halves]
        outputs = [
            client.InferRequestedOutput(f"{name} back", binary_data=name in ("FP16", "BF16")) for name in DATATYPES
        ]
        found["http JSON"] = back(triton.infer("every", mixed, outputs=outputs, headers=dict(headers)))
    with grpc_client.InferenceServerClient(address) as triton:
        found["grpc"] = back(triton.infer("every", every(grpc_client, binary=None), headers=headers))
        arrived: queue.Queue = queue.Queue()
        triton.start_stream(lambda result, error: arrived.put((result, error)), headers=headers)
        triton.async_stream_infer("every", every(grpc_client, binary=None))
        result, error = arrived.get(timeout=20)
        found["grpc stream"] = [str(error)] if error else back(result)
        triton.stop_stream()

    async def aio_calls() -> None:
        async with aio.InferenceServerClient(url) as triton:
            found["http aio"] = back(await triton.infer("every", every(aio), headers=dict(headers)))
        async with grpc_aio.InferenceServerClient(address) as triton:
            result = await triton.infer("every", every(grpc_client, binary=None), headers=headers)
            found["grpc aio"] = back(result)

    asyncio.run(aio_calls())
    return found


def main() -> None:
    url, key, grpc_port = sys.argv[1:]
    headers = {"authorization": f"Bearer {key}"}
    found = blocking(url, headers)
    found["datatypes"] = all_datatypes(url, f"127.0.0.1:{grpc_port}", headers)
    found["concurrent"] = asyncio.run(concurrent(url, headers))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
