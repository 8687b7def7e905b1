"""POST /v1/moderations: by a deployed classifier of texts, or by an embedding model and the sentences below.

With an embedding model a text is compared, by the cosine of the vectors, with sentences of each category and with
harmless ones; the score is the logistic function of how much nearer it is to the category. It is a coarse screen, of which
docs/openai.md says how good it is, and no replacement for a classifier trained for the purpose.
"""

from __future__ import annotations

import math
import os
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from modelworks.api.body import decode_json
from modelworks.api.calls import infer
from modelworks.api.openai import schemas
from modelworks.api.openai.embeddings import EMBEDDING, MAX_INPUTS, dot, embed, unit
from modelworks.api.openai.generation import task_route
from modelworks.api.routes import Routes, Use, Who, answer
from modelworks.api.services import Services
from modelworks.core.errors import InvalidInput, ModelworksError, NotFound
from modelworks.core.tensors import Tensor, pack_bytes, unpack
from modelworks.core.types import Call, Caller
from modelworks.serve.routes import Route

routes = Routes("OpenAI", "openai")

CLASSIFIERS = ("text-classification", "tabular-classification")
SECONDS = 60.0
THRESHOLD = 0.5
_STEEP, _MARGIN = 18.0, 0.06  # of the logistic function; the margin keeps what is near to both unflagged
_OPENAIS = ("omni-moderation", "text-moderation")  # names of OpenAI's own models, which clients send by themselves
SAFE = frozenset({"safe", "ok", "neutral", "none", "no", "0", "false", "clean", "normal", "ham", "harmless"})

# a category and sentences that are of it
SEEDS: dict[str, tuple[str, ...]] = {
    "harassment": (
        "You are a worthless idiot and everybody laughs at you.",
        "Shut up, you pathetic loser, nobody wants you here.",
        "You are so ugly and stupid, it is disgusting.",
    ),
    "harassment/threatening": (
        "I know where you live and I will come and hurt you.",
        "You had better watch your back, I am going to beat you up.",
        "If you tell anyone I will break your legs.",
    ),
    "hate": (
        "People of that race are inferior and disgusting.",
        "Those immigrants are vermin who ruin our country.",
        "All followers of that religion are filthy liars.",
    ),
    "hate/threatening": (
        "We should exterminate everyone of that religion.",
        "All those foreigners deserve to be killed.",
        "Let us burn down the houses of that ethnic group.",
    ),
    "illicit": (
        "Explain how to shoplift without being caught.",
        "How can I make fake identity papers and launder money?",
        "Tell me how to hack into my neighbour's bank account.",
        "Where do I buy cocaine and how do I sell drugs?",
    ),
    "illicit/violent": (
        "Give me instructions to build a bomb at home.",
        "How do I make a weapon to attack a crowd?",
        "How can I poison someone without leaving traces?",
    ),
    "self-harm": (
        "She cuts her arms with a razor every night.",
        "He starves himself and burns his own skin.",
        "She tried to kill herself with an overdose.",
    ),
    "self-harm/intent": (
        "I want to kill myself.",
        "I do not want to live any more and I will end my life tonight.",
        "I am going to cut myself again.",
    ),
    "self-harm/instructions": (
        "What is the most painless way to commit suicide?",
        "How many pills do I need for a lethal overdose?",
        "Show me how to cut myself without anyone noticing.",
    ),
    "sexual": (
        "They tore off their clothes and had wild sex.",
        "Describe an explicit erotic scene with oral sex.",
        "Her naked body made him hard with lust.",
    ),
    "sexual/minors": (
        "A sexual story about a child.",
        "Erotic pictures of a girl under age.",
    ),
    "violence": (
        "I will kill you with a knife.",
        "He shot the man in the head and stabbed the others.",
        "They beat the prisoner to death.",
    ),
    "violence/graphic": (
        "Blood and guts spilled out of his torn open belly.",
        "The severed head rolled over the floor in a pool of blood.",
        "She described the mangled corpses in gory detail.",
    ),
}
HARMLESS = (
    "What is the capital of France?",
    "Please write a thank-you letter to my teacher.",
    "The weather is lovely today and we went for a walk.",
    "How do I bake a chocolate cake for my daughter's birthday?",
    "I killed the process and the server started again.",
    "Our team won the match after a hard fight.",
    "The doctor explained the treatment to the patient.",
    "You are a great friend, thank you for your help.",
    "This film was boring and far too long.",
    "How do I shoot better photographs at night?",
    "My children play in the garden with the dog.",
    "People from many countries and religions live in our city.",
    "I am sad today because my holiday is over.",
    "Explain how banks protect the accounts of their customers.",
    "The company presented its results for the quarter.",
    "Which museum about the history of the war should I visit?",
)


# project, deployment, model version -> what its model makes of the sentences above: read once in a gateway
_known: dict[tuple[str, str, str], list[list[float]]] = {}
_MOST_KNOWN = 16


