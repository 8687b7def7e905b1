"""The house of api_house.py with models of text behind it: `chat` says what a test has written, `embed` counts letters,
`judge` looks for an x."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from modelworks.core.errors import ModelworksError
from modelworks.core.generation import TEXT_GENERATION, Logprob, part, read_ask
from modelworks.core.tensors import Tensor, unpack_bytes
from modelworks.core.types import Signature, TensorSpec
from modelworks.serve.routes import Route
from modelworks.serve.wire import Part
from tests.api_house import FakeRouter, House, _Pending

EMBEDDING = Signature(
    inputs=[
        TensorSpec(name="text", datatype="BYTES", shape=[-1]),
        TensorSpec(name="token_ids", datatype="INT32", shape=[-1, -1]),
    ],
    outputs=[
        TensorSpec(name="embedding", datatype="FP32", shape=[-1, 4]),
        TensorSpec(name="tokens", datatype="INT32", shape=[-1]),
    ],
)

JUDGE = Signature(
    inputs=[TensorSpec(name="text", datatype="BYTES", shape=[-1, 1])],
    outputs=[TensorSpec(name="probabilities", datatype="FP32", shape=[-1, 2])],
)


class TextRouter(FakeRouter):
    """`says`: what chat answers, as the pieces of a stream, each counted as one token; or an error in their place."""

    def __init__(self, project_id: str) -> None:
        super().__init__(project_id)
        self.says: list[str] | ModelworksError | Callable[[Any], list[str]] = ["Hello"]
        self.reason = "stop"
        self.texts = {
            name: Route(project_id, name, f"{name}:1", signature, task)
            for name, signature, task in (
                ("chat", TEXT_GENERATION, "text-generation"),
                ("embed", EMBEDDING, "embedding"),
            )
        }
        self.texts["judge"] = Route(project_id, "judge", "judge:1", JUDGE, "text-classification", ["safe", "toxic"])

    def route(self, key: tuple[str, str]) -> Route | None:
        found = self.texts.get(key[1])
        return found if found is not None and found.key == key else super().route(key)

    def routes(self) -> list[Route]:
        return [*super().routes(), *self.texts.values()]

    def ahead(self, key: tuple[str, str]) -> int:
        return 0

    def submit(self, key: tuple[str, str], call: Any, deliver: Callable[[Any], None], *, manual: bool = False) -> Any:
        if key[1] not in self.texts:
            return super().submit(key, call, deliver, manual=manual)
        self.calls.append(call)
        pending = _Pending()
        pending.deliver = deliver
        pending.done = True
        if key[1] == "embed":
            deliver(Part(_embedded(call.inputs), "embed:1"))
        elif key[1] == "judge":  # toxic is what has an x
            shares = [float(b"x" in text) for text in unpack_bytes(call.inputs[0].data)]
            data = struct.pack(f"<{2 * len(shares)}f", *(value for one in shares for value in (1 - one, one)))
            deliver(Part([Tensor("probabilities", "FP32", [len(shares), 2], data)], "judge:1"))
        else:
            self._generate(call, deliver)
        return pending

    def _generate(self, call: Any, deliver: Callable[[Any], None]) -> None:
        said = self.says(call) if callable(self.says) else self.says
        if isinstance(said, ModelworksError):
            deliver(said)
            return
        sampling = read_ask(call.inputs, call.params).sampling
        asks = sampling.logprobs is not None
        pieces = said if call.stream else ["".join(said)]
        for at, text in enumerate(pieces):
            last = at == len(pieces) - 1
            made = len(said) if last else at + 1
            logprobs = [Logprob(text, -0.5, list(text.encode()), [], 7)] if asks else None
            deliver(Part(part(text, self.reason if last else "", 10, made, 4, logprobs), "chat:1", last))

    @property
    def asked(self) -> dict[str, Any]:
        """The last call's parameters and its input, decoded."""
        call = self.calls[-1]
        tensor = call.inputs[0]
        if tensor.datatype == "BYTES":
            (value,) = unpack_bytes(tensor.data)
            found: Any = json.loads(value) if tensor.name == "messages" else value.decode()
        else:
            found = list(struct.unpack(f"<{tensor.shape[0]}i", tensor.data))
        return {**call.params, tensor.name: found}


def _embedded(inputs: list[Tensor]) -> list[Tensor]:
    """Of each row, how many a, b, c, d it has; of token ids, the first four."""
    found = {tensor.name: tensor for tensor in inputs}
    if "token_ids" in found:
        rows, width = found["token_ids"].shape
        ids = struct.unpack(f"<{rows * width}i", found["token_ids"].data)
        lines = [ids[at * width : (at + 1) * width] for at in range(rows)]
        counts = [[float(max(0, value)) for value in (*line, 0, 0, 0, 0)][:4] for line in lines]
        tokens = [sum(value >= 0 for value in line) for line in lines]
    else:
        texts = [text.decode() for text in unpack_bytes(found["text"].data)]
        counts = [[float(text.count(letter)) for letter in "abcd"] for text in texts]
        tokens = [len(text.split()) for text in texts]
    size = len(counts)
    return [
        Tensor(
            "embedding", "FP32", [size, 4], struct.pack(f"<{4 * size}f", *(value for row in counts for value in row))
        ),
        Tensor("tokens", "INT32", [size], struct.pack(f"<{size}i", *tokens)),
    ]


def furnish(found: House) -> TextRouter:
    """Put a TextRouter into the house, and deployments into its catalog."""
    router = TextRouter(found.admin.project_id)
    found.router = router
    found.services.gateway.router = router  # type: ignore[assignment]
    return router
