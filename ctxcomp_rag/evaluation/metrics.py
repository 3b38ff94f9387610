"""Scores of answers and reconstructions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from ctxcomp_rag.facts import NUMBER

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"\w[\w'-]*")
_NAME = re.compile(r"(?<=[\w,;] )[A-Z]\w[\w'-]*")  # a capital at the beginning of a sentence says nothing
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


def rouge(prediction: str, references: Sequence[str], kind: str) -> float:
    """Best ROUGE F-measure of `kind` ("rouge1", "rouge2", "rougeL") by rouge-score, stemmed; needs the `eval` extra."""
    return max((score[kind].fmeasure for score in (_rouge_scorer().score(r, prediction) for r in references)),
               default=0.0)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def numbers_kept(prediction: str, references: Sequence[str]) -> float | None:
    """Share of the first reference's numbers that the prediction has exactly, each as often; None without numbers."""
    return _kept(NUMBER.findall(prediction), NUMBER.findall(references[0]))


def names_kept(prediction: str, references: Sequence[str]) -> float | None:
    """Share of the capitalised words inside sentences of the first reference that the prediction has exactly."""
    return _kept(_WORD.findall(prediction), _NAME.findall(references[0]))


def _kept(found: Sequence[str], wanted: Sequence[str]) -> float | None:
    return (Counter(found) & Counter(wanted)).total() / len(wanted) if wanted else None


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 by sacrebleu (13a tokenisation), 0 to 100; needs the `eval` extra."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def mean(values: Sequence[float]) -> float:
    """Mean, 0.0 of nothing."""
    return sum(values) / len(values) if values else 0.0
