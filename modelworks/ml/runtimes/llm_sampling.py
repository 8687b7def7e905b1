"""How one token is chosen from a model's logits, and how tokens become text; for engines that leave both to us."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.generation import Logprob, Sampling
from modelworks.ml.data.tokens import load
from modelworks.ml.folder import read_json
from modelworks.ml.runtimes.llm_text import MARKS

if TYPE_CHECKING:
    import torch

_SEEDS = 2**63
_MILDEST = 1e-5  # a repetition penalty below would leave the range of float32
_LIKELIEST = 256  # tokens among which a nucleus is sought before all are put in order
_LEAST = -9999.0  # in place of minus infinity, which JSON does not have


class Vocabulary:
    """A tokenizer.json: texts to ids and back, and grammars over its tokens."""

    def __init__(self, path: Path, ends: list[int], size: int) -> None:
        """`ends`: the tokens that end an answer; `size`: of the model's logits. InvalidInput for no sound tokenizer."""
        self.tokenizer = load(read_json(path), path.name)
        self.ends = frozenset(id for id in ends if id < size)
        self.size = size
        added = self.tokenizer.get_added_tokens_decoder()
        self.silent = {id for id, token in added.items() if token.special and token.content not in MARKS}

    def ids(self, text: str, *, special: bool) -> list[int]:
        """`special`: with the tokens that the model wants around a text of its own, such as the beginning of sequence."""
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def stream(self, before: list[int]) -> Any:
        """What makes text of tokens that follow `before`, whole characters only."""
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=before[-8:], skip_special_tokens=False)

    def piece(self, id: int) -> bytes:
        token = self.tokenizer.id_to_token(id) or ""
        if self._letters and all(letter in self._letters for letter in token):
            return bytes(self._letters[letter] for letter in token)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _letters(self) -> dict[str, int]:
        """Of byte-level vocabularies (GPT-2's way): the letter that stands for each byte."""
        if "ByteLevel" not in str(self.tokenizer.decoder):
            return {}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}

    @cached_property
    def _for_grammars(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(self.tokenizer.to_str(), n_vocab=self.size, eos_token=sorted(self.ends))

    def matcher(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        return LLMatcher(self._for_grammars, grammar)


class Chooser:
    """Draws a call's tokens: the same seed gives the same tokens, whatever else runs beside it."""

    def __init__(self, sampling: Sampling, prompt: list[int], matcher: Any) -> None:
        import torch

        self._sampling = sampling
        self._prompt = prompt
        self._matcher = matcher
        self._made: Counter[int] = Counter()
        self._random = torch.Generator()
        if sampling.seed is not None:
            self._random.manual_seed(sampling.seed % _SEEDS)
        else:
            self._random.seed()

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, noted as made. logits [vocabulary] float32 on the CPU; they are changed."""
        import torch

        given = self._sampling
        self._weigh(logits)
        if self._matcher is not None:
            self._hold_to_grammar(logits)
        if given.temperature == 0:
            id = int(logits.argmax())
        else:
            id = int(torch.multinomial(self._cut(logits / given.temperature), 1, generator=self._random))
        self._made[id] += 1
        if self._matcher is not None:
            self._matcher.consume_token(id)
        return id

    def _weigh(self, logits: torch.Tensor) -> None:
        import torch

        given = self._sampling
        if given.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self._prompt, *self._made}))
            found = logits[seen]
            penalty = max(given.repetition_penalty, _MILDEST)
            logits[seen] = torch.where(found < 0, found * penalty, found / penalty)
        if (given.presence_penalty or given.frequency_penalty) and self._made:
            ids = torch.tensor(list(self._made))
            counts = torch.tensor(list(self._made.values()), dtype=logits.dtype)
            logits[ids] -= given.presence_penalty + given.frequency_penalty * counts
        for id, bias in given.logit_bias.items():
            if int(id) < len(logits):
                logits[int(id)] += bias

    def _hold_to_grammar(self, logits: torch.Tensor) -> None:
        from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask

        mask = allocate_token_bitmask(1, len(logits))
        fill_next_token_bitmask(self._matcher, mask)
        apply_token_bitmask_inplace(logits.numpy(), mask)

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        """The probabilities to draw from: top_k, then top_p, then min_p."""
        import torch

        given = self._sampling
        if 0 < given.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(given.top_k).values[-1], -torch.inf)
        shares = logits.softmax(-1)
        if given.top_p < 1:
            shares = _nucleus(shares, given.top_p)
        if given.min_p:
            shares = shares.masked_fill(shares < given.min_p * shares.max(), 0)
        return shares


def _nucleus(shares: torch.Tensor, top_p: float) -> torch.Tensor:
    """`shares` of the likeliest tokens that together reach `top_p`, 0 for the others."""
    import torch

    count = min(_LIKELIEST, len(shares))
    while True:
        ordered, places = shares.topk(count)
        kept = ordered.cumsum(-1) - ordered < top_p
        if count == len(shares) or not kept[-1]:
            return torch.zeros_like(shares).index_copy_(0, places[kept], ordered[kept])
        count = len(shares)


def logprob(vocabulary: Vocabulary, id: int, logits: torch.Tensor, count: int) -> Logprob:
    """What the model thinks of `id` and of the `count` likeliest tokens. logits [vocabulary], as the model gave them."""
    shares = logits.log_softmax(-1)

    def one(id: int) -> Logprob:
        data = vocabulary.piece(id)
        return Logprob(data.decode("utf-8", "replace"), max(float(shares[id]), _LEAST), list(data), [], id)

    found = one(id)
    found.top_logprobs = [one(other) for other in shares.topk(min(count, len(shares))).indices.tolist()] if count else []
    return found
