"""POST /v1/embeddings and /v1/rerank: texts to vectors, and documents in the order of their relevance."""

from __future__ import annotations

import base64
import math
import os
import struct
from array import array
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from modelworks.api.allowance import Allowance
from modelworks.api.body import decode_json
from modelworks.api.calls import infer
from modelworks.api.openai import schemas
from modelworks.api.openai.generation import read_body, read_flag, read_number, task_route
from modelworks.api.routes import Routes, Use, Who, answer
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.generation import check_tokens
from modelworks.core.tensors import Tensor, pack_bytes
from modelworks.core.types import Call, Caller
from modelworks.serve.routes import Route

routes = Routes("OpenAI", "openai")

EMBEDDING, RERANK = "embedding", "rerank"
MAX_INPUTS = 2048
SECONDS = 120.0
Vector = Sequence[float]


@routes.post(
    "/v1/embeddings",
    "openai.embeddings",
    "Create embeddings",
    answer=schemas.EMBEDDINGS,
    errors=(404, 504),
    body="infer",
    request_body=schemas.EMBEDDING_REQUEST,
)
async def create_embeddings(request: Request, services: Use, caller: Who) -> Response:
    """One vector a text or list of token ids, as numbers or in base64."""
    body, model = read_body(await request.body(), decode_json)
    route = task_route(services, caller, model, (EMBEDDING,), "embed")
    inputs = read_inputs(body.get("input"))
    size = route.signature.outputs[0].shape[-1]
    dimensions = read_number(body, "dimensions", 1, size if size > 0 else 2**20, 0)
    format = body.get("encoding_format") or "float"
    if format not in ("float", "base64"):
        raise InvalidInput("encoding_format must be float or base64", param="encoding_format")
    vectors, tokens = await embed(request, services, caller, route, inputs)
    if dimensions:
        vectors = [unit(vector[:dimensions]) for vector in vectors]
    write = list if format == "float" else _base64
    data = [{"object": "embedding", "index": at, "embedding": write(vector)} for at, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return answer({"object": "list", "data": data, "model": model, "usage": usage})


@routes.post(
    "/v1/rerank",
    "openai.rerank",
    "Rank documents by their relevance to a query",
    answer=schemas.RERANKED,
    errors=(404, 504),
    body="infer",
    request_body=schemas.RERANK_REQUEST,
)
async def rerank(request: Request, services: Use, caller: Who) -> Response:
    """In the shape that Cohere and Jina share. By a rerank model, or by the cosine of an embedding model's vectors."""
    body, model = read_body(await request.body(), decode_json)
    route = task_route(services, caller, model, (RERANK, EMBEDDING), "rank")
    query, documents = body.get("query"), _documents(body.get("documents"))
    if not isinstance(query, str) or not query.strip():
        raise InvalidInput("query must be a text", param="query")
    top = read_number(body, "top_n", 1, 2**31 - 1, len(documents))
    show = read_flag(body, "return_documents")
    if route.task == RERANK:
        scores, tokens = await _scores(request, services, caller, route, query, documents)
    else:
        vectors, tokens = await embed(request, services, caller, route, [query, *documents])
        first = unit(vectors[0])
        scores = [min(1.0, max(0.0, dot(first, unit(vector)))) for vector in vectors[1:]]
    results: list[dict[str, Any]] = []
    for index in sorted(range(len(scores)), key=lambda index: -scores[index])[:top]:
        shown = {"document": {"text": documents[index]}} if show else {}
        results.append({"index": index, "relevance_score": scores[index], **shown})
    return answer(
        {
            "id": f"rerank-{os.urandom(8).hex()}",
            "object": "list",
            "model": model,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": {"tokens": {"input_tokens": tokens}},
        }
    )


async def embed(
    request: Request, services: Services, caller: Caller, route: Route, inputs: list[str] | list[list[int]]
) -> tuple[list[Vector], int]:
    """The vectors, and how many tokens the model read."""
    rows = len(inputs)
    texts = ["" if isinstance(one, list) else one for one in inputs]
    tensors = [Tensor("text", "BYTES", [rows], pack_bytes(texts))]
    if isinstance(inputs[0], list):
        longest = max(map(len, inputs))
        ids = array("i")
        for one in inputs:
            ids.extend([*one, *[-1] * (longest - len(one))])
        tensors.append(Tensor("token_ids", "INT32", [rows, longest], ids.tobytes()))
    found, tokens = await _run(request, services, caller, route, tensors, "input")
    size = len(found) // (4 * rows)
    return [memoryview(found)[at * 4 * size : (at + 1) * 4 * size].cast("f") for at in range(rows)], tokens


async def _scores(
    request: Request, services: Services, caller: Caller, route: Route, query: str, documents: list[str]
) -> tuple[list[float], int]:
    rows = len(documents)
    tensors = [
        Tensor("query", "BYTES", [rows], pack_bytes([query] * rows)),
        Tensor("document", "BYTES", [rows], pack_bytes(documents)),
    ]
    found, tokens = await _run(request, services, caller, route, tensors, "documents")
    return list(struct.unpack(f"<{rows}f", found)), tokens


async def _run(
    request: Request, services: Services, caller: Caller, route: Route, inputs: list[Tensor], param: str
) -> tuple[bytes, int]:
    """The first output's bytes, and the sum of the second, the rows' tokens."""
    call = Call(route.name, inputs, services.gateway.deadline(SECONDS), caller.request_id, counted=True)
    allowance = Allowance(services, caller, request)
    allowance.take(inputs)
    tokens = 0
    try:
        found = await infer(request, services, caller, call)
        outputs = {tensor.name: tensor for tensor in found.outputs}
        tokens = sum(array("i", outputs["tokens"].data)) if "tokens" in outputs else 0
    except ModelworksError as error:
        if error.param in ("text", "token_ids", "document", "query"):  # the model's names, not this API's
            error.param = param
        raise
    finally:
        allowance.settle(tokens)
    services.gateway.observer.tokens(route.key, caller.principal.key_id, tokens, 0)
    return found.outputs[0].data, tokens


def read_inputs(given: Any) -> list[str] | list[list[int]]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list) and given:
        if len(given) > MAX_INPUTS and not isinstance(given[0], int):
            raise InvalidInput(f"input has {len(given)} texts; at most {MAX_INPUTS} are taken", param="input")
        if all(isinstance(one, str) for one in given):
            for index, one in enumerate(given):
                if not one:
                    raise InvalidInput(f"input[{index}] is empty", param=f"input[{index}]")
            return given
        if all(isinstance(one, list) for one in given):
            return [_tokens(one) for one in given]
        if all(isinstance(one, int) for one in given):
            return [_tokens(given)]
    raise InvalidInput("input must be a text, a list of texts, a list of token ids, or a list of such", param="input")


def _tokens(ids: list[Any]) -> list[int]:
    try:
        return check_tokens(ids)
    except InvalidInput as error:
        raise InvalidInput(error.message.replace("prompt", "input"), param="input") from None


def _documents(given: Any) -> list[str]:
    if not isinstance(given, list) or not given:
        raise InvalidInput("documents must be a list of texts", param="documents")
    if len(given) > MAX_INPUTS:
        raise InvalidInput(f"{len(given)} documents; at most {MAX_INPUTS} are taken", param="documents")
    texts: list[str] = []
    for index, one in enumerate(given):
        text = one.get("text") if isinstance(one, dict) else one
        if not isinstance(text, str) or not text:
            raise InvalidInput(f'documents[{index}] must be a text, or {{"text": ...}}', param=f"documents[{index}]")
        texts.append(text)
    return texts


def dot(one: Vector, other: Vector) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def unit(vector: Vector) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def _base64(vector: Vector) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
