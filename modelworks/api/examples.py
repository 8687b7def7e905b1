"""What an operation's errors look like, for the specification: by operation, else by the kind of route."""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    """An error as it is answered: its code, its sentence, and the field at fault."""

    code: str
    sentence: str
    param: str | None = None


# any operation
_USUAL: dict[int, Example] = {
    400: Example("invalid_input", "there is no query parameter 'size'; known here: limit, after", "size"),
    401: Example("unauthenticated", "send a valid API key as Authorization: Bearer KEY"),
    403: Example("forbidden", "this key may not do that; ask an administrator for a key with a larger role"),
    404: Example("not_found", "there is no such thing in this project"),
    408: Example("request_timeout", "no byte of the announced body came for 30 s; send it again"),
    409: Example("conflict", "it was changed in the meantime; read it again and repeat"),
    413: Example("payload_too_large", "the body is larger than 67108864 bytes"),
    415: Example("unsupported_media_type", "send application/json, not application/octet-stream"),
    422: Example(
        "idempotency_mismatch", "this Idempotency-Key was used with another body; send a new key for a new request"
    ),
    429: Example("rate_limited", "this key may make 600 requests a minute; try again in 3 s"),
    500: Example("internal", "something went wrong on the server; its log has the details under this request id"),
    501: Example("not_implemented", "this server lacks an optional part that the request needs"),
    503: Example("unavailable", "the catalog is busy or away; nothing was changed, try again in a moment"),
    504: Example("deadline_exceeded", "no replica answered within 30 s"),
}

_NO_DATASET = Example("dataset_not_found", "dataset 'iris' has no version 9; its versions are: 1, 2", "dataset")
_NO_MODEL = Example("model_not_found", "model 'iris' has no version 9; its versions are: 1, 2", "version")
_NO_DEPLOYMENT = Example(
    "deployment_not_found", "there is no deployment 'iris' in this project; `modelworks deploy` makes one", "name"
)
_NOT_READY = Example("no_ready_replica", "deployment 'iris' has no replica that is ready; try again in a moment")
_NO_JOB = Example("job_not_found", "there is no job 'job_0198c0f4e1b25f3a9c0d1e2f' in this project", "id")
_BAD_NAME = Example("invalid_input", "'my model' is not a name: use 1 to 100 letters, digits, '.', '_' or '-'", "name")
_BAD_FILE = Example("payload_too_large", "the file is larger than 1073741824 bytes")
_NOT_A_FORM = Example("unsupported_media_type", "send multipart/form-data, not application/json")
_NO_PROJECT = Example("project_not_found", "there is no project 'research'", "project")
_BAD_LIMIT = Example("invalid_input", "limit: input should be less than or equal to 100, not 1000", "limit")


def _job_moves(verb: str) -> dict[int, Example]:
    target = {"cancel": "cancelling", "pause": "paused", "resume": "queued"}[verb]
    return {404: _NO_JOB, 409: Example("illegal_state", f"a job that is succeeded cannot become {target}")}


