"""Text generation by transformers: the portable engine, for every decoder that it knows, from safetensors.

Calls decode together: their keys and values lie in one cache, padded on the left; a call joins once its prompt is read.
Prompts are read in pieces between the others' tokens, the shortest first; one with images in one piece. No code from a
model's folder ever runs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput, MissingExtra, ModelworksError
from modelworks.core.generation import (
    TEXT_GENERATION,
    Ask,
    Logprob,
    check_adapter,
    context_exceeded,
    has_images,
    part,
    read_ask,
)
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_eyes import Eyes
from modelworks.ml.runtimes.llm_lora import Adapters
from modelworks.ml.runtimes.llm_sampling import Chooser, Vocabulary, logprob
from modelworks.ml.runtimes.llm_schema import compile_schema
from modelworks.ml.runtimes.llm_template import CHATML, ChatTemplate, reasoning_prefix
from modelworks.ml.runtimes.llm_text import Text

if TYPE_CHECKING:
    import torch

CHAT_FILE = "chat.json"  # {"template", "bos", "eos", "ends", "context_length"}
TOKENIZER_FILE = "tokenizer.json"
MAX_SLOTS = 32
CONTEXT = 4096  # tokens of one call, or fewer when the model was trained on fewer
CHUNK = 256  # tokens of a prompt that are read between two tokens of the others
GPU_CHUNK = 2048

log = logger("transformers")
Step = tuple[Hashable, "list[Tensor] | ModelworksError | None", bool]


class Row:
    """A call aboard: `ids` are the prompt's tokens and those made; `read` of them are in a cache."""

    def __init__(self, id: Hashable, ask: Ask, ids: list[int], prefix: str, stream: bool) -> None:
        self.id = id
        self.ask = ask
        self.ids = ids
        self.count = len(ids)
        self.read = 0
        self.sights: dict[str, Any] = {}  # what the model takes of the images, until the prompt is read
        self.shift = 0  # of the places of the tokens behind the images, where those have places of their own
        self.stream = stream
        self.text = Text(ask.sampling.stop, prefix)
        self.logprobs: list[Logprob] = []
        self.cache: Any = None
        self.chooser: Any = None
        self.decode: Any = None

    @property
    def made(self) -> int:
        return len(self.ids) - self.count

    def part(self, reason: str) -> list[Tensor]:
        text = self.text.ready(all=bool(reason))
        logprobs, self.logprobs = self.logprobs, []
        asked = logprobs if self.ask.sampling.logprobs is not None else None
        return part(text, reason, self.count, self.made, 0, asked)


