"""Where two answers differ, word by word."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher

from ctxcomp_rag.evaluation.metrics import normalise


@dataclass(frozen=True)
class Words:
    """A run of words; `differs` from the text that it was compared with."""

    text: str
    differs: bool


def compared(text: str, reference: str) -> tuple[Words, ...]:
    """`text` in runs of words that `reference` has in the same order, and of words that it has not.

    Words that differ in case, punctuation or articles only are the same, as they are to the scores.
    """
    words = text.split()
    matcher = SequenceMatcher(a=[normalise(w) for w in reference.split()], b=[normalise(w) for w in words],
                              autojunk=False)
    return tuple(Words(" ".join(words[begin:end]), tag != "equal")
                 for tag, _, _, begin, end in matcher.get_opcodes() if begin < end)