# operation of the policy table, or its noun -> status -> the example
OWN: dict[str, dict[int, Example]] = {
    "datasets": {400: _BAD_LIMIT, 404: _NO_DATASET._replace(param="version")},
    "datasets.create": {
        400: Example("bad_value", "row 17 (line 18), column 'price': 'n/k' is not a number; correct it", "price"),
        404: Example("unsupported_source", "there is no data set 'irises'; try sklearn:iris", "source"),
        413: _BAD_FILE,
        415: _NOT_A_FORM,
        504: Example("download_timeout", "the address did not send the file in time; try again, or upload the file"),
    },
    "usage": {400: Example("invalid_input", "by: input should be 'key' or 'deployment'", "by")},
    "training_jobs": {400: _BAD_LIMIT, 404: _NO_JOB},
    "training_jobs.create": {
        400: Example(
            "invalid_input", "the dataset has no column 'kind' for target; it has: species, petal width (cm)", "target"
        ),
        404: _NO_DATASET,
    },
    "training_jobs.cancel": _job_moves("cancel"),
    "training_jobs.pause": _job_moves("pause"),
    "training_jobs.resume": _job_moves("resume"),
    "evaluations": {400: _BAD_LIMIT, 404: _NO_JOB},
    "evaluations.create": {
        400: Example("invalid_input", "method: give exactly one of holdout, kfold and test", "method"),
        404: _NO_MODEL._replace(param="model"),
    },
    "models": {400: _BAD_NAME, 404: _NO_MODEL},
    "models.list": {400: _BAD_LIMIT},
    "models.create_version": {
        400: Example("bad_onnx", "the file is not an ONNX model; export it anew", "file"),
        404: Example("unsupported_source", "there is no installed package 'flowers'", "source"),
        413: _BAD_FILE,
        415: _NOT_A_FORM,
    },
    "models.set_alias": {
        400: Example("invalid_input", "version: input should be greater than or equal to 1, not 0", "version")
    },
    "models.delete_alias": {
        404: Example("alias_not_found", "model 'iris' has no alias 'champion'; it has no aliases", "alias")
    },
    "deployments": {400: _BAD_NAME, 404: _NO_DEPLOYMENT},
    "deployments.list": {400: _BAD_LIMIT},
    "deployments.put": {
        400: Example("invalid_input", "replicas: max must not be below min", "replicas"),
        404: _NO_MODEL._replace(param="model"),
    },
    "deployments.rollback": {
        400: Example(
            "revision_not_found",
            "deployment 'iris' is at its first revision: there is nothing to go back to",
            "revision",
        )
    },
    "deployments.predict": {
        400: Example(
            "unknown_feature",
            "inputs[0] has the feature 'petal lenght (cm)', which the model does not know; did you mean 'petal length (cm)'? "
            "its features are sepal length (cm), sepal width (cm), petal length (cm), petal width (cm)",
            "petal lenght (cm)",
        ),
        403: Example("forbidden", "this key may not call the deployment 'iris'; it may call: wine"),
        503: _NOT_READY,
    },
    "keys": {
        400: _BAD_LIMIT,
        404: Example("key_not_found", "there is no key 'key_0198c0f4e1b25f3a9c0d1e2f' in this project", "id"),
    },
    "keys.create": {
        400: Example("invalid_input", "expires_in: input should be greater than 0, not -1", "expires_in"),
        403: Example(
            "forbidden", "you cannot give what you do not have: keys:write; give a smaller role or fewer scopes", "role"
        ),
        404: Example("user_not_found", "there is no user 'user_0198c0f4e1b25f3a9c0d1e2f'", "user"),
        409: Example(
            "conflict", "this request made the key key_0198c0f4e1b25f3a9c0d1e2f before, and a key is shown only once"
        ),
    },
    "projects": {400: _BAD_LIMIT},
    "projects.create": {
        400: _BAD_NAME,
        409: Example("project_exists", "there is a project 'research' already", "name"),
    },
    "users": {
        400: _BAD_LIMIT,
        404: Example("user_not_found", "there is no user 'user_0198c0f4e1b25f3a9c0d1e2f'", "user"),
    },
    "users.create": {
        400: Example("invalid_input", "a user's name is printable text without blanks around it", "name"),
        409: Example("user_exists", "there is a user 'ada@example.org' already", "name"),
    },
    "memberships": {400: Example("invalid_input", "role: there is no role 'owner'", "role"), 404: _NO_PROJECT},
    "memberships.list": {400: _BAD_LIMIT},
    "audit": {400: _BAD_LIMIT},
    "oip": {404: _NO_DEPLOYMENT, 503: _NOT_READY},
    "oip.infer": {
        400: Example("bad_inputs", "there is no input 'petal lenght (cm)'; the model's inputs are: petal length (cm)"),
        501: Example("not_implemented", "shared memory is not on; send the tensors with the request"),
    },
    "openai": {
        404: Example(
            "model_not_found",
            "there is no model 'smol' here; GET /v1/models lists those that this key may use",
            "model",
        )
    },
    "openai.chat": {400: Example("invalid_input", "'messages' is required", "messages")},
}


def example(operation: str, status: int) -> Example:
    """The error `status` of an operation of the policy table."""
    for key in (operation, operation.partition(".")[0]):
        if status in OWN.get(key, {}):
            return OWN[key][status]
    return _USUAL[status]