class TransformersRuntime:
    """`admit` and `abort` never wait; one `step` reads a piece of a prompt and makes a token for every call."""

    lacks: frozenset[str] = frozenset({"images"})

    def __init__(self) -> None:
        self.slots = 1
        self._arrived = threading.Condition()
        self._inbox: deque[Row] = deque()  # with their prompts in tokens
        self._ended: deque[Step] = deque()  # refused before they began
        self._gone: set[Hashable] = set()
        self._aboard: set[Hashable] = set()
        self._reading: list[Row] = []
        self._batch: list[Row] = []
        self._cache: Any = None  # of the batch: keys and values, [rows, heads, tokens, width] a layer
        self._folder: Path | None = None

    def load(
        self,
        package: Package,
        threads: int,
        *,
        slots: int = MAX_SLOTS,
        context: int | None = None,
        adapters: Mapping[str, Package] | None = None,
    ) -> Signature:
        """InvalidInput for a model that transformers does not load from safetensors alone, and for adapters that do not
        fit it. `context`: tokens a call.
        """
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError:
            raise MissingExtra("this engine needs torch and transformers; pip install 'modelworks[nets,llm]'") from None
        self.slots = max(1, min(slots, MAX_SLOTS))
        torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._chunk = CHUNK if self._device == "cpu" else GPU_CHUNK
        self._folder = Path(tempfile.mkdtemp(prefix="mw-"))
        try:
            for name in package.manifest.files:
                (self._folder / name).symlink_to(package.path(name).resolve())
            sees = package.manifest.lineage.get("images") is True
            self._model = _model_of(self._folder, self._device, sees=sees)
            self._eyes = Eyes(self._folder) if sees else None
            self._adapters = Adapters(self._model, adapters or {})
            chat = json.loads((self._folder / CHAT_FILE).read_bytes())
            size = int(self._model.get_output_embeddings().weight.shape[0])
            self._vocabulary = Vocabulary(self._folder / TOKENIZER_FILE, chat["ends"], size)
            mark = self._eyes.mark if self._eyes else ""
            self._template = ChatTemplate(chat["template"] or CHATML, bos=chat["bos"], eos=chat["eos"], mark=mark)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        if not self._vocabulary.ends:
            self.lacks |= {"schema"}  # a grammar ends with an end token
        if sees:
            self.lacks -= {"images"}
        self._takes = _takes(self._model)
        trained = chat.get("context_length") or getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._context = min(context or CONTEXT, int(trained or CONTEXT))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        return TEXT_GENERATION

    def admit(self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool) -> None:
        """Begin a call. InvalidInput when its prompt or parameters are not sound; then it was not admitted."""
        ask = read_ask(inputs, params, self.lacks)
        check_adapter(ask, self._adapters.names)
        grammar = compile_schema(ask.sampling.schema) if ask.sampling.schema is not None else None
        self._aboard.add(call_id)
        self._pool.submit(self._prepare, call_id, ask, grammar, stream)

    def step(self, timeout: float) -> list[Step]:
        """What the calls aboard made in one step, waiting up to `timeout` seconds for the first call."""
        with self._arrived:
            if not self._batch and not self._reading:
                # calls that are to leave come this way too, once their prompts are there
                self._arrived.wait_for(lambda: self._inbox or self._ended, timeout)
            self._reading += self._inbox
            self._inbox.clear()
            steps = [*self._ended]
            self._ended.clear()
            gone, self._gone = self._gone, set()
        if gone:
            left = [row for row in self._reading if row.id in gone] + [row for row in self._batch if row.id in gone]
            steps += [(row.id, None, True) for row in left]
            found = {row.id for row in left} | {id for id, _, _ in steps}
            with self._arrived:  # those whose prompt is not there yet: at the next step
                self._gone |= {id for id in gone - found if id in self._aboard}
            self._reading = [row for row in self._reading if row.id not in gone]
            self._keep([row.id not in gone for row in self._batch])
        for work in (self._decode, self._read):
            with _inference():
                steps += work()
        self._aboard.difference_update(id for id, _, done in steps if done)
        return steps

    def abort(self, call_id: Hashable) -> None:
        """The call leaves at the next step, which tells when it has."""
        with self._arrived:
            if call_id in self._aboard:
                self._gone.add(call_id)

    def __len__(self) -> int:
        return len(self._aboard)

    def generated(self, messages: list[dict[str, Any]], count: int) -> list[int]:
        """What transformers' own greedy `generate` answers to messages with images: up to `count` tokens, to an end at most.

        For checks: while it runs, nothing else may.
        """
        import torch

        assert self._eyes is not None
        ids, sights = self._eyes.read(self._template.render(messages), messages)
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        given = {name: it.to(self._device) for name, it in {**self._taken(sights), **given}.items() if hasattr(it, "to")}
        ends = sorted(self._vocabulary.ends) or None
        with _inference():
            made = self._model.generate(**given, max_new_tokens=count, do_sample=False, eos_token_id=ends, pad_token_id=0)
        return [int(id) for id in made[0, len(ids) :]]

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._template.close()
        self._model = self._cache = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # the prompts' thread

    def _prepare(self, call_id: Hashable, ask: Ask, grammar: str | None, stream: bool) -> None:
        try:
            row = self._row(call_id, ask, grammar, stream)
        except Exception as error:  # a plug's edge: the call must not hang
            with self._arrived:
                self._ended.append(_failed(call_id, error))
                self._arrived.notify()
            return
        with self._arrived:
            self._inbox.append(row)
            self._arrived.notify()

    def _row(self, call_id: Hashable, ask: Ask, grammar: str | None, stream: bool) -> Row:
        prefix = ""
        sights: dict[str, Any] = {}
        if ask.messages is not None:
            text = self._template.render(ask.messages, ask.sampling.tools)
            prefix = reasoning_prefix(text)
            if self._eyes is not None and has_images(ask.messages):
                ids, sights = self._eyes.read(text, ask.messages)
            else:
                ids = self._vocabulary.ids(text, special=False)
        elif ask.prompt is not None:
            ids = self._vocabulary.ids(ask.prompt, special=True)
        else:
            ids = list(ask.tokens or [])
        if max(ids, default=0) >= self._vocabulary.size:
            size = self._vocabulary.size
            raise InvalidInput(f"token id {max(ids)} is beyond the vocabulary of {size}", param="prompt")
        if not ids or len(ids) >= self._context:
            where = "messages" if ask.messages is not None else "prompt"
            raise context_exceeded(len(ids), self._context, where)
        if ask.sampling.echo:
            prefix = ask.prompt if ask.prompt is not None else self._vocabulary.text(ids)
        row = Row(call_id, ask, ids, prefix, stream)
        row.sights = self._taken(sights)
        room = self._context - len(ids)
        asked = ask.sampling.max_tokens
        ask.sampling.max_tokens = room if asked is None else min(asked, room)
        row.chooser = Chooser(ask.sampling, ids, self._vocabulary.matcher(grammar) if grammar else None)
        row.decode = self._vocabulary.stream(ids)
        return row

    # the engine's thread

    def _read(self) -> list[Step]:
        """A piece of the prompt of which least is left; once it is whole, its first token, and into the batch."""
        import torch
        from transformers import DynamicCache

        if not self._reading:
            return []
        row = min(self._reading, key=lambda row: row.count - row.read)
        ids = row.ids[row.read : row.count if row.sights else min(row.count, row.read + self._chunk)]
        row.cache = row.cache or DynamicCache()
        measured = row.ask.sampling.echo and row.ask.sampling.logprobs is not None
        try:
            places = torch.arange(row.read, row.read + len(ids))[None]
            if row.sights:
                logits = self._look(row)
            else:
                logits = self._forward([row], torch.tensor([ids]), row.cache, places, None, keep=0 if measured else 1)[0]
            if measured:
                self._measure(row, ids, logits)
        except Exception as error:  # a plug's edge: what the model throws belongs to the call
            self._reading.remove(row)
            return [_failed(row.id, error)]
        row.read += len(ids)
        if row.read < row.count:
            return []
        self._reading.remove(row)
        if row.ask.sampling.max_tokens == 0:
            return [(row.id, row.part("length"), True)]
        steps = self._made(row, logits[-1].float().cpu())
        if not steps or not steps[-1][2]:
            try:
                self._join(row)
            except Exception as error:  # there may be no memory for a larger batch
                steps.append(_failed(row.id, error))
        return steps

    def _look(self, row: Row) -> torch.Tensor:
        """Read a whole prompt with its images; logits [1, vocabulary] of its last token."""
        import torch

        sights, row.sights = row.sights, {}
        inner = self._model.base_model
        turns = hasattr(inner, "rope_deltas")  # the model itself gives images places in space (Qwen2-VL, arXiv 2409.12191)
        if turns:
            inner.rope_deltas = None
        places = None if turns else torch.arange(row.count)[None]
        logits = self._forward([row], torch.tensor([row.ids]), row.cache, places, None, keep=1, more=sights)[0]
        if turns and inner.rope_deltas is not None:
            row.shift = int(inner.rope_deltas)
        return logits[-1:]

    def _taken(self, sights: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of what the processor made, floats as its weights are."""
        import torch

        return {
            name: it.to(self._model.dtype) if isinstance(it, torch.Tensor) and it.is_floating_point() else it
            for name, it in sights.items()
            if name in self._takes
        }

    def _measure(self, row: Row, ids: list[int], logits: torch.Tensor) -> None:
        count = row.ask.sampling.logprobs or 0
        if row.read == 0:
            data = self._vocabulary.piece(ids[0])
            row.logprobs.append(Logprob(data.decode("utf-8", "replace"), None, list(data), [], ids[0]))
        for at, found in enumerate(logits, row.read + 1):
            if at < row.count:
                row.logprobs.append(logprob(self._vocabulary, row.ids[at], found.float().cpu(), count))

    def _decode(self) -> list[Step]:
        """One token for each call of the batch."""
        import torch

        if not self._batch:
            return []
        longest = max(row.read for row in self._batch)
        mask = torch.zeros(len(self._batch), longest + 1, dtype=torch.long)
        for at, row in enumerate(self._batch):
            mask[at, longest - row.read :] = 1
        ids = torch.tensor([[row.ids[row.read]] for row in self._batch])
        places = torch.tensor([[row.read + row.shift] for row in self._batch])
        alone = len(self._batch) == 1
        try:
            logits = self._forward(self._batch, ids, self._cache, places, None if alone else mask, keep=1)
            logits = logits[:, -1].float().cpu()
        except Exception as error:  # as above: the batch's calls end, those that are read or wait go on
            lost, self._batch, self._cache = self._batch, [], None
            return [_failed(row.id, error) for row in lost]
        steps: list[Step] = []
        keep = []
        for row, found in zip(self._batch, logits, strict=True):
            row.read += 1
            made = self._made(row, found)
            keep.append(not made or not made[-1][2])
            steps += made
        self._keep(keep)
        return steps

    def _made(self, row: Row, logits: torch.Tensor) -> list[Step]:
        """Choose the next token of a call by its logits, float32 on the CPU: what there is to tell of it."""
        try:
            return self._next(row, logits)
        except Exception as error:  # a plug's edge: what one call's parameters throw must not end the others
            return [_failed(row.id, error)]

    def _next(self, row: Row, logits: torch.Tensor) -> list[Step]:
        given = row.ask.sampling
        raw = logits.clone() if given.logprobs is not None else logits
        id = row.chooser.choose(logits)
        row.ids.append(id)
        reason = ""
        if id in self._vocabulary.ends and not given.ignore_eos:
            reason = "stop"
        else:
            if given.logprobs is not None:
                row.logprobs.append(logprob(self._vocabulary, id, raw, given.logprobs))
            text = row.decode.step(self._vocabulary.tokenizer, id)
            if text and id not in self._vocabulary.silent:
                row.text.take(text)
            if row.text.stopped:
                reason = "stop"
            elif row.made >= (given.max_tokens or 0):
                reason = "length"
        if reason or row.stream:
            return [(row.id, row.part(reason), bool(reason))]
        return []

    def _forward(
        self,
        rows: list[Row],
        ids: torch.Tensor,
        cache: Any,
        places: torch.Tensor | None,
        mask: torch.Tensor | None,
        *,
        keep: int,
        more: Mapping[str, Any] | None = None,
    ) -> Any:
        """Logits [rows, `keep` last tokens (0: all), vocabulary]; the cache grows. `more`: what there is of images."""
        self._adapters.choose([row.ask.sampling.adapter for row in rows])
        given: dict[str, Any] = {**(more or {}), "input_ids": ids, "past_key_values": cache, "use_cache": True}
        if places is not None and "position_ids" in self._takes:
            given["position_ids"] = places
        if mask is not None:
            given["attention_mask"] = mask
        given = {name: it.to(self._device) if hasattr(it, "to") else it for name, it in given.items()}
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = keep
        return self._model(**given).logits

    # the batch's cache

    def _join(self, row: Row) -> None:
        """The call's cache becomes the last row of the batch's."""
        import torch
        from torch.nn.functional import pad
        from transformers import DynamicCache

        mine, row.cache = row.cache, None
        if self._batch:
            merged = DynamicCache()
            for at, (ours, theirs) in enumerate(zip(self._cache.layers, mine.layers, strict=True)):
                longest = max(ours.keys.shape[-2], theirs.keys.shape[-2])
                both = [
                    torch.cat([pad(one, (0, 0, longest - one.shape[-2], 0)) for one in pair])
                    for pair in ((ours.keys, theirs.keys), (ours.values, theirs.values))
                ]
                merged.update(*both, at)
            mine = merged
        self._cache = mine
        self._batch.append(row)

    def _keep(self, keep: list[bool]) -> None:
        """Let the other rows go, and the padding that nobody needs any more."""
        from transformers import DynamicCache

        if all(keep):
            return
        self._batch = [row for row, stays in zip(self._batch, keep, strict=True) if stays]
        rows = [at for at, stays in enumerate(keep) if stays]
        before, self._cache = self._cache, None
        if rows:
            longest = max(row.read for row in self._batch)
            self._cache = DynamicCache()
            for at, layer in enumerate(before.layers):
                self._cache.update(layer.keys[rows][:, :, -longest:], layer.values[rows][:, :, -longest:], at)


def _failed(call_id: Hashable, error: Exception) -> Step:
    """The end of a call by `error`, which the log has when it is none of ours."""
    if not isinstance(error, ModelworksError):
        log.error("model_failed", exc_info=error)
        said = "the model failed on this input; the deployment's log has the cause"
        error = ModelworksError(said, code="model_error")
    return call_id, error, True


def _inference() -> contextlib.AbstractContextManager[Any]:
    import torch

    return torch.inference_mode()


def _model_of(folder: Path, device: str, *, sees: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=_dtype(json.loads((folder / "config.json").read_bytes()), device),
        )
    except Exception as error:  # what the many architectures raise on a config that is not sound
        said = " ".join(str(error).split())[:300]
        raise InvalidInput(f"transformers cannot load this model: {said}", code="bad_model") from None
    if model.config.is_encoder_decoder:
        raise InvalidInput("this model has an encoder for its prompts; decoders only are served", code="unsupported_model")
    return model.eval().to(device)


def _takes(model: Any) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(model.forward).parameters)


def _dtype(config: dict[str, Any], device: str) -> Any:
    """As the weights are kept; on the CPU half precision of 5 exponent bits is computed in 32 bits."""
    import torch

    inner = config.get("text_config") or {}
    found = [one.get(name) for one in (config, inner) for name in ("dtype", "torch_dtype")]
    kept = str(next((one for one in found if one), "float32")).removeprefix("torch.")
    if kept == "bfloat16" or (kept == "float16" and device == "cuda"):
        return getattr(torch, kept)
    return torch.float32
