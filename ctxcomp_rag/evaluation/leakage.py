"""Whether what is measured was trained on: word n-grams and names that both sides have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.fictional import FictionalDocument
from ctxcomp_rag.evaluation.metrics import normalise

_SHOWN = 3


@dataclass(frozen=True)
class Overlap:
    """How much of the held-out texts stands in the training texts.

    Attributes:
        n: words of an n-gram, normalised as for exact match.
        leaking: held-out texts that share at least one n-gram with a training text.
        ngrams, shared: distinct n-grams of the held-out texts, and those of them that training texts have.
        examples: some of the shared ones.
    """

    n: int
    texts: int
    leaking: int
    ngrams: int
    shared: int
    examples: tuple[str, ...]


def ngram_overlap(train: Iterable[str], held_out: Sequence[str], n: int = 13) -> Overlap:
    """Overlap of word n-grams; 13 is the length that GPT-3's authors call contamination (Brown et al., 2020, app. C).

    A held-out text shorter than `n` words counts as one n-gram of its own length.
    """
    if n < 1:
        raise InputError(f"expected n-grams of at least one word, got {n}")
    wanted: dict[tuple[str, ...], set[int]] = {}
    for number, text in enumerate(held_out):
        for gram in _ngrams(normalise(text).split(), n):
            wanted.setdefault(gram, set()).add(number)
    lengths = sorted({len(gram) for gram in wanted})
    shared: dict[tuple[str, ...], None] = {}
    for text in train:
        words = normalise(text).split()
        for length in lengths:
            shared.update(dict.fromkeys(g for g in _ngrams(words, length) if len(g) == length and g in wanted))
    leaking = {number for gram in shared for number in wanted[gram]}
    return Overlap(n, len(held_out), len(leaking), len(wanted), len(shared),
                   tuple(" ".join(g) for g in sorted(shared)[:_SHOWN]))


def shared_subjects(train: Iterable[FictionalDocument], held_out: Iterable[FictionalDocument]) -> tuple[str, ...]:
    """Proper names of subjects that both sides have, sorted."""
    return tuple(sorted({d.subject for d in train} & {d.subject for d in held_out}))


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    if words:
        for i in range(max(1, len(words) - n + 1)):
            yield tuple(words[i : i + n])
