"""Scores of answers and reconstructions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """The official SQuAD v1.1 normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the normalised prediction equals a normalised reference, else 0.0 (SQuAD v1.1)."""
    return float(any(normalise(prediction) == normalise(r) for r in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Best word-overlap F1 against the references (SQuAD v1.1)."""
    return max((_f1(normalise(prediction).split(), normalise(r).split()) for r in references), default=0.0)


def _f1(prediction: list[str], reference: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 by sacrebleu (13a tokenisation), 0 to 100; needs the `eval` extra."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def mean(values: Sequence[float]) -> float:
    """Mean, 0.0 of nothing."""
    return sum(values) / len(values) if values else 0.0
