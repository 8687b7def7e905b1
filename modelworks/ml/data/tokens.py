"""Tokenizers as data: byte-pair encoding learnt from texts, or one that is given as JSON. The tokenizers library runs both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from modelworks.core.errors import InvalidInput, MissingExtra

PAD, UNKNOWN = "[PAD]", "[UNK]"
END = "<|end|>"
_PADS = (PAD, "<pad>", "<PAD>", "<|pad|>", "<|endoftext|>", "</s>")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("tokenise needs the tokenizers library; pip install tokenizers") from None
    return tokenizers


def learn(texts: Iterable[str], vocabulary: int, lowercase: bool) -> dict[str, Any]:
    """A byte-level BPE tokenizer as JSON, at most `vocabulary` tokens; 0 is the padding, 1 what is unknown.

    Bytes are the alphabet, so no text is beyond it, unless `vocabulary` is too small to hold them all.
    """
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE(unk_token=UNKNOWN))
    normal = [lib.normalizers.NFC()] + ([lib.normalizers.Lowercase()] if lowercase else [])
    tokenizer.normalizer = lib.normalizers.Sequence(normal)
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = lib.decoders.ByteLevel()
    alphabet = lib.pre_tokenizers.ByteLevel.alphabet() if vocabulary >= 512 else []
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    return made


def learn_generative(texts: Iterable[str], vocabulary: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer as JSON that gives back every text as it was. Token 0 stands between texts, and thus before
    each; with a `vocabulary` of 257 there are bytes alone.
    """
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    alphabet = sorted(lib.pre_tokenizers.ByteLevel.alphabet())
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = lib.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    return made


def load(made: dict[str, Any], where: str = "tokenizer") -> Any:
    """The library's tokenizer; InvalidInput for JSON that is none."""
    lib = _library()
    try:
        return lib.Tokenizer.from_str(json.dumps(made))
    except Exception as error:  # the library's own exceptions have no type
        raise InvalidInput(f"the tokenizer cannot be read ({str(error)[:150]})", param=where, code="bad_tokenizer") from None


def encoder(made: dict[str, Any]) -> Callable[[list[str]], list[list[int]]]:
    """What turns texts into token numbers, neither cut nor padded."""
    tokenizer = load(made)
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(texts)]

    return encode


def facts(made: dict[str, Any]) -> tuple[int, int]:
    """(size of the vocabulary, number of the padding token)."""
    tokenizer = load(made)
    pads = [tokenizer.token_to_id(name) for name in _PADS]
    return tokenizer.get_vocab_size(), next((pad for pad in pads if pad is not None), 0)