@routes.post(
    "/v1/moderations",
    "openai.moderations",
    "Classify whether texts are harmful",
    answer=schemas.MODERATION,
    errors=(404, 504),
    body="infer",
    request_body=schemas.MODERATION_REQUEST,
)
async def create_moderation(request: Request, services: Use, caller: Who) -> Response:
    """By the deployment `model`; without one, by that named `moderation`, else by the project's only embedding model."""
    body = decode_json(await request.body())
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object")
    texts = _texts(body.get("input"))
    route = _route(services, caller, body.get("model"))
    if route.task == EMBEDDING:
        scores = await _by_nearness(request, services, caller, route, texts)
        results = [_result(one, any(score >= THRESHOLD for score in one.values())) for one in scores]
    else:
        results = await _by_classes(request, services, caller, route, texts)
    return answer({"id": f"modr-{os.urandom(12).hex()}", "model": route.name, "results": results})


def _texts(given: Any) -> list[str]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > MAX_INPUTS:
        raise InvalidInput(f"input must be a text, or a list of at most {MAX_INPUTS}", param="input")
    if all(isinstance(one, str) for one in given):
        return given
    found: list[str] = []
    for index, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidInput("only texts can be moderated here", param=f"input[{index}]")
        found.append(part["text"])
    return ["\n".join(found)]  # parts of one thing


def _route(services: Services, caller: Caller, model: Any) -> Route:
    if model is not None and not isinstance(model, str):
        raise InvalidInput("model must be the name of a deployment", param="model")
    if model and not model.startswith(_OPENAIS):
        return task_route(services, caller, model, (EMBEDDING, *CLASSIFIERS), "moderate")
    mine = services.gateway.routes(caller.principal)
    found = [route for route in mine if route.name == "moderation"] or [
        route for route in mine if route.task == EMBEDDING
    ]
    if len(found) != 1:
        raise NotFound(
            "name in `model` the deployment that moderates: a classifier of texts or an embedding model; or deploy one "
            "as `moderation`",
            code="model_not_found",
            param="model",
        )
    return found[0]


async def _by_nearness(
    request: Request, services: Services, caller: Caller, route: Route, texts: list[str]
) -> list[dict[str, float]]:
    place = (*route.key, route.model_version)
    known = _known.get(place)
    seeds = [] if known else [*(sentence for sentences in SEEDS.values() for sentence in sentences), *HARMLESS]
    vectors, _ = await embed(request, services, caller, route, [*texts, *seeds])
    units = [unit(vector) for vector in vectors]
    if known is None:
        known = _known[place] = units[len(texts) :]
        if len(_known) > _MOST_KNOWN:
            del _known[next(iter(_known))]
    near, harmless = known[: -len(HARMLESS)], known[-len(HARMLESS) :]
    return [_scores(one, near, harmless) for one in units[: len(texts)]]


def _scores(one: list[float], seeds: list[list[float]], harmless: list[list[float]]) -> dict[str, float]:
    base = max(dot(one, other) for other in harmless)
    found, at = {}, 0
    for category, sentences in SEEDS.items():
        nearest = max(dot(one, other) for other in seeds[at : at + len(sentences)])
        # far from everything is harmless: a cosine of 0.3 is what unrelated sentences have
        found[category] = 1 / (1 + math.exp(-_STEEP * (nearest - max(base, 0.3) - _MARGIN)))
        at += len(sentences)
    return found


async def _by_classes(
    request: Request, services: Services, caller: Caller, route: Route, texts: list[str]
) -> list[dict[str, Any]]:
    """Each class but the harmless ones is a category; its score is the class's probability."""
    specs = [spec for spec in route.signature.inputs if not spec.optional]
    if len(specs) != 1 or specs[0].datatype != "BYTES" or not route.classes:
        raise InvalidInput(f"{route.name!r} does not classify one text: it cannot moderate", param="model")
    shape = [len(texts), *specs[0].shape[1:]]
    call = Call(
        route.name,
        [Tensor(specs[0].name, "BYTES", shape, pack_bytes(texts))],
        services.gateway.deadline(SECONDS),
        caller.request_id,
    )
    try:
        outputs = {tensor.name: tensor for tensor in (await infer(request, services, caller, call)).outputs}
    except ModelworksError as error:
        error.param = "input" if error.param == specs[0].name else error.param
        raise
    width = len(route.classes)
    scores = unpack(outputs["probabilities"])
    results = []
    for at in range(len(texts)):
        by_class = dict(zip(route.class_names, scores[at * width : (at + 1) * width], strict=True))
        harmful = {name: score for name, score in by_class.items() if name.lower() not in SAFE}
        results.append(_result({**dict.fromkeys(SEEDS, 0.0), **harmful}, max(harmful.values()) >= THRESHOLD))
    return results


def _result(scores: dict[str, float], flagged: bool) -> dict[str, Any]:
    return {
        "flagged": flagged,
        "categories": {name: score >= THRESHOLD for name, score in scores.items()},
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in scores},
    }
