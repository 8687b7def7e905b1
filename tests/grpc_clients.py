"""Independent clients against a running server, each in a process of its own. Prints `ok CLIENT`.

python tests/grpc_clients.py triton|triton-aio|kserve PORT KEY MODEL [URL]
"""

from __future__ import annotations

import asyncio
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], dtype=np.float32)
EXPECTED = ["setosa", "virginica"]


def triton(port: str, key: str, model: str) -> None:
    import tritonclient.grpc as client
    from tritonclient.utils import InferenceServerException

    headers = {"authorization": f"Bearer {key}"}
    server = client.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        server.is_server_ready()
        status = "ok"
    except InferenceServerException as error:
        status = str(error.status())
    assert "UNAUTHENTICATED" in status
    assert server.is_server_live(headers=headers)
    assert server.is_server_ready(headers=headers)
    assert server.is_model_ready(model, headers=headers)
    assert server.get_server_metadata(headers=headers).name == "modelworks"
    names = [item.name for item in server.get_model_metadata(model, headers=headers).inputs]
    assert len(server.get_model_config(model, headers=headers).config.input) == 4
    assert [item.state for item in server.get_model_repository_index(headers=headers).models if item.name == model] == [
        "READY"
    ]
    server.load_model(model, headers=headers)
    for call, word in ((server.unload_model, "UNIMPLEMENTED"), (server.load_model, "NOT_FOUND")):
        try:
            call(model if word == "UNIMPLEMENTED" else "nothing", headers=headers)
            status = "ok"
        except InferenceServerException as error:
            status = str(error.status())
        assert word in status
    found = server.infer(model, _inputs(client, names), headers=headers, request_id="42")
    statistics = server.get_inference_statistics(model, headers=headers).model_stats[0]
    assert (statistics.name, statistics.version) == (model, "1")
    assert statistics.inference_stats.success.count >= 0
    assert found.get_response().id == "42"
    _check(found)
    _check(server.infer(model, _inputs(client, names), headers=headers, compression_algorithm="gzip"))
    only = server.infer(model, _inputs(client, names), outputs=[client.InferRequestedOutput("label")], headers=headers)
    assert only.as_numpy("probabilities") is None
    arrived: queue.Queue[Any] = queue.Queue()
    server.async_infer(
        model, _inputs(client, names), lambda result, error: arrived.put((result, error)), headers=headers
    )
    result, error = arrived.get(timeout=10)
    assert error is None
    _check(result)
    server.start_stream(lambda result, error: arrived.put((result, error)), headers=headers)
    for number in range(20):
        server.async_stream_infer(model, _inputs(client, names), request_id=str(number))
    for number in range(20):
        result, error = arrived.get(timeout=10)
        assert error is None
        assert result.get_response().id == str(number)
        _check(result)
    server.stop_stream()
    try:
        server.infer("nothing", _inputs(client, names), headers=headers)
        status = "ok"
    except InferenceServerException as error:
        status = str(error.status())
    assert "NOT_FOUND" in status
    server.close()


def triton_aio(port: str, key: str, model: str) -> None:
    import tritonclient.grpc as forms
    import tritonclient.grpc.aio as client

    headers = {"authorization": f"Bearer {key}"}

    async def run() -> None:
        server = client.InferenceServerClient(f"127.0.0.1:{port}")
        names = [item.name for item in (await server.get_model_metadata(model, headers=headers)).inputs]
        found = await asyncio.gather(*(server.infer(model, _inputs(forms, names), headers=headers) for _ in range(64)))
        for result in found:
            _check(result)

        async def requests() -> Any:
            for number in range(10):
                yield {"model_name": model, "inputs": _inputs(forms, names), "request_id": str(number)}

        seen = 0
        async for result, error in server.stream_infer(requests(), headers=headers):
            assert error is None
            _check(result)
            seen += 1
        assert seen == 10
        await server.close()

    asyncio.run(run())


def kserve(port: str, key: str, model: str, url: str = "") -> None:
    """With `url` also over HTTP, and all datatypes it has against `every-but-bf16` (tests/every_datatype.py)."""
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

    headers = {"authorization": f"Bearer {key}"}

    def request(name: str, values: dict[str, Any], binary: Any) -> Any:
        inputs = []
        for column, value in values.items():
            item = InferInput(name=column, shape=list(value.shape), datatype=column if name != model else "FP32")
            item.set_data_from_numpy(value, binary_data=binary(column))
            inputs.append(item)
        wanted = {"binary_data_output": True} if name != model else None
        return InferRequest(model_name=name, infer_inputs=inputs, parameters=wanted)

    def labels(found: Any) -> list[str]:
        raw = next(output for output in found.outputs if output.name == "label").as_numpy().ravel().tolist()
        return [label.decode() if isinstance(label, bytes) else label for label in raw]

    async def run() -> None:
        names = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
        rows = {name: ROWS[:, column : column + 1] for column, name in enumerate(names)}
        server, metadata = InferenceGRPCClient(f"127.0.0.1:{port}"), tuple(headers.items())
        assert await server.is_server_live(headers=metadata)
        assert await server.is_server_ready(headers=metadata)
        assert await server.is_model_ready(model, headers=metadata)
        for raw in (True, False):
            found = await server.infer(request(model, rows, lambda _, raw=raw: raw), headers=metadata)
            assert labels(found) == EXPECTED
        if not url:
            return
        rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        assert await rest.is_server_live(url, headers=headers)
        assert await rest.is_server_ready(url, headers=headers)
        assert await rest.is_model_ready(url, model, headers=headers)
        for raw in (True, False):
            found = await rest.infer(url, request(model, rows, lambda _, raw=raw: raw), model, headers=dict(headers))
            assert labels(found) == EXPECTED
        sys.path.insert(0, str(Path(__file__).parent))
        import every_datatype

        values = every_datatype.values()
        del values["BF16"]  # kserve has none
        ways = {"binary": lambda name: True, "JSON": lambda name: name == "FP16"}
        for way, binary in ways.items():
            for carrier in ("grpc", "http"):
                asked = request("every-but-bf16", values, binary)
                if carrier == "grpc" and way == "JSON":
                    continue  # one request has raw or typed contents, not both; FP16 has no typed ones
                found = (
                    await server.infer(asked, headers=metadata)
                    if carrier == "grpc"
                    else await rest.infer(url, asked, "every-but-bf16", headers=dict(headers))
                )
                back = {output.name: output.as_numpy() for output in found.outputs}
                wrong = [name for name in every_datatype.differing(back) if name != "BF16"]
                print(carrier, way, "differing:", wrong)
        await server.close()
        await rest.close()

    asyncio.run(run())


def _inputs(client: Any, names: list[str]) -> list[Any]:
    inputs = []
    for column, name in enumerate(names):
        item = client.InferInput(name, [2, 1], "FP32")
        item.set_data_from_numpy(ROWS[:, column : column + 1])
        inputs.append(item)
    return inputs


def _check(result: Any) -> None:
    assert [label.decode() for label in result.as_numpy("label")] == EXPECTED
    assert np.allclose(result.as_numpy("probabilities").sum(axis=1), 1)


if __name__ == "__main__":
    {"triton": triton, "triton-aio": triton_aio, "kserve": kserve}[sys.argv[1]](*sys.argv[2:6])
    print("ok", sys.argv[1])
