"""How well a language model foresees texts: the log probabilities of their own tokens, as its engine echoes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.core.generation import Logprob
from modelworks.core.specs import EvaluationSpec
from modelworks.core.tasks import GENERATION
from modelworks.core.tensors import Tensor, pack_bytes, unpack_bytes
from modelworks.core.types import Column
from modelworks.ml.base import JobContext
from modelworks.ml.evaluate.asked import text_column
from modelworks.ml.evaluate.catalogue import OF_LANGUAGE, check_metrics, gate_results
from modelworks.ml.evaluate.compare import compare
from modelworks.ml.evaluate.evaluate import Evaluated
from modelworks.ml.evaluate.folds import kept, summarise
from modelworks.ml.evaluate.predictions import Predictions
from modelworks.ml.evaluate.slices import measure
from modelworks.ml.evaluate.splits import describe_method
from modelworks.ml.package import Package
from modelworks.ml.runtimes.choice import LLAMA, TRANSFORMERS
from modelworks.ml.runtimes.registry import RUNTIMES

if TYPE_CHECKING:
    import pyarrow as pa

SLOTS = 8
_PORTION = 32  # texts between checkpoints
_STALLED = 600.0  # seconds without an answer after which an engine is given up
_ASKED = {"echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0}



def evaluate_language(
    spec: EvaluationSpec,
    package: Package,
    table: pa.Table,
    columns: Sequence[Column],
    ctx: JobContext,
    *,
    other: Package | None = None,
) -> Evaluated:
    """Perplexity and bits per byte of the texts in a column of `table`; the interval is over texts."""
    name = text_column(spec, columns)
    wanted = check_metrics(GENERATION, spec.metrics, spec.gates, among=OF_LANGUAGE)
    texts = table.column(name).to_pylist()
    rows = np.array([row for row, text in enumerate(texts) if text and text.strip()], dtype=np.int64)
    if not len(rows):
        raise InvalidInput(f"the column {name!r} has no text in it", code="no_text", param="text")
    packages = [one for one in (package, other) if one]
    sides, notes = [], []
    for at, one in enumerate(packages):
        start, end = 0.9 * at / len(packages), 0.9 * (at + 1) / len(packages)
        found, cut = _side(one, [texts[row] for row in rows], ctx, f"texts-{at}", (start, end))
        sides.append(Predictions(rows, np.zeros(len(rows), dtype=np.int64), found))
        if cut:
            notes.append(f"{cut} texts are longer than the model's context and were measured in pieces")
    metrics, details = summarise(GENERATION, sides[:1], wanted, None, spec.seed)
    loss, tokens, size = sides[0].output.sum(axis=0)
    details |= {
        "splitter": {"name": "test", "dataset": spec.how.test},
        "language": {"texts": len(rows), "tokens": int(tokens), "bytes": int(size), "negative_log_likelihood": float(loss)},
        "notes": [*notes, *details["notes"]],
    }
    if skipped := len(texts) - len(rows):
        details["notes"].append(f"{skipped} rows without a text are left out")
    if other is not None:
        alike = bool((sides[0].output[:, 1] == sides[1].output[:, 1]).all())
        if not alike:
            details["notes"].append("the two models cut texts into different tokens: bits per byte compares them, perplexity does not")
        decisive = wanted if alike else ["bits_per_byte"]
        details["comparison"] = {"with": spec.compare} | compare(GENERATION, sides[:1], sides[1:], decisive, spec.seed)
    if spec.slices:
        details["slices"] = measure(GENERATION, spec.slices, sides[0], table, columns, wanted, spec.seed)
    if spec.gates:
        details["gates"] = gate_results(spec.gates, metrics)
    return Evaluated(metrics, details, describe_method(spec.how), kept(sides[:1], spec.seed))


def _side(package: Package, texts: list[str], ctx: JobContext, prefix: str, span: tuple[float, float]) -> tuple[np.ndarray, int]:
    """([n, 3]: loss in nats, tokens and bytes of each text; how many were cut). Each portion is a checkpoint."""
    reader: _Reader | None = None
    found: list[np.ndarray] = []
    try:
        for first in range(0, len(texts), _PORTION):
            key = f"{prefix}-{first}"
            kept_ = ctx.restore(key)
            if kept_ is None:
                reader = reader or _Reader(package, ctx.threads)
                portion = reader.read(texts[first : first + _PORTION])
                ctx.checkpoint(key, portion.tobytes())
            else:
                portion = np.frombuffer(kept_, dtype=np.float64).reshape(-1, 4)
            found.append(portion)
            done = min(1.0, (first + _PORTION) / len(texts))
            ctx.progress(span[0] + done * (span[1] - span[0]), "reading texts")
    finally:
        if reader is not None:
            reader.runtime.close()
    whole = np.concatenate(found)
    return whole[:, :3], int((whole[:, 3] > 1).sum())


class _Reader:
    """An engine that tells what it thinks of a prompt."""

    def __init__(self, package: Package, threads: int) -> None:
        runtime = package.manifest.runtime
        if runtime not in (LLAMA, TRANSFORMERS):
            raise InvalidInput(
                f"a model that runs by {runtime} tells no probabilities of a text's tokens; perplexity is of GGUF and safetensors "
                "language models",
                param="model",
            )
        engine: Any = RUNTIMES.get(runtime)()
        self.runtime = engine
        engine.load(package, threads, slots=SLOTS)

    def read(self, texts: list[str]) -> np.ndarray:
        """[n, 4]: loss, tokens, bytes, and into how many pieces a text was cut to fit the context."""
        found = np.zeros((len(texts), 4))
        waiting = deque(enumerate(texts))
        aboard: dict[int, tuple[int, str, list[Logprob]]] = {}
        number = 0
        while waiting or aboard:
            while waiting and len(aboard) < min(SLOTS, self.runtime.slots):
                place, text = waiting.popleft()
                number += 1
                try:
                    self.runtime.admit(number, [Tensor("prompt", "BYTES", [1], pack_bytes([text]))], _ASKED, True)
                except InvalidInput as error:
                    waiting.extendleft(reversed(_smaller(place, text, error)))
                    continue
                aboard[number] = (place, text, [])
            if not aboard:
                continue
            steps = self.runtime.step(_STALLED)
            if not steps:
                raise ModelworksError(f"the engine said nothing for {_STALLED:g} s", code="model_error")
            for call, item, done in steps:
                place, text, said = aboard[call]
                if isinstance(item, ModelworksError):
                    aboard.pop(call)
                    waiting.extendleft(reversed(_smaller(place, text, item)))
                    continue
                for output in item or ():
                    if output.name == "logprobs":
                        said += msgspec.json.decode(unpack_bytes(output.data, "logprobs")[0], type=list[Logprob])
                if done:
                    aboard.pop(call)
                    known = [one for one in said if one.logprob is not None]
                    loss = -sum(float(one.logprob or 0.0) for one in known)
                    found[place] += (loss, len(known), sum(len(one.bytes) for one in known), 1)
        return found


def _smaller(place: int, text: str, error: ModelworksError) -> list[tuple[int, str]]:
    """The halves of a text that the context cannot hold, cut at a space where there is one; else the error."""
    if error.code != "context_length_exceeded" or len(text) < 2:
        raise error
    middle = len(text) // 2
    space = text.rfind(" ", len(text) // 4, middle + 1)
    cut = space if space > 0 else middle
    return [(place, text[:cut]), (place, text[cut:])]
