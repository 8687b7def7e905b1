"""POST /api/v1/deployments/{name}/predict: named raw features in, labels and probabilities or values out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from modelworks.api import schemas
from modelworks.api.body import decode_json
from modelworks.api.calls import JSON_HEADERS, Prepared, Read, Reply, respond
from modelworks.api.parts import parts
from modelworks.api.routes import NamePath, Routes, Use, Who
from modelworks.api.texts import PARAMETERS, parameters, text_input, text_output
from modelworks.core.errors import InvalidInput
from modelworks.core.tasks import GENERATION
from modelworks.core.types import Answer, Call, Principal
from modelworks.serve.columns import Answers, Kind, kind_of
from modelworks.serve.features import MAX_ROWS, decode_outputs, encode_rows
from modelworks.serve.gateway import Gateway
from modelworks.serve.routes import Route

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
                    "description": "one object a row: every raw feature by its name; null is a missing value. An image "
                    "or a sound is its file in base64",
                    "items": {"type": "object"},
                },
                "parameters": PARAMETERS,
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
    },
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "description": "one row: each image or sound as a file, named as the feature",
            "properties": {"inputs": {"type": "string", "description": "JSON object of the other features, if any"}},
            "additionalProperties": {"type": "string", "contentMediaType": "application/octet-stream"},
        },
        "example": {"image": "the file's bytes"},
    },
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
    parameters: dict[str, Any] | None = None


@routes.post(
    "/api/v1/deployments/{name}/predict",
    "deployments.predict",
    "Predict",
    answer=ANSWER,
    errors=(504,),
    body="infer",
    request_body=REQUEST,
    multipart=True,
)
async def predict(request: Request, services: Use, caller: Who, name: NamePath) -> Response:
    """Answer `inputs`, one or many at once. A missing, unknown or mistyped feature is 400 and named in `param`.

    A forecaster takes `{"history": [...]}` with the newest value last, or `{}` to go on from the end of its training, of many
    series with the name of one beside it (`series`), and answers `forecast`, `low` and `high`. A model of images or sounds also
    takes one row as a form: each file in a part that is named as its feature. A language model takes one row with `messages`,
    `prompt` or `tokens`, and `parameters`; it answers `text`, `finish_reason` and `usage`.
    """
    media = request.headers.get("content-type", "")
    data = await request.body()
    form = media.lower().startswith("multipart/form-data")
    body = PredictBody([form_row(media, data)]) if form else decode_predict(data)
    prepared = prepare_body(services.gateway, caller.principal, name, body, caller.request_id)
    return await respond(request, services, caller, prepared)


def prepare(gateway: Gateway, principal: Principal, name: str, data: bytes, request_id: str) -> Prepared:
    """The call that the JSON body `data` asks for."""
    return prepare_body(gateway, principal, name, decode_predict(data), request_id)


def prepare_body(gateway: Gateway, principal: Principal, name: str, body: PredictBody, request_id: str) -> Prepared:
    """The call for rows of features; both lanes go through this. InvalidInput names the feature or parameter."""
    route = gateway.route(principal, name)
    params = parameters(route, body.parameters, strict=True)
    tensors = text_input(body.inputs) if route.task == GENERATION else encode_rows(route, body.inputs)
    call = Call(name, tensors, gateway.deadline_of(route), request_id, params)
    return Prepared(call, lambda found: _reply(route, found, request_id))


def _reply(route: Route, found: Answer, request_id: str) -> Reply:
    rows = text_output(found) if route.task == GENERATION else decode_outputs(route, found)
    return Reply(JSON_HEADERS, _encode({"outputs": rows, "model": found.model_version, "request_id": request_id}))


class Numbers:
    """Reads requests for models of numbers and booleans and writes their answers, many at once (express.py)."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._kind: Kind | None = None

    def read(self, data: bytes) -> Read | None:
        """None: it is not for this."""
        if not self.route.row_fixed:
            return None
        try:
            body = decode_predict(data)
            if body.parameters:
                return None
            tensors = encode_rows(self.route, body.inputs)
        except InvalidInput:
            return None
        kind = self._kind
        if kind is None:
            kind = self._kind = kind_of(tensors)
        return kind, tensors[0].shape[0], b"".join([tensor.data for tensor in tensors]), None

    def reply(self, answer: Answer, request_id: str, id: str | None) -> Reply:
        """One answer that comes alone."""
        return _reply(self.route, answer, request_id)

    def write(self, answers: Answers, request_ids: Sequence[str], ids: Sequence[str | None]) -> list[bytes]:
        """The body of each answer, as `prepare_body` makes it."""
        rows = decode_outputs(self.route, Answer(answers.whole(), answers.version))
        bodies = []
        at = 0
        for count, request_id in zip(answers.rows, request_ids, strict=True):
            bodies.append(
                _encode({"outputs": rows[at : at + count], "model": answers.version, "request_id": request_id})
            )
            at += count
        return bodies


def form_row(media: str, data: bytes) -> dict[str, Any]:
    """One row from a form: files by the features' names, and other features in the JSON part `inputs`."""
    row: dict[str, Any] = {}
    for name, is_file, content in parts(media, data):
        if name == "inputs" and not is_file:
            more = decode_json(content)
            more = more[0] if isinstance(more, list) and len(more) == 1 else more
            if not isinstance(more, dict):
                raise InvalidInput(
                    "the part `inputs` must be a JSON object of features", code="bad_inputs", param="inputs"
                )
            row |= more
        elif name in row:
            raise InvalidInput(f"the feature {name[:100]!r} is there twice", code="bad_form", param=name[:100])
        else:
            row[name] = content if is_file else content.decode(errors="replace")
    return row


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
