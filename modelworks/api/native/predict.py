"""POST /api/v1/deployments/{name}/predict: named raw features in, labels and probabilities or values out."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.body import decode_json
from modelworks.api.calls import JSON_TYPE, Prepared, Reply, respond
from modelworks.api.routes import NamePath, Routes, Use, Who
from modelworks.core.errors import InvalidInput
from modelworks.core.types import Answer, Call, Principal
from modelworks.serve.features import MAX_ROWS, decode_outputs, encode_rows
from modelworks.serve.gateway import Gateway

routes = Routes("Deployments")
_encode = msgspec.json.Encoder(enc_hook=str).encode

REQUEST: dict[str, Any] = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["inputs"],
            "additionalProperties": False,
            "properties": {
                "inputs": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_ROWS,
                    "description": "one object a row: every raw feature by its name; null is a missing value",
                    "items": {"type": "object"},
                }
            },
        },
        "example": {
            "inputs": [
                {
                    "sepal length (cm)": 5.1,
                    "sepal width (cm)": 3.5,
                    "petal length (cm)": 1.4,
                    "petal width (cm)": 0.2,
                }
            ]
        },
    }
}
ANSWER = schemas.plain(
    {
        "type": "object",
        "required": ["outputs", "model", "request_id"],
        "properties": {
            "outputs": {
                "type": "array",
                "items": {"type": "object"},
                "description": "one object a row, in their order",
            },
            "model": {"type": "string", "description": "the model version that answered"},
            "request_id": {"type": "string"},
        },
    },
    {
        "outputs": [{"label": "setosa", "probabilities": {"setosa": 0.98, "versicolor": 0.02, "virginica": 0.0}}],
        "model": "iris:1",
        "request_id": "req_5f3a9c0d1e2f4a6b",
    },
)


class PredictBody(msgspec.Struct, forbid_unknown_fields=True):
    """What a prediction's body holds. The rows are checked against the model's signature afterwards."""

    inputs: list[Any]


@routes.post(
    "/api/v1/deployments/{name}/predict",
    "deployments.predict",
    "Predict",
    answer=ANSWER,
    errors=(504,),
    body="infer",
    request_body=REQUEST,
)
async def predict(request: Request, services: Use, caller: Who, name: NamePath) -> Response:
    """Answer `inputs`, one or many at once. A missing, unknown or mistyped feature is 400 and named in `param`."""
    prepared = prepare(services.gateway, caller.principal, name, await request.body(), caller.request_id)
    return await respond(request, services, caller, prepared)


def prepare(gateway: Gateway, principal: Principal, name: str, data: bytes, request_id: str) -> Prepared:
    """The call that the body `data` asks for; both lanes go through this. InvalidInput names the feature."""
    route = gateway.route(principal, name)
    call = Call(name, encode_rows(route, decode_predict(data).inputs), gateway.deadline(), request_id)

    def reply(found: Answer) -> Reply:
        rows = decode_outputs(route, found)
        return Reply((JSON_TYPE,), _encode({"outputs": rows, "model": found.model_version, "request_id": request_id}))

    return Prepared(call, reply)


def decode_predict(data: bytes) -> PredictBody:
    body: PredictBody = decode_json(data, PredictBody)
    if not body.inputs:
        raise InvalidInput("`inputs` must have at least one row", code="bad_inputs", param="inputs")
    if len(body.inputs) > MAX_ROWS:
        raise InvalidInput(
            f"`inputs` has {len(body.inputs)} rows; send at most {MAX_ROWS} at once",
            code="too_many_rows",
            param="inputs",
        )
    return body
