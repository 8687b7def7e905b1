"""Texts against reference texts: word and character error rates by jiwer, BLEU and chrF by sacrebleu, ROUGE.

Each row becomes counts (`Predictions.output`) from which a metric of any selection of rows is computed exactly.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import MissingExtra

if TYPE_CHECKING:
    from modelworks.ml.evaluate.predictions import Predictions

Weighed = Callable[[np.ndarray], float]
# columns of a spoken row: kept, changed, left out and put in, of words and of characters, and whether all is the same
_WORDS, _LETTERS, _SAME = slice(0, 4), slice(4, 8), 8
_BLEU, _CHRF, _ROUGE, _EXACT = slice(0, 10), slice(10, 28), slice(28, 31), 31
# a word; of scripts without spaces between words, a letter
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def plain(text: str) -> str:
    """Without case, punctuation and more than one space in a row."""
    return " ".join(re.sub(r"[^\w\s']|_", " ", text.casefold()).split())


# speech


def spoken(said: Sequence[str], true: Sequence[str]) -> np.ndarray:
    """[n, 9] of transcripts against what was said."""
    try:
        import jiwer
    except ImportError:
        raise _missing("jiwer") from None
    columns = []
    for process in (jiwer.process_words, jiwer.process_characters):
        counts = np.zeros((len(said), 4))
        for row, aligned in enumerate(process(list(true), list(said)).alignments):
            for one in aligned:
                kept = one.ref_end_idx - one.ref_start_idx
                place = ("equal", "substitute", "delete", "insert").index(one.type)
                counts[row, place] += one.hyp_end_idx - one.hyp_start_idx if one.type == "insert" else kept
        columns.append(counts)
    same = np.array([a.split() == b.split() for a, b in zip(said, true, strict=True)], dtype=float)
    return np.column_stack([*columns, same])


def error_rate(which: slice) -> Callable[[Predictions], Weighed]:
    def measure(p: Predictions) -> Weighed:
        return lambda w: _rate(w @ p.output[:, which])

    return measure


WER, CER = error_rate(_WORDS), error_rate(_LETTERS)


def same_spoken(p: Predictions) -> Weighed:
    return lambda w: _mean(p.output[:, _SAME], w)


def _rate(counts: np.ndarray) -> float:
    there = counts[:3].sum()
    return float(counts[1:].sum() / there) if there else math.nan


def errors(p: Predictions) -> dict[str, Any]:
    """How the words and characters of all rows differ."""
    names = ("right", "substituted", "deleted", "inserted")
    counted = {"words": p.output[:, _WORDS], "characters": p.output[:, _LETTERS]}
    return {what: dict(zip(names, counts.sum(axis=0).astype(int).tolist(), strict=True)) for what, counts in counted.items()}


# translations, summaries, answers


def written(said: Sequence[str], true: Sequence[Sequence[str]], tokenize: str) -> np.ndarray:
    """[n, 32]; `true`: one or more references a row, as many for each."""
    bleu, chrf = _scorers(tokenize)
    streams = [list(stream) for stream in zip(*true, strict=True)]
    counts = [np.array(one._extract_corpus_statistics(list(said), streams), dtype=float) for one in (bleu, chrf)]
    rouge = np.array([np.max([_rouge(text, ref) for ref in refs], axis=0) for text, refs in zip(said, true, strict=True)])
    exact = np.array([text.strip() in {ref.strip() for ref in refs} for text, refs in zip(said, true, strict=True)], dtype=float)
    return np.column_stack([*counts, rouge, exact])


def signatures(tokenize: str, references: int) -> dict[str, str]:
    """How BLEU and chrF were computed, in sacrebleu's words: figures with other signatures do not compare."""
    found = {}
    for name, one in zip(("bleu", "chrf"), _scorers(tokenize), strict=True):
        one.num_refs = references
        found[name] = str(one.get_signature())
    return found


def bleu_measure(p: Predictions) -> Weighed:
    return _corpus(p, _BLEU, 0)


def chrf_measure(p: Predictions) -> Weighed:
    return _corpus(p, _CHRF, 1)


def _corpus(p: Predictions, which: slice, place: int) -> Weighed:
    # how texts were tokenised is in the counts already
    scorer = _scorers("13a")[place]

    def weighed(w: np.ndarray) -> float:
        counts = (w @ p.output[:, which]).round().astype(int).tolist()
        return float(scorer._compute_score_from_stats(counts).score) if w.any() else math.nan

    return weighed


def rouge_measure(place: int) -> Callable[[Predictions], Weighed]:
    return lambda p: lambda w: _mean(p.output[:, _ROUGE.start + place], w)


def exact_measure(p: Predictions) -> Weighed:
    return lambda w: _mean(p.output[:, _EXACT], w)


def _rouge(said: str, true: str) -> tuple[float, float, float]:
    """ROUGE-1, 2 and L as F1 (Lin 2004), without stemming: of English text those of the package rouge-score."""
    from rapidfuzz.distance import LCSseq

    a, b = (_WORD.findall(text.lower()) for text in (said, true))
    found = []
    for size in (1, 2):
        grams = [Counter(zip(*(words[at:] for at in range(size)), strict=False)) for words in (a, b)]
        found.append(_f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()))
    return found[0], found[1], _f1(LCSseq.similarity(a, b), len(a), len(b))


def _f1(shared: float, said: int, true: int) -> float:
    return 2 * shared / (said + true) if said and true else 0.0


def _scorers(tokenize: str) -> tuple[Any, Any]:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise _missing("sacrebleu") from None
    return metrics.BLEU(tokenize=tokenize), metrics.CHRF()


# language models: `output` [n, 3]: the negative log probability of a text (nats), how many tokens it is of, its bytes


def perplexity(p: Predictions) -> Weighed:
    def weighed(w: np.ndarray) -> float:
        loss, tokens, _ = w @ p.output
        return math.exp(min(loss / tokens, 700.0)) if tokens else math.nan

    return weighed


def bits_per_byte(p: Predictions) -> Weighed:
    def weighed(w: np.ndarray) -> float:
        loss, _, size = w @ p.output
        return float(loss / size / math.log(2)) if size else math.nan

    return weighed


def _mean(values: np.ndarray, w: np.ndarray) -> float:
    total = w.sum()
    return float(w @ values / total) if total > 0 else math.nan


def _missing(name: str) -> MissingExtra:
    return MissingExtra(f"metrics of texts need {name}; pip install 'modelworks[evaluate]'")
